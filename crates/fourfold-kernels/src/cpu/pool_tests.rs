//! The pool over the system's threads.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use super::pool::Pool;

#[test]
fn every_item_runs_once() {
    for threads in [1, 2, 3, 7] {
        let pool = Pool::new(threads);
        assert_eq!(pool.threads(), threads);
        for items in [0, 1, 2, 5, 64, 1000] {
            for grain in [0, 1, 3, 64] {
                let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                pool.for_ranges(items, grain, |range| {
                    assert!(!range.is_empty());
                    range.for_each(|i| _ = counts[i].fetch_add(1, Ordering::Relaxed));
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{threads} {items} {grain}");
            }
        }
    }
}

#[test]
fn many_short_regions_see_each_others_results() {
    let pool = Pool::new(3);
    let mut values = vec![0u64; 97];
    for round in 0..5000 {
        // Now and then long enough a pause for workers to fall asleep.
        if round % 1000 == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        pool.for_chunks_mut(&mut values, 8, 1, |first, chunk| {
            for (i, v) in chunk.iter_mut().enumerate() {
                *v += (first * 8 + i) as u64;
            }
        });
    }
    assert!(values.iter().enumerate().all(|(i, &v)| v == 5000 * i as u64));
}

#[test]
fn a_panic_reaches_the_caller_and_leaves_the_pool_usable() {
    let pool = Pool::new(4);
    for bad in [0, 17, 99] {
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.for_ranges(100, 1, |range| assert!(!range.contains(&bad), "item {bad}"));
        }));
        let message = caught.unwrap_err().downcast::<String>().unwrap();
        assert_eq!(*message, format!("item {bad}"));
        let sum = AtomicUsize::new(0);
        pool.for_ranges(100, 1, |range| _ = sum.fetch_add(range.sum(), Ordering::Relaxed));
        assert_eq!(sum.into_inner(), 4950);
    }
}

#[test]
fn nested_and_simultaneous_regions_finish() {
    let pool = Pool::new(2);
    let sum = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    pool.for_ranges(8, 1, |outer| {
                        for _ in outer {
                            pool.for_ranges(8, 1, |inner| _ = sum.fetch_add(inner.len(), Ordering::Relaxed));
                        }
                    });
                }
            });
        }
    });
    assert_eq!(sum.into_inner(), 4 * 50 * 64);
}

#[test]
fn chunks_keep_whole_units() {
    let pool = Pool::new(2);
    let mut data = vec![0usize; 23];
    pool.for_chunks_mut(&mut data, 5, 1, |first, chunk| {
        assert!(chunk.len() % 5 == 0 || first * 5 + chunk.len() == 23);
        chunk.fill(first + 1);
    });
    assert!(data.iter().enumerate().all(|(i, &v)| v >= 1 && v <= i / 5 + 1));
}
