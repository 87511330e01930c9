"""Every key of config.json varied, and what Hugging Face transformers makes of it: the table behind tests/config_keys.rs.

    pip install torch transformers safetensors
    python scripts/golden_config_keys.py [OUT_FILE]
    cargo test --release -p fourfold-models --test config_keys -- --nocapture

The checkpoints are those of crates/fourfold-models/tests/golden (scripts/golden_models.py); only config.json changes. The second
command compares this program's logits with the table and lists, key by key: the same, refused by both, refused by one, or a
silent difference, of which there must be none. The table, crates/fourfold-models/tests/golden_config_keys.json, has

    version    of transformers
    reads      for each architecture the keys that its configuration and modelling code read, found in their sources
    variants   lines of [case, changes, outcome]: `changes` maps a path ("rope_scaling.factor") to its value, or to
               {"absent": true} for a key that is taken out; `outcome` is "refused" (an error, weights that are missing or of
               another shape, or logits that are no numbers), "same" (the case's own logits), or some of the other logits:
               every eighth of the last position
"""

import copy
import dataclasses
import json
import math
import pathlib
import re
import shutil
import sys
import tempfile

import torch
import transformers
from golden import MODELS
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig

CASES = ["llama_gqa_tied", "qwen2", "qwen3", "deepseek_v2_moe", "deepseek_v3_moe"]
# Cases whose windows, biases or query ranks the first ones lack.
MORE = {
    "llama_bias_linear": ["attention_bias", "mlp_bias", "num_key_value_heads"],
    "qwen2_window_yarn": ["use_sliding_window", "sliding_window", "max_window_layers", "layer_types"],
    "deepseek_v3_bias": ["attention_bias", "rope_interleave", "norm_topk_prob", "n_shared_experts"],
    "deepseek_v2_dense_qlora": ["q_lora_rank", "first_k_dense_replace", "mlp_bias"],
}
ABSENT = {"absent": True}

# Not fields of any configuration class, and yet read, or expected to be read by somebody.
EXTRA = {
    "partial_rotary_factor": [0.5, 1.0, "1", None, 0],
    "original_max_position_embeddings": [16, 32, None, "16"],
    "rope_theta": [1000.0, 500000, None, "10000", ABSENT],
    "is_causal": [False, True, None],
    "is_encoder_decoder": [True, False],
    "sliding_window": [4, 1024, 0, None, "4"],
    "layer_types": [
        ["full_attention", "full_attention"],
        ["sliding_attention", "full_attention"],
        ["full_attention"],
        ["attention", "attention"],
        None,
        "full_attention",
    ],
    "use_sliding_window": [True, False, None, 1],
    "max_window_layers": [0, 1, 2, None],
    "attention_chunk_size": [4, None],
    "text_config": [{"hidden_size": 16}, {}, None],
    "per_layer_config": [{"0": {"attention_dropout": 0.5}}, {}, None],
    "moe_layer_freq": [1, 2, None],
    "scoring_func": ["softmax", "sigmoid", None],
    "topk_method": ["greedy", "group_limited_greedy", "noaux_tc", "best", None],
    "aux_loss_alpha": [0.5],
    "seq_aux": [False],
    "ep_size": [2],
    "pretraining_tp": [2, None],
    "qk_head_dim": [5],
    "head_dim": [4, 8, 12, None, "8"],
    "num_nextn_predict_layers": [1, 0],
    "num_mtp_layers": [1],
    "num_experts": [4, 8],
    "num_local_experts": [4, 8],
    "mlp_bias": [True, False],
    "attention_bias": [True, False, None],
    "rope_interleave": [True, False, None],
    "index_topk": [2],
    "logit_scale": [2.0],
    "final_logit_softcapping": [1.0],
    "attn_logit_softcapping": [1.0],
    "logits_scaling": [4.0],
    "embedding_multiplier": [4.0],
    "residual_multiplier": [4.0],
    "attention_multiplier": [4.0],
    "query_pre_attn_scalar": [4.0],
    "rope_type": ["linear"],
    "factor": [4.0],
    "mscale_all_dim": [1.0],
    "torch_dtype": ["bfloat16", None],
    "auto_map": [{"AutoConfig": "x.Y"}],
    "unknown_key": [3],
}

TYPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {"factor": 2.0, "original_max_position_embeddings": 32, "short_factor": "half", "long_factor": "half"},
    "proportional": {"partial_rotary_factor": 0.5},
    "mrope": {"mrope_section": [1, 1, 2]},
    "su": {"factor": 2.0},
}
IN_SECTION = {
    "rope_theta": [500.0, None, "500"],
    "factor": [8.0, 1.0, 0, None, "4", ABSENT],
    "original_max_position_embeddings": [8, None, "8", ABSENT],
    "attention_factor": [1.5, 0, None],
    "beta_fast": [8, 0, None],
    "beta_slow": [2, 0],
    "mscale": [0.5, 0],
    "mscale_all_dim": [0.7, 0, "1"],
    "truncate": [False],
    "low_freq_factor": [2.0, ABSENT],
    "high_freq_factor": [8.0, 0.5],
    "short_factor": [[2.0, 2.0]],
    "long_factor": [[3.0] * 4],
    "partial_rotary_factor": [0.5, 1.0],
    "mrope_section": [[1, 1, 2]],
    "attn_factor": [0.5, 1.0],
    "finetuned": [True],
    "type": ["linear"],
    "unknown_key": [2.0],
}


def by_type(value):
    """Values of a key that has `value`: others of its type, its ends, and other types."""
    if isinstance(value, bool):
        return [not value, None, "true", 1, ABSENT]
    if isinstance(value, int):
        return [value + 1, value * 2, 1, 0, -1, float(value), str(value), None, True, ABSENT]
    if isinstance(value, float):
        return [value * 2, value * 100, 1, 0.0, -1.0, str(value), None, ABSENT]
    if isinstance(value, str):
        return ["x", "", None, 3, ABSENT]
    return [1, 2.5, True, "x", [], {}]


