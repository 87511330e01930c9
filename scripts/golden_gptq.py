"""GPTQ as Frantar et al. 2022 write it (algorithm 1: with the inverse Hessian), in plain numpy, one row and column at a time.

Writes crates/fourfold-compress/tests/golden/gptq.json: a weight, a Hessian, and the codes and scales that must come out.
Run from the repository's root: python scripts/golden_gptq.py
"""

import json

import numpy as np

ROWS, COLS, GROUP, BITS, DAMPING = 6, 40, 16, 4, 0.01

rng = np.random.default_rng(7)
mix = rng.normal(size=(COLS, 5))
x = rng.normal(size=(300, 5)) @ mix.T + 0.5 * rng.normal(size=(300, COLS))
hessian = np.asarray(2.0 / len(x) * x.T @ x, dtype=np.float32)
weight = np.asarray(rng.normal(size=(ROWS, COLS)), dtype=np.float32)

h = hessian.astype(np.float64)
h[np.diag_indices(COLS)] += DAMPING * np.mean(np.diag(hessian.astype(np.float64)))
# Upper Cholesky factor of the inverse.
u = np.linalg.cholesky(np.linalg.inv(h)).T

w = weight.astype(np.float64).copy()
levels = 2 ** (BITS - 1)
codes = np.zeros((ROWS, COLS), dtype=int)
scales = np.zeros((ROWS, -(-COLS // GROUP)))
for k in range(COLS):
    g = k // GROUP
    if k % GROUP == 0:
        scales[:, g] = np.abs(w[:, k : k + GROUP]).max(axis=1) / (levels - 1)
    q = np.clip(np.round(w[:, k] / scales[:, g]), -levels, levels - 1)
    codes[:, k] = q + levels
    error = (w[:, k] - q * scales[:, g]) / u[k, k]
    w[:, k:] -= np.outer(error, u[k, k:])

out = {
    "rows": ROWS,
    "cols": COLS,
    "group": GROUP,
    "bits": BITS,
    "damping": DAMPING,
    "weight": [float(v) for v in weight.ravel()],
    "hessian": [float(v) for v in hessian.ravel()],
    "codes": codes.ravel().tolist(),
    "scales": [round(float(v), 7) for v in scales.ravel()],
}
with open("crates/fourfold-compress/tests/golden/gptq.json", "w") as f:
    json.dump(out, f)
