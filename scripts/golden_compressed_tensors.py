"""Small checkpoints that the compressed-tensors package itself wrote, for our reader.

    pip install torch transformers compressed-tensors
    python scripts/golden_compressed_tensors.py [OUT_DIR]

    ct_tensors.safetensors   single matrices under names like `w3_asym_g32` (bits, symmetric or not, group size or
                             `channel`), each as the package stores it (`.weight_packed`, `.weight_scale`,
                             `.weight_shape`, `.weight_zero_point`), beside `.dequantised`: what it reads back (F32);
                             `actorder` has a `.weight_g_idx` too; `fp8_block` is DeepSeek's layout instead
                             (`.weight` F8_E4M3, `.weight_scale_inv` F32, blocks of 16 x 16)
    ct_<case>/               a tiny llama: config.json and model.safetensors as `save_pretrained` writes them, and
                             golden.safetensors: input_ids, logits (F32, by transformers from the stored weights) and,
                             under their own names, some of the dequantised weights
"""

import json
import pathlib
import shutil
import sys

import torch
import transformers
from check_compressed_tensors import by_module
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor as Packed
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams, is_module_quantized
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

OUT = pathlib.Path(__file__).parent.parent / "crates/fourfold-formats/tests/golden"


def arguments(bits, symmetric, group):
    kind = dict(strategy="channel") if group is None else dict(strategy="group", group_size=group)
    return QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **kind)


