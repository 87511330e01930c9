//! Memory the operating system counts for this process.

/// The largest resident set so far, in bytes; `None` where the system does not say.
pub fn peak_resident() -> Option<u64> {
    status_field("VmHWM:")
}

/// A field of Linux's `/proc/self/status`, given in kB.
fn status_field(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(name))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}
