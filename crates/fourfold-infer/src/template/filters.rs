//! `value | filter`.

use std::cmp::Ordering;

use super::ast::Comparison;
use super::budget::{Fail, Res};
use super::eval::{CallArgs, Machine};
use super::text::{self, JsonStyle};
use super::value::Value;
use super::{checks, functions, methods, operators};

/// Names of filters. Those of Jinja that are not here make HTML, or numbers at random.
pub(super) const KNOWN: &[&str] = &[
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "first",
    "float",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate",
    "unique",
    "upper",
    "urlencode",
    "wordcount",
];

fn int(value: Option<Value>, otherwise: i64) -> Res<i64> {
    match value {
        None => Ok(otherwise),
        Some(value) => value.int().ok_or_else(|| Fail::error(format!("an int is expected, not {}", value.type_name()))),
    }
}

fn is_true(value: Option<&Value>) -> bool {
    value.is_some_and(Value::is_true)
}

fn string(m: &mut Machine<'_>, value: &Value) -> Res<String> {
    text::to_str(value, &mut m.budget)
}

/// Calls a method of strings on what the value prints.
fn as_str(m: &mut Machine<'_>, value: &Value, name: &'static str, args: Vec<Value>) -> Res<Value> {
    let text = Value::str(string(m, value)?);
    methods::call(m, &text, name, CallArgs::of(args))
}

