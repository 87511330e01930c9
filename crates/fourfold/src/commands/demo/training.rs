//! The second half of the demonstration: the same small model trained on in f32 and in a quarter of the memory.
//!
//! Same text, order and seed. The control rounds weights to 8 bits to nearest after each step, so that small updates are lost: what the
//! held-out text must be able to tell.

use std::ffi::OsString;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::Demo;
use crate::child::{integer, number};
use crate::human;

/// Name, method in words, options of `fourfold train`.
const RUNS: [(&str, &str, &[&str]); 3] = [
    ("baseline", "f32 AdamW", &["--preset", "baseline"]),
    ("quarter", "bf16, 8-bit AdamW", &["--preset", "quarter"]),
    ("control", "8 bits, to nearest", &["--preset", "quarter", "--weights", "int8-nearest"]),
];
const SETTINGS: [&str; 14] = [
    "--steps",
    "20",
    "--batch-size",
    "16",
    "--context",
    "256",
    "--lr",
    "2e-4",
    "--warmup-steps",
    "2",
    "--eval-every",
    "0",
    "--save-every",
    "0",
];

/// One run of `fourfold train`.
#[derive(Serialize)]
pub struct Trained {
    name: &'static str,
    method: &'static str,
    peak_memory: u64,
    predicted_memory: u64,
    state_bytes: u64,
    tokens: u64,
    tokens_per_second: f64,
    held_out_loss: f64,
    held_out_accuracy: f64,
    held_out_tokens: u64,
}

/// The runs of [`RUNS`], in their order.
#[derive(Serialize)]
pub struct Training {
    runs: [Trained; 3],
}

impl Training {
    /// Trains `model` on its `calibration.txt`, each time in a process of its own, and measures on its `eval.txt`.
    pub fn run(demo: &Demo, model: &Path) -> Result<Self> {
        demo.context.remark("Training the same model on, in f32, in a quarter of that, and as a control ...");
        let train = |(name, method, preset): &(&'static str, &'static str, &[&str])| -> Result<Trained> {
            let mut options: Vec<OsString> = vec!["--model".into(), model.into()];
            options.extend(["--data".into(), model.join("calibration.txt").into()]);
            options.extend(["--eval-data".into(), model.join("eval.txt").into()]);
            options.extend(["--output".into(), demo.scratch.join(format!("trained-{name}")).into()]);
            options.extend(preset.iter().chain(&SETTINGS).map(Into::into));
            let report = demo.child("train", &options)?;
            Ok(Trained {
                name,
                method,
                peak_memory: integer(&report, "peak_memory")?,
                predicted_memory: integer(&report, "predicted_memory")?,
                state_bytes: integer(&report, "weight_bytes")? + integer(&report, "optimizer_bytes")?,
                tokens: integer(&report, "tokens")?,
                tokens_per_second: number(&report, "tokens_per_second")?,
                held_out_loss: number(&report, "held_out_loss")?,
                held_out_accuracy: number(&report, "held_out_accuracy")?,
                held_out_tokens: integer(&report, "held_out_scored")?,
            })
        };
        let [baseline, quarter, control] = &RUNS;
        Ok(Self { runs: [train(baseline)?, train(quarter)?, train(control)?] })
    }

    /// The table.
    pub fn text(&self) -> String {
        let [baseline, quarter, control] = &self.runs;
        let mut rows = vec![["", "baseline", "quarter", "ratio", "control"].map(String::from).to_vec()];
        let mut row = |name: &str, ratio: String, cell: &dyn Fn(&Trained) -> String| {
            rows.push(vec![name.to_owned(), cell(baseline), cell(quarter), ratio, cell(control)]);
        };
        let ratio = |of: &dyn Fn(&Trained) -> f64| match of(quarter) > 0.0 {
            true => format!("{:.2}", of(baseline) / of(quarter)),
            false => "–".to_owned(),
        };
        row("method", String::new(), &|t| t.method.to_owned());
        row("weights and optimizer", ratio(&|t| t.state_bytes as f64), &|t| human::bytes(t.state_bytes));
        row("peak memory, training", ratio(&|t| t.peak_memory as f64), &|t| human::bytes(t.peak_memory));
        row("  predicted", String::new(), &|t| human::bytes(t.predicted_memory));
        let seconds = |t: &Trained| t.tokens as f64 / t.tokens_per_second.max(1e-9);
        row("seconds for its steps", ratio(&seconds), &|t| format!("{:.1}", seconds(t)));
        row("held-out loss, nats", String::new(), &|t| format!("{:.4}", t.held_out_loss));
        row("held-out accuracy", String::new(), &|t| human::percent(t.held_out_accuracy));
        format!(
            "\nTrained on {} tokens of the same kind of text ({} held out), whole processes:\n\n{}",
            baseline.tokens,
            baseline.held_out_tokens,
            human::table(&rows)
        )
    }
}
