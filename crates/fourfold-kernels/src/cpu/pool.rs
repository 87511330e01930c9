//! A small pool of threads for parallel regions of a few microseconds.
//!
//! Decoding one token of a small model runs some 150 regions of 5 to 30 µs each; a general work-stealing pool spends that long
//! on waking a thread. Here idle threads spin for a while before they sleep, and a region costs some hundred nanoseconds.
//!
//! A region is a count of work items. Its caller works on them itself; the workers join if and when they run, and nobody waits
//! for one that the operating system has not scheduled. So the pool stays useful where there are more threads than cores.
//!
//! # How a region runs
//! `state` holds an epoch, an OPEN bit and the number of workers inside. The caller writes the job, then opens an epoch with one
//! store. A worker enters by a compare-exchange of exactly that state (OPEN, this epoch), so it can enter neither a closed
//! region nor a later one by mistake. The caller closes the region when no items are left unclaimed and waits until the count
//! is zero: from then on nothing refers to the job, whose borrow may end. The store and the compare-exchanges are one release
//! sequence, so who enters sees the job; the leaving workers' release pairs with the caller's last acquire, so the caller sees
//! their results.
//!
//! # How the items are shared
//! Each thread has a span of consecutive items of its own, takes from its front a grain at a time, and when it has none left
//! takes the back half of another's. So a thread reads memory in order, claims cost nothing while nobody else touches its
//! span, and whoever falls behind, or never comes, gets help.
//!
//! # Sleep
//! A worker that goes to sleep sets its flag and then looks at `state` again; a caller opens `state` and then looks at the
//! flags. All four are sequentially consistent, so at least one sees the other: no wake-up is lost.
//!
//! `tests/pool_model.rs` runs this file over a scheduler that chooses which thread goes on at every step.

use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use super::sync::{Arc, AtomicBool, AtomicU64, JoinHandle, Mutex, Ordering, PoisonError, TryLockError, thread, wait};

/// How long an idle worker looks for work before it sleeps. Longer than the gaps between a token's regions.
const SPIN: Duration = Duration::from_micros(200);

const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;
const EPOCH: u32 = 32;

/// Keeps what different threads write on different cache lines (pairs of them, which prefetchers fetch together).
#[repr(align(128))]
struct Line<T>(T);

/// The work of a region: `body` for each range of items. The pointer is valid while the region is open or has a worker inside.
#[derive(Clone, Copy)]
struct Job {
    body: *const (dyn Fn(Range<usize>) + Sync),
    grain: usize,
}

/// What belongs to one thread.
struct Seat {
    /// The items it has not begun: `end << 32 | start`. Its owner takes from the front, others from the back, both by
    /// compare-exchange of the whole.
    span: AtomicU64,
    sleeping: AtomicBool,
}

