//! A mixture of experts with shared ones (DeepSeekMoE, Dai et al. 2024).

use fourfold_kernels::Tensor;

use super::{Mlp, MlpSpec, Pass, Router, RouterSpec};
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
            None => Tensor::zeros(x.rows(), x.cols()),
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
}
