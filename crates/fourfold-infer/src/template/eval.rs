//! Walks a template's tree.

use std::cell::RefCell;
use std::rc::Rc;

use super::ast::{Args, Comparison, Expr, ExprKind, Literal, Node, NodeKind, Operator, Target, Template};
use super::budget::{Budget, Fail, Res};
use super::value::{LoopState, Scopes, Value, Variables as Scope};
use super::{checks, filters, functions, methods, operators, text};

/// Arguments of a call, evaluated.
#[derive(Clone, Default)]
pub(super) struct CallArgs {
    pub positional: Vec<Value>,
    pub named: Vec<(String, Value)>,
}

impl CallArgs {
    pub fn of(positional: Vec<Value>) -> Self {
        Self { positional, named: Vec::new() }
    }

    /// The values of parameters of these names, in order.
    pub fn bind<const N: usize>(self, what: &str, names: [&str; N]) -> Res<[Option<Value>; N]> {
        if self.positional.len() > N {
            return Err(Fail::error(format!("{what} takes at most {N} arguments, not {}", self.positional.len())));
        }
        let mut bound: [Option<Value>; N] = std::array::from_fn(|_| None);
        for (slot, value) in bound.iter_mut().zip(self.positional) {
            *slot = Some(value);
        }
        for (name, value) in self.named {
            match names.iter().position(|n| *n == name) {
                Some(i) if bound[i].is_none() => bound[i] = Some(value),
                Some(_) => return Err(Fail::error(format!("{what} has two values for `{name}`"))),
                None => return Err(Fail::error(format!("{what} has no parameter `{name}`"))),
            }
        }
        Ok(bound)
    }
}

/// How a list of statements ended.
#[derive(PartialEq, Eq)]
enum Flow {
    Next,
    Break,
    Continue,
}

/// A template at work.
pub(super) struct Machine<'t> {
    template: &'t Template,
    pub budget: Budget,
    scopes: Vec<Scope>,
    out: String,
    /// The line of what is evaluated.
    pub line: u32,
    loop_depth: usize,
}

impl<'t> Machine<'t> {
    pub fn new(template: &'t Template, budget: Budget, variables: Vec<(Rc<str>, Value)>) -> Self {
        let scopes = vec![Rc::new(RefCell::new(variables))];
        Self { template, budget, scopes, out: String::new(), line: 1, loop_depth: 0 }
    }

    /// The whole template's text.
    pub fn run(&mut self) -> Res<String> {
        self.nodes(&self.template.body)?;
        Ok(std::mem::take(&mut self.out))
    }

    fn nodes(&mut self, nodes: &'t [Node]) -> Res<Flow> {
        self.budget.enter()?;
        for node in nodes {
            self.line = node.line;
            let flow = self.node(node)?;
            if flow != Flow::Next {
                self.budget.leave();
                return Ok(flow);
            }
        }
        self.budget.leave();
        Ok(Flow::Next)
    }

    fn print(&mut self, text: &str) -> Res<()> {
        self.budget.bytes(text.len())?;
        self.out += text;
        Ok(())
    }

