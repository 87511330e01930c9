//! This program run again, so that a figure is that of a process of its own.

use std::ffi::OsStr;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use serde_json::Value;

use crate::context::Context;
use crate::{interrupt, memory};

/// Time between two looks at a process's memory.
const INTERVAL: Duration = Duration::from_millis(10);

/// Resident memory of a process at a time.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Sample {
    /// Seconds since the process started.
    pub seconds: f64,
    /// Bytes.
    pub resident: u64,
}

/// Runs `fourfold COMMAND OPTIONS… --json` and reads its report; also what memory it held over time, where the system says.
///
/// # Errors
/// The program cannot be started, fails, or is interrupted.
pub fn run(context: &Context, command: &str, options: &[&OsStr]) -> Result<(Value, Vec<Sample>)> {
    let program = std::env::current_exe().context("the path of this program")?;
    let mut child = Command::new(program)
        .arg(command)
        .args(options)
        .arg("--json")
        .args(context.global.for_child(command))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .with_context(|| format!("fourfold {command}"))?;
    let mut stdout = child.stdout.take().context("the standard output of a child")?;
    // Read aside, so that a long report does not block the child while this thread looks at its memory.
    let read = move || {
        let mut text = Vec::new();
        stdout.read_to_end(&mut text).map(|_| text)
    };
    let reader = match thread::Builder::new().spawn(read) {
        Ok(reader) => reader,
        Err(error) => {
            child.kill().and_then(|()| child.wait()).context("a child that cannot be listened to")?;
            return Err(error).context("a thread that reads a child's report");
        }
    };
    let samples = watch(&mut child).with_context(|| format!("fourfold {command}"))?;
    let status = child.wait().with_context(|| format!("fourfold {command}"))?;
    let text = reader.join().ok().context("the reader of a child's output")?;
    if interrupt::requested() {
        bail!("interrupted");
    }
    if !status.success() {
        bail!("fourfold {command} failed ({status})");
    }
    let text = text.with_context(|| format!("the report of fourfold {command}"))?;
    let report = serde_json::from_slice(&text).with_context(|| format!("the report of fourfold {command}"))?;
    Ok((report, samples))
}

/// Looks at a child's memory until it ends.
fn watch(child: &mut Child) -> std::io::Result<Vec<Sample>> {
    let start = Instant::now();
    let mut samples = Vec::new();
    while child.try_wait()?.is_none() {
        if let Some(resident) = memory::resident(child.id()) {
            samples.push(Sample { seconds: start.elapsed().as_secs_f64(), resident });
        }
        thread::sleep(INTERVAL);
    }
    Ok(samples)
}

/// A number of a report.
///
/// # Errors
/// It has no such number.
pub fn number(report: &Value, key: &str) -> Result<f64> {
    report.get(key).and_then(Value::as_f64).with_context(|| format!("the report has no {key}"))
}

/// An integer of a report; memory is 0 where the operating system does not say.
///
/// # Errors
/// It has no such number.
pub fn integer(report: &Value, key: &str) -> Result<u64> {
    match report.get(key) {
        Some(Value::Null) => Ok(0),
        value => value.and_then(Value::as_u64).with_context(|| format!("the report has no {key}")),
    }
}
