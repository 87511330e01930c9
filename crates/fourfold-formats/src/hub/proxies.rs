//! Which proxy a request goes through, as the usual variables say it.

use ureq::Proxy;

use super::HubError;

/// `HTTPS_PROXY`, `HTTP_PROXY` and `ALL_PROXY`, and the hosts of `NO_PROXY` that are reached without one. None is used by default.
#[derive(Clone, Debug, Default)]
pub struct Proxies {
    /// For https.
    pub https: Option<String>,
    /// For http.
    pub http: Option<String>,
    /// For both, where the scheme's own is not set.
    pub all: Option<String>,
    /// Hosts, each with all below it, by commas; `*` for every host.
    pub none_for: Option<String>,
}

impl Proxies {
    /// From the variables, in small letters first as curl has them.
    pub(super) fn from_variables(text: impl Fn(&str) -> Option<String>) -> Self {
        let either = |name: &str| text(&name.to_lowercase()).or_else(|| text(name));
        Self {
            https: either("HTTPS_PROXY"),
            // In capitals a web server's header `Proxy:` could set it.
            http: text("http_proxy"),
            all: either("ALL_PROXY"),
            none_for: either("NO_PROXY"),
        }
    }

    /// The proxy for a host.
    ///
    /// # Errors
    /// What the variable holds is no address of a proxy.
    pub(super) fn of(&self, scheme: Option<&str>, host: &str) -> Result<Option<Proxy>, HubError> {
        let own = if scheme == Some("https") { &self.https } else { &self.http };
        let Some(text) = own.as_ref().or(self.all.as_ref()).filter(|_| !self.is_excepted(host)) else {
            return Ok(None);
        };
        // The text may hold a password.
        let proxy = Proxy::new(text);
        proxy.map(Some).map_err(|error| HubError::Proxy { reason: error.to_string() })
    }

    fn is_excepted(&self, host: &str) -> bool {
        let host = host.trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
        let entries = self.none_for.as_deref().unwrap_or_default().split(',');
        entries.map(|entry| entry.trim().to_ascii_lowercase()).filter(|entry| !entry.is_empty()).any(|entry| {
            let name = entry.trim_start_matches('*').trim_start_matches('.');
            entry == "*" || host == name || host.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_has_its_schemes_proxy_unless_it_is_excepted() {
        let variables = [
            ("HTTPS_PROXY", "http://user:word@secure:3128"),
            ("all_proxy", "http://any:1"),
            ("NO_PROXY", "localhost, .internal,hub.co"),
        ];
        let proxies = Proxies::from_variables(|name| {
            variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned())
        });
        let host = |scheme, host: &str| proxies.of(Some(scheme), host).unwrap().map(|p| p.host().to_owned());
        assert_eq!(host("https", "huggingface.co").as_deref(), Some("secure"));
        assert_eq!(host("http", "huggingface.co").as_deref(), Some("any"));
        for excepted in ["localhost", "a.internal", "hub.co", "cdn.HUB.co"] {
            assert_eq!(host("https", excepted), None, "{excepted}");
        }
        assert!(host("https", "nohub.co").is_some());
        let all = Proxies { none_for: Some("*".to_owned()), ..proxies };
        assert!(all.of(Some("https"), "huggingface.co").unwrap().is_none());
        let wrong = Proxies { https: Some("nonsense://:x".to_owned()), ..Proxies::default() };
        assert!(matches!(wrong.of(Some("https"), "a"), Err(HubError::Proxy { .. })));
    }
}
