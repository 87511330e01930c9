//! Two checkpoints tensor by tensor: where the bytes are, and how far each weight went.

use std::collections::HashMap;

use anyhow::{Context as _, Result};
use fourfold_models::Role;
use fourfold_tensor::{TensorInfo, Weight};
use serde::Serialize;

use crate::commands::inspect::role_name;
use crate::context::Context;
use crate::model;

/// A tensor as both models store it.
#[derive(Serialize)]
pub struct TensorPair {
    pub name: String,
    pub shape: Vec<usize>,
    /// What it is in the model.
    pub role: &'static str,
    /// Its block; `None` outside of blocks.
    pub block: Option<usize>,
    /// Bytes in A.
    pub a_bytes: u64,
    /// Bytes in B, all parts together.
    pub b_bytes: u64,
    /// Storage in A and in B.
    pub a_storage: String,
    pub b_storage: String,
    /// `‖A − B‖² / ‖A‖²`: 0 where nothing changed; `None` where the two are laid out differently.
    pub error: Option<f64>,
    /// `‖A‖²`.
    #[serde(skip)]
    pub energy: f64,
}

impl TensorPair {
    /// Elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }
}

/// Tensors that both have, and the names of those that only one has.
pub fn pairs(a: &str, b: &str, context: &Context) -> Result<(Vec<TensorPair>, Vec<String>)> {
    let (a, b) = (model::open(a, context)?, model::open(b, context)?);
    let known: HashMap<String, (usize, Role, Option<usize>)> =
        a.spec.weights().into_iter().enumerate().map(|(i, w)| (w.name, (i, w.role, w.block))).collect();
    let (source_a, source_b) = (&*a.checkpoint.weights, &*b.checkpoint.weights);
    let bar = context.progress.bar("comparing weights", source_a.tensors().len() as u64, "tensors");
    let (mut pairs, mut unmatched) = (Vec::new(), Vec::new());
    // In the order of the stack; files have them by name.
    let mut infos: Vec<&TensorInfo> = source_a.tensors().iter().collect();
    infos.sort_by_key(|info| known.get(&info.name).map_or(usize::MAX, |(place, ..)| *place));
    for info in infos {
        bar.inc(1);
        let Some(other) = source_b.info(&info.name) else {
            unmatched.push(format!("A: {}", info.name));
            continue;
        };
        let named = || info.name.clone();
        let (wa, wb) = (source_a.load(&info.name).with_context(named)?, source_b.load(&info.name).with_context(named)?);
        if wa.shape().iter().product::<usize>() != wb.shape().iter().product::<usize>() {
            unmatched.push(format!("A: {} {:?}, B: {:?}", info.name, info.shape, other.shape));
            continue;
        }
        let place = known.get(&info.name);
        let (difference, energy) = difference(&wa, &wb);
        pairs.push(TensorPair {
            name: info.name.clone(),
            shape: info.shape.clone(),
            role: place.map_or("unused", |(_, role, _)| role_name(*role)),
            block: place.and_then(|(.., block)| *block),
            a_bytes: info.bytes,
            b_bytes: other.bytes,
            a_storage: info.storage.clone(),
            b_storage: other.storage.clone(),
            error: difference.map(|d| if d == 0.0 { 0.0 } else { d / energy.max(f64::MIN_POSITIVE) }),
            energy,
        });
    }
    bar.finish_and_clear();
    unmatched.extend(
        source_b.tensors().iter().filter(|t| source_a.info(&t.name).is_none()).map(|t| format!("B: {}", t.name)),
    );
    Ok((pairs, unmatched))
}

/// Energy of the difference, where both have the same rows and columns, and energy of `a`.
fn difference(a: &Weight, b: &Weight) -> (Option<f64>, f64) {
    let alike = (a.rows(), a.cols()) == (b.rows(), b.cols());
    let (mut x, mut y) = (vec![0.0f32; a.cols()], vec![0.0f32; b.cols()]);
    let (mut difference, mut energy) = (0.0f64, 0.0f64);
    for row in 0..a.rows() {
        a.read_row(row, &mut x);
        energy += x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
        if alike {
            b.read_row(row, &mut y);
            difference += x.iter().zip(&y).map(|(&x, &y)| f64::from(x - y).powi(2)).sum::<f64>();
        }
    }
    (alike.then_some(difference), energy)
}

/// Several tensors together.
#[derive(Clone, Default, Serialize)]
pub struct Group {
    /// What they have in common.
    pub name: String,
    pub tensors: usize,
    pub elements: u64,
    pub a_bytes: u64,
    pub b_bytes: u64,
    /// `Σ‖A − B‖² / Σ‖A‖²` over those that can be compared.
    pub error: f64,
    #[serde(skip)]
    energy: f64,
}

/// Groups of tensors, in the order of first appearance.
pub fn groups(pairs: &[TensorPair], key: impl Fn(&TensorPair) -> String) -> Vec<Group> {
    let mut found: Vec<Group> = Vec::new();
    for pair in pairs {
        let name = key(pair);
        let at = found.iter().position(|g| g.name == name).unwrap_or_else(|| {
            found.push(Group { name, ..Group::default() });
            found.len() - 1
        });
        let group = &mut found[at];
        group.tensors += 1;
        group.elements += pair.elements();
        group.a_bytes += pair.a_bytes;
        group.b_bytes += pair.b_bytes;
        if let Some(error) = pair.error {
            // Sums while collecting, a quotient at the end.
            group.error += error * pair.energy;
            group.energy += pair.energy;
        }
    }
    for group in &mut found {
        group.error = if group.energy > 0.0 { group.error / group.energy } else { 0.0 };
    }
    found
}

/// By what tensors are in the model.
pub fn by_role(pairs: &[TensorPair]) -> Vec<Group> {
    groups(pairs, |p| p.role.to_owned())
}

/// By block; what stands outside of blocks by its role.
pub fn by_layer(pairs: &[TensorPair]) -> Vec<Group> {
    groups(pairs, |p| p.block.map_or(p.role.to_owned(), |block| format!("block {block}")))
}

/// By how B stores them, the largest part first.
pub fn by_storage(pairs: &[TensorPair]) -> Vec<Group> {
    let mut groups = groups(pairs, |p| p.b_storage.clone());
    groups.sort_by_key(|g| std::cmp::Reverse(g.b_bytes));
    groups
}
