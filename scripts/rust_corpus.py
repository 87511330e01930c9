"""Rust sources of the local cargo registry (crates under MIT or Apache-2.0) as a corpus to train and measure on.

    python scripts/rust_corpus.py OUT [--bytes 24000000] [--vocabulary 8192]

Writes OUT/learn/*.rs and OUT/held-out/*.rs: eight crates are held out, whole. With --vocabulary also a byte-level BPE tokenizer of so
many tokens, learned on OUT/learn (`pip install tokenizers`), as OUT/tokenizer.json, and OUT/learn.txt, the files in one.
"""

import argparse
import glob
import os
import random
import re

parser = argparse.ArgumentParser()
parser.add_argument("out")
parser.add_argument("--bytes", type=int, default=24_000_000)
parser.add_argument("--vocabulary", type=int)
args = parser.parse_args()

HELD_OUT = {"anyhow", "crossbeam-deque", "fastrand", "half", "memmap2", "slab", "tempfile", "toml"}
# Bindings and tables: long lists that teach a small model nothing of the language.
LISTS = ("windows", "winapi", "linux-raw", "wasm", "web-sys", "js-sys", "icu", "libc", "unicode", "encoding", "mac", "objc")

files = {"learn": [], "held-out": []}
registry = os.path.join(os.environ.get("CARGO_HOME", os.path.expanduser("~/.cargo")), "registry/src/*/*")
for crate in sorted(glob.glob(registry)):
    name = re.sub(r"-\d+\..*$", "", os.path.basename(crate))
    try:
        manifest = open(os.path.join(crate, "Cargo.toml"), encoding="utf8").read()
    except OSError:
        continue
    licence = re.search(r'license\s*=\s*"([^"]+)"', manifest)
    if not licence or not ("MIT" in licence[1] or "Apache" in licence[1]) or name.startswith(LISTS):
        continue
    for path in sorted(glob.glob(crate + "/src/**/*.rs", recursive=True)):
        if not 400 <= os.path.getsize(path) <= 60000:
            continue
        try:
            text = open(path, encoding="utf8").read()
        except UnicodeDecodeError:
            continue
        if sum(c.isdigit() for c in text) <= 0.15 * len(text):
            files["held-out" if name in HELD_OUT else "learn"].append(text)

random.seed(1)
for part, most in (("learn", args.bytes), ("held-out", 120_000)):
    os.makedirs(os.path.join(args.out, part), exist_ok=True)
    random.shuffle(files[part])
    size, kept = 0, []
    for i, text in enumerate(files[part]):
        with open(os.path.join(args.out, part, f"{i:05}.rs"), "w", encoding="utf8") as f:
            f.write(text)
        kept.append(text)
        size += len(text)
        if size > most:
            break
    files[part] = kept

if args.vocabulary:
    from byte_bpe import train_tokenizer

    train_tokenizer(files["learn"], args.vocabulary, "<|end|>").save(os.path.join(args.out, "tokenizer.json"))
    with open(os.path.join(args.out, "learn.txt"), "w", encoding="utf8") as f:
        f.writelines(files["learn"])
