//! Peak memory of a run, predicted from shapes before anything is allocated.
//!
//! What a step holds is followed through its phases as [`crate::language`] runs them: the head with the logits, then each block's
//! backward, from the last to the first. The peak is the largest of these.

use fourfold_kernels::cpu::MAPPED_BYTES;
use fourfold_kernels::{FloatProducts, Isa, release_freed_memory};
use fourfold_models::layers::LoraSpec;
use fourfold_models::{BlockSpec, FeedForward, ModelSpec, Role, WeightSpec};
use fourfold_tensor::DType;

use crate::batch::Extent;
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
    /// The batches of a step; [`train_memory`] leaves out what the data takes besides.
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

    /// The same run of a program that takes `resident` bytes before it begins, in place of what such programs take on average.
    #[must_use]
    pub fn started_at(self, resident: u64) -> Self {
        Self { program: (self.program - STARTED) + resident, ..self }
    }

    /// The same run with a teacher of `stored` bytes: its weights, its hidden rows of a batch of `tokens` in bf16, and its logits of a chunk.
    #[must_use]
    pub fn taught(self, teacher: &ModelSpec, recipe: &Recipe, tokens: u64, stored: u64) -> Self {
        let hidden = teacher.hidden_size as u64;
        let chunk = (recipe.loss_chunk as u64).min(tokens);
        Self {
            weights: self.weights + stored,
            activations: self.activations + tokens * hidden * BF16 + chunk * hidden * F32,
            logits: self.logits + chunk * teacher.vocab_size as u64 * F32,
            ..self
        }
    }
}

pub(crate) const F32: u64 = size_of::<f32>() as u64;
pub(crate) const BF16: u64 = 2;
/// Bytes of a token in a batch: itself, its target and its position.
const BATCH_BYTES: u64 = (2 * size_of::<u32>() + size_of::<usize>()) as u64;
/// Bytes of a packed weight that are written out at a time for the gradient of its input.
const WRITTEN: u64 = 1 << 20;
/// Elements of a packed weight's gradient that are computed at a time (`Backward::tuned_weight_gradient`).
const GRADIENT: u64 = 1 << 19;
/// Resident pages of the program and its tokenizer's remains before a run begins: measured.
const STARTED: u64 = 14_500_000;
/// Pages of the program that a run reads besides, and what fingerprints and checksums of files leave: measured.
const READ: u64 = 2_800_000;
/// What is added in a run at most: more of the program's pages, threads' stacks and packing buffers, and the heap's holes. Measured, as
/// is the share of the activations that it is where these are few.
const RUNNING: u64 = 6_000_000;
const RUNNING_SHARE: u64 = 5;
/// More holes, where buffers of many sizes come and go: experts' shares of the tokens, and the parts of packed weights.
const MANY_SIZES: u64 = 4_000_000;
/// The same over a packed base that stays as it is, of which nothing is made anew in a step.
const FEW_SIZES: u64 = 2_000_000;

/// What a run does in a step.
#[derive(Clone, Copy, Debug)]
pub struct Work<'a> {
    /// Its largest batch.
    pub largest: Extent,
    /// Batches whose gradients are summed.
    pub accumulation: u64,
    /// What is trained in place of the model's own weights.
    pub adapters: Option<Adapters<'a>>,
    /// What is trained of a model that stays packed otherwise.
    pub tuned: Option<Tuned<'a>>,
}

/// Adapters over a model that stays as it is.
#[derive(Clone, Copy, Debug)]
pub struct Adapters<'a> {
    /// Which.
    pub lora: &'a LoraSpec,
    /// Bytes of the model's matrices as they are stored: packed ones stay packed.
    pub base: u64,
}

/// Numbers that are learned of a model that stays packed otherwise ([`crate::store::ParameterStore::tune`]).
#[derive(Clone, Copy, Debug)]
pub struct Tuned<'a> {
    /// What has some: its shape is how many they are.
    pub numbers: &'a [WeightSpec],
    /// Bytes of the model as stored.
    pub stored: u64,
}

