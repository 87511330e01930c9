//! The kernels against the definition of the storage form, [`Quantized::dequantize_row`], in f64.

use std::sync::OnceLock;

use fourfold_tensor::{DType, Double, DoubleCodes, FloatBuffer, pack_row, packed_words_per_row};
use proptest::prelude::*;

use super::*;

/// A small generator of numbers, so that cases are the same everywhere.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    /// Between −1 and 1.
    fn float(&mut self) -> f32 {
        self.next() as f32 / (1u32 << 30) as f32 - 1.0
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum ScaleForm {
    One,
    F32,
    F16,
    Bf16,
    Double,
    /// A float for every other group, signed codes.
    DoubleRuns,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum OffsetForm {
    Symmetric,
    OneZero,
    Zeros,
    Mins,
    DoubleMins,
    Codebook,
}

const SCALES: [ScaleForm; 6] =
    [ScaleForm::One, ScaleForm::F32, ScaleForm::F16, ScaleForm::Bf16, ScaleForm::Double, ScaleForm::DoubleRuns];
const OFFSETS: [OffsetForm; 6] = [
    OffsetForm::Symmetric,
    OffsetForm::OneZero,
    OffsetForm::Zeros,
    OffsetForm::Mins,
    OffsetForm::DoubleMins,
    OffsetForm::Codebook,
];

#[derive(Clone, Copy, Debug)]
struct Case {
    rows: usize,
    cols: usize,
    bits: u8,
    group: usize,
    scales: ScaleForm,
    offsets: OffsetForm,
    act_order: bool,
}

impl Case {
    fn build(self, seed: u64) -> Quantized {
        let mut n = Numbers(seed);
        let Self { rows, cols, bits, group, .. } = self;
        let words = packed_words_per_row(cols, bits);
        let mut packed = vec![0; rows * words];
        for row in packed.chunks_exact_mut(words.max(1)) {
            let codes: Vec<u8> = (0..cols).map(|_| (n.next() % (1 << bits)) as u8).collect();
            pack_row(&codes, bits, row);
        }
        let groups = cols.div_ceil(group);
        let mut floats = |count: usize, dtype| {
            FloatBuffer::from_f32(n.floats(count).iter().map(|v| 0.1 + v.abs() * 0.1).collect(), dtype)
        };
        let scales = match self.scales {
            ScaleForm::One => Scales::Float(floats(1, DType::F32)),
            ScaleForm::F32 => Scales::Float(floats(rows * groups, DType::F32)),
            ScaleForm::F16 => Scales::Float(floats(rows * groups, DType::F16)),
            ScaleForm::Bf16 => Scales::Float(floats(rows * groups, DType::Bf16)),
            ScaleForm::Double => {
                let codes = (0..rows * groups).map(|i| (i * 29 % 255 + 1) as u8).collect();
                Scales::Double(Double::by_row(floats(rows, DType::F16), codes, groups))
            }
            ScaleForm::DoubleRuns => Scales::Double(Double {
                floats: floats(rows * groups.div_ceil(2), DType::F16),
                codes: DoubleCodes::Signed((0..rows * groups).map(|i| (i * 29) as i8).collect::<Vec<_>>().into()),
                span: 2,
            }),
        };
        let mut zeros = |count: usize| -> Vec<u8> { (0..count).map(|_| (n.next() % (1 << bits)) as u8).collect() };
        let offsets = match self.offsets {
            OffsetForm::Symmetric | OffsetForm::Codebook => Offsets::Symmetric,
            OffsetForm::OneZero => Offsets::ZeroPoint(zeros(1).into()),
            OffsetForm::Zeros => Offsets::ZeroPoint(zeros(rows * groups).into()),
            // Below 16: half a byte each in the kernels' layout.
            OffsetForm::DoubleMins => Offsets::Double(Double {
                floats: FloatBuffer::from_f32(n.floats(rows * groups.div_ceil(4)), DType::F16),
                codes: DoubleCodes::Unsigned((0..rows * groups).map(|i| (i * 7 % 16) as u8).collect::<Vec<_>>().into()),
                span: 4,
            }),
            OffsetForm::Mins => Offsets::Min(FloatBuffer::from_f32(n.floats(rows * groups), DType::F16)),
        };
        let codebook = (self.offsets == OffsetForm::Codebook).then(|| {
            (0..1 << bits).map(|i: i32| (i * i * 255 / ((1 << bits) - 1) / ((1 << bits) - 1) - 128) as i8).collect()
        });
        let g_idx = self.act_order.then(|| (0..cols).map(|_| n.next() % groups as u32).collect::<Vec<_>>().into());
        let w =
            Quantized { rows, cols, bits, group_size: group, packed: packed.into(), scales, offsets, codebook, g_idx };
        w.validate().unwrap();
        w
    }
}

fn dequantized(w: &Quantized) -> Vec<Vec<f32>> {
    let row = |r| {
        let mut out = vec![0.0; w.cols];
        w.dequantize_row(r, &mut out);
        out
    };
    (0..w.rows).map(row).collect()
}

/// The largest magnitude.
fn most(x: &[f32]) -> f64 {
    x.iter().fold(0f64, |m, v| m.max(f64::from(v.abs())))
}

/// Largest error that rounding x to int8 in blocks of 32 may cause in `x · w`: half a unit, `absmax / 254`, for each column
/// (whatever order the columns are blocked in, so with the absmax of all), and f32 arithmetic.
fn bound(x: &[f32], w: &[f32], order_kept: bool, exact: bool) -> f64 {
    let whole = most(x);
    let mut rounding = 0.0;
    let mut size = 0.0;
    for (x, w) in x.chunks(BLOCK).zip(w.chunks(BLOCK)) {
        let unit = if order_kept { most(x) } else { whole } / 254.0;
        rounding += w.iter().map(|w| unit * f64::from(w.abs())).sum::<f64>();
        size +=
            x.iter().map(|v| f64::from(v.abs())).sum::<f64>() * w.iter().fold(0f64, |m, v| m.max(f64::from(v.abs())));
    }
    // Terms of both signs that nearly cancel (codes against offsets) leave the rounding of the larger ones.
    (if exact { 0.0 } else { rounding * 1.001 }) + 3e-5 * (size + 1.0)
}

fn close(found: f32, wanted: f64, bound: f64, what: &dyn std::fmt::Debug) {
    assert!((f64::from(found) - wanted).abs() <= bound, "{found} for {wanted}, bound {bound}: {what:?}");
}

fn available() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available())
}

