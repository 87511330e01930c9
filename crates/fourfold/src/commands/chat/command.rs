//! Lines that begin with `/`.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use fourfold_infer::SamplerSettings;

use super::super::answer::AnswerArgs;
use crate::limits::{self, Limit, Number};

/// What `/help` says.
pub const HELP: &str = "\
/system [TEXT]      shows the instructions, or sets them
/regenerate         answers the last message once more
/save FILE          writes the conversation as JSON
/load FILE          takes up a conversation
/set [NAME VALUE]   shows the settings, or sets one: temperature, top_k, top_p, min_p, repeat_penalty,
                    frequency_penalty, presence_penalty, repeat_last_n, seed, num_predict, stop, hide_thinking
/clear, /reset      begins anew
/help, /?           this
/bye, /quit, /exit  leaves
\"\"\"                 begins and ends a text of several lines; Ctrl-C stops an answer";

/// What a line asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    Nothing,
    Said(String),
    Quit,
    Reset,
    Help,
    System(Option<String>),
    Save(PathBuf),
    Load(PathBuf),
    Regenerate,
    Set(Option<(String, String)>),
}

impl Line {
    /// Reads a line. What begins like a path (`/etc/hosts`) is said to the model.
    ///
    /// # Errors
    /// A command that is not known, or has too few words.
    pub fn read(text: &str) -> Result<Self> {
        let text = text.trim();
        if text.is_empty() {
            return Ok(Self::Nothing);
        }
        let (word, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let rest = rest.trim();
        let Some(name) = word.strip_prefix('/').filter(|name| !name.contains(['/', '.'])) else {
            return Ok(Self::Said(text.to_owned()));
        };
        let file = || -> Result<PathBuf> {
            ensure!(!rest.is_empty(), "/{name} wants a file's name");
            Ok(PathBuf::from(unquoted(rest)))
        };
        Ok(match name {
            "bye" | "quit" | "exit" => Self::Quit,
            "reset" | "clear" => Self::Reset,
            "help" | "?" => Self::Help,
            "system" => Self::System((!rest.is_empty()).then(|| unquoted(rest).to_owned())),
            "save" => Self::Save(file()?),
            "load" => Self::Load(file()?),
            "regenerate" | "retry" => Self::Regenerate,
            "set" => {
                // As Ollama has it: /set parameter NAME VALUE, /set system TEXT.
                let rest = rest.strip_prefix("parameter ").unwrap_or(rest).trim();
                match rest.split_once(char::is_whitespace) {
                    Some(("system", text)) => Self::System(Some(unquoted(text.trim()).to_owned())),
                    Some((name, value)) => Self::Set(Some((name.to_owned(), unquoted(value.trim()).to_owned()))),
                    None if rest.is_empty() => Self::Set(None),
                    None => bail!("/set {rest} wants a value"),
                }
            }
            _ => bail!("/{name} is no command; /help lists them"),
        })
    }
}

/// Without quotes around it.
fn unquoted(text: &str) -> &str {
    text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text)
}

/// What `/set` changes.
pub struct Settings<'a> {
    pub sampling: &'a mut SamplerSettings,
    pub predict: &'a mut Option<usize>,
    pub answer: &'a mut AnswerArgs,
}