impl<'a> Work<'a> {
    /// Steps of `batch` sequences of `context` tokens.
    pub fn sequences(batch: u64, context: u64, accumulation: u64, recipe: &Recipe) -> Self {
        let lengths = std::iter::repeat_n(context as usize, batch as usize);
        Self { largest: Extent::of(lengths, recipe.block_tokens), accumulation, adapters: None, tuned: None }
    }

    /// The same with adapters.
    #[must_use]
    pub fn with_adapters(self, adapters: Option<Adapters<'a>>) -> Self {
        Self { adapters, ..self }
    }

    /// The same of a model of which only such numbers are trained.
    #[must_use]
    pub fn with_tuned(self, tuned: Option<Tuned<'a>>) -> Self {
        Self { tuned, ..self }
    }
}

/// What is trained, and how it is stored.
struct Trained {
    weights: Vec<WeightSpec>,
    recipe: Recipe,
}

impl Trained {
    /// Adapters and numbers of packed weights are f32 with f32 moments in every recipe.
    fn of(spec: &ModelSpec, recipe: &Recipe, work: &Work) -> Self {
        let precise = Recipe { storage: Storage::F32, moments: MomentPrecision::F32, ..*recipe };
        match (work.adapters, work.tuned) {
            (None, None) => Self { weights: spec.weights(), recipe: *recipe },
            (Some(adapters), _) => Self { weights: adapters.lora.weights(spec), recipe: precise },
            (None, Some(tuned)) => Self { weights: tuned.numbers.to_vec(), recipe: precise },
        }
    }

    fn sum(&self, of: impl Fn(&WeightSpec) -> u64) -> u64 {
        self.weights.iter().map(of).sum()
    }

    /// Elements of each of so many blocks.
    fn by_block(&self, blocks: usize) -> Vec<u64> {
        let mut elements = vec![0; blocks];
        for weight in &self.weights {
            if let Some(of_block) = weight.block.and_then(|block| elements.get_mut(block)) {
                *of_block += weight.elements();
            }
        }
        elements
    }

    fn role(&self, role: Role) -> u64 {
        self.weights.iter().filter(|w| w.role == role).map(WeightSpec::elements).sum()
    }
}

