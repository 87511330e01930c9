//! safetensors: an 8-byte little-endian header length, a JSON header, then the tensors' bytes without gaps.
//!
//! The header is parsed here and not by the `safetensors` crate because that one reports most malformations without the tensor's
//! name, and silently keeps the last of two entries of one name. Tests hold the two side by side.

mod header;
mod index;
mod store;

pub use header::{Entry, ForeignEntry, HEADER_LIMIT, Header, HeaderError, parse_header};
pub use index::{INDEX_NAME, Index, IndexError};
pub use store::{DataFile, Store};
