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
