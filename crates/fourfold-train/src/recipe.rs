//! How a run stores its numbers: the presets, from f32 AdamW to an eighth of its memory.

use fourfold_kernels::Activations;
use fourfold_models::{Role, WeightSpec};
use fourfold_tensor::DType;

use crate::optim::OptimizerKind;

/// How weights are stored between steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// 4 bytes.
    F32,
    /// 2 bytes, updates rounded stochastically.
    Bf16,
    /// 2 bytes, updates rounded to nearest: the control of the one above.
    Bf16Nearest,
    /// 3 bytes: bf16, and 8 more bits for the update alone.
    Bf16Residual,
    /// 1.03 bytes: codes with a scale for each 128 of a row, updates rounded stochastically.
    Int8,
    /// As above, updates rounded to nearest: its control.
    Int8Nearest,
}

/// How the optimizer's moments are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MomentPrecision {
    /// 8 bytes a parameter.
    F32,
    /// 2.03 bytes a parameter.
    Bits8,
    /// 1.06 bytes a parameter.
    Bits4,
}

/// How a run stores its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// The preset's name.
    pub name: &'static str,
    /// Weights between steps. Norms, biases and routers are f32 in every recipe: they are few.
    pub storage: Storage,
    /// What the products read: F32, BF16 or F16 (weights rounded as they are read, where they are stored wider). With F16
    /// gradients are fp16 numbers too, and the loss is scaled.
    pub compute: DType,
    /// Whose states are kept.
    pub optimizer: OptimizerKind,
    /// Moments of the optimizer.
    pub moments: MomentPrecision,
    /// Keep a block's input alone and run the block forward anew for its gradient.
    pub recompute: bool,
    /// Apply a block's gradients as soon as they are known, and release them.
    pub release: bool,
    /// Tokens of whole documents with which a recomputed block is run at once, forward and backward: what is alive of a block
    /// grows with these, not with the batch. A longer document is run whole.
    pub block_tokens: usize,
    /// Tokens whose logits are held at once.
    pub loss_chunk: usize,
}

impl Recipe {
    /// f32 throughout, every activation and gradient kept: 16 bytes a parameter.
    pub const BASELINE: Self = Self {
        name: "baseline",
        storage: Storage::F32,
        compute: DType::F32,
        optimizer: OptimizerKind::AdamW,
        moments: MomentPrecision::F32,
        recompute: false,
        release: false,
        block_tokens: usize::MAX,
        loss_chunk: usize::MAX,
    };

    /// Products in bf16 from f32 master weights (Micikevicius et al. 2018): as much memory as the baseline, less time.
    pub const AMP: Self = Self { name: "amp", compute: DType::Bf16, ..Self::BASELINE };

    /// bf16 weights with stochastic rounding, 8-bit moments, gradients released, blocks recomputed: 4.03 bytes a parameter.
    pub const QUARTER: Self = Self {
        name: "quarter",
        storage: Storage::Bf16,
        compute: DType::Bf16,
        optimizer: OptimizerKind::AdamW,
        moments: MomentPrecision::Bits8,
        recompute: true,
        release: true,
        block_tokens: 512,
        loss_chunk: 256,
    };

    /// As the quarter, with 4-bit moments: 3.06 bytes a parameter.
    pub const EIGHTH: Self = Self { name: "eighth", moments: MomentPrecision::Bits4, loss_chunk: 64, ..Self::QUARTER };

    /// Every preset.
    pub const ALL: [Self; 4] = [Self::BASELINE, Self::AMP, Self::QUARTER, Self::EIGHTH];

    /// In which precision activations enter the products.
    pub fn activations(&self) -> Activations {
        match self.compute {
            DType::Bf16 => Activations::Fast,
            _ => Activations::F32,
        }
    }

    /// Whether a gradient that waits for the rest of its tensor's waits in bf16 ([`crate::waiting`]): not where products are exact.
    pub(crate) fn narrows_waiting(&self) -> bool {
        self.release && self.compute != DType::F32
    }

    /// The preset's name, and what differs from it: what a checkpoint remembers, since only the same recipe can go on from it.
    pub fn label(&self) -> String {
        let Some(preset) = Self::named(self.name) else { return self.name.to_owned() };
        let mut label = self.name.to_owned();
        let mut note = |differs: bool, text: String| {
            if differs {
                label += &format!(", {text}");
            }
        };
        note(self.storage != preset.storage, format!("weights {:?}", self.storage));
        note(self.compute != preset.compute, format!("products {}", self.compute));
        note(self.optimizer != preset.optimizer, format!("{:?}", self.optimizer));
        note(self.moments != preset.moments, format!("moments {:?}", self.moments));
        note(self.release != preset.release, format!("release {}", self.release));
        label
    }

    /// How `weight` is stored: norms, biases, routers and running statistics are few, and f32 in every recipe.
    pub fn storage_of(&self, weight: &WeightSpec) -> Storage {
        if is_small(weight) { Storage::F32 } else { self.storage }
    }

    /// How the optimizer's states of `weight` are stored.
    pub fn moments_of(&self, weight: &WeightSpec) -> MomentPrecision {
        if is_small(weight) { MomentPrecision::F32 } else { self.moments }
    }

    /// The preset of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|recipe| recipe.name == name)
    }
}

/// Norms, biases, routers and running statistics.
pub(crate) fn is_small(weight: &WeightSpec) -> bool {
    matches!(weight.role, Role::Norm | Role::Bias | Role::Router | Role::RunningMean | Role::RunningVariance)
}
