//! Finding markers in text that arrives in pieces: what might be the beginning of one is held back.

/// A part of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Text without a marker.
    Text(String),
    /// The marker with this index.
    Marker(usize),
}

/// Looks for markers; the one that begins first counts.
#[derive(Clone, Debug)]
pub struct Scanner {
    markers: Vec<String>,
    held: String,
}

impl Scanner {
    /// For some markers; empty ones are left out.
    pub fn new(markers: impl IntoIterator<Item = impl Into<String>>) -> Self {
        let markers = markers.into_iter().map(Into::into).filter(|marker: &String| !marker.is_empty()).collect();
        Self { markers, held: String::new() }
    }

    /// What is certain after some more text.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held += text;
        let mut pieces = Vec::new();
        while let Some((at, index)) = self.first() {
            let rest = self.held.split_off(at + self.markers[index].len());
            self.held.truncate(at);
            let before = std::mem::replace(&mut self.held, rest);
            if !before.is_empty() {
                pieces.push(Piece::Text(before));
            }
            pieces.push(Piece::Marker(index));
        }
        let kept = self.markers.iter().map(|marker| overlap(&self.held, marker)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - kept);
        let certain = std::mem::replace(&mut self.held, rest);
        if !certain.is_empty() {
            pieces.push(Piece::Text(certain));
        }
        pieces
    }

    /// What was held back, once nothing follows.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Place and index of the marker that begins first, the longest of those that begin there.
    fn first(&self) -> Option<(usize, usize)> {
        let found =
            self.markers.iter().enumerate().filter_map(|(i, marker)| Some((self.held.find(marker.as_str())?, i)));
        found.min_by_key(|&(at, index)| (at, usize::MAX - self.markers[index].len()))
    }
}

/// Bytes at the end of `text` that begin `marker`, not all of it.
fn overlap(text: &str, marker: &str) -> usize {
    let most = text.len().min(marker.len().saturating_sub(1));
    let fits =
        |&length: &usize| marker.is_char_boundary(length) && text.as_bytes().ends_with(&marker.as_bytes()[..length]);
    (1..=most).rev().find(fits).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(scanner: &mut Scanner, parts: &[&str]) -> Vec<Piece> {
        let mut pieces: Vec<Piece> = parts.iter().flat_map(|part| scanner.push(part)).collect();
        let rest = scanner.finish();
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest));
        }
        // Texts side by side are one text.
        pieces.into_iter().fold(Vec::new(), |mut joined, piece| {
            match (joined.last_mut(), piece) {
                (Some(Piece::Text(before)), Piece::Text(text)) => before.push_str(&text),
                (_, piece) => joined.push(piece),
            }
            joined
        })
    }

    #[test]
    fn however_a_text_is_cut_the_pieces_are_the_same() {
        let text = "a<thin<think>b</think>c<｜é<think";
        let markers = ["<think>", "</think>"];
        let expected = vec![
            Piece::Text("a<thin".into()),
            Piece::Marker(0),
            Piece::Text("b".into()),
            Piece::Marker(1),
            Piece::Text("c<｜é<think".into()),
        ];
        let cuts: Vec<usize> = (0..=text.len()).filter(|&i| text.is_char_boundary(i)).collect();
        for &a in &cuts {
            for &b in cuts.iter().filter(|&&b| b >= a) {
                let parts = [&text[..a], &text[a..b], &text[b..]];
                assert_eq!(all(&mut Scanner::new(markers), &parts), expected, "{parts:?}");
            }
        }
    }

    #[test]
    fn only_what_may_begin_a_marker_is_held_back() {
        let mut scanner = Scanner::new(["stop", "\n\n"]);
        assert_eq!(scanner.push("one st"), [Piece::Text("one ".into())]);
        assert_eq!(scanner.push("ep\n"), [Piece::Text("step".into())]);
        assert_eq!(scanner.push("\n"), [Piece::Marker(1)]);
        assert_eq!(scanner.finish(), "");
    }

    #[test]
    fn the_longest_of_those_that_begin_together_counts() {
        let mut scanner = Scanner::new(["ab", "abc"]);
        assert_eq!(scanner.push("xabcy"), [Piece::Text("x".into()), Piece::Marker(1), Piece::Text("y".into())]);
        assert_eq!(Scanner::new([""]).push("xy"), [Piece::Text("xy".into())]);
    }
}
