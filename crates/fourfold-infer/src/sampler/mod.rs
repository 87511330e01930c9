//! Choosing the next token. Filters and their order are llama.cpp's: penalties, top-k, top-p, min-p, temperature, draw.

mod filters;
mod generation;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use serde_json::Value;

use crate::InferError;
use filters::Candidate;
pub use generation::generation_remarks;

/// How tokens are chosen. The defaults are llama.cpp's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SamplerSettings {
    /// Divides the logits; 0 takes the most likely token always.
    pub temperature: f32,
    /// Keeps the k most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest most likely tokens whose probabilities sum to at least this; 1 keeps all (Holtzman et al. 2019).
    pub top_p: f32,
    /// Keeps tokens at least this fraction as likely as the most likely one; 0 keeps all (Nguyen et al. 2024).
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen lately; 1 does nothing (Keskar et al. 2019).
    pub repeat_penalty: f32,
    /// Subtracted from the logit of a token for each time it was seen lately.
    pub frequency_penalty: f32,
    /// Subtracted from the logit of a token seen lately at all.
    pub presence_penalty: f32,
    /// How many tokens back "lately" reaches; 0 turns the penalties off.
    pub repeat_last_n: usize,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for SamplerSettings {
    fn default() -> Self {
        Self {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repeat_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repeat_last_n: 64,
            seed: 0,
        }
    }
}

impl SamplerSettings {
    /// The defaults, with whatever a `generation_config.json` says in their place.
    pub fn from_generation_config(config: Option<&Value>) -> Self {
        let mut settings = Self::default();
        let Some(config) = config else { return settings };
        let number = |key: &str| config.get(key).and_then(Value::as_f64).map(|v| v as f32);
        if let Some(v) = number("temperature") {
            settings.temperature = v;
        }
        if let Some(v) = config.get("top_k").and_then(Value::as_u64) {
            settings.top_k = v as usize;
        }
        if let Some(v) = number("top_p") {
            settings.top_p = v;
        }
        if let Some(v) = number("min_p") {
            settings.min_p = v;
        }
        if let Some(v) = number("repetition_penalty") {
            settings.repeat_penalty = v;
        }
        if config.get("do_sample") == Some(&Value::Bool(false)) {
            settings.temperature = 0.0;
        }
        settings
    }
}

/// Draws tokens under some [`SamplerSettings`]. The same settings, logits and history give the same tokens.
pub struct Sampler {
    settings: SamplerSettings,
    rng: StdRng,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// A sampler at the beginning of its random sequence.
    pub fn new(settings: SamplerSettings) -> Self {
        let rng = StdRng::seed_from_u64(settings.seed);
        Self { settings, rng, candidates: Vec::new() }
    }

    /// The settings it was made with.
    pub fn settings(&self) -> &SamplerSettings {
        &self.settings
    }

    /// The next token, given the logits of every token in the vocabulary and the tokens so far.
    ///
    /// # Errors
    /// [`InferError::NoFiniteLogits`] when there is no finite logit to choose by.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32, InferError> {
        let s = &self.settings;
        let kept = &mut self.candidates;
        kept.clear();
        let finite = logits.iter().enumerate().filter(|(_, l)| l.is_finite());
        kept.extend(finite.map(|(id, &logit)| Candidate { id: id as u32, logit }));
        filters::penalties(kept, filters::tail(history, s.repeat_last_n), s);

        if s.temperature <= 0.0 {
            let best = kept.iter().copied().reduce(|a, b| if b.logit > a.logit { b } else { a });
            return best.map(|c| c.id).ok_or(InferError::NoFiniteLogits { position: history.len() });
        }
        filters::top_k(kept, s.top_k);
        filters::top_p(kept, s.top_p);
        filters::min_p(kept, s.min_p);
        filters::temperature(kept, s.temperature);
        let draw = self.rng.random::<f32>();
        filters::pick(kept, draw).ok_or(InferError::NoFiniteLogits { position: history.len() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(temperature: f32, seed: u64) -> SamplerSettings {
        SamplerSettings { temperature, top_k: 0, top_p: 1.0, min_p: 0.0, seed, ..SamplerSettings::default() }
    }

    #[test]
    fn zero_temperature_takes_the_first_of_the_most_likely() {
        let mut sampler = Sampler::new(open(0.0, 1));
        assert_eq!(sampler.sample(&[0.5, 2.0, f32::NAN, 2.0, -1.0], &[]).unwrap(), 1);
    }

    #[test]
    fn frequencies_follow_the_softmax_at_the_temperature() {
        let logits = [0.0_f32, 1.0, 2.0, -1.0];
        for temperature in [0.5_f32, 1.0, 2.0] {
            let mut sampler = Sampler::new(open(temperature, 7));
            let draws = 20_000;
            let mut counts = [0_usize; 4];
            for _ in 0..draws {
                counts[sampler.sample(&logits, &[]).unwrap() as usize] += 1;
            }
            let weights = logits.map(|l| f64::from(l / temperature).exp());
            let sum: f64 = weights.iter().sum();
            for (count, weight) in counts.iter().zip(weights) {
                let (p, n) = (weight / sum, draws as f64);
                let deviation = (*count as f64 - n * p).abs() / (n * p * (1.0 - p)).sqrt();
                assert!(deviation < 4.5, "at {temperature}: {count} draws where {} are expected", n * p);
            }
        }
    }

    #[test]
    fn one_seed_one_sequence() {
        let logits: Vec<f32> = (0..50).map(|i| ((i * 37) % 11) as f32 * 0.1).collect();
        let run = |seed| {
            let mut sampler = Sampler::new(open(1.0, seed));
            (0..40).map(|_| sampler.sample(&logits, &[]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(run(3), run(3));
        assert_ne!(run(3), run(4));
    }

    #[test]
    fn a_penalty_changes_the_choice() {
        let greedy = open(0.0, 0);
        let logits = [1.0_f32, 1.5, -0.5];
        assert_eq!(Sampler::new(greedy.clone()).sample(&logits, &[1, 1]).unwrap(), 1);
        let penalised = SamplerSettings { repeat_penalty: 2.0, ..greedy.clone() };
        assert_eq!(Sampler::new(penalised).sample(&logits, &[1, 1]).unwrap(), 0);
        let out_of_reach = SamplerSettings { repeat_penalty: 2.0, repeat_last_n: 1, ..greedy };
        assert_eq!(Sampler::new(out_of_reach).sample(&logits, &[1, 0]).unwrap(), 1);
    }

    #[test]
    fn nothing_finite_is_an_error() {
        let mut sampler = Sampler::new(SamplerSettings::default());
        assert!(matches!(sampler.sample(&[f32::NAN; 4], &[0, 1]), Err(InferError::NoFiniteLogits { position: 2 })));
    }

    #[test]
    fn generation_config_replaces_defaults() {
        let config =
            serde_json::json!({"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": 2});
        let settings = SamplerSettings::from_generation_config(Some(&config));
        assert_eq!((settings.temperature, settings.top_p, settings.repeat_penalty), (0.6, 0.9, 1.1));
        assert_eq!(settings.top_k, SamplerSettings::default().top_k);
        let greedy = serde_json::json!({"do_sample": false, "temperature": 0.6});
        assert_eq!(SamplerSettings::from_generation_config(Some(&greedy)).temperature, 0.0);
    }
}
