"""The embedded model's twin in PyTorch: the same architecture, trained on the Rust sources in cargo's registry.

    pip install torch safetensors tokenizers numpy
    python scripts/train_embedded.py OUT_DIR [--minutes 60] [--threads 1]

The weights in the binary come from `fourfold train` (scripts/embedded_model.sh). This script made their tokenizer and
their configuration, and trains the same model independently, to compare with. OUT_DIR is a Hugging Face directory.

About 2.7 M parameters: multi-head latent attention, one dense layer, then mixture-of-experts layers with sigmoid
routing, a correction bias that balances the load without a loss term (DeepSeek-V3 report, section 2.1.2) and a shared
expert. Only crates under MIT or Apache-2.0 are read; the crates in HELD_OUT are never trained on. Matrices are updated
by Muon (orthogonalised momentum), the rest by AdamW. The learning rate follows the clock: a cosine to zero at
`--minutes`, because the machine is shared. A checkpoint of averaged weights is written every few minutes.
"""

import argparse
import json
import math
import os
import pathlib
import re
import time
import tomllib

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from byte_bpe import train_tokenizer

CONFIG = dict(
    architectures=["DeepseekV3ForCausalLM"],
    model_type="deepseek_v3",
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=384,
    moe_intermediate_size=64,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    moe_layer_freq=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=None,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=32,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
    num_nextn_predict_layers=0,
    hidden_act="silu",
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=None,
    rope_interleave=True,
    attention_bias=False,
    attention_dropout=0.0,
    max_position_embeddings=256,
    initializer_range=0.02,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
    use_cache=True,
    torch_dtype="bfloat16",
    transformers_version="4.48.0",
)
CONTEXT = CONFIG["max_position_embeddings"]
HELD_OUT = {"anyhow", "crossbeam-deque", "fastrand", "half", "memmap2", "slab", "tempfile", "toml"}
BINDINGS = re.compile(r"windows|winapi|^libc$|^linux-raw-sys|^js-sys|^wasi|^wit-|^r-efi|_data$|^redox|^libredox|nano-gemm|unicode|^icu_|^ring$|webpki-roots|^gemm-c")
END = "<|endoftext|>"


def permissive(license):
    return any(part.strip(" ()") in ("MIT", "Apache-2.0") for part in re.split(r" OR |/", license))


def crates(registry):
    """(name, directory) of the newest permissively licensed version of each crate."""
    newest = {}
    for manifest in sorted(registry.glob("*/*/Cargo.toml")):
        package = tomllib.loads(manifest.read_text(errors="replace")).get("package", {})
        name, version, license = (package.get(k, "") for k in ("name", "version", "license"))
        if not name or not isinstance(license, str) or not permissive(license) or BINDINGS.search(name):
            continue
        key = [int(x) for x in re.findall(r"\d+", version)]
        if name not in newest or newest[name][0] < key:
            newest[name] = (key, manifest.parent)
    return sorted((name, at) for name, (_, at) in newest.items())


def sources(directory):
    """Rust files that people wrote: no tables, no long lines, nothing huge."""
    for path in sorted(directory.rglob("*.rs")):
        if path.stat().st_size > 150_000:
            continue
        text = path.read_text(errors="replace").replace("\r\n", "\n")
        lines = text.splitlines()
        if len(text) < 200 or "\ufffd" in text or max(map(len, lines)) > 400 or not text.isascii() and len(text.encode()) > 1.1 * len(text):
            continue
        if sum(c.isdigit() for c in text) > 0.12 * len(text) or "@generated" in text[:500]:
            continue
        yield text


def collect(registry):
    train, held, seen = [], [], set()
    for name, directory in crates(registry):
        for text in sources(directory):
            if hash(text) not in seen:
                seen.add(hash(text))
                (held if name in HELD_OUT else train).append(text)
    return train, held


def encode(tokenizer, texts):
    ids = []
    for at in range(0, len(texts), 256):
        for e in tokenizer.encode_batch(texts[at : at + 256]):
            ids.append(np.array([0] + e.ids, dtype=np.uint16))
    return np.concatenate(ids)


