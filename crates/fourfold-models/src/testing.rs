//! Checkpoints made of nothing, for tests: of this crate and of those above it.

use fourfold_tensor::{Dense, SourceError, TensorInfo, Weight, WeightSource};

use crate::{ModelSpec, Role};

/// Random f32 weights for any [`ModelSpec`], the same for the same seed, made when they are asked for.
pub struct RandomWeights {
    infos: Vec<TensorInfo>,
    roles: Vec<Role>,
    seed: u64,
}

impl RandomWeights {
    /// Weights of every tensor of `spec`: matrices uniform with variance 1 / columns, norms near one, biases small.
    pub fn new(spec: &ModelSpec, seed: u64) -> Self {
        let (infos, roles) = spec
            .weights()
            .into_iter()
            .map(|w| {
                let bytes = w.elements() * size_of::<f32>() as u64;
                (TensorInfo { name: w.name, shape: w.shape, storage: "F32".to_owned(), bytes }, w.role)
            })
            .unzip();
        Self { infos, roles, seed }
    }

    /// Takes a tensor away, to see what its absence does.
    pub fn without(mut self, name: &str) -> Self {
        if let Some(i) = self.infos.iter().position(|info| info.name == name) {
            self.infos.remove(i);
            self.roles.remove(i);
        }
        self
    }

    /// Adds a tensor, or gives one another shape.
    pub fn with(mut self, name: &str, shape: &[usize]) -> Self {
        self = self.without(name);
        let bytes = shape.iter().product::<usize>() as u64 * size_of::<f32>() as u64;
        self.infos.push(TensorInfo { name: name.to_owned(), shape: shape.to_vec(), storage: "F32".to_owned(), bytes });
        self.roles.push(Role::Mlp);
        self
    }
}

impl WeightSource for RandomWeights {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn load(&self, name: &str) -> Result<Weight, SourceError> {
        let missing = || SourceError::Missing { file: "random".into(), tensor: name.to_owned() };
        let i = self.infos.iter().position(|info| info.name == name).ok_or_else(missing)?;
        let info = &self.infos[i];
        // A generator of its own for each tensor, so that the order of reading does not matter (splitmix64).
        let mut state = name.bytes().fold(self.seed, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let mut uniform = || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let columns = info.shape.last().copied().unwrap_or(1).max(1);
        let spread = (3.0 / columns as f32).sqrt();
        let values = (0..info.elements())
            .map(|_| match self.roles[i] {
                Role::Norm | Role::RunningVariance => 1.0 + 0.1 * uniform(),
                Role::Bias | Role::RunningMean => 0.1 * uniform(),
                Role::Embedding => uniform(),
                Role::Router if info.shape.len() == 1 => 0.1 * uniform(),
                Role::LmHead
                | Role::Attention
                | Role::Mlp
                | Role::SharedExpert
                | Role::RoutedExpert
                | Role::Router
                | Role::Convolution => spread * uniform(),
            })
            .collect();
        Ok(Dense::from_f32(info.shape.clone(), values).into())
    }
}
