"""The peer of `cargo xtask bench fashion`: the same network on the same images in PyTorch, f32, AdamW (fused).

    python scripts/peer_fashion.py CONFIG.json IMAGES --epochs N --seed S [--batch 128 --lr 1e-3 --threads 2]

IMAGES holds Fashion-MNIST's idx files. Prints one JSON object: accuracy on the test images, seconds of the training alone, and the
memory that the imports took, in bytes.
"""

import argparse
import gzip
import json
import math
import pathlib
import resource
import time

import numpy as np
import torch
from torch import nn

imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

parser = argparse.ArgumentParser()
parser.add_argument("config", type=pathlib.Path)
parser.add_argument("images", type=pathlib.Path)
parser.add_argument("--epochs", type=float, required=True)
parser.add_argument("--seed", type=int, required=True)
parser.add_argument("--batch", type=int, default=128)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--held-out", type=float, default=0.05)
parser.add_argument("--threads", type=int, default=2)
args = parser.parse_args()
torch.set_num_threads(args.threads)
torch.manual_seed(args.seed)

config = json.loads(args.config.read_text())


def read(name, skip):
    with gzip.open(args.images / f"{name}.gz") as file:
        return np.frombuffer(file.read(), np.uint8, offset=skip)


def network():
    channels, pixels, modules = config["image_size"][0], config["image_size"][1], []
    for layer in config["layers"]:
        match layer["type"]:
            case "conv2d":
                stride, padding = layer.get("stride", 1), layer.get("padding", 0)
                made = nn.Conv2d(channels, layer["out_channels"], layer["kernel_size"], stride, padding,
                                 bias=layer.get("bias", True))
                channels = layer["out_channels"]
                pixels = (pixels + 2 * padding - layer["kernel_size"]) // stride + 1
            case "batch_norm":
                made = nn.BatchNorm2d(channels)
            case "relu":
                made = nn.ReLU()
            case "flatten":
                made, channels = nn.Flatten(), channels * pixels * pixels
            case "linear":
                made, channels = nn.Linear(channels, layer["out_features"]), layer["out_features"]
            case other:
                raise SystemExit(f"{other} is not among this script's layers")
        modules.append(made)
    return nn.Sequential(*modules)


def batch_of(pixels, chosen):
    x = torch.from_numpy(pixels[chosen].astype(np.float32)).view(len(chosen), 1, 28, 28) / 255
    mean, std = config["normalize"]["mean"][0], config["normalize"]["std"][0]
    return (x - mean) / std


train = read("train-images-idx3-ubyte", 16).reshape(-1, 784), read("train-labels-idx1-ubyte", 8)
count = round(len(train[0]) * (1 - args.held_out))
model = network().train()
matrices = [p for p in model.parameters() if p.dim() > 1]
others = [p for p in model.parameters() if p.dim() <= 1]
optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                              lr=args.lr, betas=(0.9, 0.95), fused=True)
per_epoch = count // args.batch
steps = math.ceil(args.epochs * per_epoch)
warmup = steps * 3 // 100
random = np.random.default_rng(args.seed)
begun = time.time()
for step in range(steps):
    if step % per_epoch == 0:
        order = random.permutation(count)
    done = max(step - warmup, 0) / max(steps - warmup, 1)
    factor = (step + 1) / warmup if step < warmup else 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2
    for group in optimizer.param_groups:
        group["lr"] = args.lr * factor
    chosen = order[step % per_epoch * args.batch:][:args.batch]
    loss = nn.functional.cross_entropy(model(batch_of(train[0], chosen)), torch.from_numpy(train[1][chosen].astype(np.int64)))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
seconds = time.time() - begun

model.eval()
test = read("t10k-images-idx3-ubyte", 16).reshape(-1, 784), read("t10k-labels-idx1-ubyte", 8)
with torch.no_grad():
    places = np.split(np.arange(len(test[0])), 50)
    right = sum(int((model(batch_of(test[0], p)).argmax(1).numpy() == test[1][p]).sum()) for p in places)
print(json.dumps({"accuracy": right / len(test[0]), "seconds": seconds, "import_bytes": imports}))
