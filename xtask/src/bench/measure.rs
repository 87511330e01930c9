//! One whole process, from start to exit: time, processor time and peak memory as the operating system accounts them.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use wait4::Wait4;

/// What one run took.
pub struct Run {
    /// From start to exit.
    pub wall: Duration,
    /// Of all threads, in the program and in the system for it.
    pub cpu: Duration,
    /// Largest resident set, bytes.
    pub peak_rss: u64,
    /// What it printed on stdout.
    pub stdout: String,
    /// What it printed on stderr.
    pub stderr: String,
}

/// Runs `command` to its end.
///
/// # Errors
/// When it cannot start or exits with a failure; the error carries the end of its stderr.
pub fn run(command: &mut Command) -> Result<Run> {
    let shown = format!("{command:?}");
    let begun = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| shown.clone())?;
    let mut err = child.stderr.take().context("stderr is piped")?;
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        err.read_to_end(&mut bytes).map(|_| String::from_utf8_lossy(&bytes).into_owned())
    });
    let mut bytes = Vec::new();
    child.stdout.take().context("stdout is piped")?.read_to_end(&mut bytes)?;
    let stderr = reader.join().ok().context("the reader of stderr")??;
    let usage = child.wait4()?;
    ensure!(usage.status.success(), "{shown}: {}\n{}", usage.status, tail(&stderr));
    Ok(Run {
        wall: begun.elapsed(),
        cpu: usage.rusage.utime + usage.rusage.stime,
        peak_rss: usage.rusage.maxrss,
        stdout: String::from_utf8_lossy(&bytes).into_owned(),
        stderr,
    })
}

/// The last lines of a text.
fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

/// The middle of several readings (the mean of the middle two where their number is even).
pub fn median(readings: &[f64]) -> f64 {
    let mut sorted = readings.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    if n == 0 {
        f64::NAN
    } else if n % 2 == 1 {
        sorted[n / 2]
    } else {
        (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0
    }
}
