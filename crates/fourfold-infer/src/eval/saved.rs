//! A model's predictions kept in a file, so that many models can be compared with one that is run once, or that does not
//! fit beside them.
//!
//! The file is safetensors, written as a stream: `input_ids` U32 (all windows, one after another), `windows` U32
//! `[windows, 2]` (tokens, first scored position), `codes` U16 `[scored, vocab]` and `range` F32 `[scored, 2]`, where a
//! log-probability is `range[0] + code · range[1]`. The rounding error, half a step, is some 2e-4 nats.

use std::io::{Read, Seek, SeekFrom, Write};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::windows::Window;
use crate::InferError;

/// Codes of a row go from 0 to this.
const LARGEST: f32 = 65_535.0;

/// Largest header that is read.
const MOST_HEADER: u64 = 1 << 20;

fn corrupt(why: impl Into<String>) -> InferError {
    InferError::Io(std::io::Error::new(std::io::ErrorKind::InvalidData, why.into()))
}

/// Writes predictions as they are made.
pub struct SavedLogitsWriter {
    out: Box<dyn Write>,
    vocab: usize,
    rows: usize,
    ranges: Vec<[f32; 2]>,
}

impl SavedLogitsWriter {
    /// Begins a file for these windows' predictions over `vocab` tokens.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn new(mut out: Box<dyn Write>, windows: &[Window], vocab: usize) -> Result<Self, InferError> {
        let ids: Vec<u32> = windows.iter().flat_map(|w| w.ids.iter().copied()).collect();
        let shape: Vec<u32> = windows.iter().flat_map(|w| [w.ids.len() as u32, w.first as u32]).collect();
        let rows = windows.iter().map(Window::scored).sum();
        let mut end = 0;
        let mut tensor = |name: &str, dtype: Dtype, shape: Vec<usize>, size: usize| {
            let start = end;
            end += shape.iter().product::<usize>() * size;
            (name.to_owned(), TensorInfo { dtype, shape, data_offsets: (start, end) })
        };
        let tensors = vec![
            tensor("input_ids", Dtype::U32, vec![ids.len()], 4),
            tensor("windows", Dtype::U32, vec![windows.len(), 2], 4),
            tensor("codes", Dtype::U16, vec![rows, vocab], 2),
            tensor("range", Dtype::F32, vec![rows, 2], 4),
        ];
        let metadata = Metadata::new(None, tensors).map_err(|e| corrupt(e.to_string()))?;
        let header = serde_json::to_vec(&metadata).map_err(|e| corrupt(e.to_string()))?;
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for word in ids.iter().chain(&shape) {
            out.write_all(&word.to_le_bytes())?;
        }
        Ok(Self { out, vocab, rows, ranges: Vec::with_capacity(rows) })
    }

    /// Appends one position's logits, less their log-sum.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn push(&mut self, logits: &[f32], log_sum: f64) -> Result<(), InferError> {
        let (low, high) = logits.iter().fold((f32::MAX, f32::MIN), |(l, h), &v| (l.min(v), h.max(v)));
        let step = ((high - low) / LARGEST).max(f32::MIN_POSITIVE);
        let mut row = Vec::with_capacity(self.vocab * 2);
        for &logit in logits {
            row.extend_from_slice(&(((logit - low) / step).round() as u16).to_le_bytes());
        }
        self.ranges.push([low - log_sum as f32, step]);
        Ok(self.out.write_all(&row)?)
    }

    /// Completes the file.
    ///
    /// # Errors
    /// The file cannot be written, or fewer positions came than were announced.
    pub fn finish(mut self) -> Result<(), InferError> {
        if self.ranges.len() != self.rows {
            return Err(corrupt(format!("{} of {} positions were written", self.ranges.len(), self.rows)));
        }
        for value in self.ranges.iter().flatten() {
            self.out.write_all(&value.to_le_bytes())?;
        }
        Ok(self.out.flush()?)
    }
}

