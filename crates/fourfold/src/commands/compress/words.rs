//! What `compress` says to people, before the work and after it.

use fourfold_compress::pipeline::EXPERT_PRIOR;
use fourfold_compress::report::{self, ExpertReach};
use fourfold_compress::{Outcome, Scope};

use super::{CompressArgs, FormatArg};
use crate::model::OpenModel;
use crate::{human, included_text};

/// Mean divergence, in nats a token, from which a model seldom says anything sensible.
const BROKEN: f64 = 0.5;

/// What a user who reads no help should know of what was asked.
pub fn before(args: &CompressArgs, open: &OpenModel, scope: &Scope, calibration: &[Vec<u32>]) -> Vec<String> {
    let mut remarks = Vec::new();
    remarks.extend(quantized_source(open));
    let tokens: usize = calibration.iter().map(Vec::len).sum();
    if !args.calibration.is_given() && args.output.imatrix.is_none() {
        remarks.push(match (tokens, &args.method) {
            (0, None) => {
                "note: the model has no tokenizer for calibration text: weights are rounded to nearest, which \
                 costs several times the quality at the same size"
                    .to_owned()
            }
            (0, Some(_)) => return remarks,
            (tokens, _) => format!(
                "calibrating on {tokens} tokens of {}; --calibration FILE takes your own, --effort 2 works longer, --method rtn reads none",
                included_text::CONTENT
            ),
        });
    }
    if args.output.format == FormatArg::CompressedTensors {
        if scope.embeddings {
            remarks.push(
                "note: transformers loads a packed embedding only with CompressedTensorsConfig(dequantize=True), and that only \
                 where all weights have the same bits"
                    .to_owned(),
            );
        }
        if args.grid.asymmetric {
            remarks.push(
                "note: transformers loads zero points only with CompressedTensorsConfig(dequantize=True)".to_owned(),
            );
        }
    }
    remarks
}

/// That a source has already lost what quantization takes.
fn quantized_source(open: &OpenModel) -> Option<String> {
    let tensors = open.checkpoint.weights.tensors();
    let (mut packed, mut all, mut name) = ((0, 0), 0, "");
    for tensor in tensors {
        all += tensor.elements();
        if !["F32", "F16", "BF16", "F64"].contains(&tensor.storage.as_str()) {
            packed = (packed.0 + tensor.elements(), packed.1 + tensor.bytes);
            name = &tensor.storage;
        }
    }
    (2 * packed.0 > all).then(|| {
        format!(
            "note: {} is already quantized ({name}, {:.2} bits a weight): what that lost stays lost, and a ratio counts from its \
             size. From the original model the same bytes keep more; --bits 3.5 asks for a size in bits a parameter",
            open.checkpoint.path.display(),
            packed.1 as f64 * 8.0 / packed.0 as f64
        )
    })
}

/// What can be had where a budget is below the smallest plan.
pub fn possible(smallest: u64, source: u64, parameters: u64, embeddings: bool) -> String {
    let ratio = (source as f64 / smallest as f64 * 100.0).floor() / 100.0;
    let bits = (smallest as f64 * 8.0 / parameters as f64 * 100.0).ceil() / 100.0;
    let pack = if embeddings { "" } else { ", or less with --embedding pack: the embedding is kept as it is" };
    format!("the smallest that can be made of it is --ratio {ratio:.2} (--bits {bits:.2}){pack}")
}

/// What the compression cost, and whether the model is of use.
pub fn cost(outcome: &Outcome) -> String {
    let mut text = format!(
        "on {} held-out tokens: KL divergence from the original {:.4} nats a token, the same first choice {}, perplexity {:.2} -> {:.2}\n",
        outcome.tokens,
        outcome.mean_kld,
        human::percent(outcome.top1_agreement),
        outcome.original_perplexity,
        outcome.perplexity
    );
    if outcome.mean_kld >= BROKEN {
        text += "warning: so large a divergence makes a model that is likely of no use; ask for a smaller --ratio or more \
                 --bits, and leave out --method rtn\n";
    }
    text
}

/// What to type next.
pub fn next(model: &str, out: &str) -> String {
    format!("next: fourfold chat {out}\n      fourfold compare {model} {out} --text FILE -o report.html\n")
}

/// The experts of each layer that text hardly reached, a line a layer, the least reached first.
pub fn hardly_reached(experts: &[ExpertReach], tokens: usize) -> String {
    let split = |e: &ExpertReach| match e.expert.rsplit_once(".experts.") {
        Some((layer, number)) => (layer.to_owned(), format!("experts.{number} ({} tokens)", e.tokens)),
        None => (String::new(), format!("{} ({} tokens)", e.expert, e.tokens)),
    };
    let never = experts.iter().filter(|e| e.tokens == 0).count();
    let mut text = format!(
        "experts that fewer than {EXPERT_PRIOR:.0} of the {tokens} calibration tokens reached: {}, {never} of them never; they are rounded \
         by what reached their layer's other experts (more text reaches more of them)\n",
        experts.len()
    );
    for layer in experts.chunk_by(|a, b| split(a).0 == split(b).0) {
        let mut layer: Vec<&ExpertReach> = layer.iter().collect();
        layer.sort_by_key(|e| e.tokens);
        let named: Vec<String> = layer.iter().take(MOST_NAMED).map(|e| split(e).1).collect();
        let more = layer.len().saturating_sub(MOST_NAMED);
        let more =
            if more > 0 { format!(", and {more} more (all are in {})", report::FILE_NAME) } else { String::new() };
        text += &format!("  {}: {}{more}\n", split(layer[0]).0, named.join(", "));
    }
    text
}

/// Experts of a layer that are named on the terminal.
const MOST_NAMED: usize = 16;
