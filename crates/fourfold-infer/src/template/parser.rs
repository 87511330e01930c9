//! Tokens to a tree, by Jinja's grammar: statements here, expressions in a file of their own.

mod expressions;

use super::ast::{Expr, ExprKind, ForLoop, MacroBody, Node, NodeKind, Target, Template};
use super::budget::TemplateError;
use super::lexer::{Token, tokens};

/// Levels of nesting that a template may have, and parts of one chain of operators.
const DEPTH: u32 = 200;

/// Parses a template.
pub(super) fn parse(source: &str) -> Result<Template, TemplateError> {
    let mut parser = Parser {
        tokens: tokens(source)?,
        at: 0,
        depth: 0,
        macros: Vec::new(),
        for_loops: Vec::new(),
        seen: [false; 3],
        loops: 0,
    };
    let body = parser.nodes(&[])?;
    Ok(Template { body, macros: parser.macros, loops: parser.for_loops })
}

struct Parser {
    tokens: Vec<(Token, u32)>,
    at: usize,
    depth: u32,
    macros: Vec<MacroBody>,
    for_loops: Vec<ForLoop>,
    /// Whether `varargs`, `kwargs` and `caller` have been named in the macro at hand.
    seen: [bool; 3],
    loops: u32,
}

type Parsed<T> = Result<T, TemplateError>;

impl Parser {
    fn peek(&self) -> &Token {
        &self.tokens[self.at].0
    }

    fn line(&self) -> u32 {
        self.tokens[self.at].1
    }

    fn next(&mut self) -> Token {
        let token = self.tokens[self.at].0.clone();
        if self.at + 1 < self.tokens.len() {
            self.at += 1;
        }
        token
    }

    fn fail<T>(&self, reason: impl Into<String>) -> Parsed<T> {
        Err(TemplateError { line: self.line(), reason: reason.into() })
    }

    fn unexpected<T>(&self, wanted: &str) -> Parsed<T> {
        let found = match self.peek() {
            Token::Text(_) => "text".to_owned(),
            Token::Name(name) => format!("`{name}`"),
            Token::Str(_) => "a string".to_owned(),
            Token::Int(n) => n.to_string(),
            Token::Float(n) => n.to_string(),
            Token::Symbol(symbol) => format!("`{symbol}`"),
            Token::VariableBegin => "`{{`".to_owned(),
            Token::VariableEnd => "`}}`".to_owned(),
            Token::BlockBegin => "`{%`".to_owned(),
            Token::BlockEnd => "`%}`".to_owned(),
            Token::End => "the end of the template".to_owned(),
        };
        self.fail(format!("{wanted} is expected, not {found}"))
    }

