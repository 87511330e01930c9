//! A template's text to tokens, with Jinja's rules for white space (`trim_blocks` and `lstrip_blocks` set, as transformers does).

use super::budget::TemplateError;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token {
    Text(String),
    VariableBegin,
    VariableEnd,
    BlockBegin,
    BlockEnd,
    Name(String),
    Str(String),
    Int(i64),
    Float(f64),
    Symbol(&'static str),
    End,
}

const SYMBOLS: [&str; 27] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "(", ")", "[", "]", "{", "}", ">", "<", "=", ".",
    ":", "|", ",", ";", "!",
];

/// Splits a template into tokens with their lines.
pub(super) fn tokens(source: &str) -> Result<Vec<(Token, u32)>, TemplateError> {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    // Jinja drops one line end at the end of a template.
    let source = source.strip_suffix('\n').unwrap_or(&source);
    let mut lexer = Lexer { source, at: 0, line: 1, out: Vec::new(), at_line_start: true };
    lexer.run()?;
    let line = lexer.line;
    lexer.out.push((Token::End, line));
    Ok(lexer.out)
}

struct Lexer<'a> {
    source: &'a str,
    at: usize,
    line: u32,
    out: Vec<(Token, u32)>,
    /// Whether what came before ended with a line end.
    at_line_start: bool,
}

