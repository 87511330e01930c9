//! The program as a process with limits.

use std::fs::File;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// What a process may take.
pub struct Limits {
    /// Wall-clock time, after which it hangs.
    pub seconds: u64,
    /// Address space.
    pub bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { seconds: 60, bytes: 4 << 30 }
    }
}

/// How a process ended.
pub struct Ended {
    status: ExitStatus,
    timed_out: bool,
    text: String,
}

/// What that means.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Exit code 0.
    Succeeded,
    /// Exit code 1 or 2, with a reason.
    Refused,
    /// A panic, an abort, a hang, an end without a reason.
    Bad(String),
}

impl Ended {
    pub fn outcome(&self) -> Outcome {
        let has_reason = self.text.lines().any(|l| l.trim_start().starts_with("error:"));
        if self.timed_out {
            return Outcome::Bad("a hang".to_owned());
        }
        if self.text.contains("panicked at") || self.text.contains("a bug in fourfold") {
            return Outcome::Bad("a panic".to_owned());
        }
        match (self.status.code(), self.status.signal()) {
            (Some(0), _) => Outcome::Succeeded,
            (Some(1 | 2), _) if has_reason => Outcome::Refused,
            (Some(code), _) => Outcome::Bad(format!("exit code {code} without a reason")),
            (None, signal) => Outcome::Bad(format!("an abort (signal {signal:?})")),
        }
    }

    /// Whether it was killed from outside.
    pub fn was_killed(&self) -> bool {
        self.status.signal() == Some(9) || self.status.code() == Some(137)
    }

    /// The end of what it said.
    pub fn tail(&self) -> String {
        let lines: Vec<&str> = self.text.lines().rev().take(4).collect();
        lines.into_iter().rev().map(|l| format!("    | {l}\n")).collect()
    }
}

/// Runs the program in `place`; `before` is what it is started by (strace, say).
pub fn run(program: &Path, arguments: &[String], place: &Path, limits: &Limits, before: &[String]) -> Result<Ended> {
    let said = place.with_extension("said");
    let mut words =
        vec!["prlimit".to_owned(), format!("--as={}", limits.bytes), "--core=0".to_owned(), "--".to_owned()];
    words.extend_from_slice(before);
    let mut child = Command::new(&words[0])
        .args(&words[1..])
        .arg(program)
        .args(arguments)
        .current_dir(place)
        .env("HF_HUB_OFFLINE", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&said)?)
        .spawn()
        .with_context(|| format!("{} cannot be started", words[0]))?;
    let begin = Instant::now();
    let mut timed_out = false;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if begin.elapsed() > Duration::from_secs(limits.seconds) {
            timed_out = true;
            child.kill()?;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let mut bytes = Vec::new();
    File::open(&said)?.take(1 << 20).read_to_end(&mut bytes)?;
    Ok(Ended { status, timed_out, text: String::from_utf8_lossy(&bytes).into_owned() })
}
