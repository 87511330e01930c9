//! Models by name from the Hugging Face hub, into the cache that Python's `huggingface_hub` uses too.

mod cache;
mod download;
mod environment;
mod error;
mod http;
mod proxies;
mod select;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use cache::Cache;
use download::{Announced, download};
pub use environment::HubOptions;
pub use error::HubError;
use http::{Ask, Client, check_status};
pub use proxies::Proxies;
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
/// says: `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`, `HTTPS_PROXY`, `NO_PROXY`. The token goes to the
/// endpoint alone; contents are checked against the sizes and hashes that it announces.
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
    let hub = Hub::new(options, repo, revision);
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
}

/// What the hub says of a revision.
#[derive(Deserialize)]
struct Info {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// The commit and the files of a revision, from the hub's JSON. Names that would lead out of the cache are left out.
///
/// # Errors
/// It is no such JSON, or the commit is no name of a directory.
pub fn list_of_files(json: &[u8]) -> Result<(String, Vec<String>), HubError> {
    let info = serde_json::from_slice(json);
    let info: Info = info.map_err(|e| HubError::Answer { reason: format!("the list of files: {e}") })?;
    if !info.sha.chars().all(|c| c.is_ascii_alphanumeric()) || info.sha.is_empty() || info.sha.len() > 128 {
        return Err(HubError::Answer { reason: format!("the commit {:?}", info.sha) });
    }
    let names = info.siblings.into_iter().map(|s| s.rfilename).filter(|name| is_safe_file(name));
    Ok((info.sha, names.collect()))
}

impl<'a> Hub<'a> {
    fn new(options: &'a HubOptions, repo: &'a str, revision: &'a str) -> Self {
        Self { options, repo, revision, cache: Cache::new(&options.cache, repo) }
    }

    fn named(&self, problem: HubError) -> FormatError {
        FormatError::Hub { repo: self.repo.to_owned(), problem }
    }

    /// What the cache holds of the revision, if that is a whole model.
    fn cached(&self) -> Option<PathBuf> {
        let commit = self.cache.commit(self.revision);
        let snapshot = self.cache.snapshot(commit.as_deref().unwrap_or(self.revision));
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
        let client = Client::new(self.options).map_err(|e| self.named(e))?;
        let (commit, names) = self.info(&client).map_err(|e| self.named(e))?;
        // All files of one commit, whatever happens to the branch meanwhile.
        let snapshot = self.cache.snapshot(&commit);
        for name in small_files(&names) {
            self.file(&client, &commit, name, progress)?;
        }
        let index = match names.iter().any(|n| n == INDEX_NAME) {
            true => Some(Index::read(&snapshot.join(INDEX_NAME))?),
            false => None,
        };
        let weights = weight_files(&names, index.as_ref()).map_err(|e| self.named(e))?;
        for name in &weights {
            self.file(&client, &commit, name, progress)?;
        }
        let noted = self.cache.set_commit(self.revision, &commit);
        noted.map_err(FormatError::io(self.cache.folder()))?;
        match weights.as_slice() {
            [only] if only.ends_with(".gguf") => Ok(snapshot.join(only)),
            _ => Ok(snapshot),
        }
    }

    /// The commit of the revision and its files, asked for again where no answer comes.
    fn info(&self, client: &Client) -> Result<(String, Vec<String>), HubError> {
        let path = format!("/api/models/{}/revision/{}", self.repo, self.revision.replace('/', "%2F"));
        let once = || {
            let mut response = client.send(&path, Ask::Content(0))?;
            check_status(&response, "the repository")?;
            let text = response.body_mut().with_config().limit(MOST_INFO).read_to_vec();
            let text = text.map_err(|e| HubError::Unreachable { reason: format!("the list of files: {e}") })?;
            list_of_files(&text)
        };
        let mut attempt = 0;
        loop {
            match once() {
                Err(error) if error.is_passing() && attempt < self.options.retries => attempt += 1,
                other => return other,
            }
            std::thread::sleep(self.options.pause * attempt);
        }
    }

    /// One file, taken up where an earlier try left it. Tries that bring nothing new are counted.
    fn file(&self, client: &Client, commit: &str, name: &str, progress: &mut dyn Progress) -> Result<(), FormatError> {
        if self.cache.snapshot(commit).join(name).exists() {
            return Ok(());
        }
        let path = format!("/{}/resolve/{commit}/{name}", self.repo);
        let (mut attempt, mut furthest) = (0, 0);
        loop {
            let mut there = 0;
            let Err(error) = self.try_file(client, commit, name, &path, &mut there, progress) else { return Ok(()) };
            attempt = if there > furthest { 1 } else { attempt + 1 };
            furthest = furthest.max(there);
            if !error.is_passing() || attempt > self.options.retries {
                return Err(self.named(error));
            }
            std::thread::sleep(self.options.pause * attempt);
        }
    }

    /// One try; `there` becomes how many of the file's bytes lie in the cache when it fails.
    fn try_file(
        &self,
        client: &Client,
        commit: &str,
        name: &str,
        path: &str,
        there: &mut u64,
        progress: &mut dyn Progress,
    ) -> Result<(), HubError> {
        let of_disk = |e: std::io::Error| HubError::Cache { reason: format!("{name}: {e}") };
        let announced = Announced::ask(client, path, name)?;
        let (part, blob) = (self.cache.part(&announced.etag), self.cache.blob(&announced.etag));
        fs::create_dir_all(self.cache.folder().join("blobs")).map_err(of_disk)?;
        let _lock = self.cache.lock(&announced.etag, name)?;
        let length = |path: &Path| fs::metadata(path).map(|m| m.len()).ok();
        if length(&blob) != Some(announced.size) {
            let done = download(client, path, name, &announced, [&part, &blob], progress);
            *there = length(&part).unwrap_or(0);
            done?;
        }
        self.cache.link(&announced.etag, commit, name).map_err(of_disk)
    }
}

/// Most bytes of a list of files.
const MOST_INFO: u64 = 64 << 20;

impl Default for HubOptions {
    fn default() -> Self {
        Self {
            endpoint: "https://huggingface.co".to_owned(),
            cache: PathBuf::from("."),
            token: None,
            proxies: Proxies::default(),
            offline: false,
            retries: 5,
            pause: Duration::from_millis(500),
        }
    }
}
