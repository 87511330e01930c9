//! Read-only memory maps: the crate's only `unsafe`.

use std::path::Path;
use std::sync::Arc;

use fourfold_tensor::SharedBytes;

use crate::{FormatError, regular};

/// Maps the whole of `path`. An empty file gives empty bytes.
///
/// The caller accepts what every program that maps a file does: another process that truncates the file while it is mapped ends
/// this one with SIGBUS. Readers that must not risk it read by position instead.
///
/// # Errors
/// [`FormatError::Io`].
pub fn map(path: &Path) -> Result<SharedBytes, FormatError> {
    let file = regular::open(path).map_err(FormatError::io(path))?;
    if file.metadata().map_err(FormatError::io(path))?.len() == 0 {
        return Ok(Arc::new(Vec::new()));
    }
    // SAFETY: the map is read-only and private to this process; nothing here writes to the file. That no other process changes
    // it cannot be checked, and is the caller's to accept (see above).
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(FormatError::io(path))?;
    Ok(Arc::new(map))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_what_the_file_holds() {
        let dir = tempfile::tempdir().unwrap();
        let (full, empty) = (dir.path().join("full"), dir.path().join("empty"));
        std::fs::write(&full, b"fourfold").unwrap();
        std::fs::write(&empty, b"").unwrap();
        assert_eq!((*map(&full).unwrap()).as_ref(), b"fourfold");
        assert_eq!((*map(&empty).unwrap()).as_ref(), b"");
        assert!(matches!(map(&dir.path().join("none")), Err(FormatError::Io { .. })));
    }
}
