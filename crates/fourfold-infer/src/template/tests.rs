//! What the golden file does not say.

use super::*;

fn turn(role: Role, content: &str) -> Json {
    Json::from(&Message { role, content: content.into() })
}

fn render(source: &str) -> Result<String, InferError> {
    ChatTemplate::new(source, &[]).and_then(|template| template.render(&[turn(Role::User, "Hi")], None, false))
}

#[test]
fn chatml_opens_the_answer() {
    let text = ChatTemplate::chatml().unwrap().render(&[turn(Role::User, "Hi")], None, true).unwrap();
    assert_eq!(text, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    let closed = ChatTemplate::chatml().unwrap().render(&[turn(Role::User, "Hi")], None, false).unwrap();
    assert_eq!(closed, "<|im_start|>user\nHi<|im_end|>\n");
}

#[test]
fn a_template_that_refuses_says_why() {
    let error = render("{{ raise_exception('roles must alternate') }}").unwrap_err();
    assert!(error.to_string().contains("roles must alternate"), "{error}");
    for (source, reason) in [
        ("{% for %}", "a name is expected"),
        ("{% wrong %}", "unknown tag `wrong`"),
        ("{% include 'x' %}", "no other templates"),
        ("a\n{{ b.c }}", "'b' is undefined (line 2)"),
        ("{{ messages.append(1) }}", "list.append"),
        ("{{ 'x' | escape }}", "unknown filter `escape`"),
    ] {
        let error = render(source).unwrap_err().to_string();
        assert!(error.contains(reason), "{source}: {error}");
    }
}

/// Each of these would take all memory, all stack or hours.
#[test]
fn work_memory_and_recursion_are_bounded() {
    let deep = |n: usize, a: &str, b: &str, c: &str| format!("{{{{ {}{b}{} }}}}", a.repeat(n), c.repeat(n));
    for (source, reason) in [
        ("{{ 'x' * 10**9 }}".to_owned(), "memory"),
        ("{{ 'x' * 9223372036854775807 }}".to_owned(), "memory"),
        ("{{ [1] * 10**9 }}".to_owned(), "memory"),
        ("{{ range(10**9) }}".to_owned(), "range too big"),
        ("{{ '%999999999d' % 1 }}".to_owned(), "memory"),
        ("{{ '%.999999999f' % 1 }}".to_owned(), "memory"),
        ("{{ '%*d' % (999999999, 1) }}".to_owned(), "memory"),
        ("{{ '{:>999999999}'.format(1) }}".to_owned(), "memory"),
        ("{{ 'x'.center(10**9) }}".to_owned(), "memory"),
        ("{{ 'x'.zfill(10**9) }}".to_owned(), "memory"),
        ("{{ 'a\nb' | indent(10**9) }}".to_owned(), "memory"),
        ("{{ [1] | tojson(indent=10**9) }}".to_owned(), "memory"),
        ("{{ [1] | batch(10**9, 0) | list }}".to_owned(), "memory"),
        ("{{ [1] | slice(10**9) | list }}".to_owned(), "memory"),
        ("{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}".to_owned(), "memory"),
        ("{% set ns = namespace(s='xy') %}{% for i in range(99) %}{% set ns.s = ns.s.replace('', ns.s) %}{% endfor %}".to_owned(), "memory"),
        ("{% set ns = namespace(s='xy') %}{% for i in range(99) %}{% set ns.s = ns.s.join(ns.s) %}{% endfor %}".to_owned(), "memory"),
        ("{% set ns = namespace(l=[1]) %}{% for i in range(99) %}{% set ns.l = ns.l + ns.l %}{% endfor %}".to_owned(), "memory"),
        ("{% set ns = namespace(l=[]) %}{% for i in range(99) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}".to_owned(), "memory"),
        ("{% set ns = namespace(l=[]) %}{% for i in range(999) %}{% set ns.l = [ns.l] %}{% endfor %}".to_owned(), "nested"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}".to_owned(), "more "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".to_owned(), "recursion"),
        ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}".to_owned(), "recursion"),
        (deep(100_000, "(", "1", ")"), "levels of nesting"),
        (deep(100_000, "[", "1", "]"), "levels of nesting"),
        (deep(100_000, "-", "1", ""), "levels of nesting"),
        (deep(100_000, "not ", "1", ""), "levels of nesting"),
        (deep(100_000, "", "1", "+1"), "in a row"),
        (deep(100_000, "", "x", ".x"), "in a row"),
        (deep(100_000, "", "x", "|list"), "in a row"),
        (format!("{}{}", "{% if 1 %}".repeat(40_000), "{% endif %}".repeat(40_000)), "levels of nesting"),
        ("x".repeat(MOST + 1), "bytes"),
    ] {
        let error = render(&source).unwrap_err().to_string();
        assert!(error.contains(reason), "{}: {error}", &source[..source.len().min(60)]);
    }
}

/// A conversation of some megabytes goes through the templates of today.
#[test]
fn a_long_conversation_is_not_refused() {
    let turns: Vec<Json> =
        (0..2000).map(|i| turn(if i % 2 == 0 { Role::User } else { Role::Assistant }, &"word ".repeat(200))).collect();
    let source = "{% for m in messages %}{% if m.role == 'user' and loop.index0 < messages|length %}{{ m.content.split('x')[-1]|trim }}\
                  {% else %}{{ messages[loop.index0].content.strip() ~ '\n' }}{% endif %}{% endfor %}";
    let text = ChatTemplate::new(source, &[]).unwrap().render(&turns, None, true).unwrap();
    assert!(text.len() > 1_900_000, "{}", text.len());
}

#[test]
fn nulls_and_thoughts_are_handed_over_as_transformers_does() {
    let message = json!({"role": "assistant", "content": null, "reasoning": "hm", "tool_calls": null});
    let source = "{{ messages[0] | tojson }}{{ messages[0].content is defined }}";
    let text = ChatTemplate::new(source, &[]).unwrap().render(&[message], None, false).unwrap();
    assert_eq!(text, r#"{"thinking": "hm", "role": "assistant", "reasoning": "hm", "reasoning_content": "hm"}False"#);
}
