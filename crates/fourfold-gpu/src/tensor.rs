//! Activations and caches on a device.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use fourfold_kernels::{DeviceCache, DeviceTensor, KvDtype, Tensor};

use crate::device::{Buffer, Device, Launch};
use crate::kernels::APPEND;

/// Workgroups along an axis.
const GRID: u32 = 65_535;

/// Threads of a workgroup of elementwise kernels.
const THREADS: usize = 64;

/// Workgroups for so many elements, folded into two axes.
pub fn groups_for(elements: usize) -> [u32; 3] {
    folded(elements.div_ceil(THREADS))
}

/// So many workgroups, folded into two axes.
pub fn folded(groups: usize) -> [u32; 3] {
    let groups = groups as u32;
    if groups <= GRID { [groups, 1, 1] } else { [GRID, groups.div_ceil(GRID), 1] }
}

/// The values of a tensor.
#[derive(Debug)]
pub struct Values {
    pub device: Arc<dyn Device>,
    pub buffer: Buffer,
}

impl DeviceTensor for Values {
    fn duplicate(&self) -> Box<dyn DeviceTensor> {
        let bytes = self.buffer.bytes();
        let buffer = self.device.alloc(bytes);
        self.device.copy(&self.buffer, 0, &buffer, 0, bytes);
        Box::new(Self { device: Arc::clone(&self.device), buffer })
    }

    fn new_cache(&self, width: usize, dtype: KvDtype) -> Box<dyn DeviceCache> {
        Box::new(Cache { device: Arc::clone(&self.device), width, dtype, positions: 0, buffer: None })
    }
}

/// A tensor's values.
///
/// # Panics
/// When the tensor lies elsewhere: layers make tensors through their backend.
pub fn values(x: &Tensor) -> &Values {
    let device: Option<&dyn Any> = x.device().map(|device| device as &dyn Any);
    device.and_then(|device| device.downcast_ref()).expect("a tensor of this device")
}

/// Rows kept from earlier tokens. A row of 16-bit elements begins at a word.
#[derive(Debug)]
pub struct Cache {
    device: Arc<dyn Device>,
    width: usize,
    dtype: KvDtype,
    positions: usize,
    buffer: Option<Buffer>,
}

impl Cache {
    /// Words of a row.
    pub fn words(&self) -> usize {
        match self.dtype {
            KvDtype::F32 => self.width,
            KvDtype::F16 | KvDtype::Bf16 => self.width.div_ceil(2),
        }
    }

    /// How kernels name the type.
    pub fn dtype(&self) -> u32 {
        match self.dtype {
            KvDtype::F32 => 0,
            KvDtype::F16 => 1,
            KvDtype::Bf16 => 2,
        }
    }

    /// The rows.
    pub fn buffer(&self) -> Option<&Buffer> {
        self.buffer.as_ref()
    }

    /// Positions there is memory for.
    fn room(&self) -> usize {
        self.buffer.as_ref().map_or(0, |buffer| buffer.bytes() / (4 * self.words()).max(1))
    }

    fn grow(&mut self, positions: usize) {
        if positions <= self.room() {
            return;
        }
        let row = 4 * self.words();
        let buffer = self.device.alloc(positions * row);
        if let Some(old) = &self.buffer {
            self.device.copy(old, 0, &buffer, 0, self.positions * row);
        }
        self.buffer = Some(buffer);
    }
}

impl DeviceCache for Cache {
    fn len(&self) -> usize {
        self.positions * self.width
    }

    fn byte_len(&self) -> usize {
        self.buffer.as_ref().map_or(0, Buffer::bytes)
    }

    fn append(&mut self, rows: &Tensor) {
        let positions = self.positions + rows.rows();
        if positions > self.room() {
            // A half more than before, so that growing copies little, and 64 rows at least.
            self.grow(positions.max(self.room() * 3 / 2).next_multiple_of(64));
        }
        let Some(buffer) = &self.buffer else { return };
        let words = self.words();
        let count = rows.rows() * words;
        self.device.launch(&Launch {
            kernel: &APPEND,
            constants: &[("DTYPE", self.dtype())],
            buffers: &[&values(rows).buffer, buffer],
            params: &[count as u32, self.width as u32, words as u32, (self.positions * words) as u32],
            groups: groups_for(count),
        });
        self.positions = positions;
    }

    fn reserve(&mut self, elements: usize) {
        self.grow(elements.div_ceil(self.width.max(1)));
    }

    fn truncate(&mut self, elements: usize) {
        self.positions = self.positions.min(elements / self.width.max(1));
    }

    fn copy(&self, elements: Range<usize>) -> Box<dyn DeviceCache> {
        let (width, row) = (self.width.max(1), 4 * self.words());
        let (first, end) = (elements.start / width, elements.end / width);
        let mut copy =
            Self { device: Arc::clone(&self.device), width: self.width, dtype: self.dtype, positions: 0, buffer: None };
        copy.grow(end - first);
        if let (Some(from), Some(to)) = (&self.buffer, &copy.buffer) {
            self.device.copy(from, first * row, to, 0, (end - first) * row);
        }
        copy.positions = end - first;
        Box::new(copy)
    }

    fn extend(&mut self, other: &dyn DeviceCache) {
        let other: &dyn Any = other;
        let other: &Self = other.downcast_ref().expect("a cache of this device");
        assert_eq!((self.width, self.dtype), (other.width, other.dtype), "caches of different types");
        let row = 4 * self.words();
        self.grow(self.positions + other.positions);
        if let (Some(from), Some(to)) = (&other.buffer, &self.buffer) {
            self.device.copy(from, 0, to, self.positions * row, other.positions * row);
        }
        self.positions += other.positions;
    }
}
