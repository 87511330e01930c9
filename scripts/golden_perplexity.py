"""Perplexities by the sliding window of the transformers documentation ("Perplexity of fixed-length models").

    pip install torch transformers
    python scripts/golden_perplexity.py

crates/fourfold-infer/tests/golden_perplexity.json: lines of [context, stride, tokens, perplexity], of the golden checkpoint
llama_gqa_tied in f32 and of the first `tokens` of the ids (7 i^2 + 3 i + 1) mod 64. The last windows are long, short, and of one
new token.
"""

import json

import torch
from golden import CRATES, MODELS
from transformers import AutoModelForCausalLM

CASES = [(64, 32, 150), (64, 64, 150), (64, 48, 150), (16, 8, 145), (16, 8, 147), (16, 15, 150), (16, 16, 146), (32, 5, 88)]


def perplexity(model, ids, context, stride):
    """As the documentation computes it: a window's mean loss counts for one less than its new labels."""
    total, count, previous = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        new = end - previous
        window = torch.tensor([ids[begin:end]])
        labels = window.clone()
        labels[:, :-new] = -100
        with torch.no_grad():
            loss = model(window, labels=labels).loss
        counted = int((labels != -100).sum()) - 1
        total += float(loss.double()) * counted
        count += counted
        previous = end
        if end == len(ids):
            break
    return float(torch.tensor(total / count, dtype=torch.float64).exp())


if __name__ == "__main__":
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODELS / "golden/llama_gqa_tied", dtype=torch.float32).eval()
    ids = [(7 * i * i + 3 * i + 1) % 64 for i in range(150)]
    found = [[c, s, n, perplexity(model, ids[:n], c, s)] for c, s, n in CASES]
    text = "[\n" + ",\n".join(json.dumps(line) for line in found) + "\n]\n"
    (CRATES / "fourfold-infer/tests/golden_perplexity.json").write_text(text)
