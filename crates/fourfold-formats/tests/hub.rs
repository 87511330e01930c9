//! Fetching by name, against servers of this test's own on 127.0.0.1 that cut connections, forget ranges, deny access, redirect to
//! another host and send another content than they announce.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use common::{f32_bytes, tensors};
use fourfold_formats::hub::{HubError, HubOptions, Progress, Proxies, fetch_with};
use fourfold_formats::{FormatError, open};
use serde_json::json;
use sha1::{Digest, Sha1};
use sha2::Sha256;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server does beside serving.
#[derive(Default)]
struct Behaviour {
    /// How often the connection is cut in the middle of a file's data.
    cuts: usize,
    /// Whether ranges beyond the first byte are ignored.
    ignores_ranges: bool,
    /// The token that is asked for.
    token: Option<&'static str>,
    /// Where weights are said to lie.
    elsewhere: Option<String>,
    /// Whether weights arrive with a flipped bit, for so many times.
    flips: usize,
    /// What is announced of weights instead of their ETag and size.
    announced: Option<(&'static str, u64)>,
}

struct Server {
    options: HubOptions,
    /// Path and range of every request for content.
    requests: Arc<Mutex<Vec<(String, String)>>>,
    /// The token that came with every request, of either kind.
    tokens: Arc<Mutex<Vec<String>>>,
    behaviour: Arc<Mutex<Behaviour>>,
    _cache: tempfile::TempDir,
}

type Files = Vec<(&'static str, Vec<u8>)>;

fn serve(files: Files, behaviour: Behaviour) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let requests = Arc::new(Mutex::new(Vec::new()));
    let tokens = Arc::new(Mutex::new(Vec::new()));
    let behaviour = Arc::new(Mutex::new(behaviour));
    let (seen, state, files) = (Arc::clone(&requests), Arc::clone(&behaviour), Arc::new(files));
    let carried = Arc::clone(&tokens);
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let (seen, state, files) = (Arc::clone(&seen), Arc::clone(&state), Arc::clone(&files));
            let carried = Arc::clone(&carried);
            thread::spawn(move || answer(stream, &files, &seen, &carried, &state));
        }
    });
    let cache = tempfile::tempdir().unwrap();
    let options = HubOptions {
        endpoint,
        cache: cache.path().join("hub"),
        pause: Duration::from_millis(1),
        ..HubOptions::default()
    };
    Server { options, requests, tokens, behaviour, _cache: cache }
}

