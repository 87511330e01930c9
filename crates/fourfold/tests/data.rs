//! Data files as people have them: read as rows whatever their form, or refused by name; and what a run says of them.

mod common;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use common::{fourfold, model};
use serde_json::{Value, json};

struct Place {
    folder: tempfile::TempDir,
    base: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("base");
        model(&base);
        Self { folder, base }
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }

    /// What the first example of a file is, and where it came from.
    fn shown(&self, data: &Path, more: &[&str]) -> Value {
        let mut arguments = args!["train", "--model", &self.base, "--data", data, "--show-data", "--json"].to_vec();
        arguments.extend(more.iter().map(Into::into));
        fourfold(arguments).json()
    }

    fn train(&self, data: &Path, more: &[&str]) -> common::Run {
        let out = self.folder.path().join("out");
        let _ = fs::remove_dir_all(&out);
        let mut arguments =
            args!["train", "--model", &self.base, "--data", data, "-o", &out, "-c", "32", "--json"].to_vec();
        if !more.contains(&"--steps") {
            arguments.extend(args!["--steps", "1"]);
        }
        arguments.extend(more.iter().map(Into::into));
        fourfold(arguments)
    }

    fn refused(&self, data: &Path, more: &[&str]) -> String {
        self.train(data, more).error().to_owned()
    }
}

/// The texts of learned and of given tokens.
fn texts(shown: &Value) -> (String, String) {
    let tokens = shown["example"].as_array().unwrap();
    let of = |learned: bool| {
        tokens.iter().filter(|t| t["learned"] == learned).map(|t| t["text"].as_str().unwrap()).collect()
    };
    (of(true), of(false))
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A Zstandard frame with one block as it is.
fn zstandard(bytes: &[u8]) -> Vec<u8> {
    let size = u16::try_from(bytes.len()).unwrap() - 256;
    let block = ((bytes.len() as u32) << 3 | 1).to_le_bytes();
    [&[0x28, 0xb5, 0x2f, 0xfd, 0x60][..], &size.to_le_bytes(), &block[..3], bytes].concat()
}

#[test]
fn rows_are_the_same_whatever_their_file_is() {
    let place = Place::new();
    let row = |i: usize| json!({"messages": [{"role": "user", "content": format!("hi {i}")}, {"role": "assistant", "content": "yo"}]});
    let rows: Vec<Value> = (0..20).map(row).collect();
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    let list = serde_json::to_string_pretty(&rows).unwrap();
    let expected = place.shown(&place.write("ok.jsonl", &lines), &[]);
    let (learned, given) = texts(&expected);
    assert!(learned.contains("yo") && given.contains("hi 0") && !learned.contains("hi"), "{learned:?} {given:?}");
    let parts = |i: usize| {
        format!(
            "\"[{{\"\"from\"\": \"\"human\"\", \"\"value\"\": \"\"hi {i}\"\"}}, {{\"\"from\"\": \"\"gpt\"\", \"\"value\"\": \"\"yo\"\"}}]\"\n"
        )
    };
    let csv = format!("conversations\n{}", (0..20).map(parts).collect::<String>());
    let files = [
        ("DATA.JSONL", lines.clone().into_bytes()),
        ("data.ndjson", lines.clone().into_bytes()),
        ("data.json", list.clone().into_bytes()),
        ("lines.json", lines.clone().into_bytes()),
        ("mark.jsonl", format!("\u{feff}{lines}").into_bytes()),
        ("returns.jsonl", lines.replace('\n', "\r\n").into_bytes()),
        ("packed.jsonl.gz", gzip(lines.as_bytes())),
        ("packed.json.ZST", zstandard(list.as_bytes())),
        ("data.csv", csv.into_bytes()),
        ("folder/inner/a.jsonl", lines.clone().into_bytes()),
    ];
    for (name, bytes) in files {
        let path = place.write(name, bytes);
        let path = if name.starts_with("folder") { place.folder.path().join("folder") } else { path };
        assert_eq!(place.shown(&path, &[])["example"], expected["example"], "{name}");
        let run = place.train(&path, &[]);
        assert_eq!(run.json()["steps"], 1, "{name}");
        assert!(run.stderr.contains("rows: 20 of "), "{name}: {}", run.stderr);
    }
    let unnamed = place.write("data.txt", &lines);
    assert!(place.refused(&unnamed, &[]).contains("data.txt: holds JSON, and its name does not say so"));
    assert_eq!(place.shown(&unnamed, &["--data-format", "jsonl"])["example"], expected["example"]);
    let (learned, _) = texts(&place.shown(&unnamed, &["--data-format", "text"]));
    assert!(learned.contains("\"messages\""), "{learned}");
}

#[test]
fn rows_with_nothing_to_learn_are_left_out_before_the_split() {
    let place = Place::new();
    let good = json!({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]});
    let system = json!({"messages": [{"role": "system", "content": "x"}]});
    let mixed: String = [&good, &system].iter().flat_map(|row| (0..10).map(move |_| format!("{row}\n"))).collect();
    let run = place.train(&place.write("mixed.jsonl", mixed), &[]);
    assert_eq!(run.json()["steps"], 1);
    let expected = "10 of 20 rows have nothing to learn and are left out, the first: ";
    assert!(run.stderr.contains(expected) && run.stderr.contains("mixed.jsonl:11"), "{}", run.stderr);
    let nothing = place.write("system.jsonl", format!("{system}\n").repeat(20));
    assert!(place.refused(&nothing, &[]).ends_with("system.jsonl: no row has an answer to learn"));
    let short = place.write("short.jsonl", "{\"text\": \"ab\"}\n");
    assert!(place.refused(&short, &[]).contains("--held-out 0 learns all of it"));
    assert_eq!(place.train(&short, &["--held-out", "0"]).json()["steps"], 1);
    let silent = place.write("silent.csv", "prompt,completion\na,\nb, \n");
    assert!(place.refused(&silent, &[]).contains("no row has an answer to learn"));
}

