"""Writes a llama that is wider and computes the same: a source whose rows divide into ggml's blocks of 256.

    pip install torch safetensors
    python scripts/widen_llama.py IN OUT --hidden 768 --heads 12

The residual stream gets zeros behind its features; norms' gains and epsilon make up for the mean that zeros lower. Each group of query
heads gets heads of zeros at its end. Turn the result with `rotate_llama.py`: then no weight of the stream is zero any more, and none
lies on a grid that an earlier quantization left.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--heads", type=int, required=True)
    args = parser.parse_args()
    config = json.loads((args.source / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    groups, dim = config["num_key_value_heads"], config.get("head_dim") or hidden // heads
    assert args.hidden >= hidden and args.heads >= heads and args.heads % groups == 0
    weights = {}
    for file in sorted(args.source.glob("*.safetensors")):
        weights |= {name: tensor.double() for name, tensor in load_file(file).items()}
    gain = (hidden / args.hidden) ** 0.5

    def columns(w):
        return torch.nn.functional.pad(w, (0, args.hidden - hidden))

    def rows(w):
        return torch.nn.functional.pad(w, (0, 0, 0, args.hidden - hidden))

    def queries(w):
        of_groups = w.reshape(groups, heads // groups * dim, -1)
        return torch.nn.functional.pad(of_groups, (0, 0, 0, (args.heads - heads) // groups * dim)).flatten(0, 1)

    out = {}
    for name, w in weights.items():
        if name.endswith("norm.weight"):
            out[name] = torch.nn.functional.pad(w, (0, args.hidden - hidden)) * gain
        elif name.endswith("q_proj.weight"):
            out[name] = columns(queries(w))
        elif name.endswith("o_proj.weight"):
            out[name] = rows(queries(w.T).T)
        elif name.endswith("down_proj.weight"):
            out[name] = rows(w)
        else:
            out[name] = columns(w)
    config |= {
        "hidden_size": args.hidden,
        "num_attention_heads": args.heads,
        "head_dim": dim,
        "rms_norm_eps": config["rms_norm_eps"] * hidden / args.hidden,
    }
    args.out.mkdir(parents=True)
    (args.out / "config.json").write_text(json.dumps(config, indent=2))
    for file in args.source.iterdir():
        if file.name != "config.json" and not file.name.endswith((".safetensors", ".index.json")) and file.is_file():
            shutil.copy(file, args.out / file.name)
    # bf16 values times a gain are no bf16 values: what is not a norm is as it was.
    save_file({name: w.to(torch.float32) for name, w in out.items()}, args.out / "model.safetensors")


if __name__ == "__main__":
    main()
