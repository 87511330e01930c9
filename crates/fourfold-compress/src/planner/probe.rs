//! Every candidate on a few tensors of each part of a model, before any of them is tried on all.

use std::collections::BTreeMap;
use std::sync::Arc;

use fourfold_kernels::Backend;
use fourfold_models::{Role, WeightSpec};
use fourfold_tensor::Form;
use serde::Serialize;

use super::price::Trial;
use super::{Candidate, Kind, PlanJob};
use crate::CompressError;
use crate::hessian::Hessian;
use crate::methods::quantize::estimate::Estimator;
use crate::methods::quantize::gptq;
use crate::plan::{matrix, shown};
use crate::progress::Progress;

/// Calibration sequences that probes look at.
const SEQUENCES: usize = 8;
/// Blocks whose weights are probed; what goes by whole weights is tried in the first of them alone.
const BLOCKS: usize = 2;
/// Candidates beside grids that are tried on all tensors of a part.
const MOST: usize = 3;
/// How far above the grids' error at equal bytes a candidate may lie and still be tried: tensors differ.
const SLACK: f64 = 1.05;

/// What was tried on some tensors of a part.
#[derive(Clone, Debug, Serialize)]
pub struct Probe {
    /// The part: the last word of the tensors' names, `q_proj`.
    pub part: String,
    /// The tensors.
    pub tensors: Vec<String>,
    /// The candidates, in their order.
    pub candidates: Vec<Probed>,
}

/// What a candidate showed there; means over the tensors.
#[derive(Clone, Debug, Serialize)]
pub struct Probed {
    /// Its family.
    pub kind: Kind,
    /// Its form in words, on the last of the tensors.
    pub stored_as: String,
    /// Bits a weight, all parts of the form together.
    pub bits: f64,
    /// The measured error of the output, relative to the output's energy: a geometric mean.
    pub error: f64,
    /// What quantization alone would have at as many bits: read off the line between the two grids next to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_of_grids: Option<f64>,
    /// Whether it was tried on all tensors of the part.
    pub tried_on_all: bool,
    /// Index of the candidate.
    #[serde(skip)]
    index: usize,
    /// Measured error over estimated one, for a grid.
    #[serde(skip)]
    correction: f64,
}

/// What probes say about other tensors.
#[derive(Default)]
pub(super) struct Guide {
    /// By part and candidate: whether to try it, and what to multiply an estimate by.
    known: BTreeMap<(String, usize), (bool, f64)>,
}

impl Guide {
    pub fn new(probes: &[Probe]) -> Self {
        let all = probes.iter().flat_map(|p| p.candidates.iter().map(move |c| (p, c)));
        Self { known: all.map(|(p, c)| ((p.part.clone(), c.index), (c.tried_on_all, c.correction))).collect() }
    }

    /// What a grid's estimated error is to be multiplied by.
    pub fn correction(&self, weight: &WeightSpec, candidate: usize) -> f64 {
        self.known.get(&(part(weight), candidate)).map_or(1.0, |known| known.1)
    }

    /// Whether a candidate that is no grid is to be tried.
    pub fn tries(&self, weight: &WeightSpec, candidate: usize) -> bool {
        self.known.get(&(part(weight), candidate)).is_some_and(|known| known.0)
    }
}

/// `q_proj` of `model.layers.3.self_attn.q_proj.weight`.
fn part(weight: &WeightSpec) -> String {
    let name = weight.name.strip_suffix(".weight").unwrap_or(&weight.name);
    let last = name.rsplit('.').next().unwrap_or(name);
    if weight.role == Role::RoutedExpert { format!("expert {last}") } else { last.to_owned() }
}

/// Sums over the tensors of a part.
#[derive(Default)]
struct Found {
    tensors: Vec<String>,
    tried: BTreeMap<usize, Tried>,
}

