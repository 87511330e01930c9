"""Does a directory that `fourfold compress` wrote load elsewhere, and does it compute the same there?

    pip install torch transformers compressed-tensors
    python scripts/check_compressed_tensors.py DIR [SOURCE_DIR] [--logits FILE.safetensors]

Loads DIR with transformers and compressed-tensors in each of the ways there are, and says which of them work:

    plain        from_pretrained(DIR)
    dequantize   from_pretrained(DIR, quantization_config=CompressedTensorsConfig(dequantize=True))
    by module    each module is decompressed by compressed-tensors, then the dense model is loaded

and compares the logits of the ways with one another, with FILE (input_ids [windows, tokens] and logits
[windows, tokens, vocab], as `fourfold eval --dump-logits` writes them, or one window without that axis) and with the
model in SOURCE_DIR: maximal absolute difference, mean Kullback-Leibler divergence, share of equal top tokens. Exits with
1 if no way works, if `plain` and `by module` differ, or if FILE and `by module` differ by more than --tolerance; with
--plain also where `plain` does not load, as it must for what `fourfold compress --format compressed-tensors` writes by
default: a dense model, and a mixture of experts such as crates/fourfold-models/tests/golden/deepseek_v3_moe (with
--group-size 8, which divides its rows). No tokenizer is needed.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import warnings

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match, match_targets
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

STORED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale", "weight_g_idx")


def tensors_of(path):
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def config_of(path):
    text = json.loads((path / "config.json").read_text())
    found = text.pop("quantization_config", None)
    if found is None:
        return text, None
    known = QuantizationConfig.model_fields
    return text, QuantizationConfig.model_validate({k: v for k, v in found.items() if k in known})


def dequantised(path):
    """Every tensor of the checkpoint under its dense name, decompressed by compressed-tensors."""
    stored, (_, config) = tensors_of(path), config_of(path)
    targets = {t: scheme for scheme in config.config_groups.values() for t in scheme.targets}
    dense, modules = {}, {}
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        if kind in STORED:
            modules.setdefault(module, {})[kind] = tensor
        else:
            dense[name] = tensor
    for name, state in modules.items():
        if f"{name}.weight" in dense:
            state["weight"] = dense.pop(f"{name}.weight")
        kind = torch.nn.Embedding if name.endswith("embed_tokens") else torch.nn.Linear
        example = kind(1, 1)
        if not is_match(name, example, list(targets), config.ignore or []):
            raise SystemExit(f"{name} is stored compressed but no group of the configuration targets it")
        scheme = targets[match_targets(name, example, list(targets))[0]]
        compressor = BaseCompressor.get_value_from_registry(str(getattr(scheme.format or config.format, "value", scheme.format or config.format)))
        if "weight_scale" in state:  # so that the product is not rounded to bf16
            state["weight_scale"] = state["weight_scale"].float()
        dense[f"{name}.weight"] = compressor.decompress(state, scheme)["weight"]
    return dense


def plain(path):
    return from_pretrained(path)


def dequantize(path):
    _, config = config_of(path)
    if config is None:
        raise ValueError("not quantized")
    return from_pretrained(path, quantization_config=CompressedTensorsConfig(dequantize=True))


def by_module(path):
    config, _ = config_of(path)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        (scratch / "config.json").write_text(json.dumps(config))
        weights = {n: t.float() if t.is_floating_point() else t for n, t in dequantised(path).items()}
        save_file(weights, scratch / "model.safetensors", metadata={"format": "pt"})
        del weights
        return from_pretrained(scratch)


WAYS = {"plain": plain, "dequantize": dequantize, "by module": by_module}


def from_pretrained(path, **more):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", **more).eval()


@torch.no_grad()
def logits_of(model, input_ids):
    """[windows, tokens, vocab] of [windows, tokens]"""
    return torch.cat([model(window[None]).logits.float() for window in input_ids])


def compare(name, ours, theirs):
    p, q = (x.double().log_softmax(-1) for x in (theirs, ours))
    kld = (p.exp() * (p - q)).sum(-1).mean().item()
    top = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    difference = (ours - theirs).abs().max().item()
    print(f"{name:42} max abs diff {difference:.3e}  KLD {kld:.3e}  same top {100 * top:.1f} %")
    return difference


def main():
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("dir", type=pathlib.Path)
    args.add_argument("source", type=pathlib.Path, nargs="?")
    args.add_argument("--logits", type=pathlib.Path)
    args.add_argument("--tolerance", type=float, default=0.05)
    args.add_argument("--plain", action="store_true", help="fail where from_pretrained(DIR) alone does not load")
    args.add_argument("--tokens", type=int, default=64)
    args = args.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    golden = load_file(args.logits) if args.logits else None
    if golden:
        input_ids = golden["input_ids"].long()
        input_ids = input_ids.view(-1, input_ids.shape[-1])
    else:
        config, _ = config_of(args.dir)
        input_ids = torch.randint(0, config["vocab_size"], (1, args.tokens), generator=torch.Generator().manual_seed(0))

    results = {}
    for name, way in WAYS.items():
        try:
            results[name] = logits_of(way(args.dir), input_ids)
            print(f"{name}: loads and runs")
        except Exception as error:
            print(f"{name}: FAILS: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
    if not results:
        sys.exit(1)

    bad = args.plain and "plain" not in results
    for name in results:
        if name != "by module" and "by module" in results:
            difference = compare(f"{name} against by module", results[name], results["by module"])
            bad |= name == "plain" and difference > args.tolerance
    reference = results.get("by module", next(iter(results.values())))
    if golden:
        bad |= compare("ours against by module", golden["logits"].float().view_as(reference), reference) > args.tolerance
    if args.source:
        compare("by module against the source model", reference, logits_of(from_pretrained(args.source), input_ids))
    sys.exit(bad)


if __name__ == "__main__":
    main()
