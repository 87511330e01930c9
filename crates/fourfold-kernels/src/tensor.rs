//! Activations.

use std::any::Any;
use std::fmt::Debug;

use half::bf16;

use crate::KvDtype;
use crate::kv::DeviceCache;

/// A matrix of f32 activations, row-major, held by a backend. Rows are tokens, most often; a tensor of heads is the same
/// data seen as `[tokens · heads, head_dim]` ([`Tensor::reshape`]).
///
/// Layers do not look inside: they pass tensors to [`crate::Backend`] operations, and read them through [`crate::Memory::read`].
/// [`Tensor::host`] and its like are for kernels and for code that is given a backend that computes in this process's memory.
#[derive(Clone, Debug)]
pub struct Tensor {
    rows: usize,
    cols: usize,
    data: Data,
}

/// Where the values are.
#[derive(Debug)]
enum Data {
    Host(Vec<f32>),
    Device(Box<dyn DeviceTensor>),
}

impl Clone for Data {
    fn clone(&self) -> Self {
        match self {
            Self::Host(values) => Self::Host(values.clone()),
            Self::Device(data) => Self::Device(data.duplicate()),
        }
    }
}

/// The values of a [`Tensor`] in the memory of a backend's device.
pub trait DeviceTensor: Any + Debug + Send + Sync {
    /// A copy in memory of its own, on the same device.
    fn duplicate(&self) -> Box<dyn DeviceTensor>;

    /// An empty cache on the same device, of rows of `width` elements.
    fn new_cache(&self, width: usize, dtype: KvDtype) -> Box<dyn DeviceCache>;
}

/// Of tensors in this process's memory; others are read first.
impl PartialEq for Tensor {
    fn eq(&self, other: &Self) -> bool {
        (self.rows, self.cols) == (other.rows, other.cols) && self.host() == other.host()
    }
}

impl Tensor {
    /// A tensor of given values, in this process's memory.
    ///
    /// # Panics
    /// When `data.len() != rows · cols`.
    pub fn new(rows: usize, cols: usize, data: Vec<f32>) -> Self {
        assert_eq!(rows * cols, data.len(), "[{rows}, {cols}] does not hold {} values", data.len());
        Self { rows, cols, data: Data::Host(data) }
    }

    /// A tensor of zeros, in this process's memory.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self::new(rows, cols, vec![0.0; rows * cols])
    }

    /// A tensor whose `rows · cols` values a backend's device holds.
    pub fn on_device(rows: usize, cols: usize, data: impl DeviceTensor) -> Self {
        Self { rows, cols, data: Data::Device(Box::new(data)) }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The same values in another shape of as many elements.
    ///
    /// # Panics
    /// When the shapes differ in elements.
    pub fn reshape(self, rows: usize, cols: usize) -> Self {
        assert_eq!(rows * cols, self.rows * self.cols, "[{}, {}] as [{rows}, {cols}]", self.rows, self.cols);
        Self { rows, cols, data: self.data }
    }

    /// What a device holds; `None` for values in this process's memory.
    pub fn device(&self) -> Option<&dyn DeviceTensor> {
        match &self.data {
            Data::Host(_) => None,
            Data::Device(data) => Some(&**data),
        }
    }

    /// The values.
    ///
    /// # Panics
    /// When a device holds them.
    pub fn host(&self) -> &[f32] {
        match &self.data {
            Data::Host(values) => values,
            Data::Device(_) => on_device(),
        }
    }

    /// The values, to change.
    ///
    /// # Panics
    /// When a device holds them.
    pub fn host_mut(&mut self) -> &mut [f32] {
        match &mut self.data {
            Data::Host(values) => values,
            Data::Device(_) => on_device(),
        }
    }

    /// Row `r`.
    ///
    /// # Panics
    /// When a device holds it.
    pub fn row(&self, r: usize) -> &[f32] {
        &self.host()[r * self.cols..(r + 1) * self.cols]
    }

    /// The values themselves.
    ///
    /// # Panics
    /// When a device holds them.
    pub fn into_host(self) -> Vec<f32> {
        match self.data {
            Data::Host(values) => values,
            Data::Device(_) => on_device(),
        }
    }
}

#[cold]
fn on_device() -> ! {
    panic!("a tensor on a device is read through its backend")
}

/// Activations in bf16: what training keeps of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Bf16Tensor {
    rows: usize,
    cols: usize,
    data: Vec<bf16>,
}

impl Bf16Tensor {
    /// A tensor of given values.
    ///
    /// # Panics
    /// When `data.len() != rows · cols`.
    pub fn new(rows: usize, cols: usize, data: Vec<bf16>) -> Self {
        assert_eq!(rows * cols, data.len(), "[{rows}, {cols}] does not hold {} values", data.len());
        Self { rows, cols, data }
    }

    /// Zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self { rows, cols, data: vec![bf16::ZERO; rows * cols] }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The values.
    pub fn host(&self) -> &[bf16] {
        &self.data
    }

    /// The values, to change.
    pub fn host_mut(&mut self) -> &mut [bf16] {
        &mut self.data
    }
}
