//! An answer as it arrives: printed, its thoughts dimmed or left out, up to a string that ends it.

use std::cell::Cell;
use std::io::IsTerminal;

use anyhow::Result;
use clap::Args;
use fourfold_infer::{Detokenizer, Generation, Stop, Tokenizer};
use fourfold_server::AnswerText;

use crate::output;

/// Grey, and back.
const DIM: (&str, &str) = ("\x1b[2m", "\x1b[0m");

#[derive(Args, Clone, Debug, Default)]
pub struct AnswerArgs {
    /// End the answer where this text comes, which is left out (may be given several times).
    #[arg(long = "stop", visible_alias = "reverse-prompt", value_name = "TEXT", value_parser = some_text)]
    pub stops: Vec<String>,
    /// Leave out what the model thinks between <think> and </think> [default: dimmed on a terminal].
    #[arg(long)]
    pub hide_thinking: bool,
}

fn some_text(text: &str) -> Result<String, String> {
    if text.is_empty() { Err("some text is expected".to_owned()) } else { Ok(text.to_owned()) }
}

/// How a model thinks before it answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Thinking {
    /// Whether it may, between `<think>` and `</think>`.
    pub may: bool,
    /// Whether the prompt ends inside of thoughts.
    pub opened: bool,
}

impl Thinking {
    /// That of a model with this template, after a prompt.
    pub fn of(template: Option<&str>, tokenizer: &Tokenizer, prompt: &str) -> Self {
        let may = template.is_some_and(|text| text.contains("<think>")) || tokenizer.token_to_id("<think>").is_some();
        Self { may, opened: may && prompt.trim_end().ends_with("<think>") }
    }
}

/// What is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shown {
    Nothing,
    /// Text as the model writes it.
    Raw,
    /// The answer, and thoughts dimmed.
    Dimmed,
    /// The answer alone; `note` says that the model thinks.
    Answer {
        note: bool,
    },
}

/// Prints text as tokens arrive, and keeps it.
pub struct Printer<'a> {
    stream: Detokenizer<'a>,
    split: AnswerText,
    shown: Shown,
    stops: &'a [String],
    stopped: Cell<bool>,
    in_thoughts: bool,
    /// All of it, thoughts as the model writes them, without the string that ended it.
    pub text: String,
}

impl<'a> Printer<'a> {
    /// With `prints` unset, only keeps the text.
    pub fn new(stream: Detokenizer<'a>, prints: bool, args: &'a AnswerArgs, thinking: Thinking) -> Self {
        let terminal = std::io::stdout().is_terminal();
        let colours = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let shown = match (prints, args.hide_thinking, thinking.may && colours) {
            (false, ..) => Shown::Nothing,
            (true, true, _) => Shown::Answer { note: terminal },
            (true, false, true) => Shown::Dimmed,
            (true, false, false) => Shown::Raw,
        };
        Self {
            stream,
            split: AnswerText::new(&args.stops, thinking.may, thinking.opened, None),
            shown,
            stops: &args.stops,
            stopped: Cell::new(false),
            in_thoughts: false,
            text: String::new(),
        }
    }

    /// One more token.
    pub fn push(&mut self, id: u32) -> Result<()> {
        let piece = self.stream.push(id)?;
        self.take(&piece)
    }

    /// Whether a string came that ends the answer.
    pub fn stopped(&self) -> bool {
        self.stopped.get()
    }

    /// The end of the text: what is still held back.
    pub fn finish(&mut self) -> Result<()> {
        if !self.stopped() {
            let piece = self.stream.finish()?;
            self.take(&piece)?;
        }
        let delta = self.split.finish();
        self.print(&delta.reasoning, &delta.content)?;
        if self.in_thoughts && self.shown == Shown::Dimmed {
            output::write(DIM.1)?;
        }
        if self.shown == Shown::Raw && !self.stopped() {
            output::write(&self.text[self.printed()..])?;
        }
        Ok(())
    }

    fn take(&mut self, piece: &str) -> Result<()> {
        if self.stopped() || piece.is_empty() {
            return Ok(());
        }
        let before = self.printed();
        self.text += piece;
        let delta = self.split.push(piece);
        if self.split.stopped() {
            self.stopped.set(true);
            let end = self.stops.iter().filter_map(|stop| self.text.find(stop.as_str())).min();
            self.text.truncate(end.unwrap_or(self.text.len()));
        }
        if self.shown == Shown::Raw {
            let end = if self.stopped() { self.text.len() } else { self.printed() };
            return if end > before { output::write(&self.text[before..end]) } else { Ok(()) };
        }
        self.print(&delta.reasoning, &delta.content)
    }

    /// Bytes of the text that are settled: no string that ends an answer can begin before them.
    fn printed(&self) -> usize {
        let may_begin = |stop: &String| {
            (1..stop.len()).rev().find(|&n| stop.is_char_boundary(n) && self.text.ends_with(&stop[..n])).unwrap_or(0)
        };
        self.text.len() - self.stops.iter().map(may_begin).max().unwrap_or(0)
    }

    fn print(&mut self, thoughts: &str, answer: &str) -> Result<()> {
        match self.shown {
            Shown::Nothing | Shown::Raw => return Ok(()),
            Shown::Answer { note } => {
                if note && !thoughts.is_empty() && !self.in_thoughts {
                    output::note("(thinking…)");
                }
            }
            Shown::Dimmed => {
                if !thoughts.is_empty() {
                    let begin = if self.in_thoughts { "" } else { DIM.0 };
                    output::write(&format!("{begin}{thoughts}"))?;
                }
            }
        }
        self.in_thoughts |= !thoughts.is_empty();
        if !answer.is_empty() {
            if self.in_thoughts && self.shown == Shown::Dimmed {
                output::write(&format!("{}\n\n", DIM.1))?;
            }
            self.in_thoughts = false;
            output::write(answer)?;
        }
        Ok(())
    }
}

/// Why an answer ended, where a string of the caller's may have ended it.
pub fn stop_of(answer: &Generation, printer: &Printer<'_>) -> Stop {
    if printer.stopped() { Stop::StopString } else { answer.stop }
}
