//! Device memory: counted as it is taken, and kept for a while when it is given back.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::lock;
use crate::device::Hold;

/// Bytes of free buffers that are kept.
const KEPT: u64 = 32 << 20;

/// Sizes are rounded up to a sixteenth of a power of two, so that few sizes serve all.
const SIXTEENTHS: u64 = 16;

/// Buffers of a device.
#[derive(Debug)]
pub struct Pool {
    device: wgpu::Device,
    limit: Option<u64>,
    state: Mutex<State>,
    nothing: wgpu::Buffer,
}

#[derive(Debug, Default)]
struct State {
    live: u64,
    peak: u64,
    /// Bytes of the free ones.
    kept: u64,
    /// What is recorded and not submitted yet belongs to this one.
    epoch: u64,
    free: HashMap<u64, Vec<Free>>,
}

#[derive(Debug)]
struct Free {
    buffer: wgpu::Buffer,
    /// When it was given back.
    epoch: u64,
}

/// A buffer that goes back to its pool.
#[derive(Debug)]
pub struct Held {
    /// The buffer.
    pub buffer: wgpu::Buffer,
    pool: Option<Arc<Pool>>,
}

impl Hold for Held {}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(pool) = &self.pool {
            pool.give_back(&self.buffer);
        }
    }
}

fn buffer(device: &wgpu::Device, size: u64) -> wgpu::Buffer {
    device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size,
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    })
}

/// The size of the buffer for so many bytes.
fn size_of(bytes: usize) -> u64 {
    let bytes = (bytes as u64).max(256);
    let step = (bytes.next_power_of_two() / 2 / SIXTEENTHS).max(16);
    bytes.next_multiple_of(step)
}

impl Pool {
    /// No buffers yet, and `limit` bytes at most.
    pub fn new(device: wgpu::Device, limit: Option<u64>) -> Self {
        let nothing = buffer(&device, 256);
        Self { device, limit, state: Mutex::default(), nothing }
    }

    /// What stands for memory that could not be had.
    pub fn nothing(&self) -> Held {
        Held { buffer: self.nothing.clone(), pool: None }
    }

    /// Bytes of all buffers, now and at most.
    pub fn counts(&self) -> (u64, u64) {
        let state = lock(&self.state);
        (state.live, state.peak)
    }

    /// What was recorded was submitted.
    pub fn submitted(&self, epoch: u64) {
        lock(&self.state).epoch = epoch;
    }

    /// A buffer; one that no recorded command uses where the host will write it, which it does before all of them.
    ///
    /// # Errors
    /// Bytes asked for, and bytes in use.
    pub fn take(self: &Arc<Self>, bytes: usize, written_in: Option<u64>) -> Result<Held, (u64, u64)> {
        let size = size_of(bytes);
        let mut state = lock(&self.state);
        let usable = |free: &Free| written_in.is_none_or(|epoch| free.epoch < epoch);
        if let Some(free) = state.free.get_mut(&size)
            && let Some(found) = free.iter().rposition(usable)
        {
            let buffer = free.swap_remove(found).buffer;
            state.kept -= size;
            return Ok(Held { buffer, pool: Some(Arc::clone(self)) });
        }
        if self.limit.is_some_and(|limit| state.live - state.kept + size > limit) {
            return Err((size, state.live - state.kept));
        }
        let made = self.make(size).or_else(|| {
            state.drop_free();
            self.make(size)
        });
        let Some(buffer) = made else { return Err((size, state.live)) };
        if self.limit.is_some_and(|limit| state.live + size > limit) {
            state.drop_free();
        }
        state.live += size;
        state.peak = state.peak.max(state.live);
        Ok(Held { buffer, pool: Some(Arc::clone(self)) })
    }

    fn make(&self, size: u64) -> Option<wgpu::Buffer> {
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let validation = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let made = buffer(&self.device, size);
        // In the order of a stack.
        let invalid = pollster::block_on(validation.pop());
        let no_memory = pollster::block_on(memory.pop());
        (invalid.is_none() && no_memory.is_none()).then_some(made)
    }

    fn give_back(&self, buffer: &wgpu::Buffer) {
        let size = buffer.size();
        let mut state = lock(&self.state);
        if state.kept + size > KEPT {
            state.live -= size;
            return;
        }
        let epoch = state.epoch;
        state.kept += size;
        state.free.entry(size).or_default().push(Free { buffer: buffer.clone(), epoch });
    }
}

impl State {
    fn drop_free(&mut self) {
        self.live -= self.kept;
        self.kept = 0;
        self.free.clear();
    }
}