def scales(weight, args):
    """Scale and zero point by the package's own min-max rule, each [rows, groups]."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, args.group_size or columns)
    return calculate_qparams(groups.amin(-1), groups.amax(-1), args)


def single(weight, args):
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    scale, zero_point = scales(weight, args)
    stored = Packed.compress(dict(weight=weight, weight_scale=scale, weight_zero_point=zero_point), scheme)
    exact = dict(stored, weight_scale=stored["weight_scale"].float())  # the product is not rounded to bf16
    return dict(stored, dequantised=Packed.decompress(exact, scheme)["weight"])


def act_order(weight, generator):
    """Activation order, as GPTQ checkpoints of the package's versions before August 2026 hold it: column i has the
    scale of group weight_g_idx[i]; the codes stay in the original order of the columns. The package no longer writes
    or reads this, so the expected values here follow that definition, from codes that the package unpacks."""
    rows, columns, size = *weight.shape, 32
    order = torch.randperm(columns, generator=generator)
    g_idx = torch.empty(columns, dtype=torch.int32)
    g_idx[order] = torch.arange(columns, dtype=torch.int32) // size
    sorted_case = single(weight[:, order].contiguous(), arguments(4, True, size))
    codes = unpack_from_int32(sorted_case["weight_packed"], 4, torch.Size((rows, columns)))
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    original = torch.empty_like(codes)
    original[:, order] = codes
    scale = sorted_case["weight_scale"]
    return dict(
        weight_packed=pack_to_int32(original, 4),
        weight_scale=scale,
        weight_shape=sorted_case["weight_shape"],
        weight_g_idx=g_idx,
        dequantised=original.float() * scale.float()[:, g_idx.long()],
    )


def fp8_block(weight, size=16):
    rows, columns = weight.shape
    blocks = torch.nn.functional.pad(weight, (0, -columns % size, 0, -rows % size))
    blocks = blocks.reshape(blocks.shape[0] // size, size, -1, size)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    codes = (blocks / scale).to(torch.float8_e4m3fn)
    back = (codes.float() * scale).reshape(blocks.shape[0] * size, -1)[:rows, :columns]
    codes = codes.reshape(blocks.shape[0] * size, -1)[:rows, :columns]
    return dict(weight=codes.contiguous(), weight_scale_inv=scale[:, 0, :, 0].contiguous(), dequantised=back.contiguous())


def tensors(out):
    generator = torch.Generator().manual_seed(5)
    found = {}

    def note(name, parts):
        found.update({f"{name}.{key}": t.contiguous() for key, t in parts.items()})

    for bits in range(2, 9):
        for symmetric in (True, False):
            weight = torch.randn(10, 64, generator=generator) + (0 if symmetric else 0.4)
            note(f"w{bits}_{'sym' if symmetric else 'asym'}_g32", single(weight, arguments(bits, symmetric, 32)))
    # 45 columns: the last word of a row is not full, whatever the bits
    for bits, symmetric in ((3, True), (4, False), (5, False), (8, True)):
        weight = torch.randn(7, 45, generator=generator)
        note(f"w{bits}_{'sym' if symmetric else 'asym'}_channel", single(weight, arguments(bits, symmetric, None)))
    weight = torch.randn(8, 64, generator=generator).bfloat16()
    note("w4_sym_g32_bf16", single(weight, arguments(4, True, 32)))
    note("actorder", act_order(torch.randn(8, 96, generator=generator), generator))
    note("fp8_block", fp8_block(torch.randn(24, 40, generator=generator)))
    save_file(found, out / "ct_tensors.safetensors")


def group(args, targets):
    return QuantizationScheme(targets=targets, weights=args, format="pack-quantized")


EVERYTHING = ["Linear", "Embedding"]
CASES = {
    "ct_w4_sym_g32": dict(groups={"group_0": (arguments(4, True, 32), ["Linear"])}, ignore=["lm_head"]),
    "ct_w4_asym_g32": dict(groups={"group_0": (arguments(4, False, 32), ["Linear"])}, ignore=["lm_head"]),
    "ct_w3_sym_g32": dict(groups={"group_0": (arguments(3, True, 32), ["Linear"])}, ignore=["lm_head"]),
    "ct_w8_channel": dict(groups={"group_0": (arguments(8, True, None), ["Linear"])}, ignore=["lm_head"], dtype="bfloat16"),
    # two groups, the embedding and the output matrix too
    "ct_mixed_embedding": dict(
        groups={
            "group_0": (arguments(4, True, 32), [r"re:.*mlp\..*_proj$"]),
            "group_1": (arguments(6, True, 32), [r"re:.*self_attn\..*_proj$", "re:.*lm_head$", "re:.*embed_tokens$"]),
        },
        ignore=[],
    ),
}


def model_case(name, case, out, seed):
    torch.manual_seed(seed)
    dtype = getattr(torch, case.get("dtype", "float32"))
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    model = LlamaForCausalLM(config).to(dtype)
    quantization = QuantizationConfig(
        config_groups={key: group(*value) for key, value in case["groups"].items()},
        ignore=case["ignore"],
        format="pack-quantized",
        quantization_status="frozen",
    )
    apply_quantization_config(model, quantization, show_progress=False)
    for module in model.modules():
        if is_module_quantized(module):
            scale, zero_point = scales(module.weight.detach(), module.quantization_scheme.weights)
            module.weight_scale.data.copy_(scale)
            module.weight_zero_point.data.copy_(zero_point)
    compressor = ModelCompressor.from_pretrained_model(model, "pack-quantized")
    compressor.compress_model(model)
    path = out / name
    shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(path)
    compressor.update_config(path)
    (path / "generation_config.json").unlink(missing_ok=True)

    input_ids = torch.randint(0, 64, (1, 16))
    loaded = by_module(path)  # from_pretrained cannot read all of them: see check_compressed_tensors.py
    with torch.no_grad():
        logits = loaded(input_ids).logits[0]
    weights = dict(loaded.named_parameters())
    kept = ["model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight"]
    if case["ignore"] == []:
        kept += ["model.embed_tokens.weight", "lm_head.weight"]
    golden = {n: weights[n].detach().float().contiguous() for n in kept}
    stored = load_file(path / "model.safetensors")
    assert all(n.replace(".weight", ".weight_packed") in stored for n in kept), sorted(stored)
    save_file(dict(golden, input_ids=input_ids[0], logits=logits.float().contiguous()), path / "golden.safetensors")
    print(name, sum(f.stat().st_size for f in path.iterdir()), f"logits std {logits.std():.2f}", json.loads((path / "config.json").read_text())["quantization_config"]["config_groups"].keys())


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    tensors(out)
    print("ct_tensors", (out / "ct_tensors.safetensors").stat().st_size)
    for seed, (name, case) in enumerate(CASES.items()):
        model_case(name, case, out, seed)
