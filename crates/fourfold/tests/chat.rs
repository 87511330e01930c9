//! Conversations: commands, several lines, strings that end an answer, what no longer fits, and a terminal.

mod common;

use std::fs;

use common::{config, fourfold, fourfold_with_input, model, weights};
use serde_json::{Value, json};

fn contents(report: &Value) -> Vec<String> {
    let messages = report["messages"].as_array().unwrap();
    messages.iter().map(|m| format!("{}: {}", m["role"].as_str().unwrap(), m["content"].as_str().unwrap())).collect()
}

#[test]
fn lines_with_a_slash_are_commands() {
    let dir = common::folder();
    model(dir.path());
    let file = dir.path().join("talk.json");
    let chat = args!["chat", dir.path(), "-n", "4", "--temp", "0", "--json"];
    let said = format!(
        "/system be brief\nhello\n/etc/hosts, what is it?\n\"\"\"one\ntwo\"\"\"\n/regenerate\n/save {}\n/bye\n",
        file.display()
    );
    let report = fourfold_with_input(&chat, &said).json();
    let messages = contents(&report);
    assert_eq!(messages[0], "system: be brief");
    assert_eq!(messages[1], "user: hello");
    assert_eq!(messages[3], "user: /etc/hosts, what is it?");
    assert_eq!(messages[5], "user: one\ntwo");
    assert_eq!((messages.len(), report["turns"].as_array().unwrap().len()), (7, 4), "one answer was made twice");

    // The file is taken up where it was left, by the command as by the option.
    let loaded = fourfold_with_input(&chat, &format!("/load {}\n/set predict 2\nmore\n", file.display())).json();
    assert_eq!(contents(&loaded)[..7], messages[..]);
    assert_eq!((contents(&loaded)[7].as_str(), &loaded["turns"][0]["tokens"]), ("user: more", &json!(2)));
    let option = fourfold_with_input(chat.iter().chain(&args!["--load", &file]), "/clear\nnew\n").json();
    assert_eq!(contents(&option)[..2], ["system: be brief", "user: new"]);

    // Wrong commands are named, and the program's exit code says so.
    fs::write(dir.path().join("other.json"), "{}").unwrap();
    let other = dir.path().join("other.json").display().to_string();
    for (wrong, words) in [
        ("/frobnicate".to_owned(), "/frobnicate is no command"),
        ("/set top_p 2".to_owned(), "/set top_p 2: a number from 0 to 1 is expected"),
        ("/regenerate".to_owned(), "there is no message to answer"),
        (format!("/load {other}"), "no list of messages"),
        (format!("/save {other}"), "it is not replaced"),
    ] {
        let run = fourfold_with_input(&chat, &format!("{wrong}\n"));
        assert!(run.error().contains(words), "{}", run.stderr);
    }
    fs::write(&file, r#"{"messages": [{"role": "tool", "content": "x"}]}"#).unwrap();
    let run = fourfold_with_input(&chat, &format!("/load {}\n", file.display()));
    assert!(run.error().contains("message 1 is of the role \"tool\""), "{}", run.stderr);
}

#[test]
fn a_string_ends_an_answer_and_is_left_out() {
    let dir = common::folder();
    model(dir.path());
    let generate = args!["generate", dir.path(), "-p", "the quick", "-n", "24", "--temp", "0", "--ignore-eos"];
    let whole = fourfold(generate.iter().chain(&args!["--json"])).json()["text"].as_str().unwrap().to_owned();
    // Some characters from the middle, which come nowhere before.
    let chars: Vec<char> = whole.chars().collect();
    let stop: String = chars[chars.len() / 2..chars.len() / 2 + 2].iter().collect();
    let expected = whole.split(&stop).next().unwrap();
    let stopped = fourfold(generate.iter().chain(&args!["--json", "--stop", "never", "--stop", &stop])).json();
    assert_eq!((stopped["text"].as_str().unwrap(), stopped["stop"].as_str().unwrap()), (expected, "stop_string"));
    let printed = fourfold(generate.iter().chain(&args!["--stop", &stop, "--no-display-prompt"]));
    assert_eq!(printed.succeeded().stdout, format!("{expected}\n"));
    assert_eq!(fourfold(generate.iter().chain(&args!["--stop", ""])).code, Some(2));
}

#[test]
fn one_message_with_the_chats_template() {
    let dir = common::folder();
    model(dir.path());
    let options = args!["--temp", "0", "-n", "6", "--system-prompt", "be brief"];
    let chat = fourfold(args!["chat", dir.path(), "-p", "hello", "--json"].iter().chain(&options)).json();
    let generate = args!["generate", dir.path(), "--chat"];
    let one = fourfold(generate.iter().chain(&options).chain(&args!["-p", "hello", "--json"])).json();
    assert_eq!(one["prompt_tokens"], chat["turns"][0]["prompt_tokens"]);
    assert_eq!(one["text"].as_str().unwrap(), chat["messages"][2]["content"].as_str().unwrap());
    // Neither a message nor a file is said again before the answer.
    let file = dir.path().join("prompt.txt");
    fs::write(&file, "hello\n").unwrap();
    let answer = format!("{}\n", one["text"].as_str().unwrap());
    let from_file = fourfold(generate.iter().chain(&options).chain(&args!["-f", &file]));
    assert_eq!(from_file.succeeded().stdout, answer);
    let continued = fourfold(args!["generate", dir.path(), "-f", &file, "-n", "2", "--temp", "0"]);
    assert!(!continued.succeeded().stdout.starts_with("hello"), "{}", continued.stdout);
}

#[test]
fn the_oldest_turns_go_when_the_context_is_full() {
    let dir = common::folder();
    model(dir.path());
    let turns = 8;
    let said: String = (0..turns).map(|i| format!("message number {i} the\n")).collect();
    let chat = args!["chat", dir.path(), "-n", "4", "--temp", "0", "-c", "90", "--system-prompt", "brief"];
    let run = fourfold_with_input(chat.iter().chain(&args!["--json"]), &said);
    let report = run.json();
    assert_eq!(report["turns"].as_array().unwrap().len(), turns);
    assert_eq!(contents(&report).len(), 1 + 2 * turns, "all of it is kept for the file");
    assert_eq!(run.stderr.matches("oldest turns are left out").count(), 1, "{}", run.stderr);
    let most = report["turns"].as_array().unwrap().iter().map(|t| t["prompt_tokens"].as_u64().unwrap()).max().unwrap();
    assert!(most <= 86, "{most} tokens leave room for an answer");
    // An answer that is cut by the context says so; a message that alone is too long is an error.
    let cut = fourfold_with_input(args!["chat", dir.path(), "--temp", "0", "-c", "30"], "hello\n");
    assert!(cut.stderr.contains("the context of 30 tokens is full (--ctx-size)"), "{}", cut.stderr);
    let long = fourfold_with_input(args!["chat", dir.path(), "-c", "30"], &"long ".repeat(30));
    assert!(long.error().contains("do not fit the context of 30"), "{}", long.stderr);
}

#[test]
fn thoughts_can_be_left_out() {
    let dir = common::folder();
    model(dir.path());
    let mut settings: Value = json!({"bos_token": "<s>", "eos_token": "</s>"});
    settings["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n".into();
    fs::write(dir.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
    let chat = args!["chat", dir.path(), "-p", "hello", "-n", "6", "--temp", "0"];
    // A random model never ends its thoughts.
    let shown = fourfold(&chat);
    assert!(shown.succeeded().stdout.len() > 1);
    assert_eq!(fourfold(chat.iter().chain(&args!["--hide-thinking"])).succeeded().stdout, "\n");
}

/// The context is the model's where nothing else is asked for.
#[test]
fn the_models_positions_are_the_default() {
    let dir = common::folder();
    let mut config = config();
    config["max_position_embeddings"] = 12_000.into();
    model(dir.path());
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    fs::write(dir.path().join("model.safetensors"), weights(&config)).unwrap();
    let prompt = "the ".repeat(4500);
    let file = dir.path().join("long.txt");
    fs::write(&file, &prompt).unwrap();
    let report = fourfold(args!["generate", dir.path(), "-f", &file, "-n", "1", "--json"]).json();
    assert!(report["prompt_tokens"].as_u64().unwrap() > 8192, "{report}");
}

#[cfg(unix)]
mod terminal {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::process::Stdio;
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, Instant};

    use super::common;
    use crate::args;

    /// A terminal with the program in it, and what it has shown.
    struct Terminal {
        keys: File,
        shown: Arc<Mutex<Vec<u8>>>,
    }

    impl Terminal {
        fn text(&self) -> String {
            String::from_utf8_lossy(&self.shown.lock().unwrap()).into_owned()
        }

        /// Waits until `text` has been shown more than `times` times.
        fn wait(&self, text: &str, times: usize) {
            let begun = Instant::now();
            while self.text().matches(text).count() <= times {
                assert!(begun.elapsed() < Duration::from_secs(60), "no {text:?} in {}", self.text());
                std::thread::sleep(Duration::from_millis(20));
            }
        }

        fn press(&mut self, keys: &str) {
            self.keys.write_all(keys.as_bytes()).unwrap();
        }
    }

    #[test]
    fn lines_are_edited_and_remembered() {
        let dir = common::folder();
        common::model(dir.path());
        let history = dir.path().join("history");
        let pair = nix::pty::openpty(None, None).unwrap();
        let screen = File::from(pair.slave);
        let mut child = common::command(args!["chat", dir.path(), "-n", "3", "--temp", "0"])
            .stdin(Stdio::from(screen.try_clone().unwrap()))
            .stdout(Stdio::from(screen.try_clone().unwrap()))
            .stderr(Stdio::from(screen))
            .env("FOURFOLD_HISTORY", &history)
            .env("TERM", "xterm")
            .spawn()
            .unwrap();
        let shown = Arc::new(Mutex::new(Vec::new()));
        let (mut reader, sink) = (File::from(pair.master.try_clone().unwrap()), shown.clone());
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = reader.read(&mut bytes) {
                sink.lock().unwrap().extend(&bytes[..n]);
            }
        });
        let mut terminal = Terminal { keys: File::from(pair.master), shown };
        // The terminal is told so each time that a line is asked for.
        let asks = "\x1b[?2004h";
        terminal.wait(asks, 0);
        // A letter too many is taken back, and one is put in at the beginning.
        terminal.press("elpx\x7f\x01h\r");
        terminal.wait(asks, 1);
        // The line before comes back with the arrow, and is changed.
        terminal.press("\x1b[A me\r");
        terminal.wait(asks, 2);
        terminal.press("/help\r");
        terminal.wait(asks, 3);
        assert!(terminal.text().contains("/regenerate"), "{}", terminal.text());
        terminal.press("/bye\r");
        assert!(child.wait().unwrap().success(), "{}", terminal.text());
        assert_eq!(std::fs::read_to_string(&history).unwrap(), "help\nhelp me\n/help\n/bye\n", "{}", terminal.text());
    }
}
