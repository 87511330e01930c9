"""What PEFT makes of its own adapters: keys of LoraConfig, and logits of a small model under adapters of many settings.

    pip install torch transformers safetensors peft
    python scripts/golden_adapters.py

crates/fourfold-formats/tests/golden/peft_lora_config.json
    every key of a new LoraConfig, as `save_pretrained` writes it
crates/fourfold/tests/golden_adapters/base
    config.json, model.safetensors, tokenizer.json     a llama of two blocks, untied, F32
crates/fourfold/tests/golden_adapters/<case>
    adapter_config.json, adapter_model.safetensors     as `save_pretrained` writes them; A and B random
    logits.safetensors                                 logits [tokens, vocab] of TEXT
"""

import json
import shutil
from pathlib import Path

import torch
from golden import write_json
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent / "crates"
CASES = ROOT / "fourfold" / "tests" / "golden_adapters"
TEXT = "a merged adapter is it"

QV = ["q_proj", "v_proj"]
ADAPTERS = {
    "plain": dict(r=4, lora_alpha=8, target_modules=QV),
    "rslora": dict(r=4, lora_alpha=8, target_modules=QV, use_rslora=True),
    "patterns": dict(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 6, r"layers\.\d.mlp.*": 3},
        alpha_pattern={"self_attn.v_proj": 3, r"model\.layers\.0.*": 20},
    ),
    "patterns_rslora": dict(r=4, lora_alpha=8, target_modules=QV, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5}, use_rslora=True),
    "layers": dict(r=4, lora_alpha=8, target_modules=QV, layers_to_transform=[1]),
    "layers_pattern": dict(r=4, lora_alpha=8, target_modules=QV, layers_to_transform=0, layers_pattern="layers"),
    "regex": dict(r=4, lora_alpha=8, target_modules=r".*\.0\..*(q|gate)_proj"),
    "excluded": dict(r=4, lora_alpha=8, target_modules=QV, exclude_modules=["layers.0.self_attn.v_proj"]),
    "all_linear": dict(r=2, lora_alpha=2, target_modules="all-linear"),
    "head": dict(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"]),
    "modules_to_save": dict(r=4, lora_alpha=8, target_modules=QV, modules_to_save=["lm_head", "embed_tokens", "norm"]),
    "fan_in_fan_out": dict(r=4, lora_alpha=8, target_modules=QV, fan_in_fan_out=True),
    "gaussian": dict(r=4, lora_alpha=8, target_modules=QV, init_lora_weights="gaussian"),
    "orthogonal": dict(r=4, lora_alpha=8, target_modules=QV, init_lora_weights="orthogonal"),
}


def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def base(path):
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.3 + (1.0 if p.dim() == 1 else 0.0))
    model.save_pretrained(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    tokenizer().save(str(path / "tokenizer.json"))


def adapter(name, settings, ids):
    path = CASES / name
    model = get_peft_model(LlamaForCausalLM.from_pretrained(CASES / "base"), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for _, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    model.peft_config["default"].base_model_name_or_path = "base"
    model.save_pretrained(path)
    (path / "README.md").unlink(missing_ok=True)
    # Loaded again: what the files say counts.
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(CASES / "base"), path).eval()
    with torch.no_grad():
        logits = again(torch.tensor([ids])).logits[0]
    save_file(dict(logits=logits.contiguous()), path / "logits.safetensors")
    return logits


if __name__ == "__main__":
    torch.set_num_threads(1)
    config = LoraConfig(task_type="CAUSAL_LM").to_dict()
    config.pop("runtime_config", None)
    plain = json.loads(json.dumps(config, default=lambda value: getattr(value, "value", str(value))))
    write_json(ROOT / "fourfold-formats" / "tests" / "golden" / "peft_lora_config.json", plain)
    shutil.rmtree(CASES, ignore_errors=True)
    CASES.mkdir(parents=True)
    base(CASES / "base")
    ids = tokenizer().encode(TEXT).ids
    with torch.no_grad():
        plain = LlamaForCausalLM.from_pretrained(CASES / "base").eval()(torch.tensor([ids])).logits[0]
    for name, settings in ADAPTERS.items():
        print(f"{name}: moves the logits by {(adapter(name, settings, ids) - plain).abs().max():.3f}")
