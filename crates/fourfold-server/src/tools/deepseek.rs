//! DeepSeek V3 and R1-0528: `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```<｜tool▁call▁end｜>`;
//! V3.1: `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>` (their chat templates).

use super::ToolCall;

/// Every call of a group; `None` where one is malformed.
pub(super) fn parse(inside: &str) -> Option<Vec<ToolCall>> {
    let calls = inside.split("<｜tool▁call▁begin｜>").skip(1);
    calls.map(|call| one(call.split("<｜tool▁call▁end｜>").next()?)).collect()
}

fn one(call: &str) -> Option<ToolCall> {
    let (before, after) = call.split_once("<｜tool▁sep｜>")?;
    let (name, arguments) = match after.split_once("```json") {
        // V3: what stands before the separator is the kind of tool.
        Some((name, fenced)) => (name, fenced.rsplit_once("```").map_or(fenced, |(inner, _)| inner)),
        None => (before, after),
    };
    let (name, arguments) = (name.trim(), arguments.trim());
    // Arguments that were cut off are no call.
    serde_json::from_str::<serde_json::Value>(arguments).ok()?;
    (!name.is_empty()).then(|| ToolCall { name: name.to_owned(), arguments: arguments.to_owned() })
}
