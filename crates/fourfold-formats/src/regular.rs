//! Files that are what they seem. A directory, a pipe that nobody writes to, or a device without an end under a file's name is refused
//! before it is opened: opening a pipe waits, reading a device never ends.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

/// Opens a regular file (or a link to one) for reading.
///
/// # Errors
/// There is none, or something else is there: the error says what.
pub fn open(path: &Path) -> io::Result<File> {
    let kind = fs::metadata(path)?.file_type();
    if kind.is_file() {
        return File::open(path);
    }
    let what = if kind.is_dir() { "a directory" } else { other(kind) };
    Err(io::Error::new(io::ErrorKind::InvalidInput, format!("is {what}; a regular file is expected")))
}

#[cfg(unix)]
fn other(kind: fs::FileType) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    match () {
        () if kind.is_fifo() => "a pipe",
        () if kind.is_socket() => "a socket",
        () => "a device",
    }
}

#[cfg(not(unix))]
fn other(_kind: fs::FileType) -> &'static str {
    "no file"
}

/// A regular file's bytes, if it has at most `limit`.
///
/// # Errors
/// As [`open`]; it is longer, or cannot be read.
pub fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // One byte beyond the limit tells a file that is too long from one that just fits, whatever its metadata say.
    open(path)?.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        let reason = format!("longer than {limit} bytes, the most such a file may have");
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    Ok(bytes)
}

/// A regular file's text, if it has at most `limit` bytes.
///
/// # Errors
/// As [`read`]; it is not UTF-8.
pub fn read_text(path: &Path, limit: u64) -> io::Result<String> {
    let invalid = |e: std::string::FromUtf8Error| {
        io::Error::new(io::ErrorKind::InvalidData, format!("not UTF-8: {}", e.utf8_error()))
    };
    String::from_utf8(read(path, limit)?).map_err(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_regular_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let reason = |path: &Path| read(path, 10).unwrap_err().to_string();
        assert!(reason(dir.path()).contains("a directory"));
        let file = dir.path().join("file");
        fs::write(&file, b"12345678901").unwrap();
        assert!(reason(&file).contains("longer than 10 bytes"));
        assert_eq!(read(&file, 11).unwrap().len(), 11);
        fs::write(&file, b"\xff").unwrap();
        assert!(read_text(&file, 10).unwrap_err().to_string().contains("not UTF-8"));
        assert_eq!(reason(&dir.path().join("none")), io::Error::from_raw_os_error(2).to_string());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn pipes_and_devices_do_not_hold_anybody_up() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR).unwrap();
        for (path, what) in [(pipe.as_path(), "a pipe"), (Path::new("/dev/zero"), "a device")] {
            assert!(open(path).unwrap_err().to_string().contains(what), "{}", path.display());
        }
    }
}
