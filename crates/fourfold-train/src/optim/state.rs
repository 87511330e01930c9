//! State vectors of optimizers, an element a parameter, in 32, 8 or 4 bits.

use super::blockwise::{BLOCK4, BLOCK8, Code, State4, State8, decode4, decode8, encode4, encode8};
use crate::recipe::MomentPrecision;

/// Elements of a chunk of work: a whole number of blocks of every state and of every stored weight.
pub(super) const CHUNK: usize = 16 * BLOCK8;

/// What the values of a state can be, which decides its code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Range {
    /// Of either sign: first moments, momentum.
    Signed,
    /// Never negative: second moments.
    NonNegative,
}

impl Range {
    #[inline(always)]
    fn code8(self) -> &'static Code {
        match self {
            Self::Signed => Code::signed8(),
            Self::NonNegative => Code::unsigned8(),
        }
    }

    #[inline(always)]
    fn code4(self) -> &'static Code {
        match self {
            Self::Signed => Code::signed4(),
            Self::NonNegative => Code::linear4(),
        }
    }
}

/// One state vector.
#[derive(Clone, Debug, PartialEq)]
pub enum State {
    /// 4 bytes a parameter.
    F32(Vec<f32>),
    /// 1.02 bytes a parameter.
    Bits8(State8),
    /// 0.53 bytes a parameter.
    Bits4(State4),
}

/// One chunk of a [`State`]: codes and scales where it is in blocks.
pub(super) enum StateMut<'a> {
    F32(&'a mut [f32]),
    Bits8(&'a mut [u8], &'a mut [f32]),
    Bits4(&'a mut [u8], &'a mut [f32]),
}

impl State {
    /// Zeros.
    pub fn zeros(len: usize, precision: MomentPrecision, range: Range) -> Self {
        match precision {
            MomentPrecision::F32 => Self::F32(vec![0.0; len]),
            MomentPrecision::Bits8 => Self::Bits8(State8::zeros(len, range.code8())),
            MomentPrecision::Bits4 => Self::Bits4(State4::zeros(len, range.code4())),
        }
    }

    /// Bytes it takes.
    pub fn byte_len(&self) -> usize {
        match self {
            Self::F32(values) => 4 * values.len(),
            Self::Bits8(state) => state.byte_len(),
            Self::Bits4(state) => state.byte_len(),
        }
    }

    /// The chunks of [`CHUNK`] elements, in order.
    pub(super) fn chunks(&mut self) -> Vec<StateMut<'_>> {
        match self {
            Self::F32(values) => values.chunks_mut(CHUNK).map(StateMut::F32).collect(),
            Self::Bits8(State8 { codes, scales }) => {
                let chunks = codes.chunks_mut(CHUNK).zip(scales.chunks_mut(CHUNK / BLOCK8));
                chunks.map(|(codes, scales)| StateMut::Bits8(codes, scales)).collect()
            }
            Self::Bits4(State4 { codes, scales }) => {
                let chunks = codes.chunks_mut(CHUNK / 2).zip(scales.chunks_mut(CHUNK / BLOCK4));
                chunks.map(|(codes, scales)| StateMut::Bits4(codes, scales)).collect()
            }
        }
    }
}

impl StateMut<'_> {
    #[inline(always)]
    pub(super) fn read(&self, range: Range, out: &mut [f32]) {
        match self {
            Self::F32(stored) => out.copy_from_slice(stored),
            Self::Bits8(codes, scales) => {
                let blocks = out.chunks_mut(BLOCK8).zip(codes.chunks(BLOCK8)).zip(scales.iter());
                for ((out, codes), &scale) in blocks {
                    decode8(codes, scale, range.code8(), out);
                }
            }
            Self::Bits4(codes, scales) => {
                let blocks = out.chunks_mut(BLOCK4).zip(codes.chunks(BLOCK4 / 2)).zip(scales.iter());
                for ((out, codes), &scale) in blocks {
                    decode4(codes, scale, range.code4(), out);
                }
            }
        }
    }

    #[inline(always)]
    pub(super) fn write(&mut self, range: Range, values: &[f32]) {
        match self {
            Self::F32(stored) => stored.copy_from_slice(values),
            Self::Bits8(codes, scales) => {
                let blocks = values.chunks(BLOCK8).zip(codes.chunks_mut(BLOCK8)).zip(scales.iter_mut());
                for ((values, codes), scale) in blocks {
                    *scale = encode8(values, range.code8(), codes);
                }
            }
            Self::Bits4(codes, scales) => {
                let blocks = values.chunks(BLOCK4).zip(codes.chunks_mut(BLOCK4 / 2)).zip(scales.iter_mut());
                for ((values, codes), scale) in blocks {
                    *scale = encode4(values, range.code4(), codes);
                }
            }
        }
    }
}