/// Sums over the tensors that a candidate was tried on.
#[derive(Clone, Default)]
struct Tried {
    times: f64,
    bits: f64,
    /// ln(error).
    error: f64,
    /// ln(error / estimate), for a grid.
    correction: f64,
    /// ln of what the grids have at as many bits; `None` where it is smaller than all of them.
    of_grids: Option<f64>,
    stored_as: String,
}

impl PlanJob<'_> {
    /// Tries every candidate on the weights of some blocks, and on the embedding and head.
    pub(super) fn probe(
        &self,
        backend: &Arc<dyn Backend>,
        progress: &mut dyn Progress,
    ) -> Result<Vec<Probe>, CompressError> {
        let blocks = self.spec.blocks.len();
        let probed: Vec<usize> = (0..BLOCKS).map(|i| (2 * i + 1) * blocks / (2 * BLOCKS)).collect();
        let mut found: BTreeMap<String, Found> = BTreeMap::new();
        let mut visit = |weight: &WeightSpec, hessian: Option<&Hessian>| {
            let part = part(weight);
            let Some(hessian) = hessian.filter(|_| self.scope.has_matrix(weight)) else { return Ok(()) };
            // One expert of a block stands for all.
            let seen = found.get(&part).is_some_and(|f| {
                weight.role == Role::RoutedExpert
                    && f.tensors.iter().any(|t| t.split(".experts.").next() == weight.name.split(".experts.").next())
            });
            if !seen {
                let whole = weight.block == probed.first().copied();
                self.try_all(weight, hessian, whole, found.entry(part).or_default())?;
            }
            Ok(())
        };
        let sequences = &self.calibration[..self.calibration.len().min(SEQUENCES)];
        self.walk("probe", backend, sequences, &|index| probed.contains(&index), &mut visit, progress)?;
        Ok(found.into_iter().map(|(part, found)| self.judge(part, found)).collect())
    }

    fn try_all(
        &self,
        spec: &WeightSpec,
        hessian: &Hessian,
        whole: bool,
        found: &mut Found,
    ) -> Result<(), CompressError> {
        let named = |e: crate::MethodError| e.of(&spec.name);
        let weight = self.source.load(&spec.name)?;
        let (rows, cols) = matrix(&spec.shape);
        let candidates = self.candidates.iter().enumerate();
        let suits = |c: &Candidate| c.suits(spec.role, cols, &self.scope, true) && (whole || c.kind.goes_by_rows());
        let candidates: Vec<_> = candidates.filter(|(_, c)| suits(c)).collect();
        let errors = Trial::new(spec, &weight, hessian).errors(&candidates).map_err(named)?;
        let factor = gptq::factor_of(hessian, crate::pipeline::damping(spec.role)).map_err(named)?;
        let estimator = Estimator::new(&weight, Some(&factor), super::price::SAMPLED_ROWS).map_err(named)?;
        let mut tried: Vec<(usize, f64, f64, Form)> = Vec::new();
        for (i, error) in errors {
            if let Some(form) = self.candidates[i].form(rows, cols, spec.role) {
                let bits = (self.bytes)(&spec.name, &form) as f64 * 8.0 / (rows * cols) as f64;
                tried.push((i, bits, error.max(f64::MIN_POSITIVE), form));
            }
        }
        let grids = tried.iter().filter(|(i, ..)| self.candidates[*i].kind.is_grid());
        let grids = lower_hull(grids.map(|&(_, bits, error, _)| (bits, error.ln())).collect());
        found.tensors.push(spec.name.clone());
        for (i, bits, error, form) in tried {
            let estimate = match self.candidates[i].grid() {
                Some(grid) => estimator.error_of(&grid).map_err(named)?,
                None => error,
            };
            let sums = found.tried.entry(i).or_insert_with(|| Tried { of_grids: Some(0.0), ..Tried::default() });
            sums.times += 1.0;
            sums.bits += bits;
            sums.error += error.ln();
            // A grid that fits exactly has a quotient of nothing by nothing.
            sums.correction += if estimate > 1e-9 && error > 1e-9 { (error / estimate).ln() } else { 0.0 };
            sums.of_grids = sums.of_grids.zip(at(&grids, bits)).map(|(sum, now)| sum + now);
            sums.stored_as = form.describe();
        }
        Ok(())
    }

    /// Means, and which candidates are worth trying on all tensors of the part.
    fn judge(&self, part: String, found: Found) -> Probe {
        let mean = |(&index, sums): (&usize, &Tried)| {
            let kind = self.candidates[index].kind;
            Probed {
                kind,
                stored_as: sums.stored_as.clone(),
                bits: sums.bits / sums.times,
                error: shown((sums.error / sums.times).exp()),
                error_of_grids: sums.of_grids.filter(|_| !kind.is_grid()).map(|s| shown((s / sums.times).exp())),
                tried_on_all: kind.is_grid(),
                index,
                correction: (sums.correction / sums.times).exp(),
            }
        };
        let mut candidates: Vec<Probed> = found.tried.iter().map(mean).collect();
        let has_grids = candidates.iter().any(|c| c.kind.is_grid());
        let mut worth: Vec<(f64, usize)> = Vec::new();
        for (i, candidate) in candidates.iter().enumerate().filter(|(_, c)| !c.kind.is_grid()) {
            // Smaller than every grid, it has nothing to be compared with.
            let ratio = candidate.error_of_grids.map_or(0.0, |grids| candidate.error / grids);
            if ratio < SLACK {
                worth.push((ratio, i));
            }
        }
        if !has_grids {
            // No grid competes: what no other of its kind beats at fewer bits.
            let points: Vec<(f64, f64)> = candidates.iter().map(|c| (c.bits, c.error.ln())).collect();
            let hull = lower_hull(points);
            let on_hull = |i: &(f64, usize)| hull.iter().any(|h| h.0 == candidates[i.1].bits);
            worth.retain(on_hull);
            for (_, i) in worth {
                candidates[i].tried_on_all = true;
            }
        } else {
            worth.sort_by(|a, b| a.0.total_cmp(&b.0));
            for (_, i) in worth.into_iter().take(MOST) {
                candidates[i].tried_on_all = true;
            }
        }
        Probe { part, tensors: found.tensors, candidates }
    }
}

