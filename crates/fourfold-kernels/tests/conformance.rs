//! The forward suite on every instruction set: each operation against the reference, and the same bits from any number of threads.

mod common;

use common::each;
use fourfold_kernels::conformance::{Candidate, FORWARD};

#[test]
fn every_operation_is_the_references() {
    for (name, check) in FORWARD {
        each(|cpu| {
            let label = format!("{} {name}", cpu.label);
            check(&Candidate { label, backend: &cpu.backend, activations: cpu.activations, exponential: 2e-6 })
        });
    }
}
