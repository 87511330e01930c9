//! Commands on their way to a queue.

use std::sync::Arc;

use super::memory::Pool;

/// Launches after which commands are sent, so that the device begins.
const FULL: u32 = 256;

/// Commands recorded and not sent yet.
#[derive(Debug, Default)]
pub struct Recorder {
    // Before the encoder, which is locked while it lives.
    pass: Option<wgpu::ComputePass<'static>>,
    encoder: Option<wgpu::CommandEncoder>,
    launches: u32,
    epoch: u64,
}

impl Recorder {
    /// Commands recorded now belong to this one.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether it is time to send.
    pub fn is_full(&self) -> bool {
        self.launches >= FULL
    }

    fn encoder(&mut self, device: &wgpu::Device) -> &mut wgpu::CommandEncoder {
        self.encoder
            .get_or_insert_with(|| device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: None }))
    }

    /// Records a launch.
    pub fn dispatch(
        &mut self,
        device: &wgpu::Device,
        pipeline: &wgpu::ComputePipeline,
        group: &wgpu::BindGroup,
        params: &[u8],
        groups: [u32; 3],
    ) {
        if self.pass.is_none() {
            let descriptor = wgpu::ComputePassDescriptor { label: None, timestamp_writes: None };
            let pass = self.encoder(device).begin_compute_pass(&descriptor).forget_lifetime();
            self.pass = Some(pass);
        }
        if let Some(pass) = &mut self.pass {
            pass.set_pipeline(pipeline);
            pass.set_bind_group(0, group, &[]);
            pass.set_immediates(0, params);
            pass.dispatch_workgroups(groups[0], groups[1], groups[2]);
        }
        self.launches += 1;
    }

    /// Records a copy.
    pub fn copy(
        &mut self,
        device: &wgpu::Device,
        from: &wgpu::Buffer,
        start: u64,
        to: &wgpu::Buffer,
        to_start: u64,
        bytes: u64,
    ) {
        self.pass = None;
        self.encoder(device).copy_buffer_to_buffer(from, start, to, to_start, bytes);
    }

    /// Sends what was recorded, and what was written to buffers.
    pub fn submit(&mut self, queue: &wgpu::Queue, memory: &Arc<Pool>) {
        self.pass = None;
        queue.submit(self.encoder.take().map(wgpu::CommandEncoder::finish));
        self.launches = 0;
        self.epoch += 1;
        memory.submitted(self.epoch);
    }
}
