//! `fourfold chat`: a conversation, with the model's own template and the KV cache kept between turns.

mod command;
mod file;
mod input;

use std::cell::RefCell;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use fourfold_infer::{
    ChatTemplate, GenerationSettings, InferError, Message, Role, Sampler, SamplerSettings, Session, Stop, Tokenizer,
    generate,
};
use serde::Serialize;
use serde_json::Value;

use self::command::{HELP, Line, Settings};
use self::input::Input;
use super::answer::{AnswerArgs, Printer, Thinking, stop_of};
use super::generate::cut_short;
use super::sampling::SamplingArgs;
use crate::context::Context;
use crate::device::{self, DeviceReport};
use crate::fit::{self, Room};
use crate::output::{self, Report};
use crate::tokenizer::remark_tokenizer;
use crate::{interrupt, limits, memory, model};

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
    /// Take up the conversation of this file (JSON with `messages`).
    #[arg(long, value_name = "FILE")]
    load: Option<PathBuf>,
    /// Most tokens of an answer [default: until it ends].
    #[arg(short = 'n', long, visible_alias = "n-predict", value_name = "N", value_parser = limits::SOME_TOKENS)]
    predict: Option<usize>,
    /// Positions of context [default: the model's, as far as memory allows].
    #[arg(short, long = "ctx-size", visible_alias = "context", value_name = "TOKENS", value_parser = limits::TOKENS)]
    context: Option<usize>,
    #[command(flatten)]
    answer: AnswerArgs,
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
    messages: Vec<Message>,
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

pub fn run(args: &ChatArgs, context: &Context) -> Result<()> {
    let open = model::open_adapted(&args.model, args.adapter.as_deref(), context)?;
    let tokenizer = open.tokenizer()?;
    remark_tokenizer(&tokenizer, open.spec.vocab_size, context);
    let (template, own) = open.chat_template()?;
    let loaded = args.load.as_deref().map(file::load).transpose()?;
    let positions = fit::positions(args.context, &open, 1, context);
    let model = open.load_on_device(Room::sequence(positions), context)?;
    let sampling = args.sampling.settings(open.checkpoint.generation_config.as_ref(), context)?;
    let mut chat = Chat {
        session: Session::new(model.clone(), context.kv, positions),
        sampler: Sampler::new(sampling.clone()),
        sampling,
        settings: GenerationSettings { max_tokens: args.predict, stop_ids: open.stop_ids(&tokenizer) },
        answer: args.answer.clone(),
        template,
        own_template: own,
        template_text: open.checkpoint.chat_template.clone(),
        tokenizer: &tokenizer,
        system: args.system_prompt.clone(),
        messages: Vec::new(),
        first: 0,
        turns: Vec::new(),
        context,
    };
    if let Some(messages) = loaded {
        chat.load(messages);
    }
    if !own {
        context
            .remark("The model ships no chat template: ChatML is used. A base model will not answer as an assistant.");
        // A model that knows ChatML at all ends its turns so.
        chat.settings.stop_ids.extend(tokenizer.token_to_id("<|im_end|>"));
    }
    let mut input = Input::new()?;
    if input.is_terminal() {
        context.remark(&format!("{} — /help lists commands, /bye leaves, Ctrl-C stops an answer", args.model));
    }
    let mut first = args.prompt.clone().map(Line::Said);
    // Turns that could not be answered, and why the first of them could not.
    let (mut failed, mut reason) = (0, None);
    loop {
        let line = match first.take() {
            Some(line) => Ok(line),
            None => match input.next(context)? {
                Some(text) => Line::read(&text),
                None => break,
            },
        };
        match line.and_then(|line| chat.obey(line)) {
            Ok(true) => {}
            Ok(false) => break,
            Err(error) if !is_recoverable(&error) => return Err(error),
            Err(error) if input.is_terminal() => output::note(&output::chain(&error)),
            // A program that writes the lines goes on with the next one, and learns of it at the end.
            Err(error) => {
                failed += 1;
                if reason.is_none() {
                    reason = Some(error);
                } else {
                    output::note(&format!("error: {}", output::chain(&error)));
                }
            }
        }
    }
    if context.json && (failed == 0 || !chat.turns.is_empty()) {
        let (peak_memory, device) = (memory::peak_resident(), device::report(&model));
        let report = ChatReport { model: &args.model, messages: chat.whole(), turns: &chat.turns, peak_memory, device };
        context.print(&report)?;
    }
    match reason {
        Some(error) if chat.turns.is_empty() && failed == 1 => Err(error),
        Some(error) => Err(error.context(format!("{failed} of {} turns failed", chat.turns.len() + failed))),
        None => Ok(()),
    }
}

/// Whether the conversation can go on after it: the person said too much, or gave a command wrongly.
fn is_recoverable(error: &anyhow::Error) -> bool {
    match error.downcast_ref::<InferError>() {
        Some(error) => {
            matches!(error, InferError::ContextFull { .. } | InferError::Template(_) | InferError::NoRow { .. })
        }
        None => !output::is_broken_pipe(error) && !error.chain().any(|cause| cause.is::<InferError>()),
    }
}

struct Chat<'a> {
    session: Session,
    sampler: Sampler,
    sampling: SamplerSettings,
    settings: GenerationSettings,
    answer: AnswerArgs,
    template: ChatTemplate,
    /// Whether the template is the model's, which then says all that a prompt has.
    own_template: bool,
    template_text: Option<String>,
    tokenizer: &'a Tokenizer,
    system: Option<String>,
    /// All turns, instructions apart.
    messages: Vec<Message>,
    /// The first of them that the model still sees.
    first: usize,
    turns: Vec<Turn>,
    context: &'a Context,
}

