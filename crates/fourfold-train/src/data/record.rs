//! What a row is to be learned as, by the names of its columns: the layouts that Hugging Face, TRL, axolotl and LLaMA-Factory read.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::DataError;
use super::conversation::{conversation, nothing, turns};
use super::rows::{Row, kind};

/// A conversation as its row has it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// Its turns, each an object with a `role` (`system`, `user`, `assistant`, `tool`) and, unless it only calls tools, a `content`; what else
    /// a turn holds (`tool_calls`, `reasoning_content`) is for the chat template.
    pub messages: Vec<Value>,
    /// `tools`: descriptions of what the assistant may call.
    pub tools: Option<Value>,
    /// The assistant's turns that are given, not learned, by their place.
    pub given: Vec<usize>,
}

/// What one row is learned as.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// Every token is learned.
    Text(String),
    /// The completion is learned.
    Completion {
        /// What is given.
        prompt: String,
        /// What is learned.
        completion: String,
    },
    /// What the assistant says is learned.
    Chat(Conversation),
    /// An instruction and its answer (Stanford Alpaca): through the chat template of a model that has one, else in Alpaca's own words.
    Instruction(Instruction),
}

/// A row of Alpaca's layout.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Instruction {
    /// What the whole conversation is under, if anything.
    pub system: Option<String>,
    /// Earlier instructions and answers.
    pub history: Vec<(String, String)>,
    /// What is asked.
    pub instruction: String,
    /// What it is asked about; may be empty.
    pub input: String,
    /// What is learned.
    pub output: String,
}

impl Instruction {
    /// As a conversation: the input follows the instruction on a line of its own, as LLaMA-Factory has it.
    pub fn conversation(&self) -> Conversation {
        let mut conversation = Conversation::default();
        let mut turn =
            |role: &str, content: &str| conversation.messages.push(json!({ "role": role, "content": content }));
        self.system.iter().for_each(|text| turn("system", text));
        for (asked, answered) in &self.history {
            turn("user", asked);
            turn("assistant", answered);
        }
        let Self { instruction, input, .. } = self;
        turn("user", &if input.is_empty() { instruction.clone() } else { format!("{instruction}\n{input}") });
        turn("assistant", &self.output);
        conversation.leave_out_empty();
        conversation
    }

    /// The prompt of Stanford Alpaca's training (github.com/tatsu-lab/stanford_alpaca, `train.py`), which the answer follows at once.
    /// `None` where the row has what that prompt has no place for: a system message or earlier turns.
    pub fn alpaca_prompt(&self) -> Option<String> {
        if self.system.is_some() || !self.history.is_empty() {
            return None;
        }
        let Self { instruction, input, .. } = self;
        const BEGIN: &str = "Below is an instruction that describes a task";
        const END: &str = "Write a response that appropriately completes the request.\n\n### Instruction:\n";
        Some(match input.is_empty() {
            true => format!("{BEGIN}. {END}{instruction}\n\n### Response:"),
            false => format!(
                "{BEGIN}, paired with an input that provides further context. {END}{instruction}\n\n### Input:\n{input}\n\n\
                 ### Response:"
            ),
        })
    }
}

/// Which columns hold what, where they have names of their own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Columns {
    /// `text`.
    pub text: Option<String>,
    /// `prompt`.
    pub prompt: Option<String>,
    /// `completion`.
    pub completion: Option<String>,
    /// `messages`, or ShareGPT's `conversations`.
    pub messages: Option<String>,
    /// `instruction`.
    pub instruction: Option<String>,
    /// `input`.
    pub input: Option<String>,
    /// `output`.
    pub output: Option<String>,
    /// `system`.
    pub system: Option<String>,
    /// `tools`.
    pub tools: Option<String>,
}

/// The layouts, and the flags that map their columns.
const LAYOUTS: [(&str, &str); 4] = [
    ("`messages` (or ShareGPT's `conversations`)", "--messages-column"),
    ("`prompt` and `completion`", "--prompt-column and --completion-column"),
    ("`instruction` and `output`", "--instruction-column and --output-column"),
    ("`text`", "--text-column"),
];

