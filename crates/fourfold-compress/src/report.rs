//! What became of each tensor and why, for people and for programs: written beside the weights as [`FILE_NAME`].

use std::collections::{BTreeMap, HashMap};

use fourfold_models::{ModelSpec, Role};
use fourfold_tensor::Form;
use serde::Serialize;

use crate::gate::Gate;
use crate::plan::Plan;
use crate::planner::{Kind, Priced, Probe};
use crate::sensitivity::BlockSensitivity;

/// The file's name in the output directory.
pub const FILE_NAME: &str = "compression_report.json";

/// What a compression decided. The same for every run of one plan: no times, and no measurements that a resumed run lacks.
#[derive(Clone, Debug, Serialize)]
pub struct PlanReport {
    /// Bytes of the source's weight files.
    pub source_bytes: u64,
    /// Bytes that the weight files were allowed, where there was a limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<u64>,
    /// Bytes of all tensors, without file headers.
    pub tensor_bytes: u64,
    /// The mix against the best uniform choice on held-out text; absent without text or limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate: Option<Gate>,
    /// What rounding each block by itself cost.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub blocks: Vec<BlockSensitivity>,
    /// How often each family was chosen, and its bytes.
    pub chosen: Vec<Chosen>,
    /// Every candidate on a few tensors of each part, at true bytes, beside quantization of equal bytes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub probes: Vec<Probe>,
    /// Experts that the calibration text hardly reached: what became of them rests on their layer's other experts.
    #[serde(skip)]
    pub experts: Vec<ExpertReach>,
    /// Every tensor.
    pub tensors: Vec<TensorReport>,
}

/// How much calibration text reached an expert.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ExpertReach {
    /// The expert: `model.layers.3.mlp.experts.7`.
    pub expert: String,
    /// Tokens that were sent to it.
    pub tokens: u64,
}

/// The experts that fewer than `least` tokens reached, in the order of the stack. `coverage` has the tokens of each weight that any
/// reached; where it is empty nothing was calibrated, and there is none to tell of.
pub fn hardly_reached(spec: &ModelSpec, coverage: &BTreeMap<String, u64>, least: u64) -> Vec<ExpertReach> {
    if coverage.is_empty() {
        return Vec::new();
    }
    let mut experts: Vec<ExpertReach> = Vec::new();
    for weight in spec.weights().iter().filter(|w| w.role == Role::RoutedExpert) {
        let tokens = coverage.get(&weight.name).copied().unwrap_or(0);
        let Some(expert) = expert_of(&weight.name) else { continue };
        match experts.last_mut() {
            Some(last) if last.expert == expert => last.tokens = last.tokens.max(tokens),
            Some(_) | None => experts.push(ExpertReach { expert: expert.to_owned(), tokens }),
        }
    }
    experts.retain(|e| e.tokens < least);
    experts
}

/// The expert that a weight is of.
fn expert_of(weight: &str) -> Option<&str> {
    let number = weight.find(".experts.")? + ".experts.".len();
    let end = weight[number..].find('.').map_or(weight.len(), |length| number + length);
    Some(&weight[..end])
}

/// How much of the model has a family of formats.
#[derive(Clone, Debug, Serialize)]
pub struct Chosen {
    /// The family, or the method's name.
    pub kind: String,
    /// Tensors.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// What became of a tensor.
#[derive(Clone, Debug, Serialize)]
pub struct TensorReport {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub role: &'static str,
    /// Its block.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block: Option<usize>,
    /// The family, or the method's name.
    pub kind: String,
    /// Its form in words.
    pub stored_as: String,
    /// Bytes in the file.
    pub bytes: u64,
    /// Bits an element.
    pub bits: f64,
    /// Error of its output relative to the output's energy, as planned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<f64>,
    /// The same, as measured when the gate compressed it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub measured_error: Option<f64>,
    /// The divergence in nats a token that the plan expects of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_divergence: Option<f64>,
    /// The best of each other family that takes no more bytes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lost: Vec<Lost>,
}

/// A way that was not chosen.
#[derive(Clone, Debug, Serialize)]
pub struct Lost {
    /// Its family.
    pub kind: Kind,
    /// Its form in words.
    pub stored_as: String,
    /// Bytes in the file.
    pub bytes: u64,
    /// Error of the output, relative to the output's energy.
    pub error: f64,
}

/// A role's name in reports.
fn role(role: Role) -> &'static str {
    match role {
        Role::Embedding => "embedding",
        Role::LmHead => "lm_head",
        Role::Attention => "attention",
        Role::Mlp => "mlp",
        Role::SharedExpert => "shared_expert",
        Role::RoutedExpert => "routed_expert",
        Role::Router => "router",
        Role::Norm => "norm",
        Role::Bias => "bias",
        Role::Convolution => "convolution",
        Role::RunningMean => "running_mean",
        Role::RunningVariance => "running_variance",
    }
}

