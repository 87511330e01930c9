//! Working memory of a thread, kept from call to call.

use std::cell::RefCell;

/// Elements that [`reserve`] asks for: 256 KB, as much as most shapes need.
const RESERVED: usize = 1 << 16;

thread_local! {
    static PANEL: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    static ATTENTION: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Runs `body` on `len` elements and more for the panels of a product; what they hold is left from the last call.
pub fn with_panel<R>(len: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    PANEL.with_borrow_mut(|held| body(grown(held, len)))
}

/// The same for a block of attention, inside of which products may take panels.
pub fn with_attention<R>(len: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    ATTENTION.with_borrow_mut(|held| body(grown(held, len)))
}

/// Has the calling thread take its memory now. Taken in the middle of a step it would stay between the step's buffers for good, and split
/// the heap in two parts neither of which has room for a large one.
pub fn reserve() {
    for held in [&PANEL, &ATTENTION] {
        held.with_borrow_mut(|held| held.reserve(RESERVED));
    }
}

fn grown(held: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if held.len() < len {
        held.resize(len, 0.0);
    }
    held
}
