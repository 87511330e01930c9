//! Values as Python prints them: `str`, `repr`, JSON, and its two ways of formatting.

use super::budget::{Budget, Fail, Res};
use super::value::Value;

/// `str(value)`.
pub(super) fn to_str(value: &Value, budget: &mut Budget) -> Res<String> {
    match value {
        Value::Undefined(_) => Ok(String::new()),
        Value::Str(text) => {
            budget.bytes(text.len())?;
            Ok(text.to_string())
        }
        other => repr(other, budget),
    }
}

/// `repr(value)`.
pub(super) fn repr(value: &Value, budget: &mut Budget) -> Res<String> {
    let mut out = String::new();
    write_repr(value, &mut out, budget)?;
    Ok(out)
}

fn write_repr(value: &Value, out: &mut String, budget: &mut Budget) -> Res<()> {
    budget.bytes(16)?;
    match value {
        Value::Undefined(_) => *out += "Undefined",
        Value::None => *out += "None",
        Value::Bool(true) => *out += "True",
        Value::Bool(false) => *out += "False",
        Value::Int(n) => *out += &n.to_string(),
        Value::Float(x) => *out += &float(*x),
        Value::Str(text) => {
            budget.bytes(text.len())?;
            quote(text, out);
        }
        Value::List(seq) => {
            out.push('[');
            for (i, item) in seq.items.iter().enumerate() {
                *out += if i > 0 { ", " } else { "" };
                write_repr(item, out, budget)?;
            }
            out.push(']');
        }
        Value::Tuple(seq) => {
            out.push('(');
            for (i, item) in seq.items.iter().enumerate() {
                *out += if i > 0 { ", " } else { "" };
                write_repr(item, out, budget)?;
            }
            *out += if seq.items.len() == 1 { ",)" } else { ")" };
        }
        Value::Dict(map) => {
            out.push('{');
            for (i, (key, item)) in map.entries.iter().enumerate() {
                *out += if i > 0 { ", " } else { "" };
                write_repr(key, out, budget)?;
                *out += ": ";
                write_repr(item, out, budget)?;
            }
            out.push('}');
        }
        Value::Range(start, stop, 1) => *out += &format!("range({start}, {stop})"),
        Value::Range(start, stop, step) => *out += &format!("range({start}, {stop}, {step})"),
        other => return Err(Fail::error(format!("a {} cannot be printed", other.type_name()))),
    }
    Ok(())
}

/// A float as Python's `repr` has it: the shortest digits that give it back.
pub(super) fn float(x: f64) -> String {
    if x.is_nan() {
        return "nan".to_owned();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf".to_owned() } else { "-inf".to_owned() };
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = format!("{x}");
    if plain.contains('.') { plain } else { format!("{plain}.0") }
}

fn quote(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => *out += "\\n",
            '\r' => *out += "\\r",
            '\t' => *out += "\\t",
            '\\' => *out += "\\\\",
            c if c == quote => out.extend(['\\', c]),
            ' ' => out.push(' '),
            c if is_printable(c) => out.push(c),
            c => {
                let code = c as u32;
                *out += &match code {
                    0..=0xff => format!("\\x{code:02x}"),
                    0x100..=0xffff => format!("\\u{code:04x}"),
                    _ => format!("\\U{code:08x}"),
                };
            }
        }
    }
    out.push(quote);
}

/// `str.isprintable` for one character, but for code points that no one has assigned.
pub(super) fn is_printable(c: char) -> bool {
    let hidden = matches!(c, '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{180e}'
        | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
        | '\u{e000}'..='\u{f8ff}' | '\u{e0001}'..='\u{e007f}' | '\u{f0000}'..='\u{10ffff}');
    c == ' ' || !(c.is_control() || c.is_whitespace() || hidden)
}

/// How `tojson` writes.
pub(super) struct JsonStyle {
    pub ascii: bool,
    pub indent: Option<String>,
    pub item: String,
    pub key: String,
    pub sorted: bool,
}

