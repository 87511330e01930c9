//! The allocator's free memory.

/// Gives memory that was freed, but that the allocator keeps, back to the operating system. Worth its milliseconds after much has
/// been freed and little will be asked for: when a tokenizer has been parsed, when a model has been loaded.
pub fn release_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: no pointer goes in or out; glibc lets any thread call it.
    unsafe {
        libc::malloc_trim(0);
    }
}
