//! What the tests share: this machine's device, one test at a time: Mesa's software driver is not made for several devices that
//! compile at once in one process.
#![allow(dead_code)]

use std::ops::Deref;
use std::sync::{Mutex, MutexGuard, PoisonError};

use fourfold_gpu::{Choice, Gpu};

static ONE: Mutex<()> = Mutex::new(());

/// The device, while nobody else has one.
pub struct Alone {
    gpu: Gpu,
    _turn: MutexGuard<'static, ()>,
}

impl Deref for Alone {
    type Target = Gpu;

    fn deref(&self) -> &Gpu {
        &self.gpu
    }
}

/// The device, or a word that the test is skipped.
pub fn gpu() -> Option<Alone> {
    gpu_of(None)
}

/// The device, of whose memory so many bytes at most are taken.
pub fn gpu_of(limit: Option<u64>) -> Option<Alone> {
    let turn = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    match Gpu::open(Choice::Best, limit) {
        Ok((gpu, _)) => Some(Alone { gpu, _turn: turn }),
        Err(error) if std::env::var_os("FOURFOLD_GPU").is_some_and(|v| v == "required") => panic!("{error}"),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}
