//! Every reader of something that others wrote, by name, each as a function of any bytes: what fuzzing and the test of damaged files try.
//!
//! An input of several files is their bytes one after the other, with a zero byte between (texts have none; the last one may).

mod data;
mod models;
mod numbers;
mod runs;
mod texts;

use std::fs;
use std::path::Path;

pub use numbers::{Number, numbers};
#[cfg(test)]
pub(crate) use numbers::{is_number, takes};

/// One reader.
pub struct Parser {
    /// Its name, and that of its seeds' folder and of its fuzz target.
    pub name: &'static str,
    /// Reads an input to its end, in a folder that it may write into. Whether the input was taken: a refusal is an error like any other,
    /// and a panic, an abort or work without end is a mistake.
    pub read: fn(&[u8], &Path) -> bool,
}

const fn parser(name: &'static str, read: fn(&[u8], &Path) -> bool) -> Parser {
    Parser { name, read }
}

/// All of them.
pub const PARSERS: &[Parser] = &[
    parser("adapter", models::adapter),
    parser("answer", texts::answer),
    parser("chat_template", texts::chat_template),
    parser("checkpoint", runs::checkpoint),
    parser("checksums", runs::checksums),
    parser("config", models::config),
    parser("csv", data::csv),
    parser("generation_config", models::generation_config),
    parser("gguf", models::gguf),
    parser("gzip", data::gzip),
    parser("hub_files", models::hub_files),
    parser("idx_images", data::idx_images),
    parser("idx_labels", data::idx_labels),
    parser("imatrix", models::imatrix),
    parser("index", models::index),
    parser("jpeg", data::jpeg),
    parser("journal", runs::journal),
    parser("json", data::json),
    parser("jsonl", data::jsonl),
    parser("metrics", runs::metrics),
    parser("options", runs::options),
    parser("plan", models::plan),
    parser("png", data::png),
    parser("request", texts::request),
    parser("run_toml", runs::run_toml),
    parser("safetensors", models::safetensors),
    parser("saved_logits", runs::saved_logits),
    parser("text", data::text),
    parser("tokenizer", texts::tokenizer),
    parser("tsv", data::tsv),
    parser("zstandard", data::zstandard),
];

/// The reader of a name.
pub fn named(name: &str) -> Option<&'static Parser> {
    PARSERS.iter().find(|parser| parser.name == name)
}

/// The files of an input: `N` pieces with a zero byte between, the missing ones empty.
fn files<const N: usize>(input: &[u8]) -> [&[u8]; N] {
    let mut pieces = input.splitn(N, |&byte| byte == 0);
    std::array::from_fn(|_| pieces.next().unwrap_or_default())
}

/// Writes a file of an input; an empty one is no file.
fn put(dir: &Path, name: &str, bytes: &[u8]) -> Option<()> {
    let file = dir.join(name);
    if bytes.is_empty() {
        let _ = fs::remove_file(file);
        return Some(());
    }
    fs::write(file, bytes).ok()
}