#[test]
fn what_a_template_does_not_write_is_counted() {
    let place = Place::new();
    let template = "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}\n{% endfor %}\
                    {% if add_generation_prompt %}[assistant]{% endif %}";
    fs::write(place.base.join("chat_template.jinja"), template).unwrap();
    let call = json!([{"type": "function", "function": {"name": "weather", "arguments": {}}}]);
    let tools = json!([{"type": "function", "function": {"name": "weather", "parameters": {}}}]);
    let user = json!({"role": "user", "content": "hi"});
    let answer = json!({"role": "assistant", "content": "yo"});
    let rows = [
        json!({"messages": [user, {"role": "assistant", "content": "yo", "reasoning_content": "hm m"}]}),
        json!({"messages": [{"role": "system", "content": "be nice"}, user, answer]}),
        json!({"tools": tools, "messages": [user, answer]}),
        json!({"tools": tools, "messages": [user, {"role": "assistant", "content": null, "tool_calls": call}]}),
    ];
    let all: String = (0..5).flat_map(|_| rows.iter().map(|row| format!("{row}\n"))).collect();
    let run = place.train(&place.write("rows.jsonl", &all), &[]);
    assert_eq!(run.json()["steps"], 1);
    let said = "the chat template does not write what rows hold: calls of tools (5 rows), system messages (5 rows), thoughts (5 rows), \
                tools (10 rows)";
    assert!(run.stderr.contains(said), "{}", run.stderr);
    assert!(run.stderr.contains("5 of 20 rows have nothing to learn and are left out, the first: "), "{}", run.stderr);
    // A template that writes all of it.
    let template = "{{ tools | tojson if tools }}{% for m in messages %}[{{ m.role }}]{{ m.reasoning_content }}{{ m.content }}\
                    {{ m.tool_calls | tojson if m.tool_calls }}\n{% endfor %}";
    fs::write(place.base.join("chat_template.jinja"), template).unwrap();
    let run = place.train(&place.write("rows.jsonl", &all), &[]);
    assert_eq!(run.json()["steps"], 1);
    assert!(!run.stderr.contains("does not write") && !run.stderr.contains("left out"), "{}", run.stderr);
}

#[test]
fn what_is_not_understood_is_refused_by_name() {
    let place = Place::new();
    let utf16: Vec<u8> = "{\"text\": \"hello\"}\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
    for (name, bytes, expected) in [
        ("u.jsonl", [&[0xff, 0xfe][..], &utf16].concat(), "u.jsonl:1: UTF-16LE text"),
        ("n.txt", utf16, "n.txt:1: UTF-16LE text"),
        ("l.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"caf\xe9\"}\n".to_vec(), "l.jsonl:2: byte 14 of the line (0xe9)"),
        ("l.txt", b"fine\ncaf\xe9\n".to_vec(), "l.txt:2: byte 4 of the line (0xe9)"),
        ("q.jsonl", b"{\"question\": \"a\", \"answer\": \"b\"}\n".to_vec(), "--prompt-column and --completion-column"),
        ("t.jsonl", b"{\"text\": \"a\"}\n{\"text\": 3}\n".to_vec(), "t.jsonl:2: column `text`: a number where"),
        ("c.csv", b"text,label\na\n".to_vec(), "c.csv:2: 1 values between commas, the header names 2"),
        ("p.jsonl", b"{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}\n".to_vec(), "preference data"),
        ("x.parquet", b"PAR1".to_vec(), "x.parquet"),
        ("z.jsonl.gz", b"plain".to_vec(), "neither gzip nor Zstandard"),
        ("a.jsonl", b"[{\"text\": \"a\"}]\n".to_vec(), "a.jsonl:1: a list where a JSON object"),
    ] {
        let found = place.refused(&place.write(name, bytes), &[]);
        assert!(found.contains(expected), "{name}: {found}");
    }
    assert!(place.refused(Path::new("/dev/zero"), &[]).contains("regular files"));
    let mapped = place.write("m.jsonl", "{\"question\": \"2+2?\", \"answer\": \"4\", \"id\": 7}\n".repeat(20));
    let columns = ["--prompt-column", "question", "--completion-column", "answer"];
    let (learned, given) = texts(&place.shown(&mapped, &columns));
    assert!(learned.starts_with('4') && given.contains("2+2?"), "{learned} {given}");
    let run = place.train(&mapped, &columns);
    assert!(run.succeeded().stderr.contains("columns that are not read: id (20 rows)"), "{}", run.stderr);
}

