//! What can be learned of a packed weight while its codes stay: scales and offsets (EfficientQAT, Chen et al. 2024, section 3.3).
//!
//! The learned numbers are relative to what was stored, so that one learning rate suits every tensor and every way to store scales:
//!
//! ```text
//! scale[r, g] = a · stored scale                       a = 1 at first; of double-quantized scales the float of a run
//! min[r, g]   = stored min + b · stored scale          b = 0 at first
//! min[r, g]   = c · stored min                         c = 1 at first, for the float of a run of double-quantized offsets
//! ```
//!
//! Integer zero points stay (they move with their scale), and so do dense and low-rank terms, floats of sparse matrices and a
//! single scale for a whole tensor. Of a vector the elements themselves are learned.
//!
//! The numbers of a row lie side by side: those of its scales, then of its offsets, term after term of a sum.

use half::f16;

use crate::{
    DType, Dense, Double, FloatBuffer, Offsets, Quantized, Scales, Sparse, SparseCodes, SparseValues, Sum, Weight,
};

/// A weight of which only some floats are learned.
#[derive(Clone, Debug, PartialEq)]
pub struct Tuning {
    base: Weight,
    per_row: usize,
}

impl Tuning {
    /// What can be learned of `base`; `None` where nothing can.
    pub fn of(base: Weight) -> Option<Self> {
        let per_row = match &base {
            Weight::Dense(vector) if vector.shape().len() < 2 => vector.data().len(),
            other => numbers(other),
        };
        (per_row > 0 && base.rows() > 0).then_some(Self { base, per_row })
    }

    /// The weight as it was stored.
    pub fn base(&self) -> &Weight {
        &self.base
    }

    /// Numbers learned of a row.
    pub fn per_row(&self) -> usize {
        self.per_row
    }

    /// Numbers learned.
    pub fn len(&self) -> usize {
        self.base.rows() * self.per_row
    }

    /// Whether there are none. Never so: see [`Tuning::of`].
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The numbers that stand for the weight as it was stored.
    pub fn initial(&self) -> Vec<f32> {
        if let Weight::Dense(vector) = &self.base {
            return vector.data().to_f32();
        }
        let mut row = Vec::with_capacity(self.per_row);
        start(&self.base, &mut row);
        row.repeat(self.base.rows())
    }

    /// The weight with these numbers, in the form and the types of the one that was stored: its bytes are as many.
    ///
    /// # Panics
    /// When there are more or fewer numbers than [`Tuning::len`].
    pub fn with(&self, numbers: &[f32]) -> Weight {
        assert_eq!(numbers.len(), self.len(), "numbers of a tuned weight");
        if let Weight::Dense(vector) = &self.base {
            let data = FloatBuffer::from_f32(numbers.to_vec(), vector.dtype());
            return Dense::new(vector.shape().to_vec(), data).into();
        }
        with(&self.base, &Rows { numbers, per_row: self.per_row, first: 0 })
    }

    /// Adds the gradient of row `r`'s numbers to `sums` `[per_row]`, given the gradient `dw` `[cols]` of the row itself. `scratch` is
    /// any memory.
    pub fn add_row_gradient(&self, r: usize, dw: &[f32], scratch: &mut Vec<u8>, sums: &mut [f32]) {
        if let Weight::Dense(_) = &self.base {
            return sums.iter_mut().zip(dw).for_each(|(sum, d)| *sum += d);
        }
        add_gradient(&self.base, r, dw, scratch, sums);
    }
}

/// Numbers learned of each row of a matrix.
fn numbers(weight: &Weight) -> usize {
    match weight {
        Weight::Dense(_) | Weight::Fp8(_) | Weight::LowRank(_) => 0,
        Weight::Quantized(w) if w.is_per_tensor() => 0,
        Weight::Quantized(w) => scale_numbers(w) + offset_numbers(w),
        Weight::Sparse(w) => match w.values() {
            SparseValues::Float(_) => 0,
            SparseValues::Codes(codes) => w.cols().div_ceil(codes.group_size),
        },
        Weight::Sum(w) => w.terms().iter().map(numbers).sum(),
    }
}

fn scale_numbers(w: &Quantized) -> usize {
    match &w.scales {
        Scales::Float(_) => w.groups(),
        Scales::Double(double) => double.spans(w.groups()),
    }
}

fn offset_numbers(w: &Quantized) -> usize {
    match &w.offsets {
        Offsets::Symmetric | Offsets::ZeroPoint(_) => 0,
        Offsets::Min(_) => w.groups(),
        Offsets::Double(double) => double.spans(w.groups()),
    }
}

