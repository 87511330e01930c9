//! Memory the operating system counts for a process.

use std::fs;
use std::path::{Path, PathBuf};

/// The largest resident set of this process so far, in bytes; `None` where the system does not say.
pub fn peak_resident() -> Option<u64> {
    status_field("self", "VmHWM:")
}

/// The resident set of this process, in bytes.
pub fn resident_now() -> Option<u64> {
    status_field("self", "VmRSS:")
}

/// The resident set of another process, in bytes; `None` where the system does not say, or the process is gone.
pub fn resident(process: u32) -> Option<u64> {
    status_field(&process.to_string(), "VmRSS:")
}

/// Bytes that this process can still take without swapping: what the system says is available, or less where a control group allows
/// less. `None` where the system does not say.
pub fn available() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let system = kilobytes(&text, "MemAvailable:")?;
    Some(group_room().map_or(system, |room| system.min(room)))
}

/// What the control groups of this process, and those above them, leave of their limits. Pages of files that were read and are not in
/// use are given up for others.
fn group_room() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let number = |path: PathBuf| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let room = |group: &Path, limit: &str, usage: &str, stat: &str| {
        let limit = number(group.join(limit))?;
        let text = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
        let idle = text.lines().find_map(|l| l.strip_prefix(stat)?.trim().parse::<u64>().ok()).unwrap_or(0);
        Some((limit + idle).saturating_sub(number(group.join(usage))?).min(limit))
    };
    let of = |line: &str| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let (mount, files) = match controllers {
            "" => ("/sys/fs/cgroup", ["memory.max", "memory.current", "inactive_file "]),
            "memory" => {
                ("/sys/fs/cgroup/memory", ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "])
            }
            _ => return None,
        };
        let group = Path::new(mount).join(path.trim_start_matches('/'));
        let above = group.ancestors().take_while(|place| place.starts_with(mount));
        above.filter_map(|place| room(place, files[0], files[1], files[2])).min()
    };
    groups.lines().filter_map(of).min()
}

/// A field of Linux's `/proc/PROCESS/status`, given in kB.
fn status_field(process: &str, name: &str) -> Option<u64> {
    kilobytes(&fs::read_to_string(format!("/proc/{process}/status")).ok()?, name)
}

/// A field given in kB, in bytes.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn what_is_available_is_part_of_what_there_is() {
        let total = kilobytes(&fs::read_to_string("/proc/meminfo").unwrap(), "MemTotal:").unwrap();
        assert!(available().is_some_and(|free| free > 0 && free <= total));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn what_is_written_is_resident() {
        // The system counts for each CPU apart and sums a little late; and beside this test others take memory and free it.
        const WRITTEN: usize = 64 << 20;
        let written = std::hint::black_box(vec![1u8; WRITTEN]);
        for counted in [resident_now(), resident(std::process::id()), peak_resident()] {
            assert!(counted.is_some_and(|bytes| bytes > WRITTEN as u64 / 8 * 7), "{counted:?} of {WRITTEN}");
        }
        drop(std::hint::black_box(written));
        assert!(peak_resident().is_some_and(|bytes| bytes > WRITTEN as u64 / 8 * 7));
        assert_eq!(resident(u32::MAX), None);
    }
}