    fn node(&mut self, node: &'t Node) -> Res<Flow> {
        self.budget.steps(1)?;
        match &node.kind {
            NodeKind::Text(text) => self.print(text)?,
            NodeKind::Print(value) => {
                let value = self.eval(value)?;
                let text = text::to_str(&value, &mut self.budget)?;
                self.print(&text)?;
            }
            NodeKind::If { branches, otherwise } => {
                for (condition, body) in branches {
                    if self.eval(condition)?.is_true() {
                        return self.nodes(body);
                    }
                }
                return self.nodes(otherwise);
            }
            NodeKind::For(number) => {
                let iterable = self.eval(&self.template.loops[*number].iterable)?;
                self.for_loop(*number, &iterable, 0)?;
            }
            NodeKind::Set(target, value) => {
                let value = self.eval(value)?;
                self.assign(target, value)?;
            }
            NodeKind::SetBlock(target, body, filter) => {
                let text = self.capture(|m| m.scoped(body))?;
                let mut value = Value::str(text);
                if let Some(filter) = filter {
                    value = self.filtered(filter, value)?;
                }
                self.assign(target, value)?;
            }
            NodeKind::FilterBlock(filter, body) => {
                let text = self.capture(|m| m.scoped(body))?;
                let value = self.filtered(filter, Value::str(text))?;
                let text = text::to_str(&value, &mut self.budget)?;
                self.print(&text)?;
            }
            NodeKind::With(bindings, body) => {
                let mut values = Vec::new();
                for (target, value) in bindings {
                    values.push((target, self.eval(value)?));
                }
                self.scopes.push(Scope::default());
                for (target, value) in values {
                    self.assign(target, value)?;
                }
                let flow = self.nodes(body)?;
                self.scopes.pop();
                return Ok(flow);
            }
            NodeKind::Macro(number) => {
                let depth = self.scopes.len();
                self.set(&self.template.macros[*number].name, Value::Macro(*number, depth));
            }
            NodeKind::CallBlock(number, call) => {
                let scopes: Scopes = Rc::new(self.scopes.clone());
                if let ExprKind::Call(callee, args) = &call.kind {
                    let callee = self.eval(callee)?;
                    let mut args = self.arguments(args)?;
                    args.named.push(("caller".to_owned(), Value::Caller(*number, scopes)));
                    let value = self.call(&callee, args)?;
                    let text = text::to_str(&value, &mut self.budget)?;
                    self.print(&text)?;
                }
            }
            NodeKind::Scope(body) => return self.scoped(body),
            NodeKind::Break => return Ok(Flow::Break),
            NodeKind::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::Next)
    }

    fn scoped(&mut self, body: &'t [Node]) -> Res<Flow> {
        self.scopes.push(Scope::default());
        let flow = self.nodes(body)?;
        self.scopes.pop();
        Ok(flow)
    }

    /// What statements print.
    fn capture(&mut self, body: impl FnOnce(&mut Self) -> Res<Flow>) -> Res<String> {
        let outer = std::mem::take(&mut self.out);
        body(self)?;
        Ok(std::mem::replace(&mut self.out, outer))
    }

    /// A chain of filters over a value that the template does not spell.
    fn filtered(&mut self, filter: &'t Expr, input: Value) -> Res<Value> {
        let ExprKind::Filter(inner, name, args) = &filter.kind else { return Ok(input) };
        let input = match inner {
            Some(inner) => {
                self.budget.enter()?;
                let value = self.filtered(inner, input)?;
                self.budget.leave();
                value
            }
            None => input,
        };
        let args = self.arguments(args)?;
        filters::apply(self, name, input, args)
    }

    fn for_loop(&mut self, number: usize, iterable: &Value, depth0: usize) -> Res<()> {
        let node = &self.template.loops[number];
        let mut items = self.iterate(iterable)?;
        if let Some(condition) = &node.condition {
            let mut kept = Vec::new();
            for item in items {
                self.scopes.push(Scope::default());
                self.assign(&node.target, item.clone())?;
                if self.eval(condition)?.is_true() {
                    kept.push(item);
                }
                self.scopes.pop();
            }
            items = kept;
        }
        if items.is_empty() {
            self.scoped(&node.otherwise)?;
            return Ok(());
        }
        let items = Rc::new(items);
        let changed = Rc::new(RefCell::new(None));
        self.loop_depth += 1;
        for index0 in 0..items.len() {
            self.budget.steps(1)?;
            let state = LoopState {
                index0,
                items: items.clone(),
                depth0,
                changed: changed.clone(),
                recursive: node.recursive.then_some(number),
            };
            let scope: Scope = Rc::new(RefCell::new(vec![("loop".into(), Value::Loop(Rc::new(state)))]));
            self.scopes.push(scope);
            self.assign(&node.target, items[index0].clone())?;
            let flow = self.nodes(&node.body)?;
            self.scopes.pop();
            if flow == Flow::Break {
                break;
            }
        }
        self.loop_depth -= 1;
        Ok(())
    }

    fn set(&mut self, name: &str, value: Value) {
        let Some(scope) = self.scopes.last() else { return };
        let mut scope = scope.borrow_mut();
        match scope.iter_mut().find(|(n, _)| &**n == name) {
            Some((_, slot)) => *slot = value,
            None => scope.push((name.into(), value)),
        }
    }

