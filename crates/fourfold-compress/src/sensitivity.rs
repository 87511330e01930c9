//! How much a tensor's output error matters to the model's predictions.
//!
//! To second order an error Δy in a layer's output costs a divergence of `½·E[(g·Δy)²]` nats a token, where g is the gradient of a
//! token's log-likelihood (the Fisher information: Kullback 1959). For an error without a preferred direction among `rows` outputs that
//! is `½·E‖g‖²/rows·E‖Δy‖²`. One backward pass over a few sequences of calibration text gives `E‖g‖²`, block by block.
//!
//! What the second order misses is measured end to end: each block by itself is rounded to 3 bits, the model's predictions are compared
//! with the original's, and the block's sensitivities are scaled by what that cost over what they said it would.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use fourfold_kernels::backward::{Backward, IGNORE};
use fourfold_kernels::{Backend, KvDtype, Tensor};
use fourfold_models::layers::{Goals, Gradients, TrainPass, Trained};
use fourfold_models::{Block, Embedding, Head, ModelError, ModelSpec, NoObserver, Role, WeightSpec};
use fourfold_tensor::WeightSource;
use serde::Serialize;

use crate::CompressError;
use crate::calibrate::{Collector, Hidden, Overlay};
use crate::gate::mean_divergence;
use crate::hessian::Hessian;
use crate::methods::quantize::grid::{Granularity, GridSpec};
use crate::methods::quantize::rtn::Rtn;
use crate::methods::{Method, Stats, matrix};
use crate::plan::{is_compressible, shown};
use crate::progress::Progress;

/// Sequences that are looked at, and tokens of each.
const SEQUENCES: usize = 8;
const TOKENS: usize = 256;
/// Tokens whose logits are held at a time.
const CHUNK: usize = 128;
/// The same for trials of whole blocks, and what those are rounded to.
const TRIAL_SEQUENCES: usize = 2;
const TRIAL_TOKENS: usize = 192;
const TRIAL_GRID: GridSpec = GridSpec::new(3, Granularity::Group(64));
/// Parameters of a block above which its gradients are not computed (they take 4 bytes each), and bytes of hidden states.
const MOST_PARAMETERS: u64 = 200_000_000;
const MOST_BYTES: usize = 512 << 20;

/// Gradient energies, where they were measured; a rule by role and place elsewhere.
#[derive(Clone, Debug, Default)]
pub struct Sensitivity {
    /// `E[‖g‖²·‖x‖²]` of a weight, per token: the energy of its gradient.
    weights: BTreeMap<String, f64>,
    /// `E‖g‖²` of the embeddings, per token.
    embedding: f64,
    /// What rounding a block cost over what was expected, by block; 1 where there is none.
    blocks: Vec<f64>,
}

/// What rounding a block by itself cost the model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct BlockSensitivity {
    /// The divergence in nats a token, measured.
    pub measured: f64,
    /// What its tensors' sensitivities and errors said.
    pub expected: f64,
}

impl BlockSensitivity {
    /// By what to scale the block's sensitivities: between a quarter and four, as a few hundred tokens say no more.
    fn scale(self) -> f64 {
        let scale = self.measured / self.expected;
        if scale.is_finite() && scale > 0.0 { scale.clamp(0.25, 4.0) } else { 1.0 }
    }
}

/// What the planner knows of a weight besides.
pub(crate) struct Energies {
    /// `E‖x‖²` of the input.
    pub input: f64,
    /// `E‖y‖²` of the output.
    pub output: f64,
    /// `Σ w²` over the rows, and how many there are: a table's outputs are its rows.
    pub row: f64,
}

impl Energies {
    /// From the Hessian of the input, the output's energy by it, and the rows'.
    pub fn of(hessian: &Hessian, output: f64, row: f64) -> Self {
        let trace: f64 = hessian.diagonal().iter().map(|&v| f64::from(v)).sum();
        // H is twice the second moments.
        Self { input: trace / 2.0, output: output / 2.0, row }
    }
}

