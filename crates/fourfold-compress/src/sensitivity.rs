//! How much a tensor's output error matters to the model's predictions.
//!
//! To second order an error Δy in a layer's output costs a divergence of `½·E[(g·Δy)²]` nats a token, where g is the gradient of a
//! token's log-likelihood (the Fisher information: Kullback 1959). For an error without a preferred direction among `rows` outputs that
//! is `½·E‖g‖²/rows·E‖Δy‖²`. One backward pass over a few sequences of calibration text gives `E‖g‖²`, block by block.

use std::collections::BTreeMap;
use std::sync::Arc;

use fourfold_kernels::backward::{Backward, IGNORE};
use fourfold_kernels::{Backend, KvDtype, Tensor};
use fourfold_models::layers::{Gradients, TrainPass, Trained};
use fourfold_models::{Block, Embedding, Head, ModelError, ModelSpec, NoObserver, Role, WeightSpec};
use fourfold_tensor::WeightSource;

use crate::progress::Progress;

/// Sequences that are looked at, and tokens of each.
const SEQUENCES: usize = 8;
const TOKENS: usize = 256;
/// Tokens whose logits are held at a time.
const CHUNK: usize = 128;
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
            let pass = TrainPass { backend: backward, documents: &documents, positions: &positions[..ids.len()] };
            let mut targets = ids[1..].to_vec();
            targets.push(IGNORE);
            backs.push(head.loss_backward(&x, &targets, 1.0, CHUNK, &pass, &mut gradients).1);
            collect(&mut gradients);
        }
        drop(head);
        for index in (0..spec.blocks.len()).rev() {
            progress.update("sensitivity", total - 1 - index as u64, total);
            let block = Block::load(spec, index, source, backend)?;
            let inputs = depths.pop().unwrap_or_default();
            for (back, x) in backs.iter_mut().zip(inputs) {
                let documents = std::slice::from_ref(&(0..x.rows())).to_vec();
                let pass = TrainPass { backend: backward, documents: &documents, positions: &positions[..x.rows()] };
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

    /// The divergence in nats a token that a relative output error of 1 would cost if cost stayed proportional.
    pub(crate) fn of(&self, weight: &WeightSpec, blocks: usize, tied: bool, energies: Option<&Energies>) -> f64 {
        let (Some(energies), Some(&gradient)) = (energies, self.weights.get(&weight.name)) else {
            return rule(weight, blocks);
        };
        let rows = weight.shape[0].max(1) as f64;
        let mut cost = 0.5 * gradient / energies.input.max(1e-30) / rows * energies.output;
        if weight.role == Role::Embedding && tied {
            let cols = weight.shape[1].max(1) as f64;
            cost += 0.5 * self.embedding / cols * energies.row / rows;
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
