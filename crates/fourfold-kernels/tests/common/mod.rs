//! What the suites share: the CPU backends to check.
#![allow(dead_code, unused_imports)]

pub use fourfold_kernels::conformance::{FORMS, Form, Noise, check, noise, weight};
use fourfold_kernels::{Activations, Cpu, CpuOptions, FloatProducts, Isa, Tensor};

/// A backend to check, and what it is.
pub struct Candidate {
    pub label: String,
    pub activations: Activations,
    pub products: FloatProducts,
    pub isa: Isa,
    pub threads: usize,
    pub backend: Cpu,
}

/// Every instruction set of this machine, with 1 and 2 threads, both precisions of activations and all products of floats.
pub fn candidates() -> Vec<Candidate> {
    let mut all = Vec::new();
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let fast = FloatProducts::ALL.into_iter().filter(|products| products.is_of(isa));
        let precisions = fast.map(|products| (Activations::Fast, products));
        for (activations, products) in precisions.chain([(Activations::F32, FloatProducts::F32)]) {
            for threads in [1, 2] {
                let options = CpuOptions { threads, isa: Some(isa), activations, products: Some(products) };
                let backend = Cpu::new(options).unwrap();
                let label = format!("{} {activations:?} {} {threads} threads", isa.name(), products.name());
                all.push(Candidate { label, activations, products, isa, threads, backend });
            }
        }
    }
    all
}

/// Runs `op` on every candidate; those that differ in threads alone must give the same bits.
pub fn each(op: impl Fn(&Candidate) -> Vec<Tensor>) {
    let mut last: Option<(String, Vec<Tensor>)> = None;
    for candidate in candidates() {
        let outputs = op(&candidate);
        if let Some((label, before)) = last.filter(|_| candidate.threads > 1) {
            assert!(before == outputs, "{} and {label} give different bits", candidate.label);
        }
        last = Some((candidate.label, outputs));
    }
}
