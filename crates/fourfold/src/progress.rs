//! Progress on stderr: bars where stderr is a terminal, nothing elsewhere.

use std::fmt::Write;
use std::time::{Duration, Instant};

use fourfold_kernels::heap_is_for;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use crate::human;

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
        let template =
            format!("{{prefix}} [{{bar:30}}] {{human_pos}}/{{human_len}} {unit}{{rate}}{{left}} {{wide_msg}}");
        self.with(ProgressBar::new(total), &template, what)
    }

    /// Bytes on their way.
    pub fn bytes(self, what: &str, total: u64) -> ProgressBar {
        let template = "{prefix} [{bar:30}] {decimal_bytes}/{decimal_total_bytes}{byte_rate}{left}";
        self.with(ProgressBar::new(total), template, what)
    }

    /// Work of unknown length.
    pub fn spinner(self, what: &str) -> ProgressBar {
        let bar = self.with(ProgressBar::new_spinner(), "{spinner} {prefix} {wide_msg}", what);
        // A thread of its own, which indicatif takes for granted.
        if !bar.is_hidden() && std::thread::Builder::new().spawn(|| {}).is_ok() {
            bar.enable_steady_tick(Duration::from_millis(120));
        }
        bar
    }

    fn with(self, bar: ProgressBar, template: &str, what: &str) -> ProgressBar {
        heap_is_for(what);
        if self.quiet {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        let style = ProgressStyle::with_template(template)
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .with_key("rate", |state: &ProgressState, out: &mut dyn Write| {
                let _ = out.write_str(&rate(state.pos(), state.per_sec()));
            })
            .with_key("byte_rate", |state: &ProgressState, out: &mut dyn Write| {
                let _ = out.write_str(&byte_rate(state.pos(), state.per_sec()));
            })
            .with_key("left", |state: &ProgressState, out: &mut dyn Write| {
                let _ = out.write_str(&left(state.pos(), state.len(), state.eta()));
            });
        bar.set_style(style.progress_chars("━╸ "));
        bar.set_prefix(what.to_owned());
        bar
    }
}

/// `, 42.3/s`; nothing before anything is done.
fn rate(done: u64, per_second: f64) -> String {
    match () {
        () if done == 0 || !per_second.is_finite() || per_second <= 0.0 => String::new(),
        () if per_second >= 1000.0 => format!(", {}/s", human::count(per_second as u64)),
        () if per_second >= 0.1 => format!(", {per_second:.1}/s"),
        () => format!(", {:.1}/min", per_second * 60.0),
    }
}

/// `, 7.6 MB/s`; nothing before anything is done.
fn byte_rate(done: u64, per_second: f64) -> String {
    if done == 0 || !per_second.is_finite() || per_second < 1.0 {
        return String::new();
    }
    format!(", {}/s", human::bytes(per_second as u64))
}

/// `, 3 min 05 s left`; nothing where nothing is known yet or all is done.
fn left(done: u64, total: Option<u64>, left: Duration) -> String {
    if done == 0 || total.is_none_or(|total| done >= total) || left < Duration::from_secs(1) {
        return String::new();
    }
    format!(", {} left", human::duration(Duration::from_secs(left.as_secs())).replace(".0 s", " s"))
}

/// One bar for all stages of a long job, with the name of the one at work.
pub struct Stages {
    bar: ProgressBar,
    /// Each stage's share of the whole, in the order in which they come; some may be left out.
    shares: &'static [(&'static str, f64)],
    /// The stage at work, its place among the shares, when it began.
    now: Option<(String, usize, Instant)>,
    /// What has ended, and the seconds it took.
    ended: Vec<(String, f64)>,
}

/// Steps of the one bar.
const STEPS: f64 = 1000.0;

impl Stages {
    /// No stage has begun. `shares` are of any unit.
    pub fn new(progress: Progress, what: &str, shares: &'static [(&'static str, f64)]) -> Self {
        let bar =
            progress.with(ProgressBar::new(STEPS as u64), "{prefix} [{bar:30}] {percent} %{left}  {wide_msg}", what);
        Self { bar, shares, now: None, ended: Vec::new() }
    }

    /// Takes the bar away, and says how many seconds each stage took.
    pub fn finish(&mut self) -> Vec<(String, f64)> {
        self.end();
        self.bar.finish_and_clear();
        std::mem::take(&mut self.ended)
    }

    fn end(&mut self) {
        if let Some((name, _, since)) = self.now.take() {
            self.ended.push((name, since.elapsed().as_secs_f64()));
        }
    }

    /// Where the bar stands when a share of a stage is done.
    fn position(&self, place: usize, done: f64) -> u64 {
        let all: f64 = self.shares.iter().map(|(_, share)| share).sum();
        let before: f64 = self.shares[..place.min(self.shares.len())].iter().map(|(_, share)| share).sum();
        let share = self.shares.get(place).map_or(0.0, |(_, share)| *share);
        ((before + share * done.clamp(0.0, 1.0)) / all.max(f64::MIN_POSITIVE) * STEPS) as u64
    }
}

impl fourfold_compress::Progress for Stages {
    fn update(&mut self, stage: &str, done: u64, total: u64) {
        if self.now.as_ref().is_none_or(|(name, _, _)| name != stage) {
            self.end();
            let place = self.shares.iter().position(|(name, _)| *name == stage).unwrap_or(self.shares.len());
            self.now = Some((stage.to_owned(), place, Instant::now()));
        }
        if let Some((name, place, _)) = &self.now {
            self.bar.set_position(self.position(*place, done as f64 / total.max(1) as f64));
            self.bar.set_message(format!("{name} {done}/{total}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bar_goes_through_all_stages() {
        use fourfold_compress::Progress as _;
        let mut stages = Stages::new(Progress::new(true), "work", &[("plan", 1.0), ("gate", 2.0), ("write", 1.0)]);
        stages.update("plan", 0, 4);
        stages.update("plan", 2, 4);
        assert_eq!(stages.bar.position(), 125);
        // A stage that is left out, and one that is not known: the bar never goes back.
        stages.update("write", 0, 10);
        assert_eq!(stages.bar.position(), 750);
        stages.update("other", 1, 2);
        assert_eq!(stages.bar.position(), 1000);
        let names: Vec<String> = stages.finish().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["plan", "write", "other"]);
    }

    #[test]
    fn numbers_are_said_where_they_are_known() {
        assert_eq!(rate(0, 0.0), "");
        assert_eq!(rate(3, 42.312_44), ", 42.3/s");
        assert_eq!(rate(3, 12_345.6), ", 12.3 k/s");
        assert_eq!(rate(1, 0.05), ", 3.0/min");
        assert_eq!(byte_rate(9, 7_612_345.0), ", 7.6 MB/s");
        assert_eq!(byte_rate(0, 1e6), "");
        let seconds = Duration::from_secs;
        assert_eq!((left(0, Some(9), seconds(0)), left(9, Some(9), seconds(5))), (String::new(), String::new()));
        assert_eq!(left(1, Some(9), seconds(5)), ", 5 s left");
        assert_eq!(left(1, Some(9), seconds(185)), ", 3 min 05 s left");
    }
}
