//! Small valid inputs of the readers.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use fourfold_compress::recipe::Recipe;
use fourfold_compress::{Plan, Scope};
use fourfold_disk::Identity;
use fourfold_formats::gguf::imatrix::{Imatrix, Importance};
use fourfold_formats::{ModelFiles, SafetensorsWriter, WriteOptions};
use fourfold_models::testing::RandomWeights;
use fourfold_models::{ModelSpec, spec_from_config};
use fourfold_tensor::{DType, Dense, Form, Weight, WeightSink};
use fourfold_train::checkpoint::{self, State};
use fourfold_train::recipe::Recipe as Storage;
use fourfold_train::store::ParameterStore;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// Reader, seed, bytes.
type Seed = (&'static str, &'static str, Vec<u8>);

/// All seeds that this program makes; those of `gguf` and some of `safetensors` come from the golden files of the formats.
pub fn all() -> Vec<Seed> {
    let mut seeds = Vec::new();
    texts(&mut seeds);
    tokenizers(&mut seeds);
    models(&mut seeds);
    runs(&mut seeds);
    data(&mut seeds);
    seeds
}

/// The smallest model, as the readers have it.
fn tiny() -> ModelSpec {
    spec_from_config(&json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 8,
        "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true
    }))
    .unwrap()
}

fn joined(files: &[&[u8]]) -> Vec<u8> {
    files.join(&0)
}

