//! A model's figures: what it weighs, takes and gives.

use std::ffi::OsStr;

use anyhow::Result;
use serde::Serialize;
use serde_json::Value;

use super::{CompareArgs, Comparison};
use crate::child::{self, Sample, integer, number};
use crate::context::Context;
use crate::human;

/// One of the two models.
#[derive(Serialize)]
pub struct Side {
    /// As the user called it.
    pub name: String,
    /// Its architecture.
    pub architecture: String,
    pub parameters: u64,
    /// Bytes of its weights.
    pub weight_bytes: u64,
    /// Peak memory of a whole process that generates, bytes.
    pub peak_memory: u64,
    pub generate_tokens_per_second: f64,
    pub prompt_tokens_per_second: f64,
    pub perplexity: f64,
    /// Of the perplexity.
    pub standard_error: f64,
    /// Share of tokens that were the first choice.
    pub top1_accuracy: f64,
    /// Memory of the process that wrote the first sample, over time.
    pub memory: Vec<Sample>,
    pub samples: Vec<Continuation>,
}

/// A prompt and how a model goes on.
#[derive(Serialize)]
pub struct Continuation {
    pub prompt: String,
    pub text: String,
}

/// Measures one side; `eval` is its evaluation.
pub fn side(args: &CompareArgs, name: &str, eval: &Value, context: &Context) -> Result<Side> {
    let (inspected, _) = child::run(context, "inspect", &[name.as_ref()])?;
    let predict = args.predict.to_string();
    let mut side = Side {
        name: name.to_owned(),
        architecture: inspected["architecture"].as_str().unwrap_or_default().to_owned(),
        parameters: integer(&inspected, "parameters")?,
        weight_bytes: integer(&inspected, "weight_bytes")?,
        peak_memory: 0,
        generate_tokens_per_second: 0.0,
        prompt_tokens_per_second: number(eval, "tokens_per_second")?,
        perplexity: number(eval, "perplexity")?,
        standard_error: number(eval, "standard_error")?,
        top1_accuracy: number(eval, "top1_accuracy")?,
        memory: Vec::new(),
        samples: Vec::new(),
    };
    for (i, prompt) in args.prompt.iter().enumerate() {
        // Without randomness, so that a difference is the models'.
        let options: [&OsStr; 7] = [
            name.as_ref(),
            "--prompt".as_ref(),
            prompt.as_ref(),
            "--predict".as_ref(),
            predict.as_ref(),
            "--temp".as_ref(),
            "0".as_ref(),
        ];
        let (generated, memory) = child::run(context, "generate", &options)?;
        if i == 0 {
            side.peak_memory = integer(&generated, "peak_memory")?;
            side.generate_tokens_per_second = number(&generated, "tokens_per_second")?;
            side.memory = memory;
        }
        let text = generated["text"].as_str().unwrap_or_default().to_owned();
        side.samples.push(Continuation { prompt: prompt.clone(), text });
    }
    Ok(side)
}

/// A ratio as it is shown.
pub fn times(ratio: f64) -> String {
    if ratio.is_finite() { format!("{ratio:.2}") } else { "–".to_owned() }
}

/// Name, A, B and what B is of A: the rows of the summary, a heading first.
pub fn table(c: &Comparison) -> Vec<[String; 4]> {
    let mut rows = vec![["", "A", "B", "ratio"].map(str::to_owned)];
    let mut row = |name: &str, ratio: String, cell: &dyn Fn(&Side) -> String| {
        rows.push([name.to_owned(), cell(&c.a), cell(&c.b), ratio]);
    };
    let of = |x: f64, y: f64| times(x / y);
    let (a, b) = (&c.a, &c.b);
    row("model", String::new(), &|m| m.name.clone());
    row("weights on disk, A / B", of(a.weight_bytes as f64, b.weight_bytes as f64), &|m| human::bytes(m.weight_bytes));
    row("bits a parameter", String::new(), &|m| format!("{:.2}", m.weight_bytes as f64 * 8.0 / m.parameters as f64));
    row("peak memory, generating, A / B", of(a.peak_memory as f64, b.peak_memory as f64), &|m| {
        human::bytes(m.peak_memory)
    });
    row("generating, tokens/s, B / A", of(b.generate_tokens_per_second, a.generate_tokens_per_second), &|m| {
        format!("{:.0}", m.generate_tokens_per_second)
    });
    row("reading, tokens/s, B / A", of(b.prompt_tokens_per_second, a.prompt_tokens_per_second), &|m| {
        format!("{:.0}", m.prompt_tokens_per_second)
    });
    row("perplexity, B / A", format!("{:.4}", b.perplexity / a.perplexity), &|m| {
        format!("{:.3} ± {:.3}", m.perplexity, m.standard_error)
    });
    let points = (b.top1_accuracy - a.top1_accuracy) * 100.0;
    row("top-1 accuracy, B − A", format!("{points:+.2} points"), &|m| human::percent(m.top1_accuracy));
    let mut only_b = |name: &str, cell: String| rows.push([name.to_owned(), "–".to_owned(), cell, String::new()]);
    only_b("KL divergence from A, nats a token", format!("{:.4} ± {:.4}", c.mean_kld, c.kld_error));
    only_b("same first choice as A", human::percent(c.top1_agreement));
    rows
}
