//! The thread pool under a scheduler that chooses at every step which thread goes on (shuttle: at random, and by probabilistic
//! concurrency testing, Burckhardt et al. 2010): no order of steps runs an item twice or never, loses a wake-up, deadlocks, or leaves a
//! worker inside a region that is over. A deadlock ends a run at once, a wait without end after a million steps.
//!
//! Steps are sequentially consistent here: what the CPU may reorder is not tried.

#[path = "../src/cpu/pool.rs"]
#[allow(dead_code, reason = "the model uses a part of it")]
mod pool;

/// What the pool is made of here.
mod sync {
    use std::time::Duration;

    pub use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    pub use shuttle::sync::{Arc, Mutex};
    pub use std::sync::{PoisonError, TryLockError};

    pub use thread::JoinHandle;

    /// Threads that sleep until they are woken, and never wake by themselves, as shuttle's own may: that would hide a lost wake-up.
    pub mod thread {
        use std::cell::RefCell;
        use std::io;

        use shuttle::sync::mpsc::{Receiver, SyncSender, sync_channel};
        pub use shuttle::thread::{spawn, yield_now};

        shuttle::thread_local! {
            static WOKEN: RefCell<Option<Receiver<()>>> = RefCell::new(None);
        }

        pub fn park() {
            WOKEN.with(|woken| _ = woken.borrow().as_ref().map(Receiver::recv));
        }

        pub struct Thread(SyncSender<()>);

        impl Thread {
            pub fn unpark(&self) {
                // A thread that is to wake already has it noted.
                let _ = self.0.try_send(());
            }
        }

        pub struct JoinHandle(shuttle::thread::JoinHandle<()>, Thread);

        impl JoinHandle {
            pub fn thread(&self) -> &Thread {
                &self.1
            }

            pub fn join(self) -> std::thread::Result<()> {
                self.0.join()
            }
        }

        #[derive(Default)]
        pub struct Builder;

        impl Builder {
            pub fn new() -> Self {
                Self
            }

            pub fn name(self, _: String) -> Self {
                self
            }

            pub fn spawn(self, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle> {
                let (sender, receiver) = sync_channel(1);
                let work = move || {
                    WOKEN.with(|woken| *woken.borrow_mut() = Some(receiver));
                    work();
                };
                Ok(JoinHandle(shuttle::thread::Builder::new().spawn(work)?, Thread(sender)))
            }
        }
    }

    /// Two looks stand for as many as fit into the limit.
    pub fn wait(done: impl Fn() -> bool, limit: Option<Duration>) -> bool {
        for look in 0.. {
            if done() {
                return true;
            }
            if limit.is_some() && look == 1 {
                return false;
            }
            thread::yield_now();
        }
        false
    }
}

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use pool::Pool;
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, FailurePersistence, Runner};
use sync::{Arc, AtomicBool, AtomicU64, Ordering, thread};

/// Runs a model in so many orders of its steps, of each kind.
fn check(orders: usize, model: impl Fn() + Send + Sync + Clone + 'static) {
    let schedulers: [Box<dyn Scheduler + Send>; 2] =
        [Box::new(RandomScheduler::new_from_seed(7, orders)), Box::new(PctScheduler::new_from_seed(7, 3, orders))];
    for scheduler in schedulers {
        let mut config = Config::new();
        config.failure_persistence = FailurePersistence::Print;
        Runner::new(scheduler, config).run(model.clone());
    }
}

/// A region over `items`, of which each has to run once, and none after the region.
fn region(pool: &Pool, items: usize, grain: usize) {
    let is_open = AtomicBool::new(true);
    let runs: Vec<AtomicU64> = (0..items).map(|_| AtomicU64::new(0)).collect();
    pool.for_ranges(items, grain, |range| {
        assert!(is_open.load(Ordering::SeqCst));
        range.for_each(|i| _ = runs[i].fetch_add(1, Ordering::SeqCst));
    });
    is_open.store(false, Ordering::SeqCst);
    assert!(runs.iter().all(|count| count.load(Ordering::SeqCst) == 1));
}

#[test]
fn every_item_runs_once_in_every_order() {
    check(5000, || {
        let pool = Pool::new(3);
        region(&pool, 5, 1);
        region(&pool, 4, 2);
    });
}

/// The first item waits for the second, which only another thread can run: it has to have been woken.
#[test]
fn no_wake_up_is_lost() {
    check(5000, || {
        let pool = Pool::new(2);
        for _ in 0..3 {
            let begun = AtomicBool::new(false);
            pool.for_ranges(2, 1, |range| match range.start {
                0 => _ = sync::wait(|| begun.load(Ordering::SeqCst), None),
                _ => begun.store(true, Ordering::SeqCst),
            });
        }
    });
}

#[test]
fn nested_and_simultaneous_callers_finish() {
    check(3000, || {
        let pool = Arc::new(Pool::new(2));
        let sum = Arc::new(AtomicU64::new(0));
        let call = |pool: &Pool, sum: &AtomicU64| {
            pool.for_ranges(2, 1, |outer| {
                for _ in outer {
                    pool.for_ranges(2, 1, |inner| _ = sum.fetch_add(inner.len() as u64, Ordering::SeqCst));
                }
            });
        };
        let other = {
            let (pool, sum) = (Arc::clone(&pool), Arc::clone(&sum));
            thread::spawn(move || call(&pool, &sum))
        };
        call(&pool, &sum);
        other.join().unwrap();
        assert_eq!(sum.load(Ordering::SeqCst), 8);
    });
}

#[test]
fn a_panic_reaches_the_caller_and_leaves_the_pool_usable() {
    check(3000, || {
        let pool = Pool::new(3);
        for bad in [0, 3] {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.for_ranges(4, 1, |range| {
                    if range.contains(&bad) {
                        resume_unwind(Box::new(bad));
                    }
                });
            }));
            assert_eq!(caught.unwrap_err().downcast_ref(), Some(&bad));
        }
        region(&pool, 3, 1);
    });
}