impl Sensitivity {
    /// Measures gradients on the beginnings of some sequences. Holds one block, its gradients, and the hidden states at every depth.
    /// A model whose blocks or states are too large for that gets the rule.
    ///
    /// # Errors
    /// A tensor that cannot be loaded.
    pub fn measure(
        spec: &ModelSpec,
        source: &dyn WeightSource,
        backend: &Arc<dyn Backend>,
        backward: &dyn Backward,
        sequences: &[Vec<u32>],
        progress: &mut dyn Progress,
    ) -> Result<Self, ModelError> {
        let sequences: Vec<&[u32]> = sequences
            .iter()
            .filter(|ids| ids.len() > 1)
            .step_by((sequences.len() / SEQUENCES).max(1))
            .take(SEQUENCES)
            .map(|ids| &ids[..ids.len().min(TOKENS)])
            .collect();
        let tokens: usize = sequences.iter().map(|ids| ids.len() - 1).sum();
        let states = tokens * spec.hidden_size * size_of::<f32>() * (spec.blocks.len() + 1);
        let block = |b: &fourfold_models::BlockSpec| b.weights().iter().map(WeightSpec::elements).sum::<u64>();
        if tokens == 0 || states > MOST_BYTES || spec.blocks.iter().map(block).any(|n| n > MOST_PARAMETERS) {
            return Ok(Self::default());
        }
        let total = 2 * spec.blocks.len() as u64 + 1;
        let embedding = Embedding::load(spec, source, backend)?;
        let mut depths: Vec<Vec<Tensor>> = vec![sequences.iter().map(|ids| embedding.forward(ids)).collect()];
        drop(embedding);
        for index in 0..spec.blocks.len() {
            progress.update("sensitivity", index as u64, total);
            let block = Block::load(spec, index, source, backend)?;
            let forward =
                |x: &Tensor| block.forward(x.clone(), &mut spec.blocks[index].new_cache(KvDtype::F32), &mut NoObserver);
            depths.push(depths[index].iter().map(forward).collect());
        }
        let mut found = Self::default();
        let mut gradients = Gradients::new(Trained::All);
        let mut collect = |gradients: &mut Gradients| {
            for (name, gradient) in gradients.take_all() {
                let energy: f64 = gradient.host().iter().map(|&v| f64::from(v) * f64::from(v)).sum();
                *found.weights.entry(name).or_default() += energy / tokens as f64;
            }
        };
        let positions: Vec<usize> = (0..TOKENS).collect();
        let head = Head::load(spec, source, backend)?;
        let mut backs: Vec<Tensor> = Vec::with_capacity(sequences.len());
        for (ids, x) in sequences.iter().zip(depths.pop().unwrap_or_default()) {
            let documents = std::slice::from_ref(&(0..ids.len())).to_vec();
            let pass = TrainPass {
                backend: backward,
                documents: &documents,
                positions: &positions[..ids.len()],
                dropout: None,
            };
            let mut targets = ids[1..].to_vec();
            targets.push(IGNORE);
            backs.push(head.loss_backward(x, &Goals::targets(&targets), 1.0, CHUNK, &pass, &mut gradients).1);
            collect(&mut gradients);
        }
        drop(head);
        for index in (0..spec.blocks.len()).rev() {
            progress.update("sensitivity", total - 1 - index as u64, total);
            let block = Block::load(spec, index, source, backend)?;
            let inputs = depths.pop().unwrap_or_default();
            for (back, x) in backs.iter_mut().zip(inputs) {
                let documents = std::slice::from_ref(&(0..x.rows())).to_vec();
                let pass = TrainPass {
                    backend: backward,
                    documents: &documents,
                    positions: &positions[..x.rows()],
                    dropout: None,
                };
                let (_, saved) = block.train_forward(x, &pass);
                let dy = std::mem::replace(back, Tensor::zeros(0, 0));
                *back = block.backward(saved, dy, &pass, &mut gradients);
                collect(&mut gradients);
            }
        }
        let energy: f64 = backs.iter().flat_map(|b| b.host()).map(|&v| f64::from(v) * f64::from(v)).sum();
        found.embedding = energy / tokens as f64;
        Ok(found)
    }