/// `json.dumps`.
pub(super) fn json(value: &Value, style: &JsonStyle, level: usize, out: &mut String, budget: &mut Budget) -> Res<()> {
    budget.bytes(8)?;
    let line = |out: &mut String, level: usize, budget: &mut Budget| -> Res<()> {
        if let Some(indent) = &style.indent {
            budget.bytes(indent.len().saturating_mul(level))?;
            out.push('\n');
            *out += &indent.repeat(level);
        }
        Ok(())
    };
    match value {
        Value::None => *out += "null",
        Value::Bool(b) => *out += if *b { "true" } else { "false" },
        Value::Int(n) => *out += &n.to_string(),
        Value::Float(x) => *out += &json_float(*x),
        Value::Str(text) => {
            budget.bytes(text.len())?;
            json_string(text, style.ascii, out);
        }
        Value::List(seq) | Value::Tuple(seq) => {
            if seq.items.is_empty() {
                *out += "[]";
                return Ok(());
            }
            out.push('[');
            for (i, item) in seq.items.iter().enumerate() {
                *out += if i > 0 { &style.item } else { "" };
                line(out, level + 1, budget)?;
                json(item, style, level + 1, out, budget)?;
            }
            line(out, level, budget)?;
            out.push(']');
        }
        Value::Dict(map) => {
            if map.entries.is_empty() {
                *out += "{}";
                return Ok(());
            }
            let mut entries: Vec<(&Value, &Value)> = map.entries.iter().map(|(k, v)| (k, v)).collect();
            if style.sorted {
                for (key, _) in &entries {
                    if key.order(entries[0].0).is_none() {
                        return Err(Fail::error("keys of different types cannot be sorted"));
                    }
                }
                entries.sort_by(|a, b| a.0.order(b.0).unwrap_or(std::cmp::Ordering::Equal));
            }
            out.push('{');
            for (i, (key, item)) in entries.into_iter().enumerate() {
                *out += if i > 0 { &style.item } else { "" };
                line(out, level + 1, budget)?;
                let name = match key {
                    Value::Str(text) => text.to_string(),
                    Value::None => "null".to_owned(),
                    Value::Bool(b) => b.to_string(),
                    Value::Int(n) => n.to_string(),
                    Value::Float(x) => json_float(*x),
                    other => {
                        let reason = format!("a key of JSON is a string, not a {}", other.type_name());
                        return Err(Fail::error(reason));
                    }
                };
                budget.bytes(name.len())?;
                json_string(&name, style.ascii, out);
                *out += &style.key;
                json(item, style, level + 1, out, budget)?;
            }
            line(out, level, budget)?;
            out.push('}');
        }
        other => return Err(Fail::error(format!("a {} cannot be written as JSON", other.type_name()))),
    }
    Ok(())
}

fn json_float(x: f64) -> String {
    match x {
        x if x.is_nan() => "NaN".to_owned(),
        x if x.is_infinite() => if x > 0.0 { "Infinity" } else { "-Infinity" }.to_owned(),
        x => float(x),
    }
}