/// Peak memory of such steps.
pub fn train_memory(spec: &ModelSpec, recipe: &Recipe, work: &Work) -> TrainMemory {
    let Work { largest, accumulation, adapters, tuned } = *work;
    let tokens = largest.tokens as u64;
    let part = if recipe.recompute { largest.part as u64 } else { tokens };
    // The product of a gradient with a packed weight holds some of its columns once more in f32.
    let is_packed = tuned.is_some()
        || match adapters {
            Some(adapters) => adapters.base < spec.parameters() * BF16 * 3 / 4,
            None => matches!(recipe.storage, Storage::Int8 | Storage::Int8Nearest),
        };
    let read = if is_packed { F32 } else { read_bytes(recipe) };
    // Products of dense bf16 weights in bf16 are given what they alone read rounded; an adapter's layers are not.
    let is_rounded = !is_packed
        && adapters.is_none()
        && recipe.compute == DType::Bf16
        && FloatProducts::fastest(Isa::detect()) == FloatProducts::Bf16;
    let has_experts = spec.blocks.iter().any(|block| matches!(block.feed_forward, FeedForward::Moe(_)));
    let trained = Trained::of(spec, recipe, work);
    let fixed = TrainMemory {
        weights: trained.sum(|w| weight_bytes(w, &trained.recipe))
            + adapters.map_or(0, |a| a.base)
            + tuned.map_or(0, |t| t.stored),
        optimizer: trained.sum(|w| optimizer_bytes(w, &trained.recipe)),
        gradients: match (accumulation > 1, recipe.release) {
            (true, true) => trained.sum(WeightSpec::elements) * BF16,
            _ => 0,
        },
        // Tokens, targets and positions.
        data: accumulation * tokens * BATCH_BYTES,
        program: STARTED
            + READ
            + match (is_packed, has_experts, adapters) {
                (true, _, Some(_)) => FEW_SIZES,
                (true, ..) | (_, true, _) => MANY_SIZES,
                (false, false, _) => 0,
            },
        ..TrainMemory::default()
    };
    let hidden = spec.hidden_size as u64;
    // What a product with a packed weight writes out, and its sum over the weight's parts.
    let written = |tokens: u64| if is_packed { WRITTEN + tokens * hidden * F32 } else { 0 };
    // A part of a packed matrix's gradient, before it is summed.
    let summed = |shapes: &[[u64; 2]], tokens| if tuned.is_some() { gradient_part(shapes, tokens) } else { 0 };
    // What products read of so many blocks' weights, besides what is stored: of packed ones the kernels' layout, which is as large.
    let parameters = spec.parameters().max(1);
    let live = match tuned {
        Some(_) => alive(spec, &Trained { weights: spec.weights(), recipe: *recipe }),
        None => alive(spec, &trained),
    };
    let copies = |blocks: usize| match tuned {
        Some(Tuned { stored, .. }) => (stored as f64 * live[blocks] as f64 / parameters as f64) as u64,
        None => live[blocks] * copy_bytes(&trained.recipe),
    };
    // An adapter's product, before it is added to its layer's.
    let widest = trained.weights.iter().map(|w| w.shape[0] as u64).max().unwrap_or(0);
    let adapted = |tokens: u64| if adapters.is_some() { tokens * widest * F32 } else { 0 };
    let blocks = spec.blocks.len();
    let saved: Vec<u64> = match recipe.recompute {
        true => vec![tokens * hidden * BF16; blocks],
        false => spec.blocks.iter().map(|block| block.saved_elements(tokens) * F32).collect(),
    };
    // Of none of the blocks to all of them.
    let mut kept = vec![0];
    kept.extend(saved.iter().scan(0, |sum, bytes| {
        *sum += bytes;
        Some(*sum)
    }));
    let trained_of = trained.by_block(blocks);
    let embedding = trained.role(Role::Embedding);
    let head = if spec.tied { embedding } else { trained.role(Role::LmHead) };

    // The head: its input, in whose memory its gradient is; a chunk's rows, normed, and their gradient, its logits, and some of these
    // once more as the products read them.
    let chunk = (recipe.loss_chunk as u64).min(tokens);
    let outputs = spec.outputs() as u64;
    let mut peak = TrainMemory {
        gradients: fixed.gradients + head * F32 + summed(&[[outputs, hidden]], chunk),
        activations: kept[blocks] + (tokens + 3 * chunk) * hidden * F32,
        logits: chunk * (spec.outputs() as u64 * F32 + read_features(spec.outputs()) * read) + written(chunk),
        copies: copies(blocks),
        ..fixed
    };
    let mut consider = |at: TrainMemory| {
        if at.total() > peak.total() {
            peak = at;
        }
    };
    // The blocks, backwards. A tied embedding's gradient waits for its second half.
    let mut gathered = match recipe.release {
        true if !spec.tied => 0,
        true if recipe.narrows_waiting() => head * BF16,
        true | false => head * F32,
    };
    for (i, block) in spec.blocks.iter().enumerate().rev() {
        gathered += if recipe.release { 0 } else { trained_of[i] * F32 };
        let live = if recipe.release { trained_of[i] } else { 0 };
        let recomputed = if recipe.recompute { block.saved_elements(part) * F32 } else { 0 };
        consider(TrainMemory {
            gradients: fixed.gradients + gathered + live * F32 + summed(&shapes(block), part),
            activations: kept[i + 1]
                + recomputed
                + tokens * hidden * F32
                + backward_bytes(block, part, read, is_rounded)
                + written(part)
                + adapted(part),
            copies: copies(i + 1),
            ..fixed
        });
    }
    // The embedding, and the update of what was gathered. Rows of a large gradient that no token took are never written, and take no
    // memory: it is a map of its own.
    let rows = if embedding * F32 < MAPPED_BYTES as u64 { embedding } else { embedding.min(tokens * hidden) };
    consider(TrainMemory {
        gradients: fixed.gradients + if spec.tied { gathered.max(head * F32) } else { gathered + rows * F32 },
        activations: tokens * hidden * F32,
        copies: copies(0),
        ..fixed
    });
    // Where nothing is run anew buffers are kept longer, and leave fewer holes.
    let most = if recipe.recompute { RUNNING } else { RUNNING / 2 };
    let running = most.min((peak.activations + peak.logits) / RUNNING_SHARE);
    TrainMemory { program: peak.program + running, ..peak }
}

