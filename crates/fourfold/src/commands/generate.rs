//! `fourfold generate`: continues a prompt.

use std::cell::RefCell;
use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Args;
use fourfold_formats::regular;
use fourfold_infer::{GenerationSettings, Message, Role, Sampler, SamplerSettings, Session, Stop, generate};
use serde::Serialize;
use serde_json::Value;

use super::answer::{AnswerArgs, Printer, Thinking, stop_of};
use super::sampling::SamplingArgs;
use crate::context::Context;
use crate::device::{self, DeviceReport};
use crate::fit::{self, Room};
use crate::model;
use crate::output::{self, Report};
use crate::tokenizer::remark_tokenizer;
use crate::{human, interrupt, limits, memory};

#[derive(Args)]
pub struct GenerateArgs {
    /// A directory, a .gguf file, or a name on the hub.
    #[arg(value_name = "MODEL")]
    model: String,
    /// Put this adapter (LoRA, in PEFT's format) on the model.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// The text to continue [default: read from stdin].
    #[arg(short, long, conflicts_with = "file")]
    prompt: Option<String>,
    /// A file with the text to continue.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Most tokens to produce [default: until the text ends or the context is full].
    #[arg(short = 'n', long, visible_alias = "n-predict", value_name = "N", value_parser = limits::SOME_TOKENS)]
    predict: Option<usize>,
    /// Positions of context [default: the model's, as far as memory allows].
    #[arg(short, long = "ctx-size", visible_alias = "context", value_name = "TOKENS", value_parser = limits::TOKENS)]
    context: Option<usize>,
    /// Go on where the model would end its text.
    #[arg(long)]
    ignore_eos: bool,
    /// Print the continuation alone, without the prompt of -p before it.
    #[arg(long)]
    no_display_prompt: bool,
    /// Take the text for one message of a conversation: the model's chat template goes around it, the answer is printed alone.
    #[arg(long)]
    chat: bool,
    /// With --chat: instructions before the message.
    #[arg(long, visible_alias = "system", value_name = "TEXT", requires = "chat")]
    system_prompt: Option<String>,
    #[command(flatten)]
    answer: AnswerArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

#[derive(Serialize)]
struct GenerateReport {
    model: String,
    prompt: String,
    text: String,
    stop: Stop,
    prompt_tokens: usize,
    tokens: usize,
    prompt_tokens_per_second: f64,
    tokens_per_second: f64,
    weight_bytes: u64,
    kv_bytes: u64,
    peak_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<DeviceReport>,
    sampling: SamplerSettings,
}

impl Report for GenerateReport {
    fn text(&self) -> String {
        self.text.clone()
    }
}

pub fn run(args: &GenerateArgs, context: &Context) -> Result<()> {
    let prompt = prompt(args)?;
    let open = model::open_adapted(&args.model, args.adapter.as_deref(), context)?;
    let tokenizer = open.tokenizer()?;
    remark_tokenizer(&tokenizer, open.spec.vocab_size, context);
    let mut stop_ids = open.stop_ids(&tokenizer);
    let (ids, thinking) = if args.chat {
        let (template, own) = open.chat_template()?;
        if !own {
            context.remark(
                "The model ships no chat template: ChatML is used. A base model will not answer as an assistant.",
            );
            stop_ids.extend(tokenizer.token_to_id("<|im_end|>"));
        }
        let message = |role, content: &str| Value::from(&Message { role, content: content.to_owned() });
        let system = args.system_prompt.iter().map(|text| message(Role::System, text));
        let messages: Vec<Value> = system.chain([message(Role::User, prompt.trim_end_matches('\n'))]).collect();
        let text = template.render(&messages, None, true)?;
        let ids = if own { tokenizer.encode_fragment(&text)? } else { tokenizer.encode_beginning(&text)? };
        (ids, Thinking::of(open.checkpoint.chat_template.as_deref(), &tokenizer, &text))
    } else {
        (tokenizer.encode_text(&prompt)?, Thinking::default())
    };
    let positions = fit::positions(args.context, &open, 1, context);
    let model = open.load_on_device(Room::sequence(positions), context)?;
    let settings =
        GenerationSettings { max_tokens: args.predict, stop_ids: if args.ignore_eos { Vec::new() } else { stop_ids } };
    let sampling = args.sampling.settings(open.checkpoint.generation_config.as_ref(), context)?;
    let weight_bytes = model.weight_bytes() as u64;
    let mut session = Session::new(model.clone(), context.kv, positions);
    let mut sampler = Sampler::new(sampling.clone());

    let streaming = !context.json;
    if streaming && args.prompt.is_some() && !args.chat && !args.no_display_prompt {
        output::write(&prompt)?;
    }
    let _cooperation = interrupt::cooperate();
    let stream = if args.chat { tokenizer.detokenizer() } else { tokenizer.detokenizer_after(&ids)? };
    let printer = RefCell::new(Printer::new(stream, streaming, &args.answer, thinking));
    let ended = || interrupt::requested() || printer.borrow().stopped();
    let answer = generate(&mut session, &mut sampler, &ids, &settings, &ended, |id| printer.borrow_mut().push(id))?;
    let mut printer = printer.into_inner();
    printer.finish()?;
    let stop = stop_of(&answer, &printer);
    let report = GenerateReport {
        model: args.model.clone(),
        prompt,
        text: printer.text,
        stop,
        prompt_tokens: answer.prompt_tokens,
        tokens: answer.ids.len(),
        prompt_tokens_per_second: answer.prompt_rate(),
        tokens_per_second: answer.decode_rate(),
        weight_bytes,
        kv_bytes: session.cache_bytes() as u64,
        peak_memory: memory::peak_resident(),
        device: device::report(&model),
        sampling,
    };
    if streaming {
        output::write("\n")?;
        context.remark(&summary(&report, session.context()));
    } else {
        context.print(&report)?;
    }
    if stop == Stop::Interrupted {
        anyhow::bail!("interrupted");
    }
    Ok(())
}

fn prompt(args: &GenerateArgs) -> Result<String> {
    match (&args.prompt, &args.file) {
        (Some(prompt), _) => Ok(prompt.clone()),
        (None, Some(file)) => regular::read_text(file, limits::MOST_BYTES).with_context(|| file.display().to_string()),
        (None, None) => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("the prompt on stdin")?;
            Ok(text)
        }
    }
}

/// Why an answer ended where neither the model nor the caller ended it.
pub(super) fn cut_short(stop: Stop, context: usize) -> Option<String> {
    match stop {
        Stop::Context => Some(format!("stopped: the context of {context} tokens is full (--ctx-size)")),
        Stop::EndOfText | Stop::Length | Stop::StopString | Stop::Interrupted => None,
    }
}

fn summary(report: &GenerateReport, context: usize) -> String {
    let memory = report.peak_memory.map(|m| format!("; peak memory {}", human::bytes(m))).unwrap_or_default();
    let why = cut_short(report.stop, context).map(|why| format!("; {why}")).unwrap_or_default();
    let device = report.device.as_ref().map(|d| format!("; {}", d.text())).unwrap_or_default();
    format!(
        "[prompt {} tokens, {:.1} a second; answer {} tokens, {:.1} a second{memory}{device} = weights {} + KV cache {} + the rest{why}]",
        report.prompt_tokens,
        report.prompt_tokens_per_second,
        report.tokens,
        report.tokens_per_second,
        human::bytes(report.weight_bytes),
        human::bytes(report.kv_bytes),
    )
}
