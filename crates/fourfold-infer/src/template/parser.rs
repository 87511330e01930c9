//! Tokens to a tree, by Jinja's grammar.

use super::ast::{
    Args, Comparison, Expr, ExprKind, ForLoop, Literal, MacroBody, Node, NodeKind, Operator, Target, Template,
};
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

    /// An expression, or several with commas between them.
    fn tuple_or_expression(&mut self) -> Parsed<Expr> {
        self.tuple(true)
    }

    fn tuple(&mut self, with_choice: bool) -> Parsed<Expr> {
        let line = self.line();
        let one = |p: &mut Self| if with_choice { p.expression() } else { p.deeper(Self::or) };
        let first = one(self)?;
        if !self.is_symbol(",") {
            return Ok(first);
        }
        let mut items = vec![first];
        while self.take_symbol(",") {
            if matches!(self.peek(), Token::VariableEnd | Token::BlockEnd) || self.is_symbol(")") {
                break;
            }
            items.push(one(self)?);
        }
        Ok(Expr { line, kind: ExprKind::Tuple(items) })
    }

    fn expression(&mut self) -> Parsed<Expr> {
        self.deeper(|p| {
            let line = p.line();
            let mut value = p.or()?;
            let mut chain = 0;
            while p.take_name("if") {
                chain += 1;
                if chain > DEPTH {
                    return p.fail("a chain of conditions is too long");
                }
                let condition = p.or()?;
                let otherwise = if p.take_name("else") { Some(Box::new(p.expression()?)) } else { None };
                value = Expr { line, kind: ExprKind::Choice(Box::new(value), Box::new(condition), otherwise) };
            }
            Ok(value)
        })
    }

    /// A chain of operators that group to the left; the tree is as deep as the chain is long.
    fn chain(
        &mut self,
        part: fn(&mut Self) -> Parsed<Expr>,
        operator: impl Fn(&mut Self) -> Option<Join>,
    ) -> Parsed<Expr> {
        let line = self.line();
        let mut left = part(self)?;
        let mut length = 0;
        while let Some(join) = operator(self) {
            length += 1;
            if length > DEPTH {
                return self.fail(format!("more than {DEPTH} operators in a row"));
            }
            let right = Box::new(part(self)?);
            let before = Box::new(left);
            let kind = match join {
                Join::And => ExprKind::And(before, right),
                Join::Or => ExprKind::Or(before, right),
                Join::Binary(operator) => ExprKind::Binary(operator, before, right),
            };
            left = Expr { line, kind };
        }
        Ok(left)
    }

    fn or(&mut self) -> Parsed<Expr> {
        self.chain(Self::and, |p| p.take_name("or").then_some(Join::Or))
    }

    fn and(&mut self) -> Parsed<Expr> {
        self.chain(Self::not, |p| p.take_name("and").then_some(Join::And))
    }

    fn not(&mut self) -> Parsed<Expr> {
        let line = self.line();
        if self.take_name("not") {
            let inner = self.deeper(Self::not)?;
            return Ok(Expr { line, kind: ExprKind::Not(Box::new(inner)) });
        }
        self.compare()
    }

    fn compare(&mut self) -> Parsed<Expr> {
        let line = self.line();
        let first = self.sum()?;
        let mut rest = Vec::new();
        loop {
            let comparison = match self.peek() {
                Token::Symbol("==") => Comparison::Equal,
                Token::Symbol("!=") => Comparison::NotEqual,
                Token::Symbol("<") => Comparison::Less,
                Token::Symbol("<=") => Comparison::LessEqual,
                Token::Symbol(">") => Comparison::Greater,
                Token::Symbol(">=") => Comparison::GreaterEqual,
                Token::Name(name) if name == "in" => Comparison::In,
                Token::Name(name)
                    if name == "not"
                        && matches!(&self.tokens.get(self.at + 1), Some((Token::Name(n), _)) if n == "in") =>
                {
                    self.next();
                    Comparison::NotIn
                }
                _ => break,
            };
            self.next();
            rest.push((comparison, self.sum()?));
        }
        if rest.is_empty() {
            return Ok(first);
        }
        Ok(Expr { line, kind: ExprKind::Compare(Box::new(first), rest) })
    }

    fn sum(&mut self) -> Parsed<Expr> {
        self.chain(Self::concat, |p| {
            let add = p.take_symbol("+").then_some(Join::Binary(Operator::Add));
            add.or_else(|| p.take_symbol("-").then_some(Join::Binary(Operator::Subtract)))
        })
    }

    fn concat(&mut self) -> Parsed<Expr> {
        let line = self.line();
        let first = self.product()?;
        if !self.is_symbol("~") {
            return Ok(first);
        }
        let mut parts = vec![first];
        while self.take_symbol("~") {
            parts.push(self.product()?);
        }
        Ok(Expr { line, kind: ExprKind::Concat(parts) })
    }

    fn product(&mut self) -> Parsed<Expr> {
        self.chain(Self::power, |p| {
            let operator = match p.peek() {
                Token::Symbol("*") => Operator::Multiply,
                Token::Symbol("/") => Operator::Divide,
                Token::Symbol("//") => Operator::FloorDivide,
                Token::Symbol("%") => Operator::Modulo,
                _ => return None,
            };
            p.next();
            Some(Join::Binary(operator))
        })
    }

    fn power(&mut self) -> Parsed<Expr> {
        self.chain(|p| p.unary(true), |p| p.take_symbol("**").then_some(Join::Binary(Operator::Power)))
    }

    fn unary(&mut self, with_filter: bool) -> Parsed<Expr> {
        let line = self.line();
        let value = if self.take_symbol("-") {
            let inner = self.deeper(|p| p.unary(false))?;
            Expr { line, kind: ExprKind::Negative(Box::new(inner)) }
        } else if self.take_symbol("+") {
            let inner = self.deeper(|p| p.unary(false))?;
            Expr { line, kind: ExprKind::Positive(Box::new(inner)) }
        } else {
            self.primary()?
        };
        let value = self.postfix(value)?;
        if with_filter { self.filter_or_test(value) } else { Ok(value) }
    }

    fn primary(&mut self) -> Parsed<Expr> {
        let line = self.line();
        let literal = |literal| Ok(Expr { line, kind: ExprKind::Literal(literal) });
        match self.peek().clone() {
            Token::Name(name) => {
                self.next();
                match name.as_str() {
                    "true" | "True" => return literal(Literal::Bool(true)),
                    "false" | "False" => return literal(Literal::Bool(false)),
                    "none" | "None" => return literal(Literal::None),
                    "varargs" => self.seen[0] = true,
                    "kwargs" => self.seen[1] = true,
                    "caller" => self.seen[2] = true,
                    _ => {}
                }
                Ok(Expr { line, kind: ExprKind::Name(name) })
            }
            Token::Str(first) => {
                self.next();
                let mut text = first;
                while let Token::Str(more) = self.peek().clone() {
                    self.next();
                    text += &more;
                }
                literal(Literal::Str(text))
            }
            Token::Int(n) => {
                self.next();
                literal(Literal::Int(n))
            }
            Token::Float(n) => {
                self.next();
                literal(Literal::Float(n))
            }
            Token::Symbol("(") => {
                self.next();
                if self.take_symbol(")") {
                    return Ok(Expr { line, kind: ExprKind::Tuple(Vec::new()) });
                }
                let inner = self.deeper(|p| p.tuple(true))?;
                self.want_symbol(")")?;
                Ok(inner)
            }
            Token::Symbol("[") => {
                self.next();
                let mut items = Vec::new();
                while !self.take_symbol("]") {
                    if !items.is_empty() {
                        self.want_symbol(",")?;
                        if self.take_symbol("]") {
                            break;
                        }
                    }
                    items.push(self.expression()?);
                }
                Ok(Expr { line, kind: ExprKind::List(items) })
            }
            Token::Symbol("{") => {
                self.next();
                let mut items = Vec::new();
                while !self.take_symbol("}") {
                    if !items.is_empty() {
                        self.want_symbol(",")?;
                        if self.take_symbol("}") {
                            break;
                        }
                    }
                    let key = self.expression()?;
                    self.want_symbol(":")?;
                    items.push((key, self.expression()?));
                }
                Ok(Expr { line, kind: ExprKind::Dict(items) })
            }
            _ => self.unexpected("an expression"),
        }
    }

    fn postfix(&mut self, mut value: Expr) -> Parsed<Expr> {
        let mut length = 0;
        loop {
            let line = self.line();
            length += 1;
            if length > DEPTH {
                return self.fail(format!("more than {DEPTH} accesses in a row"));
            }
            let kind = if self.take_symbol(".") {
                match self.peek().clone() {
                    Token::Name(name) => {
                        self.next();
                        ExprKind::Attribute(Box::new(value), name)
                    }
                    Token::Int(n) => {
                        self.next();
                        let index = Expr { line, kind: ExprKind::Literal(Literal::Int(n)) };
                        ExprKind::Item(Box::new(value), Box::new(index))
                    }
                    _ => return self.unexpected("a name"),
                }
            } else if self.is_symbol("[") {
                self.next();
                let kind = self.deeper(|p| p.subscript(value))?;
                self.want_symbol("]")?;
                kind
            } else if self.is_symbol("(") {
                let args = self.deeper(Self::arguments)?;
                ExprKind::Call(Box::new(value), args)
            } else {
                return Ok(value);
            };
            value = Expr { line, kind };
        }
    }

    fn subscript(&mut self, value: Expr) -> Parsed<ExprKind> {
        let mut parts: [Option<Box<Expr>>; 3] = [None, None, None];
        let mut part = 0;
        let mut is_slice = false;
        loop {
            if self.take_symbol(":") {
                is_slice = true;
                part += 1;
                if part > 2 {
                    return self.unexpected("`]`");
                }
            } else if self.is_symbol("]") || self.is_symbol(",") {
                break;
            } else if parts[part].is_some() {
                return self.unexpected("`]`");
            } else {
                parts[part] = Some(Box::new(self.expression()?));
            }
        }
        match (is_slice, parts) {
            (true, parts) => Ok(ExprKind::Slice(Box::new(value), parts)),
            (false, [Some(index), _, _]) if !self.is_symbol(",") => Ok(ExprKind::Item(Box::new(value), index)),
            _ => self.unexpected("an index"),
        }
    }

    fn arguments(&mut self) -> Parsed<Args> {
        self.want_symbol("(")?;
        let mut args = Args::default();
        let mut is_first = true;
        while !self.take_symbol(")") {
            if !is_first {
                self.want_symbol(",")?;
                if self.take_symbol(")") {
                    break;
                }
            }
            is_first = false;
            let is_named = matches!(self.peek(), Token::Name(_))
                && matches!(self.tokens.get(self.at + 1), Some((Token::Symbol("="), _)));
            if self.take_symbol("**") {
                args.named_rest = Some(Box::new(self.expression()?));
            } else if self.take_symbol("*") {
                args.rest = Some(Box::new(self.expression()?));
            } else if is_named {
                let name = self.want_name()?;
                self.want_symbol("=")?;
                args.named.push((name, self.expression()?));
            } else if !args.named.is_empty() || args.named_rest.is_some() || args.rest.is_some() {
                return self.fail("an argument without a name follows one with a name");
            } else {
                args.positional.push(self.expression()?);
            }
        }
        Ok(args)
    }

    fn filter_or_test(&mut self, mut value: Expr) -> Parsed<Expr> {
        let mut length = 0;
        loop {
            let line = self.line();
            length += 1;
            if length > DEPTH {
                return self.fail(format!("more than {DEPTH} filters in a row"));
            }
            if self.is_symbol("|") {
                value = self.filters(Some(value), line, false)?;
            } else if self.is_name("is") {
                self.next();
                value = self.test(value, line)?;
            } else if self.is_symbol("(") {
                let args = self.deeper(Self::arguments)?;
                value = Expr { line, kind: ExprKind::Call(Box::new(value), args) };
            } else {
                return Ok(value);
            }
        }
    }

    /// `| filter(…) | filter`; in a filter block the first has no `|`.
    fn filters(&mut self, mut value: Option<Expr>, line: u32, mut bare: bool) -> Parsed<Expr> {
        let mut length = 0;
        while bare || self.is_symbol("|") {
            length += 1;
            if length > DEPTH {
                return self.fail(format!("more than {DEPTH} filters in a row"));
            }
            if !std::mem::take(&mut bare) {
                self.next();
            }
            let mut name = self.want_name()?;
            while self.take_symbol(".") {
                name = format!("{name}.{}", self.want_name()?);
            }
            let args = if self.is_symbol("(") { self.deeper(Self::arguments)? } else { Args::default() };
            value = Some(Expr { line, kind: ExprKind::Filter(value.map(Box::new), name, args) });
        }
        value.map_or_else(|| self.unexpected("a filter"), Ok)
    }

    fn test(&mut self, value: Expr, line: u32) -> Parsed<Expr> {
        let negated = self.take_name("not");
        let mut name = self.want_name()?;
        while self.take_symbol(".") {
            name = format!("{name}.{}", self.want_name()?);
        }
        let args = if self.is_symbol("(") {
            self.deeper(Self::arguments)?
        } else {
            let starts = match self.peek() {
                Token::Name(next) => {
                    !["else", "or", "and", "is", "if", "in", "not", "recursive"].contains(&next.as_str())
                }
                Token::Str(_) | Token::Int(_) | Token::Float(_) | Token::Symbol("(" | "[" | "{") => true,
                _ => false,
            };
            if self.is_name("is") {
                return self.fail("tests cannot follow one another");
            }
            if starts {
                let argument = self.primary()?;
                Args { positional: vec![self.postfix(argument)?], ..Args::default() }
            } else {
                Args::default()
            }
        };
        let test = Expr { line, kind: ExprKind::Test(Box::new(value), name, args) };
        Ok(if negated { Expr { line, kind: ExprKind::Not(Box::new(test)) } } else { test })
    }
}

/// How two parts are joined.
#[derive(Clone, Copy)]
enum Join {
    And,
    Or,
    Binary(Operator),
}
