//! The backend, over any device.

use std::any::Any;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use fourfold_kernels::composite::{self, Composite, LeafArg, Leaves, Product};
use fourfold_kernels::{
    AttentionSpec, Backend, DeviceUsage, DeviceWeight, KernelError, KvCache, KvData, LinearArg, Memory, RopeSpec,
    Tensor, Values as AttentionValues,
};
use fourfold_tensor::Weight;

use crate::device::{Buffer, Device, Kernel, Launch};
use crate::kernels::{ATTENTION, COPY, ELEMENTWISE, RMS_NORM, ROPE, SCATTER};
use crate::leaf::{Leaf, Part};
use crate::tensor::{Cache, Values, folded, groups_for, values};
use crate::wgpu::{Adapter, Choice, OpenError, open};

/// Tokens up to which each is multiplied by itself; more go through tiles.
const FEW: usize = 4;

/// Rows that a workgroup of the product of few tokens has.
const GEMV_ROWS: usize = 4;

/// Rows and tokens of a tile.
const TILE: usize = 32;

/// Columns that a workgroup of the other kernels over weights has.
const COLUMNS: usize = 512;

/// Columns of a query head and of a value head that attention has room for.
const LARGEST_HEAD: usize = 1024;

/// Launches of so many tokens or rows at a time: an axis of the grid is no longer.
const MOST: usize = 32_768;

/// The output has a bias.
const BIAS: u32 = 1;
/// The output is added to.
const ADD: u32 = 2;

/// A graphics card, or what plays one.
#[derive(Clone, Debug)]
pub struct Gpu {
    device: Arc<dyn Device>,
}

/// Where a product's input is read and its output written.
#[derive(Clone, Copy)]
struct Ends<'a> {
    x: &'a Buffer,
    y: &'a Buffer,
    bias: Option<&'a Buffer>,
    tokens: usize,
    x_stride: usize,
    x_first: usize,
    y_stride: usize,
    y_first: usize,
    /// What the weight counts from: the first output's bias, or the first row's id.
    weight_first: usize,
    add: bool,
}

impl Gpu {
    /// Opens a device, and takes `limit` bytes at most of its memory.
    ///
    /// # Errors
    /// There is none, or none such, or it cannot be used.
    pub fn open(choice: Choice, limit: Option<u64>) -> Result<(Self, Adapter), OpenError> {
        let (device, adapter) = open(choice, limit)?;
        let gpu = Self { device: Arc::new(device) };
        // A driver that compiles no kernel says so now.
        gpu.take(gpu.zeros(1, 1))?;
        Ok((gpu, adapter))
    }

    /// A backend over a device.
    pub fn over(device: Arc<dyn Device>) -> Self {
        Self { device }
    }

    fn new_tensor(&self, rows: usize, cols: usize) -> Tensor {
        self.with_buffer(rows, cols, self.device.alloc(rows * cols * size_of::<f32>()))
    }

    fn with_buffer(&self, rows: usize, cols: usize, buffer: Buffer) -> Tensor {
        Tensor::on_device(rows, cols, Values { device: Arc::clone(&self.device), buffer })
    }

