//! Texts with a class each: what a sequence classifier learns from.

use serde_json::Value;

use crate::batch::{Batch, Extent, TextSource};
use crate::data::DataError;
use crate::data::rows::{Row, kind};
use crate::network::BatchSource;
use crate::random::{Stream, shuffled};

/// A class as a data file names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Label {
    /// Its number.
    Number(u32),
    /// Its name, one of `id2label`.
    Name(String),
}

/// One text, or a pair, with its class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelledText {
    /// The text.
    pub text: String,
    /// The second of a pair.
    pub text_pair: Option<String>,
    /// Its class.
    pub label: Label,
    /// Its line in its file, counted from 1.
    pub line: usize,
}

/// Which columns hold what, where they have names of their own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelColumns {
    /// `text`, or `sentence`.
    pub text: Option<String>,
    /// `text_pair`.
    pub text_pair: Option<String>,
    /// `label`.
    pub label: Option<String>,
}

/// Pairs of columns that are a text and its pair, as GLUE's tasks name them.
const PAIRS: [(&str, &str); 4] =
    [("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence")];

impl LabelColumns {
    /// The name of the class's column.
    pub fn label(&self) -> &str {
        self.label.as_deref().unwrap_or("label")
    }

    /// A text, perhaps a pair, with its class: a number or a name.
    ///
    /// # Errors
    /// A column is missing or has the wrong type; the error names file, line and column.
    pub fn read(&self, file: &str, row: &Row) -> Result<LabelledText, DataError> {
        let fail = |reason: String| DataError::Line { file: file.to_owned(), line: row.line, reason };
        let names = || row.values.keys().take(12).map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
        let string = |column: &str| match row.values.get(column) {
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(Value::Null) | None => Ok(None),
            Some(other) => Err(fail(format!("column `{column}`: {} where a string is expected", kind(other)))),
        };
        let has = |column: &str| row.values.get(column).is_some_and(|value| !value.is_null());
        let pair =
            PAIRS.iter().find(|(one, other)| has(one) && has(other)).filter(|_| !has("text") && self.text.is_none());
        let (text, text_pair) = match pair {
            Some((one, other)) => (*one, *other),
            None => {
                let usual = if has("text") || !has("sentence") { "text" } else { "sentence" };
                (self.text.as_deref().unwrap_or(usual), "text_pair")
            }
        };
        let text_pair = self.text_pair.as_deref().unwrap_or(text_pair);
        let column = self.label();
        let missing = |what: &str, flag: &str| {
            fail(format!("column `{what}` is missing; there are {}, and {flag} names another", names()))
        };
        let label = match row.values.get(column) {
            Some(Value::String(name)) if row.is_untyped => {
                name.parse().map_or_else(|_| Label::Name(name.clone()), Label::Number)
            }
            Some(Value::String(name)) => Label::Name(name.clone()),
            Some(number) => match number.as_u64().and_then(|n| u32::try_from(n).ok()) {
                Some(number) => Label::Number(number),
                None => {
                    let reason = format!("column `{column}`: {number} is neither a class's number nor its name");
                    return Err(fail(reason));
                }
            },
            None => return Err(missing(column, "--label-column")),
        };
        let Some(text) = string(text)? else { return Err(missing(text, "--text-column")) };
        Ok(LabelledText { text, text_pair: string(text_pair)?, label, line: row.line })
    }
}

/// A text in tokens, with its class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// The tokens; the last one is scored.
    pub ids: Vec<u32>,
    /// The class.
    pub label: u32,
}

/// Batches of `size` examples by number, in an order that depends on seed and epoch alone.
pub struct Labelled {
    examples: Vec<Example>,
    size: usize,
    seed: u64,
    /// The epoch last asked for, and its order.
    order: Option<(u64, Vec<usize>)>,
}

impl Labelled {
    /// Batches of examples cut to their first `context` tokens.
    ///
    /// # Errors
    /// There is no example, or one without a token; `name` is what the error calls the data.
    pub fn new(
        name: &str,
        mut examples: Vec<Example>,
        context: usize,
        size: usize,
        seed: u64,
    ) -> Result<Self, DataError> {
        let empty = |reason: String| Err(DataError::Empty { file: name.to_owned(), reason });
        if examples.is_empty() {
            return empty("no text with a class".to_owned());
        }
        if let Some(i) = examples.iter().position(|e| e.ids.is_empty()) {
            return empty(format!("example {} has no token", i + 1));
        }
        examples.iter_mut().for_each(|e| e.ids.truncate(context.max(1)));
        Ok(Self { examples, size: size.max(1), seed, order: None })
    }

    /// Takes every `1/fraction`-th example out for evaluation, at least one where there are two.
    pub fn split(examples: Vec<Example>, fraction: f64) -> (Vec<Example>, Vec<Example>) {
        let every = ((1.0 / fraction.clamp(1e-6, 0.5)).round() as usize).min(examples.len().max(2));
        let mut i = 0;
        let (held, train) = examples.into_iter().partition(|_| {
            i += 1;
            i % every == 0
        });
        (train, held)
    }

    /// Tokens of a pass over the data.
    pub fn tokens(&self) -> usize {
        self.examples.iter().map(|e| e.ids.len()).sum()
    }

