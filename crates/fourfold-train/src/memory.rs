//! Peak memory of a run, predicted from shapes before anything is allocated.
//!
//! What a step holds is followed through its phases as [`crate::language`] runs them: the head with the logits, then each block's
//! backward, from the last to the first. The peak is the largest of these.

use fourfold_models::{BlockSpec, FeedForward, ModelSpec, WeightSpec};
use fourfold_tensor::DType;

use crate::optim::OptimizerKind;
use crate::optim::blockwise::{BLOCK4, BLOCK8};
use crate::recipe::{MomentPrecision, Recipe, Storage};

/// Bytes of a run's peak, by component.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrainMemory {
    /// The weights as stored.
    pub weights: u64,
    /// The optimizer's states.
    pub optimizer: u64,
    /// Gradients alive at the peak, sums of micro-batches included.
    pub gradients: u64,
    /// What the forward keeps for the backward, and the tensors of the part being run.
    pub activations: u64,
    /// Logits of a chunk of tokens.
    pub logits: u64,
    /// Copies of weights in the type that the products read.
    pub copies: u64,
    /// Tokens of the corpus; 0 where it is not known, as in [`train_memory`].
    pub data: u64,
    /// The program itself.
    pub program: u64,
}

impl TrainMemory {
    /// The sum.
    pub fn total(&self) -> u64 {
        self.weights
            + self.optimizer
            + self.gradients
            + self.activations
            + self.logits
            + self.copies
            + self.data
            + self.program
    }
}

const F32: u64 = size_of::<f32>() as u64;
const BF16: u64 = 2;
/// Resident pages of the program, its tokenizer's remains and its threads' stacks: an estimate. The tokens of the corpus, 4 bytes
/// each, are not counted.
const PROGRAM: u64 = 24_000_000;

/// Peak memory of steps of `batch` sequences of `context` tokens.
pub fn train_memory(spec: &ModelSpec, recipe: &Recipe, batch: u64, context: u64, accumulation: u64) -> TrainMemory {
    let tokens = batch * context;
    let part = match recipe.recompute {
        true => tokens.min((recipe.block_tokens as u64 / context.max(1)).max(1) * context),
        false => tokens,
    };
    let all = spec.weights();
    let fixed = TrainMemory {
        weights: all.iter().map(|w| weight_bytes(w, recipe)).sum(),
        optimizer: all.iter().map(|w| optimizer_bytes(w, recipe)).sum(),
        gradients: match (accumulation > 1, recipe.release) {
            (true, true) => spec.parameters() * BF16,
            _ => 0,
        },
        program: PROGRAM,
        ..TrainMemory::default()
    };
    let elements =
        |block: Option<usize>| all.iter().filter(|w| w.block == block).map(WeightSpec::elements).sum::<u64>();
    let hidden = spec.hidden_size as u64;
    let blocks = spec.blocks.len();
    let saved: Vec<u64> = match recipe.recompute {
        true => vec![tokens * hidden * BF16; blocks],
        false => spec.blocks.iter().map(|block| block.saved_elements(tokens) * F32).collect(),
    };
    let kept = |below: usize| saved[..below].iter().sum::<u64>();
    let embedding = spec.vocab_size as u64 * hidden;
    let outside = elements(None);

    // The head: its input, the normed rows and their gradient; a chunk's rows and their gradient, its logits, and some of these
    // once more as the products read them.
    let chunk = (recipe.loss_chunk as u64).min(tokens);
    let mut peak = TrainMemory {
        gradients: fixed.gradients + embedding * F32,
        activations: kept(blocks) + (3 * tokens + 2 * chunk) * hidden * F32,
        logits: chunk * (spec.vocab_size as u64 * F32 + read_features(spec.vocab_size) * read_bytes(recipe)),
        copies: copies(spec, &all, recipe, blocks),
        ..fixed
    };
    // The blocks, backwards. A tied embedding's gradient waits for its second half.
    let mut gathered = if recipe.release { if spec.tied { embedding } else { 0 } } else { outside };
    for (i, block) in spec.blocks.iter().enumerate().rev() {
        gathered += if recipe.release { 0 } else { elements(Some(i)) };
        let live = if recipe.release { elements(Some(i)) } else { 0 };
        let recomputed = if recipe.recompute { block.saved_elements(part) * F32 } else { 0 };
        let at = TrainMemory {
            gradients: fixed.gradients + (gathered + live) * F32,
            activations: kept(i + 1) + recomputed + tokens * hidden * F32 + backward_bytes(block, part, recipe),
            copies: copies(spec, &all, recipe, i + 1),
            ..fixed
        };
        if at.total() > peak.total() {
            peak = at;
        }
    }
    peak
}

