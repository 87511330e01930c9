//! Which devices there are, and opening one.

use fourfold_kernels::KernelError;
use thiserror::Error;

use super::WgpuDevice;

/// What kernels need of immediates: 32 numbers.
const IMMEDIATES: u32 = 128;

/// Storage buffers of a kernel.
const BUFFERS: u32 = 4;

/// A device of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adapter {
    /// Its place in the list.
    pub index: usize,
    /// Its name.
    pub name: String,
    /// What it is: `discrete`, `integrated`, `virtual`, `software`, `other`.
    pub kind: &'static str,
    /// `Vulkan` or `Metal`.
    pub api: String,
    /// Its driver with its version.
    pub driver: String,
    /// Where it sits, as the system names it.
    pub bus: String,
    /// Bytes of the largest buffer.
    pub largest_buffer: u64,
    /// Threads that run together, at least and at most.
    pub subgroups: [u32; 2],
    /// What it lacks of what the kernels need; empty where it can be used.
    pub missing: Vec<String>,
}

/// Which device is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The best: one with memory of its own before one without, before a processor that plays one.
    #[default]
    Best,
    /// The one at this place in the list.
    Index(usize),
}

/// Why a device cannot be used.
#[derive(Debug, Error)]
pub enum OpenError {
    /// There is none.
    #[error(
        "this machine has no GPU that can be used: no Vulkan driver was found (nvidia-driver, mesa-vulkan-drivers, amdvlk; \
         on Apple's machines Metal is there)"
    )]
    NoAdapter,
    /// There is no such one.
    #[error("there is no gpu:{index}: this machine has {found} (see `fourfold devices`)")]
    NoIndex {
        /// The place asked for.
        index: usize,
        /// How many there are.
        found: usize,
    },
    /// It lacks something.
    #[error("{name} (driver {driver}) lacks {missing}: a newer driver may have it")]
    Lacking {
        /// Its name.
        name: String,
        /// Its driver.
        driver: String,
        /// What.
        missing: String,
    },
    /// Its driver refused.
    #[error("{name} (driver {driver}) cannot be opened: {reason}")]
    Refused {
        /// Its name.
        name: String,
        /// Its driver.
        driver: String,
        /// What the driver says.
        reason: String,
    },
    /// It failed at once.
    #[error(transparent)]
    Failed(#[from] KernelError),
}

fn found() -> Vec<wgpu::Adapter> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL;
    descriptor.flags = wgpu::InstanceFlags::ALLOW_UNDERLYING_NONCOMPLIANT_ADAPTER;
    let instance = wgpu::Instance::new(descriptor);
    pollster::block_on(instance.enumerate_adapters(wgpu::Backends::VULKAN | wgpu::Backends::METAL))
}

/// The devices of this machine.
pub fn adapters() -> Vec<Adapter> {
    found().iter().enumerate().map(|(index, adapter)| facts(index, adapter)).collect()
}

fn facts(index: usize, adapter: &wgpu::Adapter) -> Adapter {
    let (info, limits) = (adapter.get_info(), adapter.limits());
    let mut missing = Vec::new();
    if !adapter.features().contains(wgpu::Features::IMMEDIATES) || limits.max_immediate_size < IMMEDIATES {
        missing.push(format!("{IMMEDIATES} bytes of immediates (push constants)"));
    }
    if limits.max_storage_buffers_per_shader_stage < BUFFERS {
        missing.push(format!("{BUFFERS} storage buffers"));
    }
    if limits.max_compute_invocations_per_workgroup < 128 {
        missing.push("workgroups of 128 threads".to_owned());
    }
    let driver = [info.driver.as_str(), info.driver_info.as_str()].join(" ").trim().to_owned();
    Adapter {
        index,
        kind: match info.device_type {
            wgpu::DeviceType::DiscreteGpu => "discrete",
            wgpu::DeviceType::IntegratedGpu => "integrated",
            wgpu::DeviceType::VirtualGpu => "virtual",
            wgpu::DeviceType::Cpu => "software",
            wgpu::DeviceType::Other => "other",
        },
        api: format!("{:?}", info.backend),
        driver,
        bus: info.device_pci_bus_id,
        name: info.name,
        largest_buffer: limits.max_storage_buffer_binding_size.min(limits.max_buffer_size),
        subgroups: [info.subgroup_min_size, info.subgroup_max_size],
        missing,
    }
}

/// How much a kind of device is wanted.
fn rank(kind: &str) -> u32 {
    match kind {
        "discrete" => 4,
        "virtual" => 3,
        "integrated" => 2,
        "other" => 1,
        _ => 0,
    }
}

/// Opens a device, and takes `limit` bytes at most of its memory.
///
/// # Errors
/// There is none, or none such, or it cannot be used.
pub fn open(choice: Choice, limit: Option<u64>) -> Result<(WgpuDevice, Adapter), OpenError> {
    let found = found();
    let mut all: Vec<Adapter> = found.iter().enumerate().map(|(index, adapter)| facts(index, adapter)).collect();
    let index = match choice {
        Choice::Index(index) if index < all.len() => index,
        Choice::Index(index) => return Err(OpenError::NoIndex { index, found: all.len() }),
        Choice::Best => {
            // The first of equals.
            let best = all.iter().rev().max_by_key(|adapter| (adapter.missing.is_empty(), rank(adapter.kind)));
            best.ok_or(OpenError::NoAdapter)?.index
        }
    };
    let facts = all.swap_remove(index);
    if !facts.missing.is_empty() {
        let missing = facts.missing.join(", ");
        return Err(OpenError::Lacking { name: facts.name, driver: facts.driver, missing });
    }
    let adapter = &found[index];
    let limits = adapter.limits();
    let required_limits = wgpu::Limits {
        max_immediate_size: IMMEDIATES,
        max_storage_buffer_binding_size: limits.max_storage_buffer_binding_size,
        max_buffer_size: limits.max_buffer_size,
        ..wgpu::Limits::default()
    };
    let asked = adapter.request_device(&wgpu::DeviceDescriptor {
        label: Some("fourfold"),
        required_features: wgpu::Features::IMMEDIATES,
        required_limits,
        experimental_features: wgpu::ExperimentalFeatures::disabled(),
        memory_hints: wgpu::MemoryHints::MemoryUsage,
        trace: wgpu::Trace::Off,
    });
    match pollster::block_on(asked) {
        Ok((device, queue)) => Ok((WgpuDevice::new(facts.name.clone(), device, queue, limit), facts)),
        Err(error) => Err(OpenError::Refused { name: facts.name, driver: facts.driver, reason: error.to_string() }),
    }
}
