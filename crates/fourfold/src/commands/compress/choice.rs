//! What `compress` is asked for a size, and what it may choose from.

use clap::Args;
use fourfold_compress::planner::Kind;

/// How much work goes into a compression that is left to choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effort {
    /// Round to nearest by the weights alone: seconds.
    Seconds,
    /// GPTQ on 16 sequences, quantized formats alone, no gate: a minute for a model of 135 million parameters on two cores.
    Minute,
    /// GPTQ on 32 sequences, every kind of storage, the plan held against the best uniform choice.
    Minutes,
    /// The same on 128 sequences.
    Most,
}

impl Effort {
    /// Sequences to calibrate on.
    pub fn samples(self) -> u32 {
        match self {
            Self::Seconds | Self::Minute => 16,
            Self::Minutes => 32,
            Self::Most => 128,
        }
    }

    /// Whether the plan has to beat the best uniform choice.
    pub fn has_gate(self) -> bool {
        self >= Self::Minutes
    }

    /// The kinds that linear layers may get.
    pub fn kinds(self) -> &'static [Kind] {
        match self {
            Self::Seconds | Self::Minute => &[Kind::Symmetric, Kind::Learned, Kind::Affine],
            Self::Minutes | Self::Most => &[],
        }
    }
}

/// What a plan is made of.
#[derive(Args)]
#[command(next_help_heading = "Choice (with --ratio, --bits N.N, --bytes)")]
pub struct ChoiceArgs {
    /// How much work to put in: 0 rounds to nearest (seconds); 1 is GPTQ on little text with quantized formats alone (a minute for 135
    /// million parameters on two cores); 2 tries every kind of storage on more text and holds the plan against the best uniform
    /// choice (three times as long); 3 does so on four times the text [default: 1, or 2 with --calibration].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=3))]
    pub effort: Option<u8>,
    /// Kinds of storage that are not to be chosen: symmetric, learned, affine (quantized), sparse (pruned), low-rank (decomposed), corrected
    /// (quantized, and factors of the error), low-rank-sparse.
    #[arg(long, value_name = "KIND", num_args = 1.., conflicts_with = "plan")]
    pub exclude: Vec<Kind>,
    /// The only kinds that linear layers may get. Embeddings and heads are quantized all the same.
    #[arg(long, value_name = "KIND", num_args = 1.., conflicts_with = "plan")]
    pub only: Vec<Kind>,
    /// One format for what some runtimes multiply at once: query, key and value of a layer, its gate and up, the experts of a block.
    #[arg(long, conflicts_with = "plan")]
    pub fusible: bool,
    /// No mix, but the best choice with one format for all linear layers and one for embeddings and heads.
    #[arg(long, conflicts_with = "plan")]
    pub uniform: bool,
    /// Use the plan without holding it against the best uniform choice on text that was kept out of the calibration, which takes as long
    /// as two compressions.
    #[arg(long)]
    pub no_gate: bool,
}

impl ChoiceArgs {
    /// What was asked for, or what a text of one's own deserves.
    pub fn effort(&self, has_own_text: bool) -> Effort {
        match (self.effort, has_own_text) {
            (Some(0), _) => Effort::Seconds,
            (Some(1), _) | (None, false) => Effort::Minute,
            (Some(2), _) | (None, true) => Effort::Minutes,
            (Some(_), _) => Effort::Most,
        }
    }
}

/// What --bits says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bits {
    /// The width of every matrix's codes.
    Grid(u8),
    /// The size of everything, in bits a parameter.
    Average(f64),
}

pub fn bits(text: &str) -> Result<Bits, String> {
    let found = if text.contains('.') {
        text.parse().ok().filter(|b| (0.1..=32.0).contains(b)).map(Bits::Average)
    } else {
        text.parse().ok().filter(|b| (2..=8).contains(b)).map(Bits::Grid)
    };
    found.ok_or_else(|| "2 to 8 are expected, or a size in bits a parameter with a point, as 3.5".to_owned())
}
