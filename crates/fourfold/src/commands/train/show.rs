//! `fourfold train --show-data`: the first example as the tokens that a run would see, with what of them is learned.

use anyhow::Result;
use fourfold_infer::Tokenizer;
use serde::Serialize;

use super::data::first;
use super::encode::Template;
use super::settings::Settings;
use crate::context::Context;
use crate::output::Report;

#[derive(Serialize)]
struct Example {
    /// File, line and layout.
    source: String,
    tokens: usize,
    learned: usize,
    /// Tokens of a sequence: a longer example is cut.
    context: usize,
    example: Vec<Token>,
}

#[derive(Serialize)]
struct Token {
    id: u32,
    text: String,
    learned: bool,
}

/// Prints the example; nothing is trained and nothing written.
pub fn show(
    settings: &Settings,
    tokenizer: &Tokenizer,
    template: &Template,
    length: usize,
    context: &Context,
) -> Result<()> {
    let (source, document) = first(settings, tokenizer, template, length)?;
    let of = |(i, &id): (usize, &u32)| Token {
        id,
        text: tokenizer
            .decode(&[id])
            .ok()
            .filter(|t| !t.is_empty())
            .or_else(|| tokenizer.id_to_token(id))
            .unwrap_or_default(),
        // The first token of a sequence has nothing before it to be predicted from.
        learned: i % length != 0 && document.is_learned(i),
    };
    let example: Vec<Token> = document.ids.iter().enumerate().map(of).collect();
    let learned = example.iter().filter(|token| token.learned).count();
    context.print(&Example { source, tokens: example.len(), learned, context: length, example })
}

impl Report for Example {
    fn text(&self) -> String {
        let mut text = format!("{}: {} tokens, {} learned (marked *)\n", self.source, self.tokens, self.learned);
        for (i, token) in self.example.iter().take(self.context).enumerate() {
            let mark = if token.learned { '*' } else { ' ' };
            text += &format!("{i:>6} {mark} {:>7}  {:?}\n", token.id, token.text);
        }
        if self.tokens > self.context {
            text += &format!("… {} more, in sequences of {} of their own\n", self.tokens - self.context, self.context);
        }
        text
    }
}
