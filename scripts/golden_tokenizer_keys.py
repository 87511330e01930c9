"""Keys of the files beside a tokenizer.json varied, and what Hugging Face transformers makes of them: tests/tokenizer_keys.rs.

    pip install transformers
    python scripts/golden_tokenizer_keys.py > crates/fourfold-infer/tests/golden/tokenizer_keys.json
    cargo test --release -p fourfold-infer --test tokenizer_keys -- --nocapture

Small tokenizers of six kinds are made here. Each variant changes tokenizer_config.json, special_tokens_map.json, added_tokens.json or
the model's type, and is loaded with AutoTokenizer. The file has

    version     of transformers
    texts       what is encoded
    kinds       for each kind its tokenizer.json and its tokenizer_config.json
    variants    [kind, changes, outcome]: `changes` are keys of tokenizer_config.json, or of another file as "file:key", null for a key
                that is taken out; `outcome` is {"refused": true}, or {"ids": with special tokens, "plain": without, "decoded": texts,
                "named": the special tokens by name}, fields that are the first variant's of the kind left out
"""

import json
import sys
import tempfile
from pathlib import Path

import transformers
from transformers import AutoTokenizer

transformers.logging.set_verbosity_error()

TEXTS = [
    "the Cat",
    " the  cat.",
    "the <s>cat</s> the",
    "<x>the<x> the",
    "the <y> cat 12345 don't",
    "猫 é\n\n the , cat !",
    "",
    "  ",
]

def special(i, content, **more):
    token = {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
    return {**token, **more}


def byte_alphabet():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]


def around(bos, first=0):
    if not bos:
        return None
    return {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [first], "tokens": ["<s>"]}}}


def byte_level(pre, normalizer=None, bos=False, added=()):
    tokens = ["<s>", "</s>", *byte_alphabet(), "th", "the", "Ġthe", "Ġc", "at", "Ġcat", "cat", "12", "Ġt", "ĠĠ"]
    merges = ["t h", "th e", "Ġ c", "a t", "Ġc at", "c at", "1 2", "Ġ t", "Ġ the", "Ġ Ġ"]
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [special(0, "<s>"), special(1, "</s>"), *added],
            "normalizer": normalizer, "pre_tokenizer": pre, "post_processor": around(bos),
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges}}


def sentence_piece(normalizer, pre, bos=True, strip=True):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"thecaion'd.,!12345",
              "▁t", "th", "▁th", "▁the", "the", "at", "cat", "▁cat", "▁▁"]
    merges = ["▁ t", "t h", "▁t h", "▁th e", "th e", "a t", "c at", "▁ cat", "▁ ▁"]
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}]
    if strip:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
            "normalizer": normalizer, "pre_tokenizer": pre, "post_processor": around(bos, 1),
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                      "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges}}


def word_piece():
    tokens = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "the", "cat", "##s", ".", ",", "!", "don", "'", "t", "<", ">", "s", "/", "x"]
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [special(i, t) for i, t in enumerate(tokens[:4])],
            "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                           "strip_accents": None, "lowercase": True},
            "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": None,
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                      "max_input_chars_per_word": 100, "vocab": {t: i for i, t in enumerate(tokens)}}}


QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def bytes_of(prefix=False, regex=False):
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": regex}


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
           {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}


def metaspace(scheme):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}


NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
# kind -> (model_type, tokenizer.json, tokenizer_config.json)
KINDS = {
    "llama3": ("llama", byte_level(sequence(split(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")), bytes_of()), bos=True),
               {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES}),
    "qwen2": ("qwen2", byte_level(sequence(split(QWEN), bytes_of()), {"type": "NFC"}),
              {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>", "bos_token": None, "add_prefix_space": False}),
    "smollm": ("llama", byte_level(sequence({"type": "Digits", "individual_digits": True}, bytes_of(False, True))),
               {"tokenizer_class": "GPT2Tokenizer", **NAMES}),
    "deepseek": ("deepseek_v3", byte_level(sequence(split(r"\p{N}{1,3}"), split(r"[ ]?[\p{L}\p{M}]+|\s+(?!\S)|\s+"), bytes_of()),
                                           bos=True), {"tokenizer_class": "LlamaTokenizerFast", "legacy": True, **NAMES}),
    "llama2": ("llama", sentence_piece(PREPEND, None), {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", **NAMES}),
    "llama2first": ("llama", sentence_piece(None, metaspace("first")),
                    {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "legacy": False, **NAMES}),
    "word": ("llama", word_piece(), {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}),
}

X = {"content": "<x>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
CLASSES = ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer", "GPT2Tokenizer",
           "GPT2TokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast", "GemmaTokenizer", "CodeLlamaTokenizer", "CohereTokenizer",
           "T5Tokenizer", "BertTokenizer", "NoSuchTokenizer", None]
VARIANTS = [
    {},
    *({"tokenizer_class": name} for name in CLASSES),
    *({key: value} for key in ["add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "clean_up_tokenization_spaces",
                               "split_special_tokens", "use_fast", "from_slow", "do_lower_case", "use_default_system_prompt",
                               "spaces_between_special_tokens", "errors", "add_special_tokens"] for value in [True, False, None]),
    {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True, "clean_up_tokenization_spaces": True},
    {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True},
    {"add_bos_token": True, "add_eos_token": True},
    {"add_prefix_space": True, "legacy": False},
    {"add_prefix_space": True, "legacy": True},
    {"add_prefix_space": False, "legacy": True},
    {"additional_special_tokens": ["<x>"]},
    {"additional_special_tokens": [X]},
    {"additional_special_tokens": [{**X, "lstrip": True, "rstrip": True}]},
    {"additional_special_tokens": ["<x>", "<y>"]},
    {"additional_special_tokens": "<x>"},
    {"additional_special_tokens": {"x_token": "<x>"}},
    {"extra_special_tokens": ["<x>"]},
    {"extra_special_tokens": {"image_token": "<x>"}},
    {"extra_special_tokens": ["<y>"], "additional_special_tokens": ["<x>"]},
    {"extra_special_tokens": {"image_token": "<y>"}, "additional_special_tokens": ["<x>"]},
    {"model_specific_special_tokens": {"image_token": "<x>"}},
    {"image_token": "<x>"},
    {"image_token": X},
    {"pad_token": "<x>"},
    {"pad_token": {**X, "__type": "AddedToken"}},
    {"pad_token": X},
    {"pad_token": 3},
    {"pad_token": ["<x>"]},
    {"bos_token": "<x>"},
    {"bos_token": None},
    {"eos_token": None},
    {"eos_token": "<y>"},
    {"unk_token": None},
    {"unk_token": "<y>"},
    {"mask_token": "<x>"},
    {"added_tokens_decoder": {"400": X}},
    {"added_tokens_decoder": {"0": {**X, "content": "<s>"}, "400": X}},
    {"added_tokens_decoder": {"1": {**X, "content": "<s>", "special": False}}},
    {"added_tokens_decoder": {"next": X}},
    {"added_tokens_decoder": {"next": {**X, "special": False}}},
    {"added_tokens_decoder": {"next": {**X, "rstrip": True, "lstrip": True}}},
    {"added_tokens_decoder": {"next": {**X, "single_word": True}}},
    {"added_tokens_decoder": {"next": {**X, "normalized": True, "content": "<y>"}}},
    {"added_tokens.json:<x>": "next"},
    {"added_tokens.json:<x>": "next", "special_tokens_map.json:pad_token": "<x>"},
    {"special_tokens_map.json:pad_token": "<x>"},
    {"special_tokens_map.json:pad_token": {k: v for k, v in X.items() if k != "special"}},
    {"special_tokens_map.json:additional_special_tokens": ["<x>"]},
    {"special_tokens_map.json:extra_special_tokens": ["<x>"]},
    {"special_tokens_map.json:eos_token": "<x>"},
    {"special_tokens_map.json:eos_token": "<x>", "added_tokens_decoder": {"next": X}},
    {"model_max_length": 3},
    {"max_len": 3},
    {"max_length": 3},
    {"truncation_side": "left", "model_max_length": 3},
    {"padding_side": "left"},
    {"padding_side": "middle"},
    {"chat_control_tokens": ["<x>"]},
    {"fix_mistral_regex": True},
    {"fix_mistral_regex": False},
    {"backend": "tokenizers"},
    {"sp_model_kwargs": {"enable_sampling": True}},
    {"dropout": 0.5},
    {"normalizer": {"type": "Lowercase"}},
    {"pre_tokenizer": {"type": "Whitespace"}},
    {"post_processor": None},
    {"vocab_file": "other.model"},
    {"tokenizer_file": "other.json"},
    {"vocab": {"a": 0}},
    {"merges": []},
    {"added_tokens": [X]},
    {"init_inputs": []},
    {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}},
    {"auto_map": ["tokenization_x.XTokenizer", None]},
    {"processor_class": "LlavaProcessor"},
    {"unknown_key": True},
    {"unknown_key": "the"},
    {"unknown_token": "<x>"},
    {"model_type:": "llama"}, {"model_type:": "qwen2"}, {"model_type:": "qwen3"}, {"model_type:": "deepseek_v2"},
    {"tokenizer.json:truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}},
    {"tokenizer.json:padding": {"strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                                "pad_type_id": 0, "pad_token": "<s>"}},
    {"tokenizer.json:post_processor": None},
    {"tokenizer.json:version": "2.0"},
    {"tokenizer.json:normalizer": {"type": "Lowercase"}},
    {"tokenizer.json:decoder": None},
]
# For these kinds all variants; the others have those above that name a class or a space.
ALL = ["llama3", "qwen2", "llama2first", "word"]
SPACES = ["tokenizer_class", "add_prefix_space", "legacy", "model_type:", "tokenizer.json:normalizer", "add_bos_token"]


def files_of(kind, changes):
    model_type, tokenizer, config = KINDS[kind]
    files = {"tokenizer.json": json.loads(json.dumps(tokenizer)), "tokenizer_config.json": dict(config),
             "config.json": {"model_type": model_type, "vocab_size": 512, "transformers_version": "4.48.0"}}
    following = str(len(tokenizer["model"]["vocab"]))
    for key, value in changes.items():
        if key == "model_type:":
            files["config.json"]["model_type"] = value
            continue
        name, _, key = key.rpartition(":")
        if isinstance(value, dict) and "next" in value:
            value = {following if k == "next" else k: v for k, v in value.items()}
        if value == "next":
            value = int(following)
        files.setdefault(name or "tokenizer_config.json", {})[key] = value
    return files


def outcome(kind, changes):
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files_of(kind, changes).items():
            Path(folder, name).write_text(json.dumps(content))
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            rough = KINDS[kind][1]["model"]["vocab"]
            sequences = [[rough.get(c, rough.get("▁" if c == " " else "Ġ" if c == " " else c, 5)) for c in "the ,!"],
                         [1, 0, 2, 1], list(range(4, 18)), [0, 1, 260, 262, 261, 263]]
            known = {k: str(v) for k, v in tokenizer._special_tokens_map.items() if v is not None}
            return {
                "ids": [tokenizer(text)["input_ids"] for text in TEXTS],
                "plain": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS],
                "decoded": [[s, tokenizer.decode(s, skip_special_tokens=True)] for s in sequences],
                "named": known,
            }
        except Exception as error:  # noqa: BLE001: any kind is a refusal
            return {"refused": f"{type(error).__name__}: {str(error)[:80]}"}


def main():
    variants = []
    for kind in KINDS:
        first = None
        for changes in VARIANTS:
            if kind in ALL or not changes or any(key in changes for key in SPACES):
                result = outcome(kind, changes)
                variants.append([kind, changes, {k: v for k, v in result.items() if not first or first.get(k) != v}])
                first = first or result
    kinds = {kind: {"model_type": t, "tokenizer": tokenizer, "config": config} for kind, (t, tokenizer, config) in KINDS.items()}
    out = {"version": transformers.__version__, "texts": TEXTS, "kinds": kinds}
    text = json.dumps(out, ensure_ascii=False)[:-1] + ', "variants": [\n'
    text += ",\n".join(json.dumps(v, ensure_ascii=False, separators=(",", ":")) for v in variants) + "\n]}\n"
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
