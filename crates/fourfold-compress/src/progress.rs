//! Telling a caller how far a long job is.

/// Told of each step; the library prints nothing.
pub trait Progress {
    /// `done` of `total` steps of `stage` are finished.
    fn update(&mut self, stage: &str, done: u64, total: u64);
}

/// Tells nobody.
pub struct Silent;

impl Progress for Silent {
    fn update(&mut self, _stage: &str, _done: u64, _total: u64) {}
}
