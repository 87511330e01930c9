//! How a trained weight is stored between steps.

use std::ops::Deref;
use std::sync::Arc;

use bytemuck::Pod;
use fourfold_tensor::{Buffer, FloatBuffer, Offsets, Quantized, Scales, SharedBytes};
use half::bf16;
use rayon::prelude::*;

use super::state::CHUNK;
use crate::random::Stream;
use crate::recipe::Storage;
use crate::rounding::{join_bf16_residual, quantize_int8, split_bf16_residual, stochastic_bf16};

/// Most elements of a row that share a scale in int8.
const MOST_GROUP: usize = 128;
/// Fewest; rows that have no such divisor are kept in bf16.
const LEAST_GROUP: usize = 8;

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
    /// 1.03 bytes: codes of 8 bits with a scale for each group of a row, which the kernels read as they are.
    Int8(Int8),
}

/// Elements in 8 bits: `scale · (code − 128)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Int8 {
    /// Codes, four to a word as [`Quantized`] packs them.
    pub codes: Elements<u32>,
    /// A scale for each `group` elements.
    pub scales: Elements<f32>,
    /// Elements that share a scale; a row is a whole number of groups.
    pub group: usize,
    /// Whether updates are rounded stochastically. To nearest they vanish below half a step: a control.
    pub stochastic: bool,
}

impl Int8 {
    /// Number of elements.
    pub fn len(&self) -> usize {
        4 * self.codes.len()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.codes.is_empty()
    }

    /// The elements rounded to bf16.
    pub fn to_bf16(&self) -> Vec<bf16> {
        let codes: &[u8] = bytemuck::cast_slice(&self.codes);
        let groups = codes.chunks(self.group).zip(self.scales.iter());
        groups
            .flat_map(|(codes, scale)| codes.iter().map(move |&c| bf16::from_f32(scale * (f32::from(c) - 128.0))))
            .collect()
    }

    /// The elements as the `[rows, cols]` weight that kernels read, not copied.
    pub fn share(&self, rows: usize, cols: usize) -> Quantized {
        Quantized {
            rows,
            cols,
            bits: 8,
            group_size: self.group,
            packed: self.codes.share(),
            scales: Scales::Float(FloatBuffer::F32(self.scales.share())),
            offsets: Offsets::Symmetric,
            codebook: None,
            g_idx: None,
        }
    }
}

/// The largest power of two up to [`MOST_GROUP`] that divides a row.
fn int8_group(cols: usize) -> Option<usize> {
    let group = (1 << cols.trailing_zeros().min(MOST_GROUP.trailing_zeros())).min(MOST_GROUP);
    (cols > 0 && group >= LEAST_GROUP).then_some(group)
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
    /// See [`Parameter::Int8`].
    Int8 {
        /// Codes, one an element.
        codes: &'a mut [u8],
        /// Scales of the groups.
        scales: &'a mut [f32],
        /// Elements of a group.
        group: usize,
        /// How updates are rounded.
        stochastic: bool,
    },
}

