//! The kernels, and how each uses its buffers.

use crate::device::Kernel;

const PARAMS: &str = include_str!("kernels/params.wgsl");
const DENSE: &str = include_str!("kernels/form/dense.wgsl");
const QUANTIZED: &str = include_str!("kernels/form/quantized.wgsl");
const FP8: &str = include_str!("kernels/form/fp8.wgsl");
const SPARSE: &str = include_str!("kernels/form/sparse.wgsl");

/// The kernels over weights of one form. Their buffers: weight, x, y, bias.
#[derive(Debug)]
pub struct FormKernels {
    /// Few tokens.
    pub gemv: Kernel,
    /// Many.
    pub gemm: Kernel,
    /// `x · W`.
    pub transposed: Kernel,
    /// Rows.
    pub embedding: Kernel,
}

/// A kernel's source after that of a form.
macro_rules! over_weight {
    ($form:ident, $name:literal, $file:literal) => {
        Kernel { name: $name, source: &[PARAMS, $form, include_str!($file)], written: &[false, false, true, false] }
    };
}

/// Dense weights.
pub static OF_DENSE: FormKernels = FormKernels {
    gemv: over_weight!(DENSE, "dense gemv", "kernels/gemv.wgsl"),
    gemm: over_weight!(DENSE, "dense gemm", "kernels/gemm.wgsl"),
    transposed: over_weight!(DENSE, "dense transposed", "kernels/transposed.wgsl"),
    embedding: over_weight!(DENSE, "dense embedding", "kernels/embedding.wgsl"),
};

/// Quantized weights.
pub static OF_QUANTIZED: FormKernels = FormKernels {
    gemv: over_weight!(QUANTIZED, "quantized gemv", "kernels/gemv.wgsl"),
    gemm: over_weight!(QUANTIZED, "quantized gemm", "kernels/gemm.wgsl"),
    transposed: over_weight!(QUANTIZED, "quantized transposed", "kernels/transposed.wgsl"),
    embedding: over_weight!(QUANTIZED, "quantized embedding", "kernels/embedding.wgsl"),
};

/// 8-bit floats.
pub static OF_FP8: FormKernels = FormKernels {
    gemv: over_weight!(FP8, "fp8 gemv", "kernels/gemv.wgsl"),
    gemm: over_weight!(FP8, "fp8 gemm", "kernels/gemm.wgsl"),
    transposed: over_weight!(FP8, "fp8 transposed", "kernels/transposed.wgsl"),
    embedding: over_weight!(FP8, "fp8 embedding", "kernels/embedding.wgsl"),
};

/// Sparse weights.
pub static OF_SPARSE: FormKernels = FormKernels {
    gemv: over_weight!(SPARSE, "sparse gemv", "kernels/gemv.wgsl"),
    gemm: over_weight!(SPARSE, "sparse gemm", "kernels/gemm.wgsl"),
    transposed: over_weight!(SPARSE, "sparse transposed", "kernels/transposed.wgsl"),
    embedding: over_weight!(SPARSE, "sparse embedding", "kernels/embedding.wgsl"),
};

/// x, weight, y.
pub static RMS_NORM: Kernel =
    Kernel { name: "rms_norm", source: &[include_str!("kernels/rms_norm.wgsl")], written: &[false, false, true] };

/// x, y.
pub static ELEMENTWISE: Kernel =
    Kernel { name: "elementwise", source: &[include_str!("kernels/elementwise.wgsl")], written: &[true, false] };

/// x, cosines, sines.
pub static ROPE: Kernel =
    Kernel { name: "rope", source: &[include_str!("kernels/rope.wgsl")], written: &[true, false, false] };

/// x, rows, y.
pub static COPY: Kernel =
    Kernel { name: "copy", source: &[include_str!("kernels/copy.wgsl")], written: &[false, false, true] };

/// x, y, rows, factors.
pub static SCATTER: Kernel =
    Kernel { name: "scatter", source: &[include_str!("kernels/scatter.wgsl")], written: &[true, false, false, false] };

/// x, cache.
pub static APPEND: Kernel =
    Kernel { name: "append", source: &[include_str!("kernels/append.wgsl")], written: &[false, true] };

/// q, keys, values, y.
pub static ATTENTION: Kernel = Kernel {
    name: "attention",
    source: &[include_str!("kernels/attention.wgsl")],
    written: &[false, false, false, true],
};
