//! `fourfold chat`: a conversation, with the model's own template and the KV cache kept between turns.

use std::io::{BufRead, IsTerminal, Read, Write};
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Args;
use fourfold_infer::{
    ChatTemplate, GenerationSettings, InferError, Message, Role, Sampler, Session, Stop, Tokenizer, generate,
};
use serde::Serialize;
use serde_json::Value;

use super::generate::{Printer, cut_short};
use super::sampling::SamplingArgs;
use crate::context::Context;
use crate::device::{self, DeviceReport};
use crate::fit::Room;
use crate::model;
use crate::output::{self, Report};
use crate::tokenizer::remark_tokenizer;
use crate::{interrupt, limits, memory};

#[derive(Args)]
pub struct ChatArgs {
    /// A directory, a .gguf file, or a name on the hub.
    #[arg(value_name = "MODEL")]
    model: String,
    /// Put this adapter (LoRA, in PEFT's format) on the model.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Instructions for the whole conversation.
    #[arg(long, visible_alias = "system", value_name = "TEXT")]
    system_prompt: Option<String>,
    /// Say this first, before reading stdin.
    #[arg(short, long)]
    prompt: Option<String>,
    /// Most tokens of an answer [default: until it ends].
    #[arg(short = 'n', long, visible_alias = "n-predict", value_name = "N", value_parser = limits::SOME_TOKENS)]
    predict: Option<usize>,
    /// Positions of context [default: the model's, at most 8192].
    #[arg(short, long = "ctx-size", visible_alias = "context", value_name = "TOKENS", value_parser = limits::TOKENS)]
    context: Option<usize>,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// One answer's figures.
#[derive(Serialize)]
struct Turn {
    prompt_tokens: usize,
    reused_tokens: usize,
    tokens: usize,
    stop: Stop,
    prompt_tokens_per_second: f64,
    tokens_per_second: f64,
}

#[derive(Serialize)]
struct ChatReport<'a> {
    model: &'a str,
    messages: &'a [Message],
    turns: &'a [Turn],
    peak_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<DeviceReport>,
}

impl Report for ChatReport<'_> {
    fn text(&self) -> String {
        String::new()
    }
}

const HELP: &str = "/reset begins anew, /quit leaves; Ctrl-C stops an answer, a second one leaves";

pub fn run(args: &ChatArgs, context: &Context) -> Result<()> {
    let open = model::open_adapted(&args.model, args.adapter.as_deref(), context)?;
    let tokenizer = open.tokenizer()?;
    remark_tokenizer(&tokenizer, open.spec.vocab_size, context);
    let (template, own) = open.chat_template()?;
    let positions = args.context.unwrap_or(8192);
    let room = Room::sequence(positions.min(open.spec.max_positions));
    let model = open.load_on_device(room, context)?;
    let mut chat = Chat {
        session: Session::new(model.clone(), context.kv, positions),
        sampler: Sampler::new(args.sampling.settings(open.checkpoint.generation_config.as_ref(), context)?),
        settings: GenerationSettings { max_tokens: args.predict, stop_ids: open.stop_ids(&tokenizer) },
        template,
        own_template: own,
        tokenizer: &tokenizer,
        messages: Vec::new(),
        turns: Vec::new(),
        stream: !context.json,
    };
    if !own {
        context
            .remark("The model ships no chat template: ChatML is used. A base model will not answer as an assistant.");
        // A model that knows ChatML at all ends its turns so.
        chat.settings.stop_ids.extend(tokenizer.token_to_id("<|im_end|>"));
    }
    let system = args.system_prompt.as_deref();
    chat.reset(system);
    let terminal = std::io::stdin().is_terminal();
    if terminal {
        context.remark(&format!("{} — {HELP}", args.model));
    }
    let mut first = args.prompt.clone();
    // Turns that could not be answered, and why the first of them could not.
    let (mut failed, mut reason) = (0, None);
    loop {
        let line = match first.take() {
            Some(line) => line,
            None => match read_line(terminal, context)? {
                Some(line) => line,
                None => break,
            },
        };
        match line.trim() {
            "" => {}
            "/quit" | "/exit" | "/bye" => break,
            "/reset" => chat.reset(system),
            "/help" => context.remark(HELP),
            said => match chat.answer(said) {
                Ok(()) => {
                    let stop = chat.turns.last().map(|turn| turn.stop);
                    if let Some(why) = stop.and_then(|stop| cut_short(stop, chat.session.context())) {
                        context.remark(&format!("{why}; /reset begins anew"));
                    }
                }
                Err(error) if is_recoverable(&error) && terminal => {
                    output::note(&format!("{error:#}; /reset begins anew"));
                }
                // A program that writes the lines goes on with the next one, and learns of it at the end.
                Err(error) if is_recoverable(&error) => {
                    failed += 1;
                    if reason.is_none() {
                        reason = Some(error);
                    } else {
                        output::note(&format!("error: {error:#}"));
                    }
                }
                Err(error) => return Err(error),
            },
        }
    }
    if context.json && (failed == 0 || !chat.turns.is_empty()) {
        let (peak_memory, device) = (memory::peak_resident(), device::report(&model));
        let report =
            ChatReport { model: &args.model, messages: &chat.messages, turns: &chat.turns, peak_memory, device };
        context.print(&report)?;
    }
    match reason {
        Some(error) if chat.turns.is_empty() && failed == 1 => Err(error),
        Some(error) => Err(error.context(format!("{failed} of {} turns failed", chat.turns.len() + failed))),
        None => Ok(()),
    }
}