impl Parameter {
    /// A tensor of `len` elements in rows of `cols`, rounded to nearest. `fill(first, out)` gives the elements from `first` on, a
    /// few thousand at a time and from many threads.
    pub fn new(storage: Storage, len: usize, cols: usize, fill: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        let zeros = || vec![bf16::ZERO; len].into();
        let mut parameter = match (storage, int8_group(cols)) {
            (Storage::F32, _) => Self::F32(vec![0.0; len].into()),
            (Storage::Int8 | Storage::Int8Nearest, Some(group)) => Self::Int8(Int8 {
                codes: vec![0; len / 4].into(),
                scales: vec![0.0; len / group].into(),
                group,
                stochastic: storage == Storage::Int8,
            }),
            (Storage::Bf16 | Storage::Int8, _) => Self::Bf16(zeros()),
            (Storage::Bf16Nearest | Storage::Int8Nearest, _) => Self::Bf16Nearest(zeros()),
            (Storage::Bf16Residual, _) => Self::Bf16Residual { high: zeros(), low: vec![0; len] },
        };
        parameter.blocks(CHUNK).into_par_iter().enumerate().for_each(|(i, mut block)| {
            let first = i * CHUNK;
            let mut values = [0.0; CHUNK];
            let values = &mut values[..CHUNK.min(len - first)];
            fill(first, values);
            block.write(values, None, first);
        });
        parameter
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(w) => w.len(),
            Self::Bf16(w) | Self::Bf16Nearest(w) => w.len(),
            Self::Bf16Residual { high, .. } => high.len(),
            Self::Int8(int8) => int8.len(),
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
            Self::Int8(int8) => 4 * (int8.codes.len() + int8.scales.len()),
        }
    }

    /// The elements in blocks of `size`, in order; `size` is a multiple of 128.
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
            Self::Int8(Int8 { codes, scales, group, stochastic }) => {
                let (group, stochastic) = (*group, *stochastic);
                let codes = bytemuck::cast_slice_mut(codes.make_mut()).chunks_mut(size);
                let chunks = codes.zip(scales.make_mut().chunks_mut(size / group));
                chunks.map(|(codes, scales)| Block::Int8 { codes, scales, group, stochastic }).collect()
            }
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
                for (o, v) in out.iter_mut().zip(w.iter()) {
                    *o = f32::from_bits(u32::from(v.to_bits()) << 16);
                }
            }
            Self::Bf16Residual(high, low) => {
                let stored = high.iter().zip(low.iter());
                for (o, (&h, &l)) in out.iter_mut().zip(stored) {
                    *o = join_bf16_residual(h, l);
                }
            }
            Self::Int8 { codes, scales, group, .. } => {
                for ((out, codes), scale) in out.chunks_mut(*group).zip(codes.chunks(*group)).zip(scales.iter()) {
                    for (o, &c) in out.iter_mut().zip(codes) {
                        *o = scale * (f32::from(c) - 128.0);
                    }
                }
            }
        }
    }

    /// Stores new values, rounded to nearest where there is no `stream`. `first`: index of the block's first element in its
    /// tensor, for `stream`; blocks lie within 2³² elements.
    #[inline(always)]
    pub fn write(&mut self, values: &[f32], stream: Option<Stream>, first: usize) {
        match self {
            Self::F32(w) => w.copy_from_slice(values),
            Self::Bf16(w) => {
                const GROUP: usize = 256;
                let Some(stream) = stream else {
                    w.iter_mut().zip(values).for_each(|(w, &v)| *w = bf16::from_f32(v));
                    return;
                };
                let mut words = [0; GROUP];
                for (i, (w, values)) in w.chunks_mut(GROUP).zip(values.chunks(GROUP)).enumerate() {
                    let words = &mut words[..values.len()];
                    stream.words(first + i * GROUP, words);
                    for ((w, &v), &mut r) in w.iter_mut().zip(values).zip(words) {
                        *w = stochastic_bf16(v, r);
                    }
                }
            }
            Self::Bf16Nearest(w) => {
                for (w, &v) in w.iter_mut().zip(values) {
                    *w = bf16::from_f32(v);
                }
            }
            Self::Bf16Residual(high, low) => {
                let stored = high.iter_mut().zip(low.iter_mut());
                for ((h, l), &v) in stored.zip(values) {
                    (*h, *l) = split_bf16_residual(v);
                }
            }
            Self::Int8 { codes, scales, group, stochastic } => {
                let mut words = [0; MOST_GROUP];
                let groups = codes.chunks_mut(*group).zip(values.chunks(*group)).zip(scales.iter_mut());
                for (i, ((codes, values), scale)) in groups.enumerate() {
                    let words = &mut words[..values.len()];
                    match stream {
                        Some(stream) if *stochastic => stream.words(first + i * *group, words),
                        // Half a step is added and the rest cut off.
                        _ => words.fill(1 << 31),
                    }
                    *scale = quantize_int8(values, words, codes);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn int8_is_what_the_kernels_read_and_odd_rows_are_bf16() {
        let (rows, cols) = (3, 40);
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) * 1e-3;
        let fill = |first: usize, out: &mut [f32]| out.iter_mut().enumerate().for_each(|(i, o)| *o = value(first + i));
        let mut parameter = Parameter::new(Storage::Int8, rows * cols, cols, fill);
        let mut read = vec![0.0; rows * cols];
        let Parameter::Int8(int8) = &parameter else { panic!("40 columns are groups of 8") };
        assert_eq!((int8.group, parameter.len(), parameter.byte_len()), (8, 120, 120 + 4 * 15));
        let weight = int8.share(rows, cols);
        weight.validate().unwrap();
        parameter.blocks(128)[0].read(&mut read);
        let mut again = vec![0.0; rows * cols];
        let mut row = vec![0.0; cols];
        for r in 0..rows {
            weight.dequantize_row(r, &mut row);
            assert_eq!(row, read[r * cols..(r + 1) * cols]);
        }
        assert!(read.iter().enumerate().all(|(i, v)| (v - value(i)).abs() <= 0.05 / 127.0 * 0.501), "{read:?}");
        // Writing what is there changes nothing, whatever the random numbers.
        drop(weight);
        parameter.blocks(128)[0].write(&read, Some(Stream::new(1, 2, 3)), 0);
        parameter.blocks(128)[0].read(&mut again);
        assert!(read.iter().zip(&again).all(|(a, b)| (a - b).abs() < 1e-8));
        assert!(matches!(Parameter::new(Storage::Int8, 9, 9, fill), Parameter::Bf16(_)));
    }

    #[test]
    fn int8_keeps_small_updates_on_average_and_nearest_rounding_loses_them() {
        let n = 4096;
        let drift = |storage| {
            // One large element a group sets its scale; the others move by a twentieth of a step a hundred times.
            let fill = |first: usize, out: &mut [f32]| {
                out.iter_mut()
                    .enumerate()
                    .for_each(|(i, o)| *o = if (first + i).is_multiple_of(128) { 1.27 } else { 0.5 });
            };
            let mut parameter = Parameter::new(storage, n, 128, fill);
            let mut w = vec![0.0; n];
            for t in 0..100 {
                let block = &mut parameter.blocks(n)[0];
                block.read(&mut w);
                w.iter_mut().enumerate().for_each(|(i, w)| *w += if i.is_multiple_of(128) { 0.0 } else { 5e-4 });
                block.write(&w, Some(Stream::new(5, t, 0)), 0);
            }
            parameter.blocks(n)[0].read(&mut w);
            w.iter().filter(|w| **w < 1.2).sum::<f32>() / (n - n / 128) as f32
        };
        assert!((drift(Storage::Int8) - 0.55).abs() < 2e-3, "{}", drift(Storage::Int8));
        assert!((drift(Storage::Int8Nearest) - 0.5).abs() < 1e-6, "{}", drift(Storage::Int8Nearest));
    }
}
