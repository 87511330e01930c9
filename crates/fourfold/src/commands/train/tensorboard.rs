//! TensorBoard event files: records of `tensorflow.Event` messages, each with its length and checksums.
//!
//! A record is the length (u64), the masked CRC-32C of the length, the message, and the masked CRC-32C of the message. Of the messages
//! only five fields are needed, so they are written by hand.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// An open event file.
pub struct EventFile {
    file: File,
}

impl EventFile {
    /// A new file in `folder`. Events of steps after `step`, which a run that was stopped has left in older files, are void.
    pub fn create(folder: &Path, step: u64) -> io::Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let name = format!("events.out.tfevents.{:010}.fourfold.{}", now.as_secs(), std::process::id());
        // Never the file of another run, also where process numbers come again within a second.
        let names = std::iter::once(name.clone()).chain((1..100).map(|i| format!("{name}.{i}")));
        let mut file = Err(io::ErrorKind::AlreadyExists.into());
        for name in names {
            file = File::create_new(folder.join(name));
            if !matches!(&file, Err(e) if e.kind() == io::ErrorKind::AlreadyExists) {
                break;
            }
        }
        let mut events = Self { file: file? };
        // Event.file_version = 3.
        events.record(0, &bytes(3, b"brain.Event:2"))?;
        events.restart(step)?;
        Ok(events)
    }

    /// Makes all records durable.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Makes what was written of steps after `step` void.
    pub fn restart(&mut self, step: u64) -> io::Result<()> {
        // Event.session_log = 7 with SessionLog.status = START.
        self.record(step + 1, &bytes(7, &number(1, 1)))
    }

    /// Appends scalars of a step.
    pub fn scalars<'a>(&mut self, step: u64, values: impl Iterator<Item = (&'a str, f32)>) -> io::Result<()> {
        // Event.summary = 5, Summary.value = 1 with Value.tag = 1 and Value.simple_value = 2.
        let summary: Vec<u8> = values
            .flat_map(|(tag, value)| {
                let mut message = bytes(1, tag.as_bytes());
                message.push(2 << 3 | 5);
                message.extend(value.to_le_bytes());
                bytes(1, &message)
            })
            .collect();
        self.record(step, &bytes(5, &summary))
    }

    /// Event.wall_time = 1, Event.step = 2, and what happened.
    fn record(&mut self, step: u64, what: &[u8]) -> io::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut message = vec![1 << 3 | 1];
        message.extend(now.as_secs_f64().to_le_bytes());
        message.extend(number(2, step));
        message.extend(what);
        let length = (message.len() as u64).to_le_bytes();
        let mut record = length.to_vec();
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(&message);
        record.extend(masked_crc(&message).to_le_bytes());
        self.file.write_all(&record)
    }
}

/// A field of protocol buffers that holds bytes.
fn bytes(field: u8, value: &[u8]) -> Vec<u8> {
    let mut out = vec![field << 3 | 2];
    varint(value.len() as u64, &mut out);
    out.extend(value);
    out
}

/// A field that holds a number.
fn number(field: u8, value: u64) -> Vec<u8> {
    let mut out = vec![field << 3];
    varint(value, &mut out);
    out
}

fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A checksum as TFRecord files hold it: rotated, and moved by a constant, so that a checksum of checksums is no accident.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_framed_and_checked() {
        // RFC 3720, B.4: the checksum of 32 zeros.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        let folder = tempfile::tempdir().unwrap();
        let mut events = EventFile::create(folder.path(), 41).unwrap();
        events.scalars(300, [("loss", 1.5f32)].into_iter()).unwrap();
        let file = std::fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
        let data = std::fs::read(file).unwrap();
        let mut rest = &data[..];
        let mut messages = Vec::new();
        while !rest.is_empty() {
            let len = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(rest[8..12], masked_crc(&rest[..8]).to_le_bytes());
            assert_eq!(rest[12 + len..16 + len], masked_crc(&rest[12..12 + len]).to_le_bytes());
            messages.push(&rest[12..12 + len]);
            rest = &rest[16 + len..];
        }
        assert_eq!(messages.len(), 3);
        assert!(messages[0].ends_with(b"\x1a\x0dbrain.Event:2"));
        assert_eq!(messages[1][9..], [2 << 3, 42, 7 << 3 | 2, 2, 1 << 3, 1]);
        let value =
            [&[2 << 3, 0xac, 2, 5 << 3 | 2, 13, 1 << 3 | 2, 11, 1 << 3 | 2, 4][..], b"loss", &[2 << 3 | 5]].concat();
        assert_eq!(messages[2][9..], [&value[..], &1.5f32.to_le_bytes()].concat());
    }
}
