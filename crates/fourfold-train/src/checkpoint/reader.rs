//! A checkpoint's tensors on their way back.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use safetensors::tensor::Metadata;

use super::CheckpointError;
use super::checksums::{Checksums, DIFFERS};

/// A header larger than this is no checkpoint of ours.
const MOST_HEADER: u64 = 100_000_000;

/// A safetensors file read by tensor.
pub(super) struct Reader<'a> {
    path: PathBuf,
    sums: &'a Checksums,
    file: File,
    metadata: Metadata,
    data_start: u64,
}

impl<'a> Reader<'a> {
    pub fn open(path: &Path, sums: &'a Checksums) -> Result<Self, CheckpointError> {
        let io = |source| CheckpointError::Io { file: path.to_path_buf(), source };
        let malformed = |reason: String| CheckpointError::Malformed { file: path.to_path_buf(), reason };
        let mut file = File::open(path).map_err(io)?;
        let size = file.metadata().map_err(io)?.len();
        let mut length = [0u8; 8];
        file.read_exact(&mut length).map_err(io)?;
        let length = u64::from_le_bytes(length);
        if length > MOST_HEADER.min(size.saturating_sub(8)) {
            return Err(malformed(format!("a header of {length} bytes in a file of {size}")));
        }
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header).map_err(io)?;
        let metadata: Metadata = serde_json::from_slice(&header).map_err(|e| malformed(e.to_string()))?;
        let data: usize = metadata.data_len();
        if size != 8 + length + data as u64 {
            return Err(malformed(format!("{size} bytes, its header describes {}", 8 + length + data as u64)));
        }
        Ok(Self { path: path.to_path_buf(), sums, file, metadata, data_start: 8 + length })
    }

    /// Reads every tensor that was written.
    pub fn check(&mut self) -> Result<(), CheckpointError> {
        let file = self.path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        for tensor in self.sums.tensors_of(&file) {
            let bytes = self.metadata.info(&tensor).map_or(0, |info| info.data_offsets.1 - info.data_offsets.0);
            self.read(&tensor, &mut vec![0; bytes])?;
        }
        Ok(())
    }

    /// Fills `into` with a tensor, which must be as it was written.
    pub fn read(&mut self, tensor: &str, into: &mut [u8]) -> Result<(), CheckpointError> {
        let fail = |reason| CheckpointError::Tensor { file: self.path.clone(), tensor: tensor.to_owned(), reason };
        let info = self.metadata.info(tensor).ok_or_else(|| fail("is not there".to_owned()))?;
        let (begin, end) = info.data_offsets;
        if end - begin != into.len() {
            return Err(fail(format!("{} bytes, this run's has {}", end - begin, into.len())));
        }
        self.file
            .seek(SeekFrom::Start(self.data_start + begin as u64))
            .and_then(|_| self.file.read_exact(into))
            .map_err(|source| CheckpointError::Io { file: self.path.clone(), source })?;
        let file = self.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if self.sums.is_tensor(file, tensor, into) { Ok(()) } else { Err(fail(DIFFERS.to_owned())) }
    }
}
