//! Products in f32, from weights written out a panel at a time: for measuring the weights' quantization alone, and for the
//! transposed product of many tokens.

use std::ops::Range;

use super::kernel::panel_kernel;
use super::layout::{BLOCK, STRIP};
use super::simd::Simd;
use super::{Context, QuantWeight};
use crate::Tensor;
use crate::cpu::Isa;
use crate::cpu::pool::SendPtr;

/// Blocks of a panel: 16 rows x 256 columns of f32 are 16 KiB, half of a first-level cache.
pub(super) const PANEL: usize = 8;

/// Tokens multiplied at a time.
pub(super) const TOKENS: usize = 8;

/// `y = x · W[rows, :]ᵀ` without rounding the input.
pub(super) fn linear_rows(context: Context, x: &Tensor, w: &QuantWeight, rows: Range<usize>) -> Tensor {
    let (tokens, width) = (x.rows(), rows.len());
    let mut y = Tensor::zeros(tokens, width);
    if tokens == 0 || rows.is_empty() {
        return y;
    }
    let stream = w.columns.blocks * BLOCK;
    let mut streamed = vec![0.0; tokens * stream];
    for (t, to) in streamed.chunks_exact_mut(stream.max(1)).enumerate() {
        w.columns.gather(x.row(t), to);
    }
    let (panel_of, axpy_of) = (panel_kernel(context.isa, w), row_kernel(context.isa));
    let first_strip = rows.start / STRIP;
    let to = SendPtr::new(y.host_mut());
    context.pool.for_ranges(rows.end.div_ceil(STRIP) - first_strip, 1, |strips| {
        let mut panel = vec![[0.0; STRIP]; PANEL * BLOCK];
        let mut sums = vec![[0.0; STRIP]; tokens];
        for strip in strips.start + first_strip..strips.end + first_strip {
            sums.fill([0.0; STRIP]);
            for block in (0..w.columns.blocks).step_by(PANEL) {
                let blocks = PANEL.min(w.columns.blocks - block);
                // SAFETY: strip and blocks exist, the panel has room, the instruction set is available, and `streamed` has
                // the columns of each token.
                unsafe {
                    panel_of(w, strip, block, blocks, panel.as_mut_ptr());
                    let x = streamed.as_ptr().add(block * BLOCK);
                    axpy_of(&panel[..blocks * BLOCK], x, stream, &mut sums);
                }
            }
            for (t, sums) in sums.iter().enumerate() {
                for (lane, &sum) in sums.iter().enumerate() {
                    let row = strip * STRIP + lane;
                    if rows.contains(&row) {
                        // SAFETY: within y; each row is one thread's.
                        unsafe { *to.get().add(t * width + row - rows.start) = sum };
                    }
                }
            }
        }
    });
    y
}

/// `sums[t] += Σ_c panel[c] · x[t · stride + c]`.
type RowKernel = unsafe fn(&[[f32; STRIP]], *const f32, usize, &mut [[f32; STRIP]]);

/// `sums[t · panel.len() + c] += panel[c] ⊙ x[t]`.
pub(super) type ColumnKernel = unsafe fn(&[[f32; STRIP]], &[[f32; STRIP]], &mut [[f32; STRIP]]);

#[inline(always)]
unsafe fn rows<S: Simd>(panel: &[[f32; STRIP]], x: *const f32, stride: usize, sums: &mut [[f32; STRIP]]) {
    // SAFETY: promised by the caller.
    unsafe {
        let mut t = 0;
        while t + TOKENS <= sums.len() {
            rows_of_tile::<S, TOKENS>(panel, x.add(t * stride), stride, sums.as_mut_ptr().add(t));
            t += TOKENS;
        }
        while t < sums.len() {
            rows_of_tile::<S, 1>(panel, x.add(t * stride), stride, sums.as_mut_ptr().add(t));
            t += 1;
        }
    }
}

#[inline(always)]
unsafe fn rows_of_tile<S: Simd, const T: usize>(
    panel: &[[f32; STRIP]],
    x: *const f32,
    stride: usize,
    sums: *mut [f32; STRIP],
) {
    // SAFETY: promised by the caller.
    unsafe {
        let mut totals = [S::splat(0.0); T];
        for (c, weights) in panel.iter().enumerate() {
            let weights = S::load(weights.as_ptr());
            for (t, total) in totals.iter_mut().enumerate() {
                *total = S::fma(weights, S::splat(*x.add(t * stride + c)), *total);
            }
        }
        for (t, total) in totals.into_iter().enumerate() {
            let to = sums.add(t).cast::<f32>();
            S::store(to, S::add(S::load(to), total));
        }
    }
}

#[inline(always)]
unsafe fn columns<S: Simd>(panel: &[[f32; STRIP]], x: &[[f32; STRIP]], sums: &mut [[f32; STRIP]]) {
    // SAFETY: promised by the caller; `sums` has a vector for each token and column.
    unsafe {
        for (x, sums) in x.iter().zip(sums.chunks_exact_mut(panel.len())) {
            let x = S::load(x.as_ptr());
            for (weights, sum) in panel.iter().zip(sums) {
                S::store(sum.as_mut_ptr(), S::fma(S::load(weights.as_ptr()), x, S::load(sum.as_ptr())));
            }
        }
    }
}

macro_rules! f32_kernels_of {
    ($module:ident, $simd:ident $(, $features:literal)?) => {
        mod $module {
            use super::super::simd::$simd;
            use super::STRIP;

            $(#[target_feature(enable = $features)])?
            pub unsafe fn rows(panel: &[[f32; STRIP]], x: *const f32, stride: usize, sums: &mut [[f32; STRIP]]) {
                // SAFETY: promised by the caller.
                unsafe { super::rows::<$simd>(panel, x, stride, sums) }
            }

            $(#[target_feature(enable = $features)])?
            pub unsafe fn columns(panel: &[[f32; STRIP]], x: &[[f32; STRIP]], sums: &mut [[f32; STRIP]]) {
                // SAFETY: promised by the caller.
                unsafe { super::columns::<$simd>(panel, x, sums) }
            }
        }
    };
}

f32_kernels_of!(portable, Portable);
#[cfg(target_arch = "x86_64")]
f32_kernels_of!(avx2, Avx2, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
f32_kernels_of!(avx512, Avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni");

fn row_kernel(isa: Isa) -> RowKernel {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::rows,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::rows,
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx512 | Isa::Avx2 => portable::rows,
        Isa::Portable => portable::rows,
    }
}

pub(super) fn column_kernel(isa: Isa) -> ColumnKernel {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::columns,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::columns,
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx512 | Isa::Avx2 => portable::columns,
        Isa::Portable => portable::columns,
    }
}
