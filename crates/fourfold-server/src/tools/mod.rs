//! Calls of tools in the text of an answer: each family of models has markup of its own, and its chat template shows which.

mod deepseek;
mod dsml;
mod hermes;

use serde_json::{Value, json};

use crate::grammar::compact;
use crate::scan::{Piece, Scanner};

/// A tool that the model wants called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolCall {
    /// The function's name.
    pub name: String,
    /// Its arguments as JSON text.
    pub arguments: String,
}

/// The markup of a family of models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// DeepSeek V3, R1-0528 and V3.1: `<｜tool▁calls▁begin｜>…`.
    DeepSeek,
    /// DeepSeek V3.2 and V4: `<｜DSML｜function_calls>…`.
    Dsml,
    /// Hermes and Qwen: `<tool_call>…`, with JSON or (Qwen3-Coder) with tags inside.
    Hermes,
}

impl ToolFormat {
    /// What a chat template uses.
    pub fn of_template(template: &str) -> Option<Self> {
        let uses = |marker: &str| template.contains(marker);
        if uses("｜DSML｜") {
            Some(Self::Dsml)
        } else if uses("<｜tool▁calls▁begin｜>") {
            Some(Self::DeepSeek)
        } else if uses("<tool_call>") {
            Some(Self::Hermes)
        } else {
            None
        }
    }

    /// What begins and ends a group of calls.
    fn markers(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::DeepSeek => &[("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")],
            Self::Dsml => &[
                ("<｜DSML｜function_calls>", "</｜DSML｜function_calls>"),
                ("<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"),
            ],
            Self::Hermes => &[("<tool_call>", "</tool_call>")],
        }
    }

    /// The calls of the text between the markers; `None` where it is not what the markup says.
    fn parse(self, inside: &str) -> Option<Vec<ToolCall>> {
        match self {
            Self::DeepSeek => deepseek::parse(inside),
            Self::Dsml => dsml::parse(inside),
            Self::Hermes => hermes::parse(inside).map(|call| vec![call]),
        }
    }

    /// A Lark grammar of an answer that is calls of some of `tools` and nothing else. `many` allows more than one.
    pub fn grammar(self, tools: &[Tool], many: bool) -> String {
        let calls = (0..tools.len()).map(|i| format!("call_{i}")).collect::<Vec<_>>().join(" | ");
        let rule = |i: usize, tool: &Tool| {
            let (name, schema) = (text(&tool.name), compact(&tool.parameters));
            match self {
                Self::DeepSeek => format!(
                    "call_{i}: \"<｜tool▁call▁begin｜>function<｜tool▁sep｜>\" {name} \"\\n```json\\n\" args_{i} \
                     \"\\n```<｜tool▁call▁end｜>\"\nargs_{i}: %json {schema}\n"
                ),
                Self::Hermes => format!(
                    "call_{i}: \"<tool_call>\\n{{\\\"name\\\": \" {} \", \\\"arguments\\\": \" args_{i} \
                     \"}}\\n</tool_call>\"\nargs_{i}: %json {schema}\n",
                    text(&json!(tool.name).to_string())
                ),
                Self::Dsml => format!("call_{i}: {}\n", dsml::call_grammar(i, tool)),
            }
        };
        let rules: String = tools.iter().enumerate().map(|(i, tool)| rule(i, tool)).collect();
        let more = if many { "(\"\\n\" call)*" } else { "" };
        let start = match self {
            Self::DeepSeek => format!("\"<｜tool▁calls▁begin｜>\" call {more} \"<｜tool▁calls▁end｜>\""),
            Self::Dsml => format!("\"<｜DSML｜function_calls>\\n\" call {more} \"\\n</｜DSML｜function_calls>\""),
            Self::Hermes => format!("call {more}"),
        };
        format!("start: {start}\ncall: {calls}\n{rules}")
    }
}

/// A string literal of a Lark grammar.
fn text(value: &str) -> String {
    json!(value).to_string()
}

/// A tool that may be called.
#[derive(Clone, Debug)]
pub struct Tool {
    /// The function's name.
    pub name: String,
    /// The JSON schema of its arguments.
    pub parameters: Value,
}

/// What a text became.
#[derive(Debug, Default, PartialEq)]
pub struct Split {
    /// Text for the person.
    pub content: String,
    /// Calls that are complete.
    pub calls: Vec<ToolCall>,
}

/// Takes calls out of a text that arrives in pieces.
pub struct ToolSplitter {
    format: ToolFormat,
    scanner: Scanner,
    /// The text of a group of calls that has begun, and which kind of group.
    inside: Option<(usize, String)>,
    found: bool,
}

impl ToolSplitter {
    /// For the markup of a model.
    pub fn new(format: ToolFormat) -> Self {
        let markers = format.markers().iter().flat_map(|&(begin, end)| [begin, end]);
        Self { format, scanner: Scanner::new(markers), inside: None, found: false }
    }

    /// What some more text makes certain.
    pub fn push(&mut self, text: &str) -> Split {
        let mut split = Split::default();
        for piece in self.scanner.push(text) {
            self.take(piece, &mut split);
        }
        split
    }

    /// What is left once nothing follows: a group of calls may lack its end.
    pub fn finish(&mut self) -> Split {
        let mut split = Split::default();
        let rest = self.scanner.finish();
        if !rest.is_empty() {
            self.take(Piece::Text(rest), &mut split);
        }
        if let Some((_, inside)) = self.inside.take() {
            split.calls = self.format.parse(&inside).unwrap_or_default();
            self.found |= !split.calls.is_empty();
        }
        split
    }

