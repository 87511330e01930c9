//! A mixture of experts with shared ones (DeepSeekMoE, Dai et al. 2024).

use fourfold_kernels::{Input, Prepared, Tensor};

use super::mlp::MlpSaved;
use super::{ExpertLoad, Gradients, Mlp, MlpSpec, Pass, Router, RouterSpec, TrainPass};
use crate::loader::Loader;
use crate::{ModelError, WeightSpec};

/// The shape of a mixture of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeSpec {
    /// Chooses.
    pub router: RouterSpec,
    /// Each routed expert.
    pub expert: MlpSpec,
    /// The shared experts, side by side as one.
    pub shared: Option<MlpSpec>,
}

impl MoeSpec {
    /// Its tensors below `prefix`.
    pub fn weights(&self, prefix: &str) -> Vec<WeightSpec> {
        let mut weights = self.router.weights(&format!("{prefix}.gate"));
        for expert in 0..self.router.experts {
            weights.extend(self.expert.weights(&expert_prefix(prefix, expert)));
        }
        weights
            .extend(self.shared.iter().flat_map(|shared| shared.weights(&shared_prefix(prefix)).collect::<Vec<_>>()));
        weights
    }

    /// f32 elements that training keeps of the forward over `tokens` ([`MoeSaved`]).
    pub fn saved_elements(&self, tokens: u64) -> u64 {
        let routed = tokens * self.router.per_token as u64;
        let experts = self.expert.saved_elements(routed);
        let shared = self.shared.as_ref().map_or(0, |shared| shared.saved_elements(tokens));
        tokens * self.router.experts as u64 + experts + shared
    }

    /// f32 elements alive at the peak of the forward over `tokens`, input and output not counted. At worst every token goes
    /// to one expert: its input, inner features and output.
    pub fn scratch_elements(&self, tokens: u64) -> u64 {
        let routed = tokens * 2 * self.expert.hidden as u64 + self.expert.scratch_elements(tokens);
        let shared = self.shared.as_ref().map_or(0, |shared| shared.scratch_elements(tokens));
        tokens * self.router.experts as u64 + routed.max(shared)
    }
}

fn expert_prefix(prefix: &str, expert: usize) -> String {
    format!("{prefix}.experts.{expert}")
}

fn shared_prefix(prefix: &str) -> String {
    format!("{prefix}.shared_experts")
}

/// A mixture of experts.
pub struct Moe {
    router: Router,
    experts: Vec<Mlp>,
    shared: Option<Mlp>,
}

impl Moe {
    pub(crate) fn load(spec: &MoeSpec, prefix: &str, loader: &Loader) -> Result<Self, ModelError> {
        Ok(Self {
            router: Router::load(&spec.router, &format!("{prefix}.gate"), loader)?,
            experts: (0..spec.router.experts)
                .map(|expert| Mlp::load(&spec.expert, &expert_prefix(prefix, expert), loader))
                .collect::<Result<_, _>>()?,
            shared: match &spec.shared {
                Some(shared) => Some(Mlp::load(shared, &shared_prefix(prefix), loader)?),
                None => None,
            },
        })
    }

    /// x `[tokens, hidden]` to the same shape. Each expert multiplies all of its tokens at once.
    pub fn forward(&self, x: &Tensor, pass: &mut Pass) -> Tensor {
        let loads = self.router.forward(x, pass);
        let mut output = match &self.shared {
            Some(shared) => shared.forward(x, pass),
            None => pass.backend.zeros(x.rows(), x.cols()),
        };
        for (expert, load) in self.experts.iter().zip(&loads) {
            if load.rows.is_empty() {
                continue;
            }
            let input = pass.backend.gather_rows(x, &load.rows);
            let result = expert.forward(&input, pass);
            pass.backend.scatter_add_rows(&mut output, &result, &load.rows, &load.factors);
        }
        output
    }

    /// Bytes in memory.
    pub fn byte_len(&self) -> usize {
        let experts: usize = self.experts.iter().map(Mlp::byte_len).sum();
        self.router.byte_len() + experts + self.shared.as_ref().map_or(0, Mlp::byte_len)
    }