    /// Measures every block end to end, and scales its sensitivities by what it finds. All perturbed models go through the blocks together, so
    /// that each block is loaded once. Nothing is measured where their states would take too much memory.
    ///
    /// # Errors
    /// A tensor that cannot be loaded or is not finite.
    pub fn measure_blocks(
        &mut self,
        spec: &ModelSpec,
        source: &dyn WeightSource,
        backend: &Arc<dyn Backend>,
        sequences: &[Vec<u32>],
        progress: &mut dyn Progress,
    ) -> Result<Vec<BlockSensitivity>, CompressError> {
        let texts: Vec<Vec<u32>> =
            sequences.iter().take(TRIAL_SEQUENCES).map(|s| s[..s.len().min(TRIAL_TOKENS)].to_vec()).collect();
        let tokens: usize = texts.iter().map(Vec::len).sum();
        let blocks = spec.blocks.len();
        if tokens == 0 || self.weights.is_empty() || tokens * spec.hidden_size * size_of::<f32>() * blocks > MOST_BYTES
        {
            return Ok(Vec::new());
        }
        let weights = spec.weights();
        let mut original = Hidden::embed(spec, source, backend, &texts)?;
        let mut perturbed: Vec<Hidden> = Vec::new();
        let mut found: Vec<BlockSensitivity> = Vec::new();
        for index in 0..blocks {
            progress.update("blocks", index as u64, blocks as u64 + 1);
            let block = Block::load(spec, index, source, backend)?;
            let mut collector = Collector::new();
            let mut rounded = Overlay { base: source, replaced: HashMap::new() };
            original.forward(spec, index, &block, &mut collector, false);
            collector.finish(crate::pipeline::EXPERT_PRIOR);
            let mut expected = 0.0;
            for weight in weights.iter().filter(|w| w.block == Some(index) && is_compressible(w)) {
                let Some(hessian) = collector.hessian(&weight.name) else { continue };
                let before = source.load(&weight.name)?;
                let named = |e: crate::MethodError| e.of(&weight.name);
                let after = Rtn { grid: TRIAL_GRID }.compress(&before, Stats::default()).map_err(named)?.weight;
                let values = matrix::read(&before).map_err(named)?;
                let stats = Stats { moments: None, hessian: Some(hessian) };
                let energies = Energies::of(hessian, matrix::energy(&values, before.cols(), &stats), 0.0);
                let error = matrix::relative_error(&values, &after, &stats);
                expected += error * self.of(weight, blocks, spec.tied, Some(&energies));
                rounded.replaced.insert(weight.name.clone(), after);
            }
            perturbed.iter_mut().for_each(|hidden| hidden.forward(spec, index, &block, &mut NoObserver, true));
            let mut new = original.clone();
            new.forward(spec, index, &Block::load(spec, index, &rounded, backend)?, &mut NoObserver, true);
            perturbed.push(new);
            original.forward(spec, index, &block, &mut NoObserver, true);
            found.push(BlockSensitivity { measured: 0.0, expected });
        }
        let head = Head::load(spec, source, backend)?;
        for (hidden, found) in perturbed.iter().zip(&mut found) {
            found.measured = shown(mean_divergence(&original, &head, hidden, &head).0);
            found.expected = shown(found.expected);
        }
        self.blocks = found.iter().map(|block| block.scale()).collect();
        progress.update("blocks", blocks as u64 + 1, blocks as u64 + 1);
        Ok(found)
    }

    /// The divergence in nats a token that a relative output error of 1 would cost if cost stayed proportional.
    pub(crate) fn of(&self, weight: &WeightSpec, blocks: usize, tied: bool, energies: Option<&Energies>) -> f64 {
        let rows = weight.shape[0].max(1) as f64;
        let cols = weight.shape.get(1).copied().unwrap_or(1).max(1) as f64;
        let as_table = |energies: &Energies| 0.5 * self.embedding / cols * energies.row / rows;
        // An untied embedding is multiplied with nothing: its rows are what the first block reads.
        if let (Role::Embedding, false, true, Some(energies)) = (weight.role, tied, self.embedding > 0.0, energies) {
            return as_table(energies);
        }
        let (Some(energies), Some(&gradient)) = (energies, self.weights.get(&weight.name)) else {
            return rule(weight, blocks);
        };
        let scale = weight.block.and_then(|block| self.blocks.get(block)).copied().unwrap_or(1.0);
        let mut cost = scale * 0.5 * gradient / energies.input.max(1e-30) / rows * energies.output;
        if weight.role == Role::Embedding && tied {
            cost += as_table(energies);
        }
        cost
    }
}

/// Where nothing was measured.
fn rule(weight: &WeightSpec, blocks: usize) -> f64 {
    let role = match weight.role {
        Role::LmHead | Role::Embedding => 8.0,
        Role::Attention if weight.name.contains("q_proj") || weight.name.contains("k_proj") => 0.5,
        Role::Attention => 1.5,
        Role::Mlp | Role::SharedExpert | Role::Convolution => 1.0,
        Role::RoutedExpert => 0.3,
        Role::Router | Role::Norm | Role::Bias | Role::RunningMean | Role::RunningVariance => 1.0,
    };
    let place = match weight.block {
        Some(index) if index < 2 || index + 2 >= blocks => 2.0,
        Some(_) | None => 1.0,
    };
    role * place
}
