//! Clients that misbehave: each is refused or dropped, and the next one is served.

mod support;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use fourfold_infer::engine::EngineSettings;
use fourfold_server::Limits;
use serde_json::{Value, json};
use support::{Server, read_response, served, settings};

fn ask(tokens: usize) -> Value {
    json!({ "prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": true })
}

fn serves(server: &Server) {
    let (status, answer) = server.post("/v1/completions", &ask(4));
    assert_eq!(status, 200, "{answer}");
}

fn metric(server: &Server, name: &str) -> u64 {
    let (_, text) = server.get("/metrics");
    let line =
        text.lines().find(|line| line.starts_with(&format!("fourfold_{name} "))).unwrap_or_else(|| panic!("{text}"));
    line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64
}

/// Waits for something that comes about by itself.
fn until(what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed() < Duration::from_secs(60), "it never came about");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn bodies_that_are_no_request() {
    let server = Server::start(Limits { body_bytes: 4096, ..Limits::default() });
    let deep = format!("{{\"messages\":{}{}}}", "[".repeat(1500), "]".repeat(1500));
    for (body, status) in [
        (b"".to_vec(), 400),
        (b"{".to_vec(), 400),
        (b"[]".to_vec(), 400),
        (b"\xff\xfe{}".to_vec(), 400),
        (b"{\"messages\":\"\xc3\x28\"}".to_vec(), 400),
        (deep.into_bytes(), 400),
        (vec![b' '; 5000], 413),
    ] {
        let shown = String::from_utf8_lossy(&body[..body.len().min(20)]).into_owned();
        let (got, _, answer) = server.exchange("POST", "/v1/chat/completions", "", &body);
        assert_eq!(got, status, "{shown}");
        let answer: Value = serde_json::from_slice(&answer).unwrap();
        assert_eq!(answer["error"]["type"], "invalid_request_error", "{shown}");
    }
    // A body that is announced as a gigabyte is refused by what arrives, not by waiting for it.
    let mut stream = server.connect();
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let _ = stream.write_all(&[b' '; 8192]);
    assert_eq!(read_response(stream).0, 413);
    serves(&server);
}

#[test]
fn a_key_is_asked_for_everywhere_but_at_the_door() {
    let server = Server::start(Limits { api_key: Some("secret".to_owned()), ..Limits::default() });
    let body = ask(2).to_string();
    let with = |header: &str| server.exchange("POST", "/v1/completions", header, body.as_bytes());
    for header in
        ["", "Authorization: Bearer secre\r\n", "Authorization: Bearer secrets\r\n", "Authorization: secret\r\n"]
    {
        let (status, head, answer) = with(header);
        assert_eq!(status, 401, "{header}");
        assert!(head.to_lowercase().contains("www-authenticate: bearer"));
        assert!(!String::from_utf8_lossy(&answer).contains("secret"));
    }
    assert_eq!(with("Authorization: Bearer secret\r\n").0, 200);
    assert_eq!(with("x-api-key: secret\r\n").0, 200);
    assert_eq!((server.get("/health").0, server.get("/").0), (200, 200));
    for path in ["/v1/models", "/props", "/slots", "/metrics"] {
        assert_eq!(server.get(path).0, 401, "{path}");
    }
}

#[test]
fn other_origins_are_kept_out_unless_asked_for() {
    let origin = "Origin: http://elsewhere.example\r\n";
    let allowed = |limits: Limits| {
        let (_, head, _) = Server::start(limits).exchange("GET", "/v1/models", origin, b"");
        head.to_lowercase().contains("access-control-allow-origin")
    };
    assert!(!allowed(Limits::default()));
    assert!(allowed(Limits { any_origin: true, ..Limits::default() }));
}

#[test]
fn a_client_that_goes_away_frees_its_place() {
    let server = Server::start(Limits::default());
    for stream in [true, false] {
        let slow = json!({ "prompt": "x", "max_tokens": 240, "ignore_eos": true, "n": 4, "stream": stream });
        // Four answers for two places: some are still waiting when the client goes.
        let connection = server.send("POST", "/v1/completions", "", slow.to_string().as_bytes());
        until(|| metric(&server, "requests_running") > 0 || metric(&server, "requests_completed_total") > 0);
        drop(connection);
        until(|| metric(&server, "requests_running") == 0 && metric(&server, "requests_waiting") == 0);
    }
    serves(&server);
}

