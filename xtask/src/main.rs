//! House tasks: `cargo xtask rules` (the architecture's invariants), `cargo xtask bench …` (side by side with the peers).

mod rules;

use anyhow::{Result, bail};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some("rules") => rules::check(),
        _ => bail!("usage: cargo xtask rules"),
    }
}