struct Shared {
    /// `epoch << 32 | OPEN | workers inside`.
    state: Line<AtomicU64>,
    job: UnsafeCell<Job>,
    /// One a thread; the caller's first.
    seats: Vec<Line<Seat>>,
    shutdown: AtomicBool,
    /// The first panic of a region.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written only by the caller that holds the pool's turn, while the region is closed and nobody is inside; it is
// read only by workers inside an open region (see the module's text). Its `body` is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in `job` is never used to free or move what it points to.
unsafe impl Send for Shared {}

/// Threads that run parallel regions. See the module's text.
///
/// A region that begins while another one runs on the same pool (from a second thread, or nested) is worked through by its
/// caller alone.
pub struct Pool {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle>,
    /// Held while a region runs; the value is the last epoch.
    turn: Mutex<u64>,
}

impl Pool {
    /// A pool of `threads` threads, of which the caller is one; 0 for as many as there are cores. Where the system refuses
    /// more threads there are fewer.
    pub fn new(threads: usize) -> Self {
        let threads = match threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        let nothing: &(dyn Fn(Range<usize>) + Sync) = &|_| {};
        let shared = Arc::new(Shared {
            state: Line(AtomicU64::new(0)),
            job: UnsafeCell::new(Job { body: nothing, grain: 1 }),
            seats: (0..threads)
                .map(|_| Line(Seat { span: AtomicU64::new(0), sleeping: AtomicBool::new(false) }))
                .collect(),
            shutdown: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let handles = (1..threads)
            .map_while(|index| {
                let shared = Arc::clone(&shared);
                thread::Builder::new().name(format!("fourfold-{index}")).spawn(move || shared.serve(index)).ok()
            })
            .collect();
        Self { shared, handles, turn: Mutex::new(0) }
    }

    /// Threads that work on a region, the caller included.
    pub fn threads(&self) -> usize {
        self.handles.len() + 1
    }

    /// Calls `body` with ranges that together cover `0 .. items` once, in parallel. Ranges have `grain` items, or somewhat fewer or
    /// more where threads' spans end. Returns when all are done.
    ///
    /// A panic of `body` is passed on, after every thread has left the region; items not begun by then are not run.
    pub fn for_ranges(&self, items: usize, grain: usize, body: impl Fn(Range<usize>) + Sync) {
        let grain = grain.max(1);
        // Spans hold 32-bit numbers; so many items are a mistake, but not one to compute wrong things for.
        if self.handles.is_empty() || items <= grain || items > u32::MAX as usize {
            if items > 0 {
                body(0..items);
            }
            return;
        }
        let mut turn = match self.turn.try_lock() {
            Ok(turn) => turn,
            // A poisoned turn is a region that panicked; it was left in good order.
            Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
            Err(TryLockError::WouldBlock) => return body(0..items),
        };
        let body: &(dyn Fn(Range<usize>) + Sync) = &body;
        // SAFETY: only the lifetime changes. The region is closed and empty before this function returns or unwinds.
        let body: *const (dyn Fn(Range<usize>) + Sync) = unsafe { std::mem::transmute(body) };
        let job = Job { body, grain };
        let shared = &*self.shared;
        // SAFETY: the turn is ours and the last region was closed and empty, so nobody reads the job.
        unsafe { *shared.job.get() = job };
        let threads = self.threads();
        for (i, seat) in shared.seats.iter().enumerate() {
            let (start, end) = if i < threads { (items * i / threads, items * (i + 1) / threads) } else { (0, 0) };
            seat.0.span.store(span(start, end), Ordering::Relaxed);
        }
        *turn = (*turn + 1) & u64::from(u32::MAX);
        shared.state.0.store((*turn << EPOCH) | OPEN, Ordering::SeqCst);
        for (seat, handle) in shared.seats[1..].iter().zip(&self.handles) {
            if seat.0.sleeping.load(Ordering::SeqCst) && seat.0.sleeping.swap(false, Ordering::SeqCst) {
                handle.thread().unpark();
            }
        }
        shared.work(job, 0);
        shared.state.0.fetch_and(!OPEN, Ordering::AcqRel);
        wait(|| shared.state.0.load(Ordering::Acquire) & INSIDE == 0, None);
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(turn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Splits `data` into units of `unit` elements (the last may be short) and calls `body(first unit, units)` on runs of at
    /// least `grain` whole units, in parallel.
    pub fn for_chunks_mut<T: Send>(
        &self,
        data: &mut [T],
        unit: usize,
        grain: usize,
        body: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let unit = unit.max(1);
        let len = data.len();
        let base = SendPtr::new(data);
        self.for_ranges(len.div_ceil(unit), grain, |units| {
            let (start, end) = (units.start * unit, (units.end * unit).min(len));
            // SAFETY: the ranges of a region do not overlap, so neither do these slices; `data` is borrowed until the end.
            body(units.start, unsafe { std::slice::from_raw_parts_mut(base.get().add(start), end - start) });
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.shutdown.store(true, Ordering::SeqCst);
        for handle in self.handles.drain(..) {
            handle.thread().unpark();
            // A worker catches the panics of the work; joining cannot fail.
            let _ = handle.join();
        }
    }
}

/// A pointer that parallel regions write through, each to its own part.
#[derive(Clone, Copy)]
pub(crate) struct SendPtr<T>(*mut T);

impl<T> SendPtr<T> {
    /// Of elements whose borrow outlives the region.
    pub(crate) fn new(elements: &mut [T]) -> Self {
        Self(elements.as_mut_ptr())
    }

    /// Of memory that outlives the region.
    pub(crate) fn of(memory: *mut T) -> Self {
        Self(memory)
    }

    /// The pointer. (A method, so that closures capture the whole and with it `Sync`.)
    pub(crate) fn get(&self) -> *mut T {
        self.0
    }
}

// SAFETY: who dereferences it promises that no two threads touch the same element.
unsafe impl<T: Send> Send for SendPtr<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SendPtr<T> {}

impl Shared {
    /// What a worker does all its life.
    fn serve(&self, index: usize) {
        let sleeping = &self.seats[index].0.sleeping;
        let mut seen = 0;
        loop {
            let news = || {
                let state = self.state.0.load(Ordering::SeqCst);
                (state & OPEN != 0 && state >> EPOCH != seen) || self.shutdown.load(Ordering::SeqCst)
            };
            if !wait(news, Some(SPIN)) {
                sleeping.store(true, Ordering::SeqCst);
                while sleeping.load(Ordering::SeqCst) && !news() {
                    thread::park();
                }
                sleeping.store(false, Ordering::SeqCst);
            }
            if self.shutdown.load(Ordering::SeqCst) {
                return;
            }
            let state = self.state.0.load(Ordering::Relaxed);
            if state & OPEN == 0 || state >> EPOCH == seen {
                continue;
            }
            if self.state.0.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                seen = state >> EPOCH;
                // SAFETY: we are inside an open region; the caller does not touch the job until we have left.
                let job = unsafe { *self.job.get() };
                self.work(job, index);
                self.state.0.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }

    /// Claims and runs items until none is left, or one panics. `index` is the thread's seat.
    fn work(&self, job: Job, index: usize) {
        let result = catch_unwind(AssertUnwindSafe(|| {
            while let Some(range) = self.claim(job.grain, index).or_else(|| self.help(job.grain, index)) {
                // SAFETY: the body lives while the region is open or somebody is inside, and we are.
                unsafe { (*job.body)(range) };
            }
        }));
        if let Err(panic) = result {
            self.seats.iter().for_each(|seat| seat.0.span.store(0, Ordering::Relaxed));
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
    }

    /// The front of the thread's own span.
    fn claim(&self, grain: usize, index: usize) -> Option<Range<usize>> {
        self.take(index, |start, end| {
            // No crumbs: what would leave less than half a grain is taken whole.
            let middle = if end - start <= grain + grain / 2 { end } else { start + grain };
            (start..middle, middle..end)
        })
    }

    /// The back half of somebody else's span, of which all but the first grain becomes the thread's own span.
    fn help(&self, grain: usize, index: usize) -> Option<Range<usize>> {
        let threads = self.seats.len();
        (1..threads).map(|i| (index + i) % threads).find_map(|other| {
            let taken = self.take(other, |start, end| {
                let middle = if end - start <= grain + grain / 2 { start } else { start + (end - start) / 2 };
                (middle..end, start..middle)
            })?;
            // The own span is empty, and others do not fill it: there is nothing to lose.
            self.seats[index].0.span.store(span(taken.start, taken.end), Ordering::Relaxed);
            self.claim(grain, index)
        })
    }

    /// Splits a span, if it is not empty, into what is taken and what stays.
    fn take(&self, index: usize, split: impl Fn(usize, usize) -> (Range<usize>, Range<usize>)) -> Option<Range<usize>> {
        let seat = &self.seats[index].0;
        let mut now = seat.span.load(Ordering::Relaxed);
        loop {
            let (start, end) = ((now & u64::from(u32::MAX)) as usize, (now >> 32) as usize);
            if start >= end {
                return None;
            }
            let (taken, left) = split(start, end);
            // Relaxed: items carry no data between threads; the region's state orders what they write.
            match seat.span.compare_exchange_weak(now, span(left.start, left.end), Ordering::Relaxed, Ordering::Relaxed)
            {
                Ok(_) => return Some(taken),
                Err(changed) => now = changed,
            }
        }
    }
}

/// Items `start .. end` in one word.
fn span(start: usize, end: usize) -> u64 {
    (end as u64) << 32 | start as u64
}
