//! Whether a run fits into the memory there is, before it begins.

use anyhow::{Result, bail};
use fourfold_train::memory::TrainMemory;
use fourfold_train::recipe::Recipe;

use super::settings::Settings;
use crate::{human, memory};

/// The largest number up to `most` that `fits`, as all smaller ones do; 0 where none does.
pub fn largest(most: u64, fits: impl Fn(u64) -> bool) -> u64 {
    let (mut low, mut high) = (0, most);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if fits(middle) { low = middle } else { high = middle - 1 }
    }
    low
}

/// Refuses a run whose predicted peak is more than the memory available. `predict` says what the same run takes with another recipe and
/// batches of so many sequences or images.
pub(super) fn check(
    predicted: &TrainMemory,
    settings: &Settings,
    predict: &dyn Fn(&Recipe, u64) -> TrainMemory,
) -> Result<()> {
    // What the process has already is part of the peak.
    let Some(available) = memory::available().map(|free| free + memory::resident_now().unwrap_or(0)) else {
        return Ok(());
    };
    if predicted.total() <= available {
        return Ok(());
    }
    let smaller = |recipe: &Recipe| {
        let batch = largest(settings.batch_size as u64, |batch| predict(recipe, batch).total() <= available);
        (batch > 0).then_some(batch)
    };
    let advice = match smaller(&settings.recipe) {
        Some(batch) => format!("--batch-size {batch} fits"),
        None => match [Recipe::QUARTER, Recipe::EIGHTH].iter().find_map(|r| Some((r.name, smaller(r)?))) {
            Some((preset, batch)) => format!("--preset {preset} with --batch-size {batch} fits"),
            None => "no preset fits with any batch".to_owned(),
        },
    };
    bail!(
        "the run would take {}, {} of memory are available; {advice}, `fourfold plan` has the parts, --no-memory-check runs all the same",
        human::bytes(predicted.total()),
        human::bytes(available)
    )
}
