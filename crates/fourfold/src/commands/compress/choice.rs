//! What `compress` is asked for a size, and what it may choose from.

use clap::Args;
use fourfold_compress::planner::Kind;

/// What a plan is made of.
#[derive(Args)]
#[command(next_help_heading = "Choice (with --ratio, --bits N.N, --bytes)")]
pub struct ChoiceArgs {
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
