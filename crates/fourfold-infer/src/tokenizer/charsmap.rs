//! SentencePiece's compiled normalization (`precompiled_charsmap`), checked before the `tokenizers` crate looks anything up in it: that
//! goes from unit to unit of a double array (Aoe, 1989, as Darts has it) without looking whether there is such a unit.
//!
//! In base64: the bytes of the array (u32, little-endian), its units (u32), and UTF-8 text in which a zero byte ends each replacement.

/// Checks a map.
///
/// # Errors
/// Some text would be looked up beyond its end.
pub(super) fn check(base64: &str) -> Result<(), String> {
    let bytes = decode(base64).ok_or("precompiled_charsmap is no base64")?;
    let cut = || "precompiled_charsmap ends early".to_owned();
    let (size, rest) = bytes.split_first_chunk::<4>().ok_or_else(cut)?;
    let size = u32::from_le_bytes(*size) as usize;
    let text = rest.get(size..).filter(|_| size.is_multiple_of(4)).ok_or_else(cut)?;
    let text = std::str::from_utf8(text).map_err(|_| "the text of precompiled_charsmap is not UTF-8")?;
    let units: Vec<u32> = rest[..size].chunks_exact(4).map(|u| u32::from_le_bytes([u[0], u[1], u[2], u[3]])).collect();
    walk(&units, text).map_err(|reason| format!("precompiled_charsmap is broken: {reason}"))
}

/// From every unit that a text can lead to, every next byte has a unit; every replacement is in the text.
fn walk(units: &[u32], text: &str) -> Result<(), String> {
    let offset = |unit: u32| ((unit >> 10) as usize) << ((unit & (1 << 9)) >> 6);
    let root = *units.first().ok_or("it has no units")?;
    let (mut seen, mut open) = (vec![false; units.len()], vec![offset(root)]);
    while let Some(base) = open.pop() {
        if base | 0xff >= units.len() {
            return Err(format!("unit {base} of {}", units.len()));
        }
        if std::mem::replace(&mut seen[base], true) {
            continue;
        }
        for byte in 1..=255_u32 {
            let place = base ^ byte as usize;
            let unit = units[place];
            if unit & (1 << 31 | 0xff) != byte {
                continue;
            }
            let next = place ^ offset(unit);
            open.push(next);
            if unit >> 8 & 1 == 1 {
                let leaf = *units.get(next).ok_or_else(|| format!("unit {next} of {}", units.len()))?;
                let start = (leaf & (u32::MAX >> 1)) as usize;
                // The replacement ends at a zero byte or with the text: both are boundaries of characters.
                if text.get(start..).is_none() {
                    return Err(format!("a replacement at byte {start} of {}", text.len()));
                }
            }
        }
    }
    Ok(())
}

/// Strictly: with its padding, and no bits left over.
fn decode(text: &str) -> Option<Vec<u8>> {
    let digits = text.strip_suffix("==").or(text.strip_suffix('=')).unwrap_or(text).as_bytes();
    if !text.len().is_multiple_of(4) || digits.len() % 4 == 1 {
        return None;
    }
    let mut out = Vec::with_capacity(digits.len() / 4 * 3 + 2);
    for chunk in digits.chunks(4) {
        let mut bits = 0u32;
        for &digit in chunk {
            let value = match digit {
                b'A'..=b'Z' => digit - b'A',
                b'a'..=b'z' => digit - b'a' + 26,
                b'0'..=b'9' => digit - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            bits = bits << 6 | u32::from(value);
        }
        let bytes = (bits << (6 * (4 - chunk.len()))).to_be_bytes();
        if bytes[chunk.len()..].iter().any(|&byte| byte != 0) {
            return None;
        }
        out.extend(&bytes[1..chunk.len()]);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `x` becomes the text at `start`, by an array of so many units.
    fn units(count: usize, start: u32) -> Vec<u32> {
        let mut units = vec![0; count];
        units[0] = 256 << 10;
        units[256 ^ usize::from(b'x')] = u32::from(b'x') << 10 | 1 << 8 | u32::from(b'x');
        units[256] = start;
        units
    }

    #[test]
    fn what_leads_beyond_the_array_or_the_text_is_refused() {
        assert_eq!(walk(&units(512, 0), "y\0"), Ok(()));
        assert_eq!(walk(&units(512, 2), "y\0"), Ok(()));
        assert!(walk(&units(511, 0), "y\0").unwrap_err().contains("of 511"));
        assert!(walk(&units(512, 3), "y\0").unwrap_err().contains("byte 3"));
        assert!(walk(&units(512, 1), "\u{e9}\0").unwrap_err().contains("byte 1"));
        assert!(walk(&[], "").is_err());
        let mut far = units(512, 0);
        far[256 ^ usize::from(b'x')] |= 1 << 30;
        assert!(walk(&far, "y\0").unwrap_err().contains("of 512"));
    }

    #[test]
    fn broken_maps_are_named() {
        for broken in ["", "!", "////", "/////w==", "AAAAAP//", "BAAAAAAAAABhYmM="] {
            assert!(check(broken).unwrap_err().contains("charsmap"), "{broken}");
        }
        assert_eq!(decode("aGVsbG8="), Some(b"hello".to_vec()));
        for broken in ["aGVsbG8", "aGVsbG9=", "aGVs=", "aGVsb===", "a", "aGV=bG8="] {
            assert_eq!(decode(broken), None, "{broken}");
        }
    }
}
