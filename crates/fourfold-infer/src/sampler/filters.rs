//! One function a filter: each drops candidates or changes their logits.

use super::SamplerSettings;

/// A token that may be chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    pub id: u32,
    pub logit: f32,
}

/// The last `n` of `history`.
pub(super) fn tail(history: &[u32], n: usize) -> &[u32] {
    &history[history.len().saturating_sub(n)..]
}

/// Makes tokens seen in `recent` less likely. Candidates are still in the order of their ids.
pub(super) fn penalties(kept: &mut [Candidate], recent: &[u32], s: &SamplerSettings) {
    if s.repeat_penalty == 1.0 && s.frequency_penalty == 0.0 && s.presence_penalty == 0.0 {
        return;
    }
    let mut seen = recent.to_vec();
    seen.sort_unstable();
    for run in seen.chunk_by(|a, b| a == b) {
        let Ok(at) = kept.binary_search_by_key(&run[0], |c| c.id) else { continue };
        let logit = &mut kept[at].logit;
        *logit = if *logit > 0.0 { *logit / s.repeat_penalty } else { *logit * s.repeat_penalty };
        *logit -= s.frequency_penalty * run.len() as f32 + s.presence_penalty;
    }
}

/// The k most likely, most likely first. Always sorts.
pub(super) fn top_k(kept: &mut Vec<Candidate>, k: usize) {
    // Equal logits in the order of their ids, so that a draw does not depend on the sort.
    let order = |a: &Candidate, b: &Candidate| b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id));
    if k > 0 && k < kept.len() {
        kept.select_nth_unstable_by(k - 1, order);
        kept.truncate(k);
    }
    kept.sort_unstable_by(order);
}

/// The shortest prefix whose probability is at least `p`; at least one token. Candidates are sorted.
pub(super) fn top_p(kept: &mut Vec<Candidate>, p: f32) {
    if p >= 1.0 {
        return;
    }
    let wanted = p * total(kept);
    let mut sum = 0.0;
    let enough = kept.iter().position(|c| {
        sum += weight(kept, c);
        sum >= wanted
    });
    kept.truncate(enough.map_or(kept.len(), |i| i + 1));
}

/// Tokens at least `p` times as likely as the first. Candidates are sorted.
pub(super) fn min_p(kept: &mut Vec<Candidate>, p: f32) {
    if p > 0.0 {
        let enough = kept.partition_point(|c| weight(kept, c) >= p);
        kept.truncate(enough.max(1));
    }
}

/// Divides the logits.
pub(super) fn temperature(kept: &mut [Candidate], t: f32) {
    for c in kept {
        c.logit /= t;
    }
}

/// The candidate at which the cumulative probability passes `draw`, of 0 to 1.
pub(super) fn pick(kept: &[Candidate], draw: f32) -> Option<u32> {
    let mut rest = draw * total(kept);
    let chosen = kept.iter().find(|c| {
        rest -= weight(kept, c);
        rest < 0.0
    });
    chosen.or(kept.last()).map(|c| c.id)
}

/// Probability of a candidate times a constant: 1 for the first, which is the most likely.
fn weight(kept: &[Candidate], c: &Candidate) -> f32 {
    (c.logit - kept[0].logit).exp()
}

/// The sum of all weights.
fn total(kept: &[Candidate]) -> f32 {
    kept.iter().map(|c| weight(kept, c)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Candidates with these probabilities, in this order.
    fn with_probabilities(p: &[f32]) -> Vec<Candidate> {
        p.iter().enumerate().map(|(id, p)| Candidate { id: id as u32, logit: p.ln() }).collect()
    }

    fn ids(kept: &[Candidate]) -> Vec<u32> {
        kept.iter().map(|c| c.id).collect()
    }

    #[test]
    fn top_k_sorts_and_cuts() {
        let mut kept = with_probabilities(&[0.1, 0.4, 0.2, 0.3]);
        top_k(&mut kept, 2);
        assert_eq!(ids(&kept), [1, 3]);
        let mut all = with_probabilities(&[0.1, 0.4, 0.2, 0.3]);
        top_k(&mut all, 0);
        assert_eq!(ids(&all), [1, 3, 2, 0]);
    }

    #[test]
    fn top_p_is_the_smallest_sufficient_prefix() {
        for (p, left) in [(0.05, 1), (0.4, 1), (0.5, 2), (0.69, 2), (0.75, 3), (0.95, 4), (1.0, 4)] {
            let mut kept = with_probabilities(&[0.4, 0.3, 0.2, 0.1]);
            top_p(&mut kept, p - if p == 0.4 { 1e-6 } else { 0.0 });
            assert_eq!(kept.len(), left, "top_p {p}");
        }
    }

    #[test]
    fn min_p_is_relative_to_the_most_likely() {
        for (p, left) in [(0.0, 4), (0.2, 4), (0.3, 3), (0.6, 2), (0.8, 1), (1.0, 1)] {
            let mut kept = with_probabilities(&[0.4, 0.3, 0.2, 0.1]);
            min_p(&mut kept, p);
            assert_eq!(kept.len(), left, "min_p {p}");
        }
    }

    #[test]
    fn penalties_by_definition() {
        let settings = SamplerSettings {
            repeat_penalty: 2.0,
            frequency_penalty: 0.5,
            presence_penalty: 0.25,
            ..SamplerSettings::default()
        };
        let mut kept =
            vec![Candidate { id: 0, logit: 3.0 }, Candidate { id: 1, logit: -1.0 }, Candidate { id: 2, logit: 1.0 }];
        penalties(&mut kept, &[0, 1, 0, 9], &settings);
        assert_eq!(kept.iter().map(|c| c.logit).collect::<Vec<_>>(), [3.0 / 2.0 - 1.25, -2.0 - 0.75, 1.0]);
    }

    #[test]
    fn pick_walks_the_cumulative_distribution() {
        let kept = with_probabilities(&[0.5, 0.25, 0.25]);
        let picks: Vec<_> = [0.0, 0.49, 0.51, 0.74, 0.76, 0.999].iter().map(|&d| pick(&kept, d).unwrap()).collect();
        assert_eq!(picks, [0, 0, 1, 1, 2, 2]);
        assert_eq!(pick(&[], 0.5), None);
    }
}
