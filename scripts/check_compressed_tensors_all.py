"""Does everything that `fourfold compress` writes load in transformers as it should, for every architecture and kind of size?

    pip install torch transformers compressed-tensors
    cargo build --release -p fourfold
    python scripts/check_compressed_tensors_all.py target/release/fourfold

Makes small models of random weights with transformers, compresses each with `--format compressed-tensors` in every way there is
to ask for a size, and loads what comes out with `from_pretrained(OUT)`. That must give the logits of the same file decompressed
module by module ("by module" of check_compressed_tensors.py), experts rounded as transformers rounds them; fourfold's own logits must be
those of the file decompressed in f32. The negative controls:
fourfold's own packing, and experts that are stored differently, must be refused. Exits with 1 if anything is not so.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import check_compressed_tensors as check
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SIZES = dict(vocab_size=512, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=256)
MIXTURE = dict(
    intermediate_size=256, moe_intermediate_size=64, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
    first_k_dense_replace=1, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32,
    num_key_value_heads=4, n_group=2, topk_group=1, **SIZES,
)
DENSE = dict(intermediate_size=256, num_key_value_heads=2, **SIZES)

MODELS = {
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**MIXTURE),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(topk_method="group_limited_greedy", **MIXTURE),
    "llama": lambda: transformers.LlamaConfig(**DENSE),
    "qwen2": lambda: transformers.Qwen2Config(tie_word_embeddings=True, **DENSE),
    "qwen3": lambda: transformers.Qwen3Config(head_dim=32, **DENSE),
}

UNIFORM = [f"--bits {bits} --group-size 32" for bits in range(2, 9)]
UNIFORM += ["--bits 4 --group-size 128", "--bits 4 --group-size channel", "--bits 4 --group-size 32 TEXT"]
PLANNED = ["--bits 6.5", "--bits 7.5", "--ratio 2", "--ratio 2.5", "--ratio 2.2 --uniform", "--ratio 2 TEXT"]
PLANNED += ["--ratio 2.5 TEXT --no-gate", "--ratio 2.2 --uniform TEXT", "--ratio 2.2 --fusible TEXT", "--bits 7.0 TEXT"]


def make(name, folder):
    """A small model of random weights, large enough that its logits tell formats apart, and a tokenizer of bytes."""
    torch.manual_seed(0)
    config = MODELS[name]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.normal_(0, weight.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.strip().splitlines()[-1:] or [""]


def divergence(ours, theirs):
    """The divergence that nine of ten tokens stay below: the last bits of f32 may send a token to another expert."""
    p, q = (x.double().log_softmax(-1) for x in (theirs, ours))
    return (p.exp() * (p - q)).sum(-1).flatten().quantile(0.9).item()


def round_experts(plain, by_module):
    """Experts of both models as transformers decodes them, computed in f32.

    transformers decodes experts in their scales' type (f16) and computes them in it, also in a model of f32. That rounding is about
    3e-3 of the logits, and sends a token to another expert now and then: every token after it differs too. So both models get the
    rounded weights, and neither computes in f16.
    """
    exact = dict(by_module.named_parameters())
    for name, weight in plain.named_parameters():
        if weight.dtype in (torch.float16, torch.bfloat16):
            exact[name].data = exact[name].data.to(weight.dtype).float()
            weight.data = weight.data.float()


def formats(out):
    groups = json.loads((out / "config.json").read_text()).get("quantization_config", {}).get("config_groups", {})
    return " ".join(f"{g['weights']['num_bits']}b/{g['weights']['group_size'] or 'row'}" for g in groups.values())


def check_one(fourfold, model, out, words, text):
    """The line of one compression, and whether it is as it should be."""
    options = " ".join(words.split()).replace("TEXT", f"--calibration {text} --calibration-length 64").split()
    code, error = run(fourfold, "compress", model, out, "--format", "compressed-tensors", "--overwrite", "-q", *options)
    if code:
        return f"not compressed: {error[0][:150]}", False
    logits = out / "logits.safetensors"
    code, error = run(fourfold, "eval", out, "-f", text, "-c", 64, "--chunks", 2, "--dump-logits", logits, "--activations", "f32", "-q")
    if code:
        return f"not read back: {error[0][:150]}", False
    ours = load_file(logits)
    logits.unlink()
    ids = ours["input_ids"].long()
    try:
        plain = check.plain(out)
    except Exception as error:  # any failure to load is the finding
        return f"from_pretrained: {type(error).__name__}: {str(error).splitlines()[0][:120]}", False
    by_module = check.by_module(out)
    exact = check.logits_of(by_module, ids)
    b = divergence(ours["logits"].float().view_as(exact), exact)
    round_experts(plain, by_module)
    a = divergence(check.logits_of(plain, ids), check.logits_of(by_module, ids))
    return f"KLD {a:.1e} to by module, ours {b:.1e}   {formats(out)}", a < 1e-6 and b < 1e-6


def refused(path):
    try:
        check.plain(path)
    except ValueError as error:
        return str(error).splitlines()[0]
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def main():
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("fourfold", type=pathlib.Path)
    args.add_argument("--model", choices=MODELS, action="append", help="only these")
    args = args.parse_args()
    check.warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    text, bad = pathlib.Path(__file__).resolve(), 0
    for name in args.model or MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            scratch = pathlib.Path(scratch)
            make(name, scratch / "model")
            for words in UNIFORM + PLANNED:
                line, good = check_one(args.fourfold, scratch / "model", scratch / "out", words, text)
                bad += not good
                print(f"{'ok ' if good else 'BAD'} {name:12} {words:32} {line}", flush=True)
            own = scratch / "own"
            for shard in ("5GB", "100kB"):
                code, error = run(args.fourfold, "compress", scratch / "model", own, "--ratio", 3, "-q", "--overwrite",
                                  "--max-shard-size", shard)
                why = f"not compressed: {error}" if code else refused(own)
                good = why is not None and "fourfold" in why and not code
                bad += not good
                print(f"{'ok ' if good else 'BAD'} {name:12} own packing, shards of {shard}: {why or 'LOADS'}", flush=True)
    print(f"{bad} not as they should be")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
