//! `value is test`.

use std::rc::Rc;

use super::ast::Comparison;
use super::budget::{Fail, Res};
use super::eval::{CallArgs, Machine};
use super::value::Value;
use super::{filters, operators};

/// Names of tests.
const KNOWN: &[&str] = &[
    "odd",
    "even",
    "divisibleby",
    "defined",
    "undefined",
    "filter",
    "test",
    "none",
    "boolean",
    "false",
    "true",
    "integer",
    "float",
    "lower",
    "upper",
    "string",
    "mapping",
    "number",
    "sequence",
    "iterable",
    "callable",
    "sameas",
    "in",
    "==",
    "eq",
    "equalto",
    "!=",
    "ne",
    ">",
    "gt",
    "greaterthan",
    "ge",
    ">=",
    "<",
    "lt",
    "lessthan",
    "<=",
    "le",
];

pub(super) fn apply(m: &mut Machine<'_>, name: &str, value: &Value, args: CallArgs) -> Res<bool> {
    let other = args.positional.first();
    let other = || other.ok_or_else(|| Fail::error(format!("the test `{name}` wants an argument")));
    let compare = |m: &mut Machine<'_>, comparison| operators::compare(comparison, value, other()?, &mut m.budget);
    let int = |value: &Value| {
        value.int().ok_or_else(|| Fail::error(format!("the test `{name}` wants an integer, not {}", value.type_name())))
    };
    Ok(match name {
        "defined" => !matches!(value, Value::Undefined(_)),
        "undefined" => matches!(value, Value::Undefined(_)),
        "none" => matches!(value, Value::None),
        "boolean" => matches!(value, Value::Bool(_)),
        "true" => matches!(value, Value::Bool(true)),
        "false" => matches!(value, Value::Bool(false)),
        "integer" => matches!(value, Value::Int(_)),
        "float" => matches!(value, Value::Float(_)),
        "number" => value.number().is_some(),
        "string" => matches!(value, Value::Str(_)),
        "mapping" => matches!(value, Value::Dict(_)),
        "sequence" => value.len().is_some() && !matches!(value, Value::Loop(_)),
        "iterable" => value.is_iterable(),
        "callable" => {
            matches!(
                value,
                Value::Function(_) | Value::Macro(..) | Value::Caller(..) | Value::Method(_) | Value::Loop(_)
            )
        }
        "lower" | "upper" => {
            let text = super::text::to_str(value, &mut m.budget)?;
            let (lower, upper) = (text.chars().any(char::is_lowercase), text.chars().any(char::is_uppercase));
            if name == "lower" { lower && !upper } else { upper && !lower }
        }
        "odd" => int(value)?.rem_euclid(2) == 1,
        "even" => int(value)?.rem_euclid(2) == 0,
        "divisibleby" => {
            let by = int(other()?)?;
            if by == 0 {
                return Err(Fail::error("division by zero"));
            }
            int(value)?.checked_rem(by).unwrap_or(0) == 0
        }
        "sameas" => match (value, other()?) {
            (Value::None, Value::None) => true,
            (Value::Bool(a), Value::Bool(b)) => a == b,
            (Value::Int(a), Value::Int(b)) => a == b,
            (Value::Str(a), Value::Str(b)) => a == b,
            (Value::List(a), Value::List(b)) | (Value::Tuple(a), Value::Tuple(b)) => Rc::ptr_eq(a, b),
            (Value::Dict(a), Value::Dict(b)) => Rc::ptr_eq(a, b),
            _ => false,
        },
        "in" => operators::contains(other()?, value, &mut m.budget)?,
        "==" | "eq" | "equalto" => compare(m, Comparison::Equal)?,
        "!=" | "ne" => compare(m, Comparison::NotEqual)?,
        "<" | "lt" | "lessthan" => compare(m, Comparison::Less)?,
        "<=" | "le" => compare(m, Comparison::LessEqual)?,
        ">" | "gt" | "greaterthan" => compare(m, Comparison::Greater)?,
        ">=" | "ge" => compare(m, Comparison::GreaterEqual)?,
        "filter" => matches!(value, Value::Str(name) if filters::KNOWN.contains(&&**name)),
        "test" => matches!(value, Value::Str(name) if KNOWN.contains(&&**name)),
        other => return Err(Fail::error(format!("unknown test `{other}`"))),
    })
}
