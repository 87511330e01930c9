//! What the pool is made of: the system's threads, locks and atomics. Its model test has others in their place.

pub(super) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
pub(super) use std::sync::{Arc, Mutex, PoisonError, TryLockError};
pub(super) use std::thread;
use std::time::{Duration, Instant};

pub(super) type JoinHandle = thread::JoinHandle<()>;

/// How long a waiting thread keeps its core to itself; then it offers it to other threads at each look. Where there are more
/// threads than cores that costs it a time slice of somebody else, so not at once.
const ALONE: Duration = Duration::from_micros(50);

/// Spins between two looks at the clock.
const SPINS_PER_ROUND: u32 = 64;

/// Spins until `done`, or until `limit` has passed (then false). See [`ALONE`] for how it treats others: the thread it waits
/// for may be waiting for its very core.
pub(super) fn wait(done: impl Fn() -> bool, limit: Option<Duration>) -> bool {
    let mut begin = None;
    loop {
        for _ in 0..SPINS_PER_ROUND {
            if done() {
                return true;
            }
            std::hint::spin_loop();
        }
        let waited = begin.get_or_insert_with(Instant::now).elapsed();
        if limit.is_some_and(|limit| waited > limit) {
            return false;
        }
        if waited > ALONE {
            thread::yield_now();
        }
    }
}
