//! The server as a program: with one thread too, and ended by a signal.
#![cfg(unix)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{folder, model};
use serde_json::{Value, json};

/// A child that does not outlive the test.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
    }
}

/// The text of a completion.
fn complete(mut stream: TcpStream, body: &Value) -> String {
    let body = body.to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer}"));
    assert!(head.starts_with("HTTP/1.1 200"), "{answer}");
    serde_json::from_str::<Value>(body).unwrap()["choices"][0]["text"].as_str().unwrap().to_owned()
}

#[test]
fn many_clients_of_one_thread_and_a_signal() {
    let place = folder();
    model(place.path());
    let mut child = Command::new(env!("CARGO_BIN_EXE_fourfold"));
    child.args(["serve", "--port", "0", "--json", "--threads", "1"]).arg(place.path());
    let mut served = Served(child.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap());
    let mut line = String::new();
    BufReader::new(served.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let told: Value = serde_json::from_str(&line).unwrap();
    let address = told["address"].as_str().unwrap().to_owned();
    let connect = &|| {
        let stream = TcpStream::connect(&address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    };
    let body = &|i: usize| json!({ "prompt": format!("the {i}"), "max_tokens": 20, "temperature": 0 });
    let alone: Vec<String> = (0..6).map(|i| complete(connect(), &body(i))).collect();
    let together: Vec<String> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..6).map(|i| scope.spawn(move || complete(connect(), &body(i)))).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    assert_eq!(together, alone);
    let terminated = Command::new("kill").arg(served.0.id().to_string()).status().unwrap();
    assert!(terminated.success());
    assert_eq!(served.0.wait().unwrap().code(), Some(0));
}
