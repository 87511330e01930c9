//! From the text of an answer to what a client is told: thoughts, content and calls of tools, up to a stop string.

use crate::scan::{Piece, Scanner};
use crate::tools::{ToolCall, ToolFormat, ToolSplitter};

/// What some more text adds to an answer.
#[derive(Debug, Default, PartialEq)]
pub struct Delta {
    /// Thoughts (`reasoning_content`).
    pub reasoning: String,
    /// The answer itself.
    pub content: String,
    /// Tools to be called.
    pub calls: Vec<ToolCall>,
}

impl Delta {
    /// Whether it adds nothing.
    pub fn is_empty(&self) -> bool {
        self.reasoning.is_empty() && self.content.is_empty() && self.calls.is_empty()
    }

    fn append(&mut self, more: Self) {
        self.reasoning += &more.reasoning;
        self.content += &more.content;
        self.calls.extend(more.calls);
    }
}

/// Where thoughts are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thoughts {
    /// Nothing but white space came so far: they may begin.
    MayBegin,
    /// They go on.
    Inside,
    /// They are over, or there are none.
    Over,
}

/// Splits an answer's text.
pub struct AnswerText {
    stops: Scanner,
    thinks: Scanner,
    thoughts: Thoughts,
    tools: Option<ToolSplitter>,
    /// Whether line ends at the beginning of thoughts or content are still left out.
    at_start: bool,
    /// White space before anything else: thoughts that follow drop it.
    leading: String,
    stopped: Option<usize>,
}

const BEGIN: usize = 0;

impl AnswerText {
    /// `thinks`: whether the model thinks between `<think>` and `</think>`; `opened`: whether the prompt has opened its
    /// thoughts; `tools`: how it calls tools, where the request has some.
    pub fn new(stops: &[String], thinks: bool, opened: bool, tools: Option<ToolFormat>) -> Self {
        let thoughts = match (thinks, opened) {
            (_, true) => Thoughts::Inside,
            (true, false) => Thoughts::MayBegin,
            (false, false) => Thoughts::Over,
        };
        Self {
            stops: Scanner::new(stops.iter().cloned()),
            thinks: Scanner::new(["<think>", "</think>"]),
            thoughts,
            tools: tools.map(ToolSplitter::new),
            at_start: opened,
            leading: String::new(),
            stopped: None,
        }
    }

    /// What some more text adds. Nothing is added after a stop string.
    pub fn push(&mut self, text: &str) -> Delta {
        let mut delta = Delta::default();
        if self.stopped.is_some() {
            return delta;
        }
        for piece in self.stops.push(text) {
            match piece {
                Piece::Text(text) => delta.append(self.think(&text)),
                Piece::Marker(index) => {
                    self.stopped = Some(index);
                    break;
                }
            }
        }
        delta
    }

    /// What was held back.
    pub fn finish(&mut self) -> Delta {
        let mut delta = Delta::default();
        if self.stopped.is_none() {
            let rest = self.stops.finish();
            delta.append(self.think(&rest));
        }
        let rest = self.thinks.finish();
        delta.append(self.said(&rest));
        if let Some(tools) = &mut self.tools {
            let split = tools.finish();
            delta.append(Delta { content: split.content, calls: split.calls, ..Delta::default() });
        }
        delta
    }

    /// Whether a stop string came.
    pub fn stopped(&self) -> bool {
        self.stopped.is_some()
    }

    /// Whether thoughts go on.
    pub fn in_thoughts(&self) -> bool {
        self.thoughts == Thoughts::Inside
    }

    /// Whether there was a call of a tool.
    pub fn called(&self) -> bool {
        self.tools.as_ref().is_some_and(ToolSplitter::found)
    }

    /// Text with its thoughts told apart.
    fn think(&mut self, text: &str) -> Delta {
        if self.thoughts == Thoughts::Over {
            return self.said(text);
        }
        let mut delta = Delta::default();
        for piece in self.thinks.push(text) {
            match (piece, self.thoughts) {
                (Piece::Text(text), _) => delta.append(self.said(&text)),
                (Piece::Marker(BEGIN), Thoughts::MayBegin) => {
                    self.leading.clear();
                    (self.thoughts, self.at_start) = (Thoughts::Inside, true);
                }
                (Piece::Marker(BEGIN), Thoughts::Over) => delta.append(self.said("<think>")),
                (Piece::Marker(BEGIN), Thoughts::Inside) => {}
                (Piece::Marker(_), _) => (self.thoughts, self.at_start) = (Thoughts::Over, true),
            }
        }
        if self.thoughts == Thoughts::Over {
            let rest = self.thinks.finish();
            delta.append(self.said(&rest));
        }
        delta
    }

