//! Devices through wgpu: Vulkan, and Metal on Apple's machines.

mod adapters;
mod memory;
mod recorder;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};

use fourfold_kernels::{DeviceUsage, KernelError};

pub use adapters::{Adapter, Choice, OpenError, adapters, open};
use memory::{Held, Pool};
use recorder::Recorder;

use crate::device::{Buffer, Device, Kernel, Launch};

/// Bytes written at a time, so that what carries them over stays small.
const UPLOAD: usize = 16 << 20;

/// Bytes of the largest part of a weight: kernels count bits of sparse codes in 32 bits, and one launch does not run for long.
const LARGEST_PART: u64 = 256 << 20;

/// A device of wgpu's.
#[derive(Debug)]
pub struct WgpuDevice {
    name: String,
    device: wgpu::Device,
    queue: wgpu::Queue,
    largest_buffer: usize,
    memory: Arc<Pool>,
    recorder: Mutex<Recorder>,
    pipelines: Mutex<HashMap<Compiled, Arc<wgpu::ComputePipeline>>>,
    layouts: Mutex<HashMap<&'static str, Arc<wgpu::BindGroupLayout>>>,
    staging: Mutex<Option<wgpu::Buffer>>,
    failure: Arc<OnceLock<Failure>>,
    counts: Counts,
}

/// A kernel and its constants.
type Compiled = (&'static str, Vec<(&'static str, u32)>);

/// Why a device is not used any more.
#[derive(Clone, Debug)]
enum Failure {
    Memory { asked: u64, live: u64 },
    Other(String),
}

#[derive(Debug, Default)]
struct Counts {
    launches: AtomicU64,
    downloads: AtomicU64,
    downloaded_bytes: AtomicU64,
    uploads: AtomicU64,
    uploaded_bytes: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl WgpuDevice {
    /// A device that is open. `limit` bytes at most are taken of its memory.
    fn new(name: String, device: wgpu::Device, queue: wgpu::Queue, limit: Option<u64>) -> Self {
        let failure = Arc::new(OnceLock::new());
        let lost = Arc::clone(&failure);
        device.set_device_lost_callback(move |_, reason| {
            let _ = lost.set(Failure::Other(format!("the device was lost: {reason}")));
        });
        let uncaptured = Arc::clone(&failure);
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            let _ = uncaptured.set(Failure::Other(error.to_string()));
        }));
        let limits = device.limits();
        let largest = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size).min(LARGEST_PART);
        Self {
            name,
            largest_buffer: largest as usize & !3,
            memory: Arc::new(Pool::new(device.clone(), limit)),
            device,
            queue,
            recorder: Mutex::new(Recorder::default()),
            pipelines: Mutex::default(),
            layouts: Mutex::default(),
            staging: Mutex::new(None),
            failure,
            counts: Counts::default(),
        }
    }

    fn layout(&self, kernel: &Kernel) -> Arc<wgpu::BindGroupLayout> {
        let mut known = lock(&self.layouts);
        let make = || {
            let entries: Vec<_> =
                kernel.written.iter().zip(0..).map(|(&written, binding)| entry(binding, written)).collect();
            let descriptor = wgpu::BindGroupLayoutDescriptor { label: Some(kernel.name), entries: &entries };
            Arc::new(self.device.create_bind_group_layout(&descriptor))
        };
        Arc::clone(known.entry(kernel.name).or_insert_with(make))
    }

    fn pipeline(&self, launch: &Launch, layout: &wgpu::BindGroupLayout) -> Arc<wgpu::ComputePipeline> {
        let kernel = launch.kernel;
        let mut known = lock(&self.pipelines);
        let make = || {
            let source = wgpu::ShaderSource::Wgsl(kernel.source.concat().into());
            let module =
                self.device.create_shader_module(wgpu::ShaderModuleDescriptor { label: Some(kernel.name), source });
            let pipeline_layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: Some(kernel.name),
                bind_group_layouts: &[Some(layout)],
                immediate_size: launch.params.len() as u32 * 4,
            });
            let constants: Vec<_> = launch.constants.iter().map(|&(name, value)| (name, f64::from(value))).collect();
            Arc::new(self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(kernel.name),
                layout: Some(&pipeline_layout),
                module: &module,
                entry_point: Some("main"),
                compilation_options: wgpu::PipelineCompilationOptions {
                    constants: &constants,
                    // Every kernel writes its shared memory before it reads it.
                    zero_initialize_workgroup_memory: false,
                },
                cache: None,
            }))
        };
        Arc::clone(known.entry((kernel.name, launch.constants.to_vec())).or_insert_with(make))
    }

    fn fail(&self, failure: Failure) {
        let _ = self.failure.set(failure);
    }

    /// Memory of its own or what is left of an earlier buffer; of a device that failed, any at all.
    fn take(&self, bytes: usize, written_by_host: bool) -> Buffer {
        let epoch = written_by_host.then(|| lock(&self.recorder).epoch());
        match self.memory.take(bytes, epoch) {
            Ok(held) => Buffer::new(bytes, held),
            Err((asked, live)) => {
                self.fail(Failure::Memory { asked, live });
                Buffer::new(bytes, self.memory.nothing())
            }
        }
    }

    /// Copies a buffer's beginning into this process's memory.
    fn read(&self, buffer: &Buffer, bytes: u64) -> Result<Vec<u8>, String> {
        let mut staging = lock(&self.staging);
        if staging.as_ref().is_none_or(|held| held.size() < bytes) {
            let size = bytes.next_power_of_two().max(1 << 16);
            *staging = Some(self.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("download"),
                size,
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            }));
        }
        let Some(staging) = &*staging else { unreachable!("made above") };
        {
            let mut recorder = lock(&self.recorder);
            recorder.copy(&self.device, &buffer.get::<Held>().buffer, 0, staging, 0, bytes);
            recorder.submit(&self.queue, &self.memory);
        }
        let (sender, receiver) = mpsc::channel();
        staging.map_async(wgpu::MapMode::Read, 0..bytes, move |result| {
            let _ = sender.send(result);
        });
        self.device.poll(wgpu::PollType::wait_indefinitely()).map_err(|e| e.to_string())?;
        receiver.recv().map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
        let values = staging.get_mapped_range(0..bytes).map_err(|e| e.to_string())?.to_vec();
        staging.unmap();
        Ok(values)
    }
}

