"""The peer of `fourfold train`: the same model on the same number of tokens in PyTorch.

    python scripts/peer_train.py CONFIG.json TOKENIZER.json TEXT OUT --precision f32|bf16 --steps N [--batch 8 --context 256]

f32: AdamW (fused). bf16: autocast, AdamW (fused), scaled-dot-product attention. Prints one JSON object: seconds of the steps alone, the
first and last losses, and the memory that the imports took (in bytes), which the caller subtracts or not.
"""

import argparse
import json
import resource
import time

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

parser = argparse.ArgumentParser()
for name in ("config", "tokenizer", "text", "out"):
    parser.add_argument(name)
parser.add_argument("--precision", choices=["f32", "bf16"], required=True)
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--context", type=int, default=256)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--lr", type=float, default=1e-3)
args = parser.parse_args()
torch.set_num_threads(args.threads)
torch.manual_seed(0)

config = AutoConfig.from_pretrained(args.config)
model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
model.train()
ids = torch.tensor(Tokenizer.from_file(args.tokenizer).encode(open(args.text, encoding="utf8").read()).ids)
size = args.batch * args.context
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
losses, begun = [], time.time()
for step in range(args.steps):
    first = step * size % (len(ids) - size)
    batch = ids[first : first + size].view(args.batch, args.context)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.precision == "bf16"):
        loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses.append(loss.item())
seconds = time.time() - begun
save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}, args.out)
print(json.dumps({"seconds": seconds, "first_loss": losses[0], "last_loss": losses[-1], "import_bytes": imports}))