/// The first numbers of a row.
fn start(weight: &Weight, row: &mut Vec<f32>) {
    match weight {
        Weight::Dense(_) | Weight::Fp8(_) | Weight::LowRank(_) | Weight::Sparse(_) => {
            row.resize(row.len() + numbers(weight), 1.0);
        }
        Weight::Quantized(w) if w.is_per_tensor() => {}
        Weight::Quantized(w) => {
            row.resize(row.len() + scale_numbers(w), 1.0);
            let first = if matches!(w.offsets, Offsets::Min(_)) { 0.0 } else { 1.0 };
            row.resize(row.len() + offset_numbers(w), first);
        }
        Weight::Sum(w) => w.terms().iter().for_each(|term| start(term, row)),
    }
}

/// The numbers of all rows, from the `first` of each row on.
struct Rows<'a> {
    numbers: &'a [f32],
    per_row: usize,
    first: usize,
}

impl Rows<'_> {
    fn get(&self, r: usize, i: usize) -> f32 {
        self.numbers[r * self.per_row + self.first + i]
    }

    fn after(&self, count: usize) -> Self {
        Self { first: self.first + count, ..*self }
    }

    /// `stored[r, i]` changed by `change(stored, number, r, i)`, for `width` elements of each row.
    fn change(
        &self,
        stored: &FloatBuffer,
        width: usize,
        change: impl Fn(f32, f32, usize, usize) -> f32,
    ) -> FloatBuffer {
        let changed = |at: usize| {
            let (r, i) = (at / width.max(1), at % width.max(1));
            change(stored.get(at), self.get(r, i), r, i)
        };
        round((0..stored.len()).map(changed).collect(), stored.dtype())
    }
}

/// Scales that are not zero stay so, and none becomes infinite.
fn round(values: Vec<f32>, dtype: DType) -> FloatBuffer {
    match dtype {
        DType::F16 => FloatBuffer::F16(values.into_iter().map(Quantized::f16_scale).collect::<Vec<f16>>().into()),
        other => FloatBuffer::from_f32(values, other),
    }
}

fn with(weight: &Weight, rows: &Rows) -> Weight {
    match weight {
        Weight::Dense(_) | Weight::Fp8(_) | Weight::LowRank(_) => weight.clone(),
        Weight::Quantized(w) if w.is_per_tensor() => weight.clone(),
        Weight::Quantized(w) => with_scales(w, rows).into(),
        Weight::Sparse(w) => match w.values() {
            SparseValues::Float(_) => weight.clone(),
            SparseValues::Codes(codes) => {
                let scales = rows.change(&codes.scales, numbers(weight), |scale, a, _, _| scale * a);
                let codes = SparseCodes { scales, ..codes.clone() };
                match Sparse::of(w.mask().clone(), SparseValues::Codes(codes)) {
                    Ok(tuned) => tuned.into(),
                    Err(_) => unreachable!("as many scales as before"),
                }
            }
        },
        Weight::Sum(w) => {
            let mut rows = rows.after(0);
            let terms = w.terms().iter().map(|term| {
                let tuned = with(term, &rows);
                rows = rows.after(numbers(term));
                tuned
            });
            match Sum::new(terms.collect()) {
                Ok(tuned) => tuned.into(),
                Err(_) => unreachable!("terms of the same shapes"),
            }
        }
    }
}

fn with_scales(w: &Quantized, rows: &Rows) -> Quantized {
    let width = scale_numbers(w);
    let scales = match &w.scales {
        Scales::Float(scales) => Scales::Float(rows.change(scales, width, |scale, a, _, _| scale * a)),
        Scales::Double(double) => {
            let floats = rows.change(&double.floats, width, |float, a, _, _| float * a);
            Scales::Double(Double { floats, ..double.clone() })
        }
    };
    let rows = rows.after(width);
    let offsets = match &w.offsets {
        Offsets::Symmetric | Offsets::ZeroPoint(_) => w.offsets.clone(),
        Offsets::Min(mins) => {
            let moved = |min: f32, b: f32, r, g| b.mul_add(w.scale(r, g), min);
            Offsets::Min(rows.change(mins, offset_numbers(w), moved))
        }
        Offsets::Double(double) => {
            let floats = rows.change(&double.floats, offset_numbers(w), |float, c, _, _| float * c);
            Offsets::Double(Double { floats, ..double.clone() })
        }
    };
    Quantized { scales, offsets, ..w.clone() }
}