    fn is_symbol(&self, symbol: &str) -> bool {
        matches!(self.peek(), Token::Symbol(s) if *s == symbol)
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.peek(), Token::Name(n) if n == name)
    }

    fn take_symbol(&mut self, symbol: &str) -> bool {
        let found = self.is_symbol(symbol);
        if found {
            self.next();
        }
        found
    }

    fn take_name(&mut self, name: &str) -> bool {
        let found = self.is_name(name);
        if found {
            self.next();
        }
        found
    }

    fn want_symbol(&mut self, symbol: &str) -> Parsed<()> {
        if self.take_symbol(symbol) { Ok(()) } else { self.unexpected(&format!("`{symbol}`")) }
    }

    fn want_name(&mut self) -> Parsed<String> {
        match self.peek() {
            Token::Name(_) => match self.next() {
                Token::Name(name) => Ok(name),
                _ => self.unexpected("a name"),
            },
            _ => self.unexpected("a name"),
        }
    }

    fn want_block_end(&mut self) -> Parsed<()> {
        if *self.peek() == Token::BlockEnd {
            self.next();
            return Ok(());
        }
        self.unexpected("`%}`")
    }

    /// Runs `parse` one level deeper.
    fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<T> {
        if self.depth >= DEPTH {
            return self.fail(format!("more than {DEPTH} levels of nesting"));
        }
        self.depth += 1;
        let parsed = parse(self);
        self.depth -= 1;
        parsed
    }

    /// Statements up to a tag of one of these names, which is left to be read, or to the end of the template where there is no name.
    fn nodes(&mut self, until: &[&str]) -> Parsed<Vec<Node>> {
        self.deeper(|p| p.nodes_here(until))
    }

    fn nodes_here(&mut self, until: &[&str]) -> Parsed<Vec<Node>> {
        let mut nodes = Vec::new();
        loop {
            let line = self.line();
            match self.peek().clone() {
                Token::End if until.is_empty() => return Ok(nodes),
                Token::Text(text) => {
                    self.next();
                    nodes.push(Node { line, kind: NodeKind::Text(text) });
                }
                Token::VariableBegin => {
                    self.next();
                    let value = self.tuple_or_expression()?;
                    if *self.peek() != Token::VariableEnd {
                        return self.unexpected("`}}`");
                    }
                    self.next();
                    nodes.push(Node { line, kind: NodeKind::Print(value) });
                }
                Token::BlockBegin => {
                    self.next();
                    if let Token::Name(name) = self.peek()
                        && until.contains(&name.as_str())
                    {
                        return Ok(nodes);
                    }
                    nodes.push(self.statement(line)?);
                }
                _ => return self.unexpected(&format!("`{{% {} %}}`", until.join("`, `"))),
            }
        }
    }

    /// The name of the tag that ended [`Parser::nodes`].
    fn end_tag(&mut self) -> Parsed<String> {
        self.want_name()
    }

    fn statement(&mut self, line: u32) -> Parsed<Node> {
        let name = self.want_name()?;
        let kind = match name.as_str() {
            "for" => self.for_loop()?,
            "if" => self.condition()?,
            "set" => self.set()?,
            "with" => {
                let mut bindings = Vec::new();
                while *self.peek() != Token::BlockEnd {
                    if !bindings.is_empty() {
                        self.want_symbol(",")?;
                    }
                    let target = self.target(false)?;
                    self.want_symbol("=")?;
                    bindings.push((target, self.expression()?));
                }
                NodeKind::With(bindings, self.body("endwith")?)
            }
            "macro" => {
                let name = self.want_name()?;
                let parameters = self.parameters()?;
                let body = self.macro_body(name, parameters, "endmacro")?;
                NodeKind::Macro(body)
            }
            "call" => {
                let parameters = if self.is_symbol("(") { self.parameters()? } else { Vec::new() };
                let call = self.expression()?;
                if !matches!(call.kind, ExprKind::Call(..)) {
                    return self.fail("a call is expected after `call`");
                }
                let body = self.macro_body("caller".to_owned(), parameters, "endcall")?;
                NodeKind::CallBlock(body, call)
            }
            "filter" => {
                let filter = self.filters(None, line, true)?;
                NodeKind::FilterBlock(filter, self.body("endfilter")?)
            }
            "generation" => NodeKind::Scope(self.body("endgeneration")?),
            "block" => {
                self.want_name()?;
                while *self.peek() != Token::BlockEnd {
                    if !self.take_name("scoped") && !self.take_name("required") {
                        return self.unexpected("`%}`");
                    }
                }
                self.want_block_end()?;
                let body = self.nodes(&["endblock"])?;
                self.end_tag()?;
                if let Token::Name(_) = self.peek() {
                    self.next();
                }
                self.want_block_end()?;
                NodeKind::Scope(body)
            }
            "print" => {
                let value = self.tuple_or_expression()?;
                self.want_block_end()?;
                NodeKind::Print(value)
            }
            "break" | "continue" => {
                if self.loops == 0 {
                    return self.fail(format!("`{name}` outside of a loop"));
                }
                self.want_block_end()?;
                if name == "break" { NodeKind::Break } else { NodeKind::Continue }
            }
            "include" | "import" | "from" | "extends" => {
                return self.fail(format!("`{name}`: a chat template has no other templates"));
            }
            other => return self.fail(format!("unknown tag `{other}`")),
        };
        Ok(Node { line, kind })
    }

    /// `%}`, statements and the end tag.
    fn body(&mut self, end: &'static str) -> Parsed<Vec<Node>> {
        self.want_block_end()?;
        let body = self.nodes(&[end])?;
        self.end_tag()?;
        self.want_block_end()?;
        Ok(body)
    }

    fn macro_body(
        &mut self,
        name: String,
        parameters: Vec<(String, Option<Expr>)>,
        end: &'static str,
    ) -> Parsed<usize> {
        let outer = std::mem::take(&mut self.seen);
        let loops = std::mem::take(&mut self.loops);
        let body = self.body(end)?;
        self.loops = loops;
        let [uses_varargs, uses_kwargs, uses_caller] = std::mem::replace(&mut self.seen, outer);
        self.macros.push(MacroBody { name, parameters, body, uses_varargs, uses_kwargs, uses_caller });
        Ok(self.macros.len() - 1)
    }

    fn parameters(&mut self) -> Parsed<Vec<(String, Option<Expr>)>> {
        self.want_symbol("(")?;
        let mut parameters: Vec<(String, Option<Expr>)> = Vec::new();
        while !self.take_symbol(")") {
            if !parameters.is_empty() {
                self.want_symbol(",")?;
                if self.take_symbol(")") {
                    break;
                }
            }
            let name = self.want_name()?;
            let default = if self.take_symbol("=") { Some(self.expression()?) } else { None };
            if default.is_none() && parameters.last().is_some_and(|(_, d)| d.is_some()) {
                return self.fail("a parameter without a default follows one with a default");
            }
            parameters.push((name, default));
        }
        Ok(parameters)
    }

    fn for_loop(&mut self) -> Parsed<NodeKind> {
        let target = self.target(true)?;
        if !self.take_name("in") {
            return self.unexpected("`in`");
        }
        let iterable = self.tuple(false)?;
        let condition = if self.take_name("if") { Some(self.expression()?) } else { None };
        let recursive = self.take_name("recursive");
        self.want_block_end()?;
        self.loops += 1;
        let body = self.nodes(&["endfor", "else"])?;
        self.loops -= 1;
        let otherwise = if self.end_tag()? == "else" {
            self.want_block_end()?;
            let nodes = self.nodes(&["endfor"])?;
            self.end_tag()?;
            nodes
        } else {
            Vec::new()
        };
        self.want_block_end()?;
        self.for_loops.push(ForLoop { target, iterable, condition, body, otherwise, recursive });
        Ok(NodeKind::For(self.for_loops.len() - 1))
    }

    fn condition(&mut self) -> Parsed<NodeKind> {
        let mut branches = Vec::new();
        let mut otherwise = Vec::new();
        let condition = self.tuple(false)?;
        self.want_block_end()?;
        branches.push((condition, self.nodes(&["elif", "else", "endif"])?));
        loop {
            match self.end_tag()?.as_str() {
                "elif" => {
                    let condition = self.tuple(false)?;
                    self.want_block_end()?;
                    branches.push((condition, self.nodes(&["elif", "else", "endif"])?));
                }
                "else" => {
                    self.want_block_end()?;
                    otherwise = self.nodes(&["endif"])?;
                }
                _ => {
                    self.want_block_end()?;
                    return Ok(NodeKind::If { branches, otherwise });
                }
            }
        }
    }

    fn set(&mut self) -> Parsed<NodeKind> {
        let target = self.target(true)?;
        let line = self.line();
        if self.take_symbol("=") {
            let value = self.tuple_or_expression()?;
            self.want_block_end()?;
            return Ok(NodeKind::Set(target, value));
        }
        let filter = if self.is_symbol("|") { Some(self.filters(None, line, false)?) } else { None };
        let body = self.body("endset")?;
        Ok(NodeKind::SetBlock(target, body, filter))
    }

    fn target(&mut self, many: bool) -> Parsed<Target> {
        let mut targets = vec![self.one_target(many)?];
        let mut is_tuple = false;
        while many && self.take_symbol(",") {
            is_tuple = true;
            if self.is_name("in") || self.is_symbol("=") {
                break;
            }
            targets.push(self.one_target(many)?);
        }
        match (is_tuple, targets.pop()) {
            (false, Some(target)) => Ok(target),
            (_, last) => {
                targets.extend(last);
                Ok(Target::Tuple(targets))
            }
        }
    }

    fn one_target(&mut self, many: bool) -> Parsed<Target> {
        if self.take_symbol("(") {
            let target = self.deeper(|p| p.target(many))?;
            self.want_symbol(")")?;
            return Ok(target);
        }
        let name = self.want_name()?;
        if ["true", "false", "none", "True", "False", "None"].contains(&name.as_str()) {
            return self.fail(format!("`{name}` cannot be set"));
        }
        if self.take_symbol(".") {
            return Ok(Target::Member(name, self.want_name()?));
        }
        Ok(Target::Name(name))
    }
}
