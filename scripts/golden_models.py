"""Tiny random checkpoints and what Hugging Face transformers computes from them.

    pip install torch transformers safetensors
    python scripts/golden_models.py [OUT_DIR]

Each case becomes a directory in crates/fourfold-models/tests/golden:

    config.json          in the style in which such models are published
    config.alt.json      the same model in the other style: transformers 4 has `rope_theta` and `rope_scaling`,
                         transformers 5 has one `rope_parameters`. Both must be read as the same model.
    model.safetensors    f32, tensor names as on the hub (one tensor an expert)
    golden.safetensors   input_ids [24] i64, logits [24, vocab] f32: one causal forward, f32, eager attention
    grads.json           loss: mean next-token cross-entropy over the 23 predictions; for each tensor of the
                         checkpoint the gradient's Euclidean norm and its inner product with the weight

Norm weights, biases and the router's correction bias are random, so that dropping one shows.
"""

import pathlib
import shutil
import sys

import torch
import transformers
from golden import MODELS, next_token_loss, randomise, summary, write_gradients, write_json
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

TOKENS = 24
OUT = MODELS / "golden"

LLAMA3 = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16, rope_type="llama3"
)
DENSE = dict(vocab_size=64, hidden_size=48, intermediate_size=56, num_hidden_layers=2, num_attention_heads=6)
MLA = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=40,
    num_attention_heads=4,
    num_key_value_heads=4,
    kv_lora_rank=16,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    rms_norm_eps=1e-6,  # transformers gives the inner norms their default, whatever the config says
    attention_bias=False,
    max_position_embeddings=64,
)

# `style` is the style of config.json: 4 (rope_theta + rope_scaling) or 5 (rope_parameters).
CASES = {
    "llama_gqa_tied": dict(
        style=4,
        config=dict(
            DENSE,
            model_type="llama",
            architectures=["LlamaForCausalLM"],
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        ),
        rope_theta=10000.0,
    ),
    "llama_rope_llama3": dict(
        style=4,
        config=dict(
            DENSE,
            model_type="llama",
            architectures=["LlamaForCausalLM"],
            head_dim=12,  # not hidden / heads
            num_key_value_heads=3,
            rms_norm_eps=1e-5,
            max_position_embeddings=128,
            tie_word_embeddings=False,
        ),
        rope_theta=500000.0,
        rope_scaling=LLAMA3,
    ),
    "qwen2": dict(
        style=4,
        config=dict(
            DENSE,
            model_type="qwen2",
            architectures=["Qwen2ForCausalLM"],
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            use_sliding_window=False,
            sliding_window=64,
            max_window_layers=2,
        ),
        rope_theta=1000000.0,
    ),
    "qwen3": dict(
        style=5,
        config=dict(
            DENSE,
            model_type="qwen3",
            architectures=["Qwen3ForCausalLM"],
            head_dim=10,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            max_position_embeddings=64,
            attention_bias=False,
            tie_word_embeddings=True,
        ),
        rope_theta=1000000.0,
    ),
    "deepseek_v2_moe": dict(
        style=4,
        config=dict(
            MLA,
            model_type="deepseek_v2",
            architectures=["DeepseekV2ForCausalLM"],
            num_hidden_layers=3,
            q_lora_rank=None,
            first_k_dense_replace=1,
            moe_layer_freq=1,
            moe_intermediate_size=8,
            n_routed_experts=8,
            n_shared_experts=2,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            topk_method="group_limited_greedy",
            scoring_func="softmax",
            norm_topk_prob=False,
            routed_scaling_factor=1.5,
            tie_word_embeddings=False,
        ),
        rope_theta=10000.0,
        rope_scaling=dict(
            type="yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            beta_fast=32,
            beta_slow=1,
            mscale=0.707,
            mscale_all_dim=0.707,
        ),
    ),
    "deepseek_v2_dense_qlora": dict(
        style=5,
        config=dict(
            MLA,
            model_type="deepseek_v2",
            architectures=["DeepseekV2ForCausalLM"],
            num_hidden_layers=2,
            q_lora_rank=24,
            first_k_dense_replace=2,
            moe_layer_freq=1,
            moe_intermediate_size=8,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            topk_method="greedy",
            scoring_func="softmax",
            tie_word_embeddings=False,
        ),
        rope_theta=10000.0,
    ),
    "deepseek_v3_moe": dict(
        style=4,
        config=dict(
            MLA,
            model_type="deepseek_v3",
            architectures=["DeepseekV3ForCausalLM"],
            num_hidden_layers=3,
            q_lora_rank=24,
            first_k_dense_replace=1,
            moe_layer_freq=1,
            moe_intermediate_size=8,
            n_routed_experts=8,
            n_shared_experts=1,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            num_nextn_predict_layers=0,
            tie_word_embeddings=False,
        ),
        rope_theta=10000.0,
        rope_scaling=dict(
            type="yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            beta_fast=32,
            beta_slow=1,
            mscale=1.0,
            mscale_all_dim=0.8,  # differs from mscale: cos and sin are scaled too
        ),
    ),
    "deepseek_v3_dense": dict(
        style=5,
        config=dict(
            MLA,
            model_type="deepseek_v3",
            architectures=["DeepseekV3ForCausalLM"],
            num_hidden_layers=2,
            q_lora_rank=None,
            first_k_dense_replace=2,
            moe_layer_freq=1,
            moe_intermediate_size=8,
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
            tie_word_embeddings=True,
        ),
        rope_theta=10000.0,
        rope_scaling=dict(
            rope_type="yarn",
            factor=40.0,
            original_max_position_embeddings=8,
            beta_fast=32,
            beta_slow=1,
            mscale=1.0,
            mscale_all_dim=1.0,
        ),
    ),
    "llama_bias_linear": dict(
        style=4,
        config=dict(
            DENSE,
            model_type="llama",
            architectures=["LlamaForCausalLM"],
            num_key_value_heads=6,
            rms_norm_eps=1e-5,
            max_position_embeddings=64,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
        ),
        rope_theta=10000.0,
        rope_scaling=dict(type="linear", factor=2.0),
    ),
    "qwen2_window_yarn": dict(
        style=4,
        config=dict(
            DENSE,
            model_type="qwen2",
            architectures=["Qwen2ForCausalLM"],
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=1,
        ),
        rope_theta=1000000.0,
        rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=16),
    ),
    "deepseek_v3_bias": dict(
        style=4,
        config=dict(
            MLA,
            model_type="deepseek_v3",
            architectures=["DeepseekV3ForCausalLM"],
            num_hidden_layers=2,
            q_lora_rank=24,
            first_k_dense_replace=1,
            moe_layer_freq=1,
            moe_intermediate_size=8,
            n_routed_experts=6,
            n_shared_experts=2,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            norm_topk_prob=False,
            routed_scaling_factor=1.5,
            num_nextn_predict_layers=0,
            tie_word_embeddings=False,
        )
        | dict(attention_bias=True, rope_interleave=False),
        rope_theta=10000.0,
    ),
}


