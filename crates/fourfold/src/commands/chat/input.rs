//! What a person says: lines with editing and history on a terminal, plain lines elsewhere, several lines between `"""`.

use std::fs::{self, OpenOptions};
use std::io::{BufRead, IsTerminal, Read, Write};
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use rustyline::error::ReadlineError;
use rustyline::history::MemHistory;
use rustyline::{Config, Editor};

use crate::context::Context;

/// Most bytes of what is said at once.
const LIMIT: u64 = 64 << 20;
/// Lines of history that are kept.
const KEPT: usize = 1000;
/// Stands around text of several lines.
const QUOTES: &str = "\"\"\"";

/// Where lines come from.
pub struct Input {
    editor: Option<Editor<(), MemHistory>>,
    history: Option<PathBuf>,
}

impl Input {
    /// Standard input; with line editing where it and standard error are a terminal's.
    pub fn new() -> Result<Self> {
        if !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
            return Ok(Self { editor: None, history: None });
        }
        let config = Config::builder().max_history_size(KEPT).context("the terminal")?.build();
        let history = MemHistory::with_config(&config);
        let mut editor = Editor::with_history(config, history).context("the terminal")?;
        let history = history_file();
        let lines = history.as_ref().and_then(|file| fs::read_to_string(file).ok()).unwrap_or_default();
        let skipped = lines.lines().count().saturating_sub(KEPT);
        for line in lines.lines().skip(skipped) {
            let _ = editor.add_history_entry(line);
        }
        Ok(Self { editor: Some(editor), history })
    }

    /// Whether a person types.
    pub fn is_terminal(&self) -> bool {
        self.editor.is_some()
    }

    /// What is said next, without the quotes around several lines; `None` at the end.
    pub fn next(&mut self, context: &Context) -> Result<Option<String>> {
        let Some(line) = self.line("> ", context)? else { return Ok(None) };
        let Some(mut text) = line.trim_start().strip_prefix(QUOTES).map(str::to_owned) else {
            return Ok(Some(line));
        };
        while !text.trim_end().ends_with(QUOTES) {
            // The end of the input ends the text too.
            let Some(line) = self.line(". ", context)? else { return Ok(Some(text)) };
            text = format!("{}\n{line}", text.strip_suffix('\n').unwrap_or(&text));
            ensure!((text.len() as u64) < LIMIT, "stdin: a text of more than {LIMIT} bytes");
        }
        let text = text.trim_end();
        let text = text.strip_suffix(QUOTES).unwrap_or(text);
        Ok(Some(text.trim_matches('\n').to_owned()))
    }

    fn line(&mut self, prompt: &str, context: &Context) -> Result<Option<String>> {
        let Some(editor) = &mut self.editor else { return plain_line(context) };
        match editor.readline(prompt) {
            Ok(line) => {
                if !line.trim().is_empty() && editor.add_history_entry(line.as_str()).unwrap_or(false) {
                    self.keep(&line);
                }
                Ok(Some(line))
            }
            Err(ReadlineError::Eof | ReadlineError::Interrupted) => Ok(None),
            Err(error) => Err(error).context("the terminal"),
        }
    }

    /// Adds a line to the history; that this fails is no reason to end a conversation.
    fn keep(&self, line: &str) {
        let Some(file) = &self.history else { return };
        if let Some(dir) = file.parent() {
            let _ = fs::create_dir_all(dir);
        }
        let mut options = OpenOptions::new();
        options.create(true).append(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        if let Ok(mut history) = options.open(file) {
            let _ = writeln!(history, "{line}");
        }
    }
}

/// `FOURFOLD_HISTORY` (empty for none), else a file of the user's state directory.
fn history_file() -> Option<PathBuf> {
    if let Some(file) = std::env::var_os("FOURFOLD_HISTORY") {
        return (!file.is_empty()).then(|| file.into());
    }
    let place = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = place("XDG_STATE_HOME").or_else(|| Some(place("HOME")?.join(".local/state")))?;
    Some(state.join("fourfold").join("chat_history"))
}

/// A line of standard input; `None` at its end. Bytes that are no UTF-8 become U+FFFD.
fn plain_line(context: &Context) -> Result<Option<String>> {
    let mut bytes = Vec::new();
    let read = std::io::stdin().lock().take(LIMIT).read_until(b'\n', &mut bytes).context("stdin")?;
    ensure!((read as u64) < LIMIT, "stdin: a line of more than {LIMIT} bytes");
    let line = String::from_utf8(bytes).unwrap_or_else(|error| {
        context.remark("That line is no UTF-8: its broken bytes are read as U+FFFD.");
        String::from_utf8_lossy(error.as_bytes()).into_owned()
    });
    Ok((read > 0).then(|| line.trim_end_matches(['\n', '\r']).to_owned()))
}
