//! What can be wrong with a GGUF file: one variant for each malformation.

use std::io;

use thiserror::Error;

/// Why a GGUF file cannot be used. The file's name is added by [`crate::FormatError`] and
/// [`fourfold_tensor::SourceError`].
#[derive(Debug, Error)]
pub enum GgufError {
    /// The system refused to read.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The first four bytes are not `GGUF`.
    #[error("not a GGUF file: it begins with {0:02x?}")]
    Magic([u8; 4]),
    /// The header was written on a big-endian machine.
    #[error("a big-endian GGUF file: only little-endian ones are read")]
    BigEndian,
    /// A version of the format that is not read.
    #[error("GGUF version {0}: versions 2 and 3 are read")]
    Version(u32),
    /// The file ends inside the header.
    #[error("truncated: {what} needs {needed} bytes, {remaining} are left in the file")]
    Truncated {
        /// What was being read.
        what: String,
        /// Bytes it takes.
        needed: u64,
        /// Bytes there are.
        remaining: u64,
    },
    /// A count that the file cannot hold.
    #[error("{count} {what} cannot lie in the {remaining} bytes left in the file")]
    Count {
        /// What is counted.
        what: String,
        /// The count.
        count: u64,
        /// Bytes there are.
        remaining: u64,
    },
    /// A string that is not UTF-8.
    #[error("{what} is not UTF-8")]
    Utf8 {
        /// Which string.
        what: String,
    },
    /// A name longer than the format allows.
    #[error("{what} is {length} bytes long, at most {limit} are allowed")]
    NameTooLong {
        /// Which name.
        what: String,
        /// Its length.
        length: u64,
        /// The format's limit.
        limit: u64,
    },
    /// A metadata value of a type that does not exist.
    #[error("metadata {key}: unknown value type {id}")]
    ValueType {
        /// The key.
        key: String,
        /// The type's number.
        id: u32,
    },
    /// A boolean that is neither 0 nor 1.
    #[error("metadata {key}: {byte} is not a boolean")]
    Bool {
        /// The key.
        key: String,
        /// The byte found.
        byte: u8,
    },
    /// Arrays nested too deeply.
    #[error("metadata {key}: arrays nested more than {limit} deep")]
    Nesting {
        /// The key.
        key: String,
        /// The limit.
        limit: usize,
    },
    /// A metadata key that occurs twice.
    #[error("metadata {0} occurs twice")]
    DuplicateKey(String),
    /// A tensor name that occurs twice.
    #[error("tensor {0} occurs twice")]
    DuplicateTensor(String),
    /// A tensor of too many dimensions, or none.
    #[error("tensor {tensor}: {dims} dimensions, 1 to 4 are allowed")]
    Dims {
        /// The tensor.
        tensor: String,
        /// Dimensions found.
        dims: u32,
    },
    /// A dimension of zero, or so many elements that they cannot be counted.
    #[error("tensor {tensor}: shape {shape:?} is empty or overflows")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Its shape, outermost first.
        shape: Vec<u64>,
    },
    /// A tensor type that ggml does not have.
    #[error("tensor {tensor}: unknown ggml type {id}")]
    UnknownType {
        /// The tensor.
        tensor: String,
        /// The type's number.
        id: u32,
    },
    /// A tensor type that is known and not read.
    #[error("tensor {tensor}: ggml type {name} is not supported")]
    UnsupportedType {
        /// The tensor.
        tensor: String,
        /// The type's name.
        name: &'static str,
    },
    /// A row that is no whole number of blocks.
    #[error("tensor {tensor} of shape {shape:?}: rows do not divide into {ggml_type} blocks of {block}")]
    RowLength {
        /// The tensor.
        tensor: String,
        /// Its shape, outermost first.
        shape: Vec<u64>,
        /// Its type.
        ggml_type: &'static str,
        /// Elements of a block.
        block: u64,
    },
    /// `general.alignment` is no power of two.
    #[error("alignment {0} is not a power of two")]
    Alignment(u64),
    /// A tensor that begins between two multiples of the alignment.
    #[error("tensor {tensor}: offset {offset} is not a multiple of the alignment {alignment}")]
    Misaligned {
        /// The tensor.
        tensor: String,
        /// Its offset in the data section.
        offset: u64,
        /// The file's alignment.
        alignment: u64,
    },
    /// A tensor that does not lie inside the file.
    #[error(
        "tensor {tensor} of shape {shape:?}: {bytes} bytes at {offset} lie outside the data section of {section} bytes"
    )]
    OutsideFile {
        /// The tensor.
        tensor: String,
        /// Its shape, outermost first.
        shape: Vec<u64>,
        /// Its offset in the data section.
        offset: u64,
        /// Bytes it takes.
        bytes: u64,
        /// Bytes of the data section.
        section: u64,
    },
    /// Two tensors that share bytes.
    #[error("tensors {first} and {second} overlap")]
    Overlap {
        /// The one that begins first.
        first: String,
        /// The one that begins inside it.
        second: String,
    },
    /// A scale or offset that is infinite or not a number: the bytes are damaged.
    #[error("row {row}: a block's scale is not finite")]
    NonFinite {
        /// The row.
        row: usize,
    },
    /// A part of a split model is absent or belongs elsewhere.
    #[error("split model: {0}")]
    Split(String),
    /// A metadata key that is needed.
    #[error("metadata {0} is missing")]
    MissingKey(String),
    /// A metadata value of the wrong type or out of range.
    #[error("metadata {key}: {found}, expected {expected}")]
    BadValue {
        /// The key.
        key: String,
        /// What is there.
        found: String,
        /// What should be.
        expected: &'static str,
    },
    /// An architecture that is not read.
    #[error("architecture {0:?}: llama, qwen2, qwen3 and deepseek2 are read")]
    Architecture(String),
    /// A feature of an architecture that is not read.
    #[error("architecture {architecture}: {feature} is not supported")]
    Feature {
        /// The architecture.
        architecture: &'static str,
        /// What is not supported.
        feature: String,
    },
    /// A key of the architecture that is not known.
    #[error("metadata {key}: {found}: this key is not known, and results could depend on it")]
    UnknownKey {
        /// The key.
        key: String,
        /// Its value.
        found: String,
    },
    /// A key that asks for something that is not computed.
    #[error("metadata {key}: {found}: what it asks for is not supported; {values} is read")]
    LimitedKey {
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// The values that change nothing.
        values: String,
    },
    /// A tensor the architecture has no place for. Leaving it out would change what the model computes.
    #[error("tensor {tensor} has no place in architecture {architecture}")]
    UnknownTensor {
        /// The tensor.
        tensor: String,
        /// The architecture.
        architecture: &'static str,
    },
    /// A tensor that GGUF has no name for.
    #[error("tensor {tensor} has no name in GGUF's architecture {architecture}")]
    NoTarget {
        /// The tensor.
        tensor: String,
        /// The architecture.
        architecture: &'static str,
    },
    /// A storage form that no type of GGUF holds.
    #[error(
        "tensor {tensor} is stored as {form}, which GGUF has no type for; give it a type (--type f16, or compress it to GGUF)"
    )]
    NotStorable {
        /// The tensor.
        tensor: String,
        /// Its form in words.
        form: String,
    },
    /// Experts of a layer, which are one tensor in the file, in several types.
    #[error(
        "tensor {tensor} is {found}, other experts of {stack} are {others}: GGUF stacks them in one tensor of one type"
    )]
    MixedExperts {
        /// The expert's tensor.
        tensor: String,
        /// The stack.
        stack: String,
        /// The expert's type.
        found: &'static str,
        /// The others'.
        others: &'static str,
    },
    /// An importance matrix that cannot be read.
    #[error("imatrix: {0}")]
    Imatrix(String),
    /// A tokenizer that GGUF has no words for.
    #[error("tokenizer: {0}")]
    Inexpressible(String),
    /// A tensor that is needed.
    #[error("tensor {0} is missing")]
    MissingTensor(String),
    /// A tensor of the wrong shape.
    #[error("tensor {tensor}: shape {found:?}, expected {expected}")]
    TensorShape {
        /// The tensor.
        tensor: String,
        /// Its shape, outermost first.
        found: Vec<u64>,
        /// What the metadata ask for.
        expected: String,
    },
    /// A tokenizer that cannot be rebuilt.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
}
