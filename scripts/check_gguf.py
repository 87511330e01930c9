"""Do GGUF files that fourfold writes compute the same in llama.cpp?

    pip install torch transformers tokenizers safetensors numpy
    python scripts/check_gguf.py FOURFOLD LLAMA_BIN [--model MODEL --text FILE] [--architectures]

LLAMA_BIN is a folder with llama.cpp's `llama-perplexity` and `llama-tokenize`.

With --architectures: a small random model of each architecture is written, exported as f32, and the log-probabilities that
llama-perplexity writes (--kl-divergence-base) are compared with those of transformers on the same tokens. Exits with 1 where they
differ by more than 0.02 nats (llama.cpp rounds keys and values to f16), of mixtures of experts for more than 2 % of tokens.

With --model: MODEL is exported as f16 (or taken as it is if it is a .gguf file); perplexity on FILE by both programs, and the
tokens that both make of 2,000 strings cut from FILE and of made-up ones (digits, spaces, marks, emoji, other scripts) are compared.
Exits with 1 where perplexities differ by more than 0.2 % (1 % with blocks of integers, for which llama.cpp rounds activations too)
or any string has other tokens.
"""

import argparse
import json
import pathlib
import random
import re
import struct
import subprocess
import sys
import tempfile
import unicodedata

import numpy as np


def run(*words):
    done = subprocess.run([str(w) for w in words], capture_output=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stdout.decode(errors='replace')[-2000:]}{done.stderr.decode(errors='replace')[-4000:]}")
    return done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")


def saved(path):
    """Tokens and log-probabilities of a --kl-divergence-base file: [chunks, n_ctx], [chunks, n_ctx - 1 - n_ctx / 2, n_vocab]."""
    data = path.read_bytes()
    assert data[:8] == b"_logits_", data[:8]
    n_ctx, n_vocab, n_chunk = struct.unpack("<Iii", data[8:20])
    tokens = np.frombuffer(data, "<i4", n_ctx * n_chunk, 20).reshape(n_chunk, n_ctx)
    rows = n_ctx - 1 - n_ctx // 2
    width = 2 * ((n_vocab + 1) // 2) + 4
    raw = np.frombuffer(data, "<u2", n_chunk * rows * width, 20 + 4 * n_ctx * n_chunk).reshape(n_chunk, rows, width)
    head = np.ascontiguousarray(raw[:, :, :4]).view("<f4")
    return tokens, head[:, :, :1] * raw[:, :, 4 : 4 + n_vocab] + head[:, :, 1:2]


def tiny(architecture):
    from transformers import AutoConfig

    common = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                  max_position_embeddings=256, initializer_range=0.1, bos_token_id=0, eos_token_id=0)
    grouped = dict(common, num_key_value_heads=2)
    latent = dict(common, num_key_value_heads=4, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32,
                  v_head_dim=32, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3,
                  moe_intermediate_size=64, first_k_dense_replace=1, rms_norm_eps=1e-6)
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=32, beta_slow=1)
    models = {
        "llama": ("llama", grouped | dict(tie_word_embeddings=True)),
        "llama, llama3 scaling": ("llama", grouped | dict(rope_scaling=dict(rope_type="llama3", factor=8.0,
            low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32))),
        "llama, linear scaling, biases": ("llama", grouped | dict(attention_bias=True, mlp_bias=True,
            rope_scaling=dict(rope_type="linear", factor=2.0))),
        "llama, yarn": ("llama", grouped | dict(rope_scaling=yarn)),
        "qwen2": ("qwen2", grouped),
        "qwen3": ("qwen3", grouped | dict(head_dim=64)),
        "deepseek_v3": ("deepseek_v3", latent | dict(q_lora_rank=48, n_group=4, topk_group=2, routed_scaling_factor=2.5,
            norm_topk_prob=True)),
        "deepseek_v3, yarn": ("deepseek_v3", latent | dict(q_lora_rank=48, n_group=1, topk_group=1, norm_topk_prob=True,
            routed_scaling_factor=1.0, rope_scaling=yarn | dict(mscale=1.0, mscale_all_dim=1.0))),
        "deepseek_v2, no query rank": ("deepseek_v2", latent | dict(q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1,
            norm_topk_prob=False, routed_scaling_factor=1.5)),
    }
    kind, settings = models[architecture]
    return AutoConfig.for_model(kind, **settings)


ARCHITECTURES = ["llama", "llama, llama3 scaling", "llama, linear scaling, biases", "llama, yarn", "qwen2", "qwen3",
                 "deepseek_v2, no query rank", "deepseek_v3", "deepseek_v3, yarn"]