def published_config(case, style):
    config = dict(case["config"], hidden_act="silu", bos_token_id=1, eos_token_id=2, use_cache=True)
    scaling = case.get("rope_scaling")
    if style == 4:
        config |= dict(
            rope_theta=case["rope_theta"], rope_scaling=scaling, torch_dtype="float32", transformers_version="4.48.0"
        )
    else:
        scaling = dict(scaling or {})
        kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
        config |= dict(
            rope_parameters=dict(scaling, rope_theta=case["rope_theta"], rope_type=kind),
            dtype="float32",
            transformers_version="5.0.0",
        )
    return config


def gradients(model, input_ids):
    logits = model(input_ids).logits
    loss = next_token_loss(logits, input_ids)
    loss.backward()
    found = {}

    def note(name, weight, grad):
        found[name] = summary(weight, grad)

    for name, p in model.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        weight = p.detach()
        if name.endswith("experts.gate_up_proj"):
            for e in range(len(p)):
                for part, w, g in zip(("gate", "up"), weight[e].chunk(2), grad[e].chunk(2)):
                    note(name.replace("gate_up_proj", f"{e}.{part}_proj.weight"), w, g)
        elif name.endswith("experts.down_proj"):
            for e in range(len(p)):
                note(name.replace("down_proj", f"{e}.down_proj.weight"), weight[e], grad[e])
        else:
            note(name, weight, grad)
    return dict(loss=loss.item(), gradients=found)


def load(path):
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


def make(name, case, seed, out):
    generator = torch.Generator().manual_seed(seed)
    path = out / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)

    styles = (case["style"], 9 - case["style"])
    write_json(path / "config.json", published_config(case, styles[0]))
    write_json(path / "config.alt.json", published_config(case, styles[1]))

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32)
    randomise(model, generator)
    scratch = out / ".scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    shutil.copy(scratch / "model.safetensors", path)

    vocab = case["config"]["vocab_size"]
    input_ids = torch.randint(0, vocab, (1, TOKENS), generator=generator)
    with torch.no_grad():
        logits = load(path).forward(input_ids).logits[0]
        shutil.copy(path / "model.safetensors", scratch)
        shutil.copy(path / "config.alt.json", scratch / "config.json")
        assert torch.equal(logits, load(scratch).forward(input_ids).logits[0]), "the two config styles differ"
        assert torch.equal(logits, model.eval().forward(input_ids).logits[0]) or torch.allclose(
            logits, model(input_ids).logits[0], atol=1e-4
        ), "saving and loading changed the model"
    shutil.rmtree(scratch)
    save_file(dict(input_ids=input_ids[0], logits=logits.contiguous()), path / "golden.safetensors")

    grads = gradients(load(path), input_ids)
    stored = set(load_file(path / "model.safetensors"))
    trained = set(grads["gradients"])
    assert trained == {n for n in stored if "correction_bias" not in n}, trained ^ stored
    write_gradients(path / "grads.json", grads["loss"], grads["gradients"])

    size = sum(f.stat().st_size for f in path.iterdir())
    print(f"{name:26} {size / 1024:6.1f} KiB  logits std {logits.std():.2f}  loss {grads['loss']:.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    for seed, (name, case) in enumerate(CASES.items()):
        make(name, case, seed, out)