/// One thread, and two.
fn pools() -> &'static [Pool] {
    static POOLS: OnceLock<[Pool; 2]> = OnceLock::new();
    POOLS.get_or_init(|| [Pool::new(1), Pool::new(2)])
}

/// All four operations, every instruction set, one and two threads, against f64.
fn check(case: Case, tokens: usize, seed: u64, pools: &[Pool]) {
    let source = case.build(seed);
    let rows = dequantized(&source);
    let weight = QuantWeight::prepare(source.clone(), &pools[0]).unwrap();
    assert_eq!((weight.rows(), weight.cols()), (case.rows, case.cols));
    let mut read = vec![f32::NAN; case.cols];
    for (r, row) in rows.iter().enumerate() {
        weight.read_row(r, &mut read);
        assert_eq!(&read, row, "row {r} of {case:?}");
    }
    let mut n = Numbers(seed + 1);
    let x = Tensor::new(tokens, case.cols, n.floats(tokens * case.cols));
    let part = case.rows / 3..case.rows - case.rows / 4;
    let xt = Tensor::new(tokens, part.len(), n.floats(tokens * part.len()));
    for isa in available() {
        let fast = FloatProducts::ALL.into_iter().filter(|products| products.is_of(isa));
        let precisions = fast.map(|products| (Activations::Fast, products));
        for (activations, products) in precisions.chain([(Activations::F32, FloatProducts::F32)]) {
            let results: Vec<_> = pools
                .iter()
                .map(|pool| {
                    let context = Context { pool, isa, activations, products };
                    let y = linear(context, &x, &[&weight]).swap_remove(0);
                    let part_y = linear_rows(context, &x, &weight, part.clone());
                    (y, part_y, linear_transposed(context, &xt, &weight, part.clone()))
                })
                .collect();
            assert!(results.iter().all(|r| r == &results[0]), "threads change the result: {isa:?} {case:?}");
            let (y, part_y, yt) = &results[0];
            assert_eq!((y.rows(), y.cols()), (tokens, case.rows));
            for t in 0..tokens {
                assert_eq!(part_y.row(t), &y.row(t)[part.clone()], "a part differs: {isa:?} {case:?}");
                for (r, w) in rows.iter().enumerate() {
                    let wanted = x.row(t).iter().zip(w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    let bound = bound(x.row(t), w, !case.act_order, activations == Activations::F32);
                    close(y.row(t)[r], wanted, bound, &(isa, activations, t, r, case));
                }
                for (c, &found) in yt.row(t).iter().enumerate() {
                    let column: Vec<f32> = part.clone().map(|r| rows[r][c]).collect();
                    let wanted = xt.row(t).iter().zip(&column).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    let magnitude: f64 = xt.row(t).iter().zip(&column).map(|(a, b)| f64::from((a * b).abs())).sum();
                    // Both factors are rounded to bf16, by 2^−8 of them at most.
                    let in_bf16 = turned::is_wanted(Context { pool: &pools[0], isa, activations, products }, tokens);
                    let mut rounding = if in_bf16 { magnitude / 127.0 } else { 0.0 };
                    if in_bf16 && products == FloatProducts::Int16 {
                        // And to a 4095th of the largest, half of it at most.
                        rounding += column.len() as f64 * most(xt.row(t)) * most(&column) / 4095.0;
                    }
                    let what = (isa, products, t, c, case);
                    close(found, wanted, bound(xt.row(t), &column, true, true) + rounding, &what);
                }
            }
        }
    }
}

#[test]
fn every_form_on_every_instruction_set() {
    let mut seed = 0;
    for bits in 2..=8 {
        for scales in SCALES {
            for offsets in OFFSETS {
                if offsets == OffsetForm::Codebook && bits > 4 {
                    continue;
                }
                for (cols, group) in [(96, 32), (160, 64), (84, 16), (70, 70)] {
                    seed += 1;
                    let act_order = seed % 5 == 0;
                    let case = Case { rows: 37, cols, bits, group, scales, offsets, act_order };
                    check(case, 1 + seed as usize % 6, seed, pools());
                }
            }
        }
    }
}

/// The negative control: the bounds of [`check`] are tight enough to tell one wrong bit of a code.
#[test]
fn one_wrong_bit_is_noticed() {
    let pool = Pool::new(1);
    let case = Case {
        rows: 16,
        cols: 96,
        bits: 4,
        group: 32,
        scales: ScaleForm::F16,
        offsets: OffsetForm::Symmetric,
        act_order: false,
    };
    let right = case.build(5);
    let mut wrong = right.clone();
    let mut packed = wrong.packed.to_vec();
    packed[0] ^= 1 << 2;
    wrong.packed = packed.into();
    let weight = QuantWeight::prepare(wrong, &pool).unwrap();
    let w = dequantized(&right).swap_remove(0);
    // Only the first 32 columns count, so that other blocks' rounding does not hide the error.
    let mut x = vec![0.0; 96];
    x[..4].copy_from_slice(&[1.0, 0.5, 0.25, 0.125]);
    let wanted: f64 = x.iter().zip(&w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    for isa in available() {
        let context =
            Context { pool: &pool, isa, activations: Activations::Fast, products: FloatProducts::fastest(isa) };
        let y = linear(context, &Tensor::new(1, 96, x.clone()), &[&weight]).swap_remove(0);
        let error = (f64::from(y.row(0)[0]) - wanted).abs();
        assert!(error > bound(&x, &w, true, false), "{isa:?}: {error}");
    }
}

#[test]
fn wide_tiles_and_odd_shapes() {
    for (rows, cols, group, tokens) in [
        (1, 1, 1, 1),
        (3, 5, 2, 3),
        (16, 32, 32, 16),
        (17, 33, 16, 17),
        (64, 576, 64, 40),
        (20, 130, 100, 21),
        (33, 64, 24, 9),
        (5, 7, 64, 0),
    ] {
        for bits in [3, 4, 8] {
            for offsets in [OffsetForm::Symmetric, OffsetForm::Zeros, OffsetForm::Mins] {
                let case = Case { rows, cols, bits, group, scales: ScaleForm::F16, offsets, act_order: false };
                check(case, tokens, 7, pools());
            }
        }
    }
}

#[test]
fn a_token_alone_and_among_others_gives_the_same_bits() {
    let pool = Pool::new(2);
    for offsets in OFFSETS {
        for group in [64, 48] {
            let case = Case { rows: 50, cols: 200, bits: 4, group, scales: ScaleForm::F16, offsets, act_order: false };
            let weight = QuantWeight::prepare(case.build(3), &pool).unwrap();
            let x = Tensor::new(23, 200, Numbers(9).floats(23 * 200));
            for isa in available() {
                let context =
                    Context { pool: &pool, isa, activations: Activations::Fast, products: FloatProducts::fastest(isa) };
                let together = linear(context, &x, &[&weight, &weight]);
                assert_eq!(together[0], together[1]);
                for t in 0..23 {
                    let alone = linear(context, &Tensor::new(1, 200, x.row(t).to_vec()), &[&weight]);
                    assert_eq!(alone[0].row(0), together[0].row(t), "{isa:?} {case:?}");
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_shows() {
    let pool = Pool::new(2);
    for offsets in OFFSETS {
        for group in [32, 20] {
            let case = Case { rows: 18, cols: 96, bits: 4, group, scales: ScaleForm::F16, offsets, act_order: false };
            let weight = QuantWeight::prepare(case.build(3), &pool).unwrap();
            for isa in available() {
                for activations in [Activations::Fast, Activations::F32] {
                    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                        let context = Context { pool: &pool, isa, activations, products: FloatProducts::fastest(isa) };
                        let mut x = Tensor::new(5, 96, Numbers(1).floats(5 * 96));
                        let clean = linear(context, &x, &[&weight]).swap_remove(0);
                        x.host_mut()[2 * 96 + 40] = bad;
                        let y = linear(context, &x, &[&weight]).swap_remove(0);
                        for t in 0..5 {
                            if t == 2 {
                                // In f32 a weight of exactly zero makes NaN of an infinity, others keep it.
                                assert!(y.row(t).iter().all(|v| !v.is_finite()), "{isa:?} {bad} {:?}", y.row(t));
                            } else {
                                assert_eq!(y.row(t), clean.row(t));
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_prepared_weight_takes_the_bytes_of_its_source() {
    let pool = Pool::new(1);
    for bits in 2..=8 {
        for scales in SCALES {
            for offsets in OFFSETS {
                if offsets == OffsetForm::Codebook && bits > 4 {
                    continue;
                }
                for group in [32, 64, 128, 576] {
                    let case = Case { rows: 320, cols: 576, bits, group, scales, offsets, act_order: false };
                    let source = case.build(1);
                    let bytes = source.byte_len();
                    let prepared = QuantWeight::prepare(source, &pool).unwrap().byte_len();
                    // Zero points take 4 or 8 bits where the file packs 2, 3, 5, 6 or 7.
                    let unpacked = if offsets == OffsetForm::Zeros { 320 * 576usize.div_ceil(group) / 2 } else { 0 };
                    assert!(prepared <= bytes + unpacked + bytes / 50 + 512, "{prepared} for {bytes}: {case:?}");
                }
            }
        }
    }
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let case = Case {
        rows: 4,
        cols: 8,
        bits: 4,
        group: 8,
        scales: ScaleForm::F32,
        offsets: OffsetForm::Symmetric,
        act_order: false,
    };
    let mut w = case.build(1);
    w.rows = 5;
    let error = QuantWeight::prepare(w, &Pool::new(1)).err().unwrap();
    assert!(error.to_string().contains("packed"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn any_shape(
        (rows, cols, bits, group) in (1usize..60, 1usize..150, 2u8..=8, 1usize..100),
        (scales, offsets, act_order) in (0usize..6, 0usize..6, any::<bool>()),
        (tokens, seed) in (1usize..20, any::<u32>()),
    ) {
        let offsets = if bits > 4 { offsets.min(4) } else { offsets };
        let case = Case { rows, cols, bits, group, scales: SCALES[scales], offsets: OFFSETS[offsets], act_order };
        check(case, tokens, u64::from(seed), pools());
    }
}
