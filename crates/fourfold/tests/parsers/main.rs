//! Every reader of something that others wrote, with damaged inputs: each ends in a value or an error, in bounded memory and work, never
//! in a panic or an abort. The cases are the same in every run; FOURFOLD_FUZZ_CASES=200000 makes more of them, FOURFOLD_FUZZ_ONLY=plan
//! tries one reader. The same readers and seeds are fuzzed by the targets in `fuzz/`.

mod mutate;
mod random;
mod seeds;

use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fourfold::parsers::{PARSERS, Parser};
use random::Random;

/// Damaged inputs of each reader.
const CASES: u64 = 2000;
/// Most memory that reading a small input may take.
const MEMORY: u64 = 1 << 30;
/// A single small input that is not read by then is never read, on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(120);

fn folder_of_seeds(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(name)
}

fn seeds_of(name: &str) -> Vec<Vec<u8>> {
    let folder = folder_of_seeds(name);
    let entries = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{}: no seeds", folder.display());
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// Counts of the most memory, anew from here on, where the system has such a count.
fn most_memory(anew: bool) -> u64 {
    if anew {
        let _ = fs::write("/proc/self/clear_refs", "5");
    }
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0 kB");
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap_or(0) * 1024
}

/// What is being read, so that it can be told when it never ends.
struct Current {
    case: AtomicU64,
    input: Mutex<(String, Vec<u8>)>,
}

fn temporary() -> tempfile::TempDir {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() }.unwrap()
}

/// Tries one reader. Gives what was found.
fn try_reader(parser: &Parser, cases: u64, current: &Current) -> Vec<String> {
    let seeds = seeds_of(parser.name);
    let dir = temporary();
    let mut findings = Vec::new();
    let (mut taken, mut refused) = (0u64, 0u64);
    for (i, seed) in seeds.iter().enumerate() {
        assert!((parser.read)(seed, dir.path()), "{}: seed {i} is refused", parser.name);
    }
    let before = most_memory(true);
    for case in 0..cases {
        let mut random = Random(case.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ parser.name.len() as u64);
        let input = mutate::input(&seeds, &mut random);
        *current.input.lock().unwrap() = (parser.name.to_owned(), input.clone());
        current.case.fetch_add(1, Ordering::SeqCst);
        match catch_unwind(AssertUnwindSafe(|| (parser.read)(&input, dir.path()))) {
            Ok(true) => taken += 1,
            Ok(false) => refused += 1,
            Err(_) => findings.push(format!("{}: case {case} panics: {}", parser.name, keep(parser.name, &input))),
        }
        if findings.len() > 4 {
            break;
        }
    }
    let most = most_memory(false).saturating_sub(before);
    if most > MEMORY {
        findings.push(format!("{}: takes {most} bytes", parser.name));
    }
    // Were every input refused at once, nothing behind the first check would be tried.
    if findings.is_empty() && taken == 0 {
        findings.push(format!("{}: none of {refused} inputs is taken", parser.name));
    }
    findings
}

/// Keeps an input to be looked at.
fn keep(name: &str, input: &[u8]) -> String {
    let file = std::env::temp_dir().join(format!("fourfold-finding-{name}-{}", std::process::id()));
    fs::write(&file, input).unwrap();
    format!("kept in {}", file.display())
}

#[test]
fn damaged_inputs_are_read_or_refused() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let cases = number("FOURFOLD_FUZZ_CASES").unwrap_or(CASES);
    let only = std::env::var("FOURFOLD_FUZZ_ONLY").unwrap_or_default();
    let usual = std::panic::take_hook();
    let inside = Arc::new(Mutex::new(BTreeSet::new()));
    let guarded = Arc::clone(&inside);
    std::panic::set_hook(Box::new(move |info| {
        if fourfold_infer::is_guarded() {
            guarded.lock().unwrap().insert(info.location().map(|place| place.to_string()).unwrap_or_default());
        } else {
            usual(info);
        }
    }));
    let current = Arc::new(Current { case: AtomicU64::new(0), input: Mutex::default() });
    let watched = Arc::clone(&current);
    let worker = std::thread::spawn(move || {
        let mut findings = Vec::new();
        for parser in PARSERS.iter().filter(|parser| only.is_empty() || only == parser.name) {
            let begun = Instant::now();
            findings.extend(try_reader(parser, cases, &watched));
            println!("{}: {:.1?}", parser.name, begun.elapsed());
        }
        findings
    });
    let (mut last, mut since) = (0, Instant::now());
    while !worker.is_finished() {
        std::thread::sleep(Duration::from_millis(20));
        let now = current.case.load(Ordering::SeqCst);
        if now != last {
            (last, since) = (now, Instant::now());
        } else if since.elapsed() > PATIENCE {
            let (name, input) = current.input.lock().unwrap().clone();
            eprintln!("{name}: an input is not read in {PATIENCE:?}: {}", keep(&name, &input));
            std::process::exit(101);
        }
    }
    let findings = worker.join().unwrap();
    println!("panics of libraries that became errors: {:?}", inside.lock().unwrap());
    assert!(findings.is_empty(), "{}", findings.join("\n"));
}

#[test]
fn every_reader_has_a_fuzz_target() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    let manifest = fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
    for parser in PARSERS {
        let name = parser.name;
        assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")), "{name}: not in fuzz/Cargo.toml");
        let target = fs::read_to_string(fuzz.join("fuzz_targets").join(format!("{name}.rs"))).unwrap();
        assert!(target.contains(&format!("\"{name}\"")), "{name}: its target reads something else");
    }
    assert_eq!(manifest.matches("[[bin]]").count(), PARSERS.len());
}

/// Writes those seeds that this program makes (`cargo test --release -p fourfold --test parsers -- --ignored`).
#[test]
#[ignore = "writes fuzz/seeds"]
fn write_seeds() {
    for (name, seed, bytes) in seeds::all() {
        let folder = folder_of_seeds(name);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(seed), bytes).unwrap();
    }
}