fn add_gradient(weight: &Weight, r: usize, dw: &[f32], scratch: &mut Vec<u8>, sums: &mut [f32]) {
    match weight {
        Weight::Dense(_) | Weight::Fp8(_) | Weight::LowRank(_) => {}
        Weight::Quantized(w) if w.is_per_tensor() => {}
        Weight::Quantized(w) => add_quantized(w, r, dw, scratch, sums),
        Weight::Sparse(w) => match w.values() {
            SparseValues::Float(_) => {}
            SparseValues::Codes(codes) => {
                let (groups, zero) = (sums.len(), (1u32 << (codes.bits - 1)) as f32);
                scratch.resize(w.row_values(r).len(), 0);
                w.row_codes(r, scratch);
                for (c, &code) in w.mask().columns(r).zip(scratch.iter()) {
                    let g = c / codes.group_size;
                    sums[g] += codes.scales.get(r * groups + g) * dw[c] * (f32::from(code) - zero);
                }
            }
        },
        Weight::Sum(w) => {
            let mut left = sums;
            for term in w.terms() {
                let (own, rest) = left.split_at_mut(numbers(term));
                add_gradient(term, r, dw, scratch, own);
                left = rest;
            }
        }
    }
}

/// With `w = scale · v − min`, v the code (less its zero point, or looked up): `da = stored scale · Σ_g dw · v`,
/// `db = −stored scale · Σ_g dw`, `dc = −stored min · Σ_g dw`.
fn add_quantized(w: &Quantized, r: usize, dw: &[f32], scratch: &mut Vec<u8>, sums: &mut [f32]) {
    let (groups, spans) = (w.groups(), scale_numbers(w));
    scratch.resize(w.cols, 0);
    w.row_codes(r, scratch);
    let (of_scales, of_offsets) = sums.split_at_mut(spans);
    let zero = |g: usize| match &w.offsets {
        Offsets::Symmetric => (1u32 << (w.bits - 1)) as f32,
        Offsets::ZeroPoint(z) if z.len() == 1 => f32::from(z[0]),
        Offsets::ZeroPoint(z) => f32::from(z[r * groups + g]),
        Offsets::Min(_) | Offsets::Double(_) => 0.0,
    };
    let mut add = |g: usize, of_codes: f32, of_ones: f32| {
        let scale = w.scale(r, g);
        match &w.scales {
            Scales::Float(_) => of_scales[g] += scale * of_codes,
            Scales::Double(double) => of_scales[g / double.span] += scale * of_codes,
        }
        match &w.offsets {
            Offsets::Symmetric | Offsets::ZeroPoint(_) => {}
            Offsets::Min(_) => of_offsets[g] -= scale * of_ones,
            Offsets::Double(double) => of_offsets[g / double.span] -= double.get(r, g, groups) * of_ones,
        }
    };
    let value = |code: u8, zero: f32| match &w.codebook {
        Some(codebook) => f32::from(codebook[code as usize]),
        None => f32::from(code) - zero,
    };
    if w.g_idx.is_some() {
        for (c, (&d, &code)) in dw.iter().zip(scratch.iter()).enumerate() {
            let g = w.group_of(c);
            add(g, d * value(code, zero(g)), d);
        }
        return;
    }
    for (g, (dw, codes)) in dw.chunks(w.group_size).zip(scratch.chunks(w.group_size)).enumerate() {
        let zero = zero(g);
        let (mut of_codes, mut of_ones) = (0.0f32, 0.0f32);
        for (&d, &code) in dw.iter().zip(codes) {
            of_codes += d * value(code, zero);
            of_ones += d;
        }
        add(g, of_codes, of_ones);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DoubleCodes, Mask, pack_row, packed_words_per_row};
    use std::sync::Arc;

    const ROWS: usize = 3;
    const COLS: usize = 10;

    fn wave(i: usize) -> f32 {
        ((i * 37 + 11) % 23) as f32 / 23.0 - 0.4
    }

    fn floats(n: usize, from: usize, dtype: DType) -> FloatBuffer {
        FloatBuffer::from_f32((0..n).map(|i| 0.1 + wave(from + i).abs()).collect(), dtype)
    }

    fn packed(n: usize, rows: usize, bits: u8) -> Vec<u32> {
        let words = packed_words_per_row(n, bits);
        let mut packed = vec![0; rows * words];
        for (r, words) in packed.chunks_mut(words).enumerate() {
            let codes: Vec<u8> = (0..n).map(|c| ((r * 7 + c * 5) % (1 << bits)) as u8).collect();
            pack_row(&codes, bits, words);
        }
        packed
    }

    fn quantized(scales: Scales, offsets: Offsets) -> Quantized {
        let packed = packed(COLS, ROWS, 3).into();
        Quantized {
            rows: ROWS,
            cols: COLS,
            bits: 3,
            group_size: 4,
            packed,
            scales,
            offsets,
            codebook: None,
            g_idx: None,
        }
    }

    /// Weights of every form that has something to learn, their floats in `dtype`.
    fn cases(dtype: DType) -> Vec<Weight> {
        let scales = || Scales::Float(floats(9, 0, dtype));
        let double = |from| Double {
            floats: floats(6, from, dtype),
            codes: DoubleCodes::Unsigned((1..10).collect::<Vec<u8>>().into()),
            span: 2,
        };
        let symmetric = || quantized(scales(), Offsets::Symmetric);
        let codebook = Quantized { codebook: Some(vec![-9, -5, -2, 0, 1, 3, 6, 11]), ..symmetric() };
        let order = Quantized { g_idx: Some(vec![2, 0, 1, 1, 0, 2, 2, 0, 1, 0].into()), ..symmetric() };
        let mask = Mask::new(ROWS, COLS, vec![0b10_1100_0111, 0b1, 0b11_1111_1110].into()).unwrap();
        let codes = SparseCodes {
            bits: 4,
            group_size: 6,
            packed: packed(mask.kept(), 1, 4).into(),
            scales: floats(6, 5, dtype),
        };
        let sparse = Sparse::of(Arc::new(mask), SparseValues::Codes(codes)).unwrap();
        let dense = Dense::from_f32(vec![ROWS, COLS], (0..ROWS * COLS).map(wave).collect());
        let zeros = Offsets::ZeroPoint(vec![3, 1, 4, 1, 5, 2, 6, 5, 3].into());
        let mut cases: Vec<Weight> = vec![
            Dense::new(vec![COLS], floats(COLS, 3, dtype)).into(),
            symmetric().into(),
            quantized(scales(), zeros).into(),
            quantized(scales(), Offsets::Min(floats(9, 4, dtype))).into(),
            quantized(Scales::Double(double(0)), Offsets::Double(double(7))).into(),
            codebook.into(),
            order.into(),
            sparse.into(),
        ];
        cases.push(Sum::new(vec![dense.into(), cases[4].clone(), cases[7].clone()]).unwrap().into());
        cases
    }

    #[test]
    fn first_numbers_are_the_stored_weight_and_bytes_stay() {
        for weight in cases(DType::F16) {
            let tuning = Tuning::of(weight.clone()).unwrap();
            let mut numbers = tuning.initial();
            assert_eq!(tuning.with(&numbers), weight, "{}", weight.describe());
            numbers.iter_mut().enumerate().for_each(|(i, n)| *n += 0.2 * wave(i));
            let tuned = tuning.with(&numbers);
            assert_ne!(tuned, weight);
            assert_eq!((tuned.describe(), tuned.byte_len()), (weight.describe(), weight.byte_len()));
        }
    }

    #[test]
    fn gradients_are_finite_differences() {
        for weight in cases(DType::F32) {
            let tuning = Tuning::of(weight.clone()).unwrap();
            let (rows, cols) = (weight.rows(), weight.cols());
            let dw: Vec<f32> = (0..rows * cols).map(|i| wave(3 * i + 1)).collect();
            let loss = |numbers: &[f32]| {
                let values = tuning.with(numbers).to_f32();
                values.iter().zip(&dw).map(|(&w, &d)| f64::from(w) * f64::from(d)).sum::<f64>()
            };
            let mut gradient = vec![0.0; tuning.len()];
            for (r, sums) in gradient.chunks_mut(tuning.per_row()).enumerate() {
                tuning.add_row_gradient(r, &dw[r * cols..(r + 1) * cols], &mut vec![7; 3], sums);
            }
            let numbers = tuning.initial();
            for i in 0..numbers.len() {
                let moved = |by: f32| {
                    let mut numbers = numbers.clone();
                    numbers[i] += by;
                    loss(&numbers)
                };
                let slope = (moved(0.25) - moved(-0.25)) / 0.5;
                assert!(
                    (slope - f64::from(gradient[i])).abs() < 1e-4,
                    "{} {i}: {slope} {}",
                    weight.describe(),
                    gradient[i]
                );
            }
        }
    }

    #[test]
    fn what_has_no_scales_is_not_tuned() {
        assert!(Tuning::of(Dense::from_f32(vec![2, 2], vec![1.0; 4]).into()).is_none());
        let single = quantized(Scales::Float(floats(1, 0, DType::F32)), Offsets::Symmetric);
        assert!(Tuning::of(single.into()).is_none());
    }
}