#[test]
fn instructions_go_through_the_template_or_are_written_as_alpaca_does() {
    let place = Place::new();
    let row = json!({"instruction": "Add.", "input": "1 2", "output": "3"});
    let data = place.write("alpaca.json", json!([row]).to_string());
    let shown = place.shown(&data, &[]);
    let (learned, given) = texts(&shown);
    assert!(given.contains("[user]Add.\n1 2") && learned.starts_with('3'), "{given:?} {learned:?}");
    assert!(shown["source"].as_str().unwrap().contains("the model's chat template"), "{shown}");
    let file = place.base.join("tokenizer_config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    config.as_object_mut().unwrap().remove("chat_template");
    fs::write(&file, config.to_string()).unwrap();
    let shown = place.shown(&data, &[]);
    let (learned, given) = texts(&shown);
    assert!(given.ends_with("### Input:\n1 2\n\n### Response:") && learned.starts_with('3'), "{given:?} {learned:?}");
    assert!(shown["source"].as_str().unwrap().contains("Stanford Alpaca's prompt"), "{shown}");
    let system = place.write("s.jsonl", json!({"instruction": "a", "output": "b", "system": "c"}).to_string());
    assert!(place.refused(&system, &[]).contains("need a model with a chat template"));
}

#[test]
fn texts_with_a_class_come_as_rows_of_any_form() {
    let place = Place::new();
    let text = |i: usize| (format!("the fox, number {i}"), ["bad", "good"][i % 2]);
    let json: Vec<Value> = (0..40).map(text).map(|(t, l)| json!({"sentence": t, "label": l})).collect();
    let csv: String = (0..40).map(text).map(|(t, l)| format!("\"{t}\",{l}\n")).collect();
    let tsv: String = (0..40).map(text).map(|(t, l)| format!("{t}\t{l}\n")).collect();
    let arguments = ["--task", "classification", "--held-out", "0"];
    let mut losses = Vec::new();
    for (name, text) in [
        ("c.tsv", tsv.clone()),
        ("h.tsv", format!("text\tlabel\n{tsv}")),
        ("c.csv", format!("text,label\n{csv}")),
        ("c.json", Value::from(json).to_string()),
    ] {
        losses.push(place.train(&place.write(name, text), &arguments).json()["training_loss"].as_f64().unwrap());
    }
    assert!(losses.iter().all(|loss| *loss == losses[0]), "{losses:?}");
    let other = place.write("o.csv", format!("body,class\n{csv}"));
    let found = place.refused(&other, &arguments);
    assert!(found.contains("column `label` is missing") && found.contains("--label-column"), "{found}");
    let mapped = [&arguments[..], &["--text-column", "body", "--label-column", "class"]].concat();
    assert_eq!(place.train(&other, &mapped).json()["training_loss"].as_f64(), Some(losses[0]));
}

#[test]
fn a_run_says_from_where_to_where_and_refuses_what_would_be_a_guess() {
    let place = Place::new();
    let data = place.write("text.txt", "the quick brown fox jumps over the lazy dog\r\n".repeat(50));
    let run = place.train(&data, &["--steps", "2", "--lr", "1e-3", "--min-learning-rate", "1e-4"]);
    let report = run.json();
    let (before, after) = (report["held_out_loss_before"].as_f64().unwrap(), report["held_out_loss"].as_f64().unwrap());
    assert!(after < before, "{report}");
    assert!(run.stderr.contains("line ends CR LF"), "{}", run.stderr);
    for (more, expected) in [
        (&["--epochs", "0"][..], "--epochs"),
        (&["--min-learning-rate", "1"], "--min-learning-rate 1"),
        (&["--text-column", "a", "--messages-column", "b"], "different layouts"),
    ] {
        let arguments = args!["train", "--model", &place.base, "--data", &data, "-o", place.folder.path().join("no")];
        let run = fourfold(arguments.into_iter().chain(more.iter().map(Into::into)));
        assert_eq!(run.code, Some(2), "{more:?}: {}", run.stderr);
        assert!(run.stderr.contains(expected), "{}", run.stderr);
    }
    let run = fourfold(args![
        "train",
        "--model",
        &place.base,
        "--data",
        &data,
        "-o",
        place.folder.path().join("no"),
        "-c",
        "100000"
    ]);
    assert!(run.error().contains("is its most"), "{}", run.stderr);
    assert!(!place.folder.path().join("no").exists());
    let run = fourfold(args!["plan", &place.base, "--memory", "8"]);
    assert_eq!(run.code, Some(2));
    assert!(run.stderr.contains("8GB"), "{}", run.stderr);
    let out = place.folder.path().join("small");
    fourfold(args!["compress", &place.base, "--output", &out, "--bits", "4", "--method", "rtn"]).succeeded();
    assert!(out.join("config.json").exists());
}
