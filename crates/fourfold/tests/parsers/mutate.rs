//! Damage to an input: in its bytes, or, so that it gets past the first checks, in the structure of its JSON and of the headers of
//! safetensors files.

use serde_json::{Value, json};

use crate::random::Random;

/// An input made of seeds by one to four changes.
pub fn input(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut input = random.of(seeds).clone();
    if random.below(20) == 0 {
        // The beginning of one, the end of another.
        let (other, at) = (random.of(seeds), random.below(input.len().max(1)));
        input.truncate(at);
        input.extend(&other[random.below(other.len().max(1)).min(other.len())..]);
    }
    for _ in 0..1 + random.below(4) {
        let (mut pieces, last_is_file) = pieces(&input);
        let i = random.below(pieces.len());
        let is_last = i + 1 == pieces.len();
        piece(&mut pieces[i], is_last && last_is_file, random);
        input = pieces.join(&0);
    }
    input
}

/// Its files, where it begins with JSON and a zero byte follows; and whether the last one is in a format of its own.
fn pieces(input: &[u8]) -> (Vec<Vec<u8>>, bool) {
    let (mut pieces, mut rest) = (Vec::new(), input);
    while let Some(end) = rest.iter().position(|&byte| byte == 0).filter(|_| rest.first() == Some(&b'{')) {
        pieces.push(rest[..end].to_vec());
        rest = &rest[end + 1..];
    }
    pieces.push(rest.to_vec());
    let last_is_file = pieces.len() > 1 && rest.first() != Some(&b'{');
    (pieces, last_is_file)
}

fn piece(bytes: &mut Vec<u8>, is_safetensors: bool, random: &mut Random) {
    if is_safetensors && bytes.len() > 8 && random.below(4) > 0 {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let end = usize::try_from(length).ok().and_then(|n| n.checked_add(8)).filter(|&end| end <= bytes.len());
        if let Some(end) = end {
            if random.below(3) == 0 {
                data(&mut bytes[end..], random);
            } else {
                let mut header = bytes[8..end].to_vec();
                text(&mut header, random);
                let length = (header.len() as u64).to_le_bytes();
                bytes.splice(..end, length.into_iter().chain(header));
            }
            return;
        }
    }
    text(bytes, random);
}

/// JSON in its structure most of the time, anything else in its bytes.
fn text(bytes: &mut Vec<u8>, random: &mut Random) {
    match serde_json::from_slice::<Value>(bytes) {
        Ok(mut value) if random.below(4) > 0 => {
            structure(&mut value, random);
            *bytes = value.to_string().into_bytes();
        }
        _ => raw(bytes, random),
    }
}

/// Values of elements.
fn data(bytes: &mut [u8], random: &mut Random) {
    if bytes.is_empty() {
        return;
    }
    let at = random.below(bytes.len());
    let end = (at + [1, 2, 4, 8][random.below(4)]).min(bytes.len());
    bytes[at..end].fill([0, 1, 0x7f, 0x80, 0xff, random.next() as u8][random.below(6)]);
}

/// Numbers that overflow, are none, or ask for much; and other kinds of values.
fn extreme(random: &mut Random) -> Value {
    match random.below(24) {
        0 => json!(0),
        1 => json!(1),
        2 => json!(-1),
        3 => json!(7),
        4 => json!(255),
        5 => json!(65_536),
        6 => json!(1u64 << 31),
        7 => json!(u64::from(u32::MAX)),
        8 => json!(1u64 << 40),
        9 => json!(i64::MAX),
        10 => json!(u64::MAX),
        11 => json!(0.5),
        12 => json!(1e-45),
        13 => json!(1e308),
        14 => json!(-1e39),
        15 => Value::Null,
        16 => json!(true),
        17 => json!(false),
        18 => json!(""),
        19 => json!("\u{e9}\u{1f98a}"),
        20 => json!([]),
        21 => json!({}),
        22 => json!([0, 1]),
        _ => json!("a".repeat(3000)),
    }
}

/// One node becomes another value, goes away, is doubled, or changes places with another.
fn structure(value: &mut Value, random: &mut Random) {
    let count = nodes(value);
    // Big tables (vocabularies) would draw nearly all choices: half of them stay near the top.
    let most = if random.below(2) == 0 { count.min(80) } else { count };
    let (target, donor) = (random.below(most), random.below(count));
    let copy = nth(value, &mut { donor }).cloned().unwrap_or(Value::Null);
    let new = match random.below(5) {
        0 | 1 => extreme(random),
        2 => copy,
        3 => Value::Array(vec![copy; 1 + random.below(3)]),
        _ => nearby(nth(value, &mut { target }), random),
    };
    let action = random.below(6);
    let at = random.next() as usize;
    if let Some(place) = nth_mut(value, &mut { target }) {
        match (action, place) {
            (0, Value::Array(items)) if !items.is_empty() => drop(items.remove(at % items.len())),
            (0, Value::Object(map)) if !map.is_empty() => {
                let key = map.keys().nth(at % map.len()).cloned().unwrap_or_default();
                map.remove(&key);
            }
            (1, Value::Array(items)) => items.insert(at % (items.len() + 1), new),
            (1, Value::Object(map)) if !map.is_empty() => {
                // A key of one value for another's.
                let key = map.keys().nth(at % map.len()).cloned().unwrap_or_default();
                map.insert(key, new);
            }
            (_, place) => *place = new,
        }
    }
}

