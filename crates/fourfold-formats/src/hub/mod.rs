//! Models by name from the Hugging Face hub, through `hf-hub`, into the cache that Python's `huggingface_hub` uses too.

mod environment;
mod error;
mod select;

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

pub use environment::HubOptions;
pub use error::HubError;
use select::{check_name, is_safe_file, small_files, weight_files};

use crate::FormatError;
use crate::safetensors::{INDEX_NAME, Index};

/// Told how a download goes.
pub trait Progress {
    /// A file of so many bytes begins, or begins again after a cut: `advance` then counts from its first byte anew.
    fn start(&mut self, file: &str, bytes: u64);
    /// So many more bytes are there.
    fn advance(&mut self, bytes: u64);
    /// The file is complete.
    fn finish(&mut self);
}

/// Tells nobody.
impl Progress for () {
    fn start(&mut self, _file: &str, _bytes: u64) {}
    fn advance(&mut self, _bytes: u64) {}
    fn finish(&mut self) {}
}

/// Fetches a model, as far as the cache does not hold it, and gives the directory it is in (for a repository of one GGUF file
/// and no safetensors, that file). `repo` is `owner/name`, `revision` a branch, tag or commit; where to and from, the environment
/// says: `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`.
///
/// # Errors
/// [`FormatError::Hub`], naming the repository and the file.
pub fn fetch(repo: &str, revision: &str, progress: &mut dyn Progress) -> Result<PathBuf, FormatError> {
    fetch_with(&HubOptions::from_env(), repo, revision, progress)
}

/// [`fetch`] by explicit options.
///
/// # Errors
/// As [`fetch`].
pub fn fetch_with(
    options: &HubOptions,
    repo: &str,
    revision: &str,
    progress: &mut dyn Progress,
) -> Result<PathBuf, FormatError> {
    let named = |problem| FormatError::Hub { repo: repo.to_owned(), problem };
    check_name(repo, revision).map_err(named)?;
    let hub = Hub::new(options, repo, revision).map_err(named)?;
    if options.offline {
        return hub.cached().ok_or_else(|| named(HubError::Offline { cache: options.cache.clone() }));
    }
    match hub.download(progress) {
        // Without a network the cache will do, as far as it is complete.
        Err(FormatError::Hub { problem: HubError::Unreachable { reason }, .. }) => {
            hub.cached().ok_or_else(|| named(HubError::Unreachable { reason }))
        }
        other => other,
    }
}

/// One repository at one revision.
struct Hub<'a> {
    options: &'a HubOptions,
    repo: &'a str,
    revision: &'a str,
    cache: Cache,
    api: Api,
}

impl<'a> Hub<'a> {
    fn new(options: &'a HubOptions, repo: &'a str, revision: &'a str) -> Result<Self, HubError> {
        let cache = Cache::new(options.cache.clone());
        let api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(options.endpoint.trim_end_matches('/').to_owned())
            .with_token(options.token.clone())
            .with_progress(false)
            .with_user_agent("fourfold", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|e| HubError::of(e, None))?;
        Ok(Self { options, repo, revision, cache, api })
    }

    fn named(&self, problem: HubError) -> FormatError {
        FormatError::Hub { repo: self.repo.to_owned(), problem }
    }

    fn at(&self, revision: &str) -> Repo {
        Repo::with_revision(self.repo.to_owned(), RepoType::Model, revision.to_owned())
    }

    fn folder(&self) -> PathBuf {
        self.cache.path().join(self.at(self.revision).folder_name())
    }

    /// What the cache holds of the revision, if that is a whole model.
    fn cached(&self) -> Option<PathBuf> {
        let named = fs::read_to_string(self.folder().join("refs").join(self.revision)).ok();
        let commit = named.as_deref().map_or(self.revision, str::trim);
        let snapshot = self.folder().join("snapshots").join(commit);
        let whole = |index: Index| index.shards().iter().all(|shard| snapshot.join(shard).exists());
        let has_weights = match Index::read(&snapshot.join(INDEX_NAME)) {
            Ok(index) => whole(index),
            Err(_) => snapshot.join("model.safetensors").exists(),
        };
        if has_weights && snapshot.join("config.json").exists() {
            return Some(snapshot);
        }
        let ggufs = |dir: &Path| {
            let files = fs::read_dir(dir).ok()?.filter_map(Result::ok).map(|e| e.path());
            Some(files.filter(|p| p.extension().is_some_and(|e| e == "gguf")).collect::<Vec<_>>())
        };
        match ggufs(&snapshot)?.as_slice() {
            [only] => Some(only.clone()),
            _ => None,
        }
    }

