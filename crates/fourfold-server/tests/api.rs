//! What OpenAI's and DeepSeek's clients rely on.

mod support;

use fourfold_server::Limits;
use serde_json::{Value, json};
use support::{CONTEXT, Server};

fn server() -> Server {
    Server::start(Limits::default())
}

fn hello(more: Value) -> Value {
    let mut body = json!({ "model": "tiny", "messages": [{ "role": "user", "content": "Hello" }], "max_tokens": 12 });
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

fn content(answer: &Value) -> String {
    answer["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
}

#[test]
fn a_chat_answer_has_what_clients_read() {
    let server = server();
    for path in ["/v1/chat/completions", "/chat/completions"] {
        let (status, answer) = server.post(path, &hello(json!({})));
        assert_eq!(status, 200, "{answer}");
        assert_eq!((answer["object"].as_str(), answer["model"].as_str()), (Some("chat.completion"), Some("tiny")));
        assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
        assert_eq!(answer["choices"][0]["message"]["role"], "assistant");
        assert_eq!(answer["choices"][0]["finish_reason"], "length");
        let usage = &answer["usage"];
        // "[user]Hello\n[assistant]" in bytes.
        assert_eq!((usage["prompt_tokens"].as_u64(), usage["completion_tokens"].as_u64()), (Some(23), Some(12)));
        assert_eq!(usage["total_tokens"], 35);
        assert_eq!(
            usage["prompt_cache_hit_tokens"].as_u64().unwrap() + usage["prompt_cache_miss_tokens"].as_u64().unwrap(),
            23
        );
    }
}

#[test]
fn a_stream_says_the_same_as_the_answer_at_once() {
    let server = server();
    let (_, whole) = server.post("/v1/chat/completions", &hello(json!({})));
    let body = hello(json!({ "stream": true, "stream_options": { "include_usage": true } }));
    let events = server.events("/v1/chat/completions", &body);
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    let chunks: Vec<Value> = events[..events.len() - 1].iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant", "the first delta has the role");
    assert!(chunks.iter().all(|c| c["object"] == "chat.completion.chunk" && c["id"] == chunks[0]["id"]));
    let text: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, content(&whole));
    let [.., finish, usage] = chunks.as_slice() else { panic!("{chunks:?}") };
    assert_eq!(finish["choices"][0]["finish_reason"], "length");
    assert_eq!(
        (usage["choices"].as_array().map(Vec::len), &usage["usage"]["completion_tokens"]),
        (Some(0), &json!(12))
    );
    assert!(chunks[..chunks.len() - 1].iter().all(|c| c["usage"].is_null()));
}

#[test]
fn several_answers_differ_and_a_seed_repeats_them() {
    let server = server();
    let body = hello(json!({ "n": 3, "temperature": 1.5, "seed": 7 }));
    let texts = |answer: &Value| -> Vec<String> {
        let choices = answer["choices"].as_array().unwrap();
        choices.iter().map(|c| c["message"]["content"].as_str().unwrap().to_owned()).collect()
    };
    let (_, first) = server.post("/v1/chat/completions", &body);
    let (_, second) = server.post("/v1/chat/completions", &body);
    assert_eq!(texts(&first), texts(&second));
    assert_eq!(texts(&first).len(), 3);
    assert_ne!(texts(&first)[0], texts(&first)[1]);
    assert_eq!(first["usage"]["completion_tokens"], 36);
    let (_, other) = server.post("/v1/chat/completions", &hello(json!({ "n": 3, "temperature": 1.5, "seed": 8 })));
    assert_ne!(texts(&first), texts(&other));
}

#[test]
fn a_wrong_field_is_named_and_an_unknown_one_is_left_alone() {
    let server = server();
    for (more, param) in [
        (json!({ "temperature": "hot" }), "temperature"),
        (json!({ "temperature": -1 }), "temperature"),
        (json!({ "top_p": 1.5 }), "top_p"),
        (json!({ "n": 0 }), "n"),
        (json!({ "n": 1e9 }), "n"),
        (json!({ "stop": [1] }), "stop"),
        (json!({ "max_tokens": -5 }), "max_tokens"),
        (json!({ "logit_bias": { "x": 1 } }), "logit_bias"),
        (json!({ "logit_bias": { "260": 1 } }), "logit_bias"),
        (json!({ "messages": [] }), "messages"),
        (json!({ "messages": [{ "role": "king", "content": "x" }] }), "messages[0].role"),
        (json!({ "messages": [{ "role": "user" }] }), "messages[0].content"),
        (json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] }), "messages[0].content"),
        (json!({ "response_format": { "type": "poem" } }), "response_format.type"),
        (json!({ "tools": [{ "type": "magic" }] }), "tools.type"),
        (
            json!({ "tools": [{ "type": "function", "function": { "name": "f" } }], "tool_choice": "always" }),
            "tool_choice",
        ),
        (json!({ "top_logprobs": 3 }), "top_logprobs"),
        (json!({ "stream": "yes" }), "stream"),
    ] {
        let (status, answer) = server.post("/v1/chat/completions", &hello(more.clone()));
        assert_eq!(status, 400, "{more}: {answer}");
        let error = &answer["error"];
        assert_eq!(
            (error["param"].as_str(), error["type"].as_str()),
            (Some(param), Some("invalid_request_error")),
            "{more}"
        );
        assert!(error["message"].as_str().unwrap().contains(param), "{answer}");
    }
    let unknown = hello(json!({ "user": "me", "service_tier": "auto", "frobnicate": [1], "temperature": null }));
    assert_eq!(server.post("/v1/chat/completions", &unknown).0, 200);
}

