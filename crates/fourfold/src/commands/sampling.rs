//! Sampling options, named as in llama.cpp.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use clap::Args;
use fourfold_infer::{SamplerSettings, generation_remarks};
use serde_json::Value;

use crate::context::Context;
use crate::limits;

/// Options that override the model's `generation_config.json`, which overrides llama.cpp's defaults.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Sampling (defaults: the model's generation_config.json, else those of llama.cpp)")]
pub struct SamplingArgs {
    /// Temperature; 0 always takes the most likely token [default: 0.8].
    #[arg(long, visible_alias = "temperature", value_name = "T", value_parser = limits::TEMPERATURE, allow_negative_numbers = true)]
    temp: Option<f32>,
    /// Keep the K most likely tokens; 0 keeps all [default: 40].
    #[arg(long, value_name = "K", value_parser = limits::SOME_TOKENS)]
    top_k: Option<usize>,
    /// Keep the fewest tokens whose probabilities sum to P; 1 keeps all [default: 0.95].
    #[arg(long, value_name = "P", value_parser = limits::SHARE)]
    top_p: Option<f32>,
    /// Keep tokens at least P times as likely as the most likely one; 0 keeps all [default: 0.05].
    #[arg(long, value_name = "P", value_parser = limits::SHARE)]
    min_p: Option<f32>,
    /// Make tokens seen lately less likely by this factor; 1 does nothing [default: 1].
    #[arg(long, value_name = "F", value_parser = limits::PENALTY_FACTOR)]
    repeat_penalty: Option<f32>,
    /// Subtract this from a recent token's logit for each time it was seen [default: 0].
    #[arg(long, value_name = "F", value_parser = limits::PENALTY, allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// Subtract this from the logit of any recent token [default: 0].
    #[arg(long, value_name = "F", value_parser = limits::PENALTY, allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// How many tokens back penalties look [default: 64].
    #[arg(long, value_name = "N", value_parser = limits::SOME_TOKENS)]
    repeat_last_n: Option<usize>,
    /// Seed of the random draws [default: the time].
    #[arg(short, long, value_name = "N")]
    seed: Option<u64>,
}

impl SamplingArgs {
    /// The settings to use with a model that has this `generation_config.json`; what of it is not obeyed is said.
    ///
    /// # Errors
    /// A value of the file that transformers refuses too.
    pub fn settings(&self, generation_config: Option<&Value>, context: &Context) -> Result<SamplerSettings> {
        if let Some(config) = generation_config {
            generation_remarks(config)?.iter().for_each(|remark| context.remark(remark));
        }
        let defaults = SamplerSettings::from_generation_config(generation_config);
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros() as u64);
        Ok(SamplerSettings {
            temperature: self.temp.unwrap_or(defaults.temperature),
            top_k: self.top_k.unwrap_or(defaults.top_k),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repeat_penalty: self.repeat_penalty.unwrap_or(defaults.repeat_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(defaults.frequency_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(defaults.presence_penalty),
            repeat_last_n: self.repeat_last_n.unwrap_or(defaults.repeat_last_n),
            seed: self.seed.unwrap_or_else(now),
        })
    }
}
