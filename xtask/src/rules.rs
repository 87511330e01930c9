//! The invariants of ARCHITECTURE.md that a machine can check: which crate may depend on which, where `unsafe` may stand, how
//! long a file may be, and what dependencies may be.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::dependencies;

/// Crate, and the crates of ours it may name.
const ARROWS: &[(&str, &[&str])] = &[
    ("fourfold-tensor", &[]),
    ("fourfold-disk", &[]),
    ("fourfold-kernels", &["fourfold-tensor"]),
    ("fourfold-formats", &["fourfold-disk", "fourfold-tensor"]),
    ("fourfold-gpu", &["fourfold-kernels", "fourfold-tensor"]),
    ("fourfold-models", &["fourfold-kernels", "fourfold-tensor"]),
    ("fourfold-compress", &["fourfold-models", "fourfold-kernels", "fourfold-tensor"]),
    ("fourfold-train", &["fourfold-models", "fourfold-kernels", "fourfold-tensor", "fourfold-disk"]),
    ("fourfold-infer", &["fourfold-models", "fourfold-kernels", "fourfold-tensor"]),
    ("fourfold-server", &["fourfold-infer"]),
    (
        "fourfold",
        &[
            "fourfold-tensor",
            "fourfold-disk",
            "fourfold-kernels",
            "fourfold-gpu",
            "fourfold-formats",
            "fourfold-models",
            "fourfold-compress",
            "fourfold-infer",
            "fourfold-train",
            "fourfold-server",
        ],
    ),
];

/// Places that may hold `unsafe`, below the repository root.
const UNSAFE: &[&str] = &["crates/fourfold-kernels/", "crates/fourfold-formats/src/mmap.rs"];

/// Lines a source file may have.
const MOST_LINES: usize = 600;

/// Checks every rule and lists all that is broken.
pub fn check() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in the workspace")?;
    let mut broken = Vec::new();
    for entry in fs::read_dir(root.join("crates"))? {
        let dir = entry?.path();
        arrows(&dir, &mut broken)?;
        for file in sources(&dir)? {
            let text = fs::read_to_string(&file)?;
            let name = file.strip_prefix(root)?.to_string_lossy().into_owned();
            let lines = text.lines().count();
            if lines > MOST_LINES {
                broken.push(format!("{name}: {lines} lines, more than {MOST_LINES}"));
            }
            let code = text.lines().map(str::trim).filter(|l| !l.starts_with("//"));
            let has_unsafe =
                code.flat_map(|l| l.split(|c: char| !c.is_alphanumeric() && c != '_')).any(|w| w == "unsafe");
            if has_unsafe && !UNSAFE.iter().any(|place| name.starts_with(place)) {
                broken.push(format!("{name}: unsafe outside {UNSAFE:?}"));
            }
        }
    }
    dependencies::check(root, &mut broken)?;
    if broken.is_empty() {
        println!("house rules hold");
        return Ok(());
    }
    broken.sort();
    bail!("{}", broken.join("\n"))
}

/// One crate's manifest against the arrows.
fn arrows(dir: &Path, broken: &mut Vec<String>) -> Result<()> {
    let name = dir.file_name().context("a crate has a folder")?.to_string_lossy().into_owned();
    let Some((_, allowed)) = ARROWS.iter().find(|(n, _)| *n == name) else {
        broken.push(format!("{name}: not in the architecture's list"));
        return Ok(());
    };
    let manifest = fs::read_to_string(dir.join("Cargo.toml"))?;
    let mut dev = false;
    for line in manifest.lines() {
        if line.starts_with('[') {
            dev = line.contains("dev-dependencies");
        }
        let named = line.split(['.', ' ', '=']).next().unwrap_or_default();
        if !dev && named.starts_with("fourfold") && !allowed.contains(&named) {
            broken.push(format!("{name} depends on {named}: no such arrow"));
        }
    }
    Ok(())
}

/// Every `.rs` file below `src`.
fn sources(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![dir.join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    Ok(found)
}
