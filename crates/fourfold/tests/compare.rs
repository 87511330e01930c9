//! `fourfold compare`: the figures are those of the models, and the page needs nothing but itself.

mod common;

use std::fs;
use std::path::Path;

use common::{folder, fourfold, model, text};
use serde_json::Value;

/// A model and two compressed ones beside it: 6 and 3 bits.
fn place(dir: &Path) {
    model(&dir.join("a"));
    text(dir, 600);
    for bits in ["6", "3"] {
        let out = dir.join(format!("int{bits}"));
        fourfold([
            "compress".as_ref(),
            dir.join("a").as_os_str(),
            out.as_os_str(),
            "--bits".as_ref(),
            bits.as_ref(),
            "--quiet".as_ref(),
        ])
        .succeeded();
    }
}

fn compare(dir: &Path, a: &str, b: &str, more: &[&str]) -> common::Run {
    let (a, b) = (dir.join(a).display().to_string(), dir.join(b).display().to_string());
    let text = text(dir, 600).display().to_string();
    let mut options =
        vec!["compare", &a, &b, "--text", &text, "--context", "64", "--chunks", "3", "-n", "5", "--quiet"];
    options.extend(["--prompt", "a <b> & c"]);
    options.extend(more);
    fourfold(options)
}

fn number(report: &Value, path: &str) -> f64 {
    report.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {path}"))
}

#[test]
fn errors_and_bytes_follow_the_bits() {
    let dir = folder();
    place(dir.path());
    let [same, fine, coarse] = ["a", "int6", "int3"].map(|b| compare(dir.path(), "a", b, &["--json"]).json());
    // Predictions are kept in 16 bits.
    assert!(number(&same, "/mean_kld").abs() < 1e-5);
    assert!(number(&same, "/mean_kld") < number(&fine, "/mean_kld"));
    assert!(number(&fine, "/mean_kld") < number(&coarse, "/mean_kld"));
    assert!(number(&fine, "/b/weight_bytes") > number(&coarse, "/b/weight_bytes"));
    assert_eq!(same["tensors"].as_array().unwrap().len(), fine["tensors"].as_array().unwrap().len());
    for (i, tensor) in fine["tensors"].as_array().unwrap().iter().enumerate() {
        let error = |report: &Value| number(report, &format!("/tensors/{i}/error"));
        assert_eq!(error(&same), 0.0);
        let packed = tensor["b_storage"].as_str().unwrap().starts_with("int6");
        assert_eq!(packed, error(&fine) > 0.0 && error(&coarse) > error(&fine), "{tensor}");
    }
    assert!(fine["a"]["memory"].as_array().is_some() && fine["b"]["samples"][0]["text"].is_string());
}

#[test]
fn the_page_stands_alone_and_escapes_what_it_shows() {
    let dir = folder();
    place(dir.path());
    let (page, document) = (dir.path().join("report.html"), dir.path().join("report.md"));
    for file in [&page, &document] {
        compare(dir.path(), "a", "int3", &["--output", &file.display().to_string()]).succeeded();
    }
    let page = fs::read_to_string(page).unwrap();
    for foreign in ["http:", "https:", "src=", "<script", "@import", "url("] {
        assert!(!page.contains(foreign), "{foreign}");
    }
    assert!(page.contains("a &lt;b&gt; &amp; c") && !page.contains("a <b> & c"));
    for part in ["id=\"summary\"", "id=\"layers\"", "id=\"choices\"", "int3 g64", "<polyline", "block 1"] {
        assert!(page.contains(part), "{part}");
    }
    let document = fs::read_to_string(document).unwrap();
    assert!(document.contains("| perplexity, B / A |") && document.contains("| block 0 |"));
}

#[test]
fn an_unknown_ending_is_refused_before_any_work() {
    let dir = folder();
    let run = compare(dir.path(), "missing", "missing", &["--output", "report.pdf"]);
    assert!(run.error().contains("report.pdf: a report is written as .html, .md or .json"), "{}", run.error());
}
