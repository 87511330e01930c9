//! The specification: plain loops, every sum in f64, one thread. Slow, and right by inspection; other backends are checked
//! against it.

mod attention;
mod backward;
mod linear;
mod rowwise;
mod spatial;

use std::ops::Range;

use fourfold_tensor::Weight;

use crate::{AttentionSpec, Backend, DeviceWeight, KernelError, KvCache, LinearArg, Memory, RopeSpec, Tensor, Values};

/// The backend that defines what every operation means.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reference;

impl Memory for Reference {
    fn name(&self) -> String {
        "reference".to_owned()
    }

    /// Keeps the weight as it is stored.
    fn upload(&self, weight: Weight) -> Result<DeviceWeight, KernelError> {
        validate(&weight)?;
        Ok(DeviceWeight::new(weight.rows(), weight.cols(), weight.byte_len(), weight))
    }
}

impl Backend for Reference {
    fn linear(&self, x: &Tensor, weights: &[LinearArg]) -> Vec<Tensor> {
        let one = |arg: &LinearArg| linear::linear(x, arg.weight.get(), 0..arg.weight.rows(), arg.bias);
        weights.iter().map(one).collect()
    }

    fn linear_rows(&self, x: &Tensor, weight: &DeviceWeight, rows: Range<usize>) -> Tensor {
        linear::linear(x, weight.get(), rows, None)
    }

    fn linear_transposed(&self, x: &Tensor, weight: &DeviceWeight, rows: Range<usize>) -> Tensor {
        linear::linear_transposed(x, weight.get(), rows)
    }

    fn embedding(&self, weight: &DeviceWeight, ids: &[u32]) -> Tensor {
        let stored: &Weight = weight.get();
        let mut y = Tensor::zeros(ids.len(), weight.cols());
        for (row, &id) in y.host_mut().chunks_exact_mut(weight.cols()).zip(ids) {
            stored.read_row(id as usize, row);
        }
        y
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Tensor {
        rowwise::rms_norm(x, weight, eps)
    }

    fn rope(&self, x: &mut Tensor, cos: &Tensor, sin: &Tensor, spec: &RopeSpec) {
        rowwise::rope(x, cos, sin, spec);
    }

    fn attention(&self, q: &Tensor, keys: &KvCache, values: Values, spec: &AttentionSpec) -> Tensor {
        attention::attention(q, keys, values, spec)
    }

    fn swiglu(&self, gate: Tensor, up: &Tensor) -> Tensor {
        rowwise::swiglu(gate, up)
    }

    fn add(&self, x: &mut Tensor, y: &Tensor) {
        rowwise::add(x, y);
    }

    fn columns(&self, x: &Tensor, range: Range<usize>) -> Tensor {
        rowwise::columns(x, range)
    }

    fn concat_columns(&self, a: &Tensor, b: &Tensor) -> Tensor {
        rowwise::concat_columns(a, b)
    }

    fn gather_rows(&self, x: &Tensor, rows: &[usize]) -> Tensor {
        rowwise::gather_rows(x, rows)
    }

    fn scatter_add_rows(&self, x: &mut Tensor, y: &Tensor, rows: &[usize], factors: &[f32]) {
        rowwise::scatter_add_rows(x, y, rows, factors);
    }
}

/// Whether the parts of a weight fit together; the other forms cannot be made of parts that do not.
fn validate(weight: &Weight) -> Result<(), KernelError> {
    match weight {
        Weight::Dense(_) | Weight::Fp8(_) | Weight::Sparse(_) => Ok(()),
        Weight::Quantized(w) => Ok(w.validate()?),
        Weight::LowRank(w) => validate(w.up()).and_then(|()| validate(w.down())),
        Weight::Sum(w) => w.terms().iter().try_for_each(validate),
    }
}
