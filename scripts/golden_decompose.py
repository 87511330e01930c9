"""Golden errors of CP and Tucker-2 decompositions of convolution kernels, as TensorLy reaches them.

    /path/to/venv/bin/python scripts/golden_decompose.py > crates/fourfold-compress/tests/golden_decompose.json

The kernels are made by a formula that the test repeats, so that no tensor is stored. An error is |K - K'|^2 / |K|^2. TensorLy starts
from singular vectors and, for CP, also from three random starts, of which the best counts.
"""
import json
import math

import numpy as np
import tensorly as tl
from tensorly.decomposition import parafac, partial_tucker


def kernel(shape):
    n = math.prod(shape)
    at = np.arange(n, dtype=np.float64)
    # Smooth parts of low rank and a rough rest.
    o, i, h, w = np.unravel_index(np.arange(n), shape)
    smooth = np.sin(0.3 * o + 0.7 * i) * np.cos(0.9 * h) + 0.5 * np.cos(0.5 * o * h) * np.sin(0.4 * i + w)
    rough = np.sin(at * at * 0.37) * 0.3
    return (smooth + rough).astype(np.float32).astype(np.float64).reshape(shape)


def error(k, approximation):
    return float(((k - approximation) ** 2).sum() / (k**2).sum())


cases = []
for shape, ranks, rank in [((16, 8, 3, 3), (6, 4), 8), ((12, 20, 5, 3), (5, 7), 12), ((8, 6, 1, 3), (3, 2), 4)]:
    k = kernel(shape)
    (core, factors), _ = partial_tucker(k, rank=ranks, modes=[0, 1], n_iter_max=500, tol=1e-12)
    tucker = error(k, tl.tenalg.multi_mode_dot(core, factors, modes=[0, 1]))
    starts = [dict(init="svd", random_state=0)] + [dict(init="random", random_state=s) for s in range(3)]
    cp = min(error(k, tl.cp_to_tensor(parafac(k, rank, n_iter_max=500, tol=1e-12, **s))) for s in starts)
    cases.append({"shape": shape, "tucker_ranks": ranks, "tucker_error": tucker, "cp_rank": rank, "cp_error": cp})
print(json.dumps(cases, indent=1))