impl Settings<'_> {
    /// Sets one; the names are those of the options, with `-` or `_`.
    ///
    /// # Errors
    /// The name is not known, or the value outside its limits.
    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        fn within<T: Number>(limit: Limit<T>, name: &str, value: &str) -> Result<T> {
            let number =
                value.parse::<T>().ok().with_context(|| format!("/set {name} {value}: {} is expected", T::KIND))?;
            limit.check(&format!("/set {name}"), number)
        }
        match name.replace('-', "_").as_str() {
            "temperature" | "temp" => self.sampling.temperature = within(limits::TEMPERATURE, name, value)?,
            "top_k" => self.sampling.top_k = within(limits::SOME_TOKENS, name, value)?,
            "top_p" => self.sampling.top_p = within(limits::SHARE, name, value)?,
            "min_p" => self.sampling.min_p = within(limits::SHARE, name, value)?,
            "repeat_penalty" => self.sampling.repeat_penalty = within(limits::PENALTY_FACTOR, name, value)?,
            "frequency_penalty" => self.sampling.frequency_penalty = within(limits::PENALTY, name, value)?,
            "presence_penalty" => self.sampling.presence_penalty = within(limits::PENALTY, name, value)?,
            "repeat_last_n" => self.sampling.repeat_last_n = within(limits::SOME_TOKENS, name, value)?,
            "seed" => {
                self.sampling.seed =
                    value.parse().with_context(|| format!("/set seed {value}: a whole number is expected"))?
            }
            "num_predict" | "predict" | "n_predict" => *self.predict = Some(within(limits::SOME_TOKENS, name, value)?),
            "stop" => self.answer.stops.push(value.to_owned()),
            "hide_thinking" => {
                self.answer.hide_thinking = match value {
                    "on" | "true" | "1" => true,
                    "off" | "false" | "0" => false,
                    _ => bail!("/set {name} {value}: on or off is expected"),
                }
            }
            _ => bail!("/set {name} is not known; /help lists what can be set"),
        }
        Ok(())
    }

    /// All of them, in words.
    pub fn text(&self) -> String {
        let s = &self.sampling;
        let predict = self.predict.map_or_else(|| "until it ends".to_owned(), |n| n.to_string());
        format!(
            "temperature {}, top_k {}, top_p {}, min_p {}, repeat_penalty {}, frequency_penalty {}, presence_penalty {}, \
             repeat_last_n {}, seed {}, num_predict {predict}, stop {:?}, hide_thinking {}",
            s.temperature,
            s.top_k,
            s.top_p,
            s.min_p,
            s.repeat_penalty,
            s.frequency_penalty,
            s.presence_penalty,
            s.repeat_last_n,
            s.seed,
            self.answer.stops,
            if self.answer.hide_thinking { "on" } else { "off" },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_commands_or_said() {
        let said = |text: &str| Line::Said(text.to_owned());
        for (text, line) in [
            ("  ", Line::Nothing),
            (" hello /bye ", said("hello /bye")),
            ("/etc/hosts has what?", said("/etc/hosts has what?")),
            ("/bye", Line::Quit),
            ("/clear", Line::Reset),
            ("/system", Line::System(None)),
            ("/set system \"be brief\"", Line::System(Some("be brief".into()))),
            ("/set parameter temperature 0.5", Line::Set(Some(("temperature".into(), "0.5".into())))),
            ("/set", Line::Set(None)),
            ("/save  a b.json", Line::Save("a b.json".into())),
            ("/regenerate", Line::Regenerate),
        ] {
            assert_eq!(Line::read(text).unwrap(), line, "{text}");
        }
        for wrong in ["/frobnicate", "/save", "/load ", "/set temperature"] {
            assert!(Line::read(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn settings_have_the_limits_of_the_options() {
        let (mut sampling, mut predict, mut answer) = (SamplerSettings::default(), None, AnswerArgs::default());
        let mut settings = Settings { sampling: &mut sampling, predict: &mut predict, answer: &mut answer };
        settings.set("temp", "0").unwrap();
        settings.set("top-k", "3").unwrap();
        settings.set("num_predict", "7").unwrap();
        settings.set("stop", "END").unwrap();
        settings.set("hide_thinking", "on").unwrap();
        for (name, value) in [("top_p", "1.5"), ("temperature", "-1"), ("temp", "nan"), ("seed", "x"), ("foo", "1")] {
            let error = settings.set(name, value).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
        assert!(settings.text().contains("temperature 0, top_k 3") && settings.text().contains("stop [\"END\"]"));
        assert_eq!((sampling.top_k, predict, answer.hide_thinking), (3, Some(7), true));
    }
}
