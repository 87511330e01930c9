//! Rows kept from earlier tokens.

use std::any::Any;
use std::fmt::Debug;
use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::{DeviceTensor, Tensor};

/// How cached keys and values are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvDtype {
    /// 4 bytes: exact, for checks.
    F32,
    /// 2 bytes, llama.cpp's default.
    #[default]
    F16,
    /// 2 bytes.
    Bf16,
}

/// A growing matrix `[positions, width]`: the keys or values (all heads side by side), or MLA's compressed latent.
/// It lies where the first rows appended to it lie. Memory is taken as positions arrive, up to the capacity's need.
#[derive(Clone, Debug)]
pub struct KvCache {
    width: usize,
    data: KvData,
}

/// The cache's elements.
#[derive(Debug)]
pub enum KvData {
    /// Stored as f32.
    F32(Vec<f32>),
    /// Stored as f16.
    F16(Vec<f16>),
    /// Stored as bf16.
    Bf16(Vec<bf16>),
    /// In the memory of a backend's device.
    Device(Box<dyn DeviceCache>),
}

/// The elements of a [`KvCache`] in the memory of a backend's device.
pub trait DeviceCache: Any + Debug + Send + Sync {
    /// Elements held.
    fn len(&self) -> usize;

    /// Whether no element is held.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes held.
    fn byte_len(&self) -> usize;

    /// Appends rows of the same device, rounding to the cache's type.
    fn append(&mut self, rows: &Tensor);

    /// Takes memory for `elements` in all.
    fn reserve(&mut self, elements: usize);

    /// Forgets every element from `elements` on.
    fn truncate(&mut self, elements: usize);

    /// A copy of some elements in memory of its own.
    fn copy(&self, elements: Range<usize>) -> Box<dyn DeviceCache>;

    /// Appends the elements of another cache of the same device and type.
    fn extend(&mut self, other: &dyn DeviceCache);
}

impl Clone for KvData {
    fn clone(&self) -> Self {
        match self {
            Self::F32(d) => Self::F32(d.clone()),
            Self::F16(d) => Self::F16(d.clone()),
            Self::Bf16(d) => Self::Bf16(d.clone()),
            Self::Device(d) => Self::Device(d.copy(0..d.len())),
        }
    }
}

impl KvCache {
    /// An empty cache of rows of `width` elements.
    pub fn new(width: usize, dtype: KvDtype) -> Self {
        let data = match dtype {
            KvDtype::F32 => KvData::F32(Vec::new()),
            KvDtype::F16 => KvData::F16(Vec::new()),
            KvDtype::Bf16 => KvData::Bf16(Vec::new()),
        };
        Self { width, data }
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.elements().checked_div(self.width).unwrap_or(0)
    }

    fn elements(&self) -> usize {
        match &self.data {
            KvData::F32(d) => d.len(),
            KvData::F16(d) => d.len(),
            KvData::Bf16(d) => d.len(),
            KvData::Device(d) => d.len(),
        }
    }

    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes held.
    pub fn byte_len(&self) -> usize {
        match &self.data {
            KvData::F32(d) => d.capacity() * 4,
            KvData::F16(d) => d.capacity() * 2,
            KvData::Bf16(d) => d.capacity() * 2,
            KvData::Device(d) => d.byte_len(),
        }
    }

    /// The elements, for backends.
    pub fn data(&self) -> &KvData {
        &self.data
    }

    /// Appends one row per row of `rows`, rounding to the cache's type.
    ///
    /// # Panics
    /// When the widths differ, or the rows lie elsewhere than those before them.
    pub fn append(&mut self, rows: &Tensor) {
        assert_eq!(rows.cols(), self.width, "a row of {} in a cache of width {}", rows.cols(), self.width);
        if let Some(device) = rows.device().filter(|_| self.elements() == 0) {
            self.move_to(device);
        }
        match &mut self.data {
            KvData::F32(d) => d.extend_from_slice(rows.host()),
            KvData::F16(d) => {
                let held = d.len();
                d.resize(held + rows.host().len(), f16::ZERO);
                d[held..].convert_from_f32_slice(rows.host());
            }
            KvData::Bf16(d) => {
                let held = d.len();
                d.resize(held + rows.host().len(), bf16::ZERO);
                d[held..].convert_from_f32_slice(rows.host());
            }
            KvData::Device(d) => d.append(rows),
        }
    }

    /// A copy of some positions.
    ///
    /// # Panics
    /// When the range does not lie within the positions held.
    pub fn copy(&self, positions: Range<usize>) -> Self {
        let elements = positions.start * self.width..positions.end * self.width;
        let data = match &self.data {
            KvData::F32(d) => KvData::F32(d[elements].to_vec()),
            KvData::F16(d) => KvData::F16(d[elements].to_vec()),
            KvData::Bf16(d) => KvData::Bf16(d[elements].to_vec()),
            KvData::Device(d) => KvData::Device(d.copy(elements)),
        };
        Self { width: self.width, data }
    }

    /// Appends the positions of another cache, as they are stored.
    ///
    /// # Panics
    /// When the widths or the types differ.
    pub fn extend(&mut self, other: &Self) {
        assert_eq!(other.width, self.width, "rows of {} in a cache of width {}", other.width, self.width);
        if self.elements() == 0 && matches!(other.data, KvData::Device(_)) {
            self.data = other.data.clone();
            return;
        }
        match (&mut self.data, &other.data) {
            (KvData::F32(d), KvData::F32(o)) => d.extend_from_slice(o),
            (KvData::F16(d), KvData::F16(o)) => d.extend_from_slice(o),
            (KvData::Bf16(d), KvData::Bf16(o)) => d.extend_from_slice(o),
            (KvData::Device(d), KvData::Device(o)) => d.extend(&**o),
            (KvData::F32(_) | KvData::F16(_) | KvData::Bf16(_) | KvData::Device(_), _) => {
                panic!("caches of different types")
            }
        }
    }

    /// Puts an empty cache where `device` is, with the memory reserved for it.
    fn move_to(&mut self, device: &dyn DeviceTensor) {
        let (dtype, reserved) = match &self.data {
            KvData::F32(d) => (KvDtype::F32, d.capacity()),
            KvData::F16(d) => (KvDtype::F16, d.capacity()),
            KvData::Bf16(d) => (KvDtype::Bf16, d.capacity()),
            KvData::Device(_) => return,
        };
        let mut cache = device.new_cache(self.width, dtype);
        if reserved > 0 {
            cache.reserve(reserved);
        }
        self.data = KvData::Device(cache);
    }

    /// Reserves memory for `positions` rows in all.
    pub fn reserve(&mut self, positions: usize) {
        let more = positions.saturating_sub(self.len()) * self.width;
        match &mut self.data {
            KvData::F32(d) => d.reserve_exact(more),
            KvData::F16(d) => d.reserve_exact(more),
            KvData::Bf16(d) => d.reserve_exact(more),
            KvData::Device(d) => d.reserve(positions * self.width),
        }
    }

    /// Forgets every position from `positions` on.
    pub fn truncate(&mut self, positions: usize) {
        let elements = positions * self.width;
        match &mut self.data {
            KvData::F32(d) => d.truncate(elements),
            KvData::F16(d) => d.truncate(elements),
            KvData::Bf16(d) => d.truncate(elements),
            KvData::Device(d) => d.truncate(elements),
        }
    }
}