/// Columns that would change what is learned and that nothing here reads, and what to do about them.
const REFUSED: &[(&[&str], &str)] = &[
    (
        &["chosen", "rejected", "preferred_output", "non_preferred_output", "kto_tag"],
        "preference data are for DPO and its kind, which fourfold does not train; --completion-column chosen (or --messages-column \
         chosen, where it is a conversation) learns the preferred answers alone",
    ),
    (
        &["input_ids", "labels", "attention_mask", "loss_mask", "completion_mask", "assistant_masks"],
        "the row is in tokens already; fourfold reads text",
    ),
    (
        &["image", "images", "audio", "audios", "video", "videos"],
        "fourfold learns from text alone: leave the column out",
    ),
    (&["functions", "function_call"], "the older form of `tools` and `tool_calls`: convert it to these"),
    (
        &["documents", "chat_template_kwargs"],
        "the chat template would write the row otherwise, and fourfold does not pass it on",
    ),
    (&["suffix"], "filling in the middle has no tokens here: leave the column out"),
];

/// What a file's rows had in them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Rows of each layout.
    pub layouts: BTreeMap<&'static str, u64>,
    /// Columns that nothing reads, and the rows that have them.
    pub unread: BTreeMap<String, u64>,
}

/// Names kept of columns that nothing reads.
const MOST_UNREAD: usize = 64;

impl Columns {
    /// Whether the mapped columns belong to one layout.
    ///
    /// # Errors
    /// A sentence that names the flags.
    pub fn check(&self) -> Result<(), String> {
        let given = [self.messages.is_some(), self.maps_completion(), self.maps_instruction(), self.text.is_some()];
        let flags: Vec<&str> = LAYOUTS.iter().zip(given).filter(|(_, g)| *g).map(|((_, flag), _)| *flag).collect();
        if flags.len() > 1 { Err(format!("{}: of different layouts; one is needed", flags.join("; "))) } else { Ok(()) }
    }

    fn maps_completion(&self) -> bool {
        self.prompt.is_some() || self.completion.is_some()
    }

    fn maps_instruction(&self) -> bool {
        self.instruction.is_some() || self.input.is_some() || self.output.is_some()
    }

    /// What `row` is learned as; what it had in it is counted in `seen`.
    ///
    /// # Errors
    /// Its columns are those of no layout or of several, one has the wrong type, or one would change what is learned and is not understood; the
    /// error names file, line and column.
    pub fn record(&self, file: &str, row: &Row, seen: &mut Seen) -> Result<Record, DataError> {
        let mut reader = Reader { row, used: Vec::new() };
        let found = self.find(&mut reader);
        let (layout, record) =
            found.map_err(|reason| DataError::Line { file: file.to_owned(), line: row.line, reason })?;
        *seen.layouts.entry(layout).or_default() += 1;
        for name in row.values.keys().filter(|name| !reader.used.contains(&name.as_str())) {
            if let Some(count) = seen.unread.get_mut(name) {
                *count += 1;
            } else if seen.unread.len() < MOST_UNREAD {
                seen.unread.insert(name.clone(), 1);
            }
        }
        Ok(record)
    }

