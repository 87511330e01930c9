//! Progress on stderr: bars where stderr is a terminal, nothing elsewhere.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Makes bars, or invisible ones.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    quiet: bool,
}

impl Progress {
    /// `quiet` hides everything. indicatif itself hides bars where stderr is no terminal.
    pub fn new(quiet: bool) -> Self {
        Self { quiet }
    }

    /// Work whose amount is known, counted in `unit`s.
    pub fn bar(self, what: &str, total: u64, unit: &str) -> ProgressBar {
        let template = format!(
            "{{prefix}} [{{bar:30}}] {{human_pos}}/{{human_len}} {unit}, {{per_sec}}, {{eta}} left {{wide_msg}}"
        );
        self.with(ProgressBar::new(total), &template, what)
    }

    /// Bytes on their way.
    pub fn bytes(self, what: &str, total: u64) -> ProgressBar {
        let template = "{prefix} [{bar:30}] {decimal_bytes}/{decimal_total_bytes}, {decimal_bytes_per_sec}, {eta} left";
        self.with(ProgressBar::new(total), template, what)
    }

    /// Work of unknown length.
    pub fn spinner(self, what: &str) -> ProgressBar {
        let bar = self.with(ProgressBar::new_spinner(), "{spinner} {prefix} {wide_msg}", what);
        bar.enable_steady_tick(Duration::from_millis(120));
        bar
    }

    fn with(self, bar: ProgressBar, template: &str, what: &str) -> ProgressBar {
        if self.quiet {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style.progress_chars("━╸ "));
        bar.set_prefix(what.to_owned());
        bar
    }
}

/// A bar for each stage of a long job.
pub struct Stages {
    progress: Progress,
    now: Option<(String, ProgressBar)>,
}

impl Stages {
    /// No stage has begun.
    pub fn new(progress: Progress) -> Self {
        Self { progress, now: None }
    }

    /// Takes the last bar away.
    pub fn finish(&mut self) {
        if let Some((_, bar)) = self.now.take() {
            bar.finish_and_clear();
        }
    }
}

impl fourfold_compress::Progress for Stages {
    fn update(&mut self, stage: &str, done: u64, total: u64) {
        if self.now.as_ref().is_none_or(|(name, _)| name != stage) {
            self.finish();
            self.now = Some((stage.to_owned(), self.progress.bar(stage, total, "")));
        }
        if let Some((_, bar)) = &self.now {
            bar.set_length(total);
            bar.set_position(done);
        }
    }
}
