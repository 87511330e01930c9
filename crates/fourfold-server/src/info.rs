//! What the server says of itself: health, models, properties, slots, metrics.

use std::fmt::Write as _;
use std::sync::atomic::Ordering::Relaxed;

use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::reply::json_response;
use crate::state::State;

/// `GET /health`.
pub fn health() -> Response {
    json_response(&json!({ "status": "ok" }))
}

/// `GET /v1/models`.
pub fn models(state: &State) -> Response {
    let served = &state.served;
    let names = std::iter::once(&served.name).chain(&served.aliases);
    let data: Vec<Value> = names.map(|name| model(state, name)).collect();
    json_response(&json!({ "object": "list", "data": data }))
}

/// `GET /v1/models/NAME`.
pub fn model(state: &State, name: &str) -> Value {
    let context = state.served.engine.settings().context;
    json!({ "id": name, "object": "model", "created": state.created, "owned_by": "fourfold", "max_model_len": context,
            "meta": { "n_vocab": state.served.vocab_size, "n_embd": state.served.hidden_size,
                      "size": state.served.weight_bytes } })
}

/// `GET /props`.
pub fn props(state: &State) -> Response {
    let (served, settings) = (&state.served, state.served.engine.settings());
    json_response(&json!({
        "model_alias": served.name, "total_slots": settings.parallel, "chat_template": served.template_text,
        "default_generation_settings": { "n_ctx": settings.context, "params": served.sampling },
        "reasoning": state.thinks, "tools": state.tools.is_some(),
        "build_info": concat!("fourfold ", env!("CARGO_PKG_VERSION")),
        "weight_bytes": served.weight_bytes,
    }))
}

/// `GET /slots`.
pub fn slots(state: &State) -> Response {
    let context = state.served.engine.settings().context;
    let slots = state.served.engine.slots();
    let slot = |(id, slot): (usize, &fourfold_infer::engine::SlotState)| {
        json!({ "id": id, "is_processing": slot.busy, "id_task": slot.request, "n_ctx": context,
                "n_prompt_tokens": slot.prompt_tokens, "n_prompt_tokens_processed": slot.prompt_read,
                "n_decoded": slot.generated })
    };
    json_response(&slots.iter().enumerate().map(slot).collect())
}

/// `GET /metrics`, in Prometheus' text format.
pub fn metrics(state: &State) -> Response {
    let counters = state.served.engine.counters();
    let mut text = String::new();
    let mut put = |kind: &str, name: &str, help: &str, value: f64| {
        let _ = write!(text, "# HELP fourfold_{name} {help}\n# TYPE fourfold_{name} {kind}\nfourfold_{name} {value}\n");
    };
    let total = |counter: &std::sync::atomic::AtomicU64| counter.load(Relaxed) as f64;
    let now = |gauge: &std::sync::atomic::AtomicUsize| gauge.load(Relaxed) as f64;
    let micros = |counter: &std::sync::atomic::AtomicU64| counter.load(Relaxed) as f64 / 1e6;
    put("counter", "requests_accepted_total", "Requests taken.", total(&counters.accepted));
    put("counter", "requests_refused_total", "Requests refused because the queue was full.", total(&counters.refused));
    put("counter", "requests_completed_total", "Requests that ended by themselves.", total(&counters.completed));
    put("counter", "requests_cancelled_total", "Requests whose client went away.", total(&counters.cancelled));
    put("counter", "requests_failed_total", "Requests that failed.", total(&counters.failed));
    put("counter", "client_errors_total", "Responses with a status of 400 to 499.", total(&state.refused[0]));
    put("counter", "server_errors_total", "Responses with a status of 500 and above.", total(&state.refused[1]));
    put("counter", "prompt_tokens_total", "Tokens of prompts.", total(&counters.prompt_tokens));
    put(
        "counter",
        "prompt_tokens_cached_total",
        "Tokens of prompts found in the cache.",
        total(&counters.cached_tokens),
    );
    put("counter", "generated_tokens_total", "Tokens produced.", total(&counters.generated_tokens));
    put("counter", "decode_steps_total", "Decoding steps of one or more requests.", total(&counters.decode_steps));
    put("counter", "prompt_seconds_total", "Time spent reading prompts.", micros(&counters.prompt_micros));
    put("counter", "decode_seconds_total", "Time spent decoding.", micros(&counters.decode_micros));
    put(
        "counter",
        "prefix_evicted_total",
        "Pieces of earlier prompts that had to go.",
        total(&counters.evicted_pieces),
    );
    put("gauge", "requests_running", "Requests being computed.", now(&counters.running));
    put("gauge", "requests_waiting", "Requests that wait.", now(&counters.waiting));
    put("gauge", "connections", "Open connections.", now(&state.connections));
    put("gauge", "kv_bytes", "Bytes of keys and values of running requests.", now(&counters.kv_bytes));
    put("gauge", "prefix_bytes", "Bytes of keys and values kept of earlier prompts.", now(&counters.prefix_bytes));
    put("gauge", "weight_bytes", "Bytes of the weights in memory.", state.served.weight_bytes as f64);
    put("gauge", "uptime_seconds", "Time since the start.", state.started.elapsed().as_secs_f64());
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}
