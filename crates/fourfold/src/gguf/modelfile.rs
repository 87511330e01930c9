//! An Ollama `Modelfile` beside a GGUF file.

use std::path::Path;

/// The text: where the model lies, and what ends an answer. The template is the file's own, which Ollama reads.
pub fn text(gguf: &Path, stops: &[String], context: usize) -> String {
    let name = gguf.file_name().unwrap_or_default().to_string_lossy();
    let mut text = format!("FROM ./{name}\nPARAMETER num_ctx {context}\n");
    for stop in stops {
        text += &format!("PARAMETER stop {}\n", serde_json::Value::from(stop.as_str()));
    }
    text
}
