//! `fourfold`, the program.

use std::process::ExitCode;

/// Ends the program in words where the system has no more memory.
#[global_allocator]
static HEAP: fourfold_kernels::Heap = fourfold_kernels::Heap;

fn main() -> ExitCode {
    fourfold::main()
}
