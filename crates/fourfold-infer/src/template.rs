//! Chat templates: the Jinja text a model ships that lays out a conversation as it was in training.

use minijinja::{Environment, ErrorKind, Value, context};
use minijinja_contrib::pycompat;
use serde::{Deserialize, Serialize};

use crate::InferError;

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions for the whole conversation.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

/// One turn.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What they say.
    pub content: String,
}

/// A compiled chat template.
pub struct ChatTemplate {
    env: Environment<'static>,
    bos: String,
    eos: String,
}

/// The layout used when a model ships none: ChatML.
const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
                      {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

impl ChatTemplate {
    /// Compiles a template; `bos` and `eos` are the spellings that templates may print.
    ///
    /// # Errors
    /// A syntax error in the template.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self, InferError> {
        let mut env = Environment::new();
        // As transformers sets Jinja up.
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.set_unknown_method_callback(pycompat::unknown_method_callback);
        env.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        env.add_function("strftime_now", |format: String| today(&format));
        env.add_template_owned("chat".to_owned(), source.to_owned()).map_err(explain)?;
        Ok(Self { env, bos: bos.to_owned(), eos: eos.to_owned() })
    }

    /// ChatML, for a model that ships no template.
    ///
    /// # Errors
    /// None in practice: the template is a constant.
    pub fn chatml() -> Result<Self, InferError> {
        Self::new(CHATML, "", "")
    }

    /// The conversation as one text. With `open_answer` it ends where the model begins to speak.
    ///
    /// # Errors
    /// The template refuses the conversation (`raise_exception`) or uses something that is not there.
    pub fn render(&self, messages: &[Message], open_answer: bool) -> Result<String, InferError> {
        let template = self.env.get_template("chat").map_err(explain)?;
        template
            .render(context! {
                messages => messages,
                add_generation_prompt => open_answer,
                bos_token => self.bos,
                eos_token => self.eos,
            })
            .map_err(explain)
    }
}

/// An error with the line it is on.
fn explain(e: minijinja::Error) -> InferError {
    let line = e.line().map(|l| format!(" (line {l})")).unwrap_or_default();
    InferError::Template(format!("{}{line}", e.detail().map_or_else(|| e.kind().to_string(), str::to_owned)))
}

/// Today's date for templates that print it (Llama 3.x), in UTC; the usual fields only.
fn today(format: &str) -> String {
    let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (year, month, day) = civil_date(seconds / 86_400);
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let name = MONTHS[month as usize - 1];
    format
        .replace("%Y", &year.to_string())
        .replace("%m", &format!("{month:02}"))
        .replace("%d", &format!("{day:02}"))
        .replace("%B", name)
        .replace("%b", &name[..3])
}

/// Year, month and day of a day counted from 1970-01-01 (proleptic Gregorian calendar).
fn civil_date(days: u64) -> (u64, u64, u64) {
    let (mut year, mut rest) = (1970, days);
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    while rest >= 365 + u64::from(leap(year)) {
        rest -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while rest >= lengths[month] {
        rest -= lengths[month];
        month += 1;
    }
    (year, month as u64 + 1, rest + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(role: Role, content: &str) -> Message {
        Message { role, content: content.into() }
    }

    #[test]
    fn chatml_opens_the_answer() {
        let text = ChatTemplate::chatml().unwrap().render(&[turn(Role::User, "Hi")], true).unwrap();
        assert_eq!(text, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
        let closed = ChatTemplate::chatml().unwrap().render(&[turn(Role::User, "Hi")], false).unwrap();
        assert_eq!(closed, "<|im_start|>user\nHi<|im_end|>\n");
    }

    #[test]
    fn python_methods_and_whitespace_control_as_in_transformers() {
        let source = "{{ bos_token }}\n{% for message in messages %}\n    {% if message['role'] == 'user' %}\n\
                      U:{{ message['content'].strip() }}\n    {% else %}\nA:{{ message.content.split('|')[-1] }}{{ eos_token }}\n    {% endif %}\n{% endfor %}";
        let template = ChatTemplate::new(source, "<s>", "</s>").unwrap();
        let text = template.render(&[turn(Role::User, " Hi "), turn(Role::Assistant, "thinking|done")], false).unwrap();
        assert_eq!(text, "<s>\nU:Hi\nA:done</s>\n");
    }

    #[test]
    fn a_template_that_refuses_says_why() {
        let source = "{{ raise_exception('roles must alternate') }}";
        let error = ChatTemplate::new(source, "", "").unwrap().render(&[], false).unwrap_err();
        assert!(error.to_string().contains("roles must alternate"), "{error}");
        assert!(ChatTemplate::new("{% for %}", "", "").is_err());
    }

    #[test]
    fn dates() {
        assert_eq!(civil_date(0), (1970, 1, 1));
        assert_eq!(civil_date(19_782), (2024, 2, 29));
        assert_eq!(civil_date(20_819), (2027, 1, 1));
    }
}