    /// As [`Moe::forward`], and what [`Moe::backward`] needs besides `x`.
    pub fn train_forward(&self, x: &Tensor, pass: &TrainPass) -> (Tensor, MoeSaved) {
        let (loads, logits) = self.router.train_forward(x, pass);
        let (mut y, shared) = match &self.shared {
            Some(shared) => {
                let (y, saved) = shared.train_forward(x, pass);
                (y, Some(saved))
            }
            None => (pass.backend.zeros(x.rows(), x.cols()), None),
        };
        let experts = self.each(x, &loads, pass, |expert, input, load| {
            let (output, saved) = expert.train_forward(input, pass);
            pass.backend.scatter_add_rows(&mut y, &output, &load.rows, &load.factors);
            saved
        });
        (y, MoeSaved { loads, logits, experts, shared })
    }

    /// What [`Moe::train_forward`] saves, without its output.
    pub fn recompute(&self, x: &Tensor, pass: &TrainPass) -> MoeSaved {
        let (loads, logits) = self.router.train_forward(x, pass);
        let shared = self.shared.as_ref().map(|shared| shared.recompute(x, pass));
        let experts = self.each(x, &loads, pass, |expert, input, _| expert.recompute(input, pass));
        MoeSaved { loads, logits, experts, shared }
    }

    /// An expert's tokens.
    fn input(expert: &Mlp, x: &Tensor, load: &ExpertLoad, pass: &TrainPass) -> Prepared {
        pass.backend.gather_rows_for_products(x, &load.rows, expert.rounds_input(pass))
    }

    /// Runs each expert that has a token on its tokens.
    fn each<R>(
        &self,
        x: &Tensor,
        loads: &[ExpertLoad],
        pass: &TrainPass,
        mut run: impl FnMut(&Mlp, Input, &ExpertLoad) -> R,
    ) -> Vec<Option<R>> {
        let of = |(expert, load): (&Mlp, &ExpertLoad)| {
            (!load.rows.is_empty()).then(|| run(expert, Self::input(expert, x, load, pass).input(), load))
        };
        self.experts.iter().zip(loads).map(of).collect()
    }

    /// The gradient of `x`: through each expert, weighted by its factor, and through the factors, `df = dy · expert(x)`.
    pub fn backward(
        &self,
        x: &Tensor,
        saved: MoeSaved,
        dy: &Tensor,
        pass: &TrainPass,
        gradients: &mut Gradients,
    ) -> Tensor {
        let MoeSaved { loads, logits, experts, shared } = saved;
        let mut dx = match (&self.shared, shared) {
            (Some(layer), Some(saved)) => layer.backward(x, saved, dy, pass, gradients),
            (None, _) | (_, None) => pass.backend.zeros(x.rows(), x.cols()),
        };
        let mut d_factors = vec![Vec::new(); loads.len()];
        for (e, saved) in experts.into_iter().enumerate() {
            let Some(saved) = saved else { continue };
            let load = &loads[e];
            let expert = &self.experts[e];
            let input = Self::input(expert, x, load, pass);
            let dy = pass.backend.gather_rows_for_products(dy, &load.rows, expert.rounds_gradient(pass));
            let (d_input, d) =
                expert.weighted_backward(input.input(), saved, dy.input(), &load.factors, pass, gradients);
            drop((input, dy));
            d_factors[e] = d;
            pass.backend.scatter_add_rows(&mut dx, &d_input, &load.rows, &vec![1.0; load.rows.len()]);
        }
        let d_router = self.router.backward(x, &logits, &loads, &d_factors, pass, gradients);
        pass.backend.add(&mut dx, &d_router);
        dx
    }
}

/// What [`Moe::backward`] needs of the forward.
pub struct MoeSaved {
    loads: Vec<ExpertLoad>,
    logits: Tensor,
    /// Of each expert that had a token.
    experts: Vec<Option<MlpSaved>>,
    shared: Option<MlpSaved>,
}