#[test]
fn a_flood_is_refused_and_what_was_taken_is_answered() {
    let server = Server::over(served(EngineSettings { parallel: 1, queue: 2, ..settings() }), Limits::default());
    let connections: Vec<_> = (0..24)
        .map(|_| server.send("POST", "/v1/completions", "Connection: close\r\n", ask(120).to_string().as_bytes()))
        .collect();
    let statuses: Vec<u16> = connections.into_iter().map(|connection| read_response(connection).0).collect();
    assert!(statuses.iter().all(|status| [200, 429].contains(status)), "{statuses:?}");
    assert!(statuses.contains(&200), "{statuses:?}");
    serves(&server);
}

#[test]
fn half_open_and_slow_connections_end() {
    let server = Server::start(Limits { client_time: Duration::from_millis(300), ..Limits::default() });
    let mut half = server.connect();
    write!(half, "POST /v1/completions HTTP/1.1\r\nHost:").unwrap();
    let mut silent = server.connect();
    let mut slow = server.connect();
    write!(slow, "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\nConnection: close\r\n\r\n{{")
        .unwrap();
    assert_eq!(read_response(slow).0, 408);
    let mut rest = Vec::new();
    let _ = half.read_to_end(&mut rest);
    let _ = silent.read_to_end(&mut rest);
    until(|| metric(&server, "connections") == 1);
    serves(&server);
}

#[test]
fn a_reader_that_does_not_read_is_given_up() {
    let server = Server::start(Limits { client_time: Duration::from_millis(200), ..Limits::default() });
    let body = json!({ "prompt": "x", "max_tokens": 200, "stream": true, "ignore_eos": true, "n": 4, "logprobs": 20 });
    let held = server.send("POST", "/v1/completions", "", body.to_string().as_bytes());
    until(|| metric(&server, "requests_running") == 0 && metric(&server, "requests_waiting") == 0);
    serves(&server);
    drop(held);
}

#[test]
fn connections_beyond_the_limit_wait() {
    let server = Server::start(Limits { connections: 2, ..Limits::default() });
    let held = [server.connect(), server.connect()];
    let third = server.send("GET", "/health", "Connection: close\r\n", b"");
    std::thread::sleep(Duration::from_millis(100));
    held.iter().for_each(|stream| stream.shutdown(Shutdown::Both).unwrap());
    assert_eq!(read_response(third).0, 200);
}

#[test]
fn an_answer_that_takes_too_long_ends() {
    let server = Server::start(Limits { answer_time: Duration::ZERO, ..Limits::default() });
    let (status, answer) = server.post("/v1/completions", &ask(200));
    assert_eq!((status, answer["error"]["type"].as_str()), (504, Some("timeout_error")));
}

#[test]
fn running_answers_end_before_the_server_does() {
    let mut server = Server::start(Limits::default());
    let (_, expected) = server.post("/v1/completions", &ask(200));
    let connection = server.send("POST", "/v1/completions", "", ask(200).to_string().as_bytes());
    until(|| metric(&server, "requests_accepted_total") == 2);
    server.end();
    let (status, _, body) = read_response(connection);
    assert_eq!(status, 200);
    let answer: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(answer["choices"][0]["text"], expected["choices"][0]["text"]);
}

#[test]
fn a_crowd_is_answered_as_each_alone() {
    let server = Server::over(served(EngineSettings { parallel: 8, queue: 256, ..settings() }), Limits::default());
    let body = |i: usize| json!({ "prompt": format!("{}{i}", "shared ".repeat(10 + i % 3)), "max_tokens": 5 + i % 40 });
    let alone: Vec<Value> =
        (0..60).map(|i| server.post("/v1/completions", &body(i)).1["choices"][0]["text"].clone()).collect();
    for _ in 0..3 {
        let connections: Vec<_> = (0..60)
            .map(|i| server.send("POST", "/v1/completions", "Connection: close\r\n", body(i).to_string().as_bytes()))
            .collect();
        for (i, connection) in connections.into_iter().enumerate() {
            let (status, _, answer) = read_response(connection);
            assert_eq!(status, 200);
            let answer: Value = serde_json::from_slice(&answer).unwrap();
            assert_eq!(answer["choices"][0]["text"], alone[i], "request {i}");
        }
    }
}