    fn run(
        &self,
        kernel: &'static Kernel,
        constants: &[(&'static str, u32)],
        buffers: &[&Buffer],
        params: &[u32],
        groups: [u32; 3],
    ) {
        self.device.launch(&Launch { kernel, constants, buffers, params, groups });
    }

    fn indices(&self, rows: &[usize]) -> Buffer {
        let rows: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
        self.device.upload(bytemuck::cast_slice(&rows))
    }

    /// Runs a kernel over a part of a weight: `rows` of it, counted from the part's first.
    fn over_part(
        &self,
        leaf: &Leaf,
        kernel: &'static Kernel,
        part: &Part,
        rows: Range<usize>,
        ends: &Ends,
        groups: [u32; 3],
    ) {
        let s = &part.sections;
        let flags = if ends.bias.is_some() { BIAS } else { 0 } | if ends.add { ADD } else { 0 };
        let params = [
            rows.start as u32,
            rows.len() as u32,
            leaf.cols as u32,
            s.words,
            s.scales,
            s.scale_floats,
            s.scale_span,
            s.offsets,
            s.offset_floats,
            s.offset_span,
            s.extra,
            s.columns,
            ends.tokens as u32,
            ends.x_stride as u32,
            ends.x_first as u32,
            ends.y_stride as u32,
            ends.y_first as u32,
            flags,
            ends.weight_first as u32,
            0,
        ];
        let buffers = [&part.buffer, ends.x, ends.y, ends.bias.unwrap_or(&part.buffer)];
        self.run(kernel, &leaf.constants, &buffers, &params, groups);
    }

    /// Parts of a weight that have some of its rows, with these rows counted from the part's first and from the range's first.
    fn parts<'a>(leaf: &'a Leaf, rows: &Range<usize>) -> impl Iterator<Item = (&'a Part, Range<usize>, usize)> {
        let rows = rows.clone();
        leaf.parts.iter().filter_map(move |part| {
            let (first, end) = (rows.start.max(part.rows.start), rows.end.min(part.rows.end));
            (first < end).then(|| (part, first - part.rows.start..end - part.rows.start, first - rows.start))
        })
    }

    /// `y = x · W[rows, :]ᵀ`.
    fn product(&self, leaf: &Leaf, rows: Range<usize>, ends: &Ends) {
        for (part, of_part, first) in Self::parts(leaf, &rows) {
            let ends = Ends { y_first: ends.y_first + first, weight_first: first, ..*ends };
            let (kernel, groups) = if ends.tokens <= FEW {
                let [x, y, _] = folded(of_part.len().div_ceil(GEMV_ROWS));
                (&leaf.kernels.gemv, [x, y, ends.tokens as u32])
            } else {
                let [y, z, _] = folded(of_part.len().div_ceil(TILE));
                (&leaf.kernels.gemm, [ends.tokens.div_ceil(TILE) as u32, y, z])
            };
            self.over_part(leaf, kernel, part, of_part, &ends, groups);
        }
    }

    fn elementwise(&self, operation: u32, x: &Tensor, y: &Tensor) {
        let count = x.rows() * x.cols();
        let params = [count as u32, y.cols() as u32];
        let (x, y) = (&values(x).buffer, &values(y).buffer);
        self.run(&ELEMENTWISE, &[("OPERATION", operation)], &[x, y], &params, groups_for(count));
    }

    /// Copies `cols` columns of `rows` rows. `named` are the rows of x; otherwise each is taken `repeat` times.
    #[expect(clippy::too_many_arguments, reason = "two places, and what lies between them")]
    fn copy(
        &self,
        x: &Tensor,
        x_first: usize,
        named: Option<&Buffer>,
        repeat: usize,
        y: &Tensor,
        y_first: usize,
        rows: usize,
        cols: usize,
    ) {
        let count = rows * cols;
        let params = [
            count as u32,
            cols as u32,
            x.cols() as u32,
            x_first as u32,
            y.cols() as u32,
            y_first as u32,
            repeat as u32,
        ];
        let from = &values(x).buffer;
        let buffers = [from, named.unwrap_or(from), &values(y).buffer];
        self.run(&COPY, &[("NAMED", u32::from(named.is_some()))], &buffers, &params, groups_for(count));
    }
}

impl Memory for Gpu {
    fn name(&self) -> String {
        format!("gpu {}", self.device.name())
    }

    fn upload(&self, weight: Weight) -> Result<DeviceWeight, KernelError> {
        let (rows, cols) = (weight.rows(), weight.cols());
        let weight = Composite::prepare(weight, &mut |leaf| Leaf::upload(&*self.device, leaf))?;
        Ok(DeviceWeight::new(rows, cols, weight.total(&Leaf::byte_len), weight))
    }

    fn tensor(&self, rows: usize, cols: usize, values: Vec<f32>) -> Tensor {
        assert_eq!(rows * cols, values.len(), "[{rows}, {cols}] does not hold {} values", values.len());
        self.with_buffer(rows, cols, self.device.upload(bytemuck::cast_slice(&values)))
    }

    fn zeros(&self, rows: usize, cols: usize) -> Tensor {
        let zeros = self.new_tensor(rows, cols);
        let count = rows * cols;
        let (x, other) = (&values(&zeros).buffer, self.device.alloc(4));
        self.run(&ELEMENTWISE, &[("OPERATION", 3)], &[x, &other], &[count as u32, 1], groups_for(count));
        zeros
    }

    fn read<'a>(&self, x: &'a Tensor) -> Result<Cow<'a, [f32]>, KernelError> {
        let bytes = self.device.download(&values(x).buffer, x.rows() * x.cols() * size_of::<f32>())?;
        Ok(Cow::Owned(bytemuck::pod_collect_to_vec(&bytes)))
    }

    fn take(&self, x: Tensor) -> Result<Vec<f32>, KernelError> {
        Ok(self.read(&x)?.into_owned())
    }

    fn device_usage(&self) -> Option<DeviceUsage> {
        Some(self.device.usage())
    }
}