    fn find<'r>(&'r self, reader: &mut Reader<'r>) -> Result<(&'static str, Record), String> {
        fn name<'n>(flag: &'n Option<String>, usual: &'n str) -> &'n str {
            flag.as_deref().unwrap_or(usual)
        }
        let (text, messages) = (name(&self.text, "text"), name(&self.messages, "messages"));
        let (prompt, completion) = (name(&self.prompt, "prompt"), name(&self.completion, "completion"));
        let (instruction, output) = (name(&self.instruction, "instruction"), name(&self.output, "output"));
        let input = name(&self.input, "input");
        let (system, tools) = (name(&self.system, "system"), name(&self.tools, "tools"));
        let given = [self.messages.is_some(), self.maps_completion(), self.maps_instruction(), self.text.is_some()];
        let is_mapped = given.contains(&true);
        if !is_mapped {
            reader.refuse_others()?;
        }
        let shared_gpt = if self.messages.is_none() { "conversations" } else { messages };
        let row = &reader.row.values;
        let complete = |has: &dyn Fn(&str) -> bool| {
            [
                has(messages) || has(shared_gpt),
                has(prompt) && has(completion),
                has(instruction) && has(output),
                has(text),
            ]
        };
        let mut which = if is_mapped { given } else { complete(&|n| row.get(n).is_some_and(|v| !nothing(v))) };
        if !which.contains(&true) {
            which = complete(&|n| row.contains_key(n));
        }
        let found: Vec<usize> = (0..4).filter(|&i| which[i]).collect();
        match found.as_slice() {
            [0] => {
                let column = if row.get(messages).is_some_and(|v| !nothing(v)) || !row.contains_key(shared_gpt) {
                    messages
                } else {
                    shared_gpt
                };
                let mut conversation = conversation(column, reader.column(column)?, reader.row.is_untyped)?;
                if let Some(text) = reader.optional_string(system)? {
                    conversation.begin_with_system(&text).map_err(|reason| format!("column `{system}`: {reason}"))?;
                }
                conversation.tools = reader.tools(tools)?;
                let layout = if column == "conversations" { "conversations" } else { "messages" };
                Ok((layout, Record::Chat(conversation)))
            }
            [1] if matches!(row.get(prompt), Some(Value::Array(_))) => {
                // TRL's conversational form of prompts and completions.
                let mut conversation = list_of_turns(prompt, reader.column(prompt)?)?;
                conversation.given = (0..conversation.messages.len()).collect();
                let answers = list_of_turns(completion, reader.column(completion)?)?;
                conversation.given.extend(answers.given.iter().map(|i| i + conversation.messages.len()));
                conversation.messages.extend(answers.messages);
                conversation.tools = reader.tools(tools)?;
                Ok(("prompt and completion", Record::Chat(conversation)))
            }
            [1] => {
                let record =
                    Record::Completion { prompt: reader.string(prompt)?, completion: reader.string(completion)? };
                reader.refuse_beside("prompt and completion", &[system, tools, "history"])?;
                if let Some(Value::Bool(_)) = reader.row.values.get("label") {
                    return Err(
                        "column `label` judges the completion (KTO), which fourfold does not train on".to_owned()
                    );
                }
                Ok(("prompt and completion", record))
            }
            [2] => {
                let record = Instruction {
                    system: reader.optional_string(system)?,
                    history: reader.history()?,
                    instruction: reader.string(instruction)?,
                    input: reader.optional_string(input)?.unwrap_or_default(),
                    output: reader.string(output)?,
                };
                reader.refuse_beside("instruction and output", &[tools])?;
                Ok(("instruction and output", Record::Instruction(record)))
            }
            [3] => Ok(("text", Record::Text(reader.string(text)?))),
            [] => Err(unknown(&reader.row.values)),
            several => {
                let list: Vec<&str> = several.iter().map(|&i| LAYOUTS[i].0).collect();
                let flags: Vec<&str> = several.iter().map(|&i| LAYOUTS[i].1).collect();
                Err(format!(
                    "the columns of {} layouts ({}): say which is learned by {}",
                    several.len(),
                    list.join("; "),
                    flags.join(", or by ")
                ))
            }
        }
    }
}

/// Columns that are those of no layout.
fn unknown(row: &Map<String, Value>) -> String {
    let known = LAYOUTS.map(|(columns, _)| columns).join(", ");
    let flags = LAYOUTS.map(|(_, flag)| flag).join(", ");
    let names: Vec<String> = row.keys().take(12).map(|name| format!("`{}`", short(name))).collect();
    let mut found = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    if row.len() > names.len() {
        found += ", …";
    }
    let half =
        [("prompt", "completion"), ("completion", "prompt"), ("instruction", "output"), ("output", "instruction")];
    let missing = half.iter().find(|(has, lacks)| row.contains_key(*has) && !row.contains_key(*lacks));
    let missing =
        missing.map(|(has, lacks)| format!("column `{lacks}` is missing beside `{has}`; ")).unwrap_or_default();
    let separator = match row.keys().next() {
        Some(name) if row.len() == 1 && (name.contains('\t') || name.contains(';')) => {
            "; the values seem to be separated by something else: .csv has commas, .tsv tabs"
        }
        _ => "",
    };
    format!("{missing}columns {found}, none of the layouts {known}; {flags} map others{separator}")
}

