//! Methods of strings, lists and dicts. Those that change a value are not there, as in transformers' sandbox.

use std::rc::Rc;

use super::budget::{Fail, Res};
use super::eval::{CallArgs, Machine};
use super::text::{self, Spec};
use super::value::{Map, Value};

const STR: &[&str] = &[
    "capitalize",
    "casefold",
    "center",
    "count",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "islower",
    "isnumeric",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "upper",
    "zfill",
];
const SEQ: &[&str] = &["count", "index"];
const LIST: &[&str] = &["count", "index", "copy"];
const DICT: &[&str] = &["copy", "get", "items", "keys", "values"];
const NUMBER: &[&str] = &["is_integer"];
/// Methods that Python has and a template may not call; a key of such a name is not found by `dict.name` either.
const REFUSED: &[&str] = &["clear", "pop", "popitem", "setdefault", "update", "fromkeys"];

/// The method of this name, where the value has one.
pub(super) fn find(value: &Value, name: &str) -> Option<&'static str> {
    let methods: &[&[&'static str]] = match value {
        Value::Str(_) => &[STR],
        Value::List(_) => &[LIST],
        Value::Tuple(_) | Value::Range(..) => &[SEQ],
        Value::Dict(_) => &[DICT, REFUSED],
        Value::Int(_) | Value::Float(_) => &[NUMBER],
        _ => &[],
    };
    methods.iter().flat_map(|names| names.iter()).find(|n| **n == name).copied()
}

/// Calls a method.
pub(super) fn call(m: &mut Machine<'_>, target: &Value, name: &'static str, args: CallArgs) -> Res<Value> {
    match target {
        Value::Str(string) => str_method(m, string, name, args),
        Value::Dict(map) => dict_method(m, map, name, args),
        Value::List(_) if name == "copy" => Ok(target.clone()),
        Value::List(_) | Value::Tuple(_) | Value::Range(..) => {
            let [wanted] = args.bind(name, ["value"])?;
            let wanted = wanted.ok_or_else(|| missing(name))?;
            let items = m.iterate(target)?;
            match name {
                "count" => Ok(Value::Int(items.iter().filter(|item| item.equals(&wanted)).count() as i64)),
                _ => match items.iter().position(|item| item.equals(&wanted)) {
                    Some(i) => Ok(Value::Int(i as i64)),
                    None => Err(Fail::error("the value is not in the list")),
                },
            }
        }
        Value::Float(x) => Ok(Value::Bool(x.fract() == 0.0)),
        Value::Int(_) => Ok(Value::Bool(true)),
        Value::Loop(state) if name == "cycle" => {
            let count = args.positional.len();
            let chosen = args.positional.into_iter().nth(state.index0 % count.max(1));
            chosen.ok_or_else(|| Fail::error("no items for cycling given"))
        }
        Value::Loop(state) => {
            let mut last = state.changed.borrow_mut();
            let same = |last: &Vec<Value>| {
                last.len() == args.positional.len() && last.iter().zip(&args.positional).all(|(a, b)| a.equals(b))
            };
            let is_same = last.as_ref().is_some_and(same);
            *last = Some(args.positional);
            Ok(Value::Bool(!is_same))
        }
        other => Err(Fail::error(format!("a {} has no method `{name}`", other.type_name()))),
    }
}

fn missing(name: &str) -> Fail {
    Fail::error(format!("{name}: an argument is missing"))
}

fn dict_method(m: &mut Machine<'_>, map: &Rc<Map>, name: &'static str, args: CallArgs) -> Res<Value> {
    m.budget.bytes(map.entries.len() * 2 * size_of::<Value>())?;
    match name {
        "get" => {
            let [key, default] = args.bind(name, ["key", "default"])?;
            let key = key.ok_or_else(|| missing(name))?;
            Ok(map.get(&key).cloned().or(default).unwrap_or(Value::None))
        }
        "items" => {
            let [] = args.bind(name, [])?;
            let pairs: Res<Vec<_>> =
                map.entries.iter().map(|(k, v)| Value::tuple(vec![k.clone(), v.clone()])).collect();
            Value::list(pairs?)
        }
        "keys" => Value::list(map.entries.iter().map(|(k, _)| k.clone()).collect()),
        "values" => Value::list(map.entries.iter().map(|(_, v)| v.clone()).collect()),
        "copy" => Ok(Value::Dict(map.clone())),
        other => {
            Err(Fail::error(format!("access to `{other}` of a dict is not safe: a template cannot change values")))
        }
    }
}

