//! The report as one HTML page: a template, and the geometry of its charts. Nothing is loaded from elsewhere, nothing runs.

use anyhow::{Context as _, Result};
use minijinja::{AutoEscape, Environment};
use serde::Serialize;

use super::tensors::{Group, TensorPair, by_layer, by_role, by_storage};
use super::{Comparison, figures};
use crate::child::Sample;
use crate::human;

/// The chart of memory over time, in its own units.
const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 200.0;
/// Decades that the scale of errors spans.
const DECADES: f64 = 6.0;

/// A group with the lengths of its bars, in percent of the longest.
#[derive(Serialize)]
struct Bar {
    name: String,
    tensors: usize,
    a: String,
    b: String,
    ratio: String,
    a_width: f64,
    b_width: f64,
    error: String,
    error_width: f64,
}

/// What B stores one kind of tensor as, in one block.
#[derive(Serialize)]
struct Cell {
    storage: String,
    bits: String,
    error: String,
    /// Lightness of the background, percent: fewer bits are darker.
    lightness: f64,
    /// Whether the cell stands for anything.
    filled: bool,
}

/// The choices of one block.
#[derive(Serialize)]
struct Line {
    name: String,
    cells: Vec<Cell>,
}

#[derive(Serialize)]
struct Chart {
    width: f64,
    height: f64,
    a: String,
    b: String,
    most: String,
    longest: String,
}

/// The page.
///
/// # Errors
/// A mistake in the template.
pub fn page(c: &Comparison) -> Result<String> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.add_template("report", include_str!("report.html")).context("the report's template")?;
    let template = environment.get_template("report").context("the report's template")?;
    let (kinds, lines) = choices(&c.tensors);
    template
        .render(minijinja::context! {
            c => c,
            rows => figures::table(c),
            ratio => figures::times(c.bytes_ratio()),
            roles => bars(&by_role(&c.tensors)),
            layers => bars(&by_layer(&c.tensors)),
            storages => bars(&by_storage(&c.tensors)),
            kinds => kinds,
            lines => lines,
            memory => chart(&c.a.memory, &c.b.memory),
        })
        .context("the report's template")
}

fn bars(groups: &[Group]) -> Vec<Bar> {
    let most = groups.iter().map(|g| g.a_bytes.max(g.b_bytes)).max().unwrap_or(1).max(1) as f64;
    let bar = |g: &Group| Bar {
        name: g.name.clone(),
        tensors: g.tensors,
        a: human::bytes(g.a_bytes),
        b: human::bytes(g.b_bytes),
        ratio: figures::times(g.a_bytes as f64 / g.b_bytes as f64),
        a_width: g.a_bytes as f64 / most * 100.0,
        b_width: g.b_bytes as f64 / most * 100.0,
        error: shown_error(Some(g.error)),
        error_width: error_width(g.error),
    };
    groups.iter().map(bar).collect()
}

fn shown_error(error: Option<f64>) -> String {
    match error {
        None => "–".to_owned(),
        Some(0.0) => "0".to_owned(),
        Some(error) => format!("{error:.1e}"),
    }
}

/// Percent of a logarithmic scale that ends at 1.
fn error_width(error: f64) -> f64 {
    if error > 0.0 { ((error.log10() + DECADES) / DECADES * 100.0).clamp(1.0, 100.0) } else { 0.0 }
}

/// A table of what each block's tensors became: kinds of tensors, and a line for each block.
fn choices(pairs: &[TensorPair]) -> (Vec<String>, Vec<Line>) {
    let (mut kinds, mut lines): (Vec<String>, Vec<(String, Vec<&TensorPair>)>) = (Vec::new(), Vec::new());
    for pair in pairs.iter().filter(|p| p.shape.len() > 1) {
        let (kind, line) = (kind(pair), pair.block.map_or("outside".to_owned(), |b| b.to_string()));
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
        match lines.iter_mut().find(|(name, _)| *name == line) {
            Some((_, members)) => members.push(pair),
            None => lines.push((line, vec![pair])),
        }
    }
    let line = |(name, members): (String, Vec<&TensorPair>)| {
        let cells = kinds.iter().map(|k| cell(members.iter().copied().filter(|p| kind(p) == *k).collect())).collect();
        Line { name, cells }
    };
    let lines = lines.into_iter().map(line).collect();
    (kinds, lines)
}

/// A tensor's name without its block and the number of its expert.
fn kind(pair: &TensorPair) -> String {
    let after = match pair.block {
        Some(block) => pair.name.split_once(&format!(".{block}.")).map_or(&*pair.name, |(_, rest)| rest),
        None => &pair.name,
    };
    let parts = after.trim_end_matches(".weight").split('.').filter(|part| part.parse::<u32>().is_err());
    parts.collect::<Vec<_>>().join(".")
}

/// One tensor, or the same one of each expert.
fn cell(pairs: Vec<&TensorPair>) -> Cell {
    let (bytes, elements) = pairs.iter().fold((0, 0), |(b, e), p| (b + p.b_bytes, e + p.elements()));
    let bits = bytes as f64 * 8.0 / elements.max(1) as f64;
    let mut storages: Vec<&str> = pairs.iter().map(|p| &*p.b_storage).collect();
    storages.dedup();
    let errors: Vec<f64> = pairs.iter().filter_map(|p| p.error).collect();
    let mean = errors.iter().sum::<f64>() / errors.len() as f64;
    Cell {
        storage: storages.join(", "),
        bits: format!("{bits:.2}"),
        error: shown_error((!errors.is_empty()).then_some(mean)),
        lightness: (62.0 + bits * 4.0).min(97.0),
        filled: !pairs.is_empty(),
    }
}

fn chart(a: &[Sample], b: &[Sample]) -> Chart {
    let both = || a.iter().chain(b);
    let most = both().map(|s| s.resident).max().unwrap_or(1).max(1);
    let longest = both().map(|s| s.seconds).fold(1e-3, f64::max);
    let line = |samples: &[Sample]| {
        let point = |s: &Sample| {
            let y = HEIGHT - s.resident as f64 / most as f64 * HEIGHT;
            format!("{:.1},{y:.1}", s.seconds / longest * WIDTH)
        };
        samples.iter().map(point).collect::<Vec<_>>().join(" ")
    };
    Chart {
        width: WIDTH,
        height: HEIGHT,
        a: line(a),
        b: line(b),
        most: human::bytes(most),
        longest: format!("{longest:.2} s"),
    }
}