fn json_string(text: &str, ascii: bool, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => *out += "\\\"",
            '\\' => *out += "\\\\",
            '\n' => *out += "\\n",
            '\r' => *out += "\\r",
            '\t' => *out += "\\t",
            '\u{8}' => *out += "\\b",
            '\u{c}' => *out += "\\f",
            c if (c as u32) < 0x20 || (ascii && c as u32 > 0x7e) => {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    *out += &format!("\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// A format specification of `format` or `%`.
#[derive(Clone, Debug, Default)]
pub(super) struct Spec {
    pub fill: Option<char>,
    pub align: Option<char>,
    pub sign: Option<char>,
    pub alternate: bool,
    pub zero: bool,
    pub width: usize,
    pub comma: Option<char>,
    pub precision: Option<usize>,
    pub kind: Option<char>,
}

impl Spec {
    /// `[[fill]align][sign][#][0][width][,][.precision][type]`.
    pub fn parse(text: &str) -> Res<Self> {
        let wrong = || Fail::error(format!("the format `{text}` is not understood"));
        let chars: Vec<char> = text.chars().collect();
        let mut spec = Self::default();
        let mut i = 0;
        let is_align = |c: Option<&char>| matches!(c, Some('<' | '>' | '^' | '='));
        if is_align(chars.get(1)) {
            (spec.fill, spec.align) = (Some(chars[0]), Some(chars[1]));
            i = 2;
        } else if is_align(chars.first()) {
            spec.align = Some(chars[0]);
            i = 1;
        }
        if let Some(&c) = chars.get(i)
            && ['+', '-', ' '].contains(&c)
        {
            spec.sign = Some(c);
            i += 1;
        }
        if chars.get(i) == Some(&'#') {
            spec.alternate = true;
            i += 1;
        }
        if chars.get(i) == Some(&'0') {
            spec.zero = true;
            i += 1;
        }
        let number = |i: &mut usize| -> Res<Option<usize>> {
            let begin = *i;
            while chars.get(*i).is_some_and(char::is_ascii_digit) {
                *i += 1;
            }
            let digits: String = chars[begin..*i].iter().collect();
            if digits.is_empty() { Ok(None) } else { digits.parse().map(Some).map_err(|_| wrong()) }
        };
        spec.width = number(&mut i)?.unwrap_or(0);
        if let Some(&c) = chars.get(i)
            && [',', '_'].contains(&c)
        {
            spec.comma = Some(c);
            i += 1;
        }
        if chars.get(i) == Some(&'.') {
            i += 1;
            spec.precision = Some(number(&mut i)?.ok_or_else(wrong)?);
        }
        spec.kind = chars.get(i).copied();
        if chars.len() > i + 1 { Err(wrong()) } else { Ok(spec) }
    }

    /// A value in this form.
    pub fn apply(&self, value: &Value, budget: &mut Budget) -> Res<String> {
        budget.bytes(self.width.saturating_add(self.precision.unwrap_or(0)).saturating_mul(4))?;
        let unknown = || Fail::error(format!("a {} cannot be formatted so", value.type_name()));
        let (body, is_number) = match (value, self.kind) {
            (Value::Str(_), None | Some('s')) => (self.cut(to_str(value, budget)?), false),
            (Value::Int(_) | Value::Bool(_), Some('d' | 'x' | 'X' | 'o' | 'b' | 'c' | 'n')) | (Value::Int(_), None) => {
                (self.integer(value.int().unwrap_or(0)).ok_or_else(unknown)?, true)
            }
            (Value::Int(_) | Value::Float(_) | Value::Bool(_), Some('f' | 'F' | 'e' | 'E' | 'g' | 'G' | '%')) => {
                (self.decimal(value.number().unwrap_or(0.0)), true)
            }
            (Value::Float(x), None) if self.precision.is_none() => (self.signed(*x < 0.0, &float(x.abs())), true),
            (Value::Float(x), None) => (Self { kind: Some('g'), ..self.clone() }.decimal(*x), true),
            _ if self.kind.is_none() && self.width == 0 && self.precision.is_none() => (to_str(value, budget)?, false),
            _ => return Err(unknown()),
        };
        Ok(self.pad(body, is_number))
    }

    fn cut(&self, text: String) -> String {
        self.precision.map_or_else(|| text.clone(), |n| text.chars().take(n).collect())
    }

    /// Digits with the sign, and commas between thousands.
    fn signed(&self, negative: bool, digits: &str) -> String {
        let sign = match (negative, self.sign) {
            (true, _) => "-",
            (false, Some('+')) => "+",
            (false, Some(' ')) => " ",
            _ => "",
        };
        let Some(comma) = self.comma else { return format!("{sign}{digits}") };
        let whole = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
        let mut grouped = String::new();
        for (i, c) in digits[..whole].chars().enumerate() {
            if i > 0 && (whole - i).is_multiple_of(3) {
                grouped.push(comma);
            }
            grouped.push(c);
        }
        format!("{sign}{grouped}{}", &digits[whole..])
    }

    fn integer(&self, n: i64) -> Option<String> {
        let size = n.unsigned_abs();
        let (prefix, digits) = match self.kind {
            Some('x') => ("0x", format!("{size:x}")),
            Some('X') => ("0X", format!("{size:X}")),
            Some('o') => ("0o", format!("{size:o}")),
            Some('b') => ("0b", format!("{size:b}")),
            Some('c') => return char::from_u32(u32::try_from(n).ok()?).map(String::from),
            _ => ("", size.to_string()),
        };
        let prefix = if self.alternate { prefix } else { "" };
        Some(self.signed(n < 0, &format!("{prefix}{digits}")))
    }

    fn decimal(&self, x: f64) -> String {
        let precision = self.precision.unwrap_or(6).min(1000);
        let (negative, size) = (x.is_sign_negative() && !x.is_nan(), x.abs());
        let upper = self.kind.is_some_and(char::is_uppercase);
        let body = match self.kind {
            _ if !x.is_finite() => float(size),
            Some('%') => format!("{:.precision$}%", size * 100.0),
            Some('e' | 'E') => exponent(size, precision),
            Some('g' | 'G') => {
                let precision = precision.max(1);
                let scientific = exponent(size, precision - 1);
                let power: i32 = scientific.split_once('e').and_then(|(_, e)| e.parse().ok()).unwrap_or(0);
                let is_plain = (-4..precision as i32).contains(&power);
                let text = match is_plain {
                    true => format!("{size:.*}", (precision as i32 - 1 - power).max(0) as usize),
                    false => scientific,
                };
                let (digits, tail) = text.split_once('e').map_or((text.as_str(), None), |(d, e)| (d, Some(e)));
                let digits = match digits.contains('.') && !self.alternate {
                    true => digits.trim_end_matches('0').trim_end_matches('.'),
                    false => digits,
                };
                tail.map_or_else(|| digits.to_owned(), |e| format!("{digits}e{e}"))
            }
            _ => format!("{size:.precision$}"),
        };
        self.signed(negative, &if upper { body.to_uppercase() } else { body })
    }

    fn pad(&self, body: String, is_number: bool) -> String {
        let missing = self.width.saturating_sub(body.chars().count());
        let fill = self.fill.unwrap_or(if self.zero && is_number { '0' } else { ' ' });
        let default = if self.zero && is_number {
            '='
        } else if is_number {
            '>'
        } else {
            '<'
        };
        let filled = |n: usize| fill.to_string().repeat(n);
        match self.align.unwrap_or(default) {
            '<' => body + &filled(missing),
            '^' => format!("{}{body}{}", filled(missing / 2), filled(missing - missing / 2)),
            '=' => {
                let sign = body.len() - body.trim_start_matches(['+', '-', ' ']).len();
                format!("{}{}{}", &body[..sign], filled(missing), &body[sign..])
            }
            _ => filled(missing) + &body,
        }
    }
}

/// `%.{precision}e` as C writes it: at least two digits of exponent.
fn exponent(x: f64, precision: usize) -> String {
    let text = format!("{x:.precision$e}");
    let (digits, power) = text.split_once('e').unwrap_or((&text, "0"));
    let power: i32 = power.parse().unwrap_or(0);
    format!("{digits}e{}{:02}", if power < 0 { '-' } else { '+' }, power.abs())
}

/// Python's `text % values`.
pub(super) fn percent(text: &str, values: &Value, budget: &mut Budget) -> Res<String> {
    let mut out = String::new();
    let positional: &[Value] = match values {
        Value::Tuple(seq) => &seq.items,
        other => std::slice::from_ref(other),
    };
    let mut used = 0;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            budget.bytes(c.len_utf8())?;
            out.push(c);
            continue;
        }
        let mut key = None;
        if chars.next_if_eq(&'(').is_some() {
            let name: String = chars.by_ref().take_while(|&c| c != ')').collect();
            key = Some(name);
        }
        let mut spec = Spec::default();
        while let Some(flag) = chars.next_if(|c| "-+ #0".contains(*c)) {
            match flag {
                '-' => spec.align = Some('<'),
                '0' => spec.zero = true,
                '#' => spec.alternate = true,
                sign => spec.sign = Some(sign),
            }
        }
        let next = |used: &mut usize| {
            let value = positional.get(*used).cloned();
            *used += 1;
            value.ok_or_else(|| Fail::error("not enough arguments for format string"))
        };
        let too_large = || Fail::error("a width or precision of a format is too large");
        let number = |chars: &mut std::iter::Peekable<std::str::Chars<'_>>, used: &mut usize| -> Res<Option<usize>> {
            if chars.next_if_eq(&'*').is_some() {
                let n = next(used)?.int().ok_or_else(|| Fail::error("* wants int"))?;
                return usize::try_from(n).map(Some).map_err(|_| too_large());
            }
            let mut digits = String::new();
            while let Some(d) = chars.next_if(char::is_ascii_digit) {
                digits.push(d);
            }
            if digits.is_empty() { Ok(None) } else { digits.parse().map(Some).map_err(|_| too_large()) }
        };
        spec.width = number(&mut chars, &mut used)?.unwrap_or(0);
        if chars.next_if_eq(&'.').is_some() {
            spec.precision = Some(number(&mut chars, &mut used)?.unwrap_or(0));
        }
        let Some(kind) = chars.next() else { return Err(Fail::error("incomplete format")) };
        if kind == '%' {
            out.push('%');
            continue;
        }
        let value = match (&key, values) {
            (Some(name), Value::Dict(map)) => {
                map.get_str(name).cloned().ok_or_else(|| Fail::error(format!("KeyError: '{name}'")))?
            }
            (Some(_), _) => return Err(Fail::error("format requires a mapping")),
            (None, _) => {
                let value = positional.get(used).cloned();
                used += 1;
                value.ok_or_else(|| Fail::error("not enough arguments for format string"))?
            }
        };
        spec.align = spec.align.or(if spec.zero { None } else { Some('>') });
        let piece = match kind {
            's' | 'r' | 'a' => {
                let text = if kind == 's' { to_str(&value, budget)? } else { repr(&value, budget)? };
                spec.zero = false;
                spec.align = spec.align.or(Some('>'));
                Spec { kind: None, ..spec }.apply(&Value::str(text), budget)?
            }
            'd' | 'i' | 'u' => {
                let whole = match &value {
                    Value::Float(x) => Some(x.trunc() as i64),
                    other => other.int(),
                };
                let whole = whole.ok_or_else(|| Fail::error("%d format: a real number is required"))?;
                Spec { kind: Some('d'), ..spec }.apply(&Value::Int(whole), budget)?
            }
            'x' | 'X' | 'o' | 'c' if value.int().is_some() => {
                Spec { kind: Some(kind), ..spec }.apply(&value, budget)?
            }
            'c' => to_str(&value, budget)?,
            'e' | 'E' | 'f' | 'F' | 'g' | 'G' => Spec { kind: Some(kind), ..spec }.apply(&value, budget)?,
            other => return Err(Fail::error(format!("unsupported format character '{other}'"))),
        };
        budget.bytes(piece.len())?;
        out += &piece;
    }
    if used < positional.len() && !matches!(values, Value::Dict(_) | Value::List(_)) {
        return Err(Fail::error("not all arguments converted during string formatting"));
    }
    Ok(out)
}