fn tensors(all: &[(&str, Dtype, &[usize], Vec<u8>)]) -> Vec<u8> {
    let views =
        all.iter().map(|(name, dtype, shape, data)| (*name, TensorView::new(*dtype, shape.to_vec(), data).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

fn f32s(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

fn texts(seeds: &mut Vec<Seed>) {
    let mut add = |parser, name, text: &str| seeds.push((parser, name, text.as_bytes().to_vec()));
    add(
        "answer",
        "hermes",
        "<think>\nhm</think>\n\nYes.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": [1, \"a\"]}}\n</tool_call> rest",
    );
    add("answer", "tags", "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>");
    add(
        "answer",
        "deepseek",
        "a<\u{ff5c}tool\u{2581}calls\u{2581}begin\u{ff5c}><\u{ff5c}tool\u{2581}call\u{2581}begin\u{ff5c}>function<\u{ff5c}tool\u{2581}sep\u{ff5c}>f\n```json\n{\"x\": 1}\n```<\u{ff5c}tool\u{2581}call\u{2581}end\u{ff5c}><\u{ff5c}tool\u{2581}calls\u{2581}end\u{ff5c}>",
    );
    add(
        "answer",
        "dsml",
        "<\u{ff5c}DSML\u{ff5c}function_calls>\n<\u{ff5c}DSML\u{ff5c}invoke name=\"f\">\n<\u{ff5c}DSML\u{ff5c}parameter name=\"x\" string=\"false\">1</\u{ff5c}DSML\u{ff5c}parameter>\n</\u{ff5c}DSML\u{ff5c}invoke>\n</\u{ff5c}DSML\u{ff5c}function_calls>",
    );
    add(
        "chat_template",
        "chatml",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content | string) + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    );
    add(
        "chat_template",
        "namespace",
        "{%- set ns = namespace(n=0, last='') -%}\n{%- for m in messages if m['role'] != 'tool' -%}\n{%- set ns.n = ns.n + 1 -%}{%- set ns.last = m.content -%}\n{{- loop.index0 ~ ':' ~ m['role'] | upper ~ (' ' * 2) -}}\n{%- if m.tool_calls is defined and m.tool_calls -%}{{- m.tool_calls | tojson(indent=2) -}}{%- endif -%}\n{%- endfor -%}\n{{ ns.n }}{{ bos_token }}{{ messages[-1].content[:3] }}{{ strftime_now('%Y') }}",
    );
    add(
        "chat_template",
        "macros",
        "{% macro show(x, depth=1) %}{% if x is mapping %}{% for k, v in x.items() %}{{ k }}={{ show(v, depth + 1) }};{% endfor %}{% elif x is iterable and x is not string %}[{% for v in x %}{{ show(v, depth + 1) }}{% if not loop.last %}, {% endif %}{% endfor %}]{% else %}{{ x }}{% endif %}{% endmacro %}{{ show(messages) }}{% if tools %}{{ show(tools) }}{% endif %}{{ range(3) | list }}{{ 'a-b'.split('-') | join('+') }}{{ '%s|%d' % ('x', 3) }}{{ 7 // 2 }}{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | first }}",
    );
    add(
        "request",
        "completion",
        r#"{"model": "m", "prompt": "a", "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": -1, "n": 2, "seed": 3, "stop": ["x"], "logit_bias": {"5": -100}, "logprobs": 2, "stream": true, "stream_options": {"include_usage": true}}"#,
    );
    add(
        "request",
        "schema",
        r##"{"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}, "b": {"enum": ["x", "y"]}, "c": {"type": "array", "items": {"$ref": "#/$defs/d"}, "maxItems": 3}}, "required": ["a"], "$defs": {"d": {"type": "string", "pattern": "^[a-z]+$"}}}}}}"##,
    );
    add("request", "regex", r#"{"prompt": "a", "regex": "(ab|c){2,3}[0-9]+\\.?"}"#);
    add("request", "lark", r#"{"prompt": "a", "grammar": "start: word (\" \" word)*\nword: /[a-z]+/ | \"x\"\n"}"#);
    add(
        "request",
        "tools",
        r#"{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "number"}}}}}], "tool_choice": "required", "parallel_tool_calls": false}"#,
    );
    add("options", "generate", "generate\nm\n-p\na\n-n\n5\n--temp\n0.5\n--seed\n3\n-t\n2");
    add("options", "compress", "compress\nm\nout\n--method\nwanda:0.5,svd:16\n--group-size\n64\n--bytes\n500MB");
    add(
        "options",
        "train",
        "train\n--model\nm\n--data\na\nb\n--output\no\n--epochs\n0.5\n--lr\n1e-3\n--lora-rank\n8\n--device\ngpu:1",
    );
    add(
        "run_toml",
        "run",
        "model_config = \"config.json\"\ntokenizer = \"tokenizer.json\"\ndata = [\"data.jsonl\"]\noutput = \"run\"\nsteps = 2\ncontext = 16\nbatch_size = 2\nlearning_rate = 1e-3\npreset = \"quarter\"\nbeta2 = 0.95\nseed = 3\nkeep = 1\n",
    );
    add(
        "run_toml",
        "lora",
        "model = \"m\"\ndata = [\"a\", 'b']\noutput = \"run\"\nepochs = 1.5\nlora_rank = 8\nlora_alpha = 16.0\nlora_targets = [\"q_proj\"]\nmoments = 8\nschedule = \"wsd\"\nteacher = \"t\"\ndistill_weight = 0.5\nresume = true\n",
    );
    add(
        "hub_files",
        "list",
        r#"{"sha": "0a1b2c3d", "siblings": [{"rfilename": "config.json"}, {"rfilename": "a/b.safetensors", "size": 3}]}"#,
    );
    add(
        "index",
        "two",
        r#"{"metadata": {"total_size": 12}, "weight_map": {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}}"#,
    );
    add(
        "generation_config",
        "some",
        r#"{"do_sample": true, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1, "eos_token_id": [1, 2], "bos_token_id": 0, "transformers_version": "4.50.0"}"#,
    );
    add(
        "metrics",
        "three",
        "{\"step\":0,\"eval/loss\":2.5}\n{\"loss\":2.0,\"step\":1}\n{\"loss\":1.5,\"lr\":0.001,\"step\":2}\n{\"loss\":1.0,\"step\":3}\n",
    );
}

/// A tokenizer of the model kind, with what goes around it.
fn tokenizer(model: Value, parts: Value) -> Vec<u8> {
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false})
    };
    let mut all = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special(0, "<s>"), special(1, "</s>")],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null, "model": model
    });
    for (key, value) in parts.as_object().unwrap() {
        all[key] = value.clone();
    }
    all.to_string().into_bytes()
}

