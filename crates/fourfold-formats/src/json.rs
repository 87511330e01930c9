//! JSON files of bounded size. Depth is bounded by serde_json itself (128 levels).

use std::io::Read;
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::{FormatError, regular};

/// Most bytes of a configuration file. A tokenizer.json of a large vocabulary has some 10 MB; configurations a few kB.
pub(crate) const CONFIG_LIMIT: u64 = 16 << 20;
/// Most bytes of a shard index: DeepSeek-V3's, of 91 thousand tensors, has 9 MB.
pub(crate) const INDEX_LIMIT: u64 = 100 << 20;

/// Reads `path` whole, if it has at most `limit` bytes.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String, FormatError> {
    let file = regular::open(path).map_err(FormatError::io(path))?;
    let mut bytes = Vec::new();
    // One byte beyond the limit tells a file that is too long from one that just fits, whatever its metadata say.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(FormatError::io(path))?;
    if bytes.len() as u64 > limit {
        let reason = format!("longer than {limit} bytes, the most such a file may have");
        return Err(FormatError::Json { file: path.to_owned(), reason });
    }
    String::from_utf8(bytes)
        .map_err(|e| FormatError::Json { file: path.to_owned(), reason: format!("not UTF-8: {}", e.utf8_error()) })
}

/// Reads and parses `path`.
pub(crate) fn read<T: DeserializeOwned>(path: &Path, limit: u64) -> Result<T, FormatError> {
    let text = read_text(path, limit)?;
    serde_json::from_str(&text).map_err(|e| FormatError::Json { file: path.to_owned(), reason: e.to_string() })
}

/// Reads and parses `path`, `None` where there is no such file.
pub(crate) fn read_if_present<T: DeserializeOwned>(path: &Path, limit: u64) -> Result<Option<T>, FormatError> {
    match path.try_exists().map_err(FormatError::io(path))? {
        true => read(path, limit).map(Some),
        false => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn bounds_size_and_depth() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, "[1, 2]").unwrap();
        assert_eq!(read::<Value>(&path, 6).unwrap(), serde_json::json!([1, 2]));
        let error = read::<Value>(&path, 5).unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains("longer than 5 bytes"), "{error}");
        std::fs::write(&path, "[".repeat(100_000)).unwrap();
        let error = read::<Value>(&path, CONFIG_LIMIT).unwrap_err().to_string();
        assert!(error.contains("recursion limit"), "{error}");
        std::fs::write(&path, b"\"\xff\"").unwrap();
        let error = read::<Value>(&path, CONFIG_LIMIT).unwrap_err().to_string();
        assert!(error.contains("not UTF-8"), "{error}");
        assert!(read::<Value>(dir.path(), 10).unwrap_err().to_string().contains("a directory"));
        assert!(read_if_present::<Value>(&dir.path().join("none.json"), 10).unwrap().is_none());
    }
}
