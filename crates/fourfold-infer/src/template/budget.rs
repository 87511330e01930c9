//! What a template may use: steps, memory, recursion.

/// Steps that every template has. A long conversation through a long template takes some hundred thousand.
const STEPS: u64 = 20_000_000;
/// Further steps for every byte of the conversation.
const STEPS_PER_BYTE: u64 = 64;
/// Bytes of values that a template may make, all together.
const BYTES: u64 = 256 << 20;
/// Further bytes for every byte of the conversation.
const BYTES_PER_BYTE: u64 = 256;
/// Expressions, statements and macros within one another.
const DEPTH: u32 = 700;

/// Why a template stopped.
#[derive(Debug)]
pub(super) enum Fail {
    /// A mistake: Python would raise it.
    Error(String),
    /// `raise_exception`.
    Raised(String),
    /// More than a template may use.
    Limit(String),
}

impl Fail {
    pub fn error(reason: impl Into<String>) -> Self {
        Self::Error(reason.into())
    }
}

pub(super) type Res<T> = Result<T, Fail>;

/// What is left.
pub(super) struct Budget {
    steps: u64,
    bytes: u64,
    depth: u32,
}

impl Budget {
    /// For a conversation of so many bytes.
    pub fn new(input: u64) -> Self {
        let (steps, bytes) = (STEPS_PER_BYTE.saturating_mul(input), BYTES_PER_BYTE.saturating_mul(input));
        Self { steps: STEPS.saturating_add(steps), bytes: BYTES.saturating_add(bytes.min(4 << 30)), depth: 0 }
    }

    /// Takes steps.
    pub fn steps(&mut self, count: u64) -> Res<()> {
        match self.steps.checked_sub(count) {
            Some(left) => self.steps = left,
            None => return Err(Fail::Limit("more work than a chat template may do".to_owned())),
        }
        Ok(())
    }

    /// Takes memory, and the steps that filling it takes; asked for before anything is allocated.
    pub fn bytes(&mut self, count: usize) -> Res<()> {
        match self.bytes.checked_sub(count as u64) {
            Some(left) => self.bytes = left,
            None => return Err(Fail::Limit("more memory than a chat template may use".to_owned())),
        }
        self.steps(count as u64 / 64)
    }

    /// Goes one level down.
    pub fn enter(&mut self) -> Res<()> {
        if self.depth >= DEPTH {
            return Err(Fail::Limit(format!("more than {DEPTH} levels of recursion")));
        }
        self.depth += 1;
        self.steps(1)
    }

    pub fn leave(&mut self) {
        self.depth -= 1;
    }
}

/// What is wrong with a template's text.
#[derive(Debug)]
pub(super) struct TemplateError {
    pub line: u32,
    pub reason: String,
}
