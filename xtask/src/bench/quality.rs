//! Quality at given bytes: this program's checkpoints against llama-quantize's files of the same source.
//!
//! Each side is compared with its own run of the unquantized source (KL divergence of the next-token distributions, mean over
//! the second half of each chunk, as llama-perplexity defines it), so that differences between the two engines cancel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::measure;
use super::speed::weight_bytes;
use super::table::{Table, megabytes};

/// Options of `cargo xtask bench quality`.
#[derive(clap::Args)]
pub struct Args {
    /// Folder of llama.cpp's tools.
    #[arg(long)]
    llama_cpp: PathBuf,
    /// The source as a Hugging Face directory.
    #[arg(long)]
    source: PathBuf,
    /// The same weights as an unquantized GGUF file.
    #[arg(long)]
    source_gguf: PathBuf,
    /// Text to measure on.
    #[arg(long)]
    text: PathBuf,
    /// Text to calibrate on, another one; llama-imatrix gets the same.
    #[arg(long)]
    calibration: PathBuf,
    /// llama-quantize types.
    #[arg(long, default_value = "IQ3_XXS,Q2_K,Q3_K_M,IQ4_XS,Q4_0,Q4_K_M,Q5_K_M,Q6_K,Q8_0", value_delimiter = ',')]
    types: Vec<String>,
    /// Sizes for this program, bytes; without them, a quarter of the source and each size of llama-quantize's.
    #[arg(long, value_delimiter = ',')]
    bytes: Vec<u64>,
    /// Chunks of the text.
    #[arg(long, default_value_t = 16)]
    chunks: usize,
    /// Tokens of a chunk.
    #[arg(long, default_value_t = 512)]
    context: usize,
    /// Threads of both sides.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Where the files go; kept.
    #[arg(long)]
    work: PathBuf,
}

struct Row {
    name: String,
    bytes: u64,
    perplexity: f64,
    kld: f64,
    top1: f64,
    seconds: f64,
}

/// Runs and prints the comparison.
pub fn run(ours: &Path, args: &Args) -> Result<()> {
    fs::create_dir_all(&args.work)?;
    let mut rows = theirs(args)?;
    let mut sizes = args.bytes.clone();
    if sizes.is_empty() {
        sizes.push(weight_bytes(&args.source)? / 4);
        sizes.extend(rows.iter().map(|r| r.bytes));
    }
    for bytes in sizes {
        rows.push(mine(ours, args, bytes)?);
    }
    rows.sort_by_key(|r| r.bytes);
    println!(
        "\n{} ({} chunks of {}), source {}, {} threads\n",
        args.text.display(),
        args.chunks,
        args.context,
        args.source.display(),
        args.threads
    );
    let mut table = Table::new(&["file", "MB", "perplexity", "mean KLD", "same top-1 %", "quantize s"]);
    for r in rows {
        table.row(vec![
            r.name,
            megabytes(r.bytes),
            format!("{:.3}", r.perplexity),
            format!("{:.4}", r.kld),
            format!("{:.2}", r.top1),
            format!("{:.1}", r.seconds),
        ]);
    }
    table.print();
    Ok(())
}

fn mine(program: &Path, args: &Args, bytes: u64) -> Result<Row> {
    let out = args.work.join(format!("fourfold-{bytes}"));
    eprintln!("fourfold at {bytes} bytes");
    let threads = args.threads.to_string();
    let mut seconds = 0.0;
    if !out.exists() {
        let mut command = Command::new(program);
        command.arg("compress").arg(&args.source).arg(&out).args([
            "--max-bytes",
            &bytes.to_string(),
            "--method",
            "gptq",
        ]);
        command.arg("--calibration").arg(&args.calibration).args(["--threads", &threads]);
        seconds = measure::run(&mut command)?.wall.as_secs_f64();
    }
    let mut command = Command::new(program);
    command.arg("eval").arg(&out).arg("--text").arg(&args.text).arg("--against").arg(&args.source);
    command.args(["--context", &args.context.to_string(), "--chunks", &args.chunks.to_string()]);
    command.args(["--threads", &threads, "--json"]);
    let value: Value = serde_json::from_str(&measure::run(&mut command)?.stdout)?;
    let number = |path: &str| value.pointer(path).and_then(Value::as_f64).with_context(|| format!("{path} in {value}"));
    Ok(Row {
        name: "fourfold gptq".into(),
        bytes: weight_bytes(&out)?,
        perplexity: number("/perplexity")?,
        kld: number("/divergence/mean_kld")?,
        top1: 100.0 * number("/divergence/top1_agreement")?,
        seconds,
    })
}

fn theirs(args: &Args) -> Result<Vec<Row>> {
    let quantize = super::tool(&args.llama_cpp, "llama-quantize")?;
    let perplexity = super::tool(&args.llama_cpp, "llama-perplexity")?;
    let imatrix_tool = super::tool(&args.llama_cpp, "llama-imatrix")?;
    let threads = args.threads.to_string();
    let common = |command: &mut Command| {
        command.args(["-c", &args.context.to_string(), "-t", &threads, "--chunks", &args.chunks.to_string()]);
    };
    let imatrix = args.work.join("imatrix.gguf");
    if !imatrix.exists() {
        eprintln!("llama-imatrix");
        let mut command = Command::new(&imatrix_tool);
        command.arg("-m").arg(&args.source_gguf).arg("-f").arg(&args.calibration).arg("-o").arg(&imatrix);
        measure::run(command.args(["-c", "512", "-t", &threads, "--chunks", "100"]))?;
    }
    let base = args.work.join("base.kld");
    if !base.exists() {
        eprintln!("llama-perplexity of the source");
        let mut command = Command::new(&perplexity);
        command.arg("-m").arg(&args.source_gguf).arg("-f").arg(&args.text).arg("--kl-divergence-base").arg(&base);
        common(&mut command);
        measure::run(&mut command)?;
    }
    let mut rows = Vec::new();
    for kind in &args.types {
        eprintln!("llama.cpp {kind}");
        let file = args.work.join(format!("{kind}.gguf"));
        let mut seconds = 0.0;
        if !file.exists() {
            let mut command = Command::new(&quantize);
            command.arg("--imatrix").arg(&imatrix).arg(&args.source_gguf).arg(&file).arg(kind).arg(&threads);
            seconds = measure::run(&mut command)?.wall.as_secs_f64();
        }
        let mut command = Command::new(&perplexity);
        command.arg("-m").arg(&file).arg("--kl-divergence-base").arg(&base).arg("--kl-divergence");
        common(&mut command);
        let run = measure::run(&mut command)?;
        let text = run.stdout + &run.stderr;
        rows.push(Row {
            name: format!("llama.cpp {kind} imatrix"),
            bytes: weight_bytes(&file)?,
            perplexity: reading(&text, "Mean PPL(Q)")?,
            kld: reading(&text, "Mean    KLD")?,
            top1: reading(&text, "Same top p")?,
            seconds,
        });
    }
    Ok(rows)
}

/// The first number after `label … :` in llama-perplexity's report.
fn reading(text: &str, label: &str) -> Result<f64> {
    let squeeze = |s: &str| s.split_whitespace().collect::<Vec<_>>().join(" ");
    let wanted = squeeze(label);
    let line = text.lines().map(squeeze).find(|l| l.starts_with(&wanted)).with_context(|| format!("no `{label}`"))?;
    let number = line.split(':').nth(1).and_then(|rest| rest.split_whitespace().next());
    number.and_then(|n| n.trim_end_matches('%').parse().ok()).with_context(|| format!("no number in `{line}`"))
}
