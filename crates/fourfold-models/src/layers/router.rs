//! Which experts a token goes to, and with what weight.

use fourfold_kernels::{Backend, Tensor};

use super::{Gradients, Linear, LinearSpec, Pass, TrainPass};
use crate::loader::Loader;
use crate::{ModelError, Role, WeightSpec};

/// What the name of the bias that only chooses ends with, after its router's name.
pub const CORRECTION_BIAS: &str = ".e_score_correction_bias";

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
            name: format!("{prefix}{CORRECTION_BIAS}"),
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

    /// Turns the gradient of one token's factors (zero where not chosen) into that of its logits, in place.
    ///
    /// With `f_e = scale · s_e / S`, `S = Σ_chosen s`:  `ds_e = scale / S · (df_e − Σ_j df_j s_j / S)`.
    fn score_gradient(&self, logits: &[f32], chosen: &[bool], d: &mut [f32]) {
        let scores = self.scores_of(logits);
        if self.normalize {
            let picked = || scores.iter().zip(chosen).filter(|(_, c)| **c).map(|(s, _)| *s);
            let sum = picked().sum::<f32>() + 1e-20;
            let mean: f32 = d.iter().zip(&scores).map(|(d, s)| d * s / sum).sum();
            for (d, &chosen) in d.iter_mut().zip(chosen) {
                *d = if chosen { self.scale / sum * (*d - mean) } else { 0.0 };
            }
        } else {
            d.iter_mut().for_each(|d| *d *= self.scale);
        }
        match self.scores {
            RouterScores::Sigmoid => d.iter_mut().zip(&scores).for_each(|(d, s)| *d *= s * (1.0 - s)),
            RouterScores::Softmax => {
                let mean: f32 = d.iter().zip(&scores).map(|(d, s)| d * s).sum();
                d.iter_mut().zip(&scores).for_each(|(d, s)| *d = s * (*d - mean));
            }
        }
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
            Some(bias) => loader.values(&bias.name, spec.experts)?,
            None => Vec::new(),
        };
        Ok(Self { spec: spec.clone(), linear: Linear::load_f32(&spec.linear(prefix), loader)?, bias })
    }

    /// The tokens of each expert, for x `[tokens, hidden]`.
    pub fn forward(&self, x: &Tensor, pass: &mut Pass) -> Vec<ExpertLoad> {
        let logits = self.linear.forward(x, pass);
        self.loads(&logits, pass.backend)
    }

    /// Where a device has failed no token goes anywhere: it says so when the model's output is read.
    fn loads(&self, logits: &Tensor, backend: &dyn Backend) -> Vec<ExpertLoad> {
        let mut loads = vec![ExpertLoad::default(); self.spec.experts];
        let Ok(values) = backend.read(logits) else { return loads };
        for (token, logits) in values.chunks_exact(self.spec.experts).enumerate() {
            for (expert, factor) in self.spec.choose(logits, &self.bias) {
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

    /// As [`Router::forward`], and the logits `[tokens, experts]`.
    pub fn train_forward(&self, x: &Tensor, pass: &TrainPass) -> (Vec<ExpertLoad>, Tensor) {
        let [logits] = Linear::train_forward_shared([&self.linear], x, pass);
        (self.loads(&logits, pass.backend), logits)
    }

    /// The gradient of `x` from those of the factors: `d_factors[e][i]` belongs to `loads[e].factors[i]`. The choice itself has
    /// none, nor has the bias that only chooses: for it the tokens of each expert are counted.
    pub fn backward(
        &self,
        x: &Tensor,
        logits: &Tensor,
        loads: &[ExpertLoad],
        d_factors: &[Vec<f32>],
        pass: &TrainPass,
        gradients: &mut Gradients,
    ) -> Tensor {
        let name = self.linear.name();
        let prefix = name.strip_suffix(".weight").unwrap_or(name);
        gradients.count_loads(prefix, loads.iter().map(|load| load.rows.len()));
        // d_scores `[tokens, experts]`: zero for experts not chosen.
        let mut d_scores = Tensor::zeros(logits.rows(), logits.cols());
        for (expert, (load, d)) in loads.iter().zip(d_factors).enumerate() {
            for (&token, &d) in load.rows.iter().zip(d) {
                d_scores.host_mut()[token * self.spec.experts + expert] = d;
            }
        }
        let mut chosen = vec![false; logits.host().len()];
        for (expert, load) in loads.iter().enumerate() {
            load.rows.iter().for_each(|&token| chosen[token * self.spec.experts + expert] = true);
        }
        let rows = d_scores.host_mut().chunks_exact_mut(self.spec.experts).zip(chosen.chunks_exact(self.spec.experts));
        for (token, (d, chosen)) in rows.enumerate() {
            self.spec.score_gradient(logits.row(token), chosen, d);
        }
        self.linear.backward(x, &d_scores, pass, gradients)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn router(scores: RouterScores, selection: Selection, normalize: bool) -> RouterSpec {
        RouterSpec { hidden: 1, experts: 6, per_token: 2, scores, selection, normalize, scale: 2.0 }
    }

    fn experts(chosen: &[(usize, f32)]) -> Vec<usize> {
        chosen.iter().map(|c| c.0).collect()
    }

    #[test]
    fn greedy_takes_the_best_and_scales_their_softmax() {
        let chosen =
            router(RouterScores::Softmax, Selection::Greedy, false).choose(&[0.0, 1.0, 3.0, 0.0, 2.0, 0.0], &[]);
        assert_eq!(experts(&chosen), [2, 4]);
        let sum: f32 = [0.0f32, 1.0, 3.0, 0.0, 2.0, 0.0].iter().map(|l| l.exp()).sum();
        assert!((chosen[0].1 - 2.0 * 3f32.exp() / sum).abs() < 1e-6);
    }

    #[test]
    fn groups_by_their_maximum_or_by_their_best_two() {
        // Groups of two: the third has the single best expert, the second the best pair.
        let logits = [0.0, 0.0, 2.0, 2.0, 3.0, -9.0];
        let by_max = router(RouterScores::Softmax, Selection::GroupMax { groups: 3, kept: 1 }, false);
        assert_eq!(experts(&by_max.choose(&logits, &[])), [4, 5]);
        let by_pair = router(RouterScores::Sigmoid, Selection::BiasedGroupTopTwo { groups: 3, kept: 1 }, true);
        let chosen = by_pair.choose(&logits, &[0.0; 6]);
        assert_eq!(experts(&chosen), [2, 3]);
        // Normalised: half each, times the scale.
        assert!(chosen.iter().all(|c| (c.1 - 1.0).abs() < 1e-6));
    }

    #[test]
    fn the_bias_chooses_and_does_not_weigh() {
        let spec = router(RouterScores::Sigmoid, Selection::BiasedGroupTopTwo { groups: 1, kept: 1 }, false);
        let chosen = spec.choose(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], &[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(experts(&chosen), [0, 5]);
        assert_eq!(chosen[0].1, 2.0 * 0.5);
    }

    #[test]
    fn equal_and_broken_scores_still_choose() {
        let spec = router(RouterScores::Softmax, Selection::Greedy, false);
        assert_eq!(experts(&spec.choose(&[1.0; 6], &[])), [0, 1]);
        assert_eq!(spec.choose(&[f32::NAN; 6], &[]).len(), 2);
    }
}
