//! The operations every backend has.

use std::any::Any;
use std::borrow::Cow;
use std::ops::Range;

use fourfold_tensor::Weight;

use crate::{KernelError, KvCache, Tensor};

/// A weight in the layout its backend's kernels read. Packed codes are still packed: [`DeviceWeight::byte_len`] is what it
/// takes in memory.
pub struct DeviceWeight {
    rows: usize,
    cols: usize,
    byte_len: usize,
    inner: Box<dyn Any + Send + Sync>,
}

impl DeviceWeight {
    /// Wraps a backend's own form of a `[rows, cols]` weight.
    pub fn new<T: Any + Send + Sync>(rows: usize, cols: usize, byte_len: usize, inner: T) -> Self {
        Self { rows, cols, byte_len, inner: Box::new(inner) }
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes it takes in memory.
    pub fn byte_len(&self) -> usize {
        self.byte_len
    }

    /// The backend's own form.
    ///
    /// # Panics
    /// When another backend made it.
    pub fn get<T: Any>(&self) -> &T {
        self.inner.downcast_ref().expect("a weight is used by the backend that made it")
    }
}

/// One of the weights that multiply the same input.
#[derive(Clone, Copy)]
pub struct LinearArg<'a> {
    /// `[out, in]`.
    pub weight: &'a DeviceWeight,
    /// `[1, out]`.
    pub bias: Option<&'a Tensor>,
}

/// Where the rotation applies and how the pairs lie.
#[derive(Clone, Copy, Debug)]
pub struct RopeSpec {
    /// Elements of a head: the tensor is `[tokens · heads, head_dim]`.
    pub head_dim: usize,
    /// Heads of a token.
    pub heads: usize,
    /// First element of the rotated part of a head; the rotated part has `2 · cos.cols()` elements.
    pub start: usize,
    /// Whether a pair is two neighbours (DeepSeek, GPT-J) rather than element i and i + half (llama in Hugging Face's
    /// layout, GPT-NeoX).
    pub interleaved: bool,
    /// Position of the first token.
    pub first_position: usize,
}

/// Where attention finds its values.
#[derive(Clone, Copy)]
pub enum Values<'a> {
    /// A cache of their own, `[positions, kv_heads · value_dim]`.
    Cache(&'a KvCache),
    /// The first `value_dim` elements of each key: MLA, whose keys are `[latent | rotary]` and whose values are the latent.
    PrefixOfKeys,
}

/// The shape of an attention.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; query head h reads head `h · kv_heads / heads`.
    pub kv_heads: usize,
    /// Elements of a query and a key head.
    pub key_dim: usize,
    /// Elements of a value head.
    pub value_dim: usize,
    /// Factor of the scores, `1/√key_dim` most often.
    pub scale: f32,
    /// Position of the first query: query t sees keys `0 ..= first_position + t`.
    pub first_position: usize,
    /// With a sliding window of w, query at position p sees keys `p − w + 1 ..= p`.
    pub window: Option<usize>,
}

/// What a backend holds, and how values come to it and back. The defaults are those of a backend that computes in this process's
/// memory: nothing is copied.
///
/// A device that fails (memory, a lost connection) fails for good: its operations go on without a result, and every
/// [`Memory::read`] from then on says what happened.
pub trait Memory: Send + Sync {
    /// A short name with the instruction set: `cpu avx512`, `reference`.
    fn name(&self) -> String;

    /// Takes a weight into the layout the kernels read, without unpacking it.
    ///
    /// # Errors
    /// A form this backend has no kernel for, parts that do not fit together, or a device's memory that is used up.
    fn upload(&self, weight: Weight) -> Result<DeviceWeight, KernelError>;

    /// A tensor of given values.
    fn tensor(&self, rows: usize, cols: usize, values: Vec<f32>) -> Tensor {
        Tensor::new(rows, cols, values)
    }

    /// A tensor of zeros.
    fn zeros(&self, rows: usize, cols: usize) -> Tensor {
        Tensor::zeros(rows, cols)
    }

    /// The values of a tensor.
    ///
    /// # Errors
    /// The device failed, now or in an operation before.
    fn read<'a>(&self, x: &'a Tensor) -> Result<Cow<'a, [f32]>, KernelError> {
        Ok(Cow::Borrowed(x.host()))
    }

    /// The values of a tensor that is not needed any more.
    ///
    /// # Errors
    /// As [`Memory::read`].
    fn take(&self, x: Tensor) -> Result<Vec<f32>, KernelError> {
        Ok(x.into_host())
    }

    /// What the device has counted; `None` for a backend that computes in this process's memory.
    fn device_usage(&self) -> Option<DeviceUsage> {
        None
    }
}