pub(super) fn apply(m: &mut Machine<'_>, name: &str, input: Value, args: CallArgs) -> Res<Value> {
    m.budget.steps(1)?;
    match name {
        "default" | "d" => {
            let [default, boolean] = args.bind(name, ["default_value", "boolean"])?;
            let missing = matches!(input, Value::Undefined(_)) || is_true(boolean.as_ref()) && !input.is_true();
            Ok(if missing { default.unwrap_or_else(|| Value::str("")) } else { input })
        }
        "tojson" => tojson(m, &input, args),
        "string" | "safe" => match input {
            Value::Str(_) => Ok(input),
            other => Ok(Value::str(string(m, &other)?)),
        },
        "lower" => as_str(m, &input, "lower", vec![]),
        "upper" => as_str(m, &input, "upper", vec![]),
        "capitalize" => Ok(Value::str(methods::capitalize(&string(m, &input)?))),
        "title" => {
            // Words are what white space, hyphens and opening brackets divide.
            let text = string(m, &input)?;
            let (mut out, mut begins) = (String::new(), true);
            for c in text.chars() {
                if begins {
                    out.extend(c.to_uppercase())
                } else {
                    out.extend(c.to_lowercase())
                }
                begins = c == '-' || methods::is_space(c) || "({[<".contains(c);
            }
            Ok(Value::str(out))
        }
        "trim" => {
            let [chars] = args.bind(name, ["chars"])?;
            as_str(m, &input, "strip", chars.into_iter().collect())
        }
        "center" => {
            let [width] = args.bind(name, ["width"])?;
            as_str(m, &input, "center", vec![width.unwrap_or(Value::Int(80))])
        }
        "replace" => {
            let [old, new, count] = args.bind(name, ["old", "new", "count"])?;
            let (Some(old), Some(new)) = (old, new) else { return Err(Fail::error("replace wants two strings")) };
            let (text, old, new) = (string(m, &input)?, string(m, &old)?, string(m, &new)?);
            let count = count.filter(|c| !matches!(c, Value::None));
            methods::replace(m, &text, &old, &new, int(count, -1)?).map(Value::str)
        }
        "format" => {
            let text = string(m, &input)?;
            let values = match args.named.is_empty() {
                true => Value::tuple(args.positional)?,
                false => Value::dict(args.named.into_iter().map(|(k, v)| (Value::str(k), v)).collect())?,
            };
            text::percent(&text, &values, &mut m.budget).map(Value::str)
        }
        "indent" => indent(m, &input, args),
        "truncate" => {
            let [length, killwords, end, leeway] = args.bind(name, ["length", "killwords", "end", "leeway"])?;
            let length = usize::try_from(int(length, 255)?).unwrap_or(0);
            let leeway = usize::try_from(int(leeway, 5)?).unwrap_or(0);
            let end = end.map_or_else(|| Ok("...".to_owned()), |end| string(m, &end))?;
            let text = string(m, &input)?;
            if text.chars().count() <= length.saturating_add(leeway) {
                return Ok(Value::str(text));
            }
            let kept: String = text.chars().take(length.saturating_sub(end.chars().count())).collect();
            let kept = match is_true(killwords.as_ref()) {
                true => kept.as_str(),
                false => kept.rsplit_once(' ').map_or(kept.as_str(), |(head, _)| head),
            };
            Ok(Value::str(kept.to_owned() + &end))
        }
        "wordcount" => {
            let text = string(m, &input)?;
            let is_part = |c: char| c == '_' || c.is_alphanumeric();
            Ok(Value::Int(text.split(|c| !is_part(c)).filter(|word| !word.is_empty()).count() as i64))
        }
        "urlencode" => {
            let text = string(m, &input)?;
            m.budget.bytes(text.len().saturating_mul(3))?;
            let encoded = |b: u8| match b {
                b if b.is_ascii_alphanumeric() || b"_.-~/".contains(&b) => char::from(b).to_string(),
                b => format!("%{b:02X}"),
            };
            Ok(Value::str(text.bytes().map(encoded).collect::<String>()))
        }
        "length" | "count" => match input.len() {
            Some(length) => Ok(Value::Int(length as i64)),
            None => Err(Fail::error(format!("object of type '{}' has no len()", input.type_name()))),
        },
        "list" => {
            let items = m.iterate(&input)?;
            Value::list(items)
        }
        "items" => match &input {
            Value::Dict(_) => {
                let items = methods::call(m, &input, "items", CallArgs::default())?;
                let items = m.iterate(&items)?;
                Value::iter(items)
            }
            Value::Undefined(_) => Value::iter(Vec::new()),
            _ => Err(Fail::error("Can only get item pairs from a mapping.")),
        },
        "first" => {
            Ok(m.iterate(&input)?.into_iter().next().unwrap_or_else(|| Value::undefined("the first of no items")))
        }
        "last" => {
            if matches!(input, Value::Iter(_)) {
                return Err(Fail::error("'generator' object is not reversible"));
            }
            Ok(m.iterate(&input)?.pop().unwrap_or_else(|| Value::undefined("the last of no items")))
        }
        "reverse" => match &input {
            Value::Str(text) => Ok(Value::str(text.chars().rev().collect::<String>())),
            _ => {
                let mut items = m.iterate(&input)?;
                items.reverse();
                Value::iter(items)
            }
        },
        "join" => {
            let [mark, attribute] = args.bind(name, ["d", "attribute"])?;
            let mark = mark.map_or_else(|| Ok(String::new()), |mark| string(m, &mark))?;
            let mut out = String::new();
            for (i, item) in m.iterate(&input)?.into_iter().enumerate() {
                let item = match &attribute {
                    Some(attribute) => path(m, &item, attribute, None)?,
                    None => item,
                };
                let item = string(m, &item)?;
                m.budget.bytes(mark.len() + item.len())?;
                if i > 0 {
                    out += &mark;
                }
                out += &item;
            }
            Ok(Value::str(out))
        }
        "abs" => match &input {
            Value::Float(x) => Ok(Value::Float(x.abs())),
            other => {
                let n = other.int().and_then(i64::checked_abs);
                n.map(Value::Int)
                    .ok_or_else(|| Fail::error(format!("bad operand type for abs(): '{}'", other.type_name())))
            }
        },
        "int" => to_int(&input, args),
        "float" => {
            let [default] = args.bind(name, ["default"])?;
            let parsed = match &input {
                Value::Str(text) => text.trim().replace('_', "").parse().ok(),
                other => other.number(),
            };
            Ok(parsed.map(Value::Float).or(default).unwrap_or(Value::Float(0.0)))
        }
        "round" => {
            let [precision, method] = args.bind(name, ["precision", "method"])?;
            let precision = i32::try_from(int(precision, 0)?).unwrap_or(0).clamp(-300, 300);
            let x = input.number().ok_or_else(|| Fail::error("round wants a number"))?;
            let scale = 10f64.powi(precision);
            Ok(Value::Float(match method {
                Some(Value::Str(way)) if &*way == "ceil" => (x * scale).ceil() / scale,
                Some(Value::Str(way)) if &*way == "floor" => (x * scale).floor() / scale,
                Some(Value::Str(way)) if &*way != "common" => return Err(Fail::error("round: common, ceil or floor")),
                // As Python rounds: the decimal digits of the number decide, a half goes to the even neighbour.
                _ if precision >= 0 => format!("{x:.*}", precision as usize).parse().unwrap_or(x),
                _ => (x * scale).round_ties_even() / scale,
            }))
        }
        "attr" => {
            let [attribute] = args.bind(name, ["name"])?;
            let Some(Value::Str(attribute)) = attribute else { return Err(Fail::error("attr wants a name")) };
            match &input {
                Value::Dict(_) if methods::find(&input, &attribute).is_none() => Ok(Value::undefined(&attribute)),
                _ => operators::attribute(&input, &attribute, &mut m.budget),
            }
        }
        "map" => map(m, &input, args),
        "select" | "reject" | "selectattr" | "rejectattr" => select(m, name, &input, args),
        "sort" | "unique" | "min" | "max" | "groupby" => ordered(m, name, &input, args),
        "dictsort" => {
            let [case_sensitive, by, reverse] = args.bind(name, ["case_sensitive", "by", "reverse"])?;
            let Value::Dict(map) = &input else { return Err(Fail::error("dictsort wants a dict")) };
            let at = usize::from(matches!(by, Some(Value::Str(by)) if &*by == "value"));
            let pairs: Res<Vec<_>> =
                map.entries.iter().map(|(k, v)| Value::tuple(vec![k.clone(), v.clone()])).collect();
            let key = Some(Value::Int(at as i64));
            sorted(m, pairs?, key.as_ref(), is_true(case_sensitive.as_ref()), is_true(reverse.as_ref()))
                .and_then(Value::list)
        }
        "sum" => {
            let [attribute, start] = args.bind(name, ["attribute", "start"])?;
            let mut total = start.unwrap_or(Value::Int(0));
            for item in m.iterate(&input)? {
                let item = match &attribute {
                    Some(attribute) if !matches!(attribute, Value::None) => path(m, &item, attribute, None)?,
                    _ => item,
                };
                total = operators::binary(super::ast::Operator::Add, &total, &item, &mut m.budget)?;
            }
            Ok(total)
        }
        "batch" => {
            let [size, fill] = args.bind(name, ["linecount", "fill_with"])?;
            let size = usize::try_from(int(size, 0)?).ok().filter(|&n| n > 0);
            let size = size.ok_or_else(|| Fail::error("batch wants a number of items"))?;
            let items = m.iterate(&input)?;
            let mut rows = Vec::new();
            for chunk in items.chunks(size) {
                let mut row = chunk.to_vec();
                if let Some(fill) = fill.as_ref().filter(|f| !matches!(f, Value::None)) {
                    m.budget.bytes(size.saturating_mul(size_of::<Value>()))?;
                    row.resize(size, fill.clone());
                }
                rows.push(Value::list(row)?);
            }
            Value::iter(rows)
        }
        "slice" => {
            let [count, fill] = args.bind(name, ["slices", "fill_with"])?;
            let count = usize::try_from(int(count, 0)?).ok().filter(|&n| n > 0);
            let count = count.ok_or_else(|| Fail::error("slice wants a number of slices"))?;
            m.budget.bytes(count.saturating_mul(size_of::<Value>()))?;
            let items = m.iterate(&input)?;
            let (each, larger) = (items.len() / count, items.len() % count);
            let (mut rows, mut at) = (Vec::new(), 0);
            for i in 0..count {
                let size = each + usize::from(i < larger);
                let mut row = items[at..at + size].to_vec();
                at += size;
                if let Some(fill) = fill.as_ref().filter(|f| !matches!(f, Value::None))
                    && i >= larger
                {
                    row.push(fill.clone());
                }
                rows.push(Value::list(row)?);
            }
            Value::iter(rows)
        }
        other => Err(Fail::error(format!("unknown filter `{other}`"))),
    }
}

