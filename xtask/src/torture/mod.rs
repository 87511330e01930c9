//! `cargo xtask torture`: this program's command line under damage. Every kind of input file is mutated; runs are killed at one of their
//! system calls and given again; the disk is full. What is looked for: panics, aborts, hangs, and outputs that differ in silence.

mod faults;
mod mutate;
mod process;
mod random;
mod world;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use process::{Limits, Outcome};
use random::Random;
use world::{Case, World};

/// Options of the task.
#[derive(clap::Args)]
pub struct Args {
    /// How long to go on.
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// Seed of all choices.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The program [default: built first].
    #[arg(long)]
    binary: Option<PathBuf>,
    /// Where findings go, each with its inputs and a `run.sh` [default: target/torture].
    #[arg(long)]
    findings: Option<PathBuf>,
    /// Only cases whose name has this in it.
    #[arg(long, default_value = "")]
    only: String,
    /// Seconds after which a run hangs.
    #[arg(long, default_value_t = 60)]
    patience: u64,
}

/// One in so many rounds is a kill or a full disk; the others are mutations.
const FAULTS_EVERY: u64 = 8;
/// Findings after which it ends.
const MOST_FINDINGS: usize = 40;

/// What came of all rounds.
#[derive(Default)]
struct Tally {
    runs: usize,
    succeeded: usize,
    refused: usize,
    killed: usize,
    full: usize,
    by_case: BTreeMap<&'static str, usize>,
    findings: Vec<String>,
}

/// Runs until the time is up.
pub fn run(args: &Args) -> Result<()> {
    ensure!(args.minutes > 0.0 && args.minutes < 1e5, "--minutes {}: a positive number", args.minutes);
    let program = args.binary.clone().map_or_else(crate::bench::build, |path| Ok(fs::canonicalize(path)?))?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in the workspace")?;
    let findings = args.findings.clone().unwrap_or_else(|| root.join("target/torture"));
    fs::create_dir_all(&findings)?;
    let scratch = tempdir(&findings)?;
    println!("making the inputs in {}", scratch.display());
    let world = World::make(&program, root, &scratch.join("world"))?;
    let cases: Vec<&Case> = world.cases.iter().filter(|case| case.name.contains(&args.only)).collect();
    ensure!(!cases.is_empty(), "--only {}: no such case", args.only);
    let limits = Limits { seconds: args.patience, ..Limits::default() };
    let end = Instant::now() + Duration::from_secs_f64(args.minutes * 60.0);
    let (mut random, mut tally, mut round) = (Random::new(args.seed), Tally::default(), 0u64);
    while Instant::now() < end && tally.findings.len() < MOST_FINDINGS {
        round += 1;
        let place = scratch.join("round");
        let _ = fs::remove_dir_all(&place);
        let case = cases[random.below(cases.len())];
        *tally.by_case.entry(case.name).or_default() += 1;
        let finding = if round.is_multiple_of(FAULTS_EVERY) && case.output.is_some() {
            faults::round(&program, case, &place, &limits, &mut random, &mut tally)?
        } else {
            mutation(&program, case, &place, &limits, &mut random, &mut tally)?
        };
        if let Some(what) = finding {
            let kept = findings.join(format!("seed{}-round{round}-{}", args.seed, case.name));
            keep(&program, case, &place, &kept, &what)?;
            println!("round {round}, {}: {what}\n    kept in {}", case.name, kept.display());
            tally.findings.push(what);
        }
    }
    let _ = fs::remove_dir_all(&scratch);
    report(&tally)
}

/// A run over inputs of which one is damaged.
fn mutation(
    program: &Path,
    case: &Case,
    place: &Path,
    limits: &Limits,
    random: &mut Random,
    tally: &mut Tally,
) -> Result<Option<String>> {
    world::copy(&case.inputs, place)?;
    let mut how = Vec::new();
    for _ in 0..1 + random.below(3) / 2 {
        let files = world::files(place)?;
        if files.is_empty() {
            break;
        }
        how.push(mutate::one(&files[random.below(files.len())], random)?);
    }
    let ended = process::run(program, &case.arguments, place, limits, &[])?;
    tally.runs += 1;
    match ended.outcome() {
        Outcome::Succeeded => tally.succeeded += 1,
        Outcome::Refused => tally.refused += 1,
        Outcome::Bad(what) => return Ok(Some(format!("{what}, after: {}\n{}", how.join("; "), ended.tail()))),
    }
    // Output appears whole or not at all.
    let output = case.output.map(|name| place.join(name));
    if let Some(output) = output
        && ended.outcome() == Outcome::Refused
        && output.exists()
        && !case.keeps_output
    {
        return Ok(Some(format!(
            "a refusal that left {}, after: {}\n{}",
            output.display(),
            how.join("; "),
            ended.tail()
        )));
    }
    Ok(None)
}

/// A directory of this process's own.
fn tempdir(findings: &Path) -> Result<PathBuf> {
    let shared = Path::new("/dev/shm");
    let base = if shared.is_dir() { shared } else { findings };
    let dir = base.join(format!("fourfold-torture-{}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

/// Keeps what shows a finding again.
fn keep(program: &Path, case: &Case, place: &Path, kept: &Path, what: &str) -> Result<()> {
    let _ = fs::remove_dir_all(kept);
    fs::create_dir_all(kept)?;
    // Damaged inputs may be pipes and devices, which `cp -a` keeps as they are.
    std::process::Command::new("cp").arg("-a").arg(place).arg(kept.join("inputs")).status()?;
    let words: Vec<String> = case.arguments.iter().map(|a| format!("'{}'", a.replace('\'', "'\\''"))).collect();
    let script = format!(
        "#!/bin/sh\n# {}\ncd \"$(dirname \"$0\")/inputs\" && {} {}\n",
        what.lines().next().unwrap_or_default(),
        program.display(),
        words.join(" ")
    );
    fs::write(kept.join("run.sh"), script)?;
    fs::write(kept.join("finding.txt"), what)?;
    Ok(())
}

fn report(tally: &Tally) -> Result<()> {
    println!(
        "{} runs: {} did their work, {} refused with a reason, {} were killed and given again, {} had no disk left",
        tally.runs, tally.succeeded, tally.refused, tally.killed, tally.full
    );
    let cases: Vec<String> = tally.by_case.iter().map(|(name, count)| format!("{name} {count}")).collect();
    println!("rounds by case: {}", cases.join(", "));
    if tally.findings.is_empty() {
        println!("0 panics, aborts, hangs and silent differences");
        return Ok(());
    }
    bail!("{} findings", tally.findings.len())
}
