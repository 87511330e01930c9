//! A template as a tree.

/// A constant.
#[derive(Clone, Debug)]
pub(super) enum Literal {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(String),
}

/// Arguments of a call.
#[derive(Clone, Debug, Default)]
pub(super) struct Args {
    pub positional: Vec<Expr>,
    pub named: Vec<(String, Expr)>,
    /// `*list`.
    pub rest: Option<Box<Expr>>,
    /// `**dict`.
    pub named_rest: Option<Box<Expr>>,
}

/// An expression and the line it is on.
#[derive(Clone, Debug)]
pub(super) struct Expr {
    pub line: u32,
    pub kind: ExprKind,
}

#[derive(Clone, Debug)]
pub(super) enum ExprKind {
    Literal(Literal),
    Name(String),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Attribute(Box<Expr>, String),
    Item(Box<Expr>, Box<Expr>),
    Slice(Box<Expr>, [Option<Box<Expr>>; 3]),
    Call(Box<Expr>, Args),
    Filter(Option<Box<Expr>>, String, Args),
    Test(Box<Expr>, String, Args),
    Not(Box<Expr>),
    Negative(Box<Expr>),
    Positive(Box<Expr>),
    Binary(Operator, Box<Expr>, Box<Expr>),
    Concat(Vec<Expr>),
    And(Box<Expr>, Box<Expr>),
    Or(Box<Expr>, Box<Expr>),
    Compare(Box<Expr>, Vec<(Comparison, Expr)>),
    /// `then if condition else otherwise`.
    Choice(Box<Expr>, Box<Expr>, Option<Box<Expr>>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operator {
    Add,
    Subtract,
    Multiply,
    Divide,
    FloorDivide,
    Modulo,
    Power,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    In,
    NotIn,
}

/// What `set` and `for` write to.
#[derive(Clone, Debug)]
pub(super) enum Target {
    Name(String),
    /// `namespace.name`.
    Member(String, String),
    Tuple(Vec<Target>),
}

/// A macro's or a call block's parameters and body.
#[derive(Clone, Debug)]
pub(super) struct MacroBody {
    pub name: String,
    pub parameters: Vec<(String, Option<Expr>)>,
    pub body: Vec<Node>,
    pub uses_varargs: bool,
    pub uses_kwargs: bool,
    pub uses_caller: bool,
}

/// `{% for target in iterable if condition recursive %}…{% else %}…{% endfor %}`.
#[derive(Clone, Debug)]
pub(super) struct ForLoop {
    pub target: Target,
    pub iterable: Expr,
    pub condition: Option<Expr>,
    pub body: Vec<Node>,
    pub otherwise: Vec<Node>,
    pub recursive: bool,
}

/// A statement and the line it is on.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub line: u32,
    pub kind: NodeKind,
}

#[derive(Clone, Debug)]
pub(super) enum NodeKind {
    Text(String),
    Print(Expr),
    For(usize),
    If {
        branches: Vec<(Expr, Vec<Node>)>,
        otherwise: Vec<Node>,
    },
    Set(Target, Expr),
    /// `{% set name %}…{% endset %}`; the filter's innermost input is the block's text.
    SetBlock(Target, Vec<Node>, Option<Expr>),
    /// `{% filter … %}`.
    FilterBlock(Expr, Vec<Node>),
    With(Vec<(Target, Expr)>, Vec<Node>),
    Macro(usize),
    /// `{% call(…) macro(…) %}`: the body, and the call.
    CallBlock(usize, Expr),
    /// Statements in a scope of their own that print as they are (`block`, `generation`).
    Scope(Vec<Node>),
    Break,
    Continue,
}

/// A parsed template.
#[derive(Clone, Debug, Default)]
pub(super) struct Template {
    pub body: Vec<Node>,
    /// Macros and call blocks, which the tree names by number.
    pub macros: Vec<MacroBody>,
    /// Loops likewise.
    pub loops: Vec<ForLoop>,
}
