//! The report as Markdown.

use super::tensors::{Group, by_layer, by_role, by_storage};
use super::{Comparison, figures};
use crate::human;

/// The whole document.
pub fn document(c: &Comparison) -> String {
    let mut text = format!("# {} and {}\n\n", c.a.name, c.b.name);
    text += &table(figures::table(c).into_iter().map(Vec::from));
    text += &format!(
        "\nEvaluated on {}, windows of {} tokens; {} threads; fourfold {}. Peak memory is that of a whole process.\n",
        c.text, c.context, c.threads, c.version
    );
    for (title, groups) in [
        ("Bytes by component", by_role(&c.tensors)),
        ("Bytes and errors by layer", by_layer(&c.tensors)),
        ("How B is stored", by_storage(&c.tensors)),
    ] {
        text += &format!("\n## {title}\n\n{}", table(group_rows(&groups)));
    }
    if !c.unmatched.is_empty() {
        text += &format!("\nOnly in one of them, or of another shape: {}\n", c.unmatched.join(", "));
    }
    text += "\n## Samples\n";
    for (a, b) in c.a.samples.iter().zip(&c.b.samples) {
        let quoted = |text: &str| text.lines().map(|line| format!("    {line}\n")).collect::<String>();
        text += &format!("\nPrompt:\n\n{}\nA:\n\n{}\nB:\n\n{}", quoted(&a.prompt), quoted(&a.text), quoted(&b.text));
    }
    text
}

fn group_rows(groups: &[Group]) -> impl Iterator<Item = Vec<String>> {
    let heading = ["", "tensors", "A", "B", "ratio", "error ‖A−B‖²/‖A‖²"].map(str::to_owned).to_vec();
    std::iter::once(heading).chain(groups.iter().map(|g| {
        vec![
            g.name.clone(),
            g.tensors.to_string(),
            human::bytes(g.a_bytes),
            human::bytes(g.b_bytes),
            figures::times(g.a_bytes as f64 / g.b_bytes as f64),
            format!("{:.2e}", g.error),
        ]
    }))
}

/// A Markdown table; the first row is the heading. `|` in a cell is escaped.
fn table(rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut text = String::new();
    for (i, row) in rows.enumerate() {
        let cells: Vec<String> = row.iter().map(|cell| cell.replace('|', "\\|")).collect();
        text += &format!("| {} |\n", cells.join(" | "));
        if i == 0 {
            text += &format!("|{}\n", "---|".repeat(row.len()));
        }
    }
    text
}
