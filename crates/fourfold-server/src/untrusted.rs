//! What a server reads of a stranger and of a model, without a server: for tests and fuzzing.

use std::sync::OnceLock;

use fourfold_infer::{SamplerSettings, Tokenizer};
use serde_json::{Value, json};

use crate::ApiError;
use crate::answer::AnswerText;
use crate::conversation::ToolUse;
use crate::fields::Fields;
use crate::grammar::{Grammar, Grammars};
use crate::sampling::{self, Choices};
use crate::tools::ToolFormat;

const VOCAB_SIZE: usize = 260;
const FORMATS: [ToolFormat; 3] = [ToolFormat::DeepSeek, ToolFormat::Dsml, ToolFormat::Hermes];

/// Reads the body of a request for a completion; whether it was taken.
pub fn request(body: &[u8]) -> bool {
    serde_json::from_slice(body).is_ok_and(|body| read(&body).is_ok())
}

fn read(body: &Value) -> Result<(), ApiError> {
    let fields = Fields::of_body(body)?;
    let choices = Choices::read(&fields, &SamplerSettings::default(), VOCAB_SIZE)?;
    for n in 0..choices.n {
        choices.sampling_of(n);
    }
    sampling::completion_logprobs(&fields)?;
    let tools = ToolUse::read(&fields)?;
    let Some(grammars) = grammars() else { return Ok(()) };
    if let Some((grammar, param)) = sampling::grammar(&fields)? {
        let mut constraint = grammars.constraint(&grammar, None, param)?;
        constraint.restrict(&mut [0.0; VOCAB_SIZE])?;
    }
    if tools.required {
        for format in FORMATS {
            grammars.constraint(&Grammar::Lark(format.grammar(&tools.tools, tools.parallel)), Some(true), "tools")?;
        }
    }
    Ok(())
}

/// Grammars over a tokenizer of bytes.
fn grammars() -> Option<&'static Grammars> {
    static GRAMMARS: OnceLock<Option<Grammars>> = OnceLock::new();
    let make = || {
        let vocab: serde_json::Map<String, Value> =
            (0..256).map(|byte| (format!("<0x{byte:02X}>"), json!(byte))).collect();
        let json = json!({"version": "1.0", "added_tokens": [], "decoder": {"type": "ByteFallback"},
            "model": {"type": "BPE", "byte_fallback": true, "unk_token": null, "vocab": vocab, "merges": []}});
        let tokenizer = Tokenizer::from_bytes(json.to_string().as_bytes()).ok()?;
        let vocabulary = tokenizer.vocabulary(VOCAB_SIZE);
        Some(Grammars::new(&tokenizer, &vocabulary, &[259]))
    };
    GRAMMARS.get_or_init(make).as_ref()
}

/// Takes thoughts and calls of tools out of the text of an answer, in pieces as they come; whether a call was found.
pub fn answer(text: &str) -> bool {
    let mut called = false;
    for format in FORMATS {
        for opened in [false, true] {
            let mut answer = AnswerText::new(&["\u{3002}stop".to_owned()], true, opened, Some(format));
            let pieces: Vec<char> = text.chars().collect();
            for piece in pieces.chunks(7) {
                answer.push(&piece.iter().collect::<String>());
            }
            answer.finish();
            called |= answer.called();
        }
    }
    called
}
