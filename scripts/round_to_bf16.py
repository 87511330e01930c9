"""Rounds the f32 tensors of a safetensors file to bf16 (nearest, ties to even).

    pip install numpy
    python scripts/round_to_bf16.py IN OUT
"""

import json
import struct
import sys

import numpy as np

source, target = sys.argv[1:]
data = open(source, "rb").read()
(length,) = struct.unpack("<Q", data[:8])
header = json.loads(data[8 : 8 + length])
header.pop("__metadata__", None)
rounded, begin, body = {}, 0, []
for name, info in sorted(header.items()):
    first, last = (8 + length + offset for offset in info["data_offsets"])
    raw, dtype = data[first:last], info["dtype"]
    if dtype == "F32":
        bits = np.frombuffer(raw, np.uint32).astype(np.uint64)
        raw, dtype = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes(), "BF16"
    rounded[name] = {"dtype": dtype, "shape": info["shape"], "data_offsets": [begin, begin + len(raw)]}
    body.append(raw)
    begin += len(raw)
text = json.dumps({"__metadata__": {"format": "pt"}, **rounded}, separators=(",", ":")).encode()
text += b" " * (-len(text) % 8)
with open(target, "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text + b"".join(body))
