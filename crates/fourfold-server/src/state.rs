//! What every request needs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fourfold_infer::engine::Engine;
use fourfold_infer::{ChatTemplate, SamplerSettings, TokenBytes, Tokenizer};

use crate::grammar::Grammars;
use crate::tools::ToolFormat;

/// The model that is served.
pub struct Served {
    /// What clients call it.
    pub name: String,
    /// What they may call it besides.
    pub aliases: Vec<String>,
    /// Computes.
    pub engine: Engine,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template.
    pub template: ChatTemplate,
    /// The template's text, which tells how tools are called; empty where the model ships none.
    pub template_text: String,
    /// What a request's fields stand in place of.
    pub sampling: SamplerSettings,
    /// Tokens that end an answer.
    pub stop_ids: Vec<u32>,
    /// Rows of the model's vocabulary.
    pub vocab_size: usize,
    /// Elements of an embedding.
    pub hidden_size: usize,
    /// Bytes of the weights in memory.
    pub weight_bytes: usize,
}

/// What the server allows.
#[derive(Clone, Debug)]
pub struct Limits {
    /// The key that clients must show; none is needed where `None`.
    pub api_key: Option<String>,
    /// Bytes of a body.
    pub body_bytes: usize,
    /// Connections at once.
    pub connections: usize,
    /// Time for a request to arrive, and for a client to read.
    pub client_time: Duration,
    /// Time for a whole answer.
    pub answer_time: Duration,
    /// Time that running answers get when the server is told to end.
    pub shutdown_time: Duration,
    /// Whether pages of other origins may use it (CORS).
    pub any_origin: bool,
    /// Whether `/slots` and `/metrics` answer.
    pub insight: bool,
    /// Whether the chat page is served.
    pub page: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            api_key: None,
            body_bytes: 8 << 20,
            connections: 256,
            client_time: Duration::from_secs(60),
            answer_time: Duration::from_secs(600),
            shutdown_time: Duration::from_secs(30),
            any_origin: false,
            insight: true,
            page: true,
        }
    }
}

/// Everything, shared by all requests.
pub struct State {
    /// The model.
    pub served: Served,
    /// What is allowed.
    pub limits: Limits,
    /// How its template calls tools.
    pub tools: Option<ToolFormat>,
    /// Whether it thinks before it answers, between `<think>` and `</think>`.
    pub thinks: bool,
    /// What each token stands for.
    pub vocabulary: Vec<Option<TokenBytes>>,
    /// Grammars over its tokenizer.
    pub grammars: Grammars,
    /// Unix time of the start.
    pub created: u64,
    /// The same on the steady clock.
    pub started: Instant,
    /// Requests answered with an error, by no fault of ours and by ours.
    pub refused: [AtomicU64; 2],
    /// Open connections.
    pub connections: AtomicUsize,
}

impl State {
    /// Looks at the template and the vocabulary.
    pub fn new(served: Served, limits: Limits) -> Arc<Self> {
        let tools = ToolFormat::of_template(&served.template_text);
        let thinks = served.template_text.contains("<think>") || served.tokenizer.token_to_id("<think>").is_some();
        let vocabulary = served.tokenizer.vocabulary(served.vocab_size);
        Arc::new(Self {
            grammars: Grammars::new(&served.tokenizer, &vocabulary, &served.stop_ids),
            vocabulary,
            tools,
            thinks,
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            started: Instant::now(),
            refused: Default::default(),
            connections: AtomicUsize::new(0),
            served,
            limits,
        })
    }

    /// Whether clients may call the model so. An absent name is any.
    pub fn is_called(&self, name: &str) -> bool {
        name == self.served.name || self.served.aliases.iter().any(|alias| alias == name)
    }
}