/// Bytes alive in a block's backward over `tokens` besides what is saved, at the feed-forward's two heights: the normed input and
/// the gradient of the output, and then either the inner features' gradient or the gradients of both projections' inputs, each
/// with the product's input as the product reads it. Rounded, the gradients of gate and up are there beside the inner features'.
fn backward_bytes(block: &BlockSpec, tokens: u64, read: u64, is_rounded: bool) -> u64 {
    let hidden = block.hidden as u64;
    let mlp = |width: usize, tokens: u64| {
        let (inner, inputs) = (width as u64 * F32 + hidden * read, 2 * hidden * F32 + read_features(width) * read);
        let both = if is_rounded { width as u64 * (F32 + 2 * BF16) } else { 0 };
        tokens * inner.max(inputs).max(both)
    };
    let feed_forward = match &block.feed_forward {
        FeedForward::Mlp(spec) => mlp(spec.intermediate, tokens),
        FeedForward::Moe(moe) => {
            // An expert's share of the tokens, where they are spread evenly: its input, the gradient of its output, and its inner
            // features, which the factors' gradient needs.
            let routed = tokens * moe.router.per_token as u64 / moe.router.experts.max(1) as u64;
            let rows = 2 * hidden + moe.expert.intermediate as u64;
            let expert = tokens * hidden * F32 + routed * rows * F32 + mlp(moe.expert.intermediate, routed);
            expert.max(moe.shared.as_ref().map_or(0, |shared| mlp(shared.intermediate, tokens)))
        }
    };
    tokens * 2 * hidden * F32 + feed_forward
}

/// Rows and columns of a block's matrices.
fn shapes(block: &BlockSpec) -> Vec<[u64; 2]> {
    let matrices = block.weights().into_iter().filter(|w| w.shape.len() > 1);
    matrices.map(|w| [w.shape[0] as u64, w.shape[1..].iter().product::<usize>() as u64]).collect()
}

/// Bytes of the part of a packed matrix's gradient that is computed at a time, with the part of `dy` that makes it: the largest of
/// matrices of such rows and columns.
fn gradient_part(shapes: &[[u64; 2]], tokens: u64) -> u64 {
    let part = |[rows, cols]: &[u64; 2]| (*rows).min(GRADIENT / (*cols).max(1)) * (cols + tokens) * F32;
    shapes.iter().map(part).max().unwrap_or(0)
}

/// Bytes of an element of a product's input as the product reads it: on CPUs that multiply 16-bit numbers faster a copy in these, where the
/// recipe multiplies in bf16, otherwise one in f32.
pub(crate) fn read_bytes(recipe: &Recipe) -> u64 {
    let is_fast = FloatProducts::fastest(Isa::detect()) != FloatProducts::F32;
    if recipe.compute == DType::Bf16 && is_fast { BF16 } else { F32 }
}

/// Of so many output features' gradient, those that a product with the weight holds as it reads them.
fn read_features(features: usize) -> u64 {
    features.min(2048) as u64
}

/// Elements of the weights whose form that products read is alive when so many blocks are to go, for none of them to all: blocks that wait
/// for their backward keep theirs.
fn alive(spec: &ModelSpec, weights: &Trained) -> Vec<u64> {
    let (embedding, head) = (weights.role(Role::Embedding), weights.role(Role::LmHead));
    let mut live = vec![0];
    for of_block in weights.by_block(spec.blocks.len()) {
        let before = live[live.len() - 1];
        live.push(if weights.recipe.recompute { of_block.max(before) } else { before + of_block });
    }
    let all = spec.blocks.len();
    live.iter().enumerate().map(|(blocks, live)| embedding + live + if blocks == all { head } else { 0 }).collect()
}