/// A value near the one that is there.
fn nearby(value: Option<&Value>, random: &mut Random) -> Value {
    match value {
        Some(Value::Number(n)) if n.is_f64() => {
            json!(n.as_f64().unwrap_or(0.0) * [-1.0, 0.0, 2.0, 1e10][random.below(4)])
        }
        Some(Value::Number(n)) => json!(n.as_i64().unwrap_or(0).wrapping_add([-1, 1, 2, 8][random.below(4)])),
        Some(Value::String(text)) => {
            let mut bytes = text.clone().into_bytes();
            raw(&mut bytes, random);
            json!(String::from_utf8_lossy(&bytes))
        }
        Some(Value::Bool(b)) => json!(!b),
        _ => extreme(random),
    }
}

fn children(value: &Value) -> Box<dyn Iterator<Item = &Value> + '_> {
    match value {
        Value::Array(items) => Box::new(items.iter()),
        Value::Object(map) => Box::new(map.values()),
        _ => Box::new(std::iter::empty()),
    }
}

fn nodes(value: &Value) -> usize {
    1 + children(value).map(nodes).sum::<usize>()
}

/// The `n`-th node, parents first.
fn nth<'v>(value: &'v Value, n: &mut usize) -> Option<&'v Value> {
    if *n == 0 {
        return Some(value);
    }
    *n -= 1;
    children(value).find_map(|child| nth(child, n))
}

fn nth_mut<'v>(value: &'v mut Value, n: &mut usize) -> Option<&'v mut Value> {
    if *n == 0 {
        return Some(value);
    }
    *n -= 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|child| nth_mut(child, n)),
        Value::Object(map) => map.values_mut().find_map(|child| nth_mut(child, n)),
        _ => None,
    }
}

const WORDS: &[&str] = &[
    "0",
    "1",
    "-1",
    "9999999999",
    "18446744073709551615",
    "1e999",
    "nan",
    "null",
    "[]",
    "{}",
    "\"",
    "'",
    "{{",
    "}}",
    "{%",
    "%}",
    "\n",
    "\t",
    ",",
    ":",
    "\\",
    "\\u0000",
    "\u{feff}",
    "\u{fffd}",
    "(",
    ")",
    "[",
    "*",
    "(?i)",
    "|",
    "<s>",
    "re:.*",
    "true",
    "=",
];

/// Bytes and words anywhere.
fn raw(bytes: &mut Vec<u8>, random: &mut Random) {
    if bytes.is_empty() {
        return bytes.push(random.next() as u8);
    }
    let most = if random.below(3) == 0 { bytes.len() } else { bytes.len().min(4096) };
    let at = random.below(most);
    match random.below(10) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = random.next() as u8,
        2 => bytes.truncate(at),
        3 => drop(bytes.drain(at..(at + 1 + random.below(32)).min(bytes.len()))),
        4 => {
            let chunk: Vec<u8> = bytes[at..].iter().take(1 + random.below(64)).copied().collect();
            let to = random.below(most);
            bytes.splice(to..to, chunk);
        }
        5 => bytes[at] = b"0123456789[]{}(),:\"-|*"[random.below(22)],
        6 => {
            let value = [0, 1, 8, 100_000_001, bytes.len() as u64, u64::MAX, random.next()][random.below(7)];
            let width = [1, 2, 4, 8][random.below(4)];
            let big = random.below(2) == 0;
            let value =
                if big { value.to_be_bytes()[8 - width..].to_vec() } else { value.to_le_bytes()[..width].to_vec() };
            bytes[at..].iter_mut().zip(value).for_each(|(b, v)| *b = v);
        }
        7 => {
            // Lines and other pieces many times.
            let chunk: Vec<u8> = bytes[at..].iter().take(1 + random.below(16)).copied().collect();
            let many = chunk.repeat(1 << random.below(9));
            bytes.splice(at..at, many);
        }
        _ => {
            let end = (at + random.below(12)).min(bytes.len());
            bytes.splice(at..end, random.of(WORDS).bytes());
        }
    }
}