impl Chat<'_> {
    /// Does what a line asks for; false to leave.
    fn obey(&mut self, line: Line) -> Result<bool> {
        match line {
            Line::Nothing => {}
            Line::Quit => return Ok(false),
            Line::Help => self.context.remark(HELP),
            Line::Reset => (self.messages, self.first) = (Vec::new(), 0),
            Line::System(None) => {
                self.context.remark(self.system.as_deref().unwrap_or("There are no instructions."));
            }
            Line::System(text) => self.system = text.filter(|text| !text.is_empty()),
            Line::Save(place) => {
                file::save(&place, &self.whole())?;
                self.context.remark(&format!("{} messages are in {}", self.whole().len(), place.display()));
            }
            Line::Load(place) => {
                let messages = file::load(&place)?;
                self.context.remark(&format!("{} messages from {}", messages.len(), place.display()));
                self.load(messages);
            }
            Line::Set(change) => {
                let predict = &mut self.settings.max_tokens;
                let mut settings = Settings { sampling: &mut self.sampling, predict, answer: &mut self.answer };
                match change {
                    Some((name, value)) => {
                        settings.set(&name, &value)?;
                        self.sampler = Sampler::new(self.sampling.clone());
                    }
                    None => self.context.remark(&settings.text()),
                }
            }
            Line::Said(text) => self.say(Message { role: Role::User, content: text })?,
            Line::Regenerate => {
                let last = self.messages.pop_if(|message| message.role == Role::Assistant);
                anyhow::ensure!(
                    self.messages.last().is_some_and(|message| message.role == Role::User),
                    "/regenerate: there is no message to answer"
                );
                let before = self.messages.len();
                let answered = self.turn();
                if self.messages.len() == before {
                    self.messages.extend(last);
                }
                answered?;
            }
        }
        Ok(true)
    }

    /// Takes up a conversation.
    fn load(&mut self, mut messages: Vec<Message>) {
        if messages.first().is_some_and(|message| message.role == Role::System) {
            self.system = Some(messages.remove(0).content);
        }
        (self.messages, self.first) = (messages, 0);
    }

    /// The conversation, instructions first.
    fn whole(&self) -> Vec<Message> {
        let system = self.system.iter().map(|text| Message { role: Role::System, content: text.clone() });
        system.chain(self.messages.iter().cloned()).collect()
    }

    /// Takes a turn. On an error the turn is as if it had not been said.
    fn say(&mut self, said: Message) -> Result<()> {
        let (before, first) = (self.messages.len(), self.first);
        self.messages.push(said);
        let answered = self.turn();
        if answered.is_err() {
            self.messages.truncate(before);
            self.first = first;
        }
        answered
    }

    /// The prompt and its tokens. Where they leave too little of the context for an answer, the oldest turns go.
    fn prompt(&mut self) -> Result<(String, Vec<u32>)> {
        let positions = self.session.context();
        let room = self.settings.max_tokens.unwrap_or(usize::MAX).min(positions / 4);
        let was = self.first;
        loop {
            let system = self.system.iter().map(|text| Message { role: Role::System, content: text.clone() });
            let seen: Vec<Message> = system.chain(self.messages[self.first..].iter().cloned()).collect();
            let messages: Vec<Value> = seen.iter().map(Value::from).collect();
            let prompt = self.template.render(&messages, None, true)?;
            let ids = match self.own_template {
                true => self.tokenizer.encode_fragment(&prompt)?,
                false => self.tokenizer.encode_beginning(&prompt)?,
            };
            let next = self.messages[self.first..].iter().skip(1).position(|message| message.role == Role::User);
            match next {
                Some(next) if ids.len() + room > positions => self.first += next + 1,
                _ => {
                    if was == 0 && self.first > 0 {
                        self.context.remark(&format!(
                            "The context of {positions} tokens is full (--ctx-size): the oldest turns are left out from here on."
                        ));
                    }
                    return Ok((prompt, ids));
                }
            }
        }
    }

    fn turn(&mut self) -> Result<()> {
        let (prompt, ids) = self.prompt()?;
        let thinking = Thinking::of(self.template_text.as_deref(), self.tokenizer, &prompt);
        let stream = !self.context.json;
        let printer = Printer::new(self.tokenizer.detokenizer(), stream, &self.answer, thinking);
        let printer = RefCell::new(printer);
        let cooperation = interrupt::cooperate();
        let ended = || interrupt::requested() || printer.borrow().stopped();
        let answer = generate(&mut self.session, &mut self.sampler, &ids, &self.settings, &ended, |id| {
            printer.borrow_mut().push(id)
        });
        drop(cooperation);
        let mut printer = printer.into_inner();
        printer.finish()?;
        if stream {
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
        let stop = stop_of(&answer, &printer);
        self.messages.push(Message { role: Role::Assistant, content: printer.text });
        if let Some(why) = cut_short(stop, self.session.context()) {
            self.context.remark(&format!("[{why}]"));
        }
        self.turns.push(Turn {
            prompt_tokens: answer.prompt_tokens,
            reused_tokens: answer.reused_tokens,
            tokens: answer.ids.len(),
            stop,
            prompt_tokens_per_second: answer.prompt_rate(),
            tokens_per_second: answer.decode_rate(),
        });
        Ok(())
    }
}