/// Bytes alive in a block's backward over `tokens` besides what is saved, at the feed-forward's two heights: the normed input and
/// the gradient of the output, and then either the inner features' gradient or the gradients of both projections' inputs, each
/// with the product's input as the product reads it.
fn backward_bytes(block: &BlockSpec, tokens: u64, recipe: &Recipe) -> u64 {
    let (hidden, read) = (block.hidden as u64, read_bytes(recipe));
    let mlp = |width: usize, tokens: u64| {
        let (inner, inputs) = (width as u64 * F32 + hidden * read, 2 * hidden * F32 + read_features(width) * read);
        tokens * inner.max(inputs)
    };
    let feed_forward = match &block.feed_forward {
        FeedForward::Mlp(spec) => mlp(spec.intermediate, tokens),
        FeedForward::Moe(moe) => {
            // An expert's share of the tokens, where they are spread evenly: its input and the gradient of its output.
            let routed = tokens * moe.router.per_token as u64 / moe.router.experts.max(1) as u64;
            let expert = tokens * hidden * F32 + routed * 2 * hidden * F32 + mlp(moe.expert.intermediate, routed);
            expert.max(moe.shared.as_ref().map_or(0, |shared| mlp(shared.intermediate, tokens)))
        }
    };
    tokens * 2 * hidden * F32 + feed_forward
}

/// Bytes of an element of a product's input as the product reads it: on CPUs with bf16 instructions a bf16 copy, where the recipe
/// multiplies in bf16, otherwise one in f32.
fn read_bytes(recipe: &Recipe) -> u64 {
    if recipe.compute == DType::Bf16 { BF16 } else { F32 }
}

/// Of so many output features' gradient, those that a product with the weight holds as it reads them.
fn read_features(features: usize) -> u64 {
    features.min(2048) as u64
}

/// Bytes of weights in the type that products read, where it is not the type they are stored in: blocks that wait for their
/// backward keep theirs.
fn copies(spec: &ModelSpec, all: &[WeightSpec], recipe: &Recipe, blocks: usize) -> u64 {
    let bytes = match (recipe.storage, recipe.compute) {
        (Storage::F32, DType::F32) => return 0,
        (Storage::F32, _) => BF16,
        // The kernels' own order of the codes.
        (Storage::Int8 | Storage::Int8Nearest, _) => 1,
        (Storage::Bf16 | Storage::Bf16Nearest | Storage::Bf16Residual, _) => return 0,
    };
    let of = |block: usize| all.iter().filter(|w| w.block == Some(block)).map(WeightSpec::elements).sum::<u64>();
    let embedding = spec.vocab_size as u64 * spec.hidden_size as u64;
    let live = match recipe.recompute {
        true => (0..blocks).map(of).max().unwrap_or(0),
        false => (0..blocks).map(of).sum(),
    };
    (embedding + live) * bytes
}

fn weight_bytes(weight: &WeightSpec, recipe: &Recipe) -> u64 {
    let n = weight.elements();
    match recipe.storage_of(weight) {
        Storage::F32 => n * F32,
        Storage::Bf16 | Storage::Bf16Nearest => n * BF16,
        Storage::Bf16Residual => n * 3,
        Storage::Int8 | Storage::Int8Nearest => n + n.div_ceil(128) * F32,
    }
}

fn optimizer_bytes(weight: &WeightSpec, recipe: &Recipe) -> u64 {
    let n = weight.elements();
    let state = match recipe.moments_of(weight) {
        MomentPrecision::F32 => n * F32,
        MomentPrecision::Bits8 => n + n.div_ceil(BLOCK8 as u64) * F32,
        MomentPrecision::Bits4 => n.div_ceil(2) + n.div_ceil(BLOCK4 as u64) * F32,
    };
    match recipe.optimizer {
        OptimizerKind::AdamW => 2 * state,
        OptimizerKind::Sgd => state,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::ParameterStore;
    use fourfold_models::spec_from_config;
    use serde_json::json;

    fn spec() -> ModelSpec {
        spec_from_config(&json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 256,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 512,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 64, "tie_word_embeddings": true,
            "hidden_act": "silu"
        }))
        .unwrap()
    }

    #[test]
    fn what_is_stored_is_predicted_exactly() {
        let spec = spec();
        for storage in [Storage::F32, Storage::Bf16, Storage::Bf16Residual, Storage::Int8] {
            for preset in Recipe::ALL {
                let recipe = Recipe { storage, ..preset };
                let (weights, optimizer) = ParameterStore::initialize(&spec, 0.02, 0, &recipe).byte_len();
                let predicted = train_memory(&spec, &recipe, 2, 64, 1);
                assert_eq!((predicted.weights, predicted.optimizer), (weights as u64, optimizer as u64), "{recipe:?}");
            }
        }
    }

    #[test]
    fn smaller_recipes_take_less_and_larger_batches_more() {
        let spec = spec();
        let above = |recipe: &Recipe, batch| train_memory(&spec, recipe, batch, 64, 1).total() - PROGRAM;
        assert!(above(&Recipe::QUARTER, 64) * 2 < above(&Recipe::BASELINE, 64));
        assert!(above(&Recipe::EIGHTH, 8) < above(&Recipe::QUARTER, 8));
        assert!(above(&Recipe::QUARTER, 16) > above(&Recipe::QUARTER, 8));
        let accumulated = train_memory(&spec, &Recipe::QUARTER, 8, 64, 4).total() - PROGRAM;
        assert_eq!(accumulated - above(&Recipe::QUARTER, 8), 2 * spec.parameters());
    }
}
