//! A server over a tiny random model, and a client of a few lines.
#![allow(dead_code, reason = "each test file uses a part")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use fourfold_infer::engine::{Engine, EngineSettings};
use fourfold_infer::{ChatTemplate, SamplerSettings, Tokenizer};
use fourfold_kernels::{Cpu, CpuOptions, KvDtype};
use fourfold_models::testing::RandomWeights;
use fourfold_models::{Model, spec_from_config};
use fourfold_server::{Limits, Served, serve};
use serde_json::{Value, json};

/// Positions of context.
pub const CONTEXT: usize = 256;
const TEMPLATE: &str = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}\
                        {% if tools %}<tool_call>{{ tools | length }}\n{% endif %}[assistant]{% if thinking %}<think>{% endif %}";
const SPECIAL: [&str; 4] = ["<s>", "</s>", "<think>", "</think>"];

/// A byte-level tokenizer: the special tokens, then the 256 bytes.
pub fn tokenizer_json() -> Value {
    let printable = |b: &u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut vocab = serde_json::Map::new();
    for token in SPECIAL {
        vocab.insert(token.to_owned(), json!(vocab.len()));
    }
    for byte in 0..=255_u32 {
        let nth = (0..byte).filter(|b| !printable(b)).count() as u32;
        let spelled = char::from_u32(if printable(&byte) { byte } else { 256 + nth }).unwrap();
        vocab.insert(spelled.to_string(), json!(vocab.len()));
    }
    let added: Vec<Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({"id": id, "content": content, "special": id < 2, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false})
        })
        .collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
           "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
           "model": {"type": "BPE", "vocab": vocab, "merges": []}})
}

/// The model that is served.
pub fn served(settings: EngineSettings) -> Served {
    let spec = spec_from_config(&json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 260, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false
    }))
    .unwrap();
    let cpu = Arc::new(Cpu::new(CpuOptions { threads: 2, ..CpuOptions::default() }).unwrap());
    let model = Arc::new(Model::load(&spec, &RandomWeights::new(&spec, 3), cpu, &mut |_| {}).unwrap());
    let weight_bytes = model.weight_bytes();
    Served {
        name: "tiny".to_owned(),
        aliases: vec!["alias".to_owned()],
        engine: Engine::start(model, settings).unwrap(),
        tokenizer: Tokenizer::from_bytes(tokenizer_json().to_string().as_bytes()).unwrap(),
        template: ChatTemplate::new(TEMPLATE, &[]).unwrap(),
        template_text: TEMPLATE.to_owned(),
        sampling: SamplerSettings { temperature: 0.0, ..SamplerSettings::default() },
        stop_ids: vec![1],
        vocab_size: 260,
        hidden_size: 32,
        weight_bytes,
    }
}

/// Two at once, four waiting.
pub fn settings() -> EngineSettings {
    EngineSettings { parallel: 2, queue: 4, context: CONTEXT, kv: KvDtype::F16, prefix_bytes: 1 << 20 }
}

/// A running server.
pub struct Server {
    pub address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(limits: Limits) -> Self {
        Self::over(served(settings()), limits)
    }

    pub fn over(served: Served, limits: Limits) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, receiver) = mpsc::channel();
        let told = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let shutdown = async move {
                while !told.load(Ordering::SeqCst) {
                    fourfold_server::sleep(Duration::from_millis(5)).await;
                }
            };
            let any = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0);
            serve(served, limits, any, |address| sender.send(address).unwrap(), shutdown).unwrap();
        });
        Self { address: receiver.recv().unwrap(), stop, thread: Some(thread) }
    }

    /// Tells it to end and waits until it has.
    pub fn end(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// Sends a request and leaves the connection open.
    pub fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> TcpStream {
        let mut stream = self.connect();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {}\r\n{headers}\r\n", body.len());
        // A server that refuses a body early may close before all of it is sent.
        let _ = stream.write_all(&[head.as_bytes(), body].concat());
        stream
    }

    /// A whole exchange: status, head, body.
    pub fn exchange(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> (u16, String, Vec<u8>) {
        let headers = format!("{headers}Connection: close\r\n");
        read_response(self.send(method, path, &headers, body))
    }

    pub fn get(&self, path: &str) -> (u16, String) {
        let (status, _, body) = self.exchange("GET", path, "", b"");
        (status, String::from_utf8(body).unwrap())
    }

    pub fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, _, body) = self.exchange("POST", path, "", body.to_string().as_bytes());
        (status, serde_json::from_slice(&body).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&body))))
    }

    /// The events of a stream.
    pub fn events(&self, path: &str, body: &Value) -> Vec<String> {
        let (status, head, body) = self.exchange("POST", path, "", body.to_string().as_bytes());
        assert_eq!(status, 200, "{}", String::from_utf8_lossy(&body));
        assert!(head.to_lowercase().contains("content-type: text/event-stream"), "{head}");
        let text = String::from_utf8(body).unwrap();
        text.split("\n\n").filter_map(|event| event.strip_prefix("data: ").map(str::to_owned)).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

/// Status, head and body, chunked ones joined.
pub fn read_response(stream: TcpStream) -> (u16, String, Vec<u8>) {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).unwrap() == 0 {
            break;
        }
    }
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    let mut body = Vec::new();
    if head.to_lowercase().contains("transfer-encoding: chunked") {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size).unwrap();
            let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
            let mut chunk = vec![0; size + 2];
            if reader.read_exact(&mut chunk).is_err() || size == 0 {
                break;
            }
            body.extend_from_slice(&chunk[..size]);
        }
    } else {
        let _ = reader.read_to_end(&mut body);
    }
    (status, head, body)
}
