//! Running a model: text to tokens and back ([`Tokenizer`]), a conversation's tokens in a KV cache ([`Session`]), choosing
//! the next one ([`Sampler`]), laying out a conversation ([`ChatTemplate`]), and measuring how good a model is ([`eval`]).
//!
//! Nothing here knows a file format, a compression method or the terminal.

pub mod engine;
mod error;
pub mod eval;
mod generate;
mod guard;
mod sampler;
mod session;
mod template;
mod tokenizer;

pub use error::InferError;
pub use generate::{Generation, GenerationSettings, Stop, generate};
pub use guard::{guarded, is_guarded};
pub use sampler::{Sampler, SamplerSettings, generation_remarks};
pub use session::{PROMPT_BATCH, Session};
pub use template::{ChatTemplate, Message, Role};
pub use tokenizer::{Around, Detokenizer, TokenBytes, Tokenizer, TokenizerSettings};