#[test]
fn names_addresses_and_methods() {
    let server = server();
    assert_eq!(server.post("/v1/chat/completions", &hello(json!({ "model": "alias" }))).0, 200);
    let (status, answer) = server.post("/v1/chat/completions", &hello(json!({ "model": "gpt" })));
    assert_eq!((status, answer["error"]["code"].as_str()), (404, Some("model_not_found")));
    assert_eq!(server.get("/health").0, 200);
    let models: Value = serde_json::from_str(&server.get("/v1/models").1).unwrap();
    assert_eq!((models["data"][0]["id"].as_str(), models["data"][1]["id"].as_str()), (Some("tiny"), Some("alias")));
    assert_eq!(server.get("/v1/models/tiny").0, 200);
    assert_eq!(server.get("/v1/models/other").0, 404);
    assert_eq!(server.get("/nothing").0, 404);
    assert_eq!(server.get("/v1/chat/completions").0, 405);
    let props: Value = serde_json::from_str(&server.get("/props").1).unwrap();
    assert_eq!(props["default_generation_settings"]["n_ctx"], CONTEXT);
    let slots: Value = serde_json::from_str(&server.get("/slots").1).unwrap();
    assert_eq!(slots.as_array().map(Vec::len), Some(2));
    let page = server.get("/").1;
    assert!(
        page.contains("<!doctype html>") && !page.contains("http://") && !page.contains("src="),
        "nothing from elsewhere"
    );
}

#[test]
fn thoughts_are_told_apart_and_a_last_message_is_continued() {
    let server = server();
    let prompt = |body: Value| server.post("/apply-template", &body).1["prompt"].as_str().unwrap().to_owned();
    assert_eq!(prompt(hello(json!({}))), "[user]Hello\n[assistant]");
    assert_eq!(prompt(hello(json!({ "thinking": { "type": "enabled" } }))), "[user]Hello\n[assistant]<think>");
    assert_eq!(prompt(hello(json!({ "reasoning_effort": "high" }))), "[user]Hello\n[assistant]<think>");
    assert_eq!(
        prompt(hello(json!({ "chat_template_kwargs": { "thinking": true } }))),
        "[user]Hello\n[assistant]<think>"
    );
    let messages =
        json!([{ "role": "user", "content": "Hello" }, { "role": "assistant", "content": "Good", "prefix": true }]);
    assert_eq!(prompt(json!({ "messages": messages })), "[user]Hello\n[assistant]Good");
    // `<think>` is opened by the prompt: all is thoughts, for this model never closes them.
    let (_, answer) = server.post("/v1/chat/completions", &hello(json!({ "thinking": { "type": "enabled" } })));
    let message = &answer["choices"][0]["message"];
    assert_eq!(message["content"], "");
    assert!(!message["reasoning_content"].as_str().unwrap().is_empty(), "{answer}");
    assert_eq!(answer["usage"]["completion_tokens_details"]["reasoning_tokens"], 12);
}

