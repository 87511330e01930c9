//! `fourfold serve`: the model behind OpenAI's API, and a chat page.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use fourfold_infer::engine::{Engine, EngineSettings};
use fourfold_server::{Limits, Served};
use serde_json::json;

use super::sampling::SamplingArgs;
use crate::context::Context;
use crate::fit::{self, Room};
use crate::{human, interrupt, memory, model, output};

/// Time between two looks at whether the server is to end.
const LOOK: Duration = Duration::from_millis(100);

#[derive(Args)]
pub struct ServeArgs {
    /// A directory, a .gguf file, or a name on the hub.
    #[arg(value_name = "MODEL", env = "FOURFOLD_MODEL")]
    model: String,
    /// Put this adapter (LoRA, in PEFT's format) on the model.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// The address to listen on; 0.0.0.0 or :: for all of this machine's.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1", env = "FOURFOLD_HOST")]
    host: IpAddr,
    /// The port to listen on; 0 takes a free one.
    #[arg(long, value_name = "PORT", default_value_t = 8080, env = "FOURFOLD_PORT")]
    port: u16,
    /// The key that clients must show.
    #[arg(long, value_name = "KEY", env = "FOURFOLD_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// What clients call the model [default: the last part of its name]; more than one may be given.
    #[arg(short, long, value_name = "NAME", env = "FOURFOLD_ALIAS")]
    alias: Vec<String>,
    /// Requests that are computed at once.
    #[arg(long, visible_alias = "np", value_name = "N", default_value_t = 4, env = "FOURFOLD_PARALLEL",
          value_parser = clap::value_parser!(u32).range(1..=256))]
    parallel: u32,
    /// Requests that may wait; more are refused with status 429.
    #[arg(long, value_name = "N", default_value_t = 256, env = "FOURFOLD_QUEUE",
          value_parser = clap::value_parser!(u32).range(1..=65536))]
    queue: u32,
    /// Positions of context of each request [default: the model's, as far as memory allows].
    #[arg(short, long = "ctx-size", visible_alias = "context", value_name = "TOKENS", env = "FOURFOLD_CTX_SIZE",
          value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    context: Option<u32>,
    /// Memory for keys and values of earlier prompts, in MiB; 0 keeps none.
    #[arg(long, value_name = "MIB", default_value_t = 512, env = "FOURFOLD_PREFIX_CACHE",
          value_parser = clap::value_parser!(u32).range(0..=1 << 20))]
    prefix_cache: u32,
    /// Seconds that an answer may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, env = "FOURFOLD_TIMEOUT",
          value_parser = clap::value_parser!(u32).range(1..=86400))]
    timeout: u32,
    /// Seconds that running answers get when the server is told to end.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(0..=86400))]
    grace: u32,
    /// Connections at once.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65536))]
    connections: u32,
    /// Largest body of a request, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    max_body: u32,
    /// Let pages of other origins use the server (CORS).
    #[arg(long)]
    cors: bool,
    /// Leave /slots and /metrics out.
    #[arg(long)]
    no_metrics: bool,
    /// Leave the chat page out.
    #[arg(long)]
    no_webui: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
}

pub fn run(args: &ServeArgs, context: &Context) -> Result<()> {
    let open = model::open_adapted(&args.model, args.adapter.as_deref(), context)?;
    let tokenizer = open.tokenizer()?;
    let (template, own) = open.chat_template()?;
    let mut stop_ids = open.stop_ids(&tokenizer);
    if !own {
        context
            .remark("The model ships no chat template: ChatML is used. A base model will not answer as an assistant.");
        stop_ids.extend(tokenizer.token_to_id("<|im_end|>"));
    }
    let sequences = args.parallel as usize;
    let positions = fit::positions(args.context.map(|tokens| tokens as usize), &open, sequences, context);
    let room = Room::sequence(positions);
    let loaded = open.load_here(room, context)?;
    let settings = EngineSettings {
        parallel: args.parallel as usize,
        queue: args.queue as usize,
        context: positions,
        kv: context.kv,
        prefix_bytes: (args.prefix_cache as usize) << 20,
    };
    let spec = loaded.spec();
    let per_token = spec.kv_bytes_per_token(context.kv) as u64;
    let (vocab_size, hidden_size, weight_bytes) = (spec.vocab_size, spec.hidden_size, loaded.weight_bytes());
    let engine = Engine::start(loaded, settings).context("cannot start the engine's thread")?;
    let settings = engine.settings();
    let mut names = args.alias.clone();
    if names.is_empty() {
        names.push(name_of(&args.model));
    }
    let served = Served {
        name: names.remove(0),
        aliases: names,
        engine,
        tokenizer,
        template,
        template_text: open.checkpoint.chat_template.clone().unwrap_or_default(),
        sampling: args.sampling.settings(open.checkpoint.generation_config.as_ref(), context)?,
        stop_ids,
        vocab_size,
        hidden_size,
        weight_bytes,
    };
    let limits = Limits {
        api_key: args.api_key.clone().filter(|key| !key.is_empty()),
        body_bytes: (args.max_body as usize) << 20,
        connections: args.connections as usize,
        answer_time: Duration::from_secs(u64::from(args.timeout)),
        shutdown_time: Duration::from_secs(u64::from(args.grace)),
        any_origin: args.cors,
        insight: !args.no_metrics,
        page: !args.no_webui,
        ..Limits::default()
    };
    if !args.host.is_loopback() && limits.api_key.is_none() {
        context.remark("Warning: anybody who reaches this address can use the model: --api-key asks for a key.");
    }
    let most = settings.parallel as u64 * settings.context as u64 * per_token + settings.prefix_bytes as u64;
    context.remark(&format!(
        "weights {}; {} requests of up to {} tokens at once, keys and values up to {}",
        human::bytes(weight_bytes as u64),
        settings.parallel,
        settings.context,
        human::bytes(most)
    ));
    let cooperation = interrupt::cooperate();
    let (name, json) = (served.name.clone(), context.json);
    let listening = |address: SocketAddr| {
        if json {
            let line = json!({ "event": "listening", "address": address.to_string(), "model": name });
            let _ = output::write(&format!("{line}\n"));
        } else {
            context.remark(&format!("{name} at http://{address} (chat page; API below /v1). Ctrl-C ends."));
        }
    };
    let shutdown = async {
        while !interrupt::requested() {
            fourfold_server::sleep(LOOK).await;
        }
    };
    let address = SocketAddr::new(args.host, args.port);
    fourfold_server::serve(served, limits, address, listening, shutdown).with_context(|| address.to_string())?;
    drop(cooperation);
    interrupt::clear();
    if let Some(peak) = memory::peak_resident() {
        context.remark(&format!("ended; peak memory {}", human::bytes(peak)));
    }
    Ok(())
}

/// The last part of a path or of a name on the hub, without a file's ending.
fn name_of(model: &str) -> String {
    let last = model.trim_end_matches('/').rsplit('/').next().unwrap_or(model);
    let last = last.strip_suffix(".gguf").unwrap_or(last);
    if last.is_empty() || last == "." || last == ".." { "model".to_owned() } else { last.to_owned() }
}
