//! Where a model runs: on the processor or on a graphics card.

use std::str::FromStr;
use std::sync::Arc;

use anyhow::Result;
use fourfold_kernels::Backend;
use fourfold_models::Model;
use serde::Serialize;

use crate::context::Context;
use crate::fit::{self, Room};
use crate::human;
use crate::model::OpenModel;

/// What `--device` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceArg {
    /// A card that holds the model, or the processor.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// A card: the best one, or one by its number in `fourfold devices`.
    Gpu(Option<usize>),
}

impl FromStr for DeviceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "gpu" => Ok(Self::Gpu(None)),
            _ => match text.strip_prefix("gpu:").map(usize::from_str) {
                Some(Ok(index)) => Ok(Self::Gpu(Some(index))),
                Some(Err(_)) | None => Err("auto, cpu, gpu or gpu:NUMBER is expected".to_owned()),
            },
        }
    }
}

impl std::fmt::Display for DeviceArg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Gpu(None) => f.write_str("gpu"),
            Self::Gpu(Some(index)) => write!(f, "gpu:{index}"),
        }
    }
}

/// What a device counted while a model ran on it.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceReport {
    /// Its name.
    pub name: String,
    /// The most bytes of its memory that were in use at a time.
    pub peak_memory: u64,
    /// Kernels launched.
    pub launches: u64,
    /// Times results were read from it.
    pub downloads: u64,
}

impl DeviceReport {
    /// `peak memory on NAME 1.2 GB`.
    pub fn text(&self) -> String {
        format!("peak memory on {} {}", self.name, human::bytes(self.peak_memory))
    }
}

/// What the device of a model has counted so far; `None` on the processor.
pub fn report(model: &Model) -> Option<DeviceReport> {
    let usage = model.backend().device_usage()?;
    Some(DeviceReport {
        name: model.backend().name(),
        peak_memory: usage.peak_bytes,
        launches: usage.launches,
        downloads: usage.downloads,
    })
}

impl OpenModel {
    /// Loads every weight to where `--device` says, if there is `room` for the run.
    pub fn load_on_device(&self, room: Room, context: &Context) -> Result<Arc<Model>> {
        match context.global.device {
            DeviceArg::Cpu => self.load_here(room, context),
            DeviceArg::Gpu(index) => self.load(open(index, context)?, context),
            DeviceArg::Auto => match real_card(context) {
                None => self.load_here(room, context),
                Some(card) => self.load(card, context).or_else(|error| {
                    context.remark(&format!("The model does not go to the GPU: {error:#}. It runs on the processor."));
                    self.load_here(room, context)
                }),
            },
        }
    }
}

impl OpenModel {
    /// Loads every weight into this process, if there is `room` for the run.
    pub fn load_here(&self, room: Room, context: &Context) -> Result<Arc<Model>> {
        fit::check(self, room, context)?;
        self.load(context.backend.clone(), context)
    }
}

/// Where another model of the same run goes.
#[cfg(feature = "gpu")]
fn open(index: Option<usize>, context: &Context) -> Result<Arc<dyn Backend>> {
    use fourfold_gpu::{Choice, Gpu};
    let choice = index.map_or(Choice::Best, Choice::Index);
    let (gpu, adapter) = Gpu::open(choice, context.global.device_memory)?;
    if adapter.kind == "software" {
        context.remark(&format!("{} is the processor in a GPU's place: for tests.", adapter.name));
    }
    Ok(Arc::new(gpu))
}

#[cfg(not(feature = "gpu"))]
fn open(_index: Option<usize>, _context: &Context) -> Result<Arc<dyn Backend>> {
    anyhow::bail!("this program was built without GPUs (the feature `gpu`)")
}

/// A card that is no software, opened; `None` where there is none or it cannot be used.
#[cfg(feature = "gpu")]
fn real_card(context: &Context) -> Option<Arc<dyn Backend>> {
    use fourfold_gpu::{Choice, Gpu, adapters};
    if !has_card() {
        return None;
    }
    let real = |adapter: &&fourfold_gpu::Adapter| adapter.kind != "software" && adapter.missing.is_empty();
    let all = adapters();
    let best = all.iter().filter(real).min_by_key(|adapter| adapter.kind != "discrete")?;
    let (gpu, _) = Gpu::open(Choice::Index(best.index), context.global.device_memory).ok()?;
    Some(Arc::new(gpu))
}

#[cfg(not(feature = "gpu"))]
fn real_card(_context: &Context) -> Option<Arc<dyn Backend>> {
    None
}

/// Whether the system shows a card at all. Asking Vulkan loads every driver there is, software ones too.
#[cfg(feature = "gpu")]
fn has_card() -> bool {
    if !cfg!(target_os = "linux") {
        return true;
    }
    let nodes = std::fs::read_dir("/dev/dri").into_iter().flatten().flatten();
    let renders = nodes.into_iter().any(|node| node.file_name().to_string_lossy().starts_with("renderD"));
    renders || ["/dev/nvidia0", "/dev/dxg"].into_iter().any(|node| std::path::Path::new(node).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_spelled_as_they_are_read() {
        for (text, device) in [
            ("auto", DeviceArg::Auto),
            ("cpu", DeviceArg::Cpu),
            ("gpu", DeviceArg::Gpu(None)),
            ("gpu:3", DeviceArg::Gpu(Some(3))),
        ] {
            assert_eq!((text.parse(), device.to_string().as_str()), (Ok(device), text));
        }
        for text in ["", "GPU", "gpu:", "gpu:x", "gpu:-1", "cuda"] {
            assert!(text.parse::<DeviceArg>().is_err(), "{text}");
        }
    }
}
