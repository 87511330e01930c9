//! What every command has at hand: the global options made into what they mean.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use fourfold_kernels::backward::Backward;
use fourfold_kernels::{Backend, Cpu, KvDtype};

use crate::args::Global;
use crate::output::{self, Report};
use crate::progress::Progress;

/// Threads for each core at most: more only wait for each other.
const MOST_PER_CORE: usize = 4;

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
        let wanted = if global.threads == 0 { cores } else { global.threads.min(MOST_PER_CORE * cores) };
        // Work outside the kernels (softmaxes of an evaluation, compression) uses as many.
        let threads = start_threads(wanted)?;
        if !global.quiet && wanted < global.threads {
            output::note(&format!("--threads {}: {cores} cores, {wanted} threads are used", global.threads));
        }
        if !global.quiet && threads < wanted {
            output::note(&format!("the system gives {threads} threads of {wanted}"));
        }
        let global = Global { threads, ..global };
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

    /// The same without bars and remarks: for what was said already.
    pub fn silent(&self) -> Self {
        Self {
            backend: self.backend.clone(),
            backward: self.backward.clone(),
            kernels: self.kernels.clone(),
            global: self.global.clone(),
            progress: Progress::new(true),
            quiet: true,
            ..*self
        }
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

/// Starts the threads of work outside the kernels, fewer where the system gives no more, and says how many there are.
fn start_threads(wanted: usize) -> Result<usize> {
    let mut threads = wanted;
    // The lasting ones are asked for once, whatever comes of it: whether the system gives so many is tried before.
    while threads > 1 && rayon::ThreadPoolBuilder::new().num_threads(threads).build().is_err() {
        threads /= 2;
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    // A single one is this thread itself, so that none has to be started.
    let started = if threads == 1 { pool.use_current_thread().build_global() } else { pool.build_global() };
    started.map(|()| threads).context("cannot start threads")
}

/// The CPU backend with some number of threads.
pub fn cpu(global: &Global, threads: usize) -> Result<Arc<Cpu>> {
    Ok(Arc::new(Cpu::new(global.cpu(threads))?))
}