def reads(model_type):
    """Keys that transformers' code of an architecture reads, by its source."""
    config_class = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
    fields = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    root = pathlib.Path(transformers.__file__).parent
    sources = [root / f"models/{model_type}/{kind}_{model_type}.py" for kind in ("modeling", "configuration")]
    sources += [root / name for name in ("modeling_rope_utils.py", "masking_utils.py", "cache_utils.py")]
    for source in sources:
        text = source.read_text()
        fields |= set(re.findall(r"\bconfig\.([a-z][a-z_0-9]*)\b(?!\()", text))
        fields |= set(re.findall(r"getattr\([a-z_.]*config, \"([a-z_]+)\"", text))
        fields |= set(re.findall(r"kwargs\.(?:pop|get)\(\"([a-z_]+)\"", text)) if "configuration" in source.name else set()
    # Properties and methods are derived from other keys.
    derived = set(dir(PreTrainedConfig)) - {field.name for field in dataclasses.fields(PreTrainedConfig)}
    kept = {"rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "num_labels"}
    internal = {"is_heterogeneous", "json", "nested_rope_parameter_keys", "number_of_conv_states", "per_layer_kwargs"}
    return sorted((fields - derived - internal) | kept)


def change(config, changes):
    config = copy.deepcopy(config)
    for path, value in changes.items():
        *outer, key = path.split(".")
        place = config
        for name in outer:
            if place.get(name) is None:
                place[name] = {}
            place = place[name]
        if value == ABSENT:
            place.pop(key, None)
        else:
            place[key] = copy.deepcopy(value)
    return config


def logits(folder, config, input_ids):
    (folder / "config.json").write_text(json.dumps(config))
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
        if info["missing_keys"] or info.get("mismatched_keys"):
            return None
        with torch.no_grad():
            found = model.eval()(input_ids).logits[0]
    except Exception:  # noqa: BLE001: whatever it is, the configuration is not taken
        return None
    return found if bool(torch.isfinite(found).all()) else None


def sections(case, config):
    """Rotations of every type, with every key, in both places."""
    dim = config.get("qk_rope_head_dim") or config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for place in ("rope_scaling", "rope_parameters"):
        clean = {"rope_scaling": ABSENT, "rope_parameters": ABSENT, "rope_theta": 10000.0}
        for kind, given in TYPES.items():
            given = {k: [1.0 + i / 2 for i in range(dim // 2)] if v == "half" else v for k, v in given.items()}
            section = dict(given, rope_type=kind)
            yield dict(clean, **{place: section})
            if place == "rope_parameters" and kind not in ("default", "yarn"):
                continue
            for key, values in IN_SECTION.items():
                for value in values:
                    yield dict(clean, **{place: section, f"{place}.{key}": value})
            yield dict(clean, **{place: dict(given, type=kind)})
            yield dict(clean, **{place: section}, original_max_position_embeddings=8)
            yield dict(clean, **{place: section}, partial_rotary_factor=0.5)
            yield dict(clean, **{place: section}, rope_theta=ABSENT)
        for odd in ({}, None, [], "yarn", {"full_attention": {"rope_theta": 100.0}}, {"factor": 8.0}):
            yield dict(clean, **{place: odd})
    yarn = dict(TYPES["yarn"], type="yarn")
    for parameters in ({"rope_type": "default", "rope_theta": 10000.0}, {"rope_theta": 500.0}, {}):
        for theta in (10000.0, ABSENT):
            yield {"rope_scaling": yarn, "rope_parameters": parameters, "rope_theta": theta}
            yield {"rope_scaling": dict(yarn, rope_theta=500.0), "rope_parameters": parameters, "rope_theta": theta}
            yield {"rope_scaling": {}, "rope_parameters": dict(yarn, **parameters), "rope_theta": theta}


def variants(case, config, keys):
    for key in keys:
        values = EXTRA.get(key, []) + by_type(config.get(key))
        seen = []
        for value in values:
            if (key in config or value != ABSENT) and not any(value == s and type(value) is type(s) for s in seen):
                seen.append(value)
                yield {key: value}


def main(out):
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    lines, read = [], {}
    for case in CASES + list(MORE):
        source = MODELS / "golden" / case
        config = json.loads((source / "config.json").read_text())
        model_type = config["model_type"]
        read.setdefault(model_type, reads(model_type))
        golden = load_file(source / "golden.safetensors")
        ids, base = golden["input_ids"][None], golden["logits"]
        rope = {"rope_scaling", "rope_parameters"}
        known = set(read[model_type]) | set(config) | set(EXTRA)
        keys = MORE.get(case) or sorted(known - rope - {"architectures", "model_type", "quantization_config"})
        changes = list(variants(case, config, keys)) + ([] if case in MORE else list(sections(case, config)))
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            shutil.copy(source / "model.safetensors", folder)
            for made in changes:
                found = logits(folder, change(config, made), ids)
                if found is None:
                    outcome = "refused"
                elif found.shape == base.shape and torch.allclose(found, base, atol=2e-6):
                    outcome = "same"
                else:
                    outcome = [float(f"{v:.6g}") for v in found[-1, ::8].tolist()]
                    assert all(math.isfinite(v) for v in outcome)
                lines.append(json.dumps([case, made, outcome], separators=(",", ":")))
        print(f"{case:26} {len(changes)} variants", flush=True)
    text = f'{{"version": {json.dumps(transformers.__version__)},\n "reads": {json.dumps(read)},\n "variants": [\n'
    text += ",\n".join(lines) + "\n]}\n"
    json.loads(text)
    out.write_text(text)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else MODELS / "golden_config_keys.json")