fn string(value: &Value) -> Res<Rc<str>> {
    match value {
        Value::Str(text) => Ok(text.clone()),
        Value::Undefined(name) => Err(Fail::error(format!("'{name}' is undefined"))),
        other => Err(Fail::error(format!("a str is expected, not {}", other.type_name()))),
    }
}

fn integer(value: Option<&Value>, otherwise: i64) -> Res<i64> {
    match value {
        None | Some(Value::None) => Ok(otherwise),
        Some(value) => value.int().ok_or_else(|| Fail::error(format!("an int is expected, not {}", value.type_name()))),
    }
}

/// Characters that are taken off: all of Python's white space where none are given.
fn is_stripped(chars: Option<&Value>) -> Res<Box<dyn Fn(char) -> bool>> {
    match chars {
        None | Some(Value::None) => Ok(Box::new(is_space)),
        Some(chars) => {
            let chars = string(chars)?;
            Ok(Box::new(move |c| chars.contains(c)))
        }
    }
}

/// `str.isspace` for one character.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn strings(parts: impl IntoIterator<Item = impl AsRef<str>>) -> Res<Value> {
    Value::list(parts.into_iter().map(Value::str).collect())
}

fn str_method(m: &mut Machine<'_>, s: &Rc<str>, name: &'static str, args: CallArgs) -> Res<Value> {
    m.budget.bytes(s.len().saturating_mul(2))?;
    let chars = || s.chars();
    let flag = |b: bool| Ok(Value::Bool(b));
    let cased = |c: char| c.is_lowercase() || c.is_uppercase();
    match name {
        "format" => return format(m, s, &args),
        "lower" => return Ok(Value::str(s.to_lowercase())),
        "casefold" => return Ok(Value::str(s.to_lowercase().replace('ß', "ss"))),
        "upper" => return Ok(Value::str(s.to_uppercase())),
        "capitalize" => return Ok(Value::str(capitalize(s))),
        "title" => return Ok(Value::str(title(s))),
        "swapcase" => {
            let swap = |c: char| {
                if c.is_uppercase() { c.to_lowercase().collect::<String>() } else { c.to_uppercase().collect() }
            };
            return Ok(Value::str(chars().map(swap).collect::<String>()));
        }
        "isalnum" => return flag(!s.is_empty() && chars().all(char::is_alphanumeric)),
        "isalpha" => return flag(!s.is_empty() && chars().all(char::is_alphabetic)),
        "isascii" => return flag(s.is_ascii()),
        "isdigit" | "isdecimal" => {
            return flag(!s.is_empty() && chars().all(|c| c.is_ascii_digit()));
        }
        "isnumeric" => return flag(!s.is_empty() && chars().all(char::is_numeric)),
        "islower" => return flag(chars().any(cased) && !chars().any(char::is_uppercase)),
        "isupper" => return flag(chars().any(cased) && !chars().any(char::is_lowercase)),
        "isspace" => return flag(!s.is_empty() && chars().all(is_space)),
        "istitle" => return flag(chars().any(cased) && title(s) == **s),
        _ => {}
    }
    let [a, b, c] = match name {
        "split" | "rsplit" => args.bind(name, ["sep", "maxsplit", ""])?,
        "splitlines" => args.bind(name, ["keepends", "", ""])?,
        "expandtabs" => args.bind(name, ["tabsize", "", ""])?,
        "replace" => args.bind(name, ["old", "new", "count"])?,
        _ => args.bind(name, ["1", "2", "3"])?,
    };
    let (a, b, c) = (a.as_ref(), b.as_ref(), c.as_ref());
    let first = || a.ok_or_else(|| missing(name));
    match name {
        "strip" => Ok(Value::str(s.trim_matches(&*is_stripped(a)?))),
        "lstrip" => Ok(Value::str(s.trim_start_matches(&*is_stripped(a)?))),
        "rstrip" => Ok(Value::str(s.trim_end_matches(&*is_stripped(a)?))),
        "split" | "rsplit" => split(m, s, name == "rsplit", a, integer(b, -1)?),
        "splitlines" => {
            let keeps = a.is_some_and(Value::is_true);
            m.budget.bytes(s.len().saturating_mul(8))?;
            let is_end = |c: char| {
                matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
            };
            let (mut lines, mut begin) = (Vec::new(), 0);
            let mut places = s.char_indices().peekable();
            while let Some((i, c)) = places.next() {
                if is_end(c) {
                    let mut end = i + c.len_utf8();
                    if c == '\r' && places.next_if(|(_, c)| *c == '\n').is_some() {
                        end += 1;
                    }
                    lines.push(if keeps { &s[begin..end] } else { &s[begin..i] });
                    begin = end;
                }
            }
            if begin < s.len() {
                lines.push(&s[begin..]);
            }
            strings(lines)
        }
        "startswith" | "endswith" => {
            let whole = bounds(s, b, c)?;
            let options = match first()? {
                Value::Tuple(seq) => seq.items.clone(),
                other => vec![other.clone()],
            };
            for option in &options {
                let option = string(option)?;
                let found = whole.is_some_and(|(_, text)| match name {
                    "startswith" => text.starts_with(&*option),
                    _ => text.ends_with(&*option),
                });
                if found {
                    return flag(true);
                }
            }
            flag(false)
        }
        "find" | "rfind" | "index" | "rindex" | "count" => {
            let wanted = string(first()?)?;
            let Some((skipped, text)) = bounds(s, b, c)? else {
                return Ok(Value::Int(if name == "count" { 0 } else { -1 }));
            };
            if name == "count" {
                let count = if wanted.is_empty() { text.chars().count() + 1 } else { text.matches(&*wanted).count() };
                return Ok(Value::Int(count as i64));
            }
            let found = if name.starts_with('r') { text.rfind(&*wanted) } else { text.find(&*wanted) };
            match found {
                Some(at) => Ok(Value::Int((skipped + text[..at].chars().count()) as i64)),
                None if name.ends_with("find") => Ok(Value::Int(-1)),
                None => Err(Fail::error("substring not found")),
            }
        }
        "partition" | "rpartition" => {
            let mark = string(first()?)?;
            if mark.is_empty() {
                return Err(Fail::error("empty separator"));
            }
            let found = if name == "partition" { s.find(&*mark) } else { s.rfind(&*mark) };
            let parts = match found {
                Some(at) => [&s[..at], &mark, &s[at + mark.len()..]],
                None if name == "partition" => [&**s, "", ""],
                None => ["", "", &**s],
            };
            Value::tuple(parts.into_iter().map(Value::str).collect())
        }
        "removeprefix" => {
            let prefix = string(first()?)?;
            Ok(Value::str(s.strip_prefix(&*prefix).unwrap_or(s)))
        }
        "removesuffix" => {
            let suffix = string(first()?)?;
            Ok(Value::str(s.strip_suffix(&*suffix).unwrap_or(s)))
        }
        "replace" => {
            let (old, new) = (string(first()?)?, string(b.ok_or_else(|| missing(name))?)?);
            replace(m, s, &old, &new, integer(c, -1)?).map(Value::str)
        }
        "join" => {
            let items = m.iterate(first()?)?;
            let mut out = String::new();
            for (i, item) in items.iter().enumerate() {
                let Value::Str(item) = item else {
                    let found = item.type_name();
                    return Err(Fail::error(format!("sequence item {i}: expected str instance, {found} found")));
                };
                m.budget.bytes(s.len() + item.len())?;
                if i > 0 {
                    out += s;
                }
                out += item;
            }
            Ok(Value::str(out))
        }
        "center" | "ljust" | "rjust" | "zfill" => {
            let width = usize::try_from(integer(Some(first()?), 0)?).unwrap_or(0);
            let fill =
                b.map(string).transpose()?.map_or(Some(' '), |f| f.chars().next().filter(|_| f.chars().count() == 1));
            let fill = fill.ok_or_else(|| Fail::error("the fill character must be exactly one character long"))?;
            m.budget.bytes(width.saturating_mul(4))?;
            let missing = width.saturating_sub(chars().count());
            let filled = |n: usize, c: char| c.to_string().repeat(n);
            Ok(Value::str(match name {
                "ljust" => format!("{s}{}", filled(missing, fill)),
                "rjust" => format!("{}{s}", filled(missing, fill)),
                "zfill" => {
                    let sign = usize::from(s.starts_with(['+', '-']));
                    format!("{}{}{}", &s[..sign], filled(missing, '0'), &s[sign..])
                }
                _ => {
                    let left = missing / 2 + (missing & width & 1);
                    format!("{}{s}{}", filled(left, fill), filled(missing - left, fill))
                }
            }))
        }
        "expandtabs" => {
            let size = usize::try_from(integer(a, 8)?).unwrap_or(0);
            m.budget.bytes(s.matches('\t').count().saturating_mul(size))?;
            let (mut out, mut column) = (String::new(), 0);
            for c in s.chars() {
                match c {
                    '\t' if size > 0 => {
                        let spaces = size - column % size;
                        out += &" ".repeat(spaces);
                        column += spaces;
                    }
                    '\t' => {}
                    c => {
                        column = if c == '\n' || c == '\r' { 0 } else { column + 1 };
                        out.push(c);
                    }
                }
            }
            Ok(Value::str(out))
        }
        other => Err(Fail::error(format!("a str has no method `{other}`"))),
    }
}