    fn assign(&mut self, target: &'t Target, value: Value) -> Res<()> {
        match target {
            Target::Name(name) => self.set(name, value),
            Target::Member(namespace, name) => {
                let Value::Namespace(members) = self.name(namespace) else {
                    return Err(Fail::error(format!("`{namespace}` is no namespace: its attribute cannot be set")));
                };
                functions::set_member(&members, name, value)?;
            }
            Target::Tuple(targets) => {
                let items = self.iterate(&value)?;
                if items.len() != targets.len() {
                    let (wanted, found) = (targets.len(), items.len());
                    return Err(Fail::error(format!("{wanted} values are expected to unpack, not {found}")));
                }
                for (target, item) in targets.iter().zip(items) {
                    self.assign(target, item)?;
                }
            }
        }
        Ok(())
    }

    fn name(&self, name: &str) -> Value {
        for scope in self.scopes.iter().rev() {
            if let Some((_, value)) = scope.borrow().iter().find(|(n, _)| &**n == name) {
                return value.clone();
            }
        }
        functions::global(name).map_or_else(|| Value::undefined(name), Value::Function)
    }

    /// The members of a value that can be walked through.
    pub fn iterate(&mut self, value: &Value) -> Res<Vec<Value>> {
        let size = value.len().unwrap_or(1);
        self.budget.bytes(size.saturating_mul(size_of::<Value>()))?;
        Ok(match value {
            Value::Undefined(_) => Vec::new(),
            Value::Str(text) => text.chars().map(|c| Value::str(c.encode_utf8(&mut [0; 4]))).collect(),
            Value::List(seq) | Value::Tuple(seq) => seq.items.clone(),
            Value::Dict(map) => map.entries.iter().map(|(k, _)| k.clone()).collect(),
            Value::Range(start, _, step) => {
                (0..size as i64).map(|i| Value::Int(start.saturating_add(i.saturating_mul(*step)))).collect()
            }
            Value::Iter(items) => std::mem::take(&mut *items.borrow_mut()),
            other => return Err(Fail::error(format!("'{}' object is not iterable", other.type_name()))),
        })
    }

    pub fn eval(&mut self, expr: &'t Expr) -> Res<Value> {
        self.budget.enter()?;
        self.line = expr.line;
        let value = self.kind(&expr.kind)?;
        self.budget.leave();
        Ok(value)
    }

    fn kind(&mut self, kind: &'t ExprKind) -> Res<Value> {
        Ok(match kind {
            ExprKind::Literal(literal) => match literal {
                Literal::None => Value::None,
                Literal::Bool(b) => Value::Bool(*b),
                Literal::Int(n) => Value::Int(*n),
                Literal::Float(x) => Value::Float(*x),
                Literal::Str(text) => {
                    self.budget.bytes(text.len())?;
                    Value::str(text)
                }
            },
            ExprKind::Name(name) => self.name(name),
            ExprKind::List(items) => Value::list(self.all(items)?)?,
            ExprKind::Tuple(items) => Value::tuple(self.all(items)?)?,
            ExprKind::Dict(items) => self.dict(items)?,
            ExprKind::Attribute(value, name) => {
                let value = self.eval(value)?;
                operators::attribute(&value, name, &mut self.budget)?
            }
            ExprKind::Item(value, index) => {
                let (value, index) = (self.eval(value)?, self.eval(index)?);
                operators::item(&value, &index, &mut self.budget)?
            }
            ExprKind::Slice(value, parts) => self.slice(value, parts)?,
            ExprKind::Call(callee, args) => {
                let callee = self.eval(callee)?;
                let args = self.arguments(args)?;
                self.call(&callee, args)?
            }
            ExprKind::Filter(Some(input), name, args) => {
                let input = self.eval(input)?;
                let args = self.arguments(args)?;
                filters::apply(self, name, input, args)?
            }
            ExprKind::Filter(None, name, _) => return Err(Fail::error(format!("the filter `{name}` has no input"))),
            ExprKind::Test(input, name, args) => {
                let input = self.eval(input)?;
                let args = self.arguments(args)?;
                Value::Bool(checks::apply(self, name, &input, args)?)
            }
            ExprKind::Not(value) => Value::Bool(!self.eval(value)?.is_true()),
            ExprKind::Negative(value) => operators::negative(&self.eval(value)?)?,
            ExprKind::Positive(value) => operators::positive(&self.eval(value)?)?,
            ExprKind::Binary(operator, left, right) => self.binary(*operator, left, right)?,
            ExprKind::Concat(parts) => {
                let mut text = String::new();
                for part in parts {
                    let value = self.eval(part)?;
                    text += &text::to_str(&value, &mut self.budget)?;
                }
                self.budget.bytes(text.len())?;
                Value::str(text)
            }
            ExprKind::And(left, right) => {
                let left = self.eval(left)?;
                if left.is_true() { self.eval(right)? } else { left }
            }
            ExprKind::Or(left, right) => {
                let left = self.eval(left)?;
                if left.is_true() { left } else { self.eval(right)? }
            }
            ExprKind::Compare(first, rest) => self.compare(first, rest)?,
            ExprKind::Choice(then, condition, otherwise) => match (self.eval(condition)?.is_true(), otherwise) {
                (true, _) => self.eval(then)?,
                (false, Some(otherwise)) => self.eval(otherwise)?,
                (false, None) => Value::undefined("the other case of an `if` without `else`"),
            },
        })
    }

