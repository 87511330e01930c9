//! What every command has at hand: the global options made into what they mean.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use fourfold_kernels::backward::Backward;
use fourfold_kernels::{Backend, Cpu, KvDtype};

use crate::args::Global;
use crate::output::{self, Report};
use crate::progress::Progress;

/// Where a command runs.
pub struct Context {
    /// Kernels.
    pub backend: Arc<dyn Backend>,
    /// The same kernels, with those of the backward pass.
    pub backward: Arc<dyn Backward>,
    /// What decides their results: instruction set, precisions.
    pub kernels: String,
    /// Threads they use.
    pub threads: usize,
    /// How keys and values are cached.
    pub kv: KvDtype,
    /// Bars.
    pub progress: Progress,
    /// Whether stdout carries JSON.
    pub json: bool,
    /// Whether remarks are wanted.
    pub quiet: bool,
    /// The options as given, for child processes.
    pub global: Global,
}

impl Context {
    /// Sets up threads and kernels.
    pub fn new(global: Global) -> Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if global.threads == 0 { cores } else { global.threads };
        // Work outside the kernels (softmaxes of an evaluation, compression) uses as many.
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().context("cannot start threads")?;
        let backend = cpu(&global, threads)?;
        Ok(Self {
            kernels: backend.describe(),
            backward: backend.clone(),
            backend,
            threads,
            kv: global.kv_dtype.into(),
            progress: Progress::new(global.quiet),
            json: global.json,
            quiet: global.quiet,
            global,
        })
    }

    /// Prints a command's result.
    pub fn print(&self, report: &impl Report) -> Result<()> {
        output::print(report, self.json)
    }

    /// Says something on stderr, unless quiet.
    pub fn remark(&self, text: &str) {
        if !self.quiet {
            output::note(text);
        }
    }
}

/// The CPU backend with some number of threads.
pub fn cpu(global: &Global, threads: usize) -> Result<Arc<Cpu>> {
    Ok(Arc::new(Cpu::new(global.cpu(threads))?))
}