#[test]
fn structured_answers_are_what_was_asked_for() {
    let server = server();
    let schema = json!({ "type": "object", "properties": { "n": { "type": "integer", "minimum": 0, "maximum": 99 },
        "ok": { "type": "boolean" } }, "required": ["n", "ok"], "additionalProperties": false });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": schema } });
    for seed in 0..4 {
        let body = hello(json!({ "response_format": format, "temperature": 1.0, "seed": seed, "max_tokens": 200,
            "logit_bias": { "2": -100 } }));
        let (_, answer) = server.post("/v1/chat/completions", &body);
        let value: Value = serde_json::from_str(&content(&answer)).unwrap_or_else(|e| panic!("{e}: {answer}"));
        assert!(value["n"].as_u64().unwrap() <= 99 && value["ok"].is_boolean(), "{value}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    }
    let (_, answer) =
        server.post("/v1/chat/completions", &hello(json!({ "regex": "(yes|no)!", "logit_bias": { "2": -100 } })));
    assert!(["yes!", "no!"].contains(&content(&answer).as_str()), "{answer}");
    let (_, answer) =
        server.post("/v1/completions", &json!({ "prompt": "x", "grammar": "start: \"a\" \"b\"", "max_tokens": 9 }));
    assert_eq!(answer["choices"][0]["text"], "ab");
    let (status, answer) = server.post("/v1/chat/completions", &hello(json!({ "regex": "(" })));
    assert_eq!((status, answer["error"]["param"].as_str()), (400, Some("regex")));
    // Thoughts come first and are free.
    let body = hello(json!({ "thinking": true, "regex": "ab", "logit_bias": { "3": 90 }, "max_tokens": 20 }));
    let (_, answer) = server.post("/v1/chat/completions", &body);
    assert_eq!(content(&answer), "ab", "{answer}");
}

#[test]
fn tools_are_called_in_openais_shape() {
    let server = server();
    let tool = json!({ "type": "function", "function": { "name": "add", "parameters": { "type": "object",
        "properties": { "a": { "type": "integer", "minimum": 1, "maximum": 9 } }, "required": ["a"], "additionalProperties": false } } });
    let body =
        hello(json!({ "tools": [tool], "tool_choice": "required", "parallel_tool_calls": false, "max_tokens": 150 }));
    let (_, answer) = server.post("/v1/chat/completions", &body);
    let choice = &answer["choices"][0];
    assert_eq!(
        (choice["finish_reason"].as_str(), &choice["message"]["content"]),
        (Some("tool_calls"), &Value::Null),
        "{answer}"
    );
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!((call["type"].as_str(), call["function"]["name"].as_str()), (Some("function"), Some("add")));
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    assert!((1..=9).contains(&arguments["a"].as_u64().unwrap()));

    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let events = server.events("/v1/chat/completions", &streamed);
    let chunks: Vec<Value> = events[..events.len() - 1].iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    let parts: Vec<&Value> =
        chunks.iter().map(|c| &c["choices"][0]["delta"]["tool_calls"][0]).filter(|c| !c.is_null()).collect();
    assert_eq!((parts[0]["index"].as_u64(), parts[0]["function"]["name"].as_str()), (Some(0), Some("add")));
    let joined: String = parts.iter().filter_map(|p| p["function"]["arguments"].as_str()).collect();
    assert_eq!(serde_json::from_str::<Value>(&joined).unwrap(), arguments);
    assert!(
        chunks.iter().all(|c| c["choices"][0]["delta"]["content"].as_str().unwrap_or("").is_empty()),
        "no markup leaks"
    );
    let none = hello(json!({ "tools": body["tools"], "tool_choice": "none" }));
    assert_eq!(server.post("/v1/chat/completions", &none).1["usage"]["prompt_tokens"], 23, "no tools in the prompt");
}

#[test]
fn probabilities() {
    let server = server();
    let (_, answer) = server.post("/v1/chat/completions", &hello(json!({ "logprobs": true, "top_logprobs": 2 })));
    let list = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(list.len(), 12);
    for entry in list {
        assert_eq!(entry["top_logprobs"].as_array().map(Vec::len), Some(2));
        assert_eq!(entry["token"], entry["top_logprobs"][0]["token"], "greedy");
        assert!(entry["logprob"].as_f64().unwrap() < 0.0);
    }
    let bytes: Vec<u8> =
        list.iter().flat_map(|e| e["bytes"].as_array().unwrap()).map(|b| b.as_u64().unwrap() as u8).collect();
    assert_eq!(String::from_utf8_lossy(&bytes), content(&answer));
    let (_, answer) = server.post("/v1/completions", &json!({ "prompt": "ab", "logprobs": 1, "max_tokens": 3 }));
    let logprobs = &answer["choices"][0]["logprobs"];
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[name].as_array().map(Vec::len), Some(3), "{name}: {answer}");
    }
}

