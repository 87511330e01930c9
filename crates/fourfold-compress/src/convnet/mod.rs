//! Compression of convolutional networks: norms are folded into the convolutions before them, layers decomposed into chains of
//! smaller ones, and what is left pruned and quantized like any other weight.
//!
//! A plan's entry names a product's weight. Its method is one of the registry's, or `decompose`, which changes the network's layers
//! ([`chain`]) and has an entry for each factor inside.

pub mod chain;
mod choose;
mod fold;
mod network;
mod recipe;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use fourfold_kernels::Tensor;
use fourfold_kernels::backward::Backward;
use fourfold_models::layers::LayerSpec;
use fourfold_models::{ConvNetSpec, NoObserver, Observer};
use fourfold_tensor::{Form, Weight, WeightSink, WeightSource};
use serde::{Deserialize, Serialize};
use serde_json::json;

pub use self::fold::fold;
pub use self::network::Network;
pub use self::recipe::Recipe;

use self::chain::Decomposition;
use self::network::weight_name;
use crate::calibrate::Collector;
use crate::hessian::Hessian;
use crate::methods::Needs;
use crate::plan::{Entry, HeaderBytes, Plan, shown};
use crate::planner::stats;
use crate::progress::Progress;
use crate::{CompressError, MethodError};

/// The method, in a plan, that replaces a layer by a chain of layers.
pub const DECOMPOSE: &str = "decompose";

/// Settings of [`DECOMPOSE`].
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Decompose {
    /// How.
    pub decomposition: Decomposition,
    /// How each factor is stored; those without an entry as f32.
    #[serde(default)]
    pub factors: Vec<Entry>,
}

impl Decompose {
    fn entry(&self, name: &str) -> Entry {
        let bytes = self.factors.iter().map(|f| f.bytes).sum();
        Entry { method: DECOMPOSE.to_owned(), settings: json!(self), bytes, ..Entry::keep(name) }
    }

    fn of(entry: &Entry) -> Result<Self, CompressError> {
        serde_json::from_value(entry.settings.clone()).map_err(|e| MethodError::Settings(e.to_string()).of(&entry.name))
    }
}

/// What the output should be.
#[derive(Clone, Debug)]
pub enum Goal {
    /// What a finished plan says.
    Plan(Plan),
    /// One recipe for every layer.
    Recipe(Recipe),
    /// At most so many bytes, file headers included; methods are chosen layer by layer.
    Bytes(u64),
}

/// A compression of a convolutional network.
pub struct ConvNetJob<'a> {
    /// The network.
    pub spec: &'a ConvNetSpec,
    /// Its weights.
    pub source: &'a dyn WeightSource,
    /// What the output should be.
    pub goal: Goal,
    /// Calibration images in batches, `[images · height · width, channels]`, normalised; perhaps none.
    pub images: &'a [Tensor],
    /// Runs them.
    pub backend: Arc<dyn Backward>,
    /// Bytes of the output's headers, for [`Goal::Bytes`].
    pub header: &'a HeaderBytes<'a>,
}

/// What came out.
#[derive(Clone, Debug)]
pub struct Output {
    /// Layers and stored weights.
    pub network: Network,
    /// The plan that was followed, with sizes and errors.
    pub plan: Plan,
    /// Mean divergence (nats) of the classes' probabilities from the original's, on calibration images that no choice was made by;
    /// `None` without images.
    pub divergence: Option<f64>,
    /// The same of the largest uniform quantization that fits, where a plan was chosen.
    pub uniform_divergence: Option<f64>,
}

/// Compresses a network.
///
/// # Errors
/// A tensor that cannot be read or used, a plan that does not fit, a budget below the smallest plan.
pub fn compress(job: &ConvNetJob, progress: &mut dyn Progress) -> Result<Output, CompressError> {
    let original = fold(&Network::read(job.spec.clone(), job.source)?)?;
    // Half to choose by and to compress by, half to measure on.
    let (chosen_by, measured_on) = job.images.split_at(job.images.len().div_ceil(2));
    let reference = original.logits(measured_on, &job.backend)?;
    let divergence = |network: &Network| choose::divergence(&reference, network, measured_on, &job.backend);
    let mut uniform_divergence = None;
    let (network, plan) = match &job.goal {
        Goal::Plan(plan) => apply(&original, plan.clone(), chosen_by, &job.backend)?,
        Goal::Recipe(recipe) => {
            let plan = recipe.plan(&original, !chosen_by.is_empty())?;
            apply(&original, plan, chosen_by, &job.backend)?
        }
        Goal::Bytes(budget) => {
            let chooser = choose::Chooser { original: &original, images: chosen_by, backend: &job.backend };
            let mixed = chooser.choose(*budget, job.header, progress)?;
            match chooser.uniform(*budget, job.header)? {
                Some(uniform) if !measured_on.is_empty() => {
                    let (of_mixed, of_uniform) = (divergence(&mixed.0)?, divergence(&uniform.0)?);
                    uniform_divergence = Some(of_uniform);
                    // A choice that is no better than the plain one on images it was not made by is not written.
                    if of_mixed <= of_uniform { mixed } else { uniform }
                }
                Some(_) | None => mixed,
            }
        }
    };
    let divergence = if measured_on.is_empty() { None } else { Some(divergence(&network)?) };
    Ok(Output { network, plan, divergence, uniform_divergence })
}

/// Writes a network's tensors.
///
/// # Errors
/// As the sink says.
pub fn write(network: &Network, mut sink: Box<dyn WeightSink + '_>) -> Result<(), CompressError> {
    sink.begin(&network.forms())?;
    for (name, weight) in network.weights() {
        sink.write(name, weight)?;
    }
    Ok(sink.finish()?)
}