def architectures(args, work):
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    from byte_bpe import train_tokenizer

    text = pathlib.Path(__file__).read_text() * 3
    (work / "text.txt").write_text(text)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer([text], 512, "<end>"), eos_token="<end>")
    good = True
    print("| architecture | largest difference of a token's log-probabilities, median | tokens above 0.02 | mean KLD |\n|---|---|---|---|")
    for name in ARCHITECTURES:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny(name), dtype=torch.float32)
        with torch.no_grad():
            for parameter, tensor in model.named_parameters():
                if parameter.endswith("bias") or "norm" in parameter:
                    tensor.add_(0.1 * torch.randn_like(tensor))
            for buffer, tensor in model.named_buffers():
                if buffer.endswith("e_score_correction_bias"):
                    tensor.add_(0.1 * torch.randn_like(tensor))
        place = work / name.replace(", ", "_").replace(" ", "_")
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        run(args.fourfold, "export", place, work / "m.gguf", "--type", "f32", "--overwrite", "--quiet")
        run(args.llama / "llama-perplexity", "-m", work / "m.gguf", "-f", work / "text.txt", "-c", 128, "--chunks", 4,
            "-t", 2, "-fa", "off", "--kl-divergence-base", work / "base.bin")
        tokens, found = saved(work / "base.bin")
        with torch.no_grad():
            logits = model(torch.tensor(tokens.astype(np.int64))).logits
        wanted = torch.log_softmax(logits.double(), -1)[:, tokens.shape[1] // 2 : -1].numpy()
        # What lies 16 nats below the most likely token is cut off in the file.
        near = wanted > wanted.max(-1, keepdims=True) - 15
        of_rows = np.where(near, np.abs(found - wanted), 0).max(-1)
        kld = (np.exp(wanted) * (wanted - found)).sum(-1).mean()
        # A router whose scores are nearly equal may choose another expert: few tokens, and not by little.
        far = (of_rows > 0.02).mean()
        same = bool(np.median(of_rows) < 0.01 and far <= (0.02 if "deepseek" in name else 0))
        good &= same
        print(f"| {name} | {np.median(of_rows):.1e} | {100 * far:.1f} % | {kld:.1e} |{'' if same else ' DIFFERS'}", flush=True)
    return good


def strings(text):
    """2,000 of them."""
    chance = random.Random(0)
    made = ["", " ", "  ", "\n", "\n\n \t", "a", " a", "'s", "don't", "I'LL", "1", "12", "123", "1234", "12345678901", "3.14", "x=1;",
            "...", "!?", "<|", "e\u0301", "\u00e9", "日本語", "你好，世界", "Привет мир", "שלום", "مرحبا", "हिन्दी", "ไทย", "🚀", "👩‍👩‍👧", "\u200b", "\u00a0x", "－１２", "½²", "ǅ", "\r\n", "a\u2028b"]
    pieces = made + ["".join(chance.choice(made) for _ in range(chance.randrange(2, 8))) for _ in range(700)]
    while len(pieces) < 2000:
        start = chance.randrange(len(text))
        pieces.append(text[start : start + chance.randrange(1, 200)])
    # A C program's argument has no zero in it.
    return [p.replace("\0", "") for p in pieces][:2000]


def model(args, work):
    good = True
    gguf = pathlib.Path(args.model)
    if gguf.suffix != ".gguf":
        gguf = work / "model.gguf"
        print(run(args.fourfold, "export", args.model, gguf, "--type", "f16", "--overwrite"))
    ours = json.loads(run(args.fourfold, "eval", gguf, "--text", args.text, "--chunks", args.chunks, "--activations", "f32",
                          "--kv-dtype", "f16", "--json", "--quiet"))
    perplexity = ours["perplexity"] if isinstance(ours["perplexity"], float) else ours["perplexity"]["perplexity"]
    said = run(args.llama / "llama-perplexity", "-m", gguf, "-f", args.text, "--chunks", args.chunks, "-t", 2)
    theirs = float(re.search(r"Final estimate: PPL = ([0-9.]+)", said)[1])
    good &= abs(theirs / perplexity - 1) < (2e-3 if gguf.name == "model.gguf" else 1e-2)
    print(f"perplexity of {gguf.name}, {args.chunks} chunks: fourfold {perplexity:.4f}, llama.cpp {theirs:.4f}, quotient {theirs / perplexity:.5f}")

    from tokenizers import Tokenizer

    directory = work / "tokens"
    run(args.fourfold, "export", gguf, directory, "--format", "safetensors", "--overwrite", "--quiet")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    # One run for all strings: a control token between them, at which both programs cut a text.
    between = json.loads((directory / "tokenizer_config.json").read_text())["eos_token"]
    cut = tokenizer.token_to_id(between)
    pieces = [p for p in strings(pathlib.Path(args.text).read_text(errors="ignore")) if between not in p]
    (work / "pieces.txt").write_bytes(between.join(pieces).encode())
    said = run(args.llama / "llama-tokenize", "-m", gguf, "-f", work / "pieces.txt", "--ids", "--no-bos", "--no-escape")
    theirs = [[]]
    for token in json.loads(re.search(r"^\[[0-9, ]*\]", said, re.MULTILINE)[0]):
        if token == cut:
            theirs.append([])
        else:
            theirs[-1].append(token)
    mine = [tokenizer.encode(piece, add_special_tokens=False).ids for piece in pieces]
    if len(theirs) != len(mine):
        print(f"{len(mine)} strings became {len(theirs)} in llama.cpp")
        return False
    different = [i for i in range(len(mine)) if mine[i] != theirs[i]]
    # llama.cpp does not normalise texts, which `export` says.
    normal = json.loads((directory / "tokenizer.json").read_text())["normalizer"]
    if normal and normal["type"] == "NFC":
        apart = [i for i in different if unicodedata.normalize("NFC", pieces[i]) != pieces[i]]
        print(f"{len(apart)} strings that are not in NFC have other tokens")
        different = [i for i in different if i not in apart]
    for i in different[:5]:
        print(f"string {i}, {pieces[i]!r}: fourfold {mine[i]}, llama.cpp {theirs[i]}")
    wrong = len(different)
    print(f"{wrong} of {len(pieces)} strings have other tokens")
    return good and wrong == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fourfold", type=pathlib.Path)
    parser.add_argument("llama", type=pathlib.Path)
    parser.add_argument("--architectures", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--text")
    parser.add_argument("--chunks", type=int, default=8)
    args = parser.parse_args()
    args.fourfold, args.llama = args.fourfold.resolve(), args.llama.resolve()
    good = True
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        if args.architectures:
            good &= architectures(args, work)
        if args.model:
            good &= model(args, work)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