    /// Whether there was a call.
    pub fn found(&self) -> bool {
        self.found
    }

    fn take(&mut self, piece: Piece, split: &mut Split) {
        match (piece, &mut self.inside) {
            (Piece::Text(text), Some((_, inside))) => inside.push_str(&text),
            // Line ends around calls belong to the markup.
            (Piece::Text(text), None) if self.found && text.trim().is_empty() => {}
            (Piece::Text(text), None) => split.content.push_str(&text),
            (Piece::Marker(index), None) if index.is_multiple_of(2) => self.inside = Some((index / 2, String::new())),
            // An end without a beginning says nothing.
            (Piece::Marker(_), None) => {}
            (Piece::Marker(index), Some((kind, inside))) if index == 2 * *kind + 1 => {
                match self.format.parse(inside) {
                    Some(calls) => {
                        self.found |= !calls.is_empty();
                        split.calls.extend(calls);
                    }
                    // Not what the markup promises: it is what the model says, without the markers.
                    None => split.content.push_str(inside),
                }
                self.inside = None;
            }
            (Piece::Marker(_), Some(_)) => {}
        }
    }
}

/// JSON arguments as compact text; what is no JSON is handed on as it is (clients show it).
fn arguments(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(name: &str, arguments: &str) -> ToolCall {
        ToolCall { name: name.into(), arguments: arguments.into() }
    }

    /// The split of a text, however it is cut in two.
    fn split(format: ToolFormat, text: &str) -> Split {
        let run = |cut: usize| {
            let mut splitter = ToolSplitter::new(format);
            let parts = [splitter.push(&text[..cut]), splitter.push(&text[cut..]), splitter.finish()];
            parts.into_iter().fold(Split::default(), |mut all, part| {
                all.content += &part.content;
                all.calls.extend(part.calls);
                all
            })
        };
        let whole = run(text.len());
        for cut in (0..text.len()).filter(|&cut| text.is_char_boundary(cut)) {
            assert_eq!(run(cut), whole, "cut at {cut}");
        }
        whole
    }

    #[test]
    fn deepseek_v3_and_r1() {
        let text = "Let me look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n\
                    {\"city\": \"Paris\"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n\
                    {}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
        let found = split(ToolFormat::DeepSeek, text);
        assert_eq!(found.content, "Let me look.");
        assert_eq!(found.calls, [call("get_weather", "{\"city\": \"Paris\"}"), call("now", "{}")]);
    }

    #[test]
    fn deepseek_v3_1() {
        let text = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{\"city\": \"Paris\"}\
                    <｜tool▁call▁end｜><｜tool▁calls▁end｜>";
        assert_eq!(split(ToolFormat::DeepSeek, text).calls, [call("get_weather", "{\"city\": \"Paris\"}")]);
    }

    #[test]
    fn deepseek_v3_2() {
        let text = "Sure.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"get_weather\">\n\
                    <｜DSML｜parameter name=\"city\" string=\"true\">Paris \"x\"</｜DSML｜parameter>\n\
                    <｜DSML｜parameter name=\"days\" string=\"false\">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n\
                    <｜DSML｜invoke name=\"now\">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>";
        let found = split(ToolFormat::Dsml, text);
        assert_eq!(found.content, "Sure.\n\n");
        assert_eq!(found.calls, [call("get_weather", r#"{"city":"Paris \"x\"","days":3}"#), call("now", "{}")]);
    }

    #[test]
    fn hermes_and_qwen() {
        let text = "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>\n\
                    <tool_call>\n<function=now>\n<parameter=zone>\nUTC\n</parameter>\n<parameter=n>\n3\n</parameter>\n\
                    </function>\n</tool_call>";
        let found = split(ToolFormat::Hermes, text);
        assert_eq!(found.content, "");
        assert_eq!(found.calls, [call("get_weather", r#"{"city":"Paris"}"#), call("now", r#"{"zone":"UTC","n":3}"#)]);
    }

    #[test]
    fn what_is_no_call_is_content_without_markup() {
        let found = split(ToolFormat::Hermes, "a <tool_call>not json</tool_call> b");
        assert_eq!((found.content.as_str(), found.calls.len()), ("a not json b", 0));
        assert_eq!(split(ToolFormat::Hermes, "1 < 2 and <tool").content, "1 < 2 and <tool");
        assert_eq!(split(ToolFormat::DeepSeek, "x<｜tool▁calls▁end｜>y").content, "xy");
    }

    #[test]
    fn a_group_without_its_end_counts() {
        let text = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}";
        assert_eq!(split(ToolFormat::Hermes, text).calls, [call("now", "{}")]);
        let text = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>";
        assert_eq!(split(ToolFormat::DeepSeek, text).calls, [call("now", "{}")]);
        let cut = "<tool_call>\n{\"name\": \"now\", \"argum";
        assert_eq!(split(ToolFormat::Hermes, cut), Split::default(), "half a call is neither a call nor content");
    }

    #[test]
    fn the_template_tells_the_format() {
        assert_eq!(ToolFormat::of_template("{{ '<｜tool▁calls▁begin｜>' }}"), Some(ToolFormat::DeepSeek));
        assert_eq!(ToolFormat::of_template("<tool_call> … </tool_call>"), Some(ToolFormat::Hermes));
        assert_eq!(ToolFormat::of_template("<｜DSML｜function_calls>"), Some(ToolFormat::Dsml));
        assert_eq!(ToolFormat::of_template("{{ messages }}"), None);
    }
}
