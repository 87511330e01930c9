//! The small model that comes with fourfold, for the demonstration: inside the binary, so that it needs no checkout.
//!
//! A deepseek_v3 model of 2.7 million parameters that `fourfold train` trained on the Rust sources of this project's dependencies
//! (`scripts/embedded_model.sh`). The two texts are parts of this project's own sources, which it has not seen.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

macro_rules! asset {
    ($name:literal) => {
        ($name, include_bytes!(concat!("../assets/", $name)).as_slice())
    };
}

const FILES: [(&str, &[u8]); 6] = [
    asset!("config.json"),
    asset!("model.safetensors"),
    asset!("tokenizer.json"),
    asset!("tokenizer_config.json"),
    asset!("calibration.txt"),
    asset!("eval.txt"),
];

/// The text of its tokenizer.
pub fn tokenizer() -> &'static [u8] {
    FILES.iter().find(|(name, _)| *name == "tokenizer.json").map_or(&[], |(_, bytes)| bytes)
}

/// Writes the model, `calibration.txt` and `eval.txt` to a directory.
pub fn unpack(to: &Path) -> Result<PathBuf> {
    fs::create_dir_all(to).with_context(|| to.display().to_string())?;
    for (name, bytes) in FILES {
        let file = to.join(name);
        fs::write(&file, bytes).with_context(|| file.display().to_string())?;
    }
    Ok(to.to_path_buf())
}