/// Bytes of an element in the type that products read, where it is not the type it is stored in.
pub(crate) fn copy_bytes(recipe: &Recipe) -> u64 {
    match (recipe.storage, recipe.compute) {
        (Storage::F32, DType::F32) => 0,
        (Storage::F32, _) => BF16,
        // The kernels' own order of the codes.
        (Storage::Int8 | Storage::Int8Nearest, _) => 1,
        (Storage::Bf16 | Storage::Bf16Nearest | Storage::Bf16Residual, _) => 0,
    }
}

/// Gives back what the heap keeps of freed memory before a buffer of `elements` f32 that is a map of its own: it would not use
/// that, but come on top of it.
pub(crate) fn make_room(elements: usize) {
    if elements * size_of::<f32>() >= MAPPED_BYTES {
        release_freed_memory();
    }
}

pub(crate) fn weight_bytes(weight: &WeightSpec, recipe: &Recipe) -> u64 {
    let n = weight.elements();
    match recipe.storage_of(weight) {
        Storage::F32 => n * F32,
        Storage::Bf16 | Storage::Bf16Nearest => n * BF16,
        Storage::Bf16Residual => n * 3,
        Storage::Int8 | Storage::Int8Nearest => n + n.div_ceil(128) * F32,
    }
}

pub(crate) fn optimizer_bytes(weight: &WeightSpec, recipe: &Recipe) -> u64 {
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
    use std::sync::Arc;

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
                let predicted = train_memory(&spec, &recipe, &Work::sequences(2, 64, 1, &recipe));
                assert_eq!((predicted.weights, predicted.optimizer), (weights as u64, optimizer as u64), "{recipe:?}");
            }
        }
    }

    #[test]
    fn adapters_are_predicted_exactly_and_the_base_stays_as_it_is() {
        let spec = spec();
        let base = Arc::new(ParameterStore::initialize(&spec, 0.02, 0, &Recipe::QUARTER));
        for targets in [vec![], vec!["q_proj".to_owned(), "v_proj".to_owned()]] {
            let lora = LoraSpec { rank: 4, alpha: 8.0, targets };
            for recipe in Recipe::ALL {
                let (weights, optimizer) = ParameterStore::adapt(&spec, base.clone(), &lora, 0, &recipe).byte_len();
                let work = Work::sequences(2, 64, 1, &recipe);
                let adapters = Adapters { lora: &lora, base: 1_000_000 };
                let predicted = train_memory(&spec, &recipe, &work.with_adapters(Some(adapters)));
                let expected = (1_000_000 + weights as u64, optimizer as u64);
                assert_eq!((predicted.weights, predicted.optimizer), expected, "{recipe:?}");
                assert!(predicted.gradients < train_memory(&spec, &recipe, &work).gradients);
            }
        }
    }

    #[test]
    fn smaller_recipes_take_less_and_larger_batches_more() {
        let spec = spec();
        let above = |recipe: &Recipe, batch| {
            let memory = train_memory(&spec, recipe, &Work::sequences(batch, 64, 1, recipe));
            memory.total() - memory.program
        };
        assert!(above(&Recipe::QUARTER, 64) * 2 < above(&Recipe::BASELINE, 64));
        assert!(above(&Recipe::EIGHTH, 8) < above(&Recipe::QUARTER, 8));
        assert!(above(&Recipe::QUARTER, 16) > above(&Recipe::QUARTER, 8));
        let sums = |times| {
            let work = Work::sequences(8, 64, times, &Recipe::QUARTER);
            train_memory(&spec, &Recipe::QUARTER, &work).gradients
        };
        assert_eq!(sums(4) - sums(1), 2 * spec.parameters());
    }
}
