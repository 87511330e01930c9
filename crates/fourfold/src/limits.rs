//! What numbers may be: on the command line, where a number outside its limits is wrong usage (exit code 2), and in a run's TOML file.
//!
//! Upper limits are far above what anybody needs and low enough that no sum or product of them leaves the range of its type.

use std::ffi::OsStr;
use std::fmt::Display;
use std::str::FromStr;

use anyhow::{Result, bail};
use clap::builder::TypedValueParser;
use clap::{Arg, Command};

/// A number of the command line.
pub trait Number: Copy + PartialOrd + FromStr + Display + Send + Sync + 'static {
    /// What errors call it.
    const KIND: &'static str;
}

macro_rules! numbers {
    ($kind:literal: $($number:ty),*) => {
        $(impl Number for $number {
            const KIND: &'static str = $kind;
        })*
    };
}
numbers!("a whole number": u8, u16, u32, u64, usize);
numbers!("a number": f32, f64);

/// An interval.
#[derive(Clone, Copy, Debug)]
pub struct Limit<T> {
    from: T,
    to: T,
    /// Whether `from` itself is outside.
    above: bool,
    /// Whether `to` itself is outside.
    below: bool,
}

impl<T: Number> Limit<T> {
    /// `from` to `to`, both inside.
    pub const fn new(from: T, to: T) -> Self {
        Self { from, to, above: false, below: false }
    }

    /// Without its lower end.
    pub const fn above(from: T, to: T) -> Self {
        Self { from, to, above: true, below: false }
    }

    /// Without its upper end.
    pub const fn below(from: T, to: T) -> Self {
        Self { from, to, above: false, below: true }
    }

    /// NaN is never inside.
    fn holds(&self, value: T) -> bool {
        let low = if self.above { value > self.from } else { value >= self.from };
        let high = if self.below { value < self.to } else { value <= self.to };
        low && high
    }

    /// What is inside, in words.
    fn words(&self) -> String {
        let (kind, from, to) = (T::KIND, self.from, self.to);
        match (self.above, self.below) {
            (false, false) => format!("{kind} from {from} to {to}"),
            (true, false) => format!("{kind} above {from}, at most {to}"),
            (false, true) => format!("{kind} from {from}, below {to}"),
            (true, true) => format!("{kind} above {from}, below {to}"),
        }
    }

    fn read(&self, text: &str) -> Result<T, String> {
        match text.trim().parse::<T>() {
            Ok(value) if self.holds(value) => Ok(value),
            _ => Err(format!("{} is expected", self.words())),
        }
    }

    /// The value, if it is inside.
    ///
    /// # Errors
    /// It is not; the error names the option.
    pub fn check(&self, option: &str, value: T) -> Result<T> {
        if !self.holds(value) {
            bail!("{option} {value}: {} is expected", self.words());
        }
        Ok(value)
    }
}

impl<T: Number> TypedValueParser for Limit<T> {
    type Value = T;

    fn parse_ref(&self, command: &Command, argument: Option<&Arg>, value: &OsStr) -> Result<T, clap::Error> {
        let limit = *self;
        (move |text: &str| limit.read(text)).parse_ref(command, argument, value)
    }
}

