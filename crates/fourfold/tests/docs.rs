//! What a package carries beside the program.

mod common;

use std::fs;

use common::{folder, fourfold};

#[test]
fn completions_and_manual_pages_know_every_command() {
    let help = fourfold(["--help"]).stdout;
    let commands: Vec<&str> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next())
        .filter(|name| !name.is_empty() && *name != "help")
        .collect();
    assert!(commands.len() > 12, "{commands:?}");
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let run = fourfold(["docs", "--completions", shell]);
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        assert!(commands.iter().all(|command| run.stdout.contains(command)), "{shell}");
    }
    let dir = folder();
    let man = dir.path().join("man");
    fourfold(args!["docs", "--man", &man]).succeeded();
    for command in &commands {
        let page = fs::read_to_string(man.join(format!("fourfold-{command}.1"))).unwrap();
        assert!(page.contains(".SH"), "{command}");
    }
    assert_eq!(fourfold(["docs"]).code, Some(2));
    assert_eq!(fourfold(["docs", "--completions", "csh"]).code, Some(2));
}