impl Lexer<'_> {
    fn rest(&self) -> &str {
        &self.source[self.at..]
    }

    fn advance(&mut self, bytes: usize) {
        let passed = &self.source[self.at..self.at + bytes];
        self.line += passed.bytes().filter(|&b| b == b'\n').count() as u32;
        if bytes > 0 {
            self.at_line_start = passed.ends_with('\n');
        }
        self.at += bytes;
    }

    fn fail<T>(&self, reason: impl Into<String>) -> Result<T, TemplateError> {
        Err(TemplateError { line: self.line, reason: reason.into() })
    }

    fn skip_space(&mut self) {
        let rest = self.rest();
        let bytes = rest.len() - rest.trim_start().len();
        self.advance(bytes);
    }

    fn run(&mut self) -> Result<(), TemplateError> {
        while self.at < self.source.len() {
            let rest = self.rest();
            let begin = ["{{", "{%", "{#"].iter().filter_map(|tag| rest.find(tag)).min();
            let Some(begin) = begin else {
                let text = rest.to_owned();
                self.text(text.len(), text);
                break;
            };
            let (tag, sign) = (rest.as_bytes()[begin + 1], rest.as_bytes().get(begin + 2).copied());
            let mut text = rest[..begin].to_owned();
            let is_variable = tag == b'{';
            if sign == Some(b'-') {
                text.truncate(text.trim_end().len());
            } else if sign != Some(b'+') && !is_variable {
                // The space before a tag that is the first thing on its line.
                let line = text.rfind('\n').map(|i| i + 1);
                if let Some(begin) = line.or(self.at_line_start.then_some(0))
                    && text[begin..].chars().all(char::is_whitespace)
                {
                    text.truncate(begin);
                }
            }
            self.text(begin, text);
            let signed = usize::from(matches!(sign, Some(b'-' | b'+')));
            self.advance(2);
            match tag {
                b'#' => self.comment()?,
                b'{' => {
                    // In `{{+` the sign is Jinja's as well as in `{{-`.
                    self.advance(signed);
                    self.out.push((Token::VariableBegin, self.line));
                    self.expression(true)?;
                }
                _ => {
                    self.advance(signed);
                    if !self.raw()? {
                        self.out.push((Token::BlockBegin, self.line));
                        self.expression(false)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Passes `bytes`, of which `text` is kept.
    fn text(&mut self, bytes: usize, text: String) {
        let line = self.line;
        self.advance(bytes);
        if !text.is_empty() {
            self.out.push((Token::Text(text), line));
        }
    }

    fn comment(&mut self) -> Result<(), TemplateError> {
        let Some(end) = self.rest().find("#}") else { return self.fail("a comment without its end") };
        let sign = self.rest()[..end].chars().next_back();
        self.advance(end + 2);
        match sign {
            Some('-') => self.skip_space(),
            Some('+') => {}
            _ => self.skip_line_end(),
        }
        Ok(())
    }

    fn skip_line_end(&mut self) {
        if self.rest().starts_with('\n') {
            self.advance(1);
        }
    }

    /// `{% raw %}…{% endraw %}`, when that is what stands here.
    fn raw(&mut self) -> Result<bool, TemplateError> {
        let rest = self.rest();
        let Some(inner) = rest.trim_start().strip_prefix("raw") else { return Ok(false) };
        let inner = inner.trim_start();
        let trims = inner.starts_with("-%}");
        let Some(inner) = inner.strip_prefix("-%}").or(inner.strip_prefix("%}")) else { return Ok(false) };
        let begin = rest.len() - inner.len();
        self.advance(begin);
        if trims {
            self.skip_space();
        }
        let rest = self.rest();
        let mut from = 0;
        while let Some(found) = rest[from..].find("{%") {
            let open = from + found;
            let inside = &rest[open + 2..];
            let strips = inside.starts_with('-');
            let name = inside.trim_start_matches(['-', '+']).trim_start();
            if let Some(after) = name.strip_prefix("endraw").map(str::trim_start) {
                let (sign, end) = if let Some(end) = after.strip_prefix("-%}") {
                    ('-', end)
                } else if let Some(end) = after.strip_prefix("+%}") {
                    ('+', end)
                } else if let Some(end) = after.strip_prefix("%}") {
                    (' ', end)
                } else {
                    return self.fail("`endraw` without its end");
                };
                let mut text = rest[..open].to_owned();
                if strips {
                    text.truncate(text.trim_end().len());
                } else if !inside.starts_with('+') {
                    let line = text.rfind('\n').map_or(0, |i| i + 1);
                    if line > 0 && text[line..].chars().all(char::is_whitespace) {
                        text.truncate(line);
                    }
                }
                let bytes = rest.len() - end.len();
                self.text(bytes, text);
                match sign {
                    '-' => self.skip_space(),
                    '+' => {}
                    _ => self.skip_line_end(),
                }
                return Ok(true);
            }
            from = open + 2;
        }
        self.fail("`raw` without `endraw`")
    }

    /// Tokens up to the end of a `{{ }}` or `{% %}`.
    fn expression(&mut self, is_variable: bool) -> Result<(), TemplateError> {
        let close = if is_variable { "}}" } else { "%}" };
        let mut open: Vec<&str> = Vec::new();
        loop {
            self.skip_space();
            let rest = self.rest();
            let line = self.line;
            let Some(first) = rest.chars().next() else {
                return self.fail(format!("`{close}` is missing"));
            };
            if open.is_empty() {
                let sign = rest.chars().next().filter(|&c| c == '-' || (c == '+' && !is_variable));
                let signed = usize::from(sign.is_some());
                if rest[signed..].starts_with(close) {
                    self.advance(signed + 2);
                    match sign {
                        Some('-') => self.skip_space(),
                        None if !is_variable => self.skip_line_end(),
                        _ => {}
                    }
                    self.out.push((if is_variable { Token::VariableEnd } else { Token::BlockEnd }, line));
                    return Ok(());
                }
            }
            if first == '"' || first == '\'' {
                let token = self.string(first)?;
                self.out.push((token, line));
            } else if first.is_ascii_digit() {
                let token = self.number()?;
                self.out.push((token, line));
            } else if first == '_' || first.is_alphabetic() {
                let end = rest.find(|c: char| c != '_' && !c.is_alphanumeric()).unwrap_or(rest.len());
                let name = rest[..end].to_owned();
                self.advance(end);
                self.out.push((Token::Name(name), line));
            } else if let Some(symbol) = SYMBOLS.iter().find(|s| rest.starts_with(**s)) {
                match *symbol {
                    "(" | "[" | "{" => open.push(symbol),
                    ")" | "]" | "}" => {
                        let wanted = match *symbol {
                            ")" => "(",
                            "]" => "[",
                            _ => "{",
                        };
                        if open.pop() != Some(wanted) {
                            return self.fail(format!("unexpected `{symbol}`"));
                        }
                    }
                    _ => {}
                }
                self.advance(symbol.len());
                self.out.push((Token::Symbol(symbol), line));
            } else {
                return self.fail(format!("unexpected character {first:?}"));
            }
        }
    }

    fn string(&mut self, quote: char) -> Result<Token, TemplateError> {
        let mut out = String::new();
        let mut chars = self.rest().char_indices().skip(1);
        while let Some((i, c)) = chars.next() {
            if c == quote {
                self.advance(i + 1);
                return Ok(Token::Str(out));
            }
            if c != '\\' {
                out.push(c);
                continue;
            }
            let Some((_, escaped)) = chars.next() else { break };
            let mut digits = |count: usize, radix: u32| {
                let text: String = chars.by_ref().take(count).map(|(_, c)| c).collect();
                (text.len() == count).then(|| u32::from_str_radix(&text, radix).ok()).flatten()
            };
            let code = match escaped {
                'n' => Some(0x0a),
                't' => Some(0x09),
                'r' => Some(0x0d),
                'a' => Some(0x07),
                'b' => Some(0x08),
                'f' => Some(0x0c),
                'v' => Some(0x0b),
                '0' => Some(0),
                '\n' => continue,
                '\\' | '\'' | '"' => Some(escaped as u32),
                'x' => Some(digits(2, 16).unwrap_or(u32::MAX)),
                'u' => Some(digits(4, 16).unwrap_or(u32::MAX)),
                'U' => Some(digits(8, 16).unwrap_or(u32::MAX)),
                _ => None,
            };
            match code.map(char::from_u32) {
                Some(Some(c)) => out.push(c),
                Some(None) => return self.fail("a string with a broken escape"),
                // Python keeps the backslash of an escape that it does not know.
                None => out.extend(['\\', escaped]),
            }
        }
        self.fail("a string without its end")
    }

    fn number(&mut self) -> Result<Token, TemplateError> {
        let rest = self.rest();
        let radix = match rest.get(..2).map(str::to_ascii_lowercase).as_deref() {
            Some("0x") => 16,
            Some("0o") => 8,
            Some("0b") => 2,
            _ => 10,
        };
        if radix != 10 {
            let end = rest[2..].find(|c: char| !c.is_digit(radix) && c != '_').map_or(rest.len(), |i| i + 2);
            let value = i64::from_str_radix(&rest[2..end].replace('_', ""), radix);
            self.advance(end);
            return value.map(Token::Int).or_else(|_| self.fail("a number that is no 64-bit integer"));
        }
        let digits = |text: &str| text.find(|c: char| !c.is_ascii_digit() && c != '_').unwrap_or(text.len());
        let mut end = digits(rest);
        let mut is_float = false;
        if rest[end..].starts_with('.') && rest[end + 1..].starts_with(|c: char| c.is_ascii_digit()) {
            is_float = true;
            end += 1 + digits(&rest[end + 1..]);
        }
        if rest[end..].starts_with(['e', 'E']) {
            let sign = usize::from(rest[end + 1..].starts_with(['+', '-']));
            let exponent = digits(&rest[end + 1 + sign..]);
            if exponent > 0 {
                is_float = true;
                end += 1 + sign + exponent;
            }
        }
        let text = rest[..end].replace('_', "");
        self.advance(end);
        let token = if is_float { text.parse().ok().map(Token::Float) } else { text.parse().ok().map(Token::Int) };
        token.map_or_else(|| self.fail(format!("`{text}` is no 64-bit number")), Ok)
    }
}
