"""Writes a llama whose weights lie on no grid and that computes the same: a source to measure quantizers on.

    pip install torch transformers safetensors
    python scripts/rotate_llama.py IN OUT [--seed 0]

A checkpoint that was once quantized hides its grid in its bf16 values, and a quantizer that happens to use that grid finds them again.
Here every norm's gain is folded into the products behind it, then the residual stream is turned by a random orthogonal matrix Q: what
writes to the stream is multiplied by Q, what reads from it by its inverse (QuaRot, Ashkboos et al. 2024, section 4.1; RMSNorm without a gain does
not see Q). The final gain goes into the output head, which therefore is no longer the embedding. Products are made in float64
and rounded to bf16 once. Prints how far the model's predictions on this file's text are from those of IN, before and after
that rounding, all run by transformers in float32; refuses to go on where they differ before it.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

READ = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]
GAINS = ["input_layernorm", "post_attention_layernorm"]
WRITTEN = ["self_attn.o_proj", "mlp.down_proj"]


def rotation(size, seed):
    """A random orthogonal matrix: QR of a Gaussian one, signs from R's diagonal so that it is uniform (Stewart 1980)."""
    gaussian = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


def rotated(weights, config, q):
    """The tensors of the turned model, float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    embedding = w["model.embed_tokens.weight"]
    head = embedding if config["tie_word_embeddings"] else w["lm_head.weight"]
    w["lm_head.weight"] = (head * w["model.norm.weight"]) @ q
    w["model.embed_tokens.weight"] = embedding @ q
    w["model.norm.weight"].fill_(1)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for gain, readers in zip(GAINS, READ):
            for reader in readers:
                name = f"{at}{reader}.weight"
                w[name] = (w[name] * w[f"{at}{gain}.weight"]) @ q
            w[f"{at}{gain}.weight"].fill_(1)
        for writer in WRITTEN:
            w[f"{at}{writer}.weight"] = q.T @ w[f"{at}{writer}.weight"]
            if f"{at}{writer}.bias" in w:
                w[f"{at}{writer}.bias"] = q.T @ w[f"{at}{writer}.bias"]
    return w


def log_probabilities(path, ids, weights=None):
    """Of the checkpoint in a folder, or of other weights with its configuration."""
    if weights is None:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32)
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    with torch.no_grad():
        return model.eval()(ids).logits[0].log_softmax(-1)


def differences(before, after):
    divergence = (before.exp() * (before - after)).sum(-1).mean()
    return f"largest difference of a log-probability {(before - after).abs().max():.2g}, mean KL divergence {divergence:.2g}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = json.loads((args.source / "config.json").read_text())
    if config["model_type"] not in ("llama", "qwen2"):
        raise SystemExit(f"{config['model_type']}: a llama or qwen2 is expected")
    weights = {}
    for file in sorted(args.source.glob("*.safetensors")):
        weights |= load_file(file)
    config.setdefault("tie_word_embeddings", False)
    turned = rotated(weights, config, rotation(config["hidden_size"], args.seed))
    config["tie_word_embeddings"] = False
    config["torch_dtype"] = "bfloat16"
    args.target.mkdir(parents=True)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in turned.items()}
    save_file(tensors, args.target / "model.safetensors", metadata={"format": "pt"})
    (args.target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in args.source.iterdir():
        if file.suffix in (".json", ".txt", ".model", ".jinja") and file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copyfile(file, args.target / file.name)
    ids = torch.tensor([AutoTokenizer.from_pretrained(args.source)(Path(__file__).read_text()).input_ids[:256]])
    before = log_probabilities(args.source, ids)
    exact = log_probabilities(args.target, ids, turned)
    print(f"turned:            {differences(before, exact)}")
    if (before - exact).abs().max() > 1e-2:
        raise SystemExit("the turned model does not compute the same")
    print(f"rounded to bf16:   {differences(before, log_probabilities(args.target, ids))}")


main()
