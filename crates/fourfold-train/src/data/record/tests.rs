use super::*;
use crate::data::rows::RowFormat;
use crate::data::source::Source;

fn read(columns: &Columns, format: RowFormat, text: &str) -> Result<(Vec<Record>, Seen), String> {
    let source = Source::new("a.jsonl", Box::new(text.as_bytes())).unwrap();
    let mut seen = Seen::default();
    let rows = format.rows(source).map_err(|e| e.to_string())?;
    let records: Result<Vec<Record>, DataError> = rows.map(|row| columns.record("a.jsonl", &row?, &mut seen)).collect();
    Ok((records.map_err(|e| e.to_string())?, seen))
}

fn one(text: &str) -> Record {
    read(&Columns::default(), RowFormat::JsonLines, text).unwrap().0.remove(0)
}

fn reason(text: &str) -> String {
    read(&Columns::default(), RowFormat::JsonLines, text).unwrap_err()
}

fn chat(record: &Record) -> &Conversation {
    let Record::Chat(conversation) = record else { panic!("{record:?} is no conversation") };
    conversation
}

/// Role, content and whether it is learned, of each turn.
fn turns(conversation: &Conversation) -> Vec<(&str, &str, bool)> {
    let text = |turn: &'_ Value, key: &str| turn[key].as_str().map(|t| t.to_owned().leak() as &str).unwrap_or_default();
    let turns = conversation.messages.iter().enumerate();
    turns
        .map(|(i, m)| {
            (text(m, "role"), text(m, "content"), m["role"] == "assistant" && !conversation.given.contains(&i))
        })
        .collect()
}

#[test]
fn each_layout_is_known_by_its_columns() {
    assert_eq!(one("{\"text\": \"hi\"}"), Record::Text("hi".into()));
    let completion = Record::Completion { prompt: "a".into(), completion: "b".into() };
    assert_eq!(one("{\"prompt\": \"a\", \"completion\": \"b\", \"text\": null}"), completion);
    let expected = [("system", "s", false), ("user", "u", false), ("assistant", "a", true), ("tool", "t", false)];
    let openai = one(
        r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "u"}]},
        {"role": "assistant", "content": "a"}, {"role": "tool", "content": "t", "tool_call_id": "7"}]}"#
            .replace('\n', " ")
            .as_str(),
    );
    assert_eq!(turns(chat(&openai)), expected);
    let sharegpt = one(
        r#"{"system": "s", "conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}, {"from": "observation", "value": "t"}]}"#,
    );
    assert_eq!(turns(chat(&sharegpt)), expected);
    let Record::Instruction(alpaca) = one(r#"{"instruction": "i", "input": "x", "output": "o"}"#) else { panic!() };
    assert_eq!(turns(&alpaca.conversation())[0], ("user", "i\nx", false));
    let prompt = alpaca.alpaca_prompt().unwrap();
    assert!(prompt.ends_with("### Instruction:\ni\n\n### Input:\nx\n\n### Response:"), "{prompt}");
    let with_history = r#"{"instruction": "i", "output": "o", "system": "s", "history": [["q", "a"]]}"#;
    let Record::Instruction(alpaca) = one(with_history) else { panic!() };
    assert_eq!((alpaca.conversation().messages.len(), alpaca.alpaca_prompt()), (5, None));
    let trl = r#"{"prompt": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "x"}],
        "completion": [{"role": "assistant", "content": "a"}]}"#;
    let trl = one(&trl.replace('\n', " "));
    assert_eq!(turns(chat(&trl)), [("user", "u", false), ("assistant", "x", false), ("assistant", "a", true)]);
}

#[test]
fn tools_and_marks_of_turns_are_kept() {
    let row = r#"{"tools": "[{\"type\": \"function\"}]", "messages": [{"role": "assistant", "content": null,
        "tool_calls": [{"function": {"name": "f"}}]}, {"role": "assistant", "content": "a", "weight": 0},
        {"role": "assistant", "content": "b", "train": false}, {"role": "assistant", "content": " "}]}"#;
    let record = one(&row.replace('\n', " "));
    let found = chat(&record);
    assert_eq!(turns(found).iter().map(|t| t.2).collect::<Vec<_>>(), [true, false, false, false]);
    assert_eq!(found.tools.as_ref().and_then(Value::as_array).map(Vec::len), Some(1));
    assert_eq!(found.messages[0]["tool_calls"][0]["function"]["name"], "f");
    assert_eq!(found.messages[1], json!({"role": "assistant", "content": "a"}));
    let call = r#"{"conversations": [{"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {}}"}]}"#;
    let record = one(call);
    assert_eq!(chat(&record).messages[0]["tool_calls"][0]["function"]["name"], "f");
    assert_eq!(turns(chat(&record)), [("assistant", "", true)]);
    let marks = [
        ("\"loss\": false", false),
        ("\"loss\": true", true),
        ("\"loss\": null", true),
        ("\"training\": false", false),
        ("\"trainable\": false", false),
        ("\"loss_weight\": 0", false),
        ("\"loss_scale\": 1.0, \"train\": true", true),
        ("\"loss_scale\": 1.0, \"train\": false", false),
    ];
    for (mark, is_learned) in marks {
        let record = one(&format!("{{\"messages\": [{{\"role\": \"assistant\", \"content\": \"a\", {mark}}}]}}"));
        assert_eq!(turns(chat(&record)), [("assistant", "a", is_learned)], "{mark}");
        assert_eq!(chat(&record).messages[0].as_object().unwrap().len(), 2, "{mark}: templates do not see it");
    }
}