impl Leaves<Leaf> for Gpu {
    fn shape(&self, leaf: &Leaf) -> [usize; 2] {
        [leaf.rows, leaf.cols]
    }

    fn linear(&self, x: &Tensor, leaves: &[LeafArg<Leaf>]) -> Vec<Tensor> {
        let one = |arg: &LeafArg<Leaf>| {
            let leaf = arg.leaf;
            assert_eq!(x.cols(), leaf.cols, "an input of {} columns for a weight of {}", x.cols(), leaf.cols);
            let y = self.new_tensor(x.rows(), leaf.rows);
            self.product(
                leaf,
                0..leaf.rows,
                &Ends {
                    x: &values(x).buffer,
                    y: &values(&y).buffer,
                    bias: arg.bias.map(|bias| &values(bias).buffer),
                    tokens: x.rows(),
                    x_stride: leaf.cols,
                    x_first: 0,
                    y_stride: leaf.rows,
                    y_first: 0,
                    weight_first: 0,
                    add: false,
                },
            );
            y
        };
        leaves.iter().map(one).collect()
    }

    fn linear_rows(&self, x: &Tensor, leaf: &Leaf, rows: Range<usize>) -> Tensor {
        assert_eq!(x.cols(), leaf.cols, "an input of {} columns for a weight of {}", x.cols(), leaf.cols);
        let y = self.new_tensor(x.rows(), rows.len());
        let y_stride = rows.len();
        self.product(
            leaf,
            rows,
            &Ends {
                x: &values(x).buffer,
                y: &values(&y).buffer,
                bias: None,
                tokens: x.rows(),
                x_stride: leaf.cols,
                x_first: 0,
                y_stride,
                y_first: 0,
                weight_first: 0,
                add: false,
            },
        );
        y
    }

    fn linear_transposed(&self, x: &Tensor, leaf: &Leaf, rows: Range<usize>) -> Tensor {
        assert_eq!(x.cols(), rows.len(), "an input of {} columns for {} rows", x.cols(), rows.len());
        let y = self.new_tensor(x.rows(), leaf.cols);
        for first_token in (0..x.rows()).step_by(MOST) {
            let tokens = MOST.min(x.rows() - first_token);
            for (part, of_part, first) in Self::parts(leaf, &rows) {
                let ends = Ends {
                    x: &values(x).buffer,
                    y: &values(&y).buffer,
                    bias: None,
                    tokens,
                    x_stride: x.cols(),
                    x_first: first_token * x.cols() + first,
                    y_stride: leaf.cols,
                    y_first: first_token * leaf.cols,
                    weight_first: 0,
                    add: first > 0,
                };
                let groups = [leaf.cols.div_ceil(COLUMNS) as u32, tokens as u32, 1];
                self.over_part(leaf, &leaf.kernels.transposed, part, of_part, &ends, groups);
            }
        }
        y
    }

    fn embedding(&self, leaf: &Leaf, ids: &[u32]) -> Tensor {
        let y = self.new_tensor(ids.len(), leaf.cols);
        for (i, some) in ids.chunks(MOST).enumerate() {
            let named = self.device.upload(bytemuck::cast_slice(some));
            for part in &leaf.parts {
                let ends = Ends {
                    x: &named,
                    y: &values(&y).buffer,
                    bias: None,
                    tokens: some.len(),
                    x_stride: 1,
                    x_first: 0,
                    y_stride: leaf.cols,
                    y_first: i * MOST * leaf.cols,
                    weight_first: part.rows.start,
                    add: false,
                };
                let groups = [leaf.cols.div_ceil(COLUMNS) as u32, some.len() as u32, 1];
                let rows = 0..part.rows.len();
                self.over_part(leaf, &leaf.kernels.embedding, part, rows, &ends, groups);
            }
        }
        y
    }

    fn add(&self, x: &mut Tensor, y: &Tensor) {
        Backend::add(self, x, y);
    }

    fn add_bias(&self, y: &mut Tensor, bias: &Tensor) {
        self.elementwise(2, y, bias);
    }
}

