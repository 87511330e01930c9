//! Which experts a token goes to, and with what weight.

use fourfold_kernels::Tensor;

use super::{Linear, LinearSpec, Pass};
use crate::loader::Loader;
use crate::{ModelError, Role, WeightSpec};

/// How logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouterScores {
    /// Over all experts (DeepSeek-V2).
    Softmax,
    /// Each on its own (DeepSeek-V3).
    Sigmoid,
}

/// How experts are picked by score.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selection {
    /// The best ones.
    Greedy,
    /// The best ones of the `kept` groups whose best expert is best (DeepSeek-V2, section 2.2.2).
    GroupMax {
        /// Groups of neighbouring experts; divides their number.
        groups: usize,
        /// Groups a token may choose from.
        kept: usize,
    },
    /// Scores plus a learned bias choose, the bare scores weigh; groups are ranked by the sum of their best two
    /// (DeepSeek-V3, section 2.1.2).
    BiasedGroupTopTwo {
        /// Groups of neighbouring experts; divides their number.
        groups: usize,
        /// Groups a token may choose from.
        kept: usize,
    },
}

/// The shape of a router.
#[derive(Clone, Debug, PartialEq)]
pub struct RouterSpec {
    /// Features of the residual stream.
    pub hidden: usize,
    /// Routed experts.
    pub experts: usize,
    /// Experts a token goes to.
    pub per_token: usize,
    /// Logits to scores.
    pub scores: RouterScores,
    /// Scores to experts.
    pub selection: Selection,
    /// Whether the chosen scores are divided by their sum.
    pub normalize: bool,
    /// Factor of the chosen scores.
    pub scale: f32,
}

impl RouterSpec {
    fn linear(&self, prefix: &str) -> LinearSpec {
        LinearSpec {
            name: prefix.to_owned(),
            outputs: self.experts,
            inputs: self.hidden,
            bias: false,
            role: Role::Router,
        }
    }

    fn bias(&self, prefix: &str) -> Option<WeightSpec> {
        matches!(self.selection, Selection::BiasedGroupTopTwo { .. }).then(|| WeightSpec {
            name: format!("{prefix}.e_score_correction_bias"),
            shape: vec![self.experts],
            role: Role::Router,
            block: None,
        })
    }

    /// Its tensors, `prefix.weight` and perhaps a bias for choosing.
    pub fn weights(&self, prefix: &str) -> Vec<WeightSpec> {
        self.linear(prefix).weights().chain(self.bias(prefix)).collect()
    }

    /// The chosen experts of one token and their weights. `bias` is empty where the selection has none.
    /// Equal scores go to the lower index.
    pub fn choose(&self, logits: &[f32], bias: &[f32]) -> Vec<(usize, f32)> {
        let scores = self.scores_of(logits);
        let mut choice: Vec<f32> = scores.clone();
        for (score, bias) in choice.iter_mut().zip(bias) {
            *score += bias;
        }
        let (groups, kept, members_counted) = match self.selection {
            Selection::Greedy => (1, 1, 1),
            Selection::GroupMax { groups, kept } => (groups, kept, 1),
            Selection::BiasedGroupTopTwo { groups, kept } => (groups, kept, 2),
        };
        if kept < groups {
            let size = self.experts / groups;
            let group_scores: Vec<f32> = choice
                .chunks_exact(size)
                .map(|group| best(group, members_counted.min(size)).iter().map(|&i| group[i]).sum())
                .collect();
            let open = best(&group_scores, kept);
            for (expert, score) in choice.iter_mut().enumerate() {
                if !open.contains(&(expert / size)) {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
        let chosen = best(&choice, self.per_token);
        let sum: f32 = if self.normalize { chosen.iter().map(|&e| scores[e]).sum::<f32>() + 1e-20 } else { 1.0 };
        chosen.into_iter().map(|e| (e, scores[e] / sum * self.scale)).collect()
    }

    fn scores_of(&self, logits: &[f32]) -> Vec<f32> {
        match self.scores {
            RouterScores::Sigmoid => logits.iter().map(|&l| 1.0 / (1.0 + (-l).exp())).collect(),
            RouterScores::Softmax => {
                let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let powers: Vec<f32> = logits.iter().map(|&l| (l - largest).exp()).collect();
                let sum: f32 = powers.iter().sum();
                powers.into_iter().map(|p| p / sum).collect()
            }
        }
    }
}

/// Indices of the `count` largest values, best first, equal ones by index. NaN ranks last.
fn best(values: &[f32], count: usize) -> Vec<usize> {
    let key = |i: &usize| if values[*i].is_nan() { f32::NEG_INFINITY } else { values[*i] };
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| key(b).total_cmp(&key(a)).then(a.cmp(b)));
    order.truncate(count);
    order
}

/// The tokens one expert got.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExpertLoad {
    /// Rows of the input.
    pub rows: Vec<usize>,
    /// Weight of the expert's output for each.
    pub factors: Vec<f32>,
}

/// A router. Its weight stays f32: a rounded score can send a token elsewhere.
pub struct Router {
    spec: RouterSpec,
    linear: Linear,
    bias: Vec<f32>,
}

impl Router {
    pub(crate) fn load(spec: &RouterSpec, prefix: &str, loader: &Loader) -> Result<Self, ModelError> {
        let bias = match spec.bias(prefix) {
            Some(bias) => loader.vector(&bias.name, spec.experts)?.into_host(),
            None => Vec::new(),
        };
        Ok(Self { spec: spec.clone(), linear: Linear::load_f32(&spec.linear(prefix), loader)?, bias })
    }

    /// The tokens of each expert, for x `[tokens, hidden]`.
    pub fn forward(&self, x: &Tensor, pass: &mut Pass) -> Vec<ExpertLoad> {
        let logits = self.linear.forward(x, pass);
        let mut loads = vec![ExpertLoad::default(); self.spec.experts];
        for token in 0..logits.rows() {
            for (expert, factor) in self.spec.choose(logits.row(token), &self.bias) {
                loads[expert].rows.push(token);
                loads[expert].factors.push(factor);
            }
        }
        loads
    }

    /// Bytes in memory.
    pub fn byte_len(&self) -> usize {
        self.linear.byte_len() + self.bias.len() * size_of::<f32>()
    }
}