    fn download(&self, progress: &mut dyn Progress) -> Result<PathBuf, FormatError> {
        let info = self.api.repo(self.at(self.revision)).info().map_err(|e| self.named(HubError::of(e, None)))?;
        let mut names: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).collect();
        names.retain(|name| is_safe_file(name));
        if !is_safe_file(&info.sha) {
            return Err(self.named(HubError::Answer { reason: format!("commit {:?}", info.sha) }));
        }
        // All files of one commit, whatever happens to the branch meanwhile.
        let repo = self.api.repo(self.at(&info.sha));
        let snapshot = self.folder().join("snapshots").join(&info.sha);
        for name in small_files(&names) {
            self.file(&repo, &snapshot, name, progress)?;
        }
        let index = match names.iter().any(|n| n == INDEX_NAME) {
            true => Some(Index::read(&snapshot.join(INDEX_NAME))?),
            false => None,
        };
        let weights = weight_files(&names, index.as_ref()).map_err(|e| self.named(e))?;
        for name in &weights {
            self.file(&repo, &snapshot, name, progress)?;
        }
        let reference = self.cache.repo(self.at(self.revision)).create_ref(&info.sha);
        reference.map_err(FormatError::io(&self.folder()))?;
        match weights.as_slice() {
            [only] if only.ends_with(".gguf") => Ok(snapshot.join(only)),
            _ => Ok(snapshot),
        }
    }

    /// One file, taken up where an earlier try left it.
    fn file(
        &self,
        repo: &ApiRepo,
        snapshot: &Path,
        name: &str,
        progress: &mut dyn Progress,
    ) -> Result<(), FormatError> {
        let path = snapshot.join(name);
        if path.exists() {
            return Ok(());
        }
        let total = Cell::new(0);
        let mut failure = None;
        for attempt in 0..=self.options.retries {
            if attempt > 0 {
                std::thread::sleep(self.options.pause * attempt);
            }
            // hf-hub's own retries go on from a wrong place when a try fails before its first byte; a fresh call does not.
            match repo.download_with_progress(name, Told { inner: progress, total: &total }) {
                Ok(_) => match self.check_length(&path, total.get()) {
                    Ok(()) => return Ok(()),
                    Err(problem) => failure = Some(problem),
                },
                Err(e) => {
                    if is_beyond_end(&e) {
                        self.drop_parts(total.get());
                    }
                    let problem = HubError::of(e, Some(name));
                    if !problem.is_passing() {
                        return Err(self.named(problem));
                    }
                    failure = Some(problem);
                }
            }
        }
        let reason = "no try was allowed".to_owned();
        Err(self.named(failure.unwrap_or(HubError::Unreachable { reason })))
    }

    /// Whether a file has the length that was announced: a server that ignores ranges gives the begin twice.
    fn check_length(&self, path: &Path, total: u64) -> Result<(), HubError> {
        let found = fs::metadata(path).map(|m| m.len()).unwrap_or(0);
        if found == total {
            return Ok(());
        }
        // The link and what it points to, or the next try would take it for complete.
        if let Ok(blob) = fs::canonicalize(path) {
            let _ = fs::remove_file(blob);
        }
        let _ = fs::remove_file(path);
        Err(HubError::Length { file: path.file_name().unwrap_or_default().to_string_lossy().into(), found, total })
    }

    /// Removes parts that are as long as the whole or longer: what a run that was killed before the last rename left.
    fn drop_parts(&self, total: u64) {
        let Ok(entries) = fs::read_dir(self.folder().join("blobs")) else { return };
        for path in entries.filter_map(Result::ok).map(|e| e.path()) {
            let is_part = path.extension().is_some_and(|e| e == "part");
            if is_part && fs::metadata(&path).is_ok_and(|m| m.len() >= total) {
                let _ = fs::remove_file(&path);
            }
        }
    }
}

/// Whether a part on disk reaches the file's end or beyond, so that nothing is left to ask for.
fn is_beyond_end(error: &ApiError) -> bool {
    match error {
        ApiError::InvalidResume => true,
        ApiError::RequestError(e) => matches!(&**e, ureq::Error::Status(416, _)),
        _ => false,
    }
}

/// hf-hub's progress, passed on.
struct Told<'a> {
    inner: &'a mut dyn Progress,
    total: &'a Cell<u64>,
}

impl hf_hub::api::Progress for Told<'_> {
    fn init(&mut self, size: usize, filename: &str) {
        self.total.set(size as u64);
        self.inner.start(filename, size as u64);
    }

    fn update(&mut self, size: usize) {
        self.inner.advance(size as u64);
    }

    fn finish(&mut self) {
        self.inner.finish();
    }
}

impl Default for HubOptions {
    fn default() -> Self {
        Self {
            endpoint: "https://huggingface.co".to_owned(),
            cache: PathBuf::from("."),
            token: None,
            offline: false,
            retries: 5,
            pause: Duration::from_millis(500),
        }
    }
}