/// Reads predictions back, in the order they were written.
pub struct SavedLogits<R> {
    file: R,
    windows: Vec<(Vec<u32>, usize)>,
    ranges: Vec<[f32; 2]>,
    vocab: usize,
    next: usize,
}

impl<R: Read + Seek> SavedLogits<R> {
    /// Opens a file and reads everything but the predictions.
    ///
    /// # Errors
    /// It is not a file that [`SavedLogitsWriter`] completed.
    pub fn open(mut file: R) -> Result<Self, InferError> {
        let bytes = file.seek(SeekFrom::End(0))?;
        file.rewind()?;
        let mut size = [0; 8];
        file.read_exact(&mut size)?;
        let size = u64::from_le_bytes(size);
        if size > MOST_HEADER.min(bytes.saturating_sub(8)) {
            return Err(corrupt(format!("a header of {size} bytes: not a file of saved logits")));
        }
        let mut header = vec![0; size as usize];
        file.read_exact(&mut header)?;
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|e| corrupt(format!("not a file of saved logits: {e}")))?;
        let data = 8 + size;
        if metadata.data_len() as u64 > bytes - data {
            return Err(corrupt("the file ends early"));
        }
        let find = |name: &str, dtype: Dtype| match metadata.info(name) {
            Some(info) if info.dtype == dtype => Ok(info.clone()),
            _ => Err(corrupt(format!("no tensor {name} of type {dtype:?}: not a file of saved logits"))),
        };
        let (ids, shape) = (find("input_ids", Dtype::U32)?, find("windows", Dtype::U32)?);
        let (range, codes) = (find("range", Dtype::F32)?, find("codes", Dtype::U16)?);
        let ids = words(&mut file, data, &ids)?;
        let shape = words(&mut file, data, &shape)?;
        let ranges = words(&mut file, data, &range)?;
        let ranges: Vec<[f32; 2]> =
            ranges.chunks_exact(2).map(|p| [f32::from_bits(p[0]), f32::from_bits(p[1])]).collect();
        let [rows, vocab] = codes.shape[..] else { return Err(corrupt("codes is not a matrix")) };
        let mut windows = Vec::new();
        let mut rest = &ids[..];
        for pair in shape.chunks_exact(2) {
            let (window, after) =
                rest.split_at_checked(pair[0] as usize).ok_or_else(|| corrupt("windows and input_ids disagree"))?;
            windows.push((window.to_vec(), pair[1] as usize));
            rest = after;
        }
        if rows != ranges.len() {
            return Err(corrupt("codes and range disagree"));
        }
        file.seek(SeekFrom::Start(data + codes.data_offsets.0 as u64))?;
        Ok(Self { file, windows, ranges, vocab, next: 0 })
    }

    /// Checks that these are the predictions for `windows` of a model with `vocab` tokens.
    ///
    /// # Errors
    /// [`InferError::Incomparable`], saying what differs.
    pub(crate) fn check(&self, windows: &[Window], vocab: usize) -> Result<(), InferError> {
        let refuse = |why: String| Err(InferError::Incomparable(why));
        if self.vocab != vocab {
            return refuse(format!("the saved logits are of {} tokens, the model has {vocab}", self.vocab));
        }
        if windows.len() > self.windows.len() {
            let (saved, asked) = (self.windows.len(), windows.len());
            return refuse(format!("the saved logits are of {saved} windows, {asked} are asked for"));
        }
        let differs = windows.iter().zip(&self.windows).position(|(w, s)| w.ids != s.0 || w.first != s.1);
        match differs {
            Some(i) => {
                refuse(format!("the saved logits are of another text, context or tokenizer (window {i} differs)"))
            }
            None => Ok(()),
        }
    }

    /// Positions that are still to be read.
    pub fn left(&self) -> usize {
        self.ranges.len() - self.next
    }

    /// The next `rows` positions' log-probabilities, `[rows, vocab]`.
    ///
    /// # Errors
    /// The file ends early.
    pub fn read(&mut self, rows: usize) -> Result<Vec<f32>, InferError> {
        let ranges = self.ranges.get(self.next..self.next + rows).ok_or_else(|| corrupt("no more positions"))?;
        let mut bytes = vec![0; rows * self.vocab * 2];
        self.file.read_exact(&mut bytes)?;
        self.next += rows;
        let mut values = Vec::with_capacity(rows * self.vocab);
        for (row, [low, step]) in bytes.chunks_exact((self.vocab * 2).max(1)).zip(ranges) {
            values.extend(row.chunks_exact(2).map(|c| low + f32::from(u16::from_le_bytes([c[0], c[1]])) * step));
        }
        Ok(values)
    }
}

