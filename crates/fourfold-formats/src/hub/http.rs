//! Requests to the hub: where its token goes, which addresses are followed, and through which proxy.

use std::net::IpAddr;
use std::time::Duration;

use ureq::http::uri::Authority;
use ureq::http::{Response, StatusCode, Uri};
use ureq::{Agent, Body};

use super::{HubError, HubOptions};

/// How often an answer may name another address.
const MOST_REDIRECTS: usize = 10;
/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(20);
/// How long a server may say nothing.
const SILENCE: Duration = Duration::from_secs(60);

/// What is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    /// The headers alone. A redirect to another host is itself the answer if it names the file's ETag.
    About,
    /// The content, from this byte on.
    Content(u64),
}

/// A connection to one hub.
pub(super) struct Client<'a> {
    options: &'a HubOptions,
    endpoint: Uri,
    agent: Agent,
}

impl<'a> Client<'a> {
    pub(super) fn new(options: &'a HubOptions) -> Result<Self, HubError> {
        let text = options.endpoint.trim_end_matches('/');
        let endpoint: Uri = text.parse().map_err(|_| HubError::Endpoint { endpoint: text.to_owned() })?;
        if !is_secure(&endpoint) && !is_local(&endpoint) {
            return Err(HubError::Endpoint { endpoint: text.to_owned() });
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .accept_encoding("identity")
            .user_agent(concat!("fourfold/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .proxy(None)
            .build();
        Ok(Self { options, endpoint, agent: config.into() })
    }

    /// Asks for `path` (with its leading slash) of the endpoint. The status of the answer is still to be looked at.
    ///
    /// # Errors
    /// No answer, too many redirects, or one to an address that is not followed.
    pub(super) fn send(&self, path: &str, ask: Ask) -> Result<Response<Body>, HubError> {
        let start = format!("{}{path}", self.options.endpoint.trim_end_matches('/'));
        let mut address: Uri =
            start.parse().map_err(|_| HubError::Answer { reason: format!("{start:?} is no address") })?;
        for _ in 0..=MOST_REDIRECTS {
            let response = self.once(&address, ask)?;
            if !response.status().is_redirection() || response.status() == StatusCode::NOT_MODIFIED {
                return Ok(response);
            }
            let next = self.next(&address, &response)?;
            if ask == Ask::About && !same_origin(&next, &address) && etag(&response).is_some() {
                return Ok(response);
            }
            address = next;
        }
        Err(HubError::Answer { reason: format!("more than {MOST_REDIRECTS} redirects from {start}") })
    }

    /// One request. The token goes to the endpoint's own scheme, host and port alone.
    fn once(&self, address: &Uri, ask: Ask) -> Result<Response<Body>, HubError> {
        let mut request = match ask {
            Ask::About => self.agent.head(address),
            Ask::Content(_) => self.agent.get(address),
        };
        if let Some(token) = self.options.token.as_ref().filter(|_| same_origin(address, &self.endpoint)) {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if let Ask::Content(from) = ask
            && from > 0
        {
            request = request.header("Range", format!("bytes={from}-"));
        }
        let proxy = self.options.proxies.of(address.scheme_str(), address.host().unwrap_or_default())?;
        request.config().proxy(proxy).build().call().map_err(|error| unreachable(&error, address))
    }

    /// Where a redirect leads, if it may be followed: over https, or from hub to hub on this machine.
    fn next(&self, from: &Uri, response: &Response<Body>) -> Result<Uri, HubError> {
        let location = header(response, "location").unwrap_or_default();
        let refused = || HubError::Answer { reason: format!("a redirect from {} to {location:?}", shown(from)) };
        let text = match (location.starts_with("//"), location.starts_with('/')) {
            (true, _) => format!("{}:{location}", from.scheme_str().unwrap_or("https")),
            (false, true) => {
                let authority = from.authority().map(Authority::as_str).unwrap_or_default();
                format!("{}://{authority}{location}", from.scheme_str().unwrap_or("https"))
            }
            (false, false) => location.to_owned(),
        };
        let next: Uri = text.parse().map_err(|_| refused())?;
        let is_allowed = is_secure(&next) || (is_local(&self.endpoint) && is_local(&next));
        if is_allowed && next.host().is_some_and(|host| !host.is_empty()) { Ok(next) } else { Err(refused()) }
    }
}

/// A header's text.
pub(super) fn header<'r>(response: &'r Response<Body>, name: &str) -> Option<&'r str> {
    response.headers().get(name)?.to_str().ok()
}

/// The ETag of the content itself, where an answer names it: without quotes and the mark of a weak one.
pub(super) fn etag(response: &Response<Body>) -> Option<&str> {
    let value = header(response, "x-linked-etag").or_else(|| header(response, "etag"))?;
    let value = value.strip_prefix("W/").unwrap_or(value).trim_matches('"');
    Some(value).filter(|v| !v.is_empty())
}

/// Sorts an answer's status by what a user can do about it.
pub(super) fn check_status(response: &Response<Body>, what: &str) -> Result<(), HubError> {
    let what = what.to_owned();
    let is_gated = header(response, "x-error-code") == Some("GatedRepo");
    match response.status().as_u16() {
        200..=399 => Ok(()),
        401 | 403 if is_gated => Err(HubError::Denied { what }),
        401 | 404 => Err(HubError::NotFound { what }),
        403 => Err(HubError::Denied { what }),
        code @ (408 | 416 | 429 | 500..=599) => Err(HubError::Unreachable { reason: format!("{what}: status {code}") }),
        code => Err(HubError::Answer { reason: format!("{what}: status {code}") }),
    }
}

fn unreachable(error: &ureq::Error, address: &Uri) -> HubError {
    match error {
        ureq::Error::BadUri(_) | ureq::Error::Http(_) => {
            HubError::Answer { reason: format!("{}: {error}", shown(address)) }
        }
        _ => HubError::Unreachable { reason: format!("{}: {error}", shown(address)) },
    }
}

/// An address for an error: a signed one has a secret behind its question mark.
fn shown(address: &Uri) -> String {
    let (scheme, host) = (address.scheme_str().unwrap_or_default(), address.host().unwrap_or_default());
    format!("{scheme}://{host}{}", address.path())
}

fn is_secure(address: &Uri) -> bool {
    address.scheme_str() == Some("https")
}

/// Whether an address is http to this machine itself.
fn is_local(address: &Uri) -> bool {
    let host = address.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let is_loopback = host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    address.scheme_str() == Some("http") && (is_loopback || host.eq_ignore_ascii_case("localhost"))
}

fn same_origin(a: &Uri, b: &Uri) -> bool {
    let port = |uri: &Uri| uri.port_u16().unwrap_or(if is_secure(uri) { 443 } else { 80 });
    let host = |uri: &Uri| uri.host().unwrap_or_default().to_ascii_lowercase();
    a.scheme_str() == b.scheme_str() && host(a) == host(b) && port(a) == port(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_and_what_is_local() {
        let uri = |text: &str| text.parse::<Uri>().unwrap();
        assert!(same_origin(&uri("https://Hub.co/a"), &uri("https://hub.co:443/b")));
        for other in ["http://hub.co", "https://hub.co:444", "https://cdn.hub.co", "https://hub.co@evil.org/"] {
            assert!(!same_origin(&uri("https://hub.co"), &uri(other)), "{other}");
        }
        for local in ["http://127.0.0.1:8080", "http://localhost/x", "http://[::1]:1", "http://127.9.9.9"] {
            assert!(is_local(&uri(local)), "{local}");
        }
        for far in ["http://hub.co", "http://localhost.evil.org", "http://10.0.0.1", "http://127.0.0.1@evil.org/"] {
            assert!(!is_local(&uri(far)), "{far}");
        }
    }

    #[test]
    fn plain_http_elsewhere_is_refused() {
        for endpoint in ["http://hub.co", "hub.co", "ftp://hub.co", "", "file:///x"] {
            let options = HubOptions { endpoint: endpoint.to_owned(), ..HubOptions::default() };
            assert!(matches!(Client::new(&options).err(), Some(HubError::Endpoint { .. })), "{endpoint}");
        }
    }
}