/// SentencePiece's compiled normalization of `x` to `y`: the size of a double array, its units, the text.
fn charsmap() -> String {
    let mut units = vec![0_u32; 512];
    units[0] = 256 << 10;
    units[256 ^ 0x78] = 0x78 << 10 | 1 << 8 | 0x78;
    let bytes: Vec<u8> = [2048].iter().chain(&units).flat_map(|unit| unit.to_le_bytes()).chain(*b"y\0").collect();
    let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let of = |chunk: &[u8]| {
        let bits = chunk.iter().chain(&[0, 0]).take(3).fold(0_u32, |bits, &byte| bits << 8 | u32::from(byte));
        let letters = (0..4).map(move |i| char::from(digits[(bits >> (18 - 6 * i) & 63) as usize]));
        letters.take(chunk.len() + 1).chain(std::iter::repeat_n('=', 3 - chunk.len())).collect::<String>()
    };
    bytes.chunks(3).map(of).collect()
}

fn tokenizers(seeds: &mut Vec<Seed>) {
    let ids = |words: &[&str]| {
        words.iter().enumerate().map(|(i, w)| ((*w).to_owned(), json!(i))).collect::<serde_json::Map<_, _>>()
    };
    let around = json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}});
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let words =
        ["<s>", "</s>", "a", "b", "c", "e", "f", "h", "o", "t", "x", "\u{120}", "1", "2", "3", "th", "the", "\u{120}f"];
    let bpe = |extra: Value| {
        let mut model = json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": ids(&words), "merges": ["t h", "th e", "\u{120} f"]});
        for (key, value) in extra.as_object().unwrap() {
            model[key] = value.clone();
        }
        model
    };
    let pattern = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+";
    let split = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false}, bytes]});
    let gpt = tokenizer(bpe(json!({})), json!({"pre_tokenizer": split, "decoder": bytes, "post_processor": around}));
    let config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "add_bos_token": true,
        "add_eos_token": false, "added_tokens_decoder": {"0": {"content": "<s>", "special": true}},
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"});
    seeds.push(("tokenizer", "byte-level", joined(&[&gpt, config.to_string().as_bytes()])));
    let map = json!({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<x>"]});
    let added = json!({"<x>": 18});
    seeds.push((
        "tokenizer",
        "beside",
        joined(&[&gpt, b"{}", map.to_string().as_bytes(), added.to_string().as_bytes()]),
    ));
    let spm = tokenizer(
        bpe(json!({"byte_fallback": true, "fuse_unk": true, "unk_token": "<s>",
            "vocab": ids(&["<s>", "</s>", "<0x41>", "<0xE7>", "\u{2581}", "t", "h", "e", "\u{2581}t", "he"]), "merges": [["\u{2581}", "t"], ["h", "e"]]})),
        json!({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u{2581}"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}]},
            "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}}),
    );
    seeds.push(("tokenizer", "sentencepiece", spm));
    let pieces = json!([
        ["<s>", 0.0],
        ["</s>", 0.0],
        ["\u{2581}", -2.0],
        ["t", -3.0],
        ["he", -2.5],
        ["\u{2581}the", -4.0],
        ["<0x41>", -9.0]
    ]);
    let unigram = tokenizer(
        json!({"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": true}),
        json!({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}, {"type": "StripAccents"},
                {"type": "Precompiled", "precompiled_charsmap": charsmap()}, {"type": "Strip", "strip_left": true, "strip_right": true}]},
            "pre_tokenizer": {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true},
            "decoder": {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true}}),
    );
    seeds.push(("tokenizer", "unigram", unigram));
    let wordpiece = tokenizer(
        json!({"type": "WordPiece", "unk_token": "<s>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
            "vocab": ids(&["<s>", "</s>", "the", "##x", "fo", "'", "s", "3", "[CLS]", "[SEP]"])}),
        json!({"normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true},
            "pre_tokenizer": {"type": "BertPreTokenizer"}, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
            "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 9], "cls": ["[CLS]", 8]}}),
    );
    seeds.push(("tokenizer", "wordpiece", wordpiece));
    let wordlevel = tokenizer(
        json!({"type": "WordLevel", "unk_token": "<s>", "vocab": ids(&["<s>", "</s>", "the", "fox", "12345"])}),
        json!({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, {"type": "Digits", "individual_digits": true},
                {"type": "Punctuation", "behavior": "Isolated"}, {"type": "UnicodeScripts"}, {"type": "FixedLength", "length": 4},
                {"type": "CharDelimiterSplit", "delimiter": "x"}]},
            "decoder": {"type": "CTC", "pad_token": "<s>", "word_delimiter_token": "|", "cleanup": true},
            "post_processor": {"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0], "trim_offsets": true, "add_prefix_space": true}}),
    );
    seeds.push(("tokenizer", "wordlevel", wordlevel));
}

fn models(seeds: &mut Vec<Seed>) {
    let mut add = |name, value: Value| seeds.push(("config", name, value.to_string().into_bytes()));
    let llama = json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "attention_bias": false,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024}, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": [1, 2]});
    let mut qwen = llama.clone();
    qwen["model_type"] = json!("qwen3");
    qwen["architectures"] = json!(["Qwen3ForSequenceClassification"]);
    qwen["id2label"] = json!({"0": "a", "1": "b", "2": "c"});
    qwen["rope_scaling"] = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048});
    add("llama", llama);
    add("qwen3", qwen);
    add(
        "deepseek_v3",
        json!({"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 300, "hidden_size": 16,
        "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
        "n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
        "moe_layer_freq": 1, "norm_topk_prob": true, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "routed_scaling_factor": 2.5,
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000, "hidden_act": "silu", "tie_word_embeddings": false,
        "rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 128}}),
    );
    add(
        "convnet",
        json!({"architectures": ["ConvNet"], "model_type": "convnet", "image_size": [1, 8, 8],
        "normalize": {"mean": [0.3], "std": [0.4]}, "layers": [
            {"type": "conv2d", "out_channels": 8, "kernel_size": 3, "padding": 1, "bias": false}, {"type": "batch_norm"}, {"type": "relu"},
            {"type": "residual", "layers": [{"type": "conv2d", "out_channels": 8, "kernel_size": 3, "padding": 1, "groups": 2}]},
            {"type": "max_pool", "kernel_size": 2}, {"type": "adaptive_avg_pool", "output_size": 1}, {"type": "flatten"},
            {"type": "linear", "out_features": 4}]}),
    );

    let config = json!({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"],
        "bias": "none", "fan_in_fan_out": false, "lora_dropout": 0.0, "use_rslora": false, "rank_pattern": {}, "alpha_pattern": {}});
    let name = |layer: &str, half: &str| format!("base_model.model.model.layers.0.{layer}.lora_{half}.weight");
    let some = |n: usize| f32s((0..n).map(|i| i as f32 * 0.01));
    let names = [
        name("self_attn.q_proj", "A"),
        name("self_attn.q_proj", "B"),
        name("mlp.down_proj", "A"),
        name("mlp.down_proj", "B"),
    ];
    let model = tensors(&[
        (&names[0], Dtype::F32, &[2, 8], some(16)),
        (&names[1], Dtype::F32, &[8, 2], some(16)),
        (&names[2], Dtype::F32, &[2, 12], some(24)),
        (&names[3], Dtype::F32, &[8, 2], some(16)),
    ]);
    seeds.push(("adapter", "lora", joined(&[config.to_string().as_bytes(), &model])));

    let forms = json!({"quantization_config": {"quant_method": "fourfold", "config_groups": {"g": {"targets": ["m.weight_term0"],
        "weights": {"num_bits": 4, "symmetric": true, "strategy": "group", "group_size": 4}}},
        "forms": [{"targets": ["s.weight"], "form": "sparse"}, {"targets": ["c.weight"], "form": {"sparse": {"num_bits": 4, "group_size": 8}}},
            {"targets": ["m.weight"], "form": {"sum": ["packed", {"low_rank": ["dense", "dense"]}]}}]}});
    let masks = || [0b1011_0001_u64, 0x3ff].iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let shape = |rows: i64, cols: i64| [rows, cols].iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
    let ones = |n| f32s(vec![1.5; n]);
    let model = tensors(&[
        ("s.weight_mask", Dtype::I64, &[2, 1], masks()),
        ("s.weight_values", Dtype::F32, &[14], ones(14)),
        ("s.weight_shape", Dtype::I64, &[2], shape(2, 10)),
        ("c.weight_mask", Dtype::I64, &[2, 1], masks()),
        ("c.weight_values_packed", Dtype::I32, &[2], vec![0x5a; 8]),
        ("c.weight_values_scale", Dtype::F32, &[2, 2], ones(4)),
        ("c.weight_shape", Dtype::I64, &[2], shape(2, 10)),
        ("m.weight_term0_packed", Dtype::I32, &[2, 1], vec![0x5a; 8]),
        ("m.weight_term0_scale", Dtype::F32, &[2, 2], ones(4)),
        ("m.weight_term0_shape", Dtype::I64, &[2], shape(2, 8)),
        ("m.weight_term1_up", Dtype::F32, &[2, 1], ones(2)),
        ("m.weight_term1_down", Dtype::F32, &[1, 8], ones(8)),
    ]);
    seeds.push(("safetensors", "forms", joined(&[forms.to_string().as_bytes(), &model])));

    let entry = |means: &[f32], counts: &[f32]| Importance { means: means.to_vec(), counts: counts.to_vec() };
    let imatrix = Imatrix {
        entries: [
            ("blk.0.attn_q.weight".to_owned(), entry(&[1.0, 2.0, 0.5, 4.0], &[1024.0])),
            ("blk.1.ffn_up_exps.weight".to_owned(), entry(&[1.0, 2.0, 3.0, 4.0], &[8.0, 16.0])),
        ]
        .into(),
        datasets: vec!["wiki.txt".to_owned()],
        chunks: 2,
        chunk_size: 512,
    };
    seeds.push(("imatrix", "new", imatrix.to_gguf()));
    seeds.push(("imatrix", "old", imatrix.to_dat()));

    let spec = tiny();
    for (name, recipe) in [("quantize", "quantize:4"), ("prune", "magnitude:0.5"), ("sum", "quantize:3,svd:2")] {
        let (method, settings) = recipe.parse::<Recipe>().unwrap().method(false);
        let mut plan = Plan::uniform(&spec, method, &settings, &Scope::default());
        plan.resolve(&spec, &RandomWeights::new(&spec, 3)).unwrap();
        seeds.push(("plan", name, plan.to_json().into_bytes()));
    }
}

fn runs(seeds: &mut Vec<Seed>) {
    let folder = tempfile::tempdir().unwrap();
    let read = |path: &Path| fs::read(path).unwrap();
    let place = folder.path().join("checkpoint-3");
    let store = ParameterStore::initialize(&tiny(), 0.1, 1, &Storage::QUARTER);
    let state = State { step: 3, best_loss: Some(1.25), ..State::begin(&Storage::QUARTER, 3) };
    checkpoint::save(&place, &store, &state, &|_| Ok(())).unwrap();
    let files = ["trainer_state.json", "checksums.json", "optimizer.safetensors"].map(|name| read(&place.join(name)));
    seeds.push(("checkpoint", "tiny", joined(&[&files[0], &files[1], &files[2]])));

    let sums = folder.path().join("sums");
    fs::create_dir(&sums).unwrap();
    fs::write(sums.join("config.json"), "{}").unwrap();
    fourfold_disk::write_checksums(&sums).unwrap();
    seeds.push(("checksums", "one", read(&sums.join("checksums.json"))));

    let mut identity = Identity::default();
    identity.set("--bits", 4);
    let options = WriteOptions { identity, ..WriteOptions::default() };
    let out = folder.path().join("out");
    let mut writer = SafetensorsWriter::create(&out, ModelFiles::config(json!({})), options).unwrap();
    let names = ["a", "b"].map(|name| (name.to_owned(), Form::Dense { shape: vec![2, 4], dtype: DType::F32 }));
    writer.begin(&names).unwrap();
    let values: Vec<f32> = (0..8).map(|i| i as f32).collect();
    writer.write("a", &Weight::Dense(Dense::from_f32(vec![2, 4], values))).unwrap();
    drop(writer);
    seeds.push(("journal", "one", read(&folder.path().join("out.partial/fourfold-journal.jsonl"))));

    let words = |words: &[u32]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    let codes = (0..15u16).flat_map(|c| (c * 999).to_le_bytes()).collect();
    let saved = tensors(&[
        ("input_ids", Dtype::U32, &[4], words(&[1, 2, 3, 4])),
        ("windows", Dtype::U32, &[1, 2], words(&[4, 1])),
        ("codes", Dtype::U16, &[3, 5], codes),
        ("range", Dtype::F32, &[3, 2], f32s([-3.0, 0.1, -2.0, 0.1, -1.0, 0.1])),
    ]);
    seeds.push(("saved_logits", "three", saved));
}

fn data(seeds: &mut Vec<Seed>) {
    let lines = "{\"text\": \"The fox's 3 caf\u{e9}s\"}\n{\"prompt\": \"1+1=\", \"completion\": \"2\"}\n\
        {\"messages\": [{\"role\": \"user\", \"content\": \"a?\"}, {\"role\": \"assistant\", \"content\": \"b\", \"thinking\": \"c\"}]}\n\
        {\"conversations\": [{\"from\": \"human\", \"value\": \"a\"}, {\"from\": \"gpt\", \"value\": \"b\"}]}\n\
        {\"instruction\": \"i\", \"input\": \"\", \"output\": \"o\"}\n{\"text\": \"x\", \"label\": 2}\n";
    seeds.push(("jsonl", "kinds", lines.as_bytes().to_vec()));
    let list: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    seeds.push(("json", "list", json!(list).to_string().into_bytes()));
    seeds.push(("json", "one", br#"{"text": "a"}"#.to_vec()));
    seeds.push(("csv", "quoted", "text,label\r\n\"a, \"\"b\"\"\",1\r\n\"two\nlines\",0\r\n".as_bytes().to_vec()));
    seeds.push(("csv", "prompts", b"prompt,completion\n1+1=,2\na,b\n".to_vec()));
    seeds.push(("tsv", "named", b"text\tlabel\na b\t1\nc d\t0\n".to_vec()));
    seeds.push((
        "text",
        "plain",
        "\u{feff}The fox.\r\n\r\nAnother \u{6771}\u{4eac} text,\n\tindented.\n".as_bytes().to_vec(),
    ));
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    packer.write_all(lines.as_bytes()).unwrap();
    seeds.push(("gzip", "lines", packer.finish().unwrap()));
    let packed = ruzstd::encoding::compress_to_vec(lines.as_bytes(), ruzstd::encoding::CompressionLevel::Fastest);
    seeds.push(("zstandard", "lines", packed));
    let frame = [&[0x28, 0xb5, 0x2f, 0xfd, 0x20, 14, 0x71, 0, 0][..], b"{\"text\": \"a\"}\n"].concat();
    seeds.push(("zstandard", "frames", [&frame[..], &[0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 9, 9], &frame].concat()));
    let images = [0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
    seeds.push(("idx_images", "two", images.to_vec()));
    seeds.push(("idx_labels", "two", vec![0, 0, 8, 1, 0, 0, 0, 2, 3, 9]));
    let picture = image::RgbImage::from_fn(5, 4, |x, y| image::Rgb([(x * 40) as u8, (y * 50) as u8, 7]));
    for (parser, format) in [("png", image::ImageFormat::Png), ("jpeg", image::ImageFormat::Jpeg)] {
        let mut bytes = std::io::Cursor::new(Vec::new());
        picture.write_to(&mut bytes, format).unwrap();
        seeds.push((parser, "picture", bytes.into_inner()));
    }
}
