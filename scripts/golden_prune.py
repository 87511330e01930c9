"""Pruning masks from torch.nn.utils.prune, Wanda and SparseGPT by their papers' formulas in NumPy, singular values from LAPACK.

Writes crates/fourfold-compress/tests/golden/prune.json. Run from the repository's root: python scripts/golden_prune.py
"""

import json

import numpy as np
import torch
from torch.nn.utils import prune

ROWS, COLS, DAMPING, BLOCK = 8, 160, 0.01, 128

rng = np.random.default_rng(11)
mix = rng.normal(size=(COLS, 12))
x = (rng.normal(size=(400, 12)) @ mix.T + 0.5 * rng.normal(size=(400, COLS))) * rng.uniform(0.2, 3.0, size=COLS)
# Few digits, so that the file is small.
hessian = np.asarray(np.round(2.0 / len(x) * x.T @ x, 3), dtype=np.float32)
weight = np.asarray(rng.normal(size=(ROWS, COLS)), dtype=np.float32)


def bits(mask):
    """A mask as a word of 0 and 1."""
    return "".join(str(int(v)) for v in mask.ravel())


def torch_masks():
    layers = [torch.nn.Linear(COLS, ROWS, bias=False), torch.nn.Conv2d(2, 5, 3, bias=False)]
    with torch.no_grad():
        layers[0].weight.copy_(torch.from_numpy(weight))
        layers[1].weight.copy_(torch.from_numpy(np.asarray(rng.normal(size=(5, 2, 3, 3)) * 0.5, dtype=np.float32)))
    second = layers[1].weight.detach().numpy().copy()
    local = {}
    for amount in (0.3, 0.5, 37):
        layer = torch.nn.Linear(COLS, ROWS, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weight))
        prune.l1_unstructured(layer, "weight", amount)
        local[str(amount)] = bits(layer.weight_mask.detach().numpy())
    prune.global_unstructured([(l, "weight") for l in layers], pruning_method=prune.L1Unstructured, amount=0.4)
    counts = [int((l.weight_mask == 0).sum()) for l in layers]
    return local, second, counts


def wanda(sparsity):
    score = np.abs(weight) * np.sqrt(np.diag(hessian).astype(np.float64))
    mask = np.ones_like(weight, dtype=int)
    order = np.argsort(score, axis=1, kind="stable")
    np.put_along_axis(mask, order[:, : int(COLS * sparsity)], 0, axis=1)
    return mask


def sparsegpt(sparsity=None, n=0, m=0):
    h = hessian.astype(np.float64)
    h[np.diag_indices(COLS)] += DAMPING * np.mean(np.diag(h))
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    w = weight.astype(np.float64).copy()
    mask = np.ones((ROWS, COLS), dtype=bool)
    for i in range(0, COLS, BLOCK):
        end = min(i + BLOCK, COLS)
        if sparsity is not None:
            score = (w[:, i:end] / np.diag(u)[i:end]) ** 2
            flat = np.ones(score.size, dtype=bool)
            flat[np.argsort(score.ravel(), kind="stable")[: int(score.size * sparsity)]] = False
            mask[:, i:end] = flat.reshape(score.shape)
        for j in range(i, end):
            if m and j % m == 0:
                score = (w[:, j : j + m] / np.diag(u)[j : j + m]) ** 2
                order = np.argsort(score, axis=1, kind="stable")
                part = np.ones_like(score, dtype=bool)
                np.put_along_axis(part, order[:, : m - n], False, axis=1)
                mask[:, j : j + m] = part
            value = np.where(mask[:, j], w[:, j], 0.0)
            w[:, j:] -= np.outer((w[:, j] - value) / u[j, j], u[j, j:])
            w[:, j] = value
    return mask.astype(int), w * mask


local, second, counts = torch_masks()
h = hessian.astype(np.float64)
h[np.diag_indices(COLS)] += DAMPING * np.mean(np.diag(h))
whitened = np.linalg.svd(weight.astype(np.float64) @ np.linalg.cholesky(h), compute_uv=False)
half_mask, half_weight = sparsegpt(sparsity=0.5)
nm_mask, nm_weight = sparsegpt(n=2, m=4)
out = {
    "rows": ROWS,
    "cols": COLS,
    "damping": DAMPING,
    "weight": [float(v) for v in weight.ravel()],
    "second": [float(v) for v in second.ravel()],
    "hessian_lower": [round(float(v), 3) for v in hessian[np.tril_indices(COLS)]],
    "l1": local,
    "global_pruned": counts,
    "wanda": bits(wanda(0.5)),
    "sparsegpt_mask": bits(half_mask),
    "sparsegpt": [round(float(v), 5) for v in half_weight.ravel()],
    "sparsegpt_2_4_mask": bits(nm_mask),
    "sparsegpt_2_4": [round(float(v), 5) for v in nm_weight.ravel()],
    "singular": np.linalg.svd(weight.astype(np.float64), compute_uv=False).tolist(),
    "singular_whitened": whitened.tolist(),
}
with open("crates/fourfold-compress/tests/golden/prune.json", "w") as f:
    json.dump(out, f)
