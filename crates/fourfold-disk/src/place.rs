//! Where an output may be made: decided before any work.

use std::fs;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use crate::DiskError;
use crate::publish::parent;

/// What happens to the directory that is written.
#[derive(Clone, Copy)]
pub enum Use<'a> {
    /// It is replaced as a whole.
    Replaced,
    /// Files and directories are put into it; `true` for a name in it that is written over.
    Filled(&'a dyn Fn(&str) -> bool),
}

/// The directory `out` stands for, links resolved, apart from every input (what the command line calls it, and its path).
///
/// # Errors
/// [`DiskError::Place`]: a link that leads nowhere, no directory, an input itself, within an input, around an input.
pub fn output_directory(out: &Path, inputs: &[(String, PathBuf)], used: Use) -> Result<PathBuf, DiskError> {
    let refuse = |reason: String| Err(DiskError::place(out, reason));
    let place = resolve(out)?;
    match fs::metadata(&place) {
        Ok(meta) if !meta.is_dir() => return refuse("exists and is no directory; name another output".to_owned()),
        Ok(_) => {}
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(DiskError::io("look at", out)(e)),
    }
    if place.file_name().is_none() {
        return refuse("is the root of a file system; name a directory in it".to_owned());
    }
    for (name, path) in inputs {
        let Ok(input) = fs::canonicalize(path) else { continue };
        if input == place {
            return refuse(format!("is {name}, which is read from; name another output"));
        }
        if place.starts_with(&input) {
            return refuse(format!(
                "lies inside {name} ({}), which is read from; name a place beside it",
                path.display()
            ));
        }
        let Ok(within) = input.strip_prefix(&place) else { continue };
        let first = within.components().next().map(|c| c.as_os_str().to_string_lossy().into_owned());
        let harmed = match used {
            Use::Replaced => true,
            Use::Filled(written) => first.is_some_and(|first| written(&first)),
        };
        if harmed {
            return refuse(format!("holds {name} ({}), which it would replace; name another output", path.display()));
        }
    }
    Ok(place)
}

/// The file `out` stands for, links resolved, apart from every input.
///
/// # Errors
/// [`DiskError::Place`]: a link that leads nowhere, a directory, a file that is read from, no directory to put it in.
pub fn output_file(out: &Path, inputs: &[(String, PathBuf)]) -> Result<PathBuf, DiskError> {
    let refuse = |reason: String| Err(DiskError::place(out, reason));
    let place = resolve(out)?;
    let found = fs::metadata(&place).ok();
    if found.as_ref().is_some_and(fs::Metadata::is_dir) || out.as_os_str().is_empty() {
        return refuse("is a directory; a file is written".to_owned());
    }
    if !parent(&place).is_dir() {
        return refuse(format!("there is no directory {}", parent(&place).display()));
    }
    for (name, path) in inputs {
        let Ok(input) = fs::canonicalize(path) else { continue };
        // A new file may lie inside an input's directory; one that is there belongs to it.
        if found.is_some() && place.starts_with(&input) {
            return refuse(format!(
                "is {name} or a part of it ({}), which is read from; name another file",
                path.display()
            ));
        }
    }
    Ok(place)
}

/// The path with all links resolved; what is not there yet keeps its name.
fn resolve(out: &Path) -> Result<PathBuf, DiskError> {
    if out.as_os_str().is_empty() {
        return Err(DiskError::place(out, "an output without a name"));
    }
    match fs::canonicalize(out) {
        Ok(place) => return Ok(place),
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(DiskError::io("look at", out)(e)),
    }
    // A pipe behind /dev/stdout is there and has no path.
    if fs::metadata(out).is_ok() {
        return Ok(out.to_owned());
    }
    if let Ok(meta) = fs::symlink_metadata(out)
        && meta.is_symlink()
    {
        let to = fs::read_link(out).unwrap_or_default();
        return Err(DiskError::place(
            out,
            format!("is a link to {}, which does not exist; make that directory, or remove the link", to.display()),
        ));
    }
    match out.components().next_back() {
        Some(Component::Normal(name)) => Ok(resolve(parent(out))?.join(name)),
        _ => Err(DiskError::place(out, "a directory on the way to it does not exist")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(out: &Path, input: &Path, used: Use) -> String {
        output_directory(out, &[("MODEL".to_owned(), input.to_owned())], used).unwrap_err().to_string()
    }

    #[test]
    #[cfg(unix)]
    fn every_bad_place_has_its_own_words() {
        use std::os::unix::fs::symlink;
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir_all(at("model/sub")).unwrap();
        fs::write(at("file"), "").unwrap();
        symlink("nowhere", at("dangling")).unwrap();
        symlink("model", at("link")).unwrap();
        symlink(".", at("here")).unwrap();
        let model = at("model");
        for (out, words) in [
            (at("model"), "is MODEL"),
            (at("link"), "is MODEL"),
            (at("here/model/."), "is MODEL"),
            (at("model/new"), "lies inside MODEL"),
            (at("link/new/deeper"), "lies inside MODEL"),
            (at("."), "holds MODEL"),
            (at("dangling"), "is a link to nowhere"),
            (at("file"), "is no directory"),
            (at("new/.."), "does not exist"),
            (PathBuf::new(), "without a name"),
            (PathBuf::from("/"), "is the root"),
        ] {
            assert!(refused(&out, &model, Use::Replaced).contains(words), "{}", refused(&out, &model, Use::Replaced));
        }
        assert!(refused(&at("."), &at("model/sub"), Use::Filled(&|name| name == "model")).contains("holds MODEL"));
        let inputs = [("MODEL".to_owned(), model)];
        assert!(output_directory(&at("."), &inputs, Use::Filled(&|name| name == "best")).is_ok());
        let real = folder.path().canonicalize().unwrap();
        assert_eq!(output_directory(&at("here/a/b"), &inputs, Use::Replaced).unwrap(), real.join("a/b"));
        fs::write(at("model/config.json"), "").unwrap();
        for (out, words) in [
            (at("model/config.json"), "is MODEL or a part of it"),
            (at("model"), "is a directory"),
            (at("dangling"), "is a link to nowhere"),
            (at("gone/file"), "there is no directory"),
        ] {
            let error = output_file(&out, &inputs).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        assert_eq!(output_file(&at("here/file"), &inputs).unwrap(), real.join("file"));
        assert!(output_file(&at("model/new.json"), &inputs).is_ok());
    }
}