/// Most bytes of a file that is read whole: settings, a plan, a configuration, a tokenizer, a prompt.
pub const MOST_BYTES: u64 = 256 << 20;
/// Threads: more than a machine has are capped later, with a remark; 0 is for as many as it has.
pub const THREADS: Limit<usize> = Limit::new(0, u32::MAX as usize);
/// Tokens of a sequence or window.
pub const TOKENS: Limit<usize> = Limit::new(1, 1 << 24);
/// Tokens that may be none: of an answer, say.
pub const SOME_TOKENS: Limit<usize> = Limit::new(0, 1 << 30);
/// Tokens of a training sequence.
pub const TRAIN_CONTEXT: Limit<usize> = Limit::new(2, 1 << 20);
/// Tokens of an evaluation's window.
pub const EVAL_CONTEXT: Limit<usize> = Limit::new(4, 1 << 24);
/// Sequences or batches of a step.
pub const BATCH: Limit<usize> = Limit::new(1, 1 << 16);
/// How often something is done.
pub const TIMES: Limit<u32> = Limit::new(1, 1_000_000);
/// Windows of a text, or samples of it.
pub const WINDOWS: Limit<u32> = Limit::new(1, 1 << 30);
/// Steps of a run, or of a part of one that may have none.
pub const SOME_STEPS: Limit<u64> = Limit::new(0, 1_000_000_000_000);
/// Passes over the data.
pub const EPOCHS: Limit<f64> = Limit::new(0.0, 1e6);
/// Checkpoints to keep.
pub const KEEP: Limit<usize> = Limit::new(1, 1_000_000);
/// Rank of adapters.
pub const RANK: Limit<usize> = Limit::new(1, 4096);
/// Numerator of an adapter's scale.
pub const ALPHA: Limit<f32> = Limit::above(0.0, 1e6);
/// Columns that share a scale.
pub const GROUP: Limit<usize> = Limit::new(1, 1 << 24);
/// Pixels.
pub const SHIFT: Limit<usize> = Limit::new(0, 4096);
/// A share of something.
pub const SHARE: Limit<f32> = Limit::new(0.0, 1.0);
/// Data kept for measuring.
pub const HELD_OUT: Limit<f64> = Limit::below(0.0, 0.9);
/// Rate of an exponential mean.
pub const DECAY_RATE: Limit<f32> = Limit::below(0.0, 1.0);
/// Peak learning rate.
pub const LEARNING_RATE: Limit<f64> = Limit::above(0.0, 1e3);
/// The learning rate's lower end.
pub const MIN_LEARNING_RATE: Limit<f64> = Limit::new(0.0, 1e3);
/// Decoupled weight decay.
pub const WEIGHT_DECAY: Limit<f32> = Limit::new(0.0, 100.0);
/// Norm of all gradients.
pub const GRADIENT_NORM: Limit<f64> = Limit::above(0.0, 1e9);
/// Temperature of a softmax that is divided by it.
pub const DISTILL_TEMPERATURE: Limit<f32> = Limit::above(0.0, 1e4);
/// Temperature of a draw; 0 draws nothing.
pub const TEMPERATURE: Limit<f32> = Limit::new(0.0, 1e4);
/// Factor of a repetition's penalty.
pub const PENALTY_FACTOR: Limit<f32> = Limit::above(0.0, 1e4);
/// What a repetition takes from a logit.
pub const PENALTY: Limit<f32> = Limit::new(-1e4, 1e4);
/// Bits a parameter, everything counted.
pub const AVERAGE_BITS: Limit<f64> = Limit::new(0.1, 32.0);
/// How many times smaller.
pub const RATIO: Limit<f64> = Limit::new(1.0, 1e4);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_inside_or_not_and_nan_never_is() {
        let text = |limit: Limit<f64>, value: &str| limit.read(value).map_err(|e| e.to_string());
        assert_eq!(text(EPOCHS, "0.5"), Ok(0.5));
        for wrong in ["-1", "nan", "inf", "1e300", "", "x", "1e6x"] {
            assert_eq!(text(EPOCHS, wrong), Err("a number from 0 to 1000000 is expected".into()), "{wrong}");
        }
        assert_eq!(LEARNING_RATE.read("0"), Err("a number above 0, at most 1000 is expected".into()));
        assert_eq!(DECAY_RATE.read("1.5"), Err("a number from 0, below 1 is expected".into()));
        assert_eq!(KEEP.read("0"), Err("a whole number from 1 to 1000000 is expected".into()));
        assert!(KEEP.check("--keep", 0).unwrap_err().to_string().starts_with("--keep 0: a whole number"));
        assert_eq!(THREADS.read("4294967295"), Ok(4_294_967_295));
    }
}
