//! Runs windows through a model, and a few rows of logits at a time through the measures.

use std::io::{Read, Seek, Write};
use std::ops::ControlFlow;

use fourfold_kernels::{KvDtype, Tensor};
use fourfold_models::Model;
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Serialize;

use super::ROWS;
use super::divergence::{Comparison, Divergence, DivergenceReport, compare};
use super::perplexity::{Perplexity, PerplexityReport};
use super::saved::{SavedLogits, SavedLogitsWriter};
use super::softmax::{LogSum, log_sum};
use super::windows::Window;
use crate::InferError;
use crate::session::check_ids;

/// Something that can be read and moved about in.
pub trait ReadSeek: Read + Seek {}
impl<T: Read + Seek> ReadSeek for T {}

/// What predictions are compared with.
pub enum Base<'a> {
    /// Nothing: perplexity only.
    None,
    /// The original model, in memory too.
    Model(&'a Model),
    /// The original's predictions in a file.
    Saved(&'a mut SavedLogits<Box<dyn ReadSeek>>),
}

/// What to do.
pub struct Evaluation<'a> {
    /// The model that is measured.
    pub model: &'a Model,
    /// What it is compared with.
    pub base: Base<'a>,
    /// Where its predictions are kept.
    pub save: Option<&'a mut SavedLogitsWriter>,
    /// How keys and values are stored.
    pub kv: KvDtype,
}

/// The figures.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EvaluationReport {
    /// Windows evaluated.
    pub windows: usize,
    /// The model's perplexity.
    #[serde(flatten)]
    pub perplexity: PerplexityReport,
    /// The original's perplexity on the same tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub original: Option<PerplexityReport>,
    /// How far the model's predictions lie from the original's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub divergence: Option<DivergenceReport>,
}

/// One scored position.
struct Scored {
    target: u32,
    model: LogSum,
    nll: f64,
    base: Option<(LogSum, f64, Comparison)>,
}

/// Evaluates all windows, or until `progress` (told the figures after each window) breaks off: the report then covers what
/// was done.
///
/// # Errors
/// A token the model does not know, a base that does not fit, or a file that cannot be read or written.
pub fn evaluate(
    evaluation: Evaluation,
    windows: &[Window],
    progress: &mut dyn FnMut(&EvaluationReport) -> ControlFlow<()>,
) -> Result<EvaluationReport, InferError> {
    let Evaluation { model, mut base, mut save, kv } = evaluation;
    let vocab = model.spec().vocab_size;
    for window in windows {
        check_ids(&window.ids, vocab)?;
    }
    match &base {
        Base::None => {}
        Base::Model(original) if original.spec().vocab_size != vocab => {
            let theirs = original.spec().vocab_size;
            return Err(InferError::Incomparable(format!("the original has {theirs} tokens, the model {vocab}")));
        }
        Base::Model(_) => {}
        Base::Saved(saved) => saved.check(windows, vocab)?,
    }
    let (mut ours, mut theirs, mut divergence) = (Perplexity::default(), Perplexity::default(), Divergence::default());
    let compared = !matches!(base, Base::None);
    let mut report = None;
    for (done, window) in windows.iter().enumerate() {
        let hidden = model.hidden(&window.ids, &mut model.new_cache(kv));
        let base_hidden = match &base {
            Base::Model(original) => Some(original.hidden(&window.ids, &mut original.new_cache(kv))),
            Base::None | Base::Saved(_) => None,
        };
        let last = window.ids.len() - 1;
        for start in (window.first..last).step_by(ROWS) {
            let rows = start..(start + ROWS).min(last);
            let logits = logits_of(model, &hidden, rows.clone())?;
            let base_logits = match (&mut base, &base_hidden) {
                (Base::Model(original), Some(h)) => Some(logits_of(original, h, rows.clone())?),
                (Base::Saved(saved), _) => Some(Tensor::new(rows.len(), vocab, saved.read(rows.len())?)),
                (Base::None | Base::Model(_), _) => None,
            };
            let targets: Vec<u32> = rows.map(|p| window.target(p)).collect();
            for (row, scored) in score(&logits, base_logits.as_ref(), &targets).into_iter().enumerate() {
                ours.add(scored.nll, window.weight, scored.model.best == scored.target);
                if let Some((b, nll, comparison)) = scored.base {
                    theirs.add(nll, window.weight, b.best == scored.target);
                    divergence.add(comparison);
                }
                if let Some(save) = &mut save {
                    save.push(logits.row(row), scored.model.log_sum)?;
                }
            }
        }
        let now = EvaluationReport {
            windows: done + 1,
            perplexity: ours.report(),
            original: compared.then(|| theirs.report()),
            divergence: compared.then(|| divergence.report()),
        };
        let go_on = progress(&now);
        report = Some(now);
        if go_on.is_break() {
            break;
        }
    }
    report.ok_or_else(|| InferError::BadWindow("there is nothing to evaluate".into()))
}

