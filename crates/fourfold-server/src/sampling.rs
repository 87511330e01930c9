//! The fields of a request that say how tokens are chosen.

use fourfold_infer::SamplerSettings;
use fourfold_infer::engine::{Constraint, Request};
use serde_json::Value;

use crate::ApiError;
use crate::fields::Fields;
use crate::grammar::Grammar;

/// Most answers to one request.
const MOST_CHOICES: u64 = 64;
/// Most stop strings, and bytes of one.
const MOST_STOPS: usize = 16;
const STOP_BYTES: usize = 1024;
/// Most probabilities of one token.
const MOST_LOGPROBS: u64 = 20;

/// What chat and plain completions ask alike.
pub struct Choices {
    /// How many answers.
    pub n: usize,
    /// How tokens are chosen; the i-th answer adds i to the seed.
    pub sampling: SamplerSettings,
    /// Added to tokens' logits.
    pub logit_bias: Vec<(u32, f32)>,
    /// Texts that end an answer.
    pub stops: Vec<String>,
    /// Most tokens of an answer.
    pub max_tokens: Option<usize>,
    /// Whether the answer arrives piece by piece.
    pub stream: bool,
    /// Whether a last piece tells what was used.
    pub include_usage: bool,
    /// Whether the token that would end an answer is passed over.
    pub ignore_eos: bool,
}

impl Choices {
    /// Reads them; what is absent is the model's.
    ///
    /// # Errors
    /// A field is wrong.
    pub fn read(fields: &Fields, defaults: &SamplerSettings, vocab_size: usize) -> Result<Self, ApiError> {
        let mut sampling = SamplerSettings { seed: rand::random(), ..defaults.clone() };
        let any = f64::from(f32::MIN)..=f64::from(f32::MAX);
        let positive = f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX);
        let set = |to: &mut f32, from: Option<f32>| *to = from.unwrap_or(*to);
        set(&mut sampling.temperature, fields.number("temperature", 0.0..=100.0)?);
        set(&mut sampling.top_p, fields.number("top_p", 0.0..=1.0)?);
        set(&mut sampling.min_p, fields.number("min_p", 0.0..=1.0)?);
        set(&mut sampling.frequency_penalty, fields.number("frequency_penalty", any.clone())?);
        set(&mut sampling.presence_penalty, fields.number("presence_penalty", any)?);
        set(&mut sampling.repeat_penalty, fields.number("repetition_penalty", positive.clone())?);
        set(&mut sampling.repeat_penalty, fields.number("repeat_penalty", positive)?);
        if let Some(k) = top_k(fields)? {
            sampling.top_k = k;
        }
        if let Some(n) = fields.whole("repeat_last_n", 0..=1 << 20)? {
            sampling.repeat_last_n = n as usize;
        }
        if let Some(seed) = seed(fields)? {
            sampling.seed = seed;
        }
        let stops = fields.texts("stop")?.unwrap_or_default();
        if stops.len() > MOST_STOPS || stops.iter().any(|stop| stop.is_empty() || stop.len() > STOP_BYTES) {
            let message = format!("at most {MOST_STOPS} texts of 1 to {STOP_BYTES} bytes are expected");
            return Err(fields.wrong("stop", message));
        }
        let most = ["max_completion_tokens", "max_tokens", "n_predict"];
        let mut max_tokens = None;
        for name in most {
            if max_tokens.is_none() {
                max_tokens = fields.whole(name, 0..=u64::from(u32::MAX))?.map(|n| n as usize);
            }
        }
        let options = fields.object("stream_options")?;
        Ok(Self {
            n: fields.whole("n", 1..=MOST_CHOICES)?.unwrap_or(1) as usize,
            sampling,
            logit_bias: logit_bias(fields, vocab_size)?,
            stops,
            max_tokens,
            stream: fields.flag("stream")?.unwrap_or(false),
            include_usage: options.map_or(Ok(None), |o| o.flag("include_usage"))?.unwrap_or(false),
            ignore_eos: fields.flag("ignore_eos")?.unwrap_or(false),
        })
    }

    /// The settings of one of the answers.
    pub fn sampling_of(&self, choice: usize) -> SamplerSettings {
        SamplerSettings { seed: self.sampling.seed.wrapping_add(choice as u64), ..self.sampling.clone() }
    }

    /// What the engine is asked for one of the answers to the prompt `ids`. Nobody listens yet ([`crate::run::start`]).
    pub fn request(
        &self,
        choice: usize,
        ids: &[u32],
        stop_ids: &[u32],
        logprobs: Option<usize>,
        constraint: Option<Box<dyn Constraint>>,
    ) -> Request {
        Request {
            ids: ids.to_vec(),
            max_tokens: self.max_tokens,
            stop_ids: if self.ignore_eos { Vec::new() } else { stop_ids.to_vec() },
            sampling: self.sampling_of(choice),
            logit_bias: self.logit_bias.clone(),
            logprobs,
            constraint,
            embed: false,
            on_event: Box::new(|_| true),
        }
    }
}

