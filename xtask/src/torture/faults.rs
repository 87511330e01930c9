//! Runs that are killed at one of their system calls or find no room on the disk, and are given again: then what they write must be what
//! an undisturbed run writes.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};

use super::Tally;
use super::process::{Ended, Limits, Outcome, run};
use super::random::Random;
use super::world::{self, Case};

/// System calls at which runs are killed: those by which files come, change and go.
const CALLS: [&str; 8] = ["openat", "write", "rename", "fsync", "unlink", "mkdir", "ftruncate", "pwrite64"];

/// Files whose bytes are not the same in every run: times are in them.
const WITH_TIMES: [&str; 5] = ["metrics.jsonl", "report.json", "summary.json", "fourfold-run.json", "events.out"];

/// One round: an undisturbed run, a disturbed one, and the same command until it succeeds.
pub fn round(
    program: &Path,
    case: &Case,
    place: &Path,
    limits: &Limits,
    random: &mut Random,
    tally: &mut Tally,
) -> Result<Option<String>> {
    let Some(output) = case.output else { return Ok(None) };
    world::copy(&case.inputs, place)?;
    let undisturbed = run(program, &case.arguments, place, limits, &[])?;
    tally.runs += 1;
    ensure!(undisturbed.outcome() == Outcome::Succeeded, "{}: {}", case.name, undisturbed.tail());
    let expected = contents(&place.join(output))?;
    let _ = fs::remove_dir_all(place);
    world::copy(&case.inputs, place)?;
    let (how, before) = disturbance(random, tally);
    let disturbed = run(program, &case.arguments, place, limits, &before)?;
    tally.runs += 1;
    if let Outcome::Bad(what) = disturbed.outcome()
        && !disturbed.was_killed()
    {
        return Ok(Some(format!("{what}, {how}\n{}", disturbed.tail())));
    }
    let complete = disturbed.outcome() == Outcome::Succeeded;
    if let Some(finding) = compare(&expected, place, output, complete, &how, &disturbed)? {
        return Ok(Some(finding));
    }
    let mut again = case.arguments.clone();
    again.extend(case.again.iter().map(|a| (*a).to_owned()));
    let second = if complete { disturbed } else { run(program, &again, place, limits, &[])? };
    tally.runs += 1;
    match second.outcome() {
        Outcome::Succeeded => compare(&expected, place, output, true, &format!("{how}, and given again"), &second),
        Outcome::Refused => Ok(Some(format!("refused when given again, {how}\n{}", second.tail()))),
        Outcome::Bad(what) => Ok(Some(format!("{what} when given again, {how}\n{}", second.tail()))),
    }
}

/// A kill at the n-th call of a kind, or files that may not grow beyond some size.
fn disturbance(random: &mut Random, tally: &mut Tally) -> (String, Vec<String>) {
    if random.below(3) == 0 {
        tally.full += 1;
        let blocks = 1 + random.below(200);
        let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$@\"");
        let words = ["sh", "-c", &script, "sh"].map(str::to_owned).to_vec();
        return (format!("no file larger than {blocks} blocks"), words);
    }
    tally.killed += 1;
    let call = *random.of(&CALLS);
    let most = if call == "openat" { 120 } else { 40 };
    let number = 1 + random.below(most);
    let inject = format!("inject={call}:signal=KILL:when={number}");
    let trace = format!("trace={call}");
    let words = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject].map(str::to_owned).to_vec();
    (format!("killed at {call} number {number}"), words)
}

/// What is under the output's name must be all of it, or nothing; where the run is `complete`, all of it.
fn compare(
    expected: &BTreeMap<String, Vec<u8>>,
    place: &Path,
    output: &str,
    complete: bool,
    how: &str,
    ended: &Ended,
) -> Result<Option<String>> {
    let path = place.join(output);
    if !path.exists() {
        return Ok(complete.then(|| format!("no output under its name, {how}\n{}", ended.tail())));
    }
    let found = contents(&path)?;
    let differs = |name: &&String| found.get(*name) != expected.get(*name);
    let names = expected.keys().chain(found.keys()).collect::<std::collections::BTreeSet<_>>();
    Ok(names.into_iter().find(differs).map(|name| {
        let state = match (expected.contains_key(name), found.contains_key(name)) {
            (true, false) => "is missing",
            (false, true) => "should not be there",
            _ => "differs",
        };
        format!("a silent difference: {output}/{name} {state}, {how}\n{}", ended.tail())
    }))
}

/// Every file below a directory (or a file alone), but for those with times in them.
fn contents(path: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut all = BTreeMap::new();
    for file in world::files(path)? {
        let name = file.strip_prefix(path)?.to_string_lossy().into_owned();
        if !WITH_TIMES.iter().any(|with| name.contains(with)) {
            all.insert(name, fs::read(&file)?);
        }
    }
    Ok(all)
}
