//! What dependencies may be, by `deny.toml`: their licences, where they come from, which are banned. The file is cargo-deny's; this
//! reads the same sections without it.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

#[derive(Deserialize)]
struct Deny {
    licenses: Licenses,
    bans: Bans,
    sources: Sources,
}

#[derive(Deserialize)]
struct Licenses {
    allow: Vec<String>,
}

#[derive(Deserialize)]
struct Bans {
    deny: Vec<Banned>,
}

#[derive(Deserialize)]
struct Banned {
    name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Sources {
    allow_registry: Vec<String>,
}

/// The part of `cargo metadata` that is looked at.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    /// None of what lies in this repository.
    source: Option<String>,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    req: String,
    source: Option<String>,
}

/// Adds what breaks `deny.toml`, over the whole of `Cargo.lock`.
pub fn check(root: &Path, broken: &mut Vec<String>) -> Result<()> {
    let text = std::fs::read_to_string(root.join("deny.toml")).context("deny.toml")?;
    let deny: Deny = toml::from_str(&text).context("deny.toml")?;
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--locked", "--all-features"])
        .current_dir(root)
        .output()
        .context("cargo metadata")?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr).trim());
    let metadata: Metadata = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    broken.extend(metadata.packages.iter().flat_map(|package| faults(package, &deny)));
    Ok(())
}

fn faults(package: &Package, deny: &Deny) -> Vec<String> {
    let of = format!("{} {}", package.name, package.version);
    let mut found = Vec::new();
    if deny.bans.deny.iter().any(|banned| banned.name == package.name) {
        found.push(format!("{of}: banned by deny.toml"));
    }
    if package.source.is_none() {
        let any = package.dependencies.iter().filter(|d| d.source.is_some() && d.req == "*");
        found.extend(any.map(|d| format!("{of} depends on any version of {}", d.name)));
        return found;
    }
    let source = package.source.as_deref().unwrap_or_default();
    if !deny.sources.allow_registry.iter().any(|registry| source == format!("registry+{registry}")) {
        found.push(format!("{of}: from {source}, which deny.toml does not allow"));
    }
    match &package.license {
        Some(license) if is_allowed(license, &deny.licenses.allow) => {}
        Some(license) => found.push(format!("{of}: the licence {license:?} is not among those of deny.toml")),
        None => found.push(format!("{of}: no licence is named")),
    }
    found
}

/// Whether an SPDX expression can be met with the allowed licences.
fn is_allowed(expression: &str, allowed: &[String]) -> bool {
    // Older manifests write a slash for OR.
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut place = 0;
    let met = any_of(&words, &mut place, allowed);
    met && place == words.len()
}

/// `x OR y`, where AND binds closer.
fn any_of(words: &[&str], place: &mut usize, allowed: &[String]) -> bool {
    let mut met = all_of(words, place, allowed);
    while words.get(*place) == Some(&"OR") {
        *place += 1;
        met |= all_of(words, place, allowed);
    }
    met
}

fn all_of(words: &[&str], place: &mut usize, allowed: &[String]) -> bool {
    let mut met = one(words, place, allowed);
    while words.get(*place) == Some(&"AND") {
        *place += 1;
        met &= one(words, place, allowed);
    }
    met
}

/// A licence, perhaps `WITH` an exception, or an expression in parentheses.
fn one(words: &[&str], place: &mut usize, allowed: &[String]) -> bool {
    let word = words.get(*place);
    *place += 1;
    let Some(word) = word else { return false };
    if *word == "(" {
        let met = any_of(words, place, allowed);
        let closed = words.get(*place) == Some(&")");
        *place += 1;
        return met && closed;
    }
    let mut name = (*word).to_owned();
    if words.get(*place) == Some(&"WITH") {
        name = format!("{name} WITH {}", words.get(*place + 1).unwrap_or(&""));
        *place += 2;
    }
    allowed.contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_met_or_not() {
        let allowed = ["MIT", "ISC", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned);
        let met = |text: &str| is_allowed(text, &allowed);
        for good in [
            "MIT",
            "MIT OR GPL-3.0",
            "GPL-3.0/MIT",
            "MIT AND ISC",
            "(GPL-3.0 OR MIT) AND ISC",
            "Apache-2.0 WITH LLVM-exception OR Apache-2.0",
        ] {
            assert!(met(good), "{good}");
        }
        for bad in [
            "",
            "GPL-3.0",
            "MIT AND GPL-3.0",
            "Apache-2.0",
            "(MIT",
            "MIT ISC",
            "GPL-3.0 OR (MIT AND GPL-3.0)",
            "MIT OR",
        ] {
            assert!(!met(bad), "{bad}");
        }
    }

    #[test]
    fn each_kind_of_fault_is_found() {
        let deny = Deny {
            licenses: Licenses { allow: vec!["MIT".to_owned()] },
            bans: Bans { deny: vec![Banned { name: "bad".to_owned() }] },
            sources: Sources { allow_registry: vec!["https://here".to_owned()] },
        };
        let package = |name: &str, license: Option<&str>, source: Option<&str>, req: &str| Package {
            name: name.to_owned(),
            version: "1.0.0".to_owned(),
            license: license.map(str::to_owned),
            source: source.map(str::to_owned),
            dependencies: vec![Dependency { name: "d".to_owned(), req: req.to_owned(), source: Some(String::new()) }],
        };
        let here = Some("registry+https://here");
        let count = |p: &Package| faults(p, &deny).len();
        assert_eq!(count(&package("a", Some("MIT"), here, "*")), 0);
        assert_eq!(count(&package("bad", Some("MIT"), here, "1")), 1);
        assert_eq!(count(&package("a", Some("GPL-3.0"), here, "1")), 1);
        assert_eq!(count(&package("a", None, here, "1")), 1);
        assert_eq!(count(&package("a", Some("MIT"), Some("git+https://here"), "1")), 1);
        assert_eq!(count(&package("ours", None, None, "1")), 0);
        assert_eq!(count(&package("ours", None, None, "*")), 1);
    }
}
