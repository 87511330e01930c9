//! Where from and where to, as the environment says it to every Hugging Face program.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use super::Proxies;

/// How the hub is reached.
#[derive(Clone, Debug)]
pub struct HubOptions {
    /// The server, without a slash at its end.
    pub endpoint: String,
    /// The cache of repositories.
    pub cache: PathBuf,
    /// Token of a user, for what not everybody may read.
    pub token: Option<String>,
    /// What requests go through.
    pub proxies: Proxies,
    /// Whether the cache alone is used.
    pub offline: bool,
    /// Tries after the first, for each file; each goes on where the last was cut.
    pub retries: u32,
    /// Pause before the first of these tries; the n-th waits n times as long.
    pub pause: Duration,
}

impl HubOptions {
    /// From `HF_ENDPOINT`, `HF_HUB_CACHE` or `HF_HOME` or `XDG_CACHE_HOME`, `HF_TOKEN` or the token file, `HF_HUB_OFFLINE`,
    /// and the variables of proxies.
    pub fn from_env() -> Self {
        Self::from_variables(|name| std::env::var_os(name).filter(|v| !v.is_empty()))
    }

    /// As [`HubOptions::from_env`], from any set of variables.
    pub fn from_variables(get: impl Fn(&str) -> Option<OsString>) -> Self {
        let text = |name: &str| get(name).and_then(|v| v.into_string().ok());
        let path = |name: &str| get(name).map(PathBuf::from);
        let default = Self::default();
        let home = path("HF_HOME").or_else(|| path("XDG_CACHE_HOME").map(|c| c.join("huggingface")));
        let home = home.or_else(|| std::env::home_dir().map(|h| h.join(".cache/huggingface")));
        let home = home.unwrap_or_else(|| PathBuf::from(".cache/huggingface"));
        let is_on =
            |name: &str| text(name).is_some_and(|v| ["1", "true", "yes", "on"].contains(&v.to_lowercase().as_str()));
        let token_file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        let token = text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN"));
        let token = token.or_else(|| std::fs::read_to_string(token_file).ok());
        let token = token.filter(|_| !is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN"));
        Self {
            endpoint: text("HF_ENDPOINT").unwrap_or(default.endpoint),
            cache: path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE")).unwrap_or_else(|| home.join("hub")),
            token: token.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty()),
            proxies: Proxies::from_variables(text),
            offline: is_on("HF_HUB_OFFLINE") || is_on("TRANSFORMERS_OFFLINE"),
            retries: default.retries,
            pause: default.pause,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_decide_as_in_python() {
        let options = |pairs: &'static [(&str, &str)]| {
            HubOptions::from_variables(|name| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| v.into()))
        };
        let set =
            options(&[("HF_HOME", "/h"), ("HF_TOKEN", " t \n"), ("HF_ENDPOINT", "http://e"), ("HF_HUB_OFFLINE", "ON")]);
        assert_eq!((set.cache, set.token.as_deref()), (PathBuf::from("/h/hub"), Some("t")));
        assert_eq!((set.endpoint.as_str(), set.offline), ("http://e", true));
        let set = options(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/h"), ("HF_HUB_OFFLINE", "0")]);
        assert_eq!((set.cache, set.offline), (PathBuf::from("/c"), false));
        assert_eq!(set.endpoint, "https://huggingface.co");
        assert_eq!(options(&[("XDG_CACHE_HOME", "/x")]).cache, PathBuf::from("/x/huggingface/hub"));
    }
}