/// Logits of some rows of `hidden`.
fn logits_of(model: &Model, hidden: &Tensor, rows: std::ops::Range<usize>) -> Result<Tensor, InferError> {
    Ok(Tensor::new(rows.len(), model.spec().vocab_size, model.logits_of(hidden, rows)?))
}

/// Rows are independent, and a vocabulary is long: one row a task.
fn score(logits: &Tensor, base: Option<&Tensor>, targets: &[u32]) -> Vec<Scored> {
    let one = |(row, &target): (usize, &u32)| {
        let nll = |row: &[f32], s: LogSum| s.log_sum - f64::from(row[target as usize]);
        let values = logits.row(row);
        let model = log_sum(values);
        let base = base.map(|base| {
            let b = log_sum(base.row(row));
            (b, nll(base.row(row), b), compare(base.row(row), b, values, model, target))
        });
        Scored { target, model, nll: nll(values, model), base }
    };
    targets.par_iter().enumerate().map(|(row, target)| one((row, target))).collect()
}

/// Writes `input_ids` (I64, `[windows, tokens]`) and `logits` (F32, `[windows, tokens, vocab]`) of every position as
/// safetensors, for checks against other programs. All windows must be of one length.
///
/// # Errors
/// A token the model does not know, windows of several lengths, or a file that cannot be written.
pub fn dump_logits(model: &Model, kv: KvDtype, windows: &[Window], out: &mut dyn Write) -> Result<(), InferError> {
    let vocab = model.spec().vocab_size;
    let tokens = windows.first().map_or(0, |w| w.ids.len());
    if windows.iter().any(|w| w.ids.len() != tokens) {
        return Err(InferError::BadWindow("logits can be dumped of windows of one length only".into()));
    }
    let ids_end = windows.len() * tokens * 8;
    let end = ids_end + windows.len() * tokens * vocab * 4;
    let info = |dtype, shape, data_offsets| TensorInfo { dtype, shape, data_offsets };
    let tensors = vec![
        ("input_ids".to_owned(), info(Dtype::I64, vec![windows.len(), tokens], (0, ids_end))),
        ("logits".to_owned(), info(Dtype::F32, vec![windows.len(), tokens, vocab], (ids_end, end))),
    ];
    let invalid = |e: &dyn std::fmt::Display| std::io::Error::new(std::io::ErrorKind::InvalidData, e.to_string());
    let metadata = Metadata::new(None, tensors).map_err(|e| invalid(&e))?;
    let header = serde_json::to_vec(&metadata).map_err(|e| invalid(&e))?;
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for window in windows {
        check_ids(&window.ids, vocab)?;
        for &id in &window.ids {
            out.write_all(&i64::from(id).to_le_bytes())?;
        }
    }
    for window in windows {
        let hidden = model.hidden(&window.ids, &mut model.new_cache(kv));
        for start in (0..tokens).step_by(ROWS) {
            let logits = logits_of(model, &hidden, start..(start + ROWS).min(tokens))?;
            let bytes: Vec<u8> = logits.host().iter().flat_map(|v| v.to_le_bytes()).collect();
            out.write_all(&bytes)?;
        }
    }
    Ok(out.flush()?)
}
