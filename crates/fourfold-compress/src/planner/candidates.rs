//! The ways to store a matrix that a planner chooses between.

use std::fmt;
use std::str::FromStr;

use fourfold_models::Role;
use fourfold_tensor::{BlockGrid, BlockType, Form};
use serde::Serialize;
use serde_json::{Value, json};

use crate::MethodError;
use crate::methods::quantize::blocks::{self, Blocks};
use crate::methods::quantize::estimate::AnyGrid;
use crate::methods::quantize::gptq::Gptq;
use crate::methods::quantize::grid::{Granularity, GridSpec, Levels, ScaleFormat, ZeroKind};
use crate::methods::{Method, method};
use crate::plan::Scope;

/// Families of candidates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Quantized: even levels about zero.
    Symmetric,
    /// Quantized: levels learned from the tensor.
    Learned,
    /// Quantized: even levels and a real offset for each group.
    Affine,
    /// Pruned, kept values quantized.
    Sparse,
    /// Two quantized factors.
    LowRank,
    /// Quantized, and two quantized factors of what that loses.
    Corrected,
    /// Pruned and quantized, and two quantized factors of what that loses.
    LowRankSparse,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Symmetric,
        Self::Learned,
        Self::Affine,
        Self::Sparse,
        Self::LowRank,
        Self::Corrected,
        Self::LowRankSparse,
    ];

    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Symmetric => "symmetric",
            Self::Learned => "learned",
            Self::Affine => "affine",
            Self::Sparse => "sparse",
            Self::LowRank => "low-rank",
            Self::Corrected => "corrected",
            Self::LowRankSparse => "low-rank-sparse",
        }
    }

    /// Whether it quantizes and does nothing else.
    pub fn is_grid(self) -> bool {
        match self {
            Self::Symmetric | Self::Learned | Self::Affine => true,
            Self::Sparse | Self::LowRank | Self::Corrected | Self::LowRankSparse => false,
        }
    }

    /// Whether some rows of a weight show what it costs all of them.
    pub(super) fn goes_by_rows(self) -> bool {
        match self {
            Self::Symmetric | Self::Learned | Self::Affine | Self::Sparse => true,
            Self::LowRank | Self::Corrected | Self::LowRankSparse => false,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|kind| kind.name() == text).ok_or_else(|| {
            let known: Vec<&str> = Self::ALL.iter().map(|kind| kind.name()).collect();
            format!("{text:?} is none of {}", known.join(", "))
        })
    }
}

/// One way to store a matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Its family.
    pub kind: Kind,
    /// Whether linear layers may have it.
    pub for_layers: bool,
    way: Way,
}

#[derive(Clone, Debug, PartialEq)]
enum Way {
    /// GPTQ, or round to nearest without text.
    Grid(GridSpec),
    /// ggml's blocks.
    Blocks(BlockType),
    /// A method that needs text, and its settings.
    Other(&'static str, Value),
}

impl Candidate {
    /// The grid of one that quantizes and does nothing else.
    pub(super) fn grid(&self) -> Option<AnyGrid> {
        match self.way {
            Way::Grid(grid) => Some(AnyGrid::Spec(grid)),
            Way::Blocks(kind) => Some(AnyGrid::Blocks(kind)),
            Way::Other(..) => None,
        }
    }

    /// The block type of one that has one.
    pub(super) fn blocks(&self) -> Option<BlockType> {
        match self.way {
            Way::Blocks(kind) => Some(kind),
            Way::Grid(_) | Way::Other(..) => None,
        }
    }

    /// Whether a matrix may have it. Embeddings and heads are quantized and nothing else, as the papers on pruning and decomposition do.
    pub(super) fn suits(&self, role: Role, cols: usize, scope: &Scope, text: bool) -> bool {
        let table = matches!(role, Role::Embedding | Role::LmHead);
        let grid = match self.grid() {
            None => return text && !table && self.for_layers,
            Some(AnyGrid::Blocks(kind)) => return cols.is_multiple_of(kind.block_len()) && (table || self.for_layers),
            Some(AnyGrid::Spec(grid)) => grid,
        };
        // A group as wide as the row is the channel's case.
        let narrow = matches!(grid.granularity, Granularity::Group(size) if size >= cols);
        let whole = !scope.whole_groups || cols.is_multiple_of(grid.group_size(cols));
        !narrow && whole && (table || self.for_layers)
    }