impl PlanReport {
    /// The report of a resolved plan with the forms of its tensors, in its order. `priced` are the ways that were priced for them, where the
    /// plan was made here.
    pub(crate) fn new(
        spec: &ModelSpec,
        source_bytes: u64,
        plan: &Plan,
        forms: &[(String, Form)],
        priced: &[Vec<Priced>],
    ) -> Self {
        let specs: HashMap<String, _> = spec.weights().into_iter().map(|w| (w.name.clone(), w)).collect();
        let ways: HashMap<&str, &Vec<Priced>> =
            priced.iter().filter_map(|ways| Some((ways.first()?.entry.name.as_str(), ways))).collect();
        let mut tensors = Vec::new();
        for (entry, (_, form)) in plan.tensors.iter().zip(forms) {
            let Some(weight) = specs.get(&entry.name) else { continue };
            let ways = ways.get(entry.name.as_str()).copied();
            let chosen = ways.and_then(|ways| ways.iter().find(|way| way.is(entry)));
            let family = chosen.and_then(|way| way.kind);
            let lost = ways.map(|ways| lost(ways, family, entry.bytes)).unwrap_or_default();
            tensors.push(TensorReport {
                name: entry.name.clone(),
                role: role(weight.role),
                block: weight.block,
                kind: family.map_or_else(|| entry.method.clone(), |kind| kind.to_string()),
                stored_as: form.describe(),
                bytes: entry.bytes,
                bits: entry.bytes as f64 * 8.0 / weight.elements().max(1) as f64,
                error: entry.error,
                measured_error: None,
                expected_divergence: chosen.map(|way| crate::plan::shown(way.cost)),
                lost,
            });
        }
        let mut chosen: Vec<Chosen> = Vec::new();
        for tensor in &tensors {
            let at = chosen.iter().position(|c| c.kind == tensor.kind).unwrap_or_else(|| {
                chosen.push(Chosen { kind: tensor.kind.clone(), tensors: 0, bytes: 0 });
                chosen.len() - 1
            });
            chosen[at].tensors += 1;
            chosen[at].bytes += tensor.bytes;
        }
        Self {
            source_bytes,
            budget: None,
            tensor_bytes: plan.bytes(),
            gate: None,
            blocks: Vec::new(),
            chosen,
            probes: Vec::new(),
            experts: Vec::new(),
            tensors,
        }
    }

    /// The report as indented JSON; an expert takes no line of its own, of which there may be thousands.
    pub fn to_json(&self) -> String {
        let text = serde_json::to_string_pretty(self).unwrap_or_default();
        match serde_json::to_string(&self.experts) {
            Ok(experts) if !self.experts.is_empty() => {
                text.replacen("{\n", &format!("{{\n  \"experts_hardly_reached\": {experts},\n"), 1)
            }
            Ok(_) | Err(_) => text,
        }
    }
}

/// The way with the least error of each family but the chosen, of at most so many bytes.
fn lost(ways: &[Priced], chosen: Option<Kind>, bytes: u64) -> Vec<Lost> {
    let of = |kind: Kind| {
        let small = ways.iter().filter(|way| way.kind == Some(kind) && way.entry.bytes <= bytes);
        let best = small.min_by(|a, b| a.error().total_cmp(&b.error()))?;
        Some(Lost { kind, stored_as: best.form.describe(), bytes: best.entry.bytes, error: best.error() })
    };
    Kind::ALL.into_iter().filter(|kind| Some(*kind) != chosen).filter_map(of).collect()
}