    /// Batches of a pass over the data.
    pub fn per_epoch(&self) -> u64 {
        self.examples.len().div_ceil(self.size) as u64
    }

    /// The examples of batch `number`.
    fn chosen(&mut self, number: u64) -> impl Iterator<Item = &Example> + Clone {
        let (epoch, place) = (number / self.per_epoch(), (number % self.per_epoch()) as usize * self.size);
        if self.order.as_ref().is_none_or(|(known, _)| *known != epoch) {
            self.order = Some((epoch, shuffled(self.examples.len(), Stream::new(self.seed, epoch, 0x1abe1))));
        }
        let order = self.order.as_ref().map_or(&[][..], |(_, order)| order);
        order[place..order.len().min(place + self.size)].iter().map(|&i| &self.examples[i])
    }

    /// All examples in order: for evaluation.
    pub fn in_order(&self) -> Vec<Batch> {
        self.examples.chunks(self.size).map(pack).collect()
    }
}

impl BatchSource<Batch> for Labelled {
    fn get(&mut self, number: u64) -> Result<Batch, DataError> {
        Ok(pack(self.chosen(number)))
    }
}

impl TextSource for Labelled {
    fn extent(&mut self, number: u64, block_tokens: usize) -> Extent {
        Extent::of(self.chosen(number).map(|example| example.ids.len()), block_tokens)
    }
}

fn pack<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Batch {
    let mut batch = Batch::default();
    examples.into_iter().for_each(|example| batch.push_labelled(&example.ids, example.label));
    batch
}

#[cfg(test)]
mod tests {
    use super::*;
    use fourfold_kernels::backward::IGNORE;

    fn examples() -> Vec<Example> {
        (0..7).map(|i| Example { ids: (0..=i).collect(), label: i % 2 }).collect()
    }

    #[test]
    fn each_text_is_scored_once_by_its_class_at_its_last_token() {
        let mut data = Labelled::new("d", examples(), 4, 3, 1).unwrap();
        assert_eq!(data.in_order()[0].targets, [0, IGNORE, 1, IGNORE, IGNORE, 0]);
        assert_eq!(data.in_order()[2].ids.len(), 4, "cut to the context");
        assert_eq!(data.per_epoch(), 3);
        for epoch in 0..2 {
            let mut lengths: Vec<usize> = (0..3)
                .flat_map(|i| data.get(3 * epoch + i).unwrap().documents)
                .map(|document| document.len())
                .collect();
            lengths.sort_unstable();
            assert_eq!(lengths, [1, 2, 3, 4, 4, 4, 4]);
        }
        assert_ne!(data.get(0).unwrap(), data.get(3).unwrap(), "another order in the next epoch");
        assert_eq!(data.get(2).unwrap(), data.get(2).unwrap());
        assert_eq!(data.extent(4, 9).tokens, data.get(4).unwrap().ids.len());
    }

    #[test]
    fn held_out_examples_are_not_learned() {
        let (train, held) = Labelled::split(examples(), 0.25);
        assert_eq!((train.len(), held.len()), (6, 1));
        assert!(!train.contains(&held[0]));
    }

    #[test]
    fn rows_are_read_and_malformed_ones_named() {
        let read_as = |columns: &LabelColumns, text: &str, is_untyped| {
            let values = serde_json::from_str(text).unwrap();
            columns.read("a.jsonl", &Row { line: 7, values, is_untyped }).map_err(|e| e.to_string())
        };
        let read = |text: &str| read_as(&LabelColumns::default(), text, false);
        let row = read(r#"{"text": "x", "text_pair": "y", "label": "good"}"#).unwrap();
        assert_eq!((row.text_pair.as_deref(), row.label), (Some("y"), Label::Name("good".into())));
        let row = read(r#"{"sentence1": "x", "sentence2": "y", "label": 1, "idx": 0}"#).unwrap();
        assert_eq!((row.text.as_str(), row.text_pair.as_deref()), ("x", Some("y")));
        assert_eq!(read(r#"{"sentence": "x", "label": 1}"#).unwrap().text, "x");
        let untyped = read_as(&LabelColumns::default(), r#"{"text": "x", "label": "1"}"#, true).unwrap();
        assert_eq!(untyped.label, Label::Number(1));
        assert_eq!(read(r#"{"text": "x", "label": "1"}"#).unwrap().label, Label::Name("1".into()));
        let columns =
            LabelColumns { text: Some("body".into()), label: Some("class".into()), ..LabelColumns::default() };
        assert_eq!(read_as(&columns, r#"{"body": "x", "class": 2}"#, false).unwrap().label, Label::Number(2));
        let reason = |text: &str| read(text).unwrap_err();
        assert!(reason("{\"text\": \"x\"}").starts_with("a.jsonl:7: column `label` is missing; there are `text`"));
        assert!(reason("{\"label\": 1}").contains("`text` is missing"));
        assert!(reason("{\"text\": 1, \"label\": 1}").contains("column `text`: a number"));
        assert!(reason("{\"text\": \"x\", \"label\": -1}").contains("column `label`: -1 is neither"));
        assert!(Labelled::new("empty", vec![], 8, 1, 0).is_err());
    }
}
