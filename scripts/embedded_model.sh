#!/usr/bin/env bash
# Makes the model in crates/fourfold/assets: trained by `fourfold train` on the Rust sources of this project's dependencies (those under
# MIT or Apache-2.0 in the local cargo registry). Eight crates are held out. About half an hour on two cores.
#   scripts/embedded_model.sh OUTPUT
# The configuration and the tokenizer are those in the assets; scripts/train_embedded.py made the tokenizer.
set -euo pipefail
out=$1
root=$(cd "$(dirname "$0")/.." && pwd)
corpus=$out/corpus
mkdir -p "$corpus/learn" "$corpus/held-out"
python3 - "$corpus" <<'PY'
import glob, os, random, re, sys

held_out = {"anyhow", "crossbeam-deque", "fastrand", "half", "memmap2", "slab", "tempfile", "toml"}
# Bindings and tables: long lists that teach a small model nothing of the language.
lists = ("windows", "winapi", "linux-raw", "wasm", "web-sys", "js-sys", "icu", "libc", "unicode", "encoding", "mac", "objc")
files = {"learn": [], "held-out": []}
registry = os.path.join(os.environ.get("CARGO_HOME", os.path.expanduser("~/.cargo")), "registry/src/*/*")
for crate in sorted(glob.glob(registry)):
    name = re.sub(r"-\d+\..*$", "", os.path.basename(crate))
    try:
        manifest = open(os.path.join(crate, "Cargo.toml"), encoding="utf8").read()
    except OSError:
        continue
    licence = re.search(r'license\s*=\s*"([^"]+)"', manifest)
    if not licence or not ("MIT" in licence[1] or "Apache" in licence[1]) or name.startswith(lists):
        continue
    for path in sorted(glob.glob(crate + "/src/**/*.rs", recursive=True)):
        if not 400 <= os.path.getsize(path) <= 60000:
            continue
        try:
            text = open(path, encoding="utf8").read()
        except UnicodeDecodeError:
            continue
        if sum(c.isdigit() for c in text) <= 0.15 * len(text):
            files["held-out" if name in held_out else "learn"].append(text)
random.seed(1)
for part, most in (("learn", 24_000_000), ("held-out", 120_000)):
    random.shuffle(files[part])
    size = 0
    for i, text in enumerate(files[part]):
        with open(os.path.join(sys.argv[1], part, f"{i:05}.rs"), "w", encoding="utf8") as f:
            f.write(text)
        size += len(text)
        if size > most:
            break
PY
cargo run --release --manifest-path "$root/Cargo.toml" --package fourfold -- train \
  --model-config "$root/crates/fourfold/assets/config.json" --tokenizer "$root/crates/fourfold/assets/tokenizer.json" \
  --data "$corpus/learn" --eval-data "$corpus/held-out" --output "$out/run" \
  --preset amp --steps 2000 --lr 3e-3 --warmup-steps 60 --eval-every 500 --save-every 500 --context 256 --batch-size 8
# The trainer keeps f32 weights with this preset; the assets hold them in bf16.
python3 "$root/scripts/round_to_bf16.py" "$out/run/best/model.safetensors" "$out/model.safetensors"