    fn all(&mut self, items: &'t [Expr]) -> Res<Vec<Value>> {
        self.budget.bytes(size_of_val(items))?;
        items.iter().map(|item| self.eval(item)).collect()
    }

    fn dict(&mut self, items: &'t [(Expr, Expr)]) -> Res<Value> {
        let mut entries = Vec::new();
        for (key, value) in items {
            let (key, value) = (self.eval(key)?, self.eval(value)?);
            functions::insert(&mut entries, key, value, &mut self.budget)?;
        }
        Value::dict(entries)
    }

    fn binary(&mut self, operator: Operator, left: &'t Expr, right: &'t Expr) -> Res<Value> {
        let marked = (is_marked_safe(left), is_marked_safe(right));
        let (mut left, mut right) = (self.eval(left)?, self.eval(right)?);
        match (operator, marked) {
            // As markupsafe has it: what is added to a text marked safe is escaped.
            (Operator::Add, (true, false)) => right = self.escaped(right)?,
            (Operator::Add, (false, true)) => left = self.escaped(left)?,
            (Operator::Modulo, (true, _)) => return Err(Fail::error("`%` of a text marked `safe` is not done")),
            _ => {}
        }
        operators::binary(operator, &left, &right, &mut self.budget)
    }

    /// A text with HTML's characters escaped; anything else as it is.
    fn escaped(&mut self, value: Value) -> Res<Value> {
        let Value::Str(text) = &value else { return Ok(value) };
        let mut escaped = String::with_capacity(text.len());
        for character in text.chars() {
            match character {
                '&' => escaped.push_str("&amp;"),
                '<' => escaped.push_str("&lt;"),
                '>' => escaped.push_str("&gt;"),
                '"' => escaped.push_str("&#34;"),
                '\'' => escaped.push_str("&#39;"),
                other => escaped.push(other),
            }
        }
        self.budget.bytes(escaped.len())?;
        Ok(Value::str(escaped))
    }

    fn compare(&mut self, first: &'t Expr, rest: &'t [(Comparison, Expr)]) -> Res<Value> {
        let mut left = self.eval(first)?;
        for (comparison, right) in rest {
            let right = self.eval(right)?;
            if !operators::compare(*comparison, &left, &right, &mut self.budget)? {
                return Ok(Value::Bool(false));
            }
            left = right;
        }
        Ok(Value::Bool(true))
    }

    fn slice(&mut self, value: &'t Expr, parts: &'t [Option<Box<Expr>>; 3]) -> Res<Value> {
        let value = self.eval(value)?;
        let mut numbers = [None; 3];
        for (number, part) in numbers.iter_mut().zip(parts) {
            if let Some(part) = part {
                *number = match self.eval(part)? {
                    Value::None => None,
                    other => Some(other.int().ok_or_else(|| Fail::error("slice indices must be integers or None"))?),
                };
            }
        }
        operators::slice(&value, numbers, &mut self.budget)
    }

