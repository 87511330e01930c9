//! What a backend can refuse.

use fourfold_tensor::QuantizedError;
use thiserror::Error;

/// Why a weight cannot be used by a backend. Wrong shapes between operations are programming mistakes and panic.
#[derive(Debug, Error)]
pub enum KernelError {
    /// The parts of a quantized weight do not fit together.
    #[error(transparent)]
    Quantized(#[from] QuantizedError),
    /// The backend has no kernel for this form.
    #[error("backend {backend} cannot hold {form}")]
    Unsupported {
        /// The backend's name.
        backend: &'static str,
        /// The form, as [`fourfold_tensor::Weight::describe`] names it.
        form: String,
    },
    /// The instruction set asked for is not this machine's.
    #[error("this machine has no {0}")]
    NoIsa(&'static str),
    /// The instruction set has no such products of floats.
    #[error("{isa} has no fast {products} products")]
    NoProducts {
        /// The instruction set.
        isa: &'static str,
        /// The products.
        products: &'static str,
    },
    /// The device's memory is used up.
    #[error("out of memory on {device}: {asked} bytes more than the {live} bytes in use")]
    DeviceMemory {
        /// The device's name.
        device: String,
        /// Bytes asked for.
        asked: u64,
        /// Bytes in use.
        live: u64,
    },
    /// The device failed.
    #[error("{device} failed: {reason}")]
    Device {
        /// The device's name.
        device: String,
        /// What its driver says.
        reason: String,
    },
}
