//! The small model that comes with fourfold, for the demonstration.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// Where the checkout keeps it.
const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets");

/// A directory with the model, `calibration.txt` and `eval.txt`.
pub fn unpack(_to: &Path) -> Result<PathBuf> {
    let folder = PathBuf::from(FOLDER);
    if !folder.join("model.safetensors").is_file() {
        bail!("{FOLDER}: the demonstration's model is not here; see fourfold --help for what to do with other models");
    }
    Ok(folder)
}
