//! Values of a template, as Python has them.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::rc::Rc;

use serde_json::Value as Json;

use super::budget::{Fail, Res};

/// Levels of lists and dicts in one another.
const DEPTH: u32 = 160;

#[derive(Clone)]
pub(super) enum Value {
    /// What is not there, and what it was called.
    Undefined(Rc<str>),
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(Rc<str>),
    List(Rc<Seq>),
    Tuple(Rc<Seq>),
    Dict(Rc<Map>),
    /// `range(start, stop, step)`.
    Range(i64, i64, i64),
    /// What can be walked through once.
    Iter(Rc<RefCell<Vec<Value>>>),
    Namespace(Variables),
    Loop(Rc<LoopState>),
    Function(&'static str),
    /// A macro, and the scopes around it.
    Macro(usize, usize),
    /// The body of a call block, with the scopes around the call.
    Caller(usize, Scopes),
    Method(Rc<(Value, &'static str)>),
}

/// Variables by name.
pub(super) type Variables = Rc<RefCell<Vec<(Rc<str>, Value)>>>;

/// The variables of several scopes, the outermost first.
pub(super) type Scopes = Rc<Vec<Variables>>;

pub(super) struct Seq {
    pub items: Vec<Value>,
    depth: u32,
}

pub(super) struct Map {
    pub entries: Vec<(Value, Value)>,
    depth: u32,
}

/// Where a loop is.
pub(super) struct LoopState {
    pub index0: usize,
    pub items: Rc<Vec<Value>>,
    pub depth0: usize,
    /// The last arguments of `loop.changed`.
    pub changed: Rc<RefCell<Option<Vec<Value>>>>,
    /// The loop's number, where it is recursive.
    pub recursive: Option<usize>,
}

impl Value {
    pub fn str(text: impl AsRef<str>) -> Self {
        Self::Str(text.as_ref().into())
    }

    pub fn undefined(name: &str) -> Self {
        Self::Undefined(name.into())
    }

    pub fn list(items: Vec<Self>) -> Res<Self> {
        Ok(Self::List(Rc::new(Seq { depth: Self::depth_of(items.iter())?, items })))
    }

    pub fn tuple(items: Vec<Self>) -> Res<Self> {
        Ok(Self::Tuple(Rc::new(Seq { depth: Self::depth_of(items.iter())?, items })))
    }

    pub fn dict(entries: Vec<(Self, Self)>) -> Res<Self> {
        Ok(Self::Dict(Rc::new(Map { depth: Self::depth_of(entries.iter().flat_map(|(k, v)| [k, v]))?, entries })))
    }

    pub fn iter(items: Vec<Self>) -> Res<Self> {
        Self::depth_of(items.iter())?;
        Ok(Self::Iter(Rc::new(RefCell::new(items))))
    }

    /// The depth of a container of these. What could hold itself cannot be put into another value.
    fn depth_of<'a>(items: impl Iterator<Item = &'a Self>) -> Res<u32> {
        let mut depth = 0;
        for item in items {
            depth = depth.max(match item {
                Self::List(seq) | Self::Tuple(seq) => seq.depth,
                Self::Dict(map) => map.depth,
                Self::Namespace(_) | Self::Iter(_) | Self::Caller(..) | Self::Loop(_) => {
                    return Err(Fail::error(format!("a {} inside of another value", item.type_name())));
                }
                Self::Method(method) => match &method.0 {
                    Self::List(seq) | Self::Tuple(seq) => seq.depth,
                    Self::Dict(map) => map.depth,
                    _ => 0,
                },
                _ => 0,
            });
        }
        if depth >= DEPTH {
            return Err(Fail::Limit(format!("values nested more than {DEPTH} levels deep")));
        }
        Ok(depth + 1)
    }

    /// Whether it may be a namespace's member.
    pub fn may_be_member(&self) -> Res<()> {
        match self {
            Self::Iter(_) => Ok(()),
            _ => Self::depth_of(std::iter::once(self)).map(|_| ()),
        }
    }

    pub fn from_json(json: &Json) -> Res<Self> {
        Ok(match json {
            Json::Null => Self::None,
            Json::Bool(b) => Self::Bool(*b),
            Json::Number(n) => match (n.as_i64(), n.as_f64()) {
                (Some(n), _) => Self::Int(n),
                (None, Some(x)) if !n.is_u64() => Self::Float(x),
                _ => return Err(Fail::error(format!("the number {n} is no 64-bit integer"))),
            },
            Json::String(text) => Self::str(text),
            Json::Array(items) => Self::list(items.iter().map(Self::from_json).collect::<Res<_>>()?)?,
            Json::Object(map) => {
                let entries = map.iter().map(|(k, v)| Ok((Self::str(k), Self::from_json(v)?)));
                Self::dict(entries.collect::<Res<_>>()?)?
            }
        })
    }

    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Str(_) => "str",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::Dict(_) => "dict",
            Self::Range(..) => "range",
            Self::Iter(_) => "generator",
            Self::Namespace(_) => "Namespace",
            Self::Loop(_) => "LoopContext",
            Self::Function(_) => "function",
            Self::Macro(..) | Self::Caller(..) => "Macro",
            Self::Method(_) => "method",
        }
    }

