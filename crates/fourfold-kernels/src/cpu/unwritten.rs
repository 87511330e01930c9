//! Memory for results that a parallel region writes. Filling it with zeros first, by one thread, would take a tenth of a
//! product's time.

use super::pool::SendPtr;

/// Memory for `len` elements, not written yet.
pub struct Unwritten<T> {
    memory: Vec<T>,
    len: usize,
}

impl<T: Copy + Send> Unwritten<T> {
    /// Room for `len` elements.
    pub fn new(len: usize) -> Self {
        Self { memory: Vec::with_capacity(len), len }
    }

    /// Where the first element goes.
    pub fn target(&mut self) -> SendPtr<T> {
        SendPtr::of(self.memory.as_mut_ptr())
    }

    /// The elements.
    ///
    /// # Safety
    /// All of them have been written through [`Unwritten::target`].
    pub unsafe fn written(mut self) -> Vec<T> {
        // SAFETY: there is room for so many, and the caller has written them.
        unsafe { self.memory.set_len(self.len) }
        self.memory
    }
}
