//! Tokens a second, prefill and decode, and peak memory: `fourfold bench` against `llama-bench`.
//!
//! Every contender runs once in each round, one after the other, so that a change in the machine's speed meets all of them;
//! the table shows medians over the rounds, and each ratio is the median of the ratios within a round.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::measure::{self, median};
use super::table::{Table, megabytes};

/// Options of `cargo xtask bench speed`.
#[derive(clap::Args)]
pub struct Args {
    /// Folder of llama.cpp's tools.
    #[arg(long)]
    llama_cpp: PathBuf,
    /// Models for this program: directories or .gguf files.
    #[arg(long, required = true, value_delimiter = ',')]
    ours: Vec<PathBuf>,
    /// GGUF files for llama-bench. The first is the baseline of the ratios.
    #[arg(long, required = true, value_delimiter = ',')]
    theirs: Vec<PathBuf>,
    /// Thread counts.
    #[arg(long, default_value = "1,2", value_delimiter = ',')]
    threads: Vec<usize>,
    /// Rounds; each contender runs once in each.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Prompt tokens.
    #[arg(short = 'p', long, default_value_t = 512)]
    prompt: usize,
    /// Generated tokens.
    #[arg(short = 'n', long, default_value_t = 128)]
    generate: usize,
}

/// One contender's readings, a value a round.
struct Contender {
    name: String,
    command: Box<dyn Fn() -> Command>,
    read: fn(&Value) -> Option<(f64, f64)>,
    file_bytes: u64,
    prefill: Vec<f64>,
    decode: Vec<f64>,
    peak: Vec<f64>,
}

/// Runs and prints the comparison.
pub fn run(ours: &Path, args: &Args) -> Result<()> {
    let llama_bench = super::tool(&args.llama_cpp, "llama-bench")?;
    for &threads in &args.threads {
        let mut contenders = Vec::new();
        for model in &args.theirs {
            contenders.push(contender(&llama_bench, model, threads, args, true)?);
        }
        for model in &args.ours {
            contenders.push(contender(ours, model, threads, args, false)?);
        }
        for round in 0..args.rounds {
            for c in &mut contenders {
                eprintln!("{threads} threads, round {}: {}", round + 1, c.name);
                let run = measure::run(&mut (c.command)())?;
                let value: Value = serde_json::from_str(&run.stdout).with_context(|| c.name.clone())?;
                let (prefill, decode) = (c.read)(&value).with_context(|| format!("{}: {}", c.name, run.stdout))?;
                c.prefill.push(prefill);
                c.decode.push(decode);
                c.peak.push(run.peak_rss as f64);
            }
        }
        print(&contenders, threads, args);
    }
    Ok(())
}

fn contender(program: &Path, model: &Path, threads: usize, args: &Args, theirs: bool) -> Result<Contender> {
    let (program, path) = (program.to_path_buf(), model.to_path_buf());
    let numbers = [args.prompt, args.generate, threads].map(|n| n.to_string());
    let command = move || {
        let mut command = Command::new(&program);
        if theirs {
            command.arg("-m").arg(&path).args(["-o", "json"]);
        } else {
            command.arg("bench").arg(&path).arg("--json");
        }
        command.args(["-p", &numbers[0], "-n", &numbers[1], "-t", &numbers[2], "-r", "1"]);
        command
    };
    Ok(Contender {
        name: format!("{} {}", if theirs { "llama.cpp" } else { "fourfold" }, name(model)),
        command: Box::new(command),
        read: if theirs { read_llama_bench } else { read_ours },
        file_bytes: weight_bytes(model)?,
        prefill: Vec::new(),
        decode: Vec::new(),
        peak: Vec::new(),
    })
}

fn name(model: &Path) -> String {
    model.file_name().map_or_else(|| model.display().to_string(), |n| n.to_string_lossy().into_owned())
}

/// Bytes of a model file, or of the safetensors files of a directory.
pub fn weight_bytes(model: &Path) -> Result<u64> {
    if model.is_file() {
        return Ok(model.metadata()?.len());
    }
    let mut bytes = 0;
    for entry in std::fs::read_dir(model).with_context(|| model.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            bytes += path.metadata()?.len();
        }
    }
    Ok(bytes)
}

/// llama-bench's JSON: a list with one test each.
fn read_llama_bench(value: &Value) -> Option<(f64, f64)> {
    let tests = value.as_array()?;
    let speed = |key: &str, other: &str| {
        let test = tests.iter().find(|t| t[key].as_u64() > Some(0) && t[other].as_u64() == Some(0))?;
        test["avg_ts"].as_f64()
    };
    Some((speed("n_prompt", "n_gen")?, speed("n_gen", "n_prompt")?))
}

/// Our own: `tests`, each with `name` (`pp512`, `tg128`) and `median_tokens_per_second`.
fn read_ours(value: &Value) -> Option<(f64, f64)> {
    let tests = value["tests"].as_array()?;
    let speed = |prefix: &str| {
        let test = tests.iter().find(|t| t["name"].as_str().is_some_and(|n| n.starts_with(prefix)))?;
        test["median_tokens_per_second"].as_f64()
    };
    Some((speed("pp")?, speed("tg")?))
}

fn print(contenders: &[Contender], threads: usize, args: &Args) {
    println!(
        "\n{threads} threads, {} prompt tokens, {} generated, medians of {} interleaved rounds; ratios to {}\n",
        args.prompt, args.generate, args.rounds, contenders[0].name
    );
    let mut table = Table::new(&["model", "MB", "prefill tok/s", "ratio", "decode tok/s", "ratio", "peak RSS MB"]);
    let ratio = |a: &[f64], b: &[f64]| {
        let ratios: Vec<f64> = a.iter().zip(b).map(|(a, b)| a / b).collect();
        format!("{:.2}", median(&ratios))
    };
    for c in contenders {
        table.row(vec![
            c.name.clone(),
            megabytes(c.file_bytes),
            format!("{:.0}", median(&c.prefill)),
            ratio(&c.prefill, &contenders[0].prefill),
            format!("{:.0}", median(&c.decode)),
            ratio(&c.decode, &contenders[0].decode),
            megabytes(median(&c.peak) as u64),
        ]);
    }
    table.print();
}
