//! Choosing, layer by layer, what to do with a convolutional network under a budget of bytes. Every candidate's cost is measured: the
//! divergence of the network's answers on calibration images when that layer alone is stored so.

use std::sync::Arc;

use fourfold_kernels::Tensor;
use fourfold_kernels::backward::Backward;
use fourfold_models::layers::LayerSpec;
use fourfold_tensor::Form;

use super::network::{Network, weight_name};
use super::recipe::{Bits, Recipe};
use super::{DECOMPOSE, apply};
use crate::CompressError;
use crate::plan::{Choice, Entry, HeaderBytes, Plan, allocate};
use crate::progress::Progress;

/// Recipes that compete for each layer.
const CANDIDATES: &[&str] = &[
    "quantize:16",
    "quantize:8",
    "quantize:6",
    "quantize:5",
    "quantize:4",
    "quantize:3",
    "quantize:2",
    "prune:0.5,quantize:8",
    "prune:0.75,quantize:8",
    "prune:0.5,quantize:4",
    "prune:0.75,quantize:4",
    "svd:0.5,quantize:8",
    "svd:0.25,quantize:8",
    "svd:0.25,quantize:4",
    "svd:0.1,quantize:8",
    "tucker:0.5,quantize:8",
    "tucker:0.5,quantize:4",
    "tucker:0.25,quantize:8",
];

/// Most times that a plan is made anew where the file came out larger than was counted.
const MOST_ROUNDS: usize = 16;

/// The folded network and what choices go by.
pub(super) struct Chooser<'a> {
    pub original: &'a Network,
    pub images: &'a [Tensor],
    pub backend: &'a Arc<dyn Backward>,
}

impl Chooser<'_> {
    /// The best mix that was found for `budget` bytes.
    pub fn choose(
        &self,
        budget: u64,
        header: &HeaderBytes,
        progress: &mut dyn Progress,
    ) -> Result<(Network, Plan), CompressError> {
        let products = self.original.products();
        let reference = self.original.logits(self.images, self.backend)?;
        let mut plans = Vec::with_capacity(CANDIDATES.len());
        for words in CANDIDATES {
            let recipe: Recipe = words.parse().map_err(CompressError::Plan)?;
            plans.push(recipe.plan(self.original, !self.images.is_empty())?);
        }
        let mut choices = Vec::with_capacity(products.len());
        for (done, layer) in products.iter().enumerate() {
            progress.update("plan", done as u64, products.len() as u64);
            choices.push(self.choices(layer, &plans, &reference)?);
        }
        // Biases and norms stay, and count.
        let names: Vec<String> = products.iter().filter_map(weight_name).collect();
        let rest: Vec<(String, Form)> =
            self.original.forms().into_iter().filter(|(name, _)| !names.contains(name)).collect();
        let rest_bytes: u64 = rest.iter().map(|(_, form)| form.file_bytes()).sum();
        let with_rest = |forms: &[(String, Form)]| header(&[forms, &rest].concat()) + rest_bytes;
        let mut room = budget;
        for _ in 0..MOST_ROUNDS {
            let plan = allocate(choices.clone(), room, &with_rest)?;
            let (network, plan) = apply(self.original, plan, self.images, self.backend)?;
            let bytes = file_bytes(&network, header);
            if bytes <= budget {
                return Ok((network, plan));
            }
            // Chains have other names than were counted.
            room = room.saturating_sub(bytes - budget);
        }
        Err(CompressError::Plan(format!("no plan of {budget} bytes was found")))
    }

    /// The most bits for all layers alike that fit, if any do.
    pub fn uniform(&self, budget: u64, header: &HeaderBytes) -> Result<Option<(Network, Plan)>, CompressError> {
        for bits in [Bits::Sixteen].into_iter().chain((2..=8).rev().map(Bits::Codes)) {
            let plan = Recipe::of_bits(bits).plan(self.original, !self.images.is_empty())?;
            let (network, plan) = apply(self.original, plan, self.images, self.backend)?;
            if file_bytes(&network, header) <= budget {
                return Ok(Some((network, plan)));
            }
        }
        Ok(None)
    }

    /// The candidates of one layer, each with what it costs by itself.
    fn choices(&self, layer: &LayerSpec, plans: &[Plan], reference: &[Tensor]) -> Result<Vec<Choice>, CompressError> {
        let Some(name) = weight_name(layer) else { return Ok(Vec::new()) };
        let mut found: Vec<Choice> = Vec::new();
        let mut add = |entry: Entry| -> Result<(), CompressError> {
            // Without images there is no divergence, and the factors of a chain have no error of their own.
            if self.images.is_empty() && entry.method == DECOMPOSE {
                return Ok(());
            }
            let known = |(_, e): &(Form, Entry)| e.method == entry.method && e.settings == entry.settings;
            if found.iter().flat_map(|c| &c.parts).any(known) {
                return Ok(());
            }
            let before = entry.clone();
            let (network, mut plan) = apply(self.original, Plan { tensors: vec![entry] }, self.images, self.backend)?;
            let kept: Vec<(String, Form)> = self.original.forms();
            let mut forms: Vec<Form> =
                network.forms().into_iter().filter(|f| f.0 == name || !kept.contains(f)).map(|f| f.1).collect();
            let form = if forms.len() == 1 { forms.remove(0) } else { Form::Sum(forms) };
            let (bytes, error) = (form.file_bytes(), plan.tensors.pop().and_then(|e| e.error));
            let cost = match self.images {
                [] => error.unwrap_or(0.0),
                images => divergence(reference, &network, images, self.backend)?,
            };
            found.push(Choice { parts: vec![(form, Entry { bytes, error, ..before })], bytes, cost });
            Ok(())
        };
        add(Entry::keep(&name))?;
        plans.iter().flat_map(|plan| &plan.tensors).filter(|e| e.name == name).cloned().try_for_each(add)?;
        Ok(found)
    }
}

fn file_bytes(network: &Network, header: &HeaderBytes) -> u64 {
    let forms = network.forms();
    forms.iter().map(|(_, form)| form.file_bytes()).sum::<u64>() + header(&forms)
}

/// Mean Kullback-Leibler divergence (nats) of `network`'s class probabilities from those of the `reference` logits.
pub(super) fn divergence(
    reference: &[Tensor],
    network: &Network,
    images: &[Tensor],
    backend: &Arc<dyn Backward>,
) -> Result<f64, CompressError> {
    let (mut sum, mut count) = (0.0, 0);
    for (p, q) in reference.iter().zip(&network.logits(images, backend)?) {
        for row in 0..p.rows() {
            let (p, q) = (log_softmax(p.row(row)), log_softmax(q.row(row)));
            sum += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
            count += 1;
        }
    }
    Ok(sum / f64::from(count.max(1)))
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let sum: f64 = logits.iter().map(|&v| f64::from(v - largest).exp()).sum();
    logits.iter().map(|&v| f64::from(v - largest) - sum.ln()).collect()
}
