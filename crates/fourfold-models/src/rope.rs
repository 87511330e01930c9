//! The rotation that a configuration asks for: `rope_theta` and `rope_scaling` (published configurations), or one
//! `rope_parameters` (transformers 5). Where both stand, `rope_scaling` is taken, as transformers 5 does.

use serde_json::Value;

use crate::ModelError;
use crate::config::Config;
use crate::keys::ROTARY_PART;
use crate::layers::{RotaryScaling, RotarySpec, yarn_mscale};

/// Base of the wavelengths where the configuration has none.
const DEFAULT_THETA: f64 = 10_000.0;

/// Keys that transformers reads for some type of rotation; for the others they are without effect.
const SCALING: &[&str] = &[
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "short_factor",
    "long_factor",
    "low_freq_factor",
    "high_freq_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "mrope_section",
    // vLLM's and YaRN's own.
    "attn_factor",
    "extrapolation_factor",
    "apply_yarn_scaling",
    "finetuned",
];
/// Keys that every type has.
const ALWAYS: &[&str] = &["rope_theta", "rope_type", "type", "partial_rotary_factor"];

/// The object that describes the rotation, and which type it names.
pub(crate) struct Rope<'a> {
    config: &'a Config<'a>,
    section: Option<Config<'a>>,
    kind: &'a str,
    /// Whether `rope_parameters` stands beside `rope_scaling`.
    pub both: bool,
}

