//! How much a tensor's relative output error matters to the model's predictions.

use std::collections::BTreeMap;

use fourfold_models::{Role, WeightSpec};

/// A factor for each tensor: the divergence (nats a token) that a relative output error of 1 would cost if cost stayed
/// proportional.
#[derive(Clone, Debug, Default)]
pub struct Sensitivity {
    measured: BTreeMap<String, f64>,
}

impl Sensitivity {
    /// Factors by tensor name; the rest go by [`Sensitivity::default`]'s rule.
    pub fn measured(measured: BTreeMap<String, f64>) -> Self {
        Self { measured }
    }

    /// The factor of a tensor in a model of `blocks` blocks.
    pub fn of(&self, weight: &WeightSpec, blocks: usize) -> f64 {
        self.measured.get(&weight.name).copied().unwrap_or_else(|| rule(weight, blocks))
    }
}

/// Where nothing was measured.
fn rule(weight: &WeightSpec, blocks: usize) -> f64 {
    let role = match weight.role {
        Role::LmHead | Role::Embedding => 8.0,
        Role::Attention if weight.name.contains("q_proj") || weight.name.contains("k_proj") => 0.5,
        Role::Attention => 1.5,
        Role::Mlp | Role::SharedExpert => 1.0,
        Role::RoutedExpert => 0.3,
        Role::Router | Role::Norm | Role::Bias => 1.0,
    };
    let place = match weight.block {
        Some(index) if index < 2 || index + 2 >= blocks => 2.0,
        Some(_) | None => 1.0,
    };
    role * place
}
