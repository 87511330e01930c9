//! Expressions, from what binds least to what binds most.

use super::{DEPTH, Parsed, Parser};
use crate::template::ast::{Args, Comparison, Expr, ExprKind, Literal, Operator};
use crate::template::lexer::Token;

impl Parser {
    /// An expression, or several with commas between them.
    pub(super) fn tuple_or_expression(&mut self) -> Parsed<Expr> {
        self.tuple(true)
    }

    pub(super) fn tuple(&mut self, with_choice: bool) -> Parsed<Expr> {
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

    pub(super) fn expression(&mut self) -> Parsed<Expr> {
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
    pub(super) fn filters(&mut self, mut value: Option<Expr>, line: u32, mut bare: bool) -> Parsed<Expr> {
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