    pub fn is_true(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(b) => *b,
            Self::Int(n) => *n != 0,
            Self::Float(x) => *x != 0.0,
            Self::Str(text) => !text.is_empty(),
            Self::List(seq) | Self::Tuple(seq) => !seq.items.is_empty(),
            Self::Dict(map) => !map.entries.is_empty(),
            Self::Range(..) => self.len() != Some(0),
            _ => true,
        }
    }

    /// Length, where it has one.
    pub fn len(&self) -> Option<usize> {
        Some(match self {
            Self::Undefined(_) => 0,
            Self::Str(text) => text.chars().count(),
            Self::List(seq) | Self::Tuple(seq) => seq.items.len(),
            Self::Dict(map) => map.entries.len(),
            Self::Range(start, stop, step) => range_len(*start, *stop, *step),
            Self::Loop(state) => state.items.len(),
            _ => return None,
        })
    }

    pub fn is_iterable(&self) -> bool {
        self.len().is_some() || matches!(self, Self::Iter(_))
    }

    /// A number as a float: bool, int, float.
    pub fn number(&self) -> Option<f64> {
        match self {
            Self::Bool(b) => Some(f64::from(u8::from(*b))),
            Self::Int(n) => Some(*n as f64),
            Self::Float(x) => Some(*x),
            _ => None,
        }
    }

    pub fn int(&self) -> Option<i64> {
        match self {
            Self::Bool(b) => Some(i64::from(*b)),
            Self::Int(n) => Some(*n),
            _ => None,
        }
    }

    pub fn equals(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Undefined(_), Self::Undefined(_)) | (Self::None, Self::None) => true,
            (Self::Str(a), Self::Str(b)) => a == b,
            (Self::List(a), Self::List(b)) | (Self::Tuple(a), Self::Tuple(b)) => {
                a.items.len() == b.items.len() && a.items.iter().zip(&b.items).all(|(a, b)| a.equals(b))
            }
            (Self::Dict(a), Self::Dict(b)) => {
                a.entries.len() == b.entries.len()
                    && a.entries.iter().all(|(k, v)| b.get(k).is_some_and(|other| v.equals(other)))
            }
            (Self::Range(..), Self::Range(..)) => {
                let items = |range: &Self| match range {
                    Self::Range(start, _, step) => (range.len(), *start, *step),
                    _ => (None, 0, 0),
                };
                items(self) == items(other)
            }
            (Self::Namespace(a), Self::Namespace(b)) => Rc::ptr_eq(a, b),
            (Self::Function(a), Self::Function(b)) => a == b,
            (Self::Macro(a, _), Self::Macro(b, _)) => a == b,
            _ => match (self.int(), other.int()) {
                (Some(a), Some(b)) => a == b,
                _ => self.number().is_some() && self.number() == other.number(),
            },
        }
    }

    /// Order, where Python has one.
    pub fn order(&self, other: &Self) -> Option<Ordering> {
        match (self, other) {
            (Self::Str(a), Self::Str(b)) => Some(a.cmp(b)),
            (Self::List(a), Self::List(b)) | (Self::Tuple(a), Self::Tuple(b)) => {
                for (a, b) in a.items.iter().zip(&b.items) {
                    if !a.equals(b) {
                        return a.order(b);
                    }
                }
                Some(a.items.len().cmp(&b.items.len()))
            }
            _ => match (self.int(), other.int()) {
                (Some(a), Some(b)) => Some(a.cmp(&b)),
                _ => self.number()?.partial_cmp(&other.number()?),
            },
        }
    }
}

impl Map {
    pub fn get(&self, key: &Value) -> Option<&Value> {
        self.entries.iter().find(|(k, _)| k.equals(key)).map(|(_, v)| v)
    }

    pub fn get_str(&self, key: &str) -> Option<&Value> {
        self.entries.iter().find(|(k, _)| matches!(k, Value::Str(k) if &**k == key)).map(|(_, v)| v)
    }
}

/// Members of a range.
pub(super) fn range_len(start: i64, stop: i64, step: i64) -> usize {
    let (distance, step) = match step > 0 {
        true => (i128::from(stop) - i128::from(start), i128::from(step)),
        false => (i128::from(start) - i128::from(stop), -i128::from(step)),
    };
    if distance <= 0 || step == 0 { 0 } else { usize::try_from((distance + step - 1) / step).unwrap_or(usize::MAX) }
}
