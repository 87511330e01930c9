#!/usr/bin/env bash
# Makes the model in crates/fourfold/assets: trained by `fourfold train` on the Rust sources of this project's dependencies (those under
# MIT or Apache-2.0 in the local cargo registry). Eight crates are held out. About half an hour on two cores.
#   scripts/embedded_model.sh OUTPUT
# The configuration and the tokenizer are those in the assets; scripts/train_embedded.py made the tokenizer.
set -euo pipefail
out=$1
root=$(cd "$(dirname "$0")/.." && pwd)
corpus=$out/corpus
python3 "$root/scripts/rust_corpus.py" "$corpus"
cargo run --release --manifest-path "$root/Cargo.toml" --package fourfold -- train \
  --model-config "$root/crates/fourfold/assets/config.json" --tokenizer "$root/crates/fourfold/assets/tokenizer.json" \
  --data "$corpus/learn" --eval-data "$corpus/held-out" --output "$out/run" \
  --preset amp --steps 2000 --lr 3e-3 --warmup-steps 60 --eval-every 500 --save-every 500 --context 256 --batch-size 8
# The trainer keeps f32 weights with this preset; the assets hold them in bf16.
python3 "$root/scripts/round_to_bf16.py" "$out/run/best/model.safetensors" "$out/model.safetensors"