fn entry(binding: u32, written: bool) -> wgpu::BindGroupLayoutEntry {
    wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Storage { read_only: !written },
            has_dynamic_offset: false,
            min_binding_size: None,
        },
        count: None,
    }
}

impl Device for WgpuDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn largest_buffer(&self) -> usize {
        self.largest_buffer
    }

    fn alloc(&self, bytes: usize) -> Buffer {
        self.take(bytes, false)
    }

    fn upload(&self, bytes: &[u8]) -> Buffer {
        let buffer = self.take(bytes.len(), true);
        if self.failure.get().is_some() {
            return buffer;
        }
        self.counts.uploads.fetch_add(1, Ordering::Relaxed);
        self.counts.uploaded_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let to = &buffer.get::<Held>().buffer;
        let many = bytes.len() > UPLOAD;
        for (i, part) in bytes.chunks(UPLOAD).enumerate() {
            let start = (i * UPLOAD) as u64;
            if part.len().is_multiple_of(4) {
                self.queue.write_buffer(to, start, part);
            } else {
                let mut padded = part.to_vec();
                padded.resize(part.len().next_multiple_of(4), 0);
                self.queue.write_buffer(to, start, &padded);
            }
            if many {
                lock(&self.recorder).submit(&self.queue, &self.memory);
                if let Err(error) = self.device.poll(wgpu::PollType::wait_indefinitely()) {
                    self.fail(Failure::Other(error.to_string()));
                }
            }
        }
        buffer
    }

    fn download(&self, buffer: &Buffer, bytes: usize) -> Result<Vec<u8>, KernelError> {
        self.check()?;
        if bytes == 0 {
            return Ok(Vec::new());
        }
        let found = self.read(buffer, bytes.next_multiple_of(4) as u64);
        self.counts.downloads.fetch_add(1, Ordering::Relaxed);
        self.counts.downloaded_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.check()?;
        match found {
            Ok(mut values) => {
                values.truncate(bytes);
                Ok(values)
            }
            Err(reason) => {
                self.fail(Failure::Other(reason));
                self.check()?;
                Ok(Vec::new())
            }
        }
    }

    fn copy(&self, from: &Buffer, start: usize, to: &Buffer, to_start: usize, bytes: usize) {
        if self.failure.get().is_some() || bytes == 0 {
            return;
        }
        let (from, to) = (&from.get::<Held>().buffer, &to.get::<Held>().buffer);
        lock(&self.recorder).copy(&self.device, from, start as u64, to, to_start as u64, bytes as u64);
    }

    fn launch(&self, launch: &Launch) {
        if self.failure.get().is_some() || launch.groups.contains(&0) {
            return;
        }
        self.counts.launches.fetch_add(1, Ordering::Relaxed);
        let layout = self.layout(launch.kernel);
        let pipeline = self.pipeline(launch, &layout);
        let entries: Vec<_> = launch
            .buffers
            .iter()
            .zip(0..)
            .map(|(buffer, binding)| wgpu::BindGroupEntry {
                binding,
                resource: buffer.get::<Held>().buffer.as_entire_binding(),
            })
            .collect();
        let group = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &layout,
            entries: &entries,
        });
        let mut recorder = lock(&self.recorder);
        recorder.dispatch(&self.device, &pipeline, &group, bytemuck::cast_slice(launch.params), launch.groups);
        if recorder.is_full() {
            recorder.submit(&self.queue, &self.memory);
        }
    }

    fn check(&self) -> Result<(), KernelError> {
        match self.failure.get() {
            None => Ok(()),
            Some(Failure::Memory { asked, live }) => {
                Err(KernelError::DeviceMemory { device: self.name.clone(), asked: *asked, live: *live })
            }
            Some(Failure::Other(reason)) => {
                Err(KernelError::Device { device: self.name.clone(), reason: reason.clone() })
            }
        }
    }

    fn usage(&self) -> DeviceUsage {
        let (live_bytes, peak_bytes) = self.memory.counts();
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        DeviceUsage {
            live_bytes,
            peak_bytes,
            launches: load(&self.counts.launches),
            downloads: load(&self.counts.downloads),
            downloaded_bytes: load(&self.counts.downloaded_bytes),
            uploads: load(&self.counts.uploads),
            uploaded_bytes: load(&self.counts.uploaded_bytes),
        }
    }
}