/// Most bytes of a line on stdin.
const LINE_LIMIT: u64 = 64 << 20;

/// A line from stdin; `None` at its end. Bytes that are no UTF-8 become U+FFFD.
fn read_line(terminal: bool, context: &Context) -> Result<Option<String>> {
    if terminal {
        let mut err = std::io::stderr().lock();
        write!(err, "\n> ").and_then(|()| err.flush()).context("the terminal")?;
    }
    let mut bytes = Vec::new();
    let read = std::io::stdin().lock().take(LINE_LIMIT).read_until(b'\n', &mut bytes).context("stdin")?;
    anyhow::ensure!((read as u64) < LINE_LIMIT, "stdin: a line of more than {LINE_LIMIT} bytes");
    let line = String::from_utf8(bytes).unwrap_or_else(|error| {
        context.remark("That line is no UTF-8: its broken bytes are read as U+FFFD.");
        String::from_utf8_lossy(error.as_bytes()).into_owned()
    });
    Ok((read > 0).then_some(line))
}

/// Whether the conversation can go on after it: the person said too much.
fn is_recoverable(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref(),
        Some(InferError::ContextFull { .. } | InferError::Template(_) | InferError::NoRow { .. })
    )
}

struct Chat<'a> {
    session: Session,
    sampler: Sampler,
    settings: GenerationSettings,
    template: ChatTemplate,
    /// Whether the template is the model's, which then says all that a prompt has.
    own_template: bool,
    tokenizer: &'a Tokenizer,
    messages: Vec<Message>,
    turns: Vec<Turn>,
    stream: bool,
}

impl Chat<'_> {
    fn reset(&mut self, system: Option<&str>) {
        self.messages.clear();
        self.messages.extend(system.map(|text| Message { role: Role::System, content: text.to_owned() }));
    }

    /// Takes a turn. On an error the turn is as if it had not been said.
    fn answer(&mut self, said: &str) -> Result<()> {
        let before = self.messages.len();
        self.messages.push(Message { role: Role::User, content: said.to_owned() });
        let answered = self.turn();
        if answered.is_err() {
            self.messages.truncate(before);
        }
        answered
    }

    fn turn(&mut self) -> Result<()> {
        let messages: Vec<Value> = self.messages.iter().map(Value::from).collect();
        let prompt = self.template.render(&messages, None, true)?;
        let ids = match self.own_template {
            true => self.tokenizer.encode_fragment(&prompt)?,
            false => self.tokenizer.encode_beginning(&prompt)?,
        };
        let mut printer = Printer::new(self.tokenizer.detokenizer(), self.stream);
        let cooperation = interrupt::cooperate();
        let answer =
            generate(&mut self.session, &mut self.sampler, &ids, &self.settings, &interrupt::requested, |id| {
                printer.push(id)
            });
        drop(cooperation);
        printer.finish()?;
        let text = printer.text;
        if self.stream {
            output::write("\n")?;
        }
        let answer = match answer {
            // Interrupted while the prompt was read: nothing was answered.
            Err(error) if interrupt::requested() => {
                interrupt::clear();
                self.messages.pop();
                return if matches!(error.downcast_ref(), Some(InferError::Interrupted)) { Ok(()) } else { Err(error) };
            }
            other => other?,
        };
        interrupt::clear();
        self.messages.push(Message { role: Role::Assistant, content: text });
        self.turns.push(Turn {
            prompt_tokens: answer.prompt_tokens,
            reused_tokens: answer.reused_tokens,
            tokens: answer.ids.len(),
            stop: answer.stop,
            prompt_tokens_per_second: answer.prompt_rate(),
            tokens_per_second: answer.decode_rate(),
        });
        Ok(())
    }
}
