//! What a plan has to beat: one format for all linear layers, and one for embeddings and heads.

use fourfold_models::{Role, WeightSpec};

use super::{PlanJob, Priced, is_expert};
use crate::plan::Plan;

impl PlanJob<'_> {
    /// The uniform choice of the least cost with at most `most` bytes, headers included; `None` where none is so small.
    pub(super) fn uniform(&self, weights: &[WeightSpec], priced: &[Vec<Priced>], most: u64) -> Option<Plan> {
        let is_table = |w: &WeightSpec| matches!(w.role, Role::Embedding | Role::LmHead);
        let all = 0..self.candidates.len();
        // A tensor that cannot have a format, its rows too short for the groups, has the best of no more bits.
        let pick = |table: bool, candidate: usize| -> Option<Vec<&Priced>> {
            let tensors = weights.iter().zip(priced).filter(|(w, _)| is_table(w) == table);
            let mut any = false;
            let mut picked = Vec::new();
            for (weight, ways) in tensors {
                let own = ways.iter().find(|way| way.candidate == Some(candidate));
                any |= own.is_some();
                let way = match own {
                    Some(way) => way,
                    None if ways.len() == 1 => &ways[0],
                    // One expert that cannot have the format keeps it from all of them.
                    None if self.scope.experts_alike && is_expert(weight) => return None,
                    None => self.instead(weight, ways, candidate)?,
                };
                picked.push(way);
            }
            (any || picked.iter().all(|way| way.candidate.is_none())).then_some(picked)
        };
        let options = |table: bool| -> Vec<Vec<&Priced>> { all.clone().filter_map(|c| pick(table, c)).collect() };
        let (layers, tables) = (options(false), options(true));
        let mut best: Option<(f64, Vec<&Priced>)> = None;
        for layers in &layers {
            for tables in &tables {
                let picked: Vec<&Priced> = layers.iter().chain(tables).copied().collect();
                let cost: f64 = picked.iter().map(|way| way.cost).sum();
                if best.as_ref().is_some_and(|(least, _)| cost >= *least) {
                    continue;
                }
                let forms: Vec<_> = picked.iter().map(|way| (way.entry.name.clone(), way.form.clone())).collect();
                let data: u64 = picked.iter().map(|way| way.entry.bytes).sum();
                if data + (self.header)(&forms) <= most {
                    best = Some((cost, picked));
                }
            }
        }
        let (_, picked) = best?;
        let entry = |ways: &Vec<Priced>| {
            let name = &ways.first()?.entry.name;
            picked.iter().find(|way| way.entry.name == *name).map(|way| way.entry.clone())
        };
        Some(Plan { tensors: priced.iter().filter_map(entry).collect() })
    }

    /// For a tensor that has not got the candidate: the way of least cost among those that are no larger than the candidate would be.
    fn instead<'w>(&self, weight: &WeightSpec, ways: &'w [Priced], candidate: usize) -> Option<&'w Priced> {
        let (rows, cols) = crate::plan::matrix(&weight.shape);
        let most = match &self.candidates[candidate].blocks() {
            // Rows that do not divide into its blocks cost no more in those of another type.
            Some(kind) => kind.bytes((rows * cols) as u64),
            None => (self.bytes)(&weight.name, &self.candidates[candidate].form(rows, cols, weight.role)?),
        };
        let small = ways.iter().filter(|way| way.entry.bytes <= most);
        small.min_by(|a, b| a.cost.total_cmp(&b.cost)).or_else(|| ways.iter().min_by_key(|way| way.entry.bytes))
    }
}
