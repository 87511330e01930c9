//! Python's operators, attributes and items.

use std::cmp::Ordering;
use std::rc::Rc;

use super::ast::{Comparison, Operator};
use super::budget::{Budget, Fail, Res};
use super::value::Value;
use super::{methods, text};

/// Takes the steps that walking through a value takes.
pub(super) fn walk(value: &Value, budget: &mut Budget) -> Res<()> {
    budget.steps(1)?;
    match value {
        Value::Str(text) => budget.steps(text.len() as u64 / 64),
        Value::List(seq) | Value::Tuple(seq) => seq.items.iter().try_for_each(|item| walk(item, budget)),
        Value::Dict(map) => {
            budget.steps((map.entries.len() as u64).pow(2) / 8)?;
            map.entries.iter().try_for_each(|(_, item)| walk(item, budget))
        }
        _ => Ok(()),
    }
}

fn undefined(name: &str) -> Fail {
    Fail::error(format!("'{name}' is undefined"))
}

/// `value.name`: the attribute goes before the key.
pub(super) fn attribute(value: &Value, name: &str, budget: &mut Budget) -> Res<Value> {
    if let Some(found) = own_attribute(value, name)? {
        return Ok(found);
    }
    if let Value::Dict(map) = value {
        budget.steps(map.entries.len() as u64 / 8)?;
        if let Some(found) = map.get_str(name) {
            return Ok(found.clone());
        }
    }
    Ok(Value::undefined(&format!("{}.{name}", value.type_name())))
}

fn own_attribute(value: &Value, name: &str) -> Res<Option<Value>> {
    Ok(match value {
        Value::Undefined(missing) => return Err(undefined(missing)),
        Value::Namespace(members) => members.borrow().iter().find(|(n, _)| &**n == name).map(|(_, v)| v.clone()),
        Value::Loop(state) => {
            let (i, count) = (state.index0, state.items.len());
            let int = |n: usize| Some(Value::Int(n as i64));
            match name {
                "index" => int(i + 1),
                "index0" => int(i),
                "revindex" => int(count - i),
                "revindex0" => int(count - i - 1),
                "first" => Some(Value::Bool(i == 0)),
                "last" => Some(Value::Bool(i + 1 == count)),
                "length" => int(count),
                "depth" => int(state.depth0 + 1),
                "depth0" => int(state.depth0),
                "previtem" => Some(match i.checked_sub(1) {
                    Some(i) => state.items[i].clone(),
                    None => Value::undefined("there is no previous item"),
                }),
                "nextitem" => {
                    Some(state.items.get(i + 1).cloned().unwrap_or_else(|| Value::undefined("there is no next item")))
                }
                "cycle" => Some(Value::Method(Rc::new((value.clone(), "cycle")))),
                "changed" => Some(Value::Method(Rc::new((value.clone(), "changed")))),
                _ => None,
            }
        }
        _ => methods::find(value, name).map(|name| Value::Method(Rc::new((value.clone(), name)))),
    })
}

/// `value[index]`: the key goes before the attribute.
pub(super) fn item(value: &Value, index: &Value, budget: &mut Budget) -> Res<Value> {
    let found = match value {
        Value::Undefined(name) => return Err(undefined(name)),
        Value::Dict(map) => {
            budget.steps(map.entries.len() as u64 / 8)?;
            map.get(index).cloned()
        }
        Value::Str(_) | Value::List(_) | Value::Tuple(_) | Value::Range(..) if index.int().is_some() => {
            let length = value.len().unwrap_or(0) as i64;
            let i = index.int().unwrap_or(0);
            let i = if i < 0 { i.saturating_add(length) } else { i };
            match value {
                _ if !(0..length).contains(&i) => None,
                Value::Str(text) => {
                    budget.steps(text.len() as u64 / 64)?;
                    text.chars().nth(i as usize).map(|c| Value::str(c.encode_utf8(&mut [0; 4])))
                }
                Value::List(seq) | Value::Tuple(seq) => seq.items.get(i as usize).cloned(),
                Value::Range(start, _, step) => Some(Value::Int(start.saturating_add(i.saturating_mul(*step)))),
                _ => None,
            }
        }
        _ => None,
    };
    match (found, index) {
        (Some(found), _) => Ok(found),
        (None, Value::Str(name)) => Ok(own_attribute(value, name)?
            .unwrap_or_else(|| Value::undefined(&format!("{}['{name}']", value.type_name())))),
        (None, _) => Ok(Value::undefined(&format!("an item of a {}", value.type_name()))),
    }
}