/// The layers of a new network that is to be trained in decomposed form.
pub fn factorized(spec: &ConvNetSpec, recipe: &Recipe) -> ConvNetSpec {
    let rewrite = &mut |layers: &[LayerSpec]| -> Result<Vec<LayerSpec>, std::convert::Infallible> {
        let chain = |layer: &LayerSpec| match recipe.decompose(layer, spec.classes) {
            Some((_, chain)) => chain,
            None => vec![layer.clone()],
        };
        Ok(layers.iter().flat_map(chain).collect())
    };
    match spec.rewritten(rewrite) {
        Ok(spec) => spec,
        Err(never) => match never {},
    }
}

/// The network with layers replaced by chains where the plan says so, nothing else done.
fn restructure(network: &Network, plan: &Plan) -> Result<Network, CompressError> {
    let mut chosen = BTreeMap::new();
    for entry in plan.tensors.iter().filter(|e| e.method == DECOMPOSE) {
        chosen.insert(entry.name.as_str(), Decompose::of(entry)?.decomposition);
    }
    let mut weights = network.weights().clone();
    let spec = network.spec.rewritten(&mut |layers| -> Result<Vec<LayerSpec>, CompressError> {
        let mut out = Vec::with_capacity(layers.len());
        for layer in layers {
            let name = weight_name(layer);
            let Some((name, decomposition)) = name.and_then(|n| chosen.get(n.as_str()).map(|&d| (n, d))) else {
                out.push(layer.clone());
                continue;
            };
            let Some(chain) = decomposition.layers(layer) else {
                let reason = format!("{decomposition:?} would not make it smaller");
                return Err(MethodError::Settings(reason).of(&name));
            };
            let shape = layer.weights().into_iter().next().map(|w| w.shape).unwrap_or_default();
            let factors = decomposition.factors(&network.values(&name)?, &shape, &chain).map_err(|e| e.of(&name))?;
            for (layer, factor) in chain.iter().zip(factors) {
                weights.extend(weight_name(layer).map(|name| (name, factor)));
            }
            if let (Some(bias), Some(last)) = (layer.weights().get(1), chain.last().and_then(|l| l.weights().pop()))
                && let Some(values) = network.weights().get(&bias.name)
            {
                weights.insert(last.name, values.clone());
            }
            out.extend(chain);
        }
        Ok(out)
    })?;
    Ok(Network::new(spec, weights))
}

/// Follows a plan. Products that it does not name stay as they are.
fn apply(
    network: &Network,
    mut plan: Plan,
    images: &[Tensor],
    backend: &Arc<dyn Backward>,
) -> Result<(Network, Plan), CompressError> {
    let products: Vec<String> = network.products().iter().filter_map(weight_name).collect();
    if let Some(unknown) = plan.tensors.iter().find(|e| !products.contains(&e.name)) {
        return Err(CompressError::Plan(format!("the network has no convolution or linear layer {}", unknown.name)));
    }
    let parts = restructure(network, &plan)?;
    let collector = statistics(&parts, &plan, images, backend)?;
    let mut weights = parts.weights().clone();
    for entry in &mut plan.tensors {
        if entry.method == DECOMPOSE {
            let mut decompose = Decompose::of(entry)?;
            for factor in &mut decompose.factors {
                let Some(weight) = weights.get_mut(&factor.name) else {
                    return Err(CompressError::Plan(format!("{} has no factor {}", entry.name, factor.name)));
                };
                store(factor, weight, collector.hessian(&factor.name))?;
            }
            *entry = decompose.entry(&entry.name);
        } else if let Some(weight) = weights.get_mut(&entry.name) {
            store(entry, weight, collector.hessian(&entry.name))?;
        }
    }
    let stored = Network::new(parts.spec, weights);
    if !images.is_empty() {
        // What the kernels cannot read is found before it is written.
        let _ = stored.run(backend)?.logits_observed(images[0].clone(), &mut NoObserver);
    }
    Ok((stored, plan))
}

/// Statistics of the inputs of what the plan names.
fn statistics(
    network: &Network,
    plan: &Plan,
    images: &[Tensor],
    backend: &Arc<dyn Backward>,
) -> Result<Collector, CompressError> {
    let mut names: HashSet<String> = HashSet::new();
    for entry in &plan.tensors {
        if entry.method == DECOMPOSE {
            names.extend(Decompose::of(entry)?.factors.into_iter().map(|f| f.name));
        } else if entry.method != "keep" && entry.method()?.needs() > Needs::Nothing {
            names.insert(entry.name.clone());
        }
    }
    let mut chosen = Chosen { names, collector: Collector::new() };
    if !chosen.names.is_empty() && !images.is_empty() {
        let net = network.run(backend)?;
        images.iter().for_each(|batch| drop(net.logits_observed(batch.clone(), &mut chosen)));
        chosen.collector.finish(0.0);
    }
    Ok(chosen.collector)
}

/// Collects of some weights alone.
struct Chosen {
    names: HashSet<String>,
    collector: Collector,
}

impl Observer for Chosen {
    fn linear_input(&mut self, weight_name: &str, input: &Tensor) {
        if self.names.contains(weight_name) {
            self.collector.linear_input(weight_name, input);
        }
    }
}

/// Stores one weight as its entry says.
fn store(entry: &mut Entry, weight: &mut Weight, hessian: Option<&Hessian>) -> Result<(), CompressError> {
    let moments = hessian.map(Hessian::diagonal);
    let out = entry.method()?.compress(weight, stats(hessian, &moments)).map_err(|e| e.of(&entry.name))?;
    entry.bytes = Form::of(&out.weight).file_bytes();
    entry.error = (entry.method != "keep").then_some(shown(out.error));
    *weight = out.weight;
    Ok(())
}
