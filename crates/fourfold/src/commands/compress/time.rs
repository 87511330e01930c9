//! How long a compression takes, before it begins.

use std::time::{Duration, Instant};

use fourfold_compress::CompressJob;
use fourfold_kernels::{Backend, LinearArg};
use fourfold_tensor::{DType, Dense, FloatBuffer, Weight};

/// The stages of a planned compression, and their shares of its time: SmolLM2-135M to 4 bits a parameter, 8 k tokens.
const PLANNED: &[(&str, f64)] = &[
    ("sensitivity", 7.0),
    ("blocks", 18.0),
    ("probe", 6.0),
    ("plan", 23.0),
    ("compress", 36.0),
    ("held-out text", 6.0),
];
/// The same with the gate's trials, on 16 k tokens.
const GATED: &[(&str, f64)] = &[
    ("sensitivity", 8.0),
    ("blocks", 22.0),
    ("probe", 16.0),
    ("plan", 82.0),
    ("uniform", 65.0),
    ("planned", 66.0),
    ("quantized", 61.0),
    ("compress", 15.0),
    ("held-out text", 12.0),
];
/// And of one that has nothing to choose.
const UNIFORM: &[(&str, f64)] = &[("compress", 9.0), ("held-out text", 1.0)];

/// The stages that are to come, and their shares.
pub fn shares(job: &CompressJob) -> &'static [(&'static str, f64)] {
    match (job.is_finished(), job.held_out.is_empty()) {
        (true, _) => UNIFORM,
        (false, true) => PLANNED,
        (false, false) => GATED,
    }
}

/// Operations of a planned compression for each parameter and calibration token, in units of a forward pass's two; measured
/// as the shares are. GPTQ and the pricing of formats are counted as if they were products, which they mostly are.
const PLANNED_PASSES: f64 = 19.0;
/// The same with the gate's two or three trials, and all kinds of storage.
const GATED_PASSES: f64 = 30.0;
/// The same without a choice.
const UNIFORM_PASSES: f64 = 2.3;

/// About how many seconds the job takes on this machine; `None` where no text is read, which is soon done.
pub fn estimate(job: &CompressJob) -> Option<f64> {
    let backend = job.backend.as_ref()?;
    let tokens: usize = job.calibration.iter().map(Vec::len).sum();
    let passes = match (job.is_finished(), job.held_out.is_empty()) {
        (true, _) => UNIFORM_PASSES,
        (false, true) => PLANNED_PASSES,
        (false, false) => GATED_PASSES,
    };
    Some(passes * 2.0 * job.spec.active_parameters() as f64 * tokens as f64 / rate(&**backend)?)
}

/// Operations a second of products as calibration makes them.
fn rate(backend: &dyn Backend) -> Option<f64> {
    const SIDE: usize = 768;
    const ROWS: usize = 256;
    let values = |n: usize| (0..n).map(|i| ((i * 37) % 101) as f32 / 101.0 - 0.5);
    let weight: Vec<f32> = values(SIDE * SIDE).collect();
    let weight = Weight::Dense(Dense::new(vec![SIDE, SIDE], FloatBuffer::from_f32(weight, DType::Bf16)));
    let weight = backend.upload(weight).ok()?;
    let x = backend.tensor(ROWS, SIDE, values(ROWS * SIDE).collect());
    let once = || backend.linear(&x, &[LinearArg { weight: &weight, bias: None }]);
    once();
    let (start, mut times) = (Instant::now(), 0.0);
    while start.elapsed() < Duration::from_millis(30) {
        once();
        times += 1.0;
    }
    Some(times * 2.0 * (SIDE * SIDE * ROWS) as f64 / start.elapsed().as_secs_f64())
}
