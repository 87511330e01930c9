//! The forward suite on this machine's device, twice with equal bits; and the same bits from every width of subgroups that the
//! software driver has. Without a device the tests say that they are skipped, unless `FOURFOLD_GPU=required`.

mod common;

use std::process::Command;

use common::gpu;
use fourfold_gpu::Gpu;
use fourfold_kernels::conformance::{Candidate, FORWARD};
use fourfold_kernels::{Activations, Tensor};

/// `exp` of WGSL is right within 3 + 2 |x| units in the last place, and the suite's go to 90.
const EXPONENTIAL: f32 = 3e-5;

fn outputs(gpu: &Gpu) -> Vec<Tensor> {
    let run = |(name, check): &(&str, fourfold_kernels::conformance::Check)| {
        let candidate = || Candidate {
            label: format!("gpu {name}"),
            backend: gpu,
            activations: Activations::F32,
            exponential: EXPONENTIAL,
        };
        let (first, again) = (check(&candidate()), check(&candidate()));
        let same = first.iter().zip(&again).all(|(a, b)| bits(a).eq(bits(b)));
        assert!(same && first.len() == again.len(), "{name}: two runs differ");
        first
    };
    FORWARD.iter().flat_map(run).collect()
}

fn bits(x: &Tensor) -> impl Iterator<Item = u32> {
    x.host().iter().map(|v| v.to_bits())
}

/// FNV-1a of all bits.
fn digest(outputs: &[Tensor]) -> u64 {
    let words = outputs.iter().flat_map(bits);
    words.fold(0xcbf2_9ce4_8422_2325, |hash, word| (hash ^ u64::from(word)).wrapping_mul(0x0100_0000_01b3))
}

#[test]
fn every_operation_is_the_references() {
    if let Some(gpu) = gpu() {
        println!("digest {:016x}", digest(&outputs(&gpu)));
    }
}

#[test]
fn bits_do_not_depend_on_the_width_of_subgroups() {
    let Some(gpu) = gpu() else { return };
    let expected = format!("digest {:016x}", digest(&outputs(&gpu)));
    let program = std::env::current_exe().unwrap();
    for width in ["128", "512"] {
        let run = Command::new(&program)
            .args(["--exact", "every_operation_is_the_references", "--nocapture"])
            // What Mesa's software driver takes its vectors' width from; others do not know it.
            .env("LP_NATIVE_VECTOR_WIDTH", width)
            .env("FOURFOLD_GPU", "required")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&run.stdout);
        assert!(run.status.success(), "vectors of {width} bits: {said}{}", String::from_utf8_lossy(&run.stderr));
        assert!(said.contains(&expected), "vectors of {width} bits: {said}, not {expected}");
    }
}