/// The lower convex hull of points, by rising x and falling y.
fn lower_hull(mut points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    points.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
    let mut hull: Vec<(f64, f64)> = Vec::new();
    for p in points {
        if hull.last().is_some_and(|last| p.1 >= last.1) {
            continue;
        }
        while let [.., a, b] = hull.as_slice() {
            if (b.1 - a.1) * (p.0 - a.0) < (p.1 - a.1) * (b.0 - a.0) {
                break;
            }
            hull.pop();
        }
        hull.push(p);
    }
    hull
}

/// The hull's y at x: on the line between two points, or the last point's; `None` before the first.
fn at(hull: &[(f64, f64)], x: f64) -> Option<f64> {
    let next = hull.iter().position(|p| p.0 > x);
    match next {
        Some(0) => None,
        Some(i) => {
            let (a, b) = (hull[i - 1], hull[i]);
            Some(a.1 + (b.1 - a.1) * (x - a.0) / (b.0 - a.0))
        }
        None => hull.last().map(|p| p.1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hull_is_read_between_its_points() {
        let hull = lower_hull(vec![(2.0, -1.0), (4.0, -3.0), (3.0, -1.5), (3.5, -1.0), (6.0, -4.0)]);
        assert_eq!(hull, [(2.0, -1.0), (4.0, -3.0), (6.0, -4.0)]);
        assert_eq!(at(&hull, 3.0), Some(-2.0));
        assert_eq!(at(&hull, 1.9), None);
        assert_eq!(at(&hull, 7.0), Some(-4.0));
        assert_eq!(at(&[], 1.0), None);
    }
}
