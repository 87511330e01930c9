//! `fourfold bench`: speed, as `llama-bench` measures it.

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;
use fourfold_infer::Session;
use fourfold_models::{FeedForward, Model, Role};
use rayon::prelude::*;
use serde::Serialize;
use std::sync::Arc;

use crate::context::Context;
use crate::device::{self, DeviceReport};
use crate::fit::Room;
use crate::model::{self, OpenModel};
use crate::output::Report;
use crate::{human, limits, memory};

#[derive(Args)]
pub struct BenchArgs {
    /// A directory, a .gguf file, or a name on the hub.
    #[arg(value_name = "MODEL")]
    model: String,
    /// Tokens of the prompt; 0 leaves the prompt test out.
    #[arg(short = 'p', long, default_value_t = 512, value_name = "N", value_parser = limits::SOME_TOKENS)]
    n_prompt: usize,
    /// Tokens to generate; 0 leaves the generation test out.
    #[arg(short = 'n', long, default_value_t = 128, value_name = "N", value_parser = limits::SOME_TOKENS)]
    n_gen: usize,
    /// Tokens already in the context when the generation test begins.
    #[arg(short = 'd', long, default_value_t = 0, value_name = "N", value_parser = limits::SOME_TOKENS)]
    n_depth: usize,
    /// Repetitions, after one that is not counted.
    #[arg(short, long, default_value_t = 5, value_name = "N", value_parser = limits::TIMES)]
    repetitions: u32,
}

#[derive(Serialize)]
struct Test {
    name: String,
    tokens: usize,
    median_tokens_per_second: f64,
    min_tokens_per_second: f64,
    max_tokens_per_second: f64,
}

#[derive(Serialize)]
struct BenchReport {
    model: String,
    backend: String,
    threads: usize,
    weight_bytes: u64,
    bytes_per_token: u64,
    tests: Vec<Test>,
    read_bandwidth: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    decode_bandwidth: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    decode_share_of_bandwidth: Option<f64>,
    peak_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<DeviceReport>,
}

pub fn run(args: &BenchArgs, context: &Context) -> Result<()> {
    let open = model::open(&args.model, context)?;
    let positions = args.n_prompt.max(args.n_depth + args.n_gen);
    if positions > open.spec.max_positions {
        bail!("{positions} tokens: the model has {} positions", open.spec.max_positions);
    }
    let model = open.load_on_device(Room::sequence(positions), context)?;
    let bar = context.progress.spinner("measuring");
    let mut tests = Vec::new();
    if args.n_prompt > 0 {
        let ids = some_ids(args.n_prompt, open.spec.vocab_size);
        let once = || {
            let mut session = Session::new(model.clone(), context.kv, positions);
            let start = Instant::now();
            session.prompt(&ids, &|| false)?;
            Ok(start.elapsed().as_secs_f64())
        };
        tests.push(measure(format!("pp{}", args.n_prompt), args.n_prompt, args.repetitions, once)?);
    }
    if args.n_gen > 0 {
        let once = || decode(&model, args, context);
        let depth = if args.n_depth > 0 { format!("@{}", args.n_depth) } else { String::new() };
        tests.push(measure(format!("tg{}{depth}", args.n_gen), args.n_gen, args.repetitions, once)?);
    }
    bar.finish_and_clear();
    let peak_memory = memory::peak_resident();
    let read_bandwidth = read_bandwidth();
    let bytes_per_token = bytes_per_token(&open);
    let decode = tests.iter().find(|t| t.name.starts_with("tg"));
    let decode_bandwidth = decode.map(|t| t.median_tokens_per_second * bytes_per_token as f64);
    context.print(&BenchReport {
        model: args.model.clone(),
        backend: model.backend().name(),
        threads: context.threads,
        weight_bytes: model.weight_bytes() as u64,
        bytes_per_token,
        tests,
        read_bandwidth,
        decode_bandwidth,
        decode_share_of_bandwidth: decode_bandwidth.map(|b| b / read_bandwidth),
        peak_memory,
        device: device::report(&model),
    })
}

