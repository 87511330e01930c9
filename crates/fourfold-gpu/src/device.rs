//! The seam between the backend and what runs its kernels: memory, transfers, launches, and their counts.

use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;

use fourfold_kernels::{DeviceUsage, KernelError};

/// Memory of a device. Clones share it; it is given back with the last of them.
#[derive(Clone, Debug)]
pub struct Buffer {
    bytes: usize,
    inner: Arc<dyn Hold>,
}

/// What a device keeps for a [`Buffer`].
pub trait Hold: Any + Debug + Send + Sync {}

impl Buffer {
    /// Wraps a device's own form of `bytes` bytes.
    pub fn new(bytes: usize, inner: impl Hold) -> Self {
        Self { bytes, inner: Arc::new(inner) }
    }

    /// Bytes that may be used.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The device's own form.
    ///
    /// # Panics
    /// When another kind of device made it.
    pub fn get<T: Hold>(&self) -> &T {
        let inner: &dyn Any = &*self.inner;
        inner.downcast_ref().expect("a buffer is used by the device that made it")
    }
}

/// A kernel: its source in pieces, and how it uses each buffer.
#[derive(Debug)]
pub struct Kernel {
    /// Its name.
    pub name: &'static str,
    /// WGSL, one after another.
    pub source: &'static [&'static str],
    /// Whether each buffer is written.
    pub written: &'static [bool],
}

/// One run of a kernel.
#[derive(Debug)]
pub struct Launch<'a> {
    /// Which.
    pub kernel: &'static Kernel,
    /// What it is compiled for.
    pub constants: &'a [(&'static str, u32)],
    /// Its buffers, in the order of [`Kernel::written`].
    pub buffers: &'a [&'a Buffer],
    /// Its numbers, at most 32.
    pub params: &'a [u32],
    /// Workgroups along each axis.
    pub groups: [u32; 3],
}

/// Something that runs kernels in order. A device that failed does nothing more, and says so when it is read.
pub trait Device: Debug + Send + Sync {
    /// What it is called.
    fn name(&self) -> &str;

    /// Most bytes of a buffer that a kernel reads.
    fn largest_buffer(&self) -> usize;

    /// Memory of any content.
    fn alloc(&self, bytes: usize) -> Buffer;

    /// Memory of this content.
    fn upload(&self, bytes: &[u8]) -> Buffer;

    /// The first `bytes` bytes of a buffer, once everything launched before has run.
    ///
    /// # Errors
    /// The device failed.
    fn download(&self, buffer: &Buffer, bytes: usize) -> Result<Vec<u8>, KernelError>;

    /// Copies `bytes` bytes, a multiple of four, between places that are multiples of four.
    fn copy(&self, from: &Buffer, start: usize, to: &Buffer, to_start: usize, bytes: usize);

    /// Runs a kernel after all before it.
    fn launch(&self, launch: &Launch);

    /// Whether it failed.
    ///
    /// # Errors
    /// How.
    fn check(&self) -> Result<(), KernelError>;

    /// What it has counted.
    fn usage(&self) -> DeviceUsage;
}
