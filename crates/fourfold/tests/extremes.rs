//! The least and the most that each numeric option takes, in a run of its command: the run does its work, is at it after a while, or
//! refuses; it never panics, aborts or takes all memory. What is refused by the option's name is wrong usage (exit code 2), also where
//! the value can be judged only once a model is open.

#![cfg(unix)]

mod common;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{folder, model, text, tokenizer};
use fourfold::parsers::{Number, numbers};

/// After so long a run is taken to be at work.
const WHILE: Duration = Duration::from_millis(1500);

/// A run of a command in which little happens.
fn words(command: &str) -> &'static str {
    match command {
        "inspect" => "inspect m",
        "compress" => "compress m OUT --bits 4",
        "eval" => "eval m --text t.txt --chunks 1",
        "compare" => "compare m m --text t.txt --chunks 1",
        "generate" => "generate m -p a -n 1",
        "chat" => "chat m",
        "serve" => "serve m --port 0",
        "bench" => "bench m -p 4 -n 1",
        "plan" => "plan m/config.json",
        "train" => {
            "train --model-config m/config.json --tokenizer m/tokenizer.json --data t.txt --output OUT --steps 1 --batch-size 1 --context 16"
        }
        "export" => "export m OUT",
        "merge" => "merge m m OUT",
        _ => "inspect m",
    }
}

/// What is wrong with a run of a value.
fn run(dir: &Path, number: &Number, value: &str, place: usize) -> Option<String> {
    let option = format!("--{}={value}", number.option);
    let mut list: Vec<String> = Vec::new();
    let mut words = words(&number.command).split(' ').peekable();
    while let Some(word) = words.next() {
        // An option is given once.
        let is_same = word.strip_prefix("--").is_some_and(|name| name == number.option)
            || (word == "-n" || word == "-p") && number.option.starts_with(['n', 'p']);
        if is_same {
            words.next();
        } else {
            list.push(if word == "OUT" { format!("out{place}") } else { word.to_owned() });
        }
    }
    let other: &[&str] = match number.option.as_str() {
        "lora-alpha" => &["--lora-rank", "2"],
        "epochs" => &[],
        _ => &[],
    };
    if number.option == "epochs" {
        let at = list.iter().position(|word| word == "--steps").unwrap();
        list.drain(at..at + 2);
    }
    list.extend(other.iter().map(|word| (*word).to_owned()));
    list.push(option.clone());
    if number.option != "threads" {
        list.push("--threads=1".to_owned());
    }
    let err = dir.join(format!("err{place}"));
    let limited = "ulimit -v 4000000; exec \"$0\" \"$@\"";
    let mut command = Command::new("bash");
    command.args(["-c", limited, env!("CARGO_BIN_EXE_fourfold")]).args(&list).current_dir(dir);
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(&err).unwrap()).spawn().unwrap();
    let begun = Instant::now();
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break Some(status),
            None if begun.elapsed() > WHILE => break None,
            None => std::thread::sleep(Duration::from_millis(3)),
        }
    };
    if status.is_none() {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let _ = fs::remove_dir_all(dir.join(format!("out{place}")));
    let said = fs::read_to_string(&err).unwrap_or_default();
    let last = said.lines().last().unwrap_or_default();
    let status = status?;
    let by_name = last.starts_with(&format!("error: --{}", number.option));
    match status.code() {
        Some(0 | 2) => None,
        Some(1) if !by_name && last.starts_with("error: ") => None,
        code => Some(format!("{} {option}: {code:?}, signal {:?}: {said}", number.command, status.signal())),
    }
}

#[test]
fn extremes_of_every_number_are_worked_with_or_refused() {
    let dir = folder();
    model(&dir.path().join("m"));
    fs::write(dir.path().join("m/tokenizer.json"), tokenizer().to_string()).unwrap();
    fs::rename(text(dir.path(), 300), dir.path().join("t.txt")).unwrap();
    let numbers = numbers();
    assert!(numbers.len() > 60, "{}: clap's introspection has found too little", numbers.len());
    let cases: Vec<(&Number, &String)> =
        numbers.iter().flat_map(|number| number.extremes.iter().map(move |v| (number, v))).collect();
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some((number, value)) = cases.get(next.fetch_add(1, Ordering::SeqCst)) {
                    let place = next.load(Ordering::SeqCst) * 1000 + number.option.len();
                    let found = run(dir.path(), number, value, place);
                    wrong.lock().unwrap().extend(found);
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Little address space: a run does its work or says in words that memory or threads are not there.
#[test]
fn too_little_memory_ends_in_words() {
    let dir = folder();
    model(&dir.path().join("m"));
    fs::rename(text(dir.path(), 300), dir.path().join("t.txt")).unwrap();
    // The program itself takes about as much address space as its file has bytes.
    let program = fs::metadata(env!("CARGO_BIN_EXE_fourfold")).unwrap().len() / 1024;
    let mut refused = 0;
    for more in [5_000, 8_000, 12_000, 20_000, 40_000, 80_000, 4_000_000_u64] {
        for command in ["generate", "eval", "compress", "train"] {
            let words = words(command).replace("OUT", &format!("{command}{more}"));
            let limited = format!("ulimit -v {}; exec \"$0\" \"$@\" --threads=2", program + more);
            let mut run = Command::new("bash");
            run.args(["-c", &limited, env!("CARGO_BIN_EXE_fourfold")]).args(words.split(' ')).current_dir(dir.path());
            let output = run.stdin(Stdio::null()).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            let last = said.lines().last().unwrap_or_default();
            match output.status.code() {
                Some(0) => {}
                Some(1) if last.starts_with("error: ") && more < 1_000_000 => refused += 1,
                code => panic!("{command} with {more} kB: {code:?}, signal {:?}: {said}", output.status.signal()),
            }
        }
    }
    assert!(refused > 0, "no limit was low enough to try anything");
}
