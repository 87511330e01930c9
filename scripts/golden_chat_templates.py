"""Golden file of chat templates: what Hugging Face transformers renders.

    python scripts/golden_chat_templates.py [folder of .jinja files] > crates/fourfold-infer/tests/golden/chat_templates.json

Snippets of the language stand in scripts/chat_templates/snippets.txt, one a line. The templates beside it, and their licences, are listed in
scripts/chat_templates/README.md. With a folder, the templates in it are rendered instead: a check of more families, for a file that is not kept:

    python scripts/golden_chat_templates.py FOLDER > other.json
    FOURFOLD_CHAT_TEMPLATES=other.json cargo test --release -p fourfold-infer --test chat_templates
"""

import json
import sys
from pathlib import Path

from transformers.utils.chat_template_utils import (
    _alias_reasoning_fields,
    _cached_compile_jinja_template,
)

HERE = Path(__file__).parent / "chat_templates"

USER = {"role": "user", "content": "Hi — what's the weather in Zürich? 天気 \"q\" <b>"}
SYSTEM = {"role": "system", "content": "You are brief."}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nSunny ☀"}
REASONED = {"role": "assistant", "content": "Warm.", "reasoning_content": "I think so."}
DONE = {"role": "assistant", "content": "Done."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call_1234", "type": "function", "function": {
        "name": "get_weather", "arguments": {"city": "Zürich", "n": 3, "deep": {"a": [1, None, True, 1.5]}}}}],
}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call_1234", "content": "{\"t\": 21}"}
TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": "Das Wetter — 天気 & <x> 'y'",
    "parameters": {"type": "object", "properties": {
        "city": {"type": "string", "enum": ["a", "b"]}, "n": {"type": "integer", "default": 3},
        "f": {"type": ["number", "null"]}}, "required": ["city"]}}}]

CONVERSATIONS = {
    "user": ([USER], None),
    "thoughts": ([SYSTEM, USER, THOUGHT, USER], None),
    "reasoned": ([USER, REASONED, USER], None),
    "answered": ([SYSTEM, USER, DONE], None),
    "tools": ([SYSTEM, USER, CALL, RESULT], TOOLS),
    "out of turn": ([DONE, USER, USER], None),
    "several": ([SYSTEM, USER, DONE, {"role": "user", "content": "  Und morgen?\n"}, REASONED, USER], None),
    "answered tools": ([USER, CALL, RESULT, DONE, USER], TOOLS),
    "two tools": ([USER, {**CALL, "content": "Let me look.", "tool_calls": CALL["tool_calls"] * 2}, RESULT, RESULT], TOOLS * 2),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "Grüße "}, {"type": "text", "text": "🙂"}]}], None),
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def render(source, messages, tools, open_answer):
    """What transformers renders, or None where it refuses."""
    messages = _alias_reasoning_fields(messages)
    try:
        return _cached_compile_jinja_template(source).render(
            messages=messages, tools=tools, documents=None, add_generation_prompt=open_answer, **TOKENS)
    except Exception:
        return None


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    templates = {}
    for file in sorted(folder.glob("*.jinja")):
        source = file.read_text()
        cases = []
        for name, (messages, tools) in CONVERSATIONS.items():
            open_answer = name != "answered"
            cases.append({"conversation": name, "open": open_answer, "text": render(source, messages, tools, open_answer)})
        templates[file.stem] = {"source": source, "cases": cases}
    messages, tools = CONVERSATIONS["tools"]
    snippets = [] if len(sys.argv) > 1 else (HERE / "snippets.txt").read_text().splitlines()
    snippets = [snippet.replace("⏎", "\n") for snippet in snippets]
    golden = {
        "conversations": {name: {"messages": m, "tools": t} for name, (m, t) in CONVERSATIONS.items()},
        "tokens": TOKENS,
        "templates": templates,
        "snippets": [[snippet, render(snippet, messages, tools, True)] for snippet in snippets],
    }
    json.dump(golden, sys.stdout, ensure_ascii=False, indent=0)
    print()


main()
