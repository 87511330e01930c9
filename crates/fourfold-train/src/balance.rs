//! Experts get equal loads without an auxiliary loss (DeepSeek-V3, section 2.1.2; Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing
//! Strategy for Mixture-of-Experts"): after each step the bias by which an expert is chosen falls by γ where the expert got more
//! tokens of the step than the mean, and rises by γ where it got fewer. The bias weighs nothing, so no gradient is disturbed.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use fourfold_models::layers::CORRECTION_BIAS;

use crate::store::ParameterStore;

/// The rate of DeepSeek-V3 (section 4.2).
pub const DEFAULT_RATE: f32 = 1e-3;

/// Moves the biases of a model's routers.
#[derive(Debug, Default)]
pub struct Balance {
    rate: f32,
    counted: Mutex<Counted>,
}

#[derive(Debug, Default)]
struct Counted {
    /// Tokens of each expert in the step so far, by router.
    loads: BTreeMap<String, Vec<u64>>,
    imbalance: Option<f64>,
}

impl Balance {
    /// Moves biases by `rate` (γ) a step; 0 leaves them as they are.
    pub fn new(rate: f32) -> Self {
        Self { rate, counted: Mutex::default() }
    }

    /// Adds the tokens that a micro-batch sent to each expert.
    pub fn count(&self, loads: BTreeMap<String, Vec<u64>>) {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        for (router, tokens) in loads {
            match counted.loads.get_mut(&router) {
                Some(sum) => sum.iter_mut().zip(tokens).for_each(|(sum, tokens)| *sum += tokens),
                None => drop(counted.loads.insert(router, tokens)),
            }
        }
    }

    /// Ends a step: biases that are trained in `store` move if the step was `applied`; the counts are forgotten.
    pub fn step_done(&self, store: &mut ParameterStore, applied: bool) {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let loads = std::mem::take(&mut counted.loads);
        counted.imbalance = loads.values().map(|loads| violation(loads)).reduce(f64::max);
        if !applied || self.rate == 0.0 {
            return;
        }
        for (router, loads) in loads {
            let name = format!("{router}{CORRECTION_BIAS}");
            if store.values(&name).is_none() {
                continue;
            }
            let total: u64 = loads.iter().sum();
            // Compared with the mean, in whole numbers.
            let change = |load: u64| match (load * loads.len() as u64).cmp(&total) {
                Ordering::Greater => -self.rate,
                Ordering::Less => self.rate,
                Ordering::Equal => 0.0,
            };
            store.count(&name, |bias| bias.iter().zip(&loads).map(|(bias, &load)| bias + change(load)).collect());
        }
    }

    /// How far the busiest expert of any router was above the mean in the last step, as a part of the mean ("MaxVio" in Wang et al.
    /// 2024, section 2.2); `None` without experts.
    pub fn imbalance(&self) -> Option<f64> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner).imbalance
    }
}

fn violation(loads: &[u64]) -> f64 {
    let mean = loads.iter().sum::<u64>() as f64 / loads.len().max(1) as f64;
    loads.iter().copied().max().unwrap_or(0) as f64 / mean.max(f64::MIN_POSITIVE) - 1.0
}