/// Seconds to generate, one token at a time. As in llama-bench tokens are not chosen: sampling is another cost.
fn decode(model: &Arc<Model>, args: &BenchArgs, context: &Context) -> Result<f64> {
    let ids = some_ids(args.n_depth + args.n_gen, model.spec().vocab_size);
    let mut session = Session::new(model.clone(), context.kv, ids.len());
    if args.n_depth > 0 {
        session.prompt(&ids[..args.n_depth], &|| false)?;
    }
    let start = Instant::now();
    for &id in &ids[args.n_depth..] {
        session.push(id)?;
    }
    Ok(start.elapsed().as_secs_f64())
}

/// Tokens spread over the vocabulary.
fn some_ids(count: usize, vocab: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * 7919 + 13) % vocab) as u32).collect()
}

fn measure(name: String, tokens: usize, repetitions: u32, mut once: impl FnMut() -> Result<f64>) -> Result<Test> {
    once()?;
    let mut rates = Vec::new();
    for _ in 0..repetitions {
        rates.push(tokens as f64 / once()?);
    }
    rates.sort_unstable_by(f64::total_cmp);
    let middle = rates.len() / 2;
    let median = if rates.len() % 2 == 1 { rates[middle] } else { (rates[middle - 1] + rates[middle]) / 2.0 };
    let (min, max) = (rates[0], rates[rates.len() - 1]);
    Ok(Test { name, tokens, median_tokens_per_second: median, min_tokens_per_second: min, max_tokens_per_second: max })
}

/// Weight bytes that one token reads: all but the unread rows of an embedding that is not also the head, and of the routed
/// experts only as many as a token goes to.
fn bytes_per_token(open: &OpenModel) -> u64 {
    let weights = open.spec.weights();
    let bytes = |w: &fourfold_models::WeightSpec| {
        let stored = open.checkpoint.weights.info(&w.name).map_or(0, |info| info.bytes);
        match (w.role, w.block.map(|b| &open.spec.blocks[b].feed_forward)) {
            (Role::Embedding, _) if !open.spec.tied => stored / open.spec.vocab_size.max(1) as u64,
            (Role::RoutedExpert, Some(FeedForward::Moe(moe))) => {
                stored * moe.router.per_token as u64 / moe.router.experts.max(1) as u64
            }
            _ => stored,
        }
    };
    weights.iter().map(bytes).sum()
}

/// Bytes a second that all threads together read from memory: the best of some passes over more than the caches hold.
fn read_bandwidth() -> f64 {
    const WORDS: usize = 32 << 20;
    let data: Vec<u64> = (0..WORDS as u64).into_par_iter().collect();
    let pass = || {
        let start = Instant::now();
        let sum = data.par_chunks(1 << 17).map(sum).reduce(|| 0, u64::wrapping_add);
        black_box(sum);
        (WORDS * 8) as f64 / start.elapsed().as_secs_f64()
    };
    (0..8).map(|_| pass()).fold(0.0, f64::max)
}

/// Adds in independent lanes, so that memory is what is waited for.
fn sum(words: &[u64]) -> u64 {
    let mut lanes = [0_u64; 32];
    for block in words.chunks_exact(32) {
        for (lane, word) in lanes.iter_mut().zip(block) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes.iter().fold(0, |a, b| a.wrapping_add(*b))
}

impl Report for BenchReport {
    fn text(&self) -> String {
        let mut text = format!(
            "{}: {}, {}, {} threads\n\n",
            self.model,
            human::bytes(self.weight_bytes),
            self.backend,
            self.threads
        );
        let mut rows = vec![["test", "tokens/s", "slowest", "fastest"].map(String::from).to_vec()];
        rows.extend(self.tests.iter().map(|t| {
            let cell = |v: f64| format!("{v:.1}");
            vec![
                t.name.clone(),
                cell(t.median_tokens_per_second),
                cell(t.min_tokens_per_second),
                cell(t.max_tokens_per_second),
            ]
        }));
        text += &human::table(&rows);
        if let (Some(rate), Some(share)) = (self.decode_bandwidth, self.decode_share_of_bandwidth) {
            text += &format!(
                "\ngeneration reads {} a token: {}/s, {} of the {}/s that this machine reads\n",
                human::bytes(self.bytes_per_token),
                human::bytes(rate as u64),
                human::percent(share),
                human::bytes(self.read_bandwidth as u64)
            );
        }
        if let Some(peak) = self.peak_memory {
            text += &format!("peak memory {}\n", human::bytes(peak));
        }
        text
    }
}
