"""What the golden_*.py scripts share: where cases go, random weights, and gradients as the tests compare them."""

import json
import pathlib

import torch

CRATES = pathlib.Path(__file__).resolve().parent.parent / "crates"
MODELS = CRATES / "fourfold-models/tests"


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1) + "\n")


def randomise(model, generator):
    """Weights of the size that keeps activations near one, so that every term is seen in the logits."""

    def normal(shape, std):
        return torch.randn(shape, generator=generator) * std

    with torch.no_grad():
        for name, p in list(model.named_parameters()) + list(model.named_buffers()):
            if "inv_freq" in name:
                continue
            if name.endswith("e_score_correction_bias"):
                p.copy_(normal(p.shape, 0.15))
            elif "norm" in name:
                p.copy_(1 + normal(p.shape, 0.3))
            elif name.endswith("bias"):
                p.copy_(normal(p.shape, 0.3))
            elif "embed_tokens" in name:
                p.copy_(normal(p.shape, 0.5 if model.config.tie_word_embeddings else 1.0))
            elif name.endswith("gate.weight"):
                p.copy_(normal(p.shape, 2 * p.shape[-1] ** -0.5))
            else:
                p.copy_(normal(p.shape, 1.2 * p.shape[-1] ** -0.5))


def next_token_loss(logits, input_ids):
    return torch.nn.functional.cross_entropy(logits[0, :-1], input_ids[0, 1:])


def summary(weight, grad):
    """A gradient's Euclidean norm and its inner product with the weight, in eight digits."""
    weight, grad = weight.detach().double(), grad.double()
    return dict(norm=float(f"{grad.norm():.8g}"), dot=float(f"{(grad * weight).sum():.8g}"))


def write_gradients(path, loss, found):
    """grads.json, a line a tensor."""
    lines = ",\n".join(f"  {json.dumps(n)}: {json.dumps(g)}" for n, g in sorted(found.items()))
    text = f'{{"loss": {loss}, "gradients": {{\n{lines}\n}}}}\n'
    assert json.loads(text) == dict(loss=loss, gradients=found)
    path.write_text(text)