    pub fn arguments(&mut self, args: &'t Args) -> Res<CallArgs> {
        let mut out = CallArgs::of(self.all(&args.positional)?);
        for (name, value) in &args.named {
            out.named.push((name.clone(), self.eval(value)?));
        }
        if let Some(rest) = &args.rest {
            let rest = self.eval(rest)?;
            out.positional.extend(self.iterate(&rest)?);
        }
        if let Some(rest) = &args.named_rest {
            let Value::Dict(map) = self.eval(rest)? else { return Err(Fail::error("`**` wants a dict")) };
            for (key, value) in &map.entries {
                out.named.push((text::to_str(key, &mut self.budget)?, value.clone()));
            }
        }
        Ok(out)
    }

    pub fn call(&mut self, callee: &Value, args: CallArgs) -> Res<Value> {
        self.budget.enter()?;
        let value = match callee {
            Value::Function(name) => functions::call(self, name, args)?,
            Value::Method(method) => methods::call(self, &method.0, method.1, args)?,
            Value::Macro(number, depth) => {
                let scopes = self.scopes.iter().take(*depth).cloned().collect();
                self.call_macro(*number, args, scopes)?
            }
            Value::Caller(number, scopes) => self.call_macro(*number, args, scopes.to_vec())?,
            Value::Loop(state) => {
                let Some(number) = state.recursive else {
                    return Err(Fail::error("the loop is not `recursive`: it cannot be called"));
                };
                let [items] = args.bind("loop", ["iterable"])?;
                let items = items.ok_or_else(|| Fail::error("loop wants an iterable"))?;
                let outer = std::mem::take(&mut self.out);
                self.for_loop(number, &items, state.depth0 + 1)?;
                Value::str(std::mem::replace(&mut self.out, outer))
            }
            Value::Undefined(name) => return Err(Fail::error(format!("'{name}' is undefined"))),
            other => return Err(Fail::error(format!("'{}' object is not callable", other.type_name()))),
        };
        self.budget.leave();
        Ok(value)
    }

    fn call_macro(&mut self, number: usize, args: CallArgs, scopes: Vec<Scope>) -> Res<Value> {
        let body = &self.template.macros[number];
        let outer = std::mem::replace(&mut self.scopes, scopes);
        self.scopes.push(Scope::default());
        let mut positional = args.positional.into_iter();
        let mut named = args.named;
        for (name, default) in &body.parameters {
            let given = positional.next();
            let by_name = named.iter().position(|(n, _)| n == name).map(|i| named.remove(i).1);
            let value = match (given, by_name, default) {
                (Some(_), Some(_), _) => {
                    return Err(Fail::error(format!("`{}` has two values for `{name}`", body.name)));
                }
                (Some(value), None, _) | (None, Some(value), _) => value,
                (None, None, Some(default)) => self.eval(default)?,
                (None, None, None) => Value::undefined(name),
            };
            self.set(name, value);
        }
        let rest: Vec<Value> = positional.collect();
        if body.uses_varargs {
            let rest = Value::tuple(rest)?;
            self.set("varargs", rest);
        } else if !rest.is_empty() {
            return Err(Fail::error(format!("`{}` takes at most {} arguments", body.name, body.parameters.len())));
        }
        if let Some(i) = named.iter().position(|(name, _)| name == "caller") {
            if !body.uses_caller {
                return Err(Fail::error(format!("`{}` was called with a block, and calls no `caller`", body.name)));
            }
            let (_, caller) = named.remove(i);
            self.set("caller", caller);
        } else if body.uses_caller {
            self.set("caller", Value::undefined("caller"));
        }
        if body.uses_kwargs {
            let entries = named.drain(..).map(|(name, value)| (Value::str(name), value)).collect();
            let rest = Value::dict(entries)?;
            self.set("kwargs", rest);
        }
        if let Some((name, _)) = named.first() {
            return Err(Fail::error(format!("`{}` has no parameter `{name}`", body.name)));
        }
        let text = self.capture(|m| m.nodes(&body.body))?;
        self.scopes = outer;
        Ok(Value::str(text))
    }
}

/// Whether an expression is a text marked by the filter `safe`, or a sum with one.
fn is_marked_safe(expr: &Expr) -> bool {
    match &expr.kind {
        ExprKind::Filter(_, name, _) => name == "safe",
        ExprKind::Binary(Operator::Add, left, right) => is_marked_safe(left) || is_marked_safe(right),
        _ => false,
    }
}