/// The part of a text between two indices, and the characters before it; `None` where the first lies behind the text.
fn bounds<'a>(s: &'a str, begin: Option<&Value>, end: Option<&Value>) -> Res<Option<(usize, &'a str)>> {
    if begin.is_none() && end.is_none() {
        return Ok(Some((0, s)));
    }
    let length = s.chars().count() as i64;
    let place = |i: i64| if i < 0 { i.saturating_add(length).max(0) } else { i };
    let (begin, end) = (place(integer(begin, 0)?), place(integer(end, length)?).min(length));
    if begin > length || begin > end {
        return Ok(None);
    }
    let at = |i: i64| s.char_indices().nth(i as usize).map_or(s.len(), |(at, _)| at);
    Ok(Some((begin as usize, &s[at(begin)..at(end)])))
}

fn split(m: &mut Machine<'_>, s: &str, from_right: bool, mark: Option<&Value>, most: i64) -> Res<Value> {
    m.budget.bytes(s.len().saturating_mul(8))?;
    let most = usize::try_from(most).map_or(usize::MAX, |n| n.saturating_add(1));
    match mark {
        None | Some(Value::None) => {
            let mut parts: Vec<&str> = Vec::new();
            let mut rest = if from_right { s.trim_end_matches(is_space) } else { s.trim_start_matches(is_space) };
            while !rest.is_empty() {
                if parts.len() + 1 == most {
                    // The last part keeps the white space within it and, of a split from the left, behind it.
                    parts.push(rest);
                    break;
                }
                if from_right {
                    let cut =
                        rest.rfind(is_space).map_or(0, |i| i + rest[i..].chars().next().map_or(1, char::len_utf8));
                    parts.push(&rest[cut..]);
                    rest = rest[..cut].trim_end_matches(is_space);
                } else {
                    let cut = rest.find(is_space).unwrap_or(rest.len());
                    parts.push(&rest[..cut]);
                    rest = rest[cut..].trim_start_matches(is_space);
                }
            }
            if from_right {
                parts.reverse();
            }
            strings(parts)
        }
        Some(mark) => {
            let mark = string(mark)?;
            if mark.is_empty() {
                return Err(Fail::error("empty separator"));
            }
            if from_right {
                let mut parts: Vec<&str> = s.rsplitn(most, &*mark).collect();
                parts.reverse();
                return strings(parts);
            }
            strings(s.splitn(most, &*mark))
        }
    }
}