impl Backend for Gpu {
    fn linear(&self, x: &Tensor, weights: &[LinearArg]) -> Vec<Tensor> {
        let products: Vec<Product<Leaf>> =
            weights.iter().map(|arg| Product { weight: arg.weight.get(), bias: arg.bias }).collect();
        composite::linear(self, x, &products)
    }

    fn linear_add(&self, x: &Tensor, arg: LinearArg, sum: &mut Tensor) {
        let weight: &Composite<Leaf> = arg.weight.get();
        let Composite::Leaf(leaf) = weight else {
            let y = Backend::linear(self, x, &[arg]);
            return y.iter().for_each(|y| Backend::add(self, sum, y));
        };
        assert_eq!((x.rows(), x.cols(), leaf.rows), (sum.rows(), leaf.cols, sum.cols()), "a sum of another shape");
        self.product(
            leaf,
            0..leaf.rows,
            &Ends {
                x: &values(x).buffer,
                y: &values(sum).buffer,
                bias: arg.bias.map(|bias| &values(bias).buffer),
                tokens: x.rows(),
                x_stride: leaf.cols,
                x_first: 0,
                y_stride: leaf.rows,
                y_first: 0,
                weight_first: 0,
                add: true,
            },
        );
    }

    fn linear_rows(&self, x: &Tensor, weight: &DeviceWeight, rows: Range<usize>) -> Tensor {
        weight.get::<Composite<Leaf>>().linear_rows(self, x, rows)
    }

    fn linear_transposed(&self, x: &Tensor, weight: &DeviceWeight, rows: Range<usize>) -> Tensor {
        weight.get::<Composite<Leaf>>().linear_transposed(self, x, rows)
    }