/// What a device has counted since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceUsage {
    /// Bytes of all buffers now.
    pub live_bytes: u64,
    /// The most there were at a time.
    pub peak_bytes: u64,
    /// Kernels launched.
    pub launches: u64,
    /// Times values were read from the device.
    pub downloads: u64,
    /// Bytes read from it.
    pub downloaded_bytes: u64,
    /// Times values were written to the device.
    pub uploads: u64,
    /// Bytes written to it.
    pub uploaded_bytes: u64,
}

/// The operations of the forward pass. Object-safe: a model holds `Arc<dyn Backend>`.
///
/// All matrices are row-major. Shapes that do not fit are a caller's mistake and panic. Results do not depend on the number
/// of threads.
pub trait Backend: Memory {
    /// `y_i = x · W_iᵀ + b_i` for each weight: x `[tokens, in]`, y_i `[tokens, out_i]`. Weights that share an input are given
    /// together, so that it is prepared (quantized to int8, say) once.
    fn linear(&self, x: &Tensor, weights: &[LinearArg]) -> Vec<Tensor>;

    /// `sum += x · Wᵀ + b`: a layer that ends at the residual stream.
    fn linear_add(&self, x: &Tensor, weight: LinearArg, sum: &mut Tensor) {
        let y = self.linear(x, &[weight]);
        y.iter().for_each(|y| self.add(sum, y));
    }

    /// `y = x · W[rows, :]ᵀ`: some output features only. x `[tokens, in]`, y `[tokens, rows.len()]`.
    fn linear_rows(&self, x: &Tensor, weight: &DeviceWeight, rows: Range<usize>) -> Tensor;

    /// `y = x · W[rows, :]`: x `[tokens, rows.len()]`, y `[tokens, in]`. MLA's absorbed projections, and the gradient of a
    /// linear layer's input.
    fn linear_transposed(&self, x: &Tensor, weight: &DeviceWeight, rows: Range<usize>) -> Tensor;

    /// Rows of `weight` for `ids`: `[ids.len(), cols]`.
    fn embedding(&self, weight: &DeviceWeight, ids: &[u32]) -> Tensor;

    /// `x / √(mean(x²) + eps) · weight` over each row; weight `[1, cols]` (RMSNorm, Zhang & Sennrich 2019).
    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Tensor;

    /// Rotates parts of each head of `x` in place. `cos`, `sin`: `[positions, rotated / 2]`.
    fn rope(&self, x: &mut Tensor, cos: &Tensor, sin: &Tensor, spec: &RopeSpec);

    /// Causal softmax attention of `q` `[tokens, heads · key_dim]` over cached keys `[positions, kv_heads · key_dim]`:
    /// `[tokens, heads · value_dim]`. Never holds tokens x positions (online softmax, Milakov & Gimelshein 2018).
    fn attention(&self, q: &Tensor, keys: &KvCache, values: Values, spec: &AttentionSpec) -> Tensor;

    /// `silu(gate) ⊙ up`, of equal shapes.
    fn swiglu(&self, gate: Tensor, up: &Tensor) -> Tensor;

    /// `x += y`, of equal shapes.
    fn add(&self, x: &mut Tensor, y: &Tensor);

    /// Columns `range` of each row.
    fn columns(&self, x: &Tensor, range: Range<usize>) -> Tensor;

    /// `a` and `b` side by side.
    fn concat_columns(&self, a: &Tensor, b: &Tensor) -> Tensor;

    /// The named rows, in order, repeated ones too.
    fn gather_rows(&self, x: &Tensor, rows: &[usize]) -> Tensor;

    /// Heads `kv` `[tokens · heads, own + value]` and what all heads of a token share, `[tokens, shared]`, as keys
    /// `[tokens · heads, own + shared]` and values `[tokens · heads, value]`.
    fn split_heads(&self, kv: &Tensor, shared: &Tensor, heads: usize, own: usize) -> [Tensor; 2] {
        assert_eq!(kv.rows(), shared.rows() * heads, "split heads: rows");
        let every_head: Vec<usize> = (0..kv.rows()).map(|row| row / heads).collect();
        let keys = self.concat_columns(&self.columns(kv, 0..own), &self.gather_rows(shared, &every_head));
        [keys, self.columns(kv, own..kv.cols())]
    }

    /// `x[rows[i]] += factors[i] · y[i]` for each i.
    fn scatter_add_rows(&self, x: &mut Tensor, y: &Tensor, rows: &[usize], factors: &[f32]);
}