impl<'a> Rope<'a> {
    /// Finds and checks the section.
    pub fn read(config: &'a Config<'a>) -> Result<Self, ModelError> {
        let given = |key| -> Result<Option<Config<'a>>, ModelError> {
            Ok(config.object(key)?.filter(|section| section.keys().next().is_some()))
        };
        let (scaling, parameters) = (given("rope_scaling")?, given("rope_parameters")?);
        let both = scaling.is_some() && parameters.is_some();
        let section = scaling.or(parameters);
        let kind = match &section {
            Some(section) => {
                let key = if section.get("rope_type").is_some() { "rope_type" } else { "type" };
                section.text(key)?.unwrap_or("default")
            }
            None => "default",
        };
        let rope = Self { config, section, kind, both };
        rope.check_keys()?;
        if both && let Some(parameters) = parameters {
            let theta = rope.theta()?;
            if parameters.optional_positive("rope_theta")?.is_some_and(|other| other != theta) {
                let reason = format!(
                    "rope_scaling stands beside rope_parameters and goes before it; rope_theta would then be {theta}: \
                     put rope_theta into rope_scaling"
                );
                return Err(parameters.bad("rope_theta", reason));
            }
        }
        Ok(rope)
    }

    /// Keys of the section that the type reads.
    fn reads(&self, key: &str) -> bool {
        match self.kind {
            "linear" => key == "factor",
            "llama3" => {
                ["factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"].contains(&key)
            }
            "yarn" => [
                "factor",
                "original_max_position_embeddings",
                "attention_factor",
                "attn_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "truncate",
            ]
            .contains(&key),
            "longrope" => {
                ["factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"]
                    .contains(&key)
            }
            _ => false,
        }
    }

    fn check_keys(&self) -> Result<(), ModelError> {
        let Some(section) = &self.section else { return Ok(()) };
        for key in section.keys().filter(|key| section.get(key).is_some()) {
            if !ALWAYS.contains(&key) && !SCALING.contains(&key) {
                return Err(section.bad(key, "this key is not known here"));
            }
        }
        let neutral = |key: &str, neutral: bool, reason: &str| match neutral {
            true => Ok(()),
            false => Err(section.bad(key, reason)),
        };
        let number = |key: &str| section.get(key).map(Value::as_f64);
        neutral(
            "partial_rotary_factor",
            number("partial_rotary_factor").is_none_or(|v| v == Some(1.0)),
            &format!("{ROTARY_PART} is not supported; 1 is read"),
        )?;
        neutral(
            "extrapolation_factor",
            number("extrapolation_factor").is_none_or(|v| v == Some(1.0)),
            "only 1 is supported",
        )?;
        neutral("apply_yarn_scaling", section.flag("apply_yarn_scaling", true)?, "only true is supported")
    }

    /// Keys of the section, with its name, that have no effect with its type.
    pub fn without_effect(&self, mla: bool) -> Vec<String> {
        let Some(section) = &self.section else { return Vec::new() };
        let idle = |key: &&str| {
            let scales = mla && self.kind != "default" && *key == "mscale_all_dim";
            SCALING.contains(key) && *key != "finetuned" && !self.reads(key) && !scales && section.get(key).is_some()
        };
        section.keys().filter(idle).map(|key| section.name(key)).collect()
    }

    /// The type's name.
    pub fn kind(&self) -> &str {
        self.kind
    }

    /// YaRN's `attn_factor`, where it is there and not 1: vLLM's name for a factor of the attention factor.
    pub fn attn_factor(&self) -> Result<Option<f64>, ModelError> {
        match &self.section {
            Some(section) if self.kind == "yarn" => {
                Ok(section.optional_positive("attn_factor")?.filter(|factor| *factor != 1.0))
            }
            _ => Ok(None),
        }
    }

    fn theta(&self) -> Result<f64, ModelError> {
        let places = [self.section.as_ref(), Some(self.config)];
        let Some(place) = places.into_iter().flatten().find(|place| place.has("rope_theta")) else {
            return Ok(DEFAULT_THETA);
        };
        // `null` is no theta, in transformers either.
        let theta = place.optional_positive("rope_theta")?.filter(|theta| *theta > 1.0);
        theta.ok_or_else(|| place.bad("rope_theta", "a number above 1 is expected"))
    }

    /// The rotation of heads of which `dim` elements rotate.
    pub fn spec(&self, dim: usize) -> Result<RotarySpec, ModelError> {
        Ok(RotarySpec { dim, theta: self.theta()?, scaling: self.scaling(dim)? })
    }

    /// Factor of the attention scores of multi-head latent attention: the square of YaRN's growth by `mscale_all_dim`. It goes
    /// by the key, with every type but `default`, as in transformers.
    pub fn score_factor(&self) -> Result<f64, ModelError> {
        let Some(section) = self.section.as_ref().filter(|_| self.kind != "default") else { return Ok(1.0) };
        let Some(all) = section.optional_nonzero("mscale_all_dim")? else { return Ok(1.0) };
        let mscale = yarn_mscale(section.positive("factor")?, all);
        Ok(mscale * mscale)
    }

    /// The context trained on: outside the section before inside it, and `max_position_embeddings` where neither says.
    fn original_positions(&self, section: &Config) -> Result<f64, ModelError> {
        const KEY: &str = "original_max_position_embeddings";
        for place in [self.config, section] {
            if let Some(positions) = place.optional_positive(KEY)? {
                return Ok(positions);
            }
        }
        self.config.positive("max_position_embeddings")
    }

    fn scaling(&self, dim: usize) -> Result<RotaryScaling, ModelError> {
        let Some(section) = &self.section else { return Ok(RotaryScaling::Default) };
        match self.kind {
            "default" => Ok(RotaryScaling::Default),
            "linear" => Ok(RotaryScaling::Linear { factor: section.positive("factor")? }),
            "llama3" => {
                let (low, high) = (section.positive("low_freq_factor")?, section.positive("high_freq_factor")?);
                if high <= low {
                    return Err(section.bad("high_freq_factor", "a number above low_freq_factor is expected"));
                }
                Ok(RotaryScaling::Llama3 {
                    factor: section.positive("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_positions: self.original_positions(section)?,
                })
            }
            "yarn" => self.yarn(section),
            "longrope" => self.factors(section, dim),
            _ => {
                let key = if section.get("rope_type").is_some() { "rope_type" } else { "type" };
                Err(section.bad(key, "only default, linear, llama3, yarn and longrope are supported"))
            }
        }
    }

    fn yarn(&self, section: &Config) -> Result<RotaryScaling, ModelError> {
        let factor = section.positive("factor")?;
        let attn_factor = self.attn_factor()?;
        let attention_factor = match (section.optional_positive("attention_factor")?, attn_factor) {
            (Some(_), Some(_)) => return Err(section.bad("attn_factor", "attention_factor stands beside it")),
            (Some(factor), None) => factor,
            (None, _) => {
                let grown = match (section.optional_nonzero("mscale")?, section.optional_nonzero("mscale_all_dim")?) {
                    (Some(m), Some(all)) => yarn_mscale(factor, m) / yarn_mscale(factor, all),
                    _ => yarn_mscale(factor, 1.0),
                };
                grown * attn_factor.unwrap_or(1.0)
            }
        };
        Ok(RotaryScaling::Yarn {
            factor,
            beta_fast: section.positive_or("beta_fast", 32.0)?,
            beta_slow: section.positive_or("beta_slow", 1.0)?,
            original_positions: self.original_positions(section)?,
            attention_factor,
            truncate: section.flag("truncate", true)?,
        })
    }

    /// LongRoPE (Ding et al. 2024) with one list of factors for every length; with two, the angles would change as a text grows.
    fn factors(&self, section: &Config, dim: usize) -> Result<RotaryScaling, ModelError> {
        let list = |key: &str| -> Result<Vec<f64>, ModelError> {
            let value = section.get(key).ok_or_else(|| section.missing(key))?;
            let numbers = value.as_array().filter(|list| list.len() == dim / 2).map(|list| {
                list.iter().filter_map(Value::as_f64).filter(|f| f.is_finite() && *f > 0.0).collect::<Vec<f64>>()
            });
            let numbers = numbers.filter(|numbers| numbers.len() == dim / 2);
            numbers.ok_or_else(|| section.bad(key, format!("a list of {} positive numbers is expected", dim / 2)))
        };
        let factors = list("short_factor")?;
        if list("long_factor")? != factors {
            return Err(section.bad("long_factor", "longrope is supported with the same list as short_factor only"));
        }
        let attention_factor = match section.optional_positive("attention_factor")? {
            Some(factor) => factor,
            None => {
                let original = self.original_positions(section)?;
                let factor = match section.optional_positive("factor")? {
                    Some(factor) => factor,
                    None => self.config.positive("max_position_embeddings")? / original,
                };
                if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() }
            }
        };
        Ok(RotaryScaling::Factors { factors, attention_factor })
    }
}
