//! Memory the operating system counts for a process.

/// The largest resident set of this process so far, in bytes; `None` where the system does not say.
pub fn peak_resident() -> Option<u64> {
    status_field("self", "VmHWM:")
}

/// The resident set of another process, in bytes; `None` where the system does not say, or the process is gone.
pub fn resident(process: u32) -> Option<u64> {
    status_field(&process.to_string(), "VmRSS:")
}

/// A field of Linux's `/proc/PROCESS/status`, given in kB.
fn status_field(process: &str, name: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(name))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}