# The model. Parameters are kept under their Hugging Face names; experts of a layer lie together as
# [experts, 2 * intermediate, hidden] (gate, then up) and [experts, hidden, intermediate] and are split when saved.


def init(generator):
    c = CONFIG
    h, heads, lora, nope, rope, v = (
        c[k] for k in ("hidden_size", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    p = {}

    def matrix(name, *shape, scale=1.0):
        p[name] = torch.randn(shape, generator=generator) * scale * shape[-1] ** -0.5

    def norm(name, size):
        p[name] = torch.ones(size)

    depth = (2 * c["num_hidden_layers"]) ** -0.5
    p["model.embed_tokens.weight"] = torch.randn(c["vocab_size"], h, generator=generator) * 0.04
    for i in range(c["num_hidden_layers"]):
        at, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        norm(f"model.layers.{i}.input_layernorm.weight", h)
        matrix(at + "q_proj.weight", heads * (nope + rope), h)
        matrix(at + "kv_a_proj_with_mqa.weight", lora + rope, h)
        norm(at + "kv_a_layernorm.weight", lora)
        matrix(at + "kv_b_proj.weight", heads * (nope + v), lora)
        matrix(at + "o_proj.weight", h, heads * v, scale=depth)
        norm(f"model.layers.{i}.post_attention_layernorm.weight", h)
        if i < c["first_k_dense_replace"]:
            inner, name = c["intermediate_size"], mlp
        else:
            inner, name = c["moe_intermediate_size"], mlp + "shared_experts."
            experts, size = c["n_routed_experts"], c["moe_intermediate_size"]
            matrix(mlp + "gate.weight", experts, h)
            p[mlp + "gate.e_score_correction_bias"] = torch.zeros(experts)
            matrix(mlp + "experts.gate_up", experts, 2 * size, h)
            matrix(mlp + "experts.down", experts, h, size, scale=depth)
            inner *= c["n_shared_experts"]
        matrix(name + "gate_proj.weight", inner, h)
        matrix(name + "up_proj.weight", inner, h)
        matrix(name + "down_proj.weight", h, inner, scale=depth)
    norm("model.norm.weight", h)
    return p


def rope_tables():
    half = CONFIG["qk_rope_head_dim"] // 2
    inverse = CONFIG["rope_theta"] ** (-torch.arange(half) / half)
    angle = torch.outer(torch.arange(CONTEXT), inverse)
    return angle.cos(), angle.sin()


COS, SIN = rope_tables()
CAUSAL = torch.full((CONTEXT, CONTEXT), float("-inf")).triu(1)


def rotate(x):
    """Interleaved pairs (x0, x1), (x2, x3), ...; the order afterwards is the same for queries and keys."""
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = COS[: x.shape[-2]], SIN[: x.shape[-2]]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def linear(x, w):
    return F.linear(x, w.bfloat16())


def rms(x, w):
    """Of f32, for a bf16 matrix product: the residual stream is f32, what branches off it is bf16."""
    return F.rms_norm(x.float(), w.shape, w, CONFIG["rms_norm_eps"]).bfloat16()


def attention(p, at, x):
    c = CONFIG
    batch, t, _ = x.shape
    heads, nope, rope, v = (c[k] for k in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    q = linear(x, p[at + "q_proj.weight"]).view(batch, t, heads, -1).transpose(1, 2)
    latent, k_rope = linear(x, p[at + "kv_a_proj_with_mqa.weight"]).split([c["kv_lora_rank"], rope], -1)
    kv = linear(rms(latent, p[at + "kv_a_layernorm.weight"]), p[at + "kv_b_proj.weight"])
    k_nope, value = kv.view(batch, t, heads, nope + v).transpose(1, 2).split([nope, v], -1)
    k_rope = rotate(k_rope).unsqueeze(1).expand(-1, heads, -1, -1)
    q = torch.cat([q[..., :nope], rotate(q[..., nope:])], -1)
    k = torch.cat([k_nope, k_rope], -1)
    scores = (q @ k.transpose(-1, -2)).float() * (nope + rope) ** -0.5 + CAUSAL[:t, :t]
    y = scores.softmax(-1).bfloat16() @ value
    return linear(y.transpose(1, 2).reshape(batch, t, -1), p[at + "o_proj.weight"])


def mlp(p, at, x):
    return linear(F.silu(linear(x, p[at + "gate_proj.weight"])) * linear(x, p[at + "up_proj.weight"]), p[at + "down_proj.weight"])


def experts(p, at, x, loads):
    top = CONFIG["num_experts_per_tok"]
    flat = x.reshape(-1, x.shape[-1])
    scores = F.linear(flat.float(), p[at + "gate.weight"]).sigmoid()
    chosen = (scores.detach() + p[at + "gate.e_score_correction_bias"]).topk(top, -1).indices
    weight = scores.gather(1, chosen)
    weight = weight / (weight.sum(-1, keepdim=True) + 1e-20) * CONFIG["routed_scaling_factor"]
    count = torch.bincount(chosen.flatten(), minlength=scores.shape[1])
    loads[at] = count
    order = chosen.flatten().argsort(stable=True)
    parts = flat[order // top].split(count.tolist())
    up, down = p[at + "experts.gate_up"].bfloat16(), p[at + "experts.down"].bfloat16()
    done = []
    for e, part in enumerate(parts):
        g, u = F.linear(part, up[e]).chunk(2, -1)
        done.append(F.linear(F.silu(g) * u, down[e]))
    y = torch.cat(done).float() * weight.flatten()[order, None]
    y = torch.zeros(flat.shape).index_add(0, order // top, y)
    return y.view_as(x) + mlp(p, at + "shared_experts.", x)


def forward(p, ids, loads):
    x = F.embedding(ids, p["model.embed_tokens.weight"])
    for i in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{i}."
        x = x + attention(p, at + "self_attn.", rms(x, p[at + "input_layernorm.weight"]))
        y = rms(x, p[at + "post_attention_layernorm.weight"])
        dense = i < CONFIG["first_k_dense_replace"]
        x = x + (mlp(p, at + "mlp.", y) if dense else experts(p, at + "mlp.", y, loads))
    return linear(rms(x, p["model.norm.weight"]), p["model.embed_tokens.weight"]).float()


def loss_of(p, tokens, loads):
    logits = forward(p, tokens[:, :-1], loads)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Optimizer:
    """Muon (Jordan et al. 2024) for matrices, AdamW for the embedding, the router and the norms."""

    def __init__(self, p):
        self.p = p
        self.matrices, self.others = {}, []
        for name, w in p.items():
            if name.endswith("correction_bias"):
                continue
            w.requires_grad_()
            if w.ndim == 1 or "embed" in name or name.endswith("gate.weight"):
                self.others.append(name)
            elif name.endswith("experts.gate_up"):  # gate and up are two matrices
                self.matrices.setdefault((w.shape[1] // 2, w.shape[2]), []).append(name)
            else:
                self.matrices.setdefault(tuple(w.shape[-2:]), []).append(name)
        routers = [p[n] for n in self.others if n.endswith("gate.weight")]
        rest = [p[n] for n in self.others if not n.endswith("gate.weight")]
        groups = [dict(params=rest, scale=1.0), dict(params=routers, scale=0.1)]  # a fast router picks favourites
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
        self.momentum = {n: torch.zeros_like(p[n]) for names in self.matrices.values() for n in names}

    @staticmethod
    def orthogonal(g):
        """Newton-Schulz: the nearest semi-orthogonal matrix, roughly, in five steps."""
        x = g.bfloat16()
        if tall := x.shape[-2] > x.shape[-1]:
            x = x.transpose(-1, -2)
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            s = x @ x.transpose(-1, -2)
            x = 3.4445 * x + (-4.7750 * s + 2.0315 * (s @ s)) @ x
        return (x.transpose(-1, -2) if tall else x).float()

    @torch.no_grad()
    def step(self, rate, adam_rate):
        for group in self.adam.param_groups:
            group["lr"] = adam_rate * group["scale"]
        self.adam.step()
        for shape, names in self.matrices.items():
            updates = []
            for n in names:
                g, m = self.p[n].grad, self.momentum[n]
                m.lerp_(g, 0.05)
                updates.append(torch.lerp(g, m, 0.95).reshape(-1, *shape))
            update = self.orthogonal(torch.cat(updates)) * max(1, shape[0] / shape[1]) ** 0.5
            for n, u in zip(names, update.split([len(u) for u in updates])):
                w = self.p[n]
                w.mul_(1 - rate * 0.05).sub_(u.reshape(w.shape), alpha=rate)
        for w in self.p.values():
            w.grad = None


def published(p):
    """Hugging Face names, bf16 (the correction bias stays f32, as DeepSeek keeps it)."""
    out = {}
    for name, w in p.items():
        w = w.detach()
        if name.endswith("experts.gate_up"):
            for e, both in enumerate(w):
                gate, up = both.chunk(2)
                out[name.replace("gate_up", f"{e}.gate_proj.weight")] = gate
                out[name.replace("gate_up", f"{e}.up_proj.weight")] = up
        elif name.endswith("experts.down"):
            for e, down in enumerate(w):
                out[name.replace("down", f"{e}.down_proj.weight")] = down
        else:
            out[name] = w
    return {n: (w if n.endswith("correction_bias") else w.bfloat16()).contiguous() for n, w in sorted(out.items())}


def from_published(at):
    """The parameters of a directory that `save` wrote, to go on from there."""
    stored, p = load_file(at / "model.safetensors"), init(torch.Generator().manual_seed(0))
    for name, w in p.items():
        for e in range(w.shape[0] if ".experts." in name else 0):
            if name.endswith("gate_up"):
                w[e] = torch.cat([stored[name.replace("gate_up", f"{e}.{part}_proj.weight")] for part in ("gate", "up")])
            else:
                w[e] = stored[name.replace("down", f"{e}.down_proj.weight")]
        if name in stored:
            p[name] = stored[name].float()
    return p


def save(p, out, note):
    save_file(published(p), out / "model.safetensors.part", metadata={"format": "pt"})
    os.replace(out / "model.safetensors.part", out / "model.safetensors")
    (out.parent / (out.name + ".note.json")).write_text(json.dumps(note, indent=1) + "\n")


def write_static(tokenizer, out):
    def write(name, content):
        (out / name).write_text(json.dumps(content, indent=1) + "\n")

    (out / "tokenizer.json").write_text(tokenizer.to_str(pretty=False) + "\n")
    write("config.json", CONFIG)
    write("generation_config.json", dict(bos_token_id=0, eos_token_id=0, do_sample=True, temperature=0.7, top_p=0.95))
    write(
        "tokenizer_config.json",
        dict(
            tokenizer_class="PreTrainedTokenizerFast",
            bos_token=END,
            eos_token=END,
            model_max_length=CONTEXT,
            add_bos_token=True,
            clean_up_tokenization_spaces=False,
        ),
    )


@torch.no_grad()
def held_out_loss(p, ids, windows):
    rounded = {n: w if n.endswith("correction_bias") else w.bfloat16().float() for n, w in p.items()}
    starts = np.linspace(0, len(ids) - CONTEXT - 1, windows).astype(int)
    total = 0.0
    for at in range(0, windows, 8):
        tokens = np.stack([ids[s : s + CONTEXT + 1] for s in starts[at : at + 8]]).astype(np.int64)
        total += loss_of(rounded, torch.from_numpy(tokens), {}).item() * len(tokens)
    return total / windows


def main():
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("out", type=pathlib.Path)
    args.add_argument("--minutes", type=float, default=60)
    args.add_argument("--threads", type=int, default=1)
    args.add_argument("--batch", type=int, default=4)
    args.add_argument("--rate", type=float, default=0.02)
    args.add_argument("--adam-rate", type=float, default=0.006)
    args.add_argument("--go-on", type=pathlib.Path, help="start from the weights in this directory")
    args.add_argument("--registry", type=pathlib.Path, default=pathlib.Path.home() / ".cargo/registry/src")
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    cache = args.out.parent / (args.out.name + ".tokens.npz")
    if cache.exists():
        tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
        ids, held = (np.load(cache)[k] for k in ("train", "held"))
    else:
        texts, held_texts = collect(args.registry)
        tokenizer = train_tokenizer(texts[::3], CONFIG["vocab_size"], END)
        ids, held = encode(tokenizer, texts), encode(tokenizer, held_texts)
        write_static(tokenizer, args.out)
        size = [sum(len(t.encode()) for t in part) for part in (texts, held_texts)]
        print(f"{len(texts)} files, {size[0]} bytes, {len(ids)} tokens; held out {len(held_texts)} files, {size[1]} bytes, {len(held)} tokens", flush=True)
        np.savez(cache, train=ids, held=held, bytes=np.array(size))
    bytes_a_token = np.load(cache)["bytes"][1] / len(held)

    p = from_published(args.go_on) if args.go_on else init(torch.Generator().manual_seed(0))
    count = sum(w.numel() for w in p.values())
    print(f"{count} parameters", flush=True)
    optimizer = Optimizer(p)
    average = {n: w.detach().clone() for n, w in p.items()}
    rng = np.random.default_rng(1 if args.go_on else 0)
    start, saved, step, seen, recent = time.time(), time.time(), 0, 0, []
    while True:
        done = (time.time() - start) / (60 * args.minutes)
        if done >= 1:
            break
        factor = min(1, (step + 1) / 60) * 0.5 * (1 + math.cos(math.pi * done))
        at = rng.integers(0, len(ids) - CONTEXT - 1, args.batch)
        tokens = torch.from_numpy(np.stack([ids[a : a + CONTEXT + 1] for a in at]).astype(np.int64))
        loads = {}
        loss = loss_of(p, tokens, loads)
        if not torch.isfinite(loss):
            raise SystemExit(f"loss is {loss.item()} at step {step}")
        loss.backward()
        optimizer.step(args.rate * factor, args.adam_rate * factor)
        with torch.no_grad():
            for name, load in loads.items():  # a busy expert becomes less attractive
                load = load.float()
                p[name + "gate.e_score_correction_bias"] += 0.01 * max(factor, 0.5 * (done < 0.5)) * torch.sign(load.mean() - load)
            keep = min(0.99, 1 - 10 / (step + 10))
            for n, w in p.items():
                average[n].lerp_(w.detach(), 1 - keep)
        step += 1
        seen += tokens[:, 1:].numel()
        recent.append(loss.item())
        if step % 50 == 0:
            spread = {n: round((l.max() / l.float().mean()).item(), 2) for n, l in loads.items()}
            print(f"{time.time() - start:6.0f} s  step {step}  {seen} tokens  loss {np.mean(recent):.4f}  max/mean load {list(spread.values())}", flush=True)
            recent.clear()
        if time.time() - saved > 240:
            report(average, held, bytes_a_token, args, step, seen, start, windows=128)
            saved = time.time()
    with torch.no_grad():
        best = min((p, average), key=lambda q: held_out_loss(q, held, 256))
    report(best, held, bytes_a_token, args, step, seen, start, windows=1024)


def report(p, held, bytes_a_token, args, step, seen, start, windows):
    loss = held_out_loss(p, held, windows)
    note = dict(
        minutes=round((time.time() - start) / 60, 1),
        of_minutes=args.minutes,
        steps=step,
        tokens=seen,
        held_out_loss=round(loss, 4),
        held_out_perplexity=round(math.exp(loss), 3),
        held_out_bits_per_byte=round(loss / math.log(2) / bytes_a_token, 4),
        held_out_crates=sorted(HELD_OUT),
    )
    save(p, args.out, note)
    print(json.dumps(note), flush=True)


if __name__ == "__main__":
    main()
