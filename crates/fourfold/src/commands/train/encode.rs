//! One row of training data to documents in tokens, with what of them is learned.
//!
//! An answer is learned as the model would give it: after the prompt that `fourfold chat` would make of what stands before it, and as the
//! chat template writes it at the end of a conversation. Where the template writes an answer differently once others follow (thoughts are
//! dropped from the past), the conversation becomes several documents, each with the history that its answers have.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use fourfold_infer::{ChatTemplate, InferError, Tokenizer};
use fourfold_train::data::{Conversation, Document, Instruction, Record};
use serde_json::Value;

/// The template of a run's conversations and whether it is the model's own. An error in it matters only where there are conversations.
pub(super) type Template = Result<Option<(ChatTemplate, bool)>>;

/// Renders messages; with `true` up to where the model begins to speak.
type Render<'r> = dyn Fn(&[Value], bool) -> Result<String, InferError> + 'r;

/// Who may speak in a conversation.
const ROLES: [&str; 8] = ["system", "developer", "user", "assistant", "tool", "function", "ipython", "observation"];

/// A word that no template treats in a way of its own: where it is printed, an answer's text is printed.
const MARK: &str = "QxjZvAnswerMarkQxjZv";

/// Rows to documents.
pub(super) struct RowEncoder<'a> {
    tokenizer: &'a Tokenizer,
    template: &'a Template,
    /// What rows held and the template did not write, with the number of these rows.
    unwritten: RefCell<BTreeMap<&'static str, u64>>,
}

impl<'a> RowEncoder<'a> {
    /// With the model's tokenizer, and its template for conversations.
    pub(super) fn new(tokenizer: &'a Tokenizer, template: &'a Template) -> Self {
        Self { tokenizer, template, unwritten: RefCell::default() }
    }

    /// What rows so far held and the template did not write, for people.
    pub(super) fn unwritten(&self) -> Option<String> {
        let unwritten = self.unwritten.borrow();
        let all: Vec<String> = unwritten.iter().map(|(what, n)| format!("{what} ({n} rows)")).collect();
        (!all.is_empty()).then(|| format!("the chat template does not write what rows hold: {}", all.join(", ")))
    }

    /// The documents of a row, usually one. A document without anything to learn is among them.
    ///
    /// # Errors
    /// The tokenizer or the template refuses the row.
    pub(super) fn documents(&self, row: &Record) -> Result<Vec<Document>> {
        match row {
            Record::Text(text) => Ok(vec![Document::whole(self.tokenizer.encode_text(text)?)]),
            Record::Completion { prompt, completion } => Ok(vec![self.completion(prompt, completion)?]),
            Record::Chat(conversation) => self.conversation(conversation),
            Record::Instruction(instruction) => self.documents(&self.instruction(instruction)?),
        }
    }

    /// The completion is learned, and the EOS that ends it.
    fn completion(&self, prompt: &str, completion: &str) -> Result<Document> {
        let mut ids = self.tokenizer.encode_beginning(prompt)?;
        let learned_from = ids.len();
        ids.extend(match prompt.is_empty() {
            true => self.tokenizer.encode_fragment(completion)?,
            false => self.tokenizer.encode_continuation(completion)?,
        });
        if let Some(eos) = self.tokenizer.eos()
            && (ids.len() == learned_from || ids.last() != Some(&eos))
        {
            ids.push(eos);
        }
        Ok(Document { ids, learned_from, given: Vec::new() })
    }

    /// An instruction as a conversation where the model has a template of its own, else as Alpaca's prompt and its completion.
    fn instruction(&self, instruction: &Instruction) -> Result<Record> {
        if self.has_own_template() {
            return Ok(Record::Chat(instruction.conversation()));
        }
        let Some(prompt) = instruction.alpaca_prompt() else {
            bail!("`system` and `history` need a model with a chat template: Alpaca's prompt has no place for them")
        };
        Ok(Record::Completion { prompt, completion: instruction.output.clone() })
    }

    fn has_own_template(&self) -> bool {
        matches!(self.template, Ok(Some((_, true))) | Err(_))
    }

