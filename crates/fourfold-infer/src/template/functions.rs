//! What every template can call by name.

use std::cell::RefCell;
use std::rc::Rc;

use super::budget::{Budget, Fail, Res};
use super::eval::{CallArgs, Machine};
use super::text;
use super::value::{Value, Variables, range_len};

const GLOBALS: &[&str] = &["range", "dict", "namespace", "raise_exception", "strftime_now"];

/// Most members of a range, as in Jinja's sandbox.
const MAX_RANGE: usize = 100_000;

/// The function of this name.
pub(super) fn global(name: &str) -> Option<&'static str> {
    GLOBALS.iter().find(|n| **n == name).copied()
}

/// Puts a key into a dict's entries. What could change cannot be a key.
pub(super) fn insert(entries: &mut Vec<(Value, Value)>, key: Value, value: Value, budget: &mut Budget) -> Res<()> {
    if matches!(key, Value::List(_) | Value::Dict(_)) {
        return Err(Fail::error(format!("unhashable type: '{}'", key.type_name())));
    }
    budget.bytes(2 * size_of::<Value>())?;
    budget.steps(entries.len() as u64 / 8)?;
    match entries.iter_mut().find(|(k, _)| k.equals(&key)) {
        Some((_, slot)) => *slot = value,
        None => entries.push((key, value)),
    }
    Ok(())
}

/// Sets a namespace's member.
pub(super) fn set_member(members: &Variables, name: &str, value: Value) -> Res<()> {
    if name.starts_with('_') {
        return Err(Fail::error(format!("a namespace cannot have a member `{name}`, which begins with an underscore")));
    }
    value.may_be_member()?;
    let mut members = members.borrow_mut();
    match members.iter_mut().find(|(n, _)| &**n == name) {
        Some((_, slot)) => *slot = value,
        None => members.push((name.into(), value)),
    }
    Ok(())
}

pub(super) fn call(m: &mut Machine<'_>, name: &'static str, args: CallArgs) -> Res<Value> {
    match name {
        "range" => {
            let given = args.positional.len();
            let [a, b, c] = args.bind("range", ["start", "stop", "step"])?;
            let int = |value: Option<Value>, otherwise: i64| match value {
                None => Ok(otherwise),
                Some(value) => value.int().ok_or_else(|| {
                    Fail::error(format!("'{}' object cannot be interpreted as an integer", value.type_name()))
                }),
            };
            let (start, stop) = if given == 1 { (0, int(a, 0)?) } else { (int(a, 0)?, int(b, 0)?) };
            let step = int(c, 1)?;
            if step == 0 || given == 0 {
                return Err(Fail::error("range() wants one to three integers, the step not zero"));
            }
            if range_len(start, stop, step) > MAX_RANGE {
                return Err(Fail::error(format!(
                    "range too big: a template's ranges have at most {MAX_RANGE} members"
                )));
            }
            Ok(Value::Range(start, stop, step))
        }
        "dict" => {
            let entries = pairs(m, args, "dict")?;
            Value::dict(entries)
        }
        "namespace" => {
            let members = Rc::new(RefCell::new(Vec::new()));
            for (key, value) in pairs(m, args, "namespace")? {
                set_member(&members, &text::to_str(&key, &mut m.budget)?, value)?;
            }
            Ok(Value::Namespace(members))
        }
        "raise_exception" => {
            let [message] = args.bind(name, ["message"])?;
            let message = text::to_str(&message.unwrap_or(Value::None), &mut m.budget)?;
            Err(Fail::Raised(message))
        }
        _ => {
            let [format] = args.bind(name, ["format"])?;
            let Some(Value::Str(format)) = format else { return Err(Fail::error("strftime_now wants a format")) };
            m.budget.bytes(format.len().saturating_mul(64))?;
            let items: Vec<_> = chrono::format::StrftimeItems::new(&format).collect();
            if items.contains(&chrono::format::Item::Error) {
                return Err(Fail::error(format!("strftime_now: the format {format:?} is not understood")));
            }
            Ok(Value::str(chrono::Local::now().format_with_items(items.into_iter()).to_string()))
        }
    }
}

/// The entries of `dict(mapping or pairs, **named)`.
fn pairs(m: &mut Machine<'_>, args: CallArgs, what: &'static str) -> Res<Vec<(Value, Value)>> {
    let mut entries = Vec::new();
    if args.positional.len() > 1 {
        return Err(Fail::error(format!("{what} takes at most one argument without a name")));
    }
    match args.positional.into_iter().next() {
        None => {}
        Some(Value::Dict(map)) => {
            for (key, value) in &map.entries {
                insert(&mut entries, key.clone(), value.clone(), &mut m.budget)?;
            }
        }
        Some(Value::Namespace(members)) => {
            for (key, value) in members.borrow().iter() {
                insert(&mut entries, Value::Str(key.clone()), value.clone(), &mut m.budget)?;
            }
        }
        Some(other) => {
            for pair in m.iterate(&other)? {
                let pair: [Value; 2] = m
                    .iterate(&pair)?
                    .try_into()
                    .map_err(|_| Fail::error(format!("{what} wants pairs of a key and a value")))?;
                let [key, value] = pair;
                insert(&mut entries, key, value, &mut m.budget)?;
            }
        }
    }
    for (key, value) in args.named {
        insert(&mut entries, Value::str(key), value, &mut m.budget)?;
    }
    Ok(entries)
}
