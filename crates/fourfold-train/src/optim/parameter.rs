//! How a trained weight is stored between steps.

use std::ops::Deref;
use std::sync::Arc;

use bytemuck::Pod;
use fourfold_tensor::{Buffer, SharedBytes};
use half::bf16;

use crate::random::Stream;
use crate::rounding::{join_bf16_residual, split_bf16_residual, stochastic_bf16};

/// Elements that layers read where they lie. Changing them while a layer still holds them copies them first; the trainer drops
/// its layers before it updates.
#[derive(Clone, Debug, PartialEq)]
pub struct Elements<T>(Arc<Held<T>>);

#[derive(Clone, Debug, PartialEq)]
struct Held<T>(Vec<T>);

impl<T: Pod> AsRef<[u8]> for Held<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

impl<T: Pod + Send + Sync> Elements<T> {
    /// The elements as a weight's buffer, not copied.
    pub fn share(&self) -> Buffer<T> {
        let bytes: SharedBytes = self.0.clone();
        let len = size_of_val(&self.0.0[..]);
        Buffer::from_shared(&bytes, 0, len).unwrap_or_else(|| self.0.0.clone().into())
    }

    /// The elements, to change.
    pub fn make_mut(&mut self) -> &mut [T] {
        &mut Arc::make_mut(&mut self.0).0
    }
}

impl<T> From<Vec<T>> for Elements<T> {
    fn from(elements: Vec<T>) -> Self {
        Self(Arc::new(Held(elements)))
    }
}

impl<T> Deref for Elements<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0.0
    }
}

/// The elements of a trained tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Parameter {
    /// 4 bytes, exact.
    F32(Elements<f32>),
    /// 2 bytes; updates are rounded stochastically.
    Bf16(Elements<bf16>),
    /// 2 bytes; updates are rounded to nearest. Loses small updates: it is here as the control of the one above.
    Bf16Nearest(Elements<bf16>),
    /// 3 bytes: bf16 for the kernels, and the 8 bits below it for the update alone.
    Bf16Residual {
        /// What the kernels read.
        high: Elements<bf16>,
        /// The next 8 bits of each element.
        low: Vec<u8>,
    },
}

/// The same elements, a block of them, to update.
pub enum Block<'a> {
    /// See [`Parameter::F32`].
    F32(&'a mut [f32]),
    /// See [`Parameter::Bf16`].
    Bf16(&'a mut [bf16]),
    /// See [`Parameter::Bf16Nearest`].
    Bf16Nearest(&'a mut [bf16]),
    /// See [`Parameter::Bf16Residual`].
    Bf16Residual(&'a mut [bf16], &'a mut [u8]),
}

impl Parameter {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(w) => w.len(),
            Self::Bf16(w) | Self::Bf16Nearest(w) => w.len(),
            Self::Bf16Residual { high, .. } => high.len(),
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes it takes.
    pub fn byte_len(&self) -> usize {
        match self {
            Self::F32(w) => 4 * w.len(),
            Self::Bf16(w) | Self::Bf16Nearest(w) => 2 * w.len(),
            Self::Bf16Residual { high, low } => 2 * high.len() + low.len(),
        }
    }

    /// The elements in blocks of `size`, in order.
    pub fn blocks(&mut self, size: usize) -> Vec<Block<'_>> {
        match self {
            Self::F32(w) => w.make_mut().chunks_mut(size).map(Block::F32).collect(),
            Self::Bf16(w) => w.make_mut().chunks_mut(size).map(Block::Bf16).collect(),
            Self::Bf16Nearest(w) => w.make_mut().chunks_mut(size).map(Block::Bf16Nearest).collect(),
            Self::Bf16Residual { high, low } => high
                .make_mut()
                .chunks_mut(size)
                .zip(low.chunks_mut(size))
                .map(|(h, l)| Block::Bf16Residual(h, l))
                .collect(),
        }
    }
}

impl Block<'_> {
    /// The block's elements as f32.
    #[inline(always)]
    pub fn read(&self, out: &mut [f32]) {
        match self {
            Self::F32(w) => out.copy_from_slice(w),
            Self::Bf16(w) | Self::Bf16Nearest(w) => {
                // bf16 is the upper half of an f32.
                out.iter_mut().zip(w.iter()).for_each(|(o, v)| *o = f32::from_bits(u32::from(v.to_bits()) << 16));
            }
            Self::Bf16Residual(high, low) => {
                let stored = high.iter().zip(low.iter());
                out.iter_mut().zip(stored).for_each(|(o, (&h, &l))| *o = join_bf16_residual(h, l));
            }
        }
    }

    /// Stores new values. `first`: index of the block's first element in its tensor, for `stream`;
    /// blocks lie within 2³² elements.
    #[inline(always)]
    pub fn write(&mut self, values: &[f32], stream: Stream, first: usize) {
        match self {
            Self::F32(w) => w.copy_from_slice(values),
            Self::Bf16(w) => {
                const GROUP: usize = 256;
                let mut words = [0; GROUP];
                for (i, (w, values)) in w.chunks_mut(GROUP).zip(values.chunks(GROUP)).enumerate() {
                    let words = &mut words[..values.len()];
                    stream.words(first + i * GROUP, words);
                    w.iter_mut().zip(values).zip(words).for_each(|((w, &v), &mut r)| *w = stochastic_bf16(v, r));
                }
            }
            Self::Bf16Nearest(w) => w.iter_mut().zip(values).for_each(|(w, &v)| *w = bf16::from_f32(v)),
            Self::Bf16Residual(high, low) => {
                let stored = high.iter_mut().zip(low.iter_mut());
                stored.zip(values).for_each(|((h, l), &v)| (*h, *l) = split_bf16_residual(v));
            }
        }
    }
}