#[test]
fn rows_that_say_nothing_are_rows_with_nothing_to_learn() {
    assert_eq!(one("{\"text\": null}"), Record::Text(String::new()));
    let empty = Record::Completion { prompt: "a".into(), completion: String::new() };
    assert_eq!(one("{\"prompt\": \"a\", \"completion\": null}"), empty);
    assert!(chat(&one("{\"messages\": []}")).messages.is_empty());
    let silent = one("{\"messages\": [{\"role\": \"assistant\", \"content\": \"\"}]}");
    assert_eq!(turns(chat(&silent)), [("assistant", "", false)]);
}

#[test]
fn what_is_not_understood_is_named() {
    for (row, expected) in [
        ("{\"text\": 3}", "a.jsonl:1: column `text`: a number where a string"),
        ("{\"prompt\": \"a\"}", "`completion` is missing beside `prompt`"),
        ("{\"question\": \"a\", \"answer\": \"b\"}", "columns `question`, `answer`, none of the layouts"),
        ("{\"question\": \"a\", \"answer\": \"b\"}", "--prompt-column and --completion-column"),
        ("{}", "columns none"),
        ("{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}", "column `chosen`: preference data"),
        ("{\"prompt\": \"a\", \"completion\": \"b\", \"label\": true}", "`label` judges"),
        ("{\"text\": \"a\", \"messages\": [{}]}", "2 layouts"),
        ("{\"input_ids\": [1]}", "in tokens already"),
        ("{\"messages\": [], \"text\": \"a\", \"images\": [\"x\"]}", "column `images`"),
        ("{\"text\": \"a\", \"weight\": 0.5}", "column `weight`"),
        ("{\"prompt\": \"a\", \"completion\": \"b\", \"system\": \"s\"}", "column `system` has no place"),
        ("{\"messages\": {}}", "column `messages`: an object where a list"),
        ("{\"messages\": [3]}", "message 1: a number where an object"),
        ("{\"messages\": [{\"content\": \"a\"}]}", "neither `role` nor `from`"),
        ("{\"messages\": [{\"role\": \"user\"}]}", "`content` is missing"),
        ("{\"messages\": [{\"role\": \"narrator\", \"content\": \"a\"}]}", "role `narrator`"),
        (
            "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image_url\"}]}]}",
            "part of type `image_url`",
        ),
        ("{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\", \"weight\": 0.3}]}", "`weight` 0.3"),
        ("{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\", \"loss\": 0.5}]}", "`loss`: a number where"),
        ("{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\", \"loss_scale\": 2}]}", "`loss_scale` 2"),
        ("{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\", \"masked\": true}]}", "`masked`: this mark"),
        ("{\"instruction\": \"a\", \"output\": [\"b\"]}", "column `output`: a list where a string"),
        ("{\"instruction\": \"a\", \"output\": \"b\", \"history\": [\"c\"]}", "column `history`"),
        (
            "{\"prompt\": [{\"role\": \"user\", \"content\": \"a\"}], \"completion\": \"b\"}",
            "a string where a list of messages",
        ),
    ] {
        let found = reason(row);
        assert!(found.starts_with("a.jsonl:1: ") && found.contains(expected), "{row}: {found}");
    }
}

#[test]
fn columns_are_mapped_and_others_counted() {
    let columns = Columns { prompt: Some("question".into()), completion: Some("chosen".into()), ..Columns::default() };
    let row = "{\"question\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\", \"id\": 1}";
    let (records, seen) = read(&columns, RowFormat::JsonLines, row).unwrap();
    assert_eq!(records, [Record::Completion { prompt: "a".into(), completion: "b".into() }]);
    assert_eq!(seen.unread.keys().collect::<Vec<_>>(), ["id", "rejected"]);
    assert!(read(&columns, RowFormat::JsonLines, "{\"question\": \"a\"}").unwrap_err().contains("`chosen` is missing"));
    let several = Columns { text: Some("a".into()), ..columns };
    assert!(several.check().unwrap_err().contains("--text-column"));
    let csv = "instruction,input,output\nadd,1 2,3\n";
    let (records, seen) = read(&Columns::default(), RowFormat::Csv, csv).unwrap();
    assert!(matches!(&records[0], Record::Instruction(i) if i.output == "3"));
    assert_eq!(seen.layouts["instruction and output"], 1);
    let csv = "messages\n\"[{\"\"role\"\": \"\"user\"\", \"\"content\"\": \"\"u\"\"}]\"\n";
    let (records, _) = read(&Columns::default(), RowFormat::Csv, csv).unwrap();
    assert_eq!(turns(chat(&records[0])), [("user", "u", false)]);
    let wrong = read(&Columns::default(), RowFormat::Csv, "a;b\n1;2\n").unwrap_err();
    assert!(wrong.contains("separated by something else"), "{wrong}");
}
