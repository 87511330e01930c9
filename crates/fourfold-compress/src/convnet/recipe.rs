//! A recipe for a convolutional network in words: `tucker:0.5,svd:0.25,global:0.5,quantize:8`. What it says is done to every
//! convolution and linear layer, in this order: decompose, prune, quantize.

use std::collections::BTreeMap;
use std::str::FromStr;

use fourfold_models::layers::LayerSpec;
use fourfold_tensor::{DType, Form};
use serde_json::{Value, json};

use super::chain::{Amount, Decomposition};
use super::network::{Network, weight_name};
use super::{DECOMPOSE, Decompose};
use crate::methods::cast;
use crate::methods::prune::magnitude::{self, global_counts};
use crate::methods::quantize::gptq::Gptq;
use crate::methods::quantize::grid::{Granularity, GridSpec};
use crate::plan::{Entry, Plan, matrix};
use crate::{CompressError, MethodError, methods};

/// Columns that share a scale.
const GROUP: usize = 64;
/// Most columns whose Hessian is worth its memory, 4 bytes x columns², several times over.
const MOST_COLUMNS: usize = 4096;

/// What goes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Pruning {
    /// This share of each tensor (`torch.nn.utils.prune.l1_unstructured`).
    Each(f64),
    /// This share of all tensors together (`global_unstructured`).
    Global(f64),
    /// All but n of m neighbours.
    Nm(usize, usize),
}

/// How values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bits {
    /// Codes of 2 to 8 bits.
    Codes(u8),
    /// bf16.
    Sixteen,
}

/// A parsed recipe.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recipe {
    of_convolutions: Option<Decomposition>,
    svd: Option<Decomposition>,
    pruning: Option<Pruning>,
    bits: Option<Bits>,
}

impl FromStr for Recipe {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut recipe = Self::default();
        for word in text.split(',') {
            let (name, amount) = word.split_once(':').unwrap_or((word, ""));
            let share = || {
                let share = amount.parse().ok().filter(|s| (0.0..1.0).contains(s));
                share.ok_or_else(|| format!("{word}: a share in [0, 1) is expected"))
            };
            let twice = match name {
                "tucker" => recipe.of_convolutions.replace(Decomposition::Tucker(rank(amount)?)).is_some(),
                "cp" => recipe.of_convolutions.replace(Decomposition::Cp(rank(amount)?)).is_some(),
                "svd" => recipe.svd.replace(Decomposition::Svd(rank(amount)?)).is_some(),
                "prune" => {
                    let pruning = match amount.split_once(':') {
                        Some((n, m)) => match (n.parse(), m.parse()) {
                            (Ok(n), Ok(m)) if n >= 1 && n <= m => Pruning::Nm(n, m),
                            _ => return Err(format!("{word}: of M neighbours N stay, 1 <= N <= M")),
                        },
                        None => Pruning::Each(share()?),
                    };
                    recipe.pruning.replace(pruning).is_some()
                }
                "global" => recipe.pruning.replace(Pruning::Global(share()?)).is_some(),
                "quantize" => {
                    let bits = match amount.parse() {
                        Ok(16) => Bits::Sixteen,
                        Ok(bits @ 2..=8) => Bits::Codes(bits),
                        _ => return Err(format!("{word}: 2 to 8 bits, or 16, are expected")),
                    };
                    recipe.bits.replace(bits).is_some()
                }
                _ => {
                    return Err(format!(
                        "{word:?} is none of tucker:AMOUNT, cp:AMOUNT, svd:AMOUNT (a rank, or a share of the largest), \
                         prune:SHARE, prune:N:M, global:SHARE, quantize:BITS"
                    ));
                }
            };
            if twice {
                return Err(format!("{word:?} is the second of its kind"));
            }
        }
        Ok(recipe)
    }
}

fn rank(text: &str) -> Result<Amount, String> {
    match (text.parse::<usize>(), text.parse::<f64>()) {
        (Ok(rank), _) if rank > 0 => Ok(Amount::Rank(rank)),
        (Err(_), Ok(share)) if share > 0.0 && share < 1.0 => Ok(Amount::Share(share)),
        _ => Err(format!("{text:?} is neither a rank nor a share in (0, 1)")),
    }
}

impl Recipe {
    /// Plain quantization.
    pub(super) fn of_bits(bits: Bits) -> Self {
        Self { bits: Some(bits), ..Self::default() }
    }

    /// The decomposition of a layer and the layers it makes of it. The output layer stays whole: its rank is that of the classes.
    pub fn decompose(&self, layer: &LayerSpec, classes: usize) -> Option<(Decomposition, Vec<LayerSpec>)> {
        let decomposition = match layer {
            LayerSpec::Linear(linear) if linear.outputs == classes => None,
            LayerSpec::Linear(_) => self.svd,
            LayerSpec::Conv2d(_) => self.of_convolutions.or(self.svd),
            LayerSpec::BatchNorm(_)
            | LayerSpec::Relu
            | LayerSpec::MaxPool(_)
            | LayerSpec::AveragePool(_)
            | LayerSpec::AdaptiveAveragePool { .. }
            | LayerSpec::Flatten { .. }
            | LayerSpec::Residual { .. } => None,
        }?;
        Some((decomposition, decomposition.layers(layer)?))
    }

