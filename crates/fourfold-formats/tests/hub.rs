//! Fetching by name, against a server of this test's own on 127.0.0.1 that cuts connections, forgets ranges and denies access.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use common::{f32_bytes, tensors};
use fourfold_formats::hub::{HubError, HubOptions, Progress, fetch_with};
use fourfold_formats::{FormatError, open};
use serde_json::json;

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
}

struct Server {
    options: HubOptions,
    /// Path and range of every request.
    requests: Arc<Mutex<Vec<(String, String)>>>,
    behaviour: Arc<Mutex<Behaviour>>,
    _cache: tempfile::TempDir,
}

type Files = Vec<(&'static str, Vec<u8>)>;

fn serve(files: Files, behaviour: Behaviour) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let requests = Arc::new(Mutex::new(Vec::new()));
    let behaviour = Arc::new(Mutex::new(behaviour));
    let (seen, state, files) = (Arc::clone(&requests), Arc::clone(&behaviour), Arc::new(files));
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let (seen, state, files) = (Arc::clone(&seen), Arc::clone(&state), Arc::clone(&files));
            thread::spawn(move || answer(stream, &files, &seen, &state));
        }
    });
    let cache = tempfile::tempdir().unwrap();
    let options = HubOptions {
        endpoint,
        cache: cache.path().join("hub"),
        pause: Duration::from_millis(1),
        ..HubOptions::default()
    };
    Server { options, requests, behaviour, _cache: cache }
}

/// One request, one answer, connection closed.
fn answer(mut stream: TcpStream, files: &Files, seen: &Mutex<Vec<(String, String)>>, state: &Mutex<Behaviour>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(request) = lines.next() else { return };
    let path = request.split(' ').nth(1).unwrap().to_owned();
    let headers: Vec<String> = lines.take_while(|l| !l.is_empty()).collect();
    let header = |name: &str| {
        let found = headers.iter().find_map(|h| h.split_once(": ").filter(|(n, _)| n.eq_ignore_ascii_case(name)));
        found.map(|(_, v)| v.to_owned()).unwrap_or_default()
    };
    let range = header("Range");
    seen.lock().unwrap().push((path.clone(), range.clone()));
    let mut state = state.lock().unwrap();
    let mut reply = |status: &str, extra: &str, length: usize, body: &[u8]| {
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{extra}\r\n");
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
    let file = path.strip_prefix(&format!("/owner/model/resolve/{COMMIT}/"));
    let Some((name, bytes)) = file.and_then(|f| files.iter().find(|(name, _)| *name == f)) else {
        return reply("404 Not Found", "", 0, b"");
    };
    let (begin, end) = range.strip_prefix("bytes=").and_then(|r| r.split_once('-')).unwrap_or(("0", ""));
    let begin: usize = begin.parse().unwrap();
    if begin > 0 && begin >= bytes.len() {
        return reply("416 Range Not Satisfiable", "", 0, b"");
    }
    let (status, begin) = match state.ignores_ranges && begin > 0 {
        true => ("200 OK", 0),
        false => ("206 Partial Content", begin),
    };
    let end = end.parse().map_or(bytes.len(), |e: usize| e + 1);
    let body = &bytes[begin..end];
    let extra = format!(
        "ETag: \"etag-{name}\"\r\nx-repo-commit: {COMMIT}\r\nContent-Range: bytes {begin}-{}/{}\r\n",
        end - 1,
        bytes.len()
    );
    // Only data are cut, not the one byte that asks for a file's length.
    let cut = name.ends_with(".safetensors") && body.len() > 1 && state.cuts > 0;
    state.cuts -= usize::from(cut);
    reply(status, &extra, body.len(), if cut { &body[..body.len() / 2] } else { body });
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
    let expected =
        ["bytes=0-0", "bytes=0-", "bytes=0-0", &format!("bytes={half}-"), "bytes=0-0", &format!("bytes={second}-")];
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
fn a_part_that_was_complete_but_not_renamed_is_no_obstacle() {
    let server = serve(files(), Behaviour::default());
    let blobs = server.options.cache.join("models--owner--model/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    let model = &files()[3].1;
    for length in [model.len(), model.len() + 9] {
        std::fs::write(blobs.join("etag-model.part"), vec![0; length]).unwrap();
        let dir = fetch_with(&server.options, "owner/model", "main", &mut ()).unwrap();
        check_model(&dir);
        std::fs::remove_dir_all(server.options.cache.join("models--owner--model/snapshots")).unwrap();
        std::fs::remove_file(blobs.join("etag-model.safetensors")).unwrap();
    }
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
