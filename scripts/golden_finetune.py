"""What fine-tuning computes, as Python has it: adapters (LoRA) by peft, sequence classifiers by transformers.

    pip install torch transformers safetensors peft
    python scripts/golden_finetune.py

The cases stand on the checkpoints that golden_models.py writes, whose directory's name they have.

crates/fourfold-models/tests/golden_lora/<case>:
    adapter_config.json, adapter_model.safetensors   as `save_pretrained` writes them; A and B random
    golden.safetensors                               logits [24, vocab] of the checkpoint's own input_ids
    grads.json                                       mean next-token loss; norm and product of each factor's gradient

crates/fourfold-models/tests/golden_classifier/<case>:
    config.json          the classifier's
    golden.safetensors   score.weight; input_ids of all texts one after the other, their lengths and labels; logits [texts, classes]
                         of the texts padded to one length
    grads.json           mean loss; norm and product of each tensor's gradient
"""

import shutil

import torch
import transformers
from golden import MODELS, next_token_loss, summary, write_gradients, write_json
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

LORA = {
    "qwen2": dict(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"]),
    "deepseek_v3_moe": dict(r=2, lora_alpha=3, target_modules=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]),
}
CLASSIFIERS = {"llama_gqa_tied": 3, "qwen2": 2}
LENGTHS = [9, 4, 7]
EXACT = dict(dtype=torch.float32, attn_implementation="eager")


def empty(folder, case):
    path = MODELS / folder / case
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def lora(case, settings, generator):
    path, base = empty("golden_lora", case), MODELS / "golden" / case
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, **EXACT), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    model.peft_config["default"].base_model_name_or_path = case
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in factors.values():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    model.save_pretrained(path)
    (path / "README.md").unlink(missing_ok=True)
    input_ids = load_file(base / "golden.safetensors")["input_ids"][None]
    logits = model(input_ids).logits
    loss = next_token_loss(logits, input_ids)
    loss.backward()
    save_file(dict(logits=logits[0].detach().contiguous()), path / "golden.safetensors")
    name = lambda n: n.removeprefix("base_model.model.").replace(".default.", ".")
    write_gradients(path / "grads.json", loss.item(), {name(n): summary(p, p.grad) for n, p in factors.items()})
    print(f"{case}: adapter of {len(factors)} factors, loss {loss:.3f}")


def classifier(case, classes, generator):
    path, base = empty("golden_classifier", case), MODELS / "golden" / case
    config = AutoConfig.from_pretrained(base)
    config.num_labels, config.pad_token_id = classes, 0
    model = AutoModelForSequenceClassification.from_pretrained(base, config=config, **EXACT).eval()
    model.config.architectures = [type(model).__name__]
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=generator) * 0.3)
    write_json(path / "config.json", model.config.to_diff_dict())
    texts = [torch.randint(1, config.vocab_size, (length,), generator=generator) for length in LENGTHS]
    labels = torch.arange(len(texts)) % classes
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=config.pad_token_id)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in texts], batch_first=True)
    out = model(padded, attention_mask=mask, labels=labels)
    out.loss.backward()
    golden = dict(input_ids=torch.cat(texts), lengths=torch.tensor(LENGTHS), labels=labels, logits=out.logits.detach())
    save_file(dict(golden, **{"score.weight": model.score.weight.detach()}), path / "golden.safetensors")
    write_gradients(path / "grads.json", out.loss.item(), {n: summary(p, p.grad) for n, p in model.named_parameters()})
    print(f"{case}: classifier of {classes}, loss {out.loss:.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    generator = torch.Generator().manual_seed(5)
    for case, settings in LORA.items():
        lora(case, settings, generator)
    for case, classes in CLASSIFIERS.items():
        classifier(case, classes, generator)
