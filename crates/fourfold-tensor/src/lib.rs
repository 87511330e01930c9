//! What a weight is while it is stored: dtypes, buffers, the closed set of storage forms ([`Weight`]), and the two traits by
//! which weights enter and leave the program ([`WeightSource`], [`WeightSink`]).
//!
//! This crate knows no kernel, no file format, no model and no compression method.

mod blocks;
mod buffer;
mod dense;
mod double;
mod dtype;
mod form;
mod fp8;
mod low_rank;
mod mask;
mod quantized;
mod source;
mod sparse;
mod sum;
mod tuning;
mod weight;

pub use blocks::{BlockGrid, BlockScales, BlockType, IQ4_VALUES};
pub use buffer::{Buffer, FloatBuffer, SharedBytes};
pub use dense::Dense;
pub use double::{Double, DoubleCodes};
pub use dtype::DType;
pub use form::{DoubleForm, Form, OffsetsForm, QuantizedForm, ScalesForm, SparseForm, SparseValuesForm};
pub use fp8::{E4M3, Fp8, Fp8Error};
pub use low_rank::{LowRank, LowRankError};
pub use mask::Mask;
pub use quantized::{Offsets, Quantized, QuantizedError, Scales, pack_row, packed_words_per_row, unpack_row};
pub use source::{SourceError, TensorInfo, WeightSink, WeightSource};
pub use sparse::{Sparse, SparseCodes, SparseError, SparseValues, kept_columns, mask_words_per_row};
pub use sum::{Sum, SumError};
pub use tuning::Tuning;
pub use weight::Weight;