/// One request, one answer, connection closed.
fn answer(
    mut stream: TcpStream,
    files: &Files,
    seen: &Mutex<Vec<(String, String)>>,
    tokens: &Mutex<Vec<String>>,
    state: &Mutex<Behaviour>,
) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(request) = lines.next() else { return };
    let is_head = request.starts_with("HEAD ");
    let path = request.split(' ').nth(1).unwrap().to_owned();
    let headers: Vec<String> = lines.take_while(|l| !l.is_empty()).collect();
    let header = |name: &str| {
        let found = headers.iter().find_map(|h| h.split_once(": ").filter(|(n, _)| n.eq_ignore_ascii_case(name)));
        found.map(|(_, v)| v.to_owned()).unwrap_or_default()
    };
    let range = header("Range");
    tokens.lock().unwrap().push(header("Authorization"));
    if !is_head {
        seen.lock().unwrap().push((path.clone(), range.clone()));
    }
    let mut state = state.lock().unwrap();
    let mut reply = |status: &str, extra: &str, length: usize, body: &[u8]| {
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{extra}\r\n");
        let body = if is_head { &[] } else { body };
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
    };
    if state.token.is_some_and(|token| header("Authorization") != format!("Bearer {token}")) {
        return reply("401 Unauthorized", "", 0, b"");
    }
    if path.starts_with("/api/models/owner/model/revision/main") {
        let siblings: Vec<_> = files.iter().map(|(name, _)| json!({"rfilename": name})).collect();
        let info = json!({"sha": COMMIT, "siblings": siblings}).to_string();
        return reply("200 OK", "Content-Type: application/json\r\n", info.len(), info.as_bytes());
    }
    let file = path.strip_prefix(&format!("/owner/model/resolve/{COMMIT}/")).or_else(|| path.strip_prefix("/cdn/"));
    let Some((name, bytes)) = file.and_then(|f| files.iter().find(|(name, _)| *name == f)) else {
        return reply("404 Not Found", "", 0, b"");
    };
    let is_weights = name.ends_with(".safetensors");
    let (etag, size) = match state.announced.filter(|_| is_weights) {
        Some((etag, size)) => (etag.to_owned(), size),
        None if is_weights => (sha256(bytes), bytes.len() as u64),
        None => (git_name(bytes), bytes.len() as u64),
    };
    let about = format!("ETag: W/\"other\"\r\nX-Linked-ETag: \"{etag}\"\r\nX-Linked-Size: {size}\r\n");
    if let Some(place) = state.elsewhere.as_ref().filter(|_| is_weights && !path.starts_with("/cdn/")) {
        return reply("302 Found", &format!("{about}Location: {place}/cdn/{name}\r\n"), 0, b"");
    }
    let (begin, end) = range.strip_prefix("bytes=").and_then(|r| r.split_once('-')).unwrap_or(("0", ""));
    let begin: usize = begin.parse().unwrap();
    if begin > 0 && begin >= bytes.len() {
        return reply("416 Range Not Satisfiable", "", 0, b"");
    }
    let (status, begin) = match range.is_empty() || state.ignores_ranges {
        true => ("200 OK", 0),
        false => ("206 Partial Content", begin),
    };
    let end = end.parse().map_or(bytes.len(), |e: usize| e + 1);
    let mut body = bytes[begin..end].to_vec();
    if is_weights && !is_head && state.flips > 0 {
        state.flips -= 1;
        *body.last_mut().unwrap() ^= 1;
    }
    let extra = format!("{about}Content-Range: bytes {begin}-{}/{}\r\n", end - 1, bytes.len());
    let cut = is_weights && !is_head && state.cuts > 0;
    state.cuts -= usize::from(cut);
    reply(status, &extra, body.len(), if cut { &body[..body.len() / 2] } else { &body });
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// What git calls a file, and the hub a small one.
fn git_name(bytes: &[u8]) -> String {
    hex(&Sha1::new().chain_update(format!("blob {}\0", bytes.len())).chain_update(bytes).finalize())
}

