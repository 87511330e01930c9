//! `fourfold devices`: what models can run on.

use anyhow::Result;
use serde::Serialize;

use crate::context::Context;
use crate::human;
use crate::memory;
use crate::output::Report;

#[derive(Serialize)]
struct Device {
    /// As `--device` takes it.
    device: String,
    name: String,
    kind: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    api: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    driver: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    largest_buffer: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    subgroups: Option<[u32; 2]>,
    /// What runs there.
    commands: &'static [&'static str],
    /// What it lacks; empty where it can be used.
    missing: Vec<String>,
}

#[derive(Serialize)]
struct DevicesReport {
    devices: Vec<Device>,
}

/// What takes `--device gpu`.
pub const COMMANDS: &[&str] = &["generate", "chat", "eval", "bench", "compare"];

pub fn run(context: &Context) -> Result<()> {
    let cpu = Device {
        device: "cpu".to_owned(),
        name: format!("{}, {} threads", context.backend.name(), context.threads),
        kind: "processor".to_owned(),
        api: None,
        driver: None,
        memory: memory::available(),
        largest_buffer: None,
        subgroups: None,
        commands: &["all"],
        missing: Vec::new(),
    };
    let devices = std::iter::once(cpu).chain(cards()).collect();
    context.print(&DevicesReport { devices })
}

#[cfg(feature = "gpu")]
fn cards() -> Vec<Device> {
    let card = |adapter: fourfold_gpu::Adapter| Device {
        device: format!("gpu:{}", adapter.index),
        memory: card_memory(&adapter.bus),
        name: adapter.name,
        kind: adapter.kind.to_owned(),
        api: Some(adapter.api),
        driver: Some(adapter.driver),
        largest_buffer: Some(adapter.largest_buffer),
        subgroups: Some(adapter.subgroups),
        commands: COMMANDS,
        missing: adapter.missing,
    };
    fourfold_gpu::adapters().into_iter().map(card).collect()
}

#[cfg(not(feature = "gpu"))]
fn cards() -> Vec<Device> {
    Vec::new()
}

/// What Linux's driver for AMD's cards says of the memory of the card at a place; others tell it to their own programs alone.
#[cfg(feature = "gpu")]
fn card_memory(bus: &str) -> Option<u64> {
    let safe = !bus.is_empty() && bus.chars().all(|c| c.is_ascii_hexdigit() || c == ':' || c == '.');
    let file = format!("/sys/bus/pci/devices/{}/mem_info_vram_total", bus.to_lowercase());
    safe.then(|| std::fs::read_to_string(file).ok()?.trim().parse().ok()).flatten()
}

impl Report for DevicesReport {
    fn text(&self) -> String {
        let mut rows = vec![["device", "name", "kind", "driver", "memory", "runs"].map(String::from).to_vec()];
        rows.extend(self.devices.iter().map(|d| {
            let driver = match (&d.api, &d.driver) {
                (Some(api), Some(driver)) => format!("{api}, {driver}"),
                _ => "–".to_owned(),
            };
            let runs =
                if d.missing.is_empty() { d.commands.join(", ") } else { format!("lacks {}", d.missing.join(", ")) };
            let memory = d.memory.map_or("–".to_owned(), human::bytes);
            vec![d.device.clone(), d.name.clone(), d.kind.clone(), driver, memory, runs]
        }));
        let mut text = human::table(&rows);
        if self.devices.len() == 1 {
            text += "\nNo GPU with a Vulkan or Metal driver was found.\n";
        }
        text
    }
}
