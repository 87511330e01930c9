"""One small GGUF file with a tensor of every block type we read, and what the reference package reads from it.

    pip install gguf safetensors
    python scripts/golden_gguf.py [OUT_DIR]

    gguf_blocks.gguf         written by the `gguf` package: metadata of every value type, then one tensor
                             [2, 256] of each block type, named by the type in lower case, of random blocks
    gguf_blocks.safetensors  for each tensor `name`: its dequantised values (F32 [2, 256]) as the package computes
                             them, and `name.blocks`: the same bytes as in the file (U8 [2, bytes a row])
    gguf_blocks.json         the metadata as the package reads it back

The blocks are random bytes, so that every code and every scale occurs, not only those that a quantizer would write;
only the floating-point scales are drawn, because random bytes make infinite ones.
"""

import json
import pathlib
import sys

import numpy as np
from gguf import GGMLQuantizationType as Q
from gguf import GGUFReader, GGUFWriter, GGUFValueType, dequantize
from safetensors.numpy import save_file

OUT = pathlib.Path(__file__).parent.parent / "crates/fourfold-formats/tests/golden"
ROWS, COLUMNS = 2, 256

# type: (weights a block, bytes a block, where the f16 scales lie)
BLOCKS = {
    Q.Q4_0: (32, 18, [0]),
    Q.Q4_1: (32, 20, [0, 2]),
    Q.Q5_0: (32, 22, [0]),
    Q.Q5_1: (32, 24, [0, 2]),
    Q.Q8_0: (32, 34, [0]),
    Q.Q2_K: (256, 84, [80, 82]),
    Q.Q3_K: (256, 110, [108]),
    Q.Q4_K: (256, 144, [0, 2]),
    Q.Q5_K: (256, 176, [0, 2]),
    Q.Q6_K: (256, 210, [208]),
    Q.IQ4_NL: (32, 18, [0]),
    Q.IQ4_XS: (256, 136, [0]),
    Q.MXFP4: (32, 17, []),
}

METADATA = {
    "test.uint8": (GGUFValueType.UINT8, 200),
    "test.int8": (GGUFValueType.INT8, -100),
    "test.uint16": (GGUFValueType.UINT16, 60000),
    "test.int16": (GGUFValueType.INT16, -30000),
    "test.uint32": (GGUFValueType.UINT32, 4000000000),
    "test.int32": (GGUFValueType.INT32, -2000000000),
    "test.float32": (GGUFValueType.FLOAT32, 0.15625),
    "test.bool": (GGUFValueType.BOOL, True),
    "test.string": (GGUFValueType.STRING, "vier mal, quatre fois, 四つ"),
    "test.uint64": (GGUFValueType.UINT64, 2**63 + 1),
    "test.int64": (GGUFValueType.INT64, -(2**62)),
    "test.float64": (GGUFValueType.FLOAT64, 1.0000000000000002),
    "test.strings": (GGUFValueType.ARRAY, ["a", "", "b c", "\u0120d"]),
    "test.ints": (GGUFValueType.ARRAY, [1, -2, 3]),
    "test.floats": (GGUFValueType.ARRAY, [0.5, -0.25]),
}


def random_blocks(kind, rng):
    weights, size, scales = BLOCKS[kind]
    count = ROWS * COLUMNS // weights
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for at in scales:
        blocks[:, at : at + 2] = rng.normal(0, 0.05, (count, 1)).astype(np.float16).view(np.uint8)
    if kind == Q.MXFP4:
        blocks[:, 0] = rng.integers(118, 132, count)
        blocks[:4, 0] = [0, 1, 2, 252]  # subnormal halves and the largest scale that stays finite
    return blocks.reshape(ROWS, -1)


def main(out):
    rng = np.random.default_rng(4)
    out.mkdir(parents=True, exist_ok=True)
    dense = rng.normal(0, 1, (ROWS, COLUMNS)).astype(np.float32)
    dense[0, :4] = [0.0, -0.0, 1e-5, 60000.0]
    tensors = {Q.F32: dense, Q.F16: dense.astype(np.float16)}
    tensors[Q.BF16] = (dense.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(ROWS, -1)
    tensors |= {kind: random_blocks(kind, rng) for kind in BLOCKS}

    path = out / "gguf_blocks.gguf"
    writer = GGUFWriter(path, "test")
    for key, (kind, value) in METADATA.items():
        writer.add_key_value(key, value, kind)
    expected = {}
    for kind, data in tensors.items():
        name = kind.name.lower()
        writer.add_tensor(name, data, raw_dtype=kind)
        expected[name] = np.ascontiguousarray(dequantize(data, kind), dtype=np.float32)
        expected[name + ".blocks"] = np.ascontiguousarray(data).view(np.uint8).reshape(ROWS, -1)
        assert expected[name].shape == (ROWS, COLUMNS) and np.isfinite(expected[name]).all(), name
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    reader = GGUFReader(path)
    for tensor in reader.tensors:
        assert np.array_equal(np.asarray(tensor.data).view(np.uint8).reshape(ROWS, -1), expected[tensor.name + ".blocks"])
        assert np.array_equal(dequantize(tensor.data, tensor.tensor_type), expected[tensor.name]), tensor.name
    save_file(expected, out / "gguf_blocks.safetensors")
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    (out / "gguf_blocks.json").write_text(json.dumps(fields, indent=1, ensure_ascii=False, default=lambda v: v.item()) + "\n")
    for file in sorted(out.glob("gguf_blocks.*")):
        print(file.name, file.stat().st_size)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