    /// The plan for a network: an entry for each product. `with_images`: whether there are statistics of inputs.
    ///
    /// # Errors
    /// A weight that is not finite.
    pub fn plan(&self, network: &Network, with_images: bool) -> Result<Plan, CompressError> {
        // Decomposed but not yet stored smaller: a global threshold is over the factors.
        let mut plan = Plan::default();
        for layer in network.products() {
            let Some(name) = weight_name(&layer) else { continue };
            plan.tensors.push(match self.decompose(&layer, network.spec.classes) {
                Some((decomposition, _)) => Decompose { decomposition, factors: Vec::new() }.entry(&name),
                None => Entry::keep(&name),
            });
        }
        let parts = super::restructure(network, &plan)?;
        let counts = self.global_counts(&parts)?;
        let mut entries = BTreeMap::new();
        for layer in parts.products() {
            let Some(name) = weight_name(&layer) else { continue };
            entries.insert(name.clone(), self.entry(&name, &layer, counts.get(&name).copied(), with_images)?);
        }
        for entry in &mut plan.tensors {
            if entry.method == DECOMPOSE {
                let mut decompose = Decompose::of(entry)?;
                let layer = network.products().into_iter().find(|l| weight_name(l).as_ref() == Some(&entry.name));
                let chain = layer.and_then(|layer| decompose.decomposition.layers(&layer)).unwrap_or_default();
                decompose.factors = chain.iter().filter_map(|l| entries.remove(&weight_name(l)?)).collect();
                *entry = decompose.entry(&entry.name);
            } else if let Some(stored) = entries.remove(&entry.name) {
                *entry = stored;
            }
        }
        Ok(plan)
    }

    fn global_counts(&self, network: &Network) -> Result<BTreeMap<String, usize>, CompressError> {
        let Some(Pruning::Global(share)) = self.pruning else { return Ok(BTreeMap::new()) };
        let names: Vec<String> = network.products().iter().filter_map(weight_name).collect();
        let load = |name: &str| {
            let weight = network.weights().get(name).cloned();
            weight.ok_or_else(|| MethodError::Settings(format!("{name} is missing")))
        };
        let counts = global_counts(&names, magnitude::Amount::Sparsity(share), load);
        counts.map_err(|e: MethodError| e.of("of all together"))
    }

    /// How one weight is stored. A step that would make it larger (a mask over rows of nine, a scale for three codes) is left out.
    fn entry(
        &self,
        name: &str,
        layer: &LayerSpec,
        count: Option<usize>,
        with_images: bool,
    ) -> Result<Entry, CompressError> {
        let Some(spec) = layer.weights().into_iter().next() else { return Ok(Entry::keep(name)) };
        let (rows, cols) = matrix(&spec.shape);
        // The statistics of a grouped convolution are those of all groups together, which no group's weight goes by.
        let with_images =
            with_images && cols <= MOST_COLUMNS && !matches!(layer, LayerSpec::Conv2d(conv) if conv.groups > 1);
        let mut ways: Vec<(&str, Value)> = Vec::new();
        match self.bits {
            Some(Bits::Codes(bits)) => {
                let granularity = if cols > GROUP { Granularity::Group(GROUP) } else { Granularity::Channel };
                let grid = GridSpec::new(bits, granularity);
                ways.push(match with_images {
                    true => ("gptq", serde_json::to_value(Gptq::new(grid)).unwrap_or_default()),
                    false => ("rtn", json!(grid)),
                });
                ways.push((cast::NAME, json!({"dtype": "bf16"})));
            }
            Some(Bits::Sixteen) => ways.push((cast::NAME, json!({"dtype": "bf16"}))),
            None => ways.push(("keep", Value::Null)),
        }
        let values = match self.bits {
            Some(Bits::Codes(bits)) => json!({"int": {"bits": bits, "group_size": GROUP.min(cols)}}),
            Some(Bits::Sixteen) => json!("bf16"),
            None => json!("f32"),
        };
        match (self.pruning, count) {
            (Some(Pruning::Each(share)), _) => {
                ways.push((magnitude::NAME, json!({"amount": {"sparsity": share}, "values": values})));
            }
            (Some(Pruning::Global(_)), Some(count)) => {
                ways.push((magnitude::NAME, json!({"amount": {"count": count}, "values": values})));
            }
            (Some(Pruning::Nm(n, m)), _) => ways.push(("nm", json!({"n": n, "m": m, "values": values}))),
            (Some(Pruning::Global(_)) | None, _) => {}
        }
        let mut best: Option<(u64, Entry)> = None;
        for (method, settings) in ways {
            let form = methods::method(method, &settings).and_then(|m| m.form(rows, cols)).map_err(|e| e.of(name))?;
            let form = form.unwrap_or(Form::Dense { shape: spec.shape.clone(), dtype: DType::F32 });
            let bytes = form.file_bytes();
            if best.as_ref().is_none_or(|(least, _)| bytes < *least) {
                best = Some((bytes, Entry { method: method.to_owned(), settings, bytes, ..Entry::keep(name) }));
            }
        }
        Ok(best.map_or_else(|| Entry::keep(name), |(_, entry)| entry))
    }
}