    /// Text without a marker of thoughts.
    fn said(&mut self, text: &str) -> Delta {
        let text = if self.at_start { text.trim_start_matches('\n') } else { text };
        if text.is_empty() {
            return Delta::default();
        }
        self.at_start = false;
        match self.thoughts {
            Thoughts::Inside => Delta { reasoning: text.to_owned(), ..Delta::default() },
            Thoughts::MayBegin if text.trim().is_empty() => {
                self.leading += text;
                Delta::default()
            }
            Thoughts::MayBegin | Thoughts::Over => {
                self.thoughts = Thoughts::Over;
                let text = std::mem::take(&mut self.leading) + text;
                match &mut self.tools {
                    Some(tools) => {
                        let split = tools.push(&text);
                        Delta { content: split.content, calls: split.calls, ..Delta::default() }
                    }
                    None => Delta { content: text, ..Delta::default() },
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All of a text, letter by letter.
    fn all(mut answer: AnswerText, text: &str) -> (Delta, bool) {
        let mut whole = Delta::default();
        for letter in text.chars() {
            whole.append(answer.push(letter.encode_utf8(&mut [0; 4])));
        }
        whole.append(answer.finish());
        (whole, answer.stopped())
    }

    fn parts(answer: AnswerText, text: &str) -> (String, String) {
        let (delta, _) = all(answer, text);
        (delta.reasoning, delta.content)
    }

    #[test]
    fn thoughts_are_told_apart_whoever_opens_them() {
        let by_model = " \n<think>\nhm, 2\n</think>\n\nFour.";
        assert_eq!(parts(AnswerText::new(&[], true, false, None), by_model), ("hm, 2\n".into(), "Four.".into()));
        let by_prompt = "\nhm, 2\n</think>\n\nFour.";
        assert_eq!(parts(AnswerText::new(&[], true, true, None), by_prompt), ("hm, 2\n".into(), "Four.".into()));
        assert_eq!(parts(AnswerText::new(&[], true, true, None), "never ends"), ("never ends".into(), String::new()));
    }

    #[test]
    fn a_model_that_does_not_think_may_speak_of_it() {
        let text = "The tag <think> opens, </think> closes.";
        assert_eq!(parts(AnswerText::new(&[], false, false, None), text), (String::new(), text.into()));
        assert_eq!(parts(AnswerText::new(&[], true, false, None), text), (String::new(), text.into()));
        let again = "<think>a</think>b <think> c";
        assert_eq!(parts(AnswerText::new(&[], true, false, None), again), ("a".into(), "b <think> c".into()));
    }

    #[test]
    fn an_answer_ends_before_its_stop_string() {
        let stops = ["\n\n".to_owned(), "END".to_owned()];
        let (delta, stopped) = all(AnswerText::new(&stops, false, false, None), "one\ntwo EN three END four");
        assert_eq!((delta.content.as_str(), stopped), ("one\ntwo EN three ", true));
        let (delta, stopped) = all(AnswerText::new(&stops, false, false, None), "one EN");
        assert_eq!((delta.content.as_str(), stopped), ("one EN", false));
    }

    #[test]
    fn calls_come_after_thoughts_and_content() {
        let text =
            "<think>which?</think>\n\nLooking.\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
        let (delta, _) = all(AnswerText::new(&[], true, false, Some(ToolFormat::Hermes)), text);
        assert_eq!((delta.reasoning.as_str(), delta.content.as_str()), ("which?", "Looking.\n"));
        assert_eq!(delta.calls, [ToolCall { name: "now".into(), arguments: "{}".into() }]);
        let in_thoughts = "<think><tool_call></think>x";
        let (delta, _) = all(AnswerText::new(&[], true, false, Some(ToolFormat::Hermes)), in_thoughts);
        assert_eq!((delta.reasoning.as_str(), delta.content.as_str()), ("<tool_call>", "x"));
    }
}