    /// How a row is written, for people.
    pub(super) fn describe(&self, row: &Record) -> &'static str {
        match row {
            Record::Text(_) => "a text",
            Record::Completion { .. } => "a prompt and its completion, without a template",
            Record::Instruction(_) if !self.has_own_template() => {
                "an instruction in Stanford Alpaca's prompt, because the model has no chat template"
            }
            Record::Instruction(_) => "an instruction through the model's chat template",
            Record::Chat(_) if !self.has_own_template() => {
                "a conversation in ChatML, because the model has no chat template"
            }
            Record::Chat(_) => "a conversation through the model's chat template",
        }
    }

    /// A conversation through the model's template: each answer is learned, everything between is given.
    fn conversation(&self, conversation: &Conversation) -> Result<Vec<Document>> {
        let (template, is_own) = match self.template {
            Ok(Some((template, is_own))) => (template, *is_own),
            Ok(None) => bail!("conversations need a model with a chat template"),
            Err(error) => return Err(anyhow!("{error:#}")),
        };
        let messages = &conversation.messages;
        for message in messages {
            let role = message.get("role").and_then(Value::as_str).unwrap_or_default();
            ensure!(ROLES.contains(&role), "role `{role}`: there are {}", ROLES.join(", "));
        }
        let render = |messages: &[Value], open| template.render(messages, conversation.tools.as_ref(), open);
        let mut documents: Vec<Rendered> = Vec::new();
        let mut unwritten = BTreeSet::new();
        for i in (0..messages.len()).filter(|&i| messages[i]["role"] == "assistant") {
            if conversation.given.contains(&i) {
                continue;
            }
            let closed = render(&messages[..=i], false)?;
            let lost = left_out(&messages[..=i], conversation.tools.as_ref(), &closed);
            unwritten.extend(&lost);
            if lost.contains(&CALLS) && text(&messages[i]).is_empty() {
                // The answer is a call that is not written: learning it would be learning to say nothing.
                continue;
            }
            let answer = match self.answer(&messages[..=i], &closed, &render) {
                Ok(begin) => begin..closed.len(),
                Err(error) => return Err(error.context(format!("message {}", i + 1))),
            };
            match documents.last_mut() {
                // The template writes what came before as it did: the document goes on.
                Some(last) if closed.starts_with(&last.text) && last.text.len() <= answer.start => {
                    last.text = closed;
                    last.learned.push(answer);
                }
                _ => documents.push(Rendered { text: closed, learned: vec![answer] }),
            }
        }
        for what in unwritten {
            *self.unwritten.borrow_mut().entry(what).or_default() += 1;
        }
        documents.iter().map(|document| self.rendered(document, is_own)).collect()
    }

    /// Where the answer that the last message is begins in `closed`, the conversation that ends with it.
    ///
    /// What is asked for (the prompt that `chat` would make) and `closed` begin alike. A prompt may end in what the template does not
    /// write into an answer (`<think>`): then the answer begins with the first token in which they differ.
    fn answer(&self, messages: &[Value], closed: &str, render: &Render<'_>) -> Result<usize> {
        let (answer, history) = messages.split_last().context("no message")?;
        let open = if history.is_empty() { render(history, true).unwrap_or_default() } else { render(history, true)? };
        if !open.is_empty() && closed.starts_with(&open) {
            return Ok(open.len());
        }
        let before = if history.is_empty() { String::new() } else { render(history, false)? };
        if closed.starts_with(&before) && open.starts_with(&before) {
            let asked = self.tokenizer.encode_with_places(&open[before.len()..])?;
            let answered = self.tokenizer.encode_with_places(&closed[before.len()..])?;
            let alike = asked.iter().zip(&answered).take_while(|(a, b)| a.0 == b.0).last();
            return Ok(before.len() + alike.map_or(0, |(_, (_, place))| place.end));
        }
        // The history itself is written differently before an answer: the answer begins where its own text does.
        let mut marked = messages.to_vec();
        if let (Some(last), Some(content)) = (marked.last_mut(), answer.get("content").and_then(Value::as_str)) {
            last["content"] = MARK.into();
            let with_mark = render(&marked, false)?;
            let alike = common_prefix(closed, &with_mark);
            if let Some(place) = with_mark.find(MARK)
                && !content.is_empty()
                && place <= alike
            {
                return Ok(place);
            }
        }
        bail!("the chat template writes the conversation before this answer in another way than with it")
    }

    /// Tokens of a rendered conversation, each part encoded as it is when it is said: the prompt, then the answer to it.
    fn rendered(&self, document: &Rendered, is_own: bool) -> Result<Document> {
        let mut out = Document::default();
        let mut done = 0;
        for answer in &document.learned {
            let given = &document.text[done..answer.start];
            let begin = out.ids.len();
            out.ids.extend(match (done, is_own) {
                (0, true) => self.tokenizer.encode_fragment(given)?,
                (0, false) => self.tokenizer.encode_beginning(given)?,
                _ => self.tokenizer.encode_continuation(given)?,
            });
            out.given.push(begin..out.ids.len());
            out.ids.extend(self.tokenizer.encode_continuation(&document.text[answer.clone()])?);
            done = answer.end;
        }
        Ok(out)
    }
}

/// A conversation as text, and what of it is learned.
struct Rendered {
    text: String,
    /// Bytes, ascending.
    learned: Vec<Range<usize>>,
}

const CALLS: &str = "calls of tools";

/// What a message says, without spaces around it.
fn text(message: &Value) -> &str {
    message.get("content").and_then(Value::as_str).unwrap_or_default().trim()
}

/// What of a conversation that ends with an answer stands nowhere in the text that a template made of it: the system message, the names
/// of tools, those of the tools that the answer calls, its thoughts.
fn left_out(messages: &[Value], tools: Option<&Value>, written: &str) -> Vec<&'static str> {
    let name = |tool: &Value| {
        let function = tool.get("function").unwrap_or(tool);
        function.get("name").and_then(Value::as_str).map(str::to_owned)
    };
    let names = |tools: Option<&Value>| -> Vec<String> {
        tools.and_then(Value::as_array).into_iter().flatten().filter_map(name).collect()
    };
    let is_lost = |texts: &[String]| texts.iter().any(|text| !written.contains(text.trim()));
    let answer = messages.last().unwrap_or(&Value::Null);
    let thoughts = ["reasoning_content", "thinking", "reasoning"].iter().find_map(|key| answer.get(*key)?.as_str());
    let system = messages.iter().filter(|message| message["role"] == "system").map(|message| text(message).to_owned());
    [
        ("system messages", is_lost(&system.collect::<Vec<_>>())),
        ("tools", is_lost(&names(tools))),
        (CALLS, is_lost(&names(answer.get("tool_calls")))),
        ("thoughts", is_lost(&thoughts.map(str::to_owned).into_iter().collect::<Vec<_>>())),
    ]
    .into_iter()
    .filter_map(|(what, is_lost)| is_lost.then_some(what))
    .collect()
}

/// Bytes that two texts have in common at their beginning, in whole characters.
fn common_prefix(a: &str, b: &str) -> usize {
    a.char_indices().zip(b.chars()).find(|((_, x), y)| x != y).map_or(a.len().min(b.len()), |((i, _), _)| i)
}