/// `value[start:stop:step]`.
pub(super) fn slice(value: &Value, parts: [Option<i64>; 3], budget: &mut Budget) -> Res<Value> {
    if let Value::Undefined(name) = value {
        return Err(undefined(name));
    }
    let length = match value {
        Value::Str(_) | Value::List(_) | Value::Tuple(_) => value.len().unwrap_or(0) as i64,
        other => return Err(Fail::error(format!("'{}' object cannot be sliced", other.type_name()))),
    };
    let step = parts[2].unwrap_or(1);
    if step == 0 {
        return Err(Fail::error("slice step cannot be zero"));
    }
    let (low, high) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let place = |part: Option<i64>, otherwise: i64| match part {
        None => otherwise,
        Some(i) if i < 0 => i.saturating_add(length).clamp(low, high),
        Some(i) => i.clamp(low, high),
    };
    let (begin, end) = match step > 0 {
        true => (place(parts[0], 0), place(parts[1], length)),
        false => (place(parts[0], length - 1), place(parts[1], -1)),
    };
    let mut places = Vec::new();
    let mut i = begin;
    budget.bytes((length as usize).saturating_mul(16))?;
    while if step > 0 { i < end } else { i > end } {
        places.push(i as usize);
        i = i.saturating_add(step);
    }
    match value {
        Value::Str(text) => {
            let chars: Vec<char> = text.chars().collect();
            Ok(Value::str(places.into_iter().map(|i| chars[i]).collect::<String>()))
        }
        Value::List(seq) => Value::list(places.into_iter().map(|i| seq.items[i].clone()).collect()),
        Value::Tuple(seq) => Value::tuple(places.into_iter().map(|i| seq.items[i].clone()).collect()),
        _ => Ok(Value::None),
    }
}

pub(super) fn negative(value: &Value) -> Res<Value> {
    match value {
        Value::Float(x) => Ok(Value::Float(-x)),
        other => match other.int().map(i64::checked_neg) {
            Some(Some(n)) => Ok(Value::Int(n)),
            Some(None) => Err(overflow()),
            None => Err(bad_operand("-", other)),
        },
    }
}

pub(super) fn positive(value: &Value) -> Res<Value> {
    match value {
        Value::Float(x) => Ok(Value::Float(*x)),
        other => other.int().map(Value::Int).ok_or_else(|| bad_operand("+", other)),
    }
}

fn bad_operand(operator: &str, value: &Value) -> Fail {
    match value {
        Value::Undefined(name) => undefined(name),
        other => Fail::error(format!("bad operand for {operator}: '{}'", other.type_name())),
    }
}

fn overflow() -> Fail {
    Fail::error("an integer beyond 64 bits")
}

pub(super) fn binary(operator: Operator, left: &Value, right: &Value, budget: &mut Budget) -> Res<Value> {
    for side in [left, right] {
        if let Value::Undefined(name) = side
            && !(operator == Operator::Modulo && matches!(left, Value::Str(_)))
        {
            return Err(undefined(name));
        }
    }
    let joined = |a: &[Value], b: &[Value], budget: &mut Budget| -> Res<Vec<Value>> {
        budget.bytes((a.len() + b.len()) * size_of::<Value>())?;
        Ok([a, b].concat())
    };
    match (operator, left, right) {
        (Operator::Add, Value::Str(a), Value::Str(b)) => {
            budget.bytes(a.len() + b.len())?;
            return Ok(Value::str([&**a, &**b].concat()));
        }
        (Operator::Add, Value::List(a), Value::List(b)) => return Value::list(joined(&a.items, &b.items, budget)?),
        (Operator::Add, Value::Tuple(a), Value::Tuple(b)) => return Value::tuple(joined(&a.items, &b.items, budget)?),
        (Operator::Modulo, Value::Str(format), values) => {
            return Ok(Value::str(text::percent(format, values, budget)?));
        }
        (Operator::Multiply, Value::Str(_) | Value::List(_) | Value::Tuple(_), count) if count.int().is_some() => {
            return repeat(left, count.int().unwrap_or(0), budget);
        }
        (Operator::Multiply, count, Value::Str(_) | Value::List(_) | Value::Tuple(_)) if count.int().is_some() => {
            return repeat(right, count.int().unwrap_or(0), budget);
        }
        _ => {}
    }
    if let (Some(a), Some(b)) = (left.int(), right.int()) {
        return integers(operator, a, b);
    }
    let (Some(a), Some(b)) = (left.number(), right.number()) else {
        let (a, b) = (left.type_name(), right.type_name());
        return Err(Fail::error(format!("unsupported operand types for {operator:?}: '{a}' and '{b}'")));
    };
    let divided_by_zero = || Fail::error("division by zero");
    Ok(Value::Float(match operator {
        Operator::Add => a + b,
        Operator::Subtract => a - b,
        Operator::Multiply => a * b,
        Operator::Divide if b == 0.0 => return Err(divided_by_zero()),
        Operator::Divide => a / b,
        Operator::FloorDivide | Operator::Modulo if b == 0.0 => return Err(divided_by_zero()),
        Operator::FloorDivide => (a / b).floor(),
        Operator::Modulo => {
            let rest = a % b;
            if rest != 0.0 && (rest < 0.0) != (b < 0.0) { rest + b } else { rest }
        }
        Operator::Power => a.powf(b),
    }))
}

