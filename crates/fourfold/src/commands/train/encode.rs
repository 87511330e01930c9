//! One row of training data to documents in tokens, with what of them is learned.

use anyhow::{Result, bail};
use fourfold_infer::{ChatTemplate, Message, Role, Tokenizer};
use fourfold_train::data::{Conversation, Document, Instruction, Record};
use serde_json::Value;

/// Rows to documents.
pub(super) struct RowEncoder<'a> {
    tokenizer: &'a Tokenizer,
    template: Option<&'a ChatTemplate>,
}

impl<'a> RowEncoder<'a> {
    /// With the model's tokenizer, and its template for conversations.
    pub(super) fn new(tokenizer: &'a Tokenizer, template: Option<&'a ChatTemplate>) -> Self {
        Self { tokenizer, template }
    }

    /// The documents of a row, usually one. A document without anything to learn is among them.
    ///
    /// # Errors
    /// The tokenizer or the template refuses the row.
    pub(super) fn documents(&self, row: &Record) -> Result<Vec<Document>> {
        Ok(match row {
            Record::Text(text) => vec![Document::whole(self.tokenizer.encode_text(text)?)],
            Record::Completion { prompt, completion } => {
                let mut ids = self.tokenizer.encode_text(prompt)?;
                let learned_from = ids.len();
                ids.extend(self.tokenizer.encode_fragment(completion)?);
                vec![Document { ids, learned_from, given: Vec::new() }]
            }
            Record::Chat(conversation) => vec![self.conversation(conversation)?],
            Record::Instruction(instruction) => return self.documents(&self.instruction(instruction)?),
        })
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
        self.template.is_some()
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
    fn conversation(&self, conversation: &Conversation) -> Result<Document> {
        let Some(template) = self.template else { bail!("conversations need a model with a chat template") };
        let messages: Vec<Message> = conversation.messages.iter().map(message).collect::<Result<_>>()?;
        let mut document = Document::default();
        let mut done = String::new();
        for i in (0..messages.len()).filter(|&i| messages[i].role == Role::Assistant) {
            let open = template.render(&messages[..i], true)?;
            let closed = template.render(&messages[..=i], false)?;
            let (Some(given), Some(learned)) = (open.strip_prefix(&done), closed.strip_prefix(&open)) else {
                bail!("the chat template writes an answer differently once others follow")
            };
            let begin = document.ids.len();
            document.ids.extend(self.tokenizer.encode_fragment(given)?);
            document.given.push(begin..document.ids.len());
            let begin = document.ids.len();
            document.ids.extend(self.tokenizer.encode_fragment(learned)?);
            if conversation.given.contains(&i) {
                document.given.push(begin..document.ids.len());
            }
            done = closed;
        }
        Ok(document)
    }
}

fn message(turn: &Value) -> Result<Message> {
    let content = turn.get("content").and_then(Value::as_str);
    let Some(content) = content else { bail!("`content` is not a string") };
    Ok(Message {
        role: role(turn.get("role").and_then(Value::as_str).unwrap_or_default())?,
        content: content.to_owned(),
    })
}

fn role(name: &str) -> Result<Role> {
    Ok(match name {
        "system" => Role::System,
        "user" => Role::User,
        "assistant" => Role::Assistant,
        other => bail!("role `{other}`: there are system, user, assistant"),
    })
}
