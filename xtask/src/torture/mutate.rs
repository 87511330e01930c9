//! Damage to a file: in its bytes, in the numbers and structure of its JSON, or to what kind of file it is.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use serde_json::{Value, json};

use super::random::Random;

/// Damages a file in one way, and says which.
pub fn one(file: &Path, random: &mut Random) -> Result<String> {
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if random.below(25) == 0 {
        return Ok(format!("{name}: {}", kind(file, random)?));
    }
    let bytes = fs::read(file)?;
    let is_json = ["json", "jsonl"].iter().any(|e| file.extension().is_some_and(|x| x == *e));
    let (how, bytes) = match serde_json::from_slice::<Value>(&bytes) {
        Ok(value) if is_json && random.below(4) > 0 => structure(value, random),
        _ if name.ends_with(".safetensors") && random.below(2) == 0 => header(bytes, random),
        _ if random.below(3) == 0 => number(bytes, random),
        _ => raw(bytes, random),
    };
    fs::write(file, bytes)?;
    Ok(format!("{name}: {how}"))
}

/// Another kind of file under its name.
fn kind(file: &Path, random: &mut Random) -> Result<&'static str> {
    fs::remove_file(file)?;
    Ok(match random.below(6) {
        0 => {
            fs::create_dir(file)?;
            "a directory"
        }
        1 => {
            fs::write(file, b"")?;
            "empty"
        }
        2 => {
            symlink("/dev/zero", file)?;
            "/dev/zero"
        }
        3 => {
            Command::new("mkfifo").arg(file).status()?;
            "a pipe that nobody writes to"
        }
        4 => {
            symlink(file.file_name().unwrap_or_default(), file)?;
            "a link to itself"
        }
        _ => "absent",
    })
}

/// Numbers that overflow, are none, or ask for much.
fn extreme(random: &mut Random) -> Value {
    let all = [
        json!(0),
        json!(1),
        json!(-1),
        json!(255),
        json!(65536),
        json!(1u64 << 31),
        json!((1u64 << 32) - 1),
        json!(1u64 << 40),
        json!(i64::MAX),
        json!(u64::MAX),
        json!(0.5),
        json!(1e-45),
        json!(1e308),
        json!(-1e39),
        json!(null),
        json!(true),
        json!("x"),
        json!(""),
        json!([]),
        json!({}),
        json!([1, 2]),
        json!("a".repeat(5000)),
    ];
    random.of(&all).clone()
}

/// A node of the JSON becomes another value, goes away, or is doubled.
fn structure(mut value: Value, random: &mut Random) -> (String, Vec<u8>) {
    if random.below(40) == 0 {
        let depth = 100_000;
        return (format!("JSON of depth {depth}"), ["[".repeat(depth), "]".repeat(depth)].concat().into_bytes());
    }
    let count = nodes(&value);
    // Big tables (vocabularies) would draw nearly all choices: half of them stay near the top.
    let near = random.below(2) == 0;
    let mut number = random.below(if near { count.min(120) } else { count });
    let new = extreme(random);
    let how = format!(
        "node {number} of {count} of its JSON becomes {}",
        new.to_string().chars().take(30).collect::<String>()
    );
    let act = random.below(4);
    change(&mut value, &mut number, &mut |place| match (act, place) {
        (0, Value::Array(list)) if !list.is_empty() => list.push(list[0].clone()),
        (1, Value::Array(list)) => _ = list.pop(),
        (0, Value::Object(map)) if !map.is_empty() => {
            let key = map.keys().next().cloned().unwrap_or_default();
            map.remove(&key);
        }
        (_, place) => *place = new.clone(),
    });
    (how, value.to_string().into_bytes())
}

fn nodes(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(nodes).sum(),
        Value::Object(map) => map.values().map(nodes).sum(),
        _ => 0,
    }
}

fn change(value: &mut Value, number: &mut usize, act: &mut dyn FnMut(&mut Value)) -> bool {
    if *number == 0 {
        act(value);
        return true;
    }
    *number -= 1;
    match value {
        Value::Array(list) => list.iter_mut().any(|v| change(v, number, act)),
        Value::Object(map) => map.values_mut().any(|v| change(v, number, act)),
        _ => false,
    }
}

/// The JSON header of a safetensors file, with its length made right again.
fn header(bytes: Vec<u8>, random: &mut Random) -> (String, Vec<u8>) {
    let length = bytes.get(..8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes) as usize;
    let parsed = bytes.get(8..8usize.saturating_add(length)).and_then(|text| serde_json::from_slice(text).ok());
    let Some(value) = parsed else { return raw(bytes, random) };
    let (how, text) = structure(value, random);
    let new = [&(text.len() as u64).to_le_bytes()[..], &text, &bytes[8 + length..]].concat();
    (format!("header: {how}"), new)
}

/// A run of digits in the text becomes another number.
fn number(mut bytes: Vec<u8>, random: &mut Random) -> (String, Vec<u8>) {
    let starts: Vec<usize> = (0..bytes.len().min(1 << 16))
        .filter(|&i| bytes[i].is_ascii_digit() && (i == 0 || !bytes[i - 1].is_ascii_digit()))
        .collect();
    if starts.is_empty() {
        return raw(bytes, random);
    }
    let start = *random.of(&starts);
    let end = (start..bytes.len()).find(|&i| !bytes[i].is_ascii_digit()).unwrap_or(bytes.len());
    let texts = [
        "0",
        "-1",
        "1",
        "18446744073709551615",
        "9223372036854775807",
        "4294967296",
        "1e308",
        "nan",
        "99999",
        "0.0",
        "",
    ];
    let new = *random.of(&texts);
    bytes.splice(start..end, new.bytes());
    (format!("the number at byte {start} becomes {new:?}"), bytes)
}

/// Bytes changed, cut, doubled, put in.
fn raw(mut bytes: Vec<u8>, random: &mut Random) -> (String, Vec<u8>) {
    let length = bytes.len();
    // Headers lie at the beginning: half of all damage is done there.
    let at = if random.below(2) == 0 { random.below(length.min(512)) } else { random.below(length) };
    let count = (1 + random.below(64)).min(length - at.min(length));
    let how = match random.below(7) {
        _ if length == 0 => {
            bytes.extend_from_slice(b"\0\xff{");
            "three bytes in an empty file".to_owned()
        }
        0 => {
            bytes[at] ^= 1 << random.below(8);
            format!("a flipped bit at {at}")
        }
        1 => {
            bytes[at..at + count].fill_with(|| random.next() as u8);
            format!("{count} random bytes at {at}")
        }
        2 => {
            bytes.truncate(at);
            format!("cut at {at}")
        }
        3 => {
            bytes.drain(at..at + count);
            format!("{count} bytes taken out at {at}")
        }
        4 => {
            let part = bytes[at..at + count].to_vec();
            bytes.splice(at..at, part);
            format!("{count} bytes doubled at {at}")
        }
        5 => {
            let wide = *random.of(&[0u64, u64::MAX, 1 << 63, 1 << 32, i64::MAX as u64]);
            let end = (at + 8).min(length);
            bytes[at..end].copy_from_slice(&wide.to_le_bytes()[..end - at]);
            format!("the word {wide:#x} at {at}")
        }
        _ => {
            bytes.splice(at..at, std::iter::repeat_n(random.next() as u8, 1 << random.below(14)));
            format!("a run of one byte put in at {at}")
        }
    };
    (how, bytes)
}