/// A name that is not too long for an error.
fn short(name: &str) -> String {
    if name.chars().count() > 40 { name.chars().take(40).chain(['…']).collect() } else { name.to_owned() }
}

fn list_of_turns(column: &str, value: &Value) -> Result<Conversation, String> {
    match value {
        Value::Array(list) => turns(column, list),
        other => Err(format!("column `{column}`: {} where a list of messages is expected, as beside it", kind(other))),
    }
}

/// A row, and which of its columns have been read.
struct Reader<'r> {
    row: &'r Row,
    used: Vec<&'r str>,
}

impl<'r> Reader<'r> {
    /// A column that has to be there.
    fn column(&mut self, name: &'r str) -> Result<&'r Value, String> {
        self.used.push(name);
        self.row.values.get(name).ok_or_else(|| {
            let names: Vec<String> = self.row.values.keys().take(12).map(|n| format!("`{}`", short(n))).collect();
            format!("column `{name}` is missing; there are {}", names.join(", "))
        })
    }

    /// A text; nothing where it is null.
    fn string(&mut self, name: &'r str) -> Result<String, String> {
        match self.column(name)? {
            Value::String(text) => Ok(text.clone()),
            Value::Null => Ok(String::new()),
            other => Err(format!("column `{name}`: {} where a string is expected", kind(other))),
        }
    }

    /// A text that may be missing or empty.
    fn optional_string(&mut self, name: &'r str) -> Result<Option<String>, String> {
        if !self.row.values.contains_key(name) {
            return Ok(None);
        }
        Ok(Some(self.string(name)?).filter(|text| !text.is_empty()))
    }

    /// Tools: a list, or JSON text of one.
    fn tools(&mut self, name: &'r str) -> Result<Option<Value>, String> {
        let Some(value) = self.row.values.get(name) else { return Ok(None) };
        self.used.push(name);
        let tools = match value {
            value if nothing(value) => return Ok(None),
            Value::String(text) => {
                serde_json::from_str(text).map_err(|e| format!("column `{name}`: no JSON list of tools: {e}"))?
            }
            other => other.clone(),
        };
        match tools {
            Value::Array(list) if list.is_empty() => Ok(None),
            Value::Array(_) => Ok(Some(tools)),
            other => Err(format!("column `{name}`: {} where a list of tools is expected", kind(&other))),
        }
    }

    /// Earlier turns of Alpaca's layout: pairs of an instruction and its answer.
    fn history(&mut self) -> Result<Vec<(String, String)>, String> {
        let Some(value) = self.row.values.get("history").filter(|v| !nothing(v)) else {
            self.used.push("history");
            return Ok(Vec::new());
        };
        self.used.push("history");
        let pair = |turn: &Value| match turn.as_array().map(Vec::as_slice) {
            Some([Value::String(asked), Value::String(answered)]) => Some((asked.clone(), answered.clone())),
            _ => None,
        };
        let pairs = value.as_array().and_then(|turns| turns.iter().map(pair).collect());
        pairs.ok_or_else(|| "column `history`: not a list of pairs of strings".to_owned())
    }

    /// Columns that change what is learned and that nothing reads.
    fn refuse_others(&self) -> Result<(), String> {
        for (name, value) in &self.row.values {
            if nothing(value) {
                continue;
            }
            if let Some((_, why)) = REFUSED.iter().find(|(names, _)| names.contains(&name.as_str())) {
                return Err(format!("column `{name}`: {why}"));
            }
            if ["weight", "loss_weight", "sample_weight"].contains(&name.as_str()) && value.as_f64() != Some(1.0) {
                return Err(format!(
                    "column `{name}`: rows that count differently are not learned; leave the column out"
                ));
            }
        }
        Ok(())
    }

    /// Columns that a layout has no place for.
    fn refuse_beside(&mut self, layout: &str, names: &[&'r str]) -> Result<(), String> {
        for name in names {
            self.used.push(name);
            if self.row.values.get(*name).is_some_and(|value| !nothing(value)) {
                return Err(format!(
                    "column `{name}` has no place in the layout {layout}: write the row as `messages`, or map it by \
                     --instruction-column and --output-column"
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
