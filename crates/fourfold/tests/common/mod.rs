//! A tiny random model on disk, and runs of the program.

#![allow(dead_code, reason = "each test file uses a part")]

pub mod train;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use fourfold_models::spec_from_config;
use fourfold_models::testing::RandomWeights;
use fourfold_tensor::WeightSource;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// A directory that is removed with the value.
pub type Folder = tempfile::TempDir;

/// A new empty directory.
pub fn folder() -> Folder {
    tempfile::tempdir().unwrap()
}

/// The configuration of the tiny model.
pub fn config() -> Value {
    json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 260, "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "eos_token_id": 1, "bos_token_id": 0
    })
}

/// A byte-level tokenizer: ids 0 and 1 are special, the rest are bytes and two merges.
pub fn tokenizer() -> Value {
    let mut vocab = serde_json::Map::new();
    let mut add = |token: String| {
        let id = vocab.len();
        vocab.insert(token, json!(id));
    };
    add("<s>".into());
    add("</s>".into());
    for byte in 0..=255_u32 {
        let printable = |b: &u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
        let nth = (0..byte).filter(|b| !printable(b)).count() as u32;
        add(char::from_u32(if printable(&byte) { byte } else { 256 + nth }).unwrap().to_string());
    }
    add("th".into());
    add("the".into());
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false})
    };
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special(0, "<s>"), special(1, "</s>")],
        "normalizer": null, "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": ["t h", "th e"]}
    })
}

/// Writes the tiny model in bf16 as a Hugging Face directory.
pub fn model(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    let put = |name: &str, value: &Value| fs::write(dir.join(name), value.to_string()).unwrap();
    put("config.json", &config());
    put("tokenizer.json", &tokenizer());
    put(
        "tokenizer_config.json",
        &json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true,
        "chat_template": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"}),
    );
    put("generation_config.json", &json!({"temperature": 0.9, "top_k": 20, "eos_token_id": 1}));
    fs::write(dir.join("model.safetensors"), weights(&config())).unwrap();
}

/// Random bf16 weights of a configuration as a safetensors file.
pub fn weights(config: &Value) -> Vec<u8> {
    let spec = spec_from_config(config).unwrap();
    let source = RandomWeights::new(&spec, 7);
    let bf16 = |v: f32| [(v.to_bits() >> 16) as u8, (v.to_bits() >> 24) as u8];
    let tensors: HashMap<String, (Vec<usize>, Vec<u8>)> = source
        .tensors()
        .iter()
        .map(|info| {
            let values = source.load(&info.name).unwrap().to_f32();
            (info.name.clone(), (info.shape.clone(), values.into_iter().flat_map(bf16).collect()))
        })
        .collect();
    let views = tensors
        .iter()
        .map(|(name, (shape, data))| (name.clone(), TensorView::new(Dtype::BF16, shape.clone(), data).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

/// Some text, of about so many tokens.
pub fn text(dir: &Path, tokens: usize) -> PathBuf {
    let file = dir.join(format!("text{tokens}.txt"));
    let line = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs.\n";
    fs::write(&file, line.repeat(tokens / 80 + 1)).unwrap();
    file
}

/// Makes attempts to stop a run in its middle, until one says that it did. When a run is stopped is in the hands of the
/// machine: a fast or a busy one may end it before.
pub fn until_stopped(attempt: impl FnMut(u32) -> bool) {
    assert!((1..=20).any(attempt), "each of 20 runs had ended before it was stopped");
}

/// Runs a compression into `out` and kills it as soon as its journal has so many lines: whether it was in its middle, with `out` absent and
/// something to go on from.
pub fn killed_at(lines: usize, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>, out: &Path) -> bool {
    let mut child = command(arguments).stdout(Stdio::null()).spawn().unwrap();
    let journal = PathBuf::from(format!("{}.partial", out.display())).join("fourfold-journal.jsonl");
    let written = || fs::read_to_string(&journal).map_or(0, |text| text.lines().count());
    let begun = Instant::now();
    while written() < lines && begun.elapsed() < Duration::from_secs(60) && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_micros(200));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    !out.exists() && journal.exists()
}

/// A run of the program.
pub struct Run {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    /// What a process that has ended left.
    pub fn of(output: &Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let run = Self { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) };
        assert!(!run.stderr.contains("panicked") && !run.stderr.contains("a bug in"), "{}", run.stderr);
        run
    }

    /// A run that succeeded.
    pub fn succeeded(&self) -> &Self {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self
    }

    /// The report of a run that succeeded.
    pub fn json(&self) -> Value {
        self.succeeded();
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {}", self.stdout))
    }

    /// The error line of a run that failed: with exit code 2 where it begins with an option's name, else with 1.
    pub fn error(&self) -> &str {
        let line = self.stderr.lines().last().unwrap_or_default();
        assert!(line.starts_with("error: "), "{}", self.stderr);
        let code = if line.starts_with("error: --") { 2 } else { 1 };
        assert_eq!(self.code, Some(code), "stdout {}, stderr {}", self.stdout, self.stderr);
        line
    }
}

/// The program, with these arguments, on two threads.
pub fn command<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fourfold"));
    command.args(args).args(["--threads", "2"]).stdin(Stdio::null());
    command
}

/// Runs it to its end.
pub fn fourfold<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Run {
    Run::of(&command(args).output().unwrap())
}

/// Runs it with something on stdin.
pub fn fourfold_with_input<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>, input: &str) -> Run {
    let mut child = command(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    Run::of(&child.wait_with_output().unwrap())
}

/// Arguments of paths and words.
#[macro_export]
macro_rules! args {
    ($($arg:expr),* $(,)?) => { [$(std::ffi::OsString::from($arg)),*] };
}