/// vLLM's and llama.cpp's clients write −1 for "all".
fn top_k(fields: &Fields) -> Result<Option<usize>, ApiError> {
    if fields.get("top_k").and_then(Value::as_i64) == Some(-1) {
        return Ok(Some(0));
    }
    Ok(fields.whole("top_k", 0..=1 << 30)?.map(|k| k as usize))
}

/// Any whole number; negative ones (−1 in llama.cpp) draw one.
fn seed(fields: &Fields) -> Result<Option<u64>, ApiError> {
    match fields.get("seed") {
        None => Ok(None),
        Some(value) => match (value.as_u64(), value.as_i64()) {
            (Some(seed), _) => Ok(Some(seed)),
            (None, Some(_)) => Ok(None),
            (None, None) => Err(fields.wrong("seed", "a whole number is expected")),
        },
    }
}

/// `{"token id": bias}`.
fn logit_bias(fields: &Fields, vocab_size: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(object) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let wrong = || fields.wrong("logit_bias", "an object of token ids and numbers from -100 to 100 is expected");
    let one = |(id, bias): (&String, &Value)| {
        let id = id.parse::<u32>().ok().filter(|&id| (id as usize) < vocab_size).ok_or_else(wrong)?;
        let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias)).ok_or_else(wrong)?;
        // As OpenAI has it, -100 bans a token.
        Ok((id, if bias <= -100.0 { f32::NEG_INFINITY } else { bias as f32 }))
    };
    object.map().iter().map(one).collect()
}

/// Probabilities of the tokens of a chat: `logprobs` and `top_logprobs`.
pub fn chat_logprobs(fields: &Fields) -> Result<Option<usize>, ApiError> {
    let top = fields.whole("top_logprobs", 0..=MOST_LOGPROBS)?;
    match (fields.flag("logprobs")?.unwrap_or(false), top) {
        (true, top) => Ok(Some(top.unwrap_or(0) as usize)),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(fields.wrong("top_logprobs", "logprobs must be true")),
    }
}

/// Probabilities of the tokens of a plain completion: `logprobs` is a number.
pub fn completion_logprobs(fields: &Fields) -> Result<Option<usize>, ApiError> {
    Ok(fields.whole("logprobs", 0..=MOST_LOGPROBS)?.map(|n| n as usize))
}

/// The grammar of the answer and the field that asks for it: `response_format`, or `grammar`, `regex`, `json_schema`.
pub fn grammar(fields: &Fields) -> Result<Option<(Grammar, &'static str)>, ApiError> {
    let mut found = Vec::new();
    if let Some(format) = fields.object("response_format")? {
        let name = "response_format";
        match format.required_text("type")? {
            "text" => {}
            "json_object" => {
                let schema = format.get("schema").cloned();
                found.push((schema.map_or_else(Grammar::object, Grammar::Schema), name));
            }
            "json_schema" => {
                let given = format.object("json_schema")?.and_then(|object| object.get("schema"));
                let schema = given.ok_or_else(|| format.wrong("json_schema", "an object with a schema is expected"))?;
                found.push((Grammar::Schema(schema.clone()), name));
            }
            "regex" => {
                let pattern = format.text("pattern")?.or(format.text("regex")?);
                let pattern = pattern.ok_or_else(|| format.wrong("pattern", "this field is required"))?;
                found.push((Grammar::Regex(pattern.to_owned()), name));
            }
            "grammar" => found.push((Grammar::Lark(format.required_text("grammar")?.to_owned()), name)),
            _ => return Err(format.wrong("type", "text, json_object, json_schema, regex or grammar is expected")),
        }
    }
    for name in ["json_schema", "guided_json"] {
        if let Some(schema) = fields.get(name) {
            found.push((Grammar::Schema(schema.clone()), name));
        }
    }
    for name in ["regex", "guided_regex"] {
        found.extend(fields.text(name)?.map(|pattern| (Grammar::Regex(pattern.to_owned()), name)));
    }
    for name in ["grammar", "guided_grammar"] {
        found.extend(fields.text(name)?.map(|lark| (Grammar::Lark(lark.to_owned()), name)));
    }
    if let [_, (_, second), ..] = found.as_slice() {
        return Err(ApiError::param(*second, "an answer has one grammar, another field asks for another"));
    }
    Ok(found.pop())
}