    /// Method and settings of a plan's entry.
    pub(super) fn settings(&self, hessian: bool, role: Role) -> (&'static str, Value) {
        match &self.way {
            Way::Grid(grid) if hessian => {
                let method = Gptq { damping: crate::pipeline::damping(role), ..Gptq::new(*grid) };
                ("gptq", serde_json::to_value(method).unwrap_or(Value::Null))
            }
            Way::Grid(grid) => ("rtn", json!(grid)),
            Way::Blocks(kind) => {
                let method = Blocks::new(*kind).damped(crate::pipeline::damping(role));
                (blocks::NAME, serde_json::to_value(method).unwrap_or(Value::Null))
            }
            Way::Other(name, settings) => (name, settings.clone()),
        }
    }

    /// The method for a weight whose Hessian is known, or is not.
    pub(super) fn method(&self, hessian: bool, role: Role) -> Result<Box<dyn Method>, MethodError> {
        let (name, settings) = self.settings(hessian, role);
        method(name, &settings)
    }

    /// The form of a `[rows, cols]` matrix; `None` where it has no such form, as with a rank above its own.
    pub(super) fn form(&self, rows: usize, cols: usize, role: Role) -> Option<Form> {
        self.method(true, role).ok()?.form(rows, cols).ok()?
    }
}

/// The candidates that are worth choosing between: learned levels up to 4 bits, even ones above, one-byte scales for groups of 32 to
/// 192 columns or f16 ones for whole rows; 4 and 5 bits with offsets, for weights that are not centred, or that were on such a grid before;
/// and for linear layers what the other techniques have between 2 and 4 bits a weight.
///
/// With `interchange`, only those that compressed-tensors can say: even levels, f16 scales, no real offsets.
pub fn candidates(interchange: bool) -> Vec<Candidate> {
    let grids = if interchange {
        grids(Levels::Uniform, ScaleFormat::F16)
    } else {
        let mut all = grids(Levels::Learned, ScaleFormat::Double);
        all.extend(affine());
        all
    };
    let kind = |grid: &GridSpec| match (grid.zero, grid.levels) {
        (ZeroKind::Min | ZeroKind::ZeroPoint, _) => Kind::Affine,
        (ZeroKind::Symmetric, Levels::Learned) => Kind::Learned,
        (ZeroKind::Symmetric, Levels::Uniform) => Kind::Symmetric,
    };
    let grids = grids.into_iter().map(|grid| Candidate { kind: kind(&grid), for_layers: true, way: Way::Grid(grid) });
    let others = others().into_iter().filter(|_| !interchange);
    let others =
        others.map(|(kind, name, settings)| Candidate { kind, for_layers: true, way: Way::Other(name, settings) });
    grids.chain(others).collect()
}

/// ggml's block types: what a GGUF file can hold.
pub fn block_candidates() -> Vec<Candidate> {
    let kind = |blocks: BlockType| match blocks.grid() {
        BlockGrid::Symmetric => Kind::Symmetric,
        BlockGrid::Min => Kind::Affine,
        BlockGrid::Codebook => Kind::Learned,
    };
    let all = BlockType::all();
    all.map(|blocks| Candidate { kind: kind(blocks), for_layers: true, way: Way::Blocks(blocks) }).collect()
}

/// Keeps candidates: none of the kinds in `exclude`; for linear layers only those in `only`, where it names any.
pub fn restrict(mut candidates: Vec<Candidate>, only: &[Kind], exclude: &[Kind]) -> Vec<Candidate> {
    candidates.retain(|c| !exclude.contains(&c.kind));
    for candidate in &mut candidates {
        candidate.for_layers = only.is_empty() || only.contains(&candidate.kind);
    }
    candidates
}

fn grids(learned: Levels, scales: ScaleFormat) -> Vec<GridSpec> {
    let group = |bits, levels, size| GridSpec { levels, scales, ..GridSpec::new(bits, Granularity::Group(size)) };
    let channel = |bits, levels| GridSpec { levels, ..GridSpec::new(bits, Granularity::Channel) };
    let mut grids = Vec::new();
    grids.extend([32, 64].map(|size| group(2, learned, size)));
    grids.extend([32, 64, 192].map(|size| group(3, learned, size)));
    grids.extend([32, 64, 96, 192].map(|size| group(4, learned, size)));
    grids.push(channel(4, learned));
    for bits in [5, 6] {
        grids.extend([32, 64, 192].map(|size| group(bits, Levels::Uniform, size)));
        grids.push(channel(bits, Levels::Uniform));
    }
    grids.extend([7, 8].map(|bits| channel(bits, Levels::Uniform)));
    grids
}

fn affine() -> impl Iterator<Item = GridSpec> {
    let wide = |bits| [ScaleFormat::F16, ScaleFormat::Double].map(|scales| (bits, scales));
    [4, 5].into_iter().flat_map(wide).map(|(bits, scales)| GridSpec {
        scales,
        zero: ZeroKind::Min,
        ..GridSpec::new(bits, Granularity::Group(32))
    })
}

/// The elements of factors that correct something, as a share of the matrix's: ranks of 14 to 20 in a model of width 576.
const CORRECTION: f64 = 0.05;

/// Sparse, low-rank and combined candidates.
fn others() -> Vec<(Kind, &'static str, Value)> {
    let mut all = Vec::new();
    let values = |bits: u8| json!({"int": {"bits": bits, "group_size": 128}});
    let pruned = |pattern: &Value, bits| json!({"pattern": pattern, "values": values(bits)});
    let nm = json!({"nm": {"n": 2, "m": 4}});
    let share = |s: f64| json!({ "sparsity": s });
    for (pattern, bits) in
        [(&nm, 4), (&share(0.3), 3), (&share(0.3), 4), (&share(0.5), 3), (&share(0.5), 4), (&share(0.7), 4)]
    {
        all.push((Kind::Sparse, "sparsegpt", pruned(pattern, bits)));
    }
    // Factors of 4 bits where they are all there is, of 8 where they correct something: they are few, and their errors multiply.
    let factors = |bits, rank: Value| {
        let grid = GridSpec::new(bits, Granularity::Group(64));
        json!({"rank": rank, "whitened": true, "factors": grid})
    };
    for share in [0.45, 0.7] {
        all.push((Kind::LowRank, "svd", factors(4, json!({ "share": share }))));
    }
    let base = |bits, size| {
        let grid = GridSpec {
            levels: Levels::Learned,
            scales: ScaleFormat::Double,
            ..GridSpec::new(bits, Granularity::Group(size))
        };
        json!({"method": "gptq", "settings": Gptq::new(grid)})
    };
    for base in [base(2, 64), base(3, 192)] {
        let settings = json!({"base": base, "correction": factors(8, json!({"share": CORRECTION})), "rounds": 1});
        all.push((Kind::Corrected, "residual", settings));
    }
    for (sparsity, bits) in [(0.7, 4), (0.5, 3)] {
        let sparse = json!({"method": "sparsegpt", "settings": pruned(&share(sparsity), bits)});
        let settings = json!({"low_rank": factors(8, json!({"share": CORRECTION})), "sparse": sparse, "rounds": 1});
        all.push((Kind::LowRankSparse, "low_rank_sparse", settings));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_candidate_has_a_form() {
        for candidate in candidates(false) {
            let form = candidate.form(512, 256, Role::Mlp);
            assert!(form.is_some(), "{candidate:?}");
        }
    }

    #[test]
    fn what_is_kept_out_is_out() {
        let without = restrict(candidates(false), &[], &[Kind::Affine, Kind::Corrected]);
        assert!(without.iter().all(|c| c.kind != Kind::Affine && c.kind != Kind::Corrected));
        let sparse = restrict(candidates(false), &[Kind::Sparse], &[]);
        let scope = Scope::default();
        let layer: Vec<Kind> =
            sparse.iter().filter(|c| c.suits(Role::Mlp, 576, &scope, true)).map(|c| c.kind).collect();
        assert!(!layer.is_empty() && layer.iter().all(|k| *k == Kind::Sparse));
        assert!(sparse.iter().any(|c| c.suits(Role::Embedding, 576, &scope, true)));
        assert!(!sparse.iter().any(|c| c.suits(Role::Mlp, 576, &scope, false)), "pruning candidates need text");
        assert!("frobnicate".parse::<Kind>().is_err());
        assert!(Kind::ALL.iter().all(|k| k.name().parse() == Ok(*k)));
    }
}
