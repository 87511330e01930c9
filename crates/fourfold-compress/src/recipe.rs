//! A recipe in words: `quantize:4`, `prune:2:4`, `wanda:0.5`, `svd:64`, or several joined by commas, which go together into one method.

use std::str::FromStr;

use serde_json::{Value, json};

use crate::methods::quantize::grid::{Granularity, GridSpec};

/// Columns that share a scale of quantized weights.
const GROUP: usize = 64;
/// Columns that share a scale of kept values.
const SPARSE_GROUP: usize = 128;

/// Which pruning method a recipe names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pruning {
    /// The best there is: SparseGPT with calibration text, magnitude without.
    Best,
    Magnitude,
    Wanda,
    SparseGpt,
}

/// How much a recipe prunes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Share {
    Sparsity(f64),
    Nm(usize, usize),
}

/// A parsed recipe. It is for linear layers; pruning and decomposition leave embeddings and output heads as they are, as their papers do.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Recipe {
    bits: Option<u8>,
    pruning: Option<(Pruning, Share)>,
    rank: Option<usize>,
}

impl FromStr for Recipe {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut recipe = Self::default();
        for word in text.split(',') {
            let (name, amount) = word.split_once(':').unwrap_or((word, ""));
            let twice = match name {
                "quantize" => recipe.bits.replace(bits(amount)?).is_some(),
                "svd" => recipe.rank.replace(rank(amount)?).is_some(),
                "prune" => recipe.pruning.replace((Pruning::Best, share(amount)?)).is_some(),
                "magnitude" => recipe.pruning.replace((Pruning::Magnitude, share(amount)?)).is_some(),
                "wanda" => recipe.pruning.replace((Pruning::Wanda, share(amount)?)).is_some(),
                "sparsegpt" => recipe.pruning.replace((Pruning::SparseGpt, share(amount)?)).is_some(),
                _ => {
                    return Err(format!(
                        "{word:?} is none of rtn, gptq, quantize:BITS, prune:AMOUNT, magnitude:AMOUNT, wanda:AMOUNT, \
                         sparsegpt:AMOUNT, svd:RANK; an AMOUNT is a share in [0, 1) or N:M"
                    ));
                }
            };
            if twice {
                return Err(format!("{word:?} is the second of its kind"));
            }
        }
        Ok(recipe)
    }
}

fn bits(text: &str) -> Result<u8, String> {
    text.parse()
        .ok()
        .filter(|b| (2..=8).contains(b))
        .ok_or_else(|| format!("quantize:{text}: 2 to 8 bits are expected"))
}

fn rank(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|r| *r > 0).ok_or_else(|| format!("svd:{text}: a rank of at least 1 is expected"))
}

fn share(text: &str) -> Result<Share, String> {
    if let Some((n, m)) = text.split_once(':') {
        return match (n.parse(), m.parse()) {
            (Ok(n), Ok(m)) if n >= 1 && n <= m => Ok(Share::Nm(n, m)),
            _ => Err(format!("{text}: of M neighbours N stay, 1 <= N <= M")),
        };
    }
    let sparsity = text.parse().ok().filter(|s| (0.0..1.0).contains(s));
    sparsity.map(Share::Sparsity).ok_or_else(|| format!("{text:?} is neither a sparsity in [0, 1) nor N:M"))
}

impl Recipe {
    /// Whether it cannot do without calibration text.
    pub fn needs_text(&self) -> bool {
        matches!(self.pruning, Some((Pruning::Wanda | Pruning::SparseGpt, _)))
    }

    /// Whether it does more than quantize, and therefore leaves embeddings and heads alone.
    pub fn is_for_layers(&self) -> bool {
        self.pruning.is_some() || self.rank.is_some()
    }

    /// Name and settings of the method in a plan.
    pub fn method(&self, with_text: bool) -> (&'static str, Value) {
        let svd = |rank: usize| json!({"rank": {"rank": rank}, "whitened": with_text});
        match (self.pruning, self.rank, self.bits) {
            (Some(_), Some(rank), _) => {
                let (method, settings) = self.prune(with_text);
                ("low_rank_sparse", json!({"low_rank": svd(rank), "sparse": {"method": method, "settings": settings}}))
            }
            (Some(_), None, _) => self.prune(with_text),
            (None, Some(rank), None) => ("svd", svd(rank)),
            (None, Some(rank), Some(bits)) => {
                let (method, settings) = quantize(bits, with_text);
                ("residual", json!({"base": {"method": method, "settings": settings}, "correction": svd(rank)}))
            }
            (None, None, Some(bits)) => quantize(bits, with_text),
            (None, None, None) => ("keep", Value::Null),
        }
    }

    fn prune(&self, with_text: bool) -> (&'static str, Value) {
        let values = self.bits.map_or(json!("bf16"), |bits| json!({"int": {"bits": bits, "group_size": SPARSE_GROUP}}));
        let Some((pruning, share)) = self.pruning else { return ("keep", Value::Null) };
        let pattern = match share {
            Share::Sparsity(s) => json!({"sparsity": s}),
            Share::Nm(n, m) => json!({"nm": {"n": n, "m": m}}),
        };
        let by_text = json!({"pattern": pattern, "values": values});
        match (pruning, share) {
            (Pruning::Wanda, _) => ("wanda", by_text),
            (Pruning::SparseGpt, _) => ("sparsegpt", by_text),
            (Pruning::Best, _) if with_text => ("sparsegpt", by_text),
            (Pruning::Best | Pruning::Magnitude, Share::Sparsity(s)) => {
                ("magnitude", json!({"amount": {"sparsity": s}, "values": values}))
            }
            (Pruning::Best | Pruning::Magnitude, Share::Nm(n, m)) => ("nm", json!({"n": n, "m": m, "values": values})),
        }
    }
}

/// Plain quantization in groups.
fn quantize(bits: u8, with_text: bool) -> (&'static str, Value) {
    (if with_text { "gptq" } else { "rtn" }, json!(GridSpec::new(bits, Granularity::Group(GROUP))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::method;

    #[test]
    fn words_become_methods() {
        for (text, with_text, name) in [
            ("quantize:4", false, "rtn"),
            ("quantize:4", true, "gptq"),
            ("prune:0.5", false, "magnitude"),
            ("prune:2:4", false, "nm"),
            ("prune:2:4", true, "sparsegpt"),
            ("wanda:0.5,quantize:4", true, "wanda"),
            ("svd:64", true, "svd"),
            ("quantize:3,svd:16", true, "residual"),
            ("quantize:4,prune:2:4,svd:64", true, "low_rank_sparse"),
        ] {
            let (found, settings) = text.parse::<Recipe>().unwrap().method(with_text);
            assert_eq!(found, name, "{text}");
            method(found, &settings).unwrap().form(128, 256).unwrap().unwrap();
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "4",
            "quantize",
            "quantize:9",
            "prune:1.0",
            "prune:-0.1",
            "prune:5:4",
            "svd:0",
            "svd:1,svd:2",
            "wanda:x",
        ] {
            assert!(text.parse::<Recipe>().is_err(), "{text}");
        }
    }
}