fn tojson(m: &mut Machine<'_>, input: &Value, args: CallArgs) -> Res<Value> {
    let [ascii, indent, separators, sorted] =
        args.bind("tojson", ["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let indent = match indent {
        None | Some(Value::None) => None,
        Some(Value::Str(text)) => Some(text.to_string()),
        Some(other) => {
            let count = usize::try_from(int(Some(other), 0)?).unwrap_or(0);
            m.budget.bytes(count)?;
            Some(" ".repeat(count))
        }
    };
    let (mut item, mut key) = (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned());
    if let Some(separators) = separators.filter(|s| !matches!(s, Value::None)) {
        let parts = m.iterate(&separators)?;
        let [Value::Str(a), Value::Str(b)] = parts.as_slice() else {
            return Err(Fail::error("separators are two strings"));
        };
        (item, key) = (a.to_string(), b.to_string());
    }
    let style = JsonStyle { ascii: is_true(ascii.as_ref()), indent, item, key, sorted: is_true(sorted.as_ref()) };
    let mut out = String::new();
    text::json(input, &style, 0, &mut out, &mut m.budget)?;
    m.budget.bytes(out.len())?;
    Ok(Value::str(out))
}

fn indent(m: &mut Machine<'_>, input: &Value, args: CallArgs) -> Res<Value> {
    let [width, first, blank] = args.bind("indent", ["width", "first", "blank"])?;
    let space = match width {
        Some(Value::Str(text)) => text.to_string(),
        other => {
            let width = usize::try_from(int(other, 4)?).unwrap_or(0);
            m.budget.bytes(width)?;
            " ".repeat(width)
        }
    };
    let text = string(m, input)? + "\n";
    let lines: Vec<&str> = match text.strip_suffix('\n') {
        Some(body) => body.split('\n').collect(),
        None => Vec::new(),
    };
    m.budget.bytes(lines.len().saturating_mul(space.len() + 1))?;
    let mut out = if is_true(first.as_ref()) { space.clone() } else { String::new() };
    for (i, line) in lines.iter().enumerate() {
        if i > 0 {
            out.push('\n');
            if !line.is_empty() || is_true(blank.as_ref()) {
                out += &space;
            }
        }
        out += line;
    }
    Ok(Value::str(out))
}

fn to_int(input: &Value, args: CallArgs) -> Res<Value> {
    let [default, base] = args.bind("int", ["default", "base"])?;
    let base = u32::try_from(int(base, 10)?).ok().filter(|b| (2..=36).contains(b));
    let base = base.ok_or_else(|| Fail::error("int: a base of 2 to 36 is expected"))?;
    let parsed = match input {
        Value::Str(text) => {
            let text = text.trim().replace('_', "");
            let digits = match base {
                16 => text.replacen("0x", "", 1),
                8 => text.replacen("0o", "", 1),
                2 => text.replacen("0b", "", 1),
                _ => text.clone(),
            };
            let float = || text.parse::<f64>().ok().filter(|x| x.is_finite()).map(|x| x.trunc() as i64);
            i64::from_str_radix(&digits, base).ok().or_else(float)
        }
        Value::Float(x) if x.is_finite() => Some(x.trunc() as i64),
        other => other.int(),
    };
    Ok(parsed.map(Value::Int).or(default).unwrap_or(Value::Int(0)))
}

/// An attribute by a path with dots, whose whole numbers are indices.
fn path(m: &mut Machine<'_>, item: &Value, attribute: &Value, default: Option<&Value>) -> Res<Value> {
    let mut value = item.clone();
    match attribute {
        Value::Str(names) => {
            for name in names.split('.') {
                let key = name.parse().map_or_else(|_| Value::str(name), Value::Int);
                value = operators::item(&value, &key, &mut m.budget)?;
                if let (Value::Undefined(_), Some(default)) = (&value, default) {
                    value = default.clone();
                }
            }
            Ok(value)
        }
        other => operators::item(&value, other, &mut m.budget),
    }
}

fn map(m: &mut Machine<'_>, input: &Value, mut args: CallArgs) -> Res<Value> {
    // Jinja walks through nothing that is false, `none` too.
    let items = if input.is_true() { m.iterate(input)? } else { Vec::new() };
    let mut out = Vec::new();
    if args.positional.is_empty() {
        let [attribute, default] = args.bind("map", ["attribute", "default"])?;
        let attribute = attribute.ok_or_else(|| Fail::error("map requires a filter argument"))?;
        for item in items {
            out.push(path(m, &item, &attribute, default.as_ref())?);
        }
    } else {
        let Value::Str(name) = args.positional.remove(0) else { return Err(Fail::error("map wants a filter's name")) };
        for item in items {
            out.push(apply(m, &name, item, args.clone())?);
        }
    }
    Value::iter(out)
}

fn select(m: &mut Machine<'_>, name: &str, input: &Value, mut args: CallArgs) -> Res<Value> {
    let wanted = name.starts_with("select");
    let attribute = match name.ends_with("attr") {
        true if args.positional.is_empty() => return Err(Fail::error(format!("{name} wants an attribute"))),
        true => Some(args.positional.remove(0)),
        false => None,
    };
    let test = match args.positional.is_empty() {
        true => None,
        false => match args.positional.remove(0) {
            Value::Str(test) => Some(test),
            _ => return Err(Fail::error(format!("{name} wants a test's name"))),
        },
    };
    let mut out = Vec::new();
    let items = if input.is_true() { m.iterate(input)? } else { Vec::new() };
    for item in items {
        m.budget.steps(1)?;
        let value = match &attribute {
            Some(attribute) => path(m, &item, attribute, None)?,
            None => item.clone(),
        };
        let holds = match &test {
            Some(test) => checks::apply(m, test, &value, args.clone())?,
            None => value.is_true(),
        };
        if holds == wanted {
            out.push(item);
        }
    }
    Value::iter(out)
}

/// What a value is compared by: lower case, unless case counts.
fn folded(value: Value, case_sensitive: bool) -> Value {
    match value {
        Value::Str(text) if !case_sensitive => Value::str(text.to_lowercase()),
        other => other,
    }
}

/// Sorted by an attribute, or several with commas between them.
fn sorted(
    m: &mut Machine<'_>,
    items: Vec<Value>,
    by: Option<&Value>,
    case_sensitive: bool,
    reverse: bool,
) -> Res<Vec<Value>> {
    let mut keyed = Vec::new();
    for item in items {
        let key = match by {
            Some(Value::Str(names)) => {
                let mut parts = Vec::new();
                for name in names.split(',') {
                    parts.push(folded(path(m, &item, &Value::str(name), None)?, case_sensitive));
                }
                Value::list(parts)?
            }
            Some(Value::None) | None => folded(item.clone(), case_sensitive),
            Some(other) => folded(path(m, &item, other, None)?, case_sensitive),
        };
        operators::walk(&key, &mut m.budget)?;
        m.budget.steps(32)?;
        keyed.push((key, item));
    }
    if let Some((first, _)) = keyed.first() {
        for (key, _) in &keyed {
            operators::compare(Comparison::Less, first, key, &mut m.budget)?;
        }
    }
    keyed.sort_by(|a, b| {
        let order = a.0.order(&b.0).unwrap_or(Ordering::Equal);
        if reverse { order.reverse() } else { order }
    });
    Ok(keyed.into_iter().map(|(_, item)| item).collect())
}

fn ordered(m: &mut Machine<'_>, name: &str, input: &Value, args: CallArgs) -> Res<Value> {
    let items = m.iterate(input)?;
    match name {
        "sort" => {
            let [reverse, case, by] = args.bind(name, ["reverse", "case_sensitive", "attribute"])?;
            sorted(m, items, by.as_ref(), is_true(case.as_ref()), is_true(reverse.as_ref())).and_then(Value::list)
        }
        "groupby" => {
            let [by, default, case] = args.bind(name, ["attribute", "default", "case_sensitive"])?;
            let by = by.ok_or_else(|| Fail::error("groupby wants an attribute"))?;
            let case = is_true(case.as_ref());
            let mut groups: Vec<(Value, Value, Vec<Value>)> = Vec::new();
            for item in sorted(m, items, Some(&by), case, false)? {
                let value = path(m, &item, &by, default.as_ref())?;
                let key = folded(value.clone(), case);
                match groups.last_mut() {
                    Some((last, _, members)) if last.equals(&key) => members.push(item),
                    _ => groups.push((key, value, vec![item])),
                }
            }
            let groups = groups.into_iter().map(|(_, value, members)| Value::tuple(vec![value, Value::list(members)?]));
            Value::list(groups.collect::<Res<_>>()?)
        }
        _ => {
            let [case, by] = args.bind(name, ["case_sensitive", "attribute"])?;
            let case = is_true(case.as_ref());
            let mut kept: Vec<(Value, Value)> = Vec::new();
            for item in items {
                let key = match &by {
                    Some(by) if !matches!(by, Value::None) => path(m, &item, by, None)?,
                    _ => item.clone(),
                };
                let key = folded(key, case);
                operators::walk(&key, &mut m.budget)?;
                let replaces = match kept.first() {
                    _ if name == "unique" => {
                        m.budget.steps(kept.len() as u64)?;
                        let mut entries = Vec::new();
                        functions::insert(&mut entries, key.clone(), Value::None, &mut m.budget)?;
                        if !kept.iter().any(|(k, _)| k.equals(&key)) {
                            kept.push((key, item));
                        }
                        continue;
                    }
                    None => true,
                    Some((best, _)) => {
                        let comparison = if name == "min" { Comparison::Less } else { Comparison::Greater };
                        operators::compare(comparison, &key, best, &mut m.budget)?
                    }
                };
                if replaces {
                    kept = vec![(key, item)];
                }
            }
            if name == "unique" {
                return Value::iter(kept.into_iter().map(|(_, item)| item).collect());
            }
            Ok(kept.pop().map_or_else(|| Value::undefined("the least or largest of no items"), |(_, item)| item))
        }
    }
}
