//! Answers that follow a grammar, by llguidance: JSON schemas, regular expressions, Lark.

use std::sync::Arc;

use fourfold_infer::engine::Constraint;
use fourfold_infer::{InferError, TokenBytes, Tokenizer, guarded};
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::ApiError;

/// What an answer has to be.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// JSON of this schema.
    Schema(Value),
    /// A text that this regular expression matches.
    Regex(String),
    /// A text of this grammar, in llguidance's kind of Lark.
    Lark(String),
}

impl Grammar {
    /// Any JSON object.
    pub fn object() -> Self {
        Self::Schema(json!({ "type": "object" }))
    }
}

/// Makes constraints over one tokenizer.
pub struct Grammars {
    factory: Result<ParserFactory, String>,
    /// Tokens that end an answer: the first is the one that grammars know.
    stop_ids: Arc<[u32]>,
    think: Option<(u32, u32)>,
}

impl Grammars {
    /// Lays the vocabulary out as a tree of bytes.
    pub fn new(tokenizer: &Tokenizer, vocabulary: &[Option<TokenBytes>], stop_ids: &[u32]) -> Self {
        let words: Vec<Vec<u8>> = vocabulary
            .iter()
            .map(|token| match token {
                Some(token) if token.special => [&[TokTrie::SPECIAL_TOKEN_MARKER], token.bytes.as_slice()].concat(),
                Some(token) => token.bytes.clone(),
                None => Vec::new(),
            })
            .collect();
        let end = stop_ids.first().copied().unwrap_or(0);
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, end), &words);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let factory = ParserFactory::new_simple(&env).map(|mut factory| {
            factory.quiet();
            factory
        });
        let think = tokenizer.token_to_id("<think>").zip(tokenizer.token_to_id("</think>"));
        Self { factory: factory.map_err(|e| e.to_string()), stop_ids: stop_ids.into(), think }
    }

    /// A constraint for one answer. In a chat, thoughts before it are free: `opened` says whether the prompt has begun them, and
    /// is `None` for a plain completion, which has none.
    ///
    /// # Errors
    /// The grammar cannot be read, asks for what is not supported, or is too large; `param` names its field.
    pub fn constraint(
        &self,
        grammar: &Grammar,
        opened: Option<bool>,
        param: &str,
    ) -> Result<Box<dyn Constraint>, ApiError> {
        let factory = self.factory.as_ref().map_err(|e| ApiError::internal(format!("grammars: {e}")))?;
        let grammar = match grammar {
            Grammar::Schema(schema) => TopLevelGrammar::from_json_schema(compact(schema)),
            Grammar::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Grammar::Lark(lark) => TopLevelGrammar::from_lark(lark.clone()),
        };
        let parser = guarded("llguidance", || factory.create_parser(grammar)).map_err(|e| ApiError::param(param, e))?;
        let parser = parser.map_err(|e| ApiError::param(param, first_line(&e.to_string())))?;
        let thoughts = match self.think.zip(opened) {
            Some(((_, end), true)) => Thoughts::Inside { end },
            Some(((begin, end), false)) => Thoughts::MayBegin { begin, end },
            None => Thoughts::Over,
        };
        Ok(Box::new(Following { matcher: Matcher::new(Ok(parser)), stop_ids: Arc::clone(&self.stop_ids), thoughts }))
    }
}

/// A schema whose values are written on one line, as Python's `json.dumps` does: a model could go on with white space for ever.
pub fn compact(schema: &Value) -> Value {
    let mut schema = schema.clone();
    if let Some(object) = schema.as_object_mut() {
        let form = json!({ "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": " });
        object.entry("x-guidance").or_insert(form);
    }
    schema
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().chars().take(300).collect()
}

/// Where the thoughts before an answer are, by their tokens.
#[derive(Clone, Copy)]
enum Thoughts {
    MayBegin { begin: u32, end: u32 },
    Inside { end: u32 },
    Over,
}

/// An answer that follows a grammar.
struct Following {
    matcher: Matcher,
    stop_ids: Arc<[u32]>,
    thoughts: Thoughts,
}

impl Constraint for Following {
    fn restrict(&mut self, logits: &mut [f32]) -> Result<(), InferError> {
        let free = match self.thoughts {
            Thoughts::Inside { .. } => return Ok(()),
            Thoughts::MayBegin { begin, .. } => logits.get(begin as usize).map(|&logit| (begin, logit)),
            Thoughts::Over => None,
        };
        let allowed =
            self.matcher.compute_mask_or_eos().map_err(|e| InferError::Grammar(first_line(&e.to_string())))?;
        let ends = self.stop_ids.first().is_some_and(|&end| allowed.is_allowed(end));
        let kept: Vec<(u32, f32)> = match ends {
            // Any of the tokens that end an answer may end it.
            true => self.stop_ids.iter().filter_map(|&id| Some((id, *logits.get(id as usize)?))).collect(),
            false => Vec::new(),
        };
        for (id, logit) in logits.iter_mut().enumerate() {
            if !allowed.is_allowed(id as u32) {
                *logit = f32::NEG_INFINITY;
            }
        }
        for (id, logit) in kept.into_iter().chain(free) {
            logits[id as usize] = logit;
        }
        Ok(())
    }

    fn accept(&mut self, id: u32) -> Result<bool, InferError> {
        match self.thoughts {
            Thoughts::MayBegin { begin, end } if id == begin => {
                self.thoughts = Thoughts::Inside { end };
                return Ok(false);
            }
            Thoughts::Inside { end } => {
                if id == end {
                    self.thoughts = Thoughts::Over;
                }
                return Ok(false);
            }
            Thoughts::MayBegin { .. } => self.thoughts = Thoughts::Over,
            Thoughts::Over => {}
        }
        self.matcher.consume_token(id).map_err(|e| InferError::Grammar(first_line(&e.to_string())))?;
        Ok(self.matcher.is_stopped())
    }
}