/// `str.replace`; a negative count means all.
pub(super) fn replace(m: &mut Machine<'_>, s: &str, old: &str, new: &str, count: i64) -> Res<String> {
    let most = usize::try_from(count).unwrap_or(usize::MAX);
    let found = if old.is_empty() { s.chars().count() + 1 } else { s.matches(old).count() };
    m.budget.bytes(found.min(most).saturating_mul(new.len()).saturating_add(s.len()))?;
    Ok(s.replacen(old, new, most))
}

/// First character upper case, the others lower case.
pub(super) fn capitalize(s: &str) -> String {
    let mut chars = s.chars();
    chars.next().map_or_else(String::new, |c| c.to_uppercase().chain(chars.flat_map(char::to_lowercase)).collect())
}

/// `str.title`: every run of letters begins in upper case.
fn title(s: &str) -> String {
    let mut out = String::new();
    let mut inside = false;
    for c in s.chars() {
        if inside {
            out.extend(c.to_lowercase())
        } else {
            out.extend(c.to_uppercase())
        }
        inside = c.is_lowercase() || c.is_uppercase();
    }
    out
}

/// `str.format`.
fn format(m: &mut Machine<'_>, s: &str, args: &CallArgs) -> Res<Value> {
    let mut out = String::new();
    let mut chars = s.chars().peekable();
    let mut next = 0;
    while let Some(c) = chars.next() {
        match c {
            '{' if chars.next_if_eq(&'{').is_some() => out.push('{'),
            '}' if chars.next_if_eq(&'}').is_some() => out.push('}'),
            '}' => return Err(Fail::error("Single '}' encountered in format string")),
            '{' => {
                let mut field = String::new();
                let mut depth = 1;
                for c in chars.by_ref() {
                    depth += i32::from(c == '{') - i32::from(c == '}');
                    if depth == 0 {
                        break;
                    }
                    field.push(c);
                }
                if depth != 0 || field.contains('{') {
                    return Err(Fail::error("a format field that is not understood"));
                }
                let (field, spec) = field.split_once(':').map_or((field.as_str(), ""), |(f, s)| (f, s));
                let (field, conversion) = field.split_once('!').map_or((field, ""), |(f, c)| (f, c));
                let end = field.find(['.', '[']).unwrap_or(field.len());
                let (name, mut path) = field.split_at(end);
                let mut value = if name.is_empty() || name.bytes().all(|b| b.is_ascii_digit()) {
                    let i = if name.is_empty() { next } else { name.parse().unwrap_or(usize::MAX) };
                    next += usize::from(name.is_empty());
                    args.positional.get(i).cloned()
                } else {
                    args.named.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone())
                }
                .ok_or_else(|| Fail::error(format!("the format field `{field}` has no value")))?;
                while !path.is_empty() {
                    if let Some(rest) = path.strip_prefix('.') {
                        let end = rest.find(['.', '[']).unwrap_or(rest.len());
                        value = super::operators::attribute(&value, &rest[..end], &mut m.budget)?;
                        path = &rest[end..];
                    } else {
                        let end = path.find(']').ok_or_else(|| Fail::error("a format field without its `]`"))?;
                        let key = &path[1..end];
                        let key = key.parse().map_or_else(|_| Value::str(key), Value::Int);
                        value = super::operators::item(&value, &key, &mut m.budget)?;
                        path = &path[end + 1..];
                    }
                }
                let value = match conversion {
                    "" => value,
                    "s" => Value::str(text::to_str(&value, &mut m.budget)?),
                    "r" => Value::str(text::repr(&value, &mut m.budget)?),
                    other => return Err(Fail::error(format!("the conversion `{other}` is not known"))),
                };
                let piece = Spec::parse(spec)?.apply(&value, &mut m.budget)?;
                m.budget.bytes(piece.len())?;
                out += &piece;
            }
            c => out.push(c),
        }
    }
    Ok(Value::str(out))
}
