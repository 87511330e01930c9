//! Chat templates against Hugging Face transformers: `scripts/golden_chat_templates.py` makes the file.

use fourfold_infer::ChatTemplate;
use serde_json::Value;

#[test]
fn templates_of_models_and_snippets_render_as_transformers_does() {
    let kept = include_str!("golden/chat_templates.json").to_owned();
    // Templates that are not kept: the script's file of another folder.
    let other = std::env::var_os("FOURFOLD_CHAT_TEMPLATES");
    let text = other.as_ref().map_or(kept, |file| std::fs::read_to_string(file).unwrap());
    let golden: Value = serde_json::from_str(&text).unwrap();
    let tokens = golden["tokens"].as_object().unwrap();
    let tokens: Vec<(String, String)> =
        tokens.iter().map(|(key, token)| (key.clone(), token.as_str().unwrap().to_owned())).collect();
    let render = |source: &str, conversation: &Value, open: bool| {
        let tools = Some(&conversation["tools"]).filter(|t| !t.is_null());
        ChatTemplate::new(source, &tokens)
            .and_then(|template| template.render(conversation["messages"].as_array().unwrap(), tools, open))
    };
    let (mut same, mut refused) = (0, 0);
    let mut check = |name: &str, wanted: &Value, got: Result<String, fourfold_infer::InferError>| match (wanted, got) {
        (Value::String(wanted), Ok(got)) => {
            assert_eq!(&got, wanted, "{name}");
            same += 1;
        }
        (Value::Null, Err(_)) => refused += 1,
        (wanted, got) => panic!("{name}: {got:?}, transformers: {wanted}"),
    };
    for (name, template) in golden["templates"].as_object().unwrap() {
        for case in template["cases"].as_array().unwrap() {
            let conversation = case["conversation"].as_str().unwrap();
            let source = template["source"].as_str().unwrap();
            let got = render(source, &golden["conversations"][conversation], case["open"].as_bool().unwrap());
            check(&format!("{name}, {conversation}"), &case["text"], got);
        }
    }
    for snippet in golden["snippets"].as_array().unwrap() {
        let source = snippet[0].as_str().unwrap();
        check(source, &snippet[1], render(source, &golden["conversations"]["tools"], true));
    }
    println!("{same} alike, {refused} refused by both");
    let families = golden["templates"].as_object().unwrap().len();
    assert!(
        other.is_some() || same > 350 && refused > 60 && families >= 30,
        "{families}: {same} alike, {refused} refused by both"
    );
}