/// A tensor of 4-byte elements.
fn words<R: Read + Seek>(file: &mut R, data: u64, info: &TensorInfo) -> Result<Vec<u32>, InferError> {
    file.seek(SeekFrom::Start(data + info.data_offsets.0 as u64))?;
    let length = info.data_offsets.1 - info.data_offsets.0;
    let mut bytes = Vec::new();
    file.by_ref().take(length as u64).read_to_end(&mut bytes)?;
    if bytes.len() != length {
        return Err(corrupt("the file ends early"));
    }
    Ok(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;
    use std::sync::{Arc, Mutex};

    use safetensors::SafeTensors;

    use super::*;

    /// A buffer that outlives the boxed writer.
    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn written() -> (Vec<u8>, Vec<Window>, Vec<Vec<f32>>) {
        let windows = vec![
            Window { ids: vec![1, 2, 3, 4], first: 1, weight: 1.0 },
            Window { ids: vec![1, 5, 6], first: 1, weight: 1.0 },
        ];
        let rows: Vec<Vec<f32>> =
            (0..3).map(|r| (0..10).map(|i| ((i * 3 + r * 5) % 11) as f32 - 20.0).collect()).collect();
        let buffer = Shared::default();
        let mut writer = SavedLogitsWriter::new(Box::new(buffer.clone()), &windows, 10).unwrap();
        for row in &rows {
            writer.push(row, super::super::softmax::log_sum(row).log_sum).unwrap();
        }
        writer.finish().unwrap();
        let bytes = buffer.0.lock().unwrap().clone();
        (bytes, windows, rows)
    }

    #[test]
    fn come_back_as_log_probabilities() {
        let (bytes, windows, rows) = written();
        let parsed = SafeTensors::deserialize(&bytes).expect("a valid safetensors file");
        assert_eq!(parsed.tensor("codes").unwrap().shape(), [3, 10]);
        let mut saved = SavedLogits::open(Cursor::new(bytes)).unwrap();
        saved.check(&windows, 10).unwrap();
        let mut read = saved.read(2).unwrap();
        read.extend(saved.read(1).unwrap());
        for (row, back) in rows.iter().zip(read.chunks(10)) {
            let log_sum = super::super::softmax::log_sum(row).log_sum;
            for (logit, log_p) in row.iter().zip(back) {
                assert!((f64::from(*logit) - log_sum - f64::from(*log_p)).abs() < 2e-4, "{logit} {log_p}");
            }
        }
        assert!(saved.read(1).is_err(), "no fourth row");
    }

    #[test]
    fn another_text_or_vocabulary_is_refused() {
        let (bytes, mut windows, _) = written();
        let saved = SavedLogits::open(Cursor::new(bytes)).unwrap();
        assert!(saved.check(&windows, 11).is_err());
        windows[1].ids[2] = 9;
        assert!(saved.check(&windows, 10).unwrap_err().to_string().contains("window 1"));
        windows.truncate(1);
        saved.check(&windows, 10).unwrap();
    }

    #[test]
    fn damaged_files_are_errors() {
        let (bytes, _, _) = written();
        for length in [0, 7, 12, 60, bytes.len() - 1] {
            assert!(SavedLogits::open(Cursor::new(bytes[..length].to_vec())).is_err(), "{length} bytes");
        }
        let mut oversized = bytes;
        oversized[7] = 0xff;
        assert!(SavedLogits::open(Cursor::new(oversized)).is_err());
    }
}
