"""Checksums of every tensor of real GGUF files, as the reference package (gguf on PyPI) dequantizes them.

    python scripts/gguf_checksums.py OUT.json FILE.gguf...

A tensor's checksum is the sum, modulo 2^64, of the bits of its f32 values (zeros unsigned) times 2i + 1 for element i, in
Hugging Face's order of rows: query and key rows of llama models are put back first. `tests/gguf_peers.rs` compares with it.
"""

import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader, dequantize


def checksum(values):
    bits = (values.astype(np.float32) + np.float32(0)).view(np.uint32).astype(np.uint64).ravel()
    with np.errstate(over="ignore"):
        return int((bits * (2 * np.arange(bits.size, dtype=np.uint64) + 1)).sum(dtype=np.uint64))


def main(out, files):
    result = {}
    for file in files:
        reader = GGUFReader(file)
        arch = reader.fields["general.architecture"].contents()
        heads = {
            "attn_q": reader.fields[f"{arch}.attention.head_count"].contents(),
            "attn_k": reader.fields[f"{arch}.attention.head_count_kv"].contents(),
        }
        sums = {}
        for tensor in reader.tensors:
            values = dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
            part = tensor.name.split(".")[-2]
            if arch == "llama" and part in heads:
                rows = values.shape[0]
                values = values.reshape(heads[part], rows // heads[part] // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)
            sums[tensor.name] = [tensor.tensor_type.name, str(checksum(values))]
        result[Path(file).name] = sums
        print(file, sorted({kind for kind, _ in sums.values()}))
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
