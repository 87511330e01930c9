//! From text to batches: documents in tokens, held-out ones apart, packed into sequences, in an order that depends on seed and
//! epoch alone.

mod conversation;
mod corpus;
mod documents;
mod record;
pub mod rows;
mod source;

use thiserror::Error;

pub use self::corpus::{Batches, Corpus, InOrder};
pub use self::documents::{Document, Documents, Spool};
pub use self::record::{Columns, Conversation, Instruction, Record, Seen};
pub use self::source::{JsonShape, MOST_ROW, Source};

/// Why data cannot be learned from.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DataError {
    /// A line or a row of a file is not what it should be.
    #[error("{file}:{line}: {reason}")]
    Line {
        /// The file.
        file: String,
        /// Its line, counted from 1; in formats without lines the row.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// There is nothing to learn.
    #[error("{file}: {reason}")]
    Empty {
        /// The file, or several.
        file: String,
        /// What is missing.
        reason: String,
    },
    /// The file that holds the tokens cannot be written or read.
    #[error("{file}: {reason}")]
    Spool {
        /// The file.
        file: String,
        /// What failed: the disk is full, say.
        reason: String,
    },
}