#[test]
fn plain_completions() {
    let server = server();
    let (_, one) = server.post("/v1/completions", &json!({ "prompt": "ab", "max_tokens": 5 }));
    assert_eq!((one["object"].as_str(), one["usage"]["prompt_tokens"].as_u64()), (Some("text_completion"), Some(2)));
    let text = one["choices"][0]["text"].as_str().unwrap();
    let ids: Vec<u32> = vec![4 + 97, 4 + 98];
    let (_, same) = server.post("/v1/completions", &json!({ "prompt": ids, "max_tokens": 5, "echo": true }));
    assert_eq!(same["choices"][0]["text"], format!("ab{text}"));
    let (_, two) = server.post("/v1/completions", &json!({ "prompt": ["ab", "ab"], "max_tokens": 5 }));
    assert_eq!((two["choices"][0]["text"].as_str(), two["choices"][1]["text"].as_str()), (Some(text), Some(text)));
    let (status, refused) = server.post("/v1/completions", &json!({ "prompt": "ab", "suffix": "x" }));
    assert_eq!((status, refused["error"]["param"].as_str()), (400, Some("suffix")));
    let (status, refused) = server.post("/v1/completions", &json!({ "prompt": [999] }));
    assert_eq!(status, 400, "{refused}");
    let (status, full) = server.post("/v1/completions", &json!({ "prompt": "x".repeat(CONTEXT + 1) }));
    assert_eq!((status, full["error"]["code"].as_str()), (400, Some("context_length_exceeded")));
}

#[test]
fn stop_strings_end_an_answer_before_them() {
    let server = server();
    let (_, free) = server.post("/v1/completions", &json!({ "prompt": "abc", "max_tokens": 30 }));
    let text = free["choices"][0]["text"].as_str().unwrap().to_owned();
    let letters: Vec<char> = text.chars().collect();
    let stop: String = letters[3..5].iter().collect();
    let (_, cut) = server.post("/v1/completions", &json!({ "prompt": "abc", "max_tokens": 30, "stop": stop }));
    let expected = &text[..text.find(&stop).unwrap()];
    assert_eq!(cut["choices"][0]["text"], expected);
    assert_eq!(cut["choices"][0]["finish_reason"], "stop");
    assert_eq!(cut["usage"]["prompt_tokens"], 3);
}

#[test]
fn embeddings_have_length_one() {
    let server = server();
    let (_, answer) = server.post("/v1/embeddings", &json!({ "input": ["abc", "xyz", "abc"] }));
    let vectors: Vec<Vec<f64>> = serde_json::from_value(json!(
        answer["data"].as_array().unwrap().iter().map(|d| d["embedding"].clone()).collect::<Vec<_>>()
    ))
    .unwrap();
    assert_eq!((vectors.len(), vectors[0].len()), (3, 32));
    assert!(vectors.iter().all(|v| (v.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-5));
    assert_eq!(vectors[0], vectors[2]);
    assert_ne!(vectors[0], vectors[1]);
    let (_, coded) = server.post("/v1/embeddings", &json!({ "input": "abc", "encoding_format": "base64" }));
    assert_eq!(coded["data"][0]["embedding"].as_str().map(str::len), Some((32 * 4_usize).div_ceil(3) * 4));
}

#[test]
fn text_to_tokens_and_back() {
    let server = server();
    let (_, there) = server.post("/tokenize", &json!({ "content": "a<think>é" }));
    assert_eq!(there["tokens"], json!([101, 2, 4 + 0xc3, 4 + 0xa9]));
    let (_, back) = server.post("/detokenize", &json!({ "tokens": [101, 4 + 0xc3, 4 + 0xa9] }));
    assert_eq!(back["content"], "aé");
    assert_eq!(server.post("/detokenize", &json!({ "tokens": [260] })).0, 400);
}