fn integers(operator: Operator, a: i64, b: i64) -> Res<Value> {
    let floor = |a: i64, b: i64| {
        let quotient = a.checked_div(b)?;
        Some(if a.checked_rem(b)? != 0 && (a < 0) != (b < 0) { quotient - 1 } else { quotient })
    };
    let result = match operator {
        Operator::Add => a.checked_add(b),
        Operator::Subtract => a.checked_sub(b),
        Operator::Multiply => a.checked_mul(b),
        Operator::Divide | Operator::FloorDivide | Operator::Modulo if b == 0 => {
            return Err(Fail::error("division by zero"));
        }
        Operator::Divide => return Ok(Value::Float(a as f64 / b as f64)),
        Operator::FloorDivide => floor(a, b),
        Operator::Modulo => a.checked_rem(b).map(|r| if r != 0 && (r < 0) != (b < 0) { r + b } else { r }),
        Operator::Power if b < 0 => return Ok(Value::Float((a as f64).powf(b as f64))),
        Operator::Power => match (a, u32::try_from(b)) {
            (0 | 1, Err(_)) => Some(a),
            (-1, Err(_)) => Some(if b % 2 == 0 { 1 } else { -1 }),
            (_, Err(_)) => None,
            (_, Ok(b)) => a.checked_pow(b),
        },
    };
    result.map(Value::Int).ok_or_else(overflow)
}

fn repeat(value: &Value, count: i64, budget: &mut Budget) -> Res<Value> {
    let count = usize::try_from(count).unwrap_or(0);
    let size = match value {
        Value::Str(text) => text.len(),
        Value::List(seq) | Value::Tuple(seq) => seq.items.len() * size_of::<Value>(),
        _ => 0,
    };
    budget.bytes(size.saturating_mul(count))?;
    if size == 0 {
        return Ok(value.clone());
    }
    match value {
        Value::Str(text) => Ok(Value::str(text.repeat(count))),
        Value::List(seq) => Value::list(std::iter::repeat_n(&seq.items, count).flatten().cloned().collect()),
        Value::Tuple(seq) => Value::tuple(std::iter::repeat_n(&seq.items, count).flatten().cloned().collect()),
        _ => Ok(Value::None),
    }
}

pub(super) fn compare(comparison: Comparison, left: &Value, right: &Value, budget: &mut Budget) -> Res<bool> {
    walk(left, budget)?;
    let ordered = |wanted: &[Ordering]| {
        for side in [left, right] {
            if let Value::Undefined(name) = side {
                return Err(undefined(name));
            }
        }
        match left.order(right) {
            Some(order) => Ok(wanted.contains(&order)),
            None if left.number().is_some() && right.number().is_some() => Ok(false),
            None => {
                let (a, b) = (left.type_name(), right.type_name());
                Err(Fail::error(format!("'{a}' and '{b}' have no order")))
            }
        }
    };
    match comparison {
        Comparison::Equal => Ok(left.equals(right)),
        Comparison::NotEqual => Ok(!left.equals(right)),
        Comparison::Less => ordered(&[Ordering::Less]),
        Comparison::LessEqual => ordered(&[Ordering::Less, Ordering::Equal]),
        Comparison::Greater => ordered(&[Ordering::Greater]),
        Comparison::GreaterEqual => ordered(&[Ordering::Greater, Ordering::Equal]),
        Comparison::In => contains(right, left, budget),
        Comparison::NotIn => contains(right, left, budget).map(|found| !found),
    }
}

/// `item in container`.
pub(super) fn contains(container: &Value, item: &Value, budget: &mut Budget) -> Res<bool> {
    let within = |items: &[Value], budget: &mut Budget| -> Res<bool> {
        for other in items {
            walk(other, budget)?;
            if other.equals(item) {
                return Ok(true);
            }
        }
        Ok(false)
    };
    match (container, item) {
        (Value::Str(text), Value::Str(part)) => {
            budget.steps(text.len() as u64 / 64)?;
            Ok(text.contains(&**part))
        }
        (Value::Str(_), Value::Undefined(name)) => Err(undefined(name)),
        (Value::Str(_), other) => {
            Err(Fail::error(format!("'in <string>' requires string as left operand, not {}", other.type_name())))
        }
        (Value::List(seq) | Value::Tuple(seq), _) => within(&seq.items, budget),
        (Value::Iter(items), _) => within(&items.borrow(), budget),
        (Value::Dict(map), _) => {
            budget.steps(map.entries.len() as u64 / 8)?;
            Ok(map.get(item).is_some())
        }
        (Value::Range(start, _, step), _) => {
            let Some(n) = item.int() else { return Ok(false) };
            let distance = i128::from(n) - i128::from(*start);
            let place = distance / i128::from(*step);
            let length = container.len().unwrap_or(0) as i128;
            Ok(distance % i128::from(*step) == 0 && (0..length).contains(&place))
        }
        (Value::Undefined(_), _) => Ok(false),
        (other, _) => Err(Fail::error(format!("argument of type '{}' is not iterable", other.type_name()))),
    }
}
