//! The program's heap: its free memory, and its end.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fmt::Write as _;
use std::sync::Mutex;

/// Gives memory that was freed, but that the allocator keeps, back to the operating system. Worth its milliseconds after much has
/// been freed and little will be asked for: when a tokenizer has been parsed, when a model has been loaded.
pub fn release_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: no pointer goes in or out; glibc lets any thread call it.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// The system's allocator for a whole program: where it has no more memory to give, the program ends with one line on stderr and exit
/// code 1, instead of an abort.
pub struct Heap;

/// What memory is being asked for, in words.
static PURPOSE: Mutex<String> = Mutex::new(String::new());

/// From now on memory is asked for this: `loading`, say. A program that runs out of it says so.
pub fn heap_is_for(purpose: &str) {
    if let Ok(mut place) = PURPOSE.lock() {
        place.clear();
        place.push_str(purpose);
    }
}

// SAFETY: every call goes to `System` as it came; a null pointer never leaves `alloc`, `alloc_zeroed` and `realloc`.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those of `System`.
        or_end(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        or_end(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        or_end(unsafe { System.realloc(memory, layout, size) }, size)
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[inline]
fn or_end(memory: *mut u8, size: usize) -> *mut u8 {
    if memory.is_null() {
        out_of_memory(size);
    }
    memory
}

/// Ends the program. Nothing here allocates, and nothing waits for another thread.
#[cold]
fn out_of_memory(size: usize) -> ! {
    let mut line = Line { text: [0; 256], length: 0 };
    let _ = write!(line, "error: out of memory: the system does not give {size} bytes more");
    if let Ok(purpose) = PURPOSE.try_lock()
        && !purpose.is_empty()
    {
        let _ = write!(line, " (for: {purpose})");
    }
    let _ = line.write_str("\n");
    #[cfg(unix)]
    // SAFETY: the pointer and the length are of `line`; `_exit` runs no code of this program.
    unsafe {
        libc::write(2, line.text.as_ptr().cast(), line.length);
        libc::_exit(1);
    }
    #[cfg(not(unix))]
    std::process::exit(1);
}

/// A line of limited length, without the heap.
struct Line {
    text: [u8; 256],
    length: usize,
}

impl std::fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let room = self.text.len() - self.length;
        let taken = &text.as_bytes()[..text.len().min(room)];
        self.text[self.length..self.length + taken.len()].copy_from_slice(taken);
        self.length += taken.len();
        Ok(())
    }
}
