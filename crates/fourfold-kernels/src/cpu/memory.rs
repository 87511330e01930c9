//! How the system's allocator treats large buffers.

/// Bytes from which on a buffer is a map of its own after [`keep_freed_memory`].
pub const MAPPED_BYTES: usize = 16 << 20;

/// Has the allocator keep freed memory for the next buffer instead of giving it back to the system. For programs that allocate the
/// same large buffers again and again, a training step above all: memory fresh from the system costs a page fault for every 4 KB,
/// a sixth of a step's time. Buffers of [`MAPPED_BYTES`] and more are an exception: one for which no hole of the heap is large enough would
/// leave the peak as much higher, and they are few. Does nothing where the C library is not glibc.
pub fn keep_freed_memory() {
    super::scratch::reserve();
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `malloc_trim` gives free memory back, `mallopt` changes parameters of the allocator alone.
    unsafe {
        // What was freed before, in small pieces most often, is not kept.
        libc::malloc_trim(0);
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES as libc::c_int);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        // The heap grows by this much at a time.
        libc::mallopt(libc::M_TOP_PAD, 1 << 20);
    }
}