    fn embedding(&self, weight: &DeviceWeight, ids: &[u32]) -> Tensor {
        weight.get::<Composite<Leaf>>().embedding(self, ids)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Tensor {
        assert_eq!(x.cols(), weight.cols(), "a norm of {} elements on rows of {}", weight.cols(), x.cols());
        let y = self.new_tensor(x.rows(), x.cols());
        let buffers = [&values(x).buffer, &values(weight).buffer, &values(&y).buffer];
        self.run(&RMS_NORM, &[], &buffers, &[x.cols() as u32, eps.to_bits(), x.rows() as u32], folded(x.rows()));
        y
    }

    fn rope(&self, x: &mut Tensor, cos: &Tensor, sin: &Tensor, spec: &RopeSpec) {
        let (heads, half) = (x.rows() * x.cols() / spec.head_dim, cos.cols());
        assert!(heads.is_multiple_of(spec.heads), "rope: no whole number of tokens");
        assert!(spec.start + 2 * half <= spec.head_dim, "rope: {half} pairs from {} in {}", spec.start, spec.head_dim);
        assert!(spec.first_position + heads / spec.heads <= cos.rows(), "rope: a position beyond the tables");
        let pairs = heads * half;
        let params = [
            pairs as u32,
            half as u32,
            spec.heads as u32,
            spec.head_dim as u32,
            spec.start as u32,
            u32::from(spec.interleaved),
            spec.first_position as u32,
        ];
        let buffers = [&values(x).buffer, &values(cos).buffer, &values(sin).buffer];
        self.run(&ROPE, &[], &buffers, &params, groups_for(pairs));
    }

    fn attention(&self, q: &Tensor, keys: &KvCache, from: AttentionValues, spec: &AttentionSpec) -> Tensor {
        let AttentionSpec { heads, kv_heads, key_dim, value_dim, .. } = *spec;
        assert_eq!(q.cols(), heads * key_dim, "queries of {} columns for {heads} heads of {key_dim}", q.cols());
        assert_eq!(keys.width(), kv_heads * key_dim, "keys of width {} for {kv_heads} heads", keys.width());
        assert!(spec.first_position + q.rows() <= keys.len(), "a query beyond the {} cached positions", keys.len());
        assert!(key_dim.max(value_dim) <= LARGEST_HEAD, "heads of {key_dim} and {value_dim}: {LARGEST_HEAD} at most");
        let y = self.new_tensor(q.rows(), heads * value_dim);
        let (of_values, value_stride) = match from {
            AttentionValues::Cache(cache) => (cache, value_dim),
            AttentionValues::PrefixOfKeys => (keys, key_dim),
        };
        let (keys, of_values) = (cached(keys), cached(of_values));
        assert_eq!(keys.dtype(), of_values.dtype(), "keys and values are cached in one type");
        let (Some(k), Some(v)) = (keys.buffer(), of_values.buffer()) else { return y };
        let params = [
            heads as u32,
            kv_heads as u32,
            key_dim as u32,
            value_dim as u32,
            spec.scale.to_bits(),
            spec.first_position as u32,
            spec.window.unwrap_or(0) as u32,
            keys.words() as u32,
            of_values.words() as u32,
            value_stride as u32,
        ];
        let buffers = [&values(q).buffer, k, v, &values(&y).buffer];
        self.run(&ATTENTION, &[("DTYPE", keys.dtype())], &buffers, &params, [heads as u32, q.rows() as u32, 1]);
        y
    }

    fn swiglu(&self, gate: Tensor, up: &Tensor) -> Tensor {
        assert_eq!((gate.rows(), gate.cols()), (up.rows(), up.cols()), "swiglu of unequal shapes");
        self.elementwise(1, &gate, up);
        gate
    }

    fn add(&self, x: &mut Tensor, y: &Tensor) {
        assert_eq!((x.rows(), x.cols()), (y.rows(), y.cols()), "add of unequal shapes");
        self.elementwise(0, x, y);
    }

    fn columns(&self, x: &Tensor, range: Range<usize>) -> Tensor {
        assert!(range.end <= x.cols(), "columns {range:?} of {}", x.cols());
        let y = self.new_tensor(x.rows(), range.len());
        self.copy(x, range.start, None, 1, &y, 0, x.rows(), range.len());
        y
    }

    fn concat_columns(&self, a: &Tensor, b: &Tensor) -> Tensor {
        assert_eq!(a.rows(), b.rows(), "concatenating unequal numbers of rows");
        let y = self.new_tensor(a.rows(), a.cols() + b.cols());
        self.copy(a, 0, None, 1, &y, 0, a.rows(), a.cols());
        self.copy(b, 0, None, 1, &y, a.cols(), b.rows(), b.cols());
        y
    }

    fn gather_rows(&self, x: &Tensor, rows: &[usize]) -> Tensor {
        assert!(rows.iter().all(|&row| row < x.rows()), "a row beyond {}", x.rows());
        let y = self.new_tensor(rows.len(), x.cols());
        match rows {
            [] => {}
            // Neighbours need no list.
            [first, ..] if rows.iter().enumerate().all(|(i, &row)| row == first + i) => {
                self.copy(x, first * x.cols(), None, 1, &y, 0, rows.len(), x.cols());
            }
            _ => self.copy(x, 0, Some(&self.indices(rows)), 1, &y, 0, rows.len(), x.cols()),
        }
        y
    }

    fn split_heads(&self, kv: &Tensor, shared: &Tensor, heads: usize, own: usize) -> [Tensor; 2] {
        assert_eq!(kv.rows(), shared.rows() * heads, "split heads: rows");
        let keys = self.new_tensor(kv.rows(), own + shared.cols());
        self.copy(kv, 0, None, 1, &keys, 0, kv.rows(), own);
        self.copy(shared, 0, None, heads, &keys, own, kv.rows(), shared.cols());
        [keys, self.columns(kv, own..kv.cols())]
    }

    fn scatter_add_rows(&self, x: &mut Tensor, y: &Tensor, rows: &[usize], factors: &[f32]) {
        assert_eq!((x.cols(), y.rows(), y.rows()), (y.cols(), rows.len(), factors.len()), "scatter of unequal shapes");
        assert!(rows.iter().all(|&row| row < x.rows()), "a row beyond {}", x.rows());
        let mut seen = vec![false; x.rows()];
        let once = rows.iter().all(|&row| !std::mem::replace(&mut seen[row], true));
        let (named, factors) = (self.indices(rows), self.device.upload(bytemuck::cast_slice(factors)));
        let params = [y.rows() as u32, y.cols() as u32];
        let buffers = [&values(x).buffer, &values(y).buffer, &named, &factors];
        let count = if once { y.rows() * y.cols() } else { y.cols() };
        self.run(&SCATTER, &[("ONCE", u32::from(once))], &buffers, &params, groups_for(count));
    }
}

/// A cache's rows on the device.
fn cached(cache: &KvCache) -> &Cache {
    match cache.data() {
        KvData::Device(data) => {
            let data: &dyn Any = &**data;
            data.downcast_ref().expect("a cache of this device")
        }
        KvData::F32(_) | KvData::F16(_) | KvData::Bf16(_) => panic!("a cache of this device"),
    }
}