/// A model that opens; its weights are some kilobytes.
fn files() -> Files {
    let values: Vec<f32> = (0..2000).map(|i| i as f32).collect();
    vec![
        ("config.json", br#"{"model_type": "test"}"#.to_vec()),
        ("tokenizer.json", b"{}".to_vec()),
        ("README.md", b"not fetched".to_vec()),
        ("model.safetensors", tensors(&[("x.weight", "F32", &[2000], &f32_bytes(&values))])),
    ]
}

#[derive(Default)]
struct Log(Vec<(String, u64, u64)>);

impl Progress for Log {
    fn start(&mut self, file: &str, bytes: u64) {
        self.0.push((file.to_owned(), bytes, 0));
    }
    fn advance(&mut self, bytes: u64) {
        self.0.last_mut().unwrap().2 += bytes;
    }
    fn finish(&mut self) {}
}

fn check_model(dir: &Path) {
    let model = open(dir).unwrap();
    let values = model.weights.load("x.weight").unwrap().to_f32();
    assert!(values.iter().enumerate().all(|(i, &v)| v == i as f32) && values.len() == 2000);
}

fn problem(result: Result<std::path::PathBuf, FormatError>) -> HubError {
    match result {
        Err(FormatError::Hub { repo, problem }) => {
            assert_eq!(repo, "owner/model");
            problem
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_model_is_fetched_once_into_the_cache() {
    let server = serve(files(), Behaviour::default());
    let mut log = Log::default();
    let dir = fetch_with(&server.options, "owner/model", "main", &mut log).unwrap();
    check_model(&dir);
    assert!(dir.ends_with(format!("models--owner--model/snapshots/{COMMIT}")));
    let main = server.options.cache.join("models--owner--model/refs/main");
    assert_eq!(std::fs::read_to_string(main).unwrap(), COMMIT);
    let last = log.0.iter().rev().find(|(file, ..)| file == "model.safetensors").unwrap();
    assert_eq!(last.1, last.2, "progress ends at the total");
    assert!(!server.requests.lock().unwrap().iter().any(|(path, _)| path.contains("README")));
    // Again: the commit is asked for, no file is.
    server.requests.lock().unwrap().clear();
    assert_eq!(fetch_with(&server.options, "owner/model", "main", &mut ()).unwrap(), dir);
    assert_eq!(server.requests.lock().unwrap().len(), 1);
    // Offline, and with a hub that is gone: from the cache.
    let offline = HubOptions { offline: true, endpoint: "http://127.0.0.1:1".to_owned(), ..server.options.clone() };
    assert_eq!(fetch_with(&offline, "owner/model", "main", &mut ()).unwrap(), dir);
    assert_eq!(fetch_with(&offline, "owner/model", COMMIT, &mut ()).unwrap(), dir);
    let gone = HubOptions { offline: false, ..offline.clone() };
    assert_eq!(fetch_with(&gone, "owner/model", "main", &mut ()).unwrap(), dir);
    std::fs::remove_file(dir.join("model.safetensors")).unwrap();
    assert!(matches!(problem(fetch_with(&offline, "owner/model", "main", &mut ())), HubError::Offline { .. }));
    assert!(matches!(problem(fetch_with(&gone, "owner/model", "main", &mut ())), HubError::Unreachable { .. }));
}

#[test]
fn a_cut_download_goes_on_where_it_was_cut() {
    let server = serve(files(), Behaviour { cuts: 2, ..Behaviour::default() });
    let dir = fetch_with(&server.options, "owner/model", "main", &mut ()).unwrap();
    check_model(&dir);
    let requests = server.requests.lock().unwrap();
    let model = &files()[3].1;
    let ranges: Vec<&str> =
        requests.iter().filter(|(p, _)| p.ends_with("model.safetensors")).map(|(_, r)| r.as_str()).collect();
    let half = model.len() / 2;
    let second = half + (model.len() - half) / 2;
    let expected = ["", &format!("bytes={half}-"), &format!("bytes={second}-")];
    assert_eq!(ranges, expected);
}

#[test]
fn a_later_run_goes_on_where_an_earlier_one_was_cut() {
    let server = serve(files(), Behaviour { cuts: 1, ..Behaviour::default() });
    let once = HubOptions { retries: 0, ..server.options.clone() };
    let error = problem(fetch_with(&once, "owner/model", "main", &mut ()));
    assert!(matches!(error, HubError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("model.safetensors"), "{error}");
    let dir = fetch_with(&once, "owner/model", "main", &mut ()).unwrap();
    check_model(&dir);
    let requests = server.requests.lock().unwrap();
    assert!(requests.iter().any(|(_, range)| *range == format!("bytes={}-", files()[3].1.len() / 2)));
}

#[test]
fn a_server_without_ranges_does_not_spoil_the_file() {
    let server = serve(files(), Behaviour { cuts: 1, ignores_ranges: true, ..Behaviour::default() });
    check_model(&fetch_with(&server.options, "owner/model", "main", &mut ()).unwrap());
}

#[test]
fn a_server_without_ranges_that_always_cuts_is_given_up() {
    let server = serve(files(), Behaviour { cuts: usize::MAX, ignores_ranges: true, ..Behaviour::default() });
    let error = problem(fetch_with(&server.options, "owner/model", "main", &mut ()));
    assert!(matches!(error, HubError::Unreachable { .. } | HubError::Length { .. }), "{error}");
}

#[test]
fn a_part_that_was_complete_but_not_renamed_is_no_obstacle() {
    let server = serve(files(), Behaviour::default());
    let blobs = server.options.cache.join("models--owner--model/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    let model = &files()[3].1;
    let blob = blobs.join(sha256(model));
    let wrong = vec![0; model.len()];
    for part in [model.clone(), wrong, vec![0; model.len() + 9], model[..9].to_vec(), vec![1; 9]] {
        std::fs::write(blobs.join(format!("{}.incomplete", sha256(model))), &part).unwrap();
        let dir = fetch_with(&server.options, "owner/model", "main", &mut ()).unwrap();
        check_model(&dir);
        assert_eq!(std::fs::read(&blob).unwrap(), *model);
        std::fs::remove_dir_all(server.options.cache.join("models--owner--model/snapshots")).unwrap();
        std::fs::remove_file(&blob).unwrap();
    }
}

#[test]
fn the_token_goes_to_the_hub_alone() {
    let storage = serve(files(), Behaviour::default());
    let elsewhere = Some(storage.options.endpoint.clone());
    let hub = serve(files(), Behaviour { token: Some("secret"), elsewhere, ..Behaviour::default() });
    let options = HubOptions { token: Some("secret".to_owned()), ..hub.options.clone() };
    check_model(&fetch_with(&options, "owner/model", "main", &mut ()).unwrap());
    let (here, there) = (hub.tokens.lock().unwrap(), storage.tokens.lock().unwrap());
    assert!(here.iter().all(|token| token == "Bearer secret"), "{here:?}");
    assert!(!there.is_empty() && there.iter().all(String::is_empty), "{there:?}");
    assert!(storage.requests.lock().unwrap().iter().all(|(path, _)| path == "/cdn/model.safetensors"));
}

#[test]
fn redirects_to_plain_http_elsewhere_or_without_end_are_not_followed() {
    for place in ["http://hub.example", "ftp://hub.example", "file:///etc", "gopher:", "http://127.0.0.1@hub.example"] {
        let server = serve(files(), Behaviour { elsewhere: Some(place.to_owned()), ..Behaviour::default() });
        let error = problem(fetch_with(&server.options, "owner/model", "main", &mut ())).to_string();
        assert!(error.contains("a redirect from"), "{place}: {error}");
    }
    let server = serve(files(), Behaviour::default());
    // Back to itself, under a name that redirects again.
    let place = format!("{}/owner/model/resolve/{COMMIT}", server.options.endpoint);
    server.behaviour.lock().unwrap().elsewhere = Some(place);
    assert!(fetch_with(&server.options, "owner/model", "main", &mut ()).is_err());
}

#[test]
fn a_content_unlike_what_was_announced_is_refused() {
    let server = serve(files(), Behaviour { flips: 1, ..Behaviour::default() });
    check_model(&fetch_with(&server.options, "owner/model", "main", &mut ()).unwrap());
    let server = serve(files(), Behaviour { flips: usize::MAX, ..Behaviour::default() });
    let error = problem(fetch_with(&server.options, "owner/model", "main", &mut ()));
    assert!(matches!(&error, HubError::Content { announced, .. } if *announced == sha256(&files()[3].1)), "{error}");
    let folder = server.options.cache.join("models--owner--model");
    assert!(
        !folder.join("refs/main").exists() && !folder.join("snapshots").join(COMMIT).join("model.safetensors").exists()
    );
    let length = files()[3].1.len() as u64;
    for size in [length - 1, length + 1] {
        let announced = Some(("an-etag-without-a-hash", size));
        let server = serve(files(), Behaviour { announced, ..Behaviour::default() });
        let error = problem(fetch_with(&server.options, "owner/model", "main", &mut ()));
        assert!(matches!(error, HubError::Length { .. } | HubError::Unreachable { .. }), "{error}");
    }
    for etag in ["../../x", ".hidden", "a/b"] {
        let server = serve(files(), Behaviour { announced: Some((etag, length)), ..Behaviour::default() });
        let error = problem(fetch_with(&server.options, "owner/model", "main", &mut ()));
        assert!(matches!(error, HubError::Answer { .. }), "{error}");
    }
}

/// `huggingface_hub`'s layout: contents by their ETag, links from snapshots, commits under refs.
#[test]
fn the_cache_is_laid_out_as_pythons() {
    let server = serve(files(), Behaviour::default());
    let dir = fetch_with(&server.options, "owner/model", "main", &mut ()).unwrap();
    for (name, bytes) in files().iter().filter(|(name, _)| *name != "README.md") {
        let etag = if name.ends_with(".safetensors") { sha256(bytes) } else { git_name(bytes) };
        assert_eq!(std::fs::read_link(dir.join(name)).unwrap(), Path::new(&format!("../../blobs/{etag}")), "{name}");
    }
    // What is there under its hash is not fetched again.
    std::fs::remove_dir_all(server.options.cache.join("models--owner--model/snapshots")).unwrap();
    server.requests.lock().unwrap().clear();
    check_model(&fetch_with(&server.options, "owner/model", "main", &mut ()).unwrap());
    assert_eq!(server.requests.lock().unwrap().len(), 1);
}

#[test]
fn two_processes_do_not_write_the_same_content() {
    let server = serve(files(), Behaviour::default());
    let locks = server.options.cache.join(".locks/models--owner--model");
    std::fs::create_dir_all(&locks).unwrap();
    let lock = std::fs::File::create(locks.join(format!("{}.lock", sha256(&files()[3].1)))).unwrap();
    lock.lock().unwrap();
    let error = problem(fetch_with(&server.options, "owner/model", "main", &mut ())).to_string();
    assert!(error.contains("another process"), "{error}");
    drop(lock);
    check_model(&fetch_with(&server.options, "owner/model", "main", &mut ()).unwrap());
}

/// A proxy is asked to connect, unless the host is excepted.
#[test]
fn requests_go_through_the_proxy() {
    let server = serve(files(), Behaviour::default());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(Mutex::new(Vec::new()));
    let lines = Arc::clone(&asked);
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut first = String::new();
            let _ = BufReader::new(&stream).read_line(&mut first);
            lines.lock().unwrap().push(first);
            let _ = (&stream).write_all(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n");
        }
    });
    let proxies = Proxies { http: Some(proxy), ..Proxies::default() };
    let through = HubOptions { proxies: proxies.clone(), retries: 0, ..server.options.clone() };
    assert!(matches!(problem(fetch_with(&through, "owner/model", "main", &mut ())), HubError::Unreachable { .. }));
    let place = server.options.endpoint.trim_start_matches("http://").to_owned();
    assert!(asked.lock().unwrap()[0].contains(&place), "{asked:?}");
    let excepted = Proxies { none_for: Some("127.0.0.1".to_owned()), ..proxies };
    let direct = HubOptions { proxies: excepted, ..through };
    check_model(&fetch_with(&direct, "owner/model", "main", &mut ()).unwrap());
}

#[test]
fn shards_are_fetched_by_the_index() {
    let index = r#"{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}"#;
    let server = serve(
        vec![
            ("config.json", b"{}".to_vec()),
            ("model.safetensors.index.json", index.as_bytes().to_vec()),
            ("m-1.safetensors", tensors(&[("a", "F32", &[1], &f32_bytes(&[1.0]))])),
            ("m-2.safetensors", tensors(&[("b", "F32", &[1], &f32_bytes(&[2.0]))])),
            ("other.safetensors", b"not fetched".to_vec()),
        ],
        Behaviour::default(),
    );
    let dir = fetch_with(&server.options, "owner/model", "main", &mut ()).unwrap();
    assert_eq!(open(&dir).unwrap().weights.load("b").unwrap().to_f32(), [2.0]);
    assert!(!dir.join("other.safetensors").exists());
}

#[test]
fn refusals_say_what_to_do() {
    let server = serve(files(), Behaviour { token: Some("secret"), ..Behaviour::default() });
    let error = problem(fetch_with(&server.options, "owner/model", "main", &mut ())).to_string();
    assert!(error.contains("HF_TOKEN"), "{error}");
    let known = HubOptions { token: Some("secret".to_owned()), ..server.options.clone() };
    check_model(&fetch_with(&known, "owner/model", "main", &mut ()).unwrap());
    server.behaviour.lock().unwrap().token = None;
    let error = problem(fetch_with(&server.options, "owner/model", "gone", &mut ()));
    assert!(matches!(error, HubError::NotFound { .. }), "{error}");
    let error = fetch_with(&server.options, "../model", "main", &mut ()).unwrap_err().to_string();
    assert!(error.contains("no name of a repository"), "{error}");
}
