//! The undamaged inputs of every kind, made by the program itself from a few texts, and the commands that read them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::process::{Limits, Outcome, run};

/// A command over some inputs.
pub struct Case {
    pub name: &'static str,
    /// The directory with its inputs; it runs in a copy.
    pub inputs: PathBuf,
    pub arguments: Vec<String>,
    /// What it writes, which is whole or not there.
    pub output: Option<&'static str>,
    /// What is added when the same command is given again after a kill.
    pub again: &'static [&'static str],
    /// Whether inputs have something under the output's name already.
    pub keeps_output: bool,
}

/// All cases.
pub struct World {
    pub cases: Vec<Case>,
}

impl World {
    /// Makes the inputs below `place`.
    pub fn make(program: &Path, root: &Path, place: &Path) -> Result<Self> {
        let base = place.join("base");
        fs::create_dir_all(&base)?;
        texts(&base)?;
        images(&base.join("images"))?;
        let golden = root.join("crates/fourfold-models/tests/golden/deepseek_v3_moe");
        for file in ["config.json", "model.safetensors"] {
            copy(&golden.join(file), &base.join("moe").join(file))?;
        }
        fs::copy(root.join("fuzz/seeds/gguf/deepseek.gguf"), base.join("model.gguf"))?;
        let steps = [
            "train --model-config config.json --tokenizer tokenizer.json --data data.jsonl --output first --steps 2 --context 16 \
             --batch-size 2 --save-every 1",
            "train --model-config convnet.json --data images --output net-run --steps 2 --batch-size 4",
            "compress first/final packed --bits 4",
            "compress first/final tensors --bits 4 --format compressed-tensors",
            "compress first/final --bits 4 --write-plan plan.json",
            "train --model first/final --data chat.jsonl --output lora --lora-rank 2 --steps 1 --context 32 --batch-size 2",
            "eval first/final --text text.txt --context 32 --chunks 2 --save-logits saved.logits",
        ];
        for step in steps {
            let words: Vec<String> = step.split_whitespace().map(str::to_owned).collect();
            let ended = run(program, &words, &base, &Limits::default(), &[])?;
            ensure!(ended.outcome() == Outcome::Succeeded, "fourfold {step}\n{}", ended.tail());
        }
        let tokenizer_config = json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template":
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"});
        for model in ["first/final", "packed", "tensors"] {
            write(&base.join(model).join("tokenizer_config.json"), &tokenizer_config)?;
            write(
                &base.join(model).join("generation_config.json"),
                &json!({"temperature": 0.7, "top_k": 5, "eos_token_id": 1}),
            )?;
        }
        let mut world = Self { cases: Vec::new() };
        let mut add = |name: &'static str,
                       inputs: &[(&str, &str)],
                       command: &str,
                       output: Option<&'static str>,
                       again: &'static [&'static str]|
         -> Result<()> {
            let dir = place.join("cases").join(name);
            for (from, to) in inputs {
                copy(&base.join(from), &dir.join(to)).with_context(|| format!("{name}: {from}"))?;
            }
            let arguments = command.split_whitespace().map(|word| word.replace('~', " ")).collect();
            let keeps_output = output.is_some_and(|o| dir.join(o).exists());
            world.cases.push(Case { name, inputs: dir, arguments, output, again, keeps_output });
            Ok(())
        };
        let model = ("first/final", "m");
        let text = ("text.txt", "text.txt");
        add("inspect", &[model], "inspect m -t 2", None, &[])?;
        add("generate", &[model], "generate m -p the~fox -n 3 -t 2", None, &[])?;
        add("generate-packed", &[("packed", "m")], "generate m -p the -n 2 -t 2", None, &[])?;
        add("generate-compressed-tensors", &[("tensors", "m")], "generate m -p the -n 2 -t 2", None, &[])?;
        add("generate-gguf", &[("model.gguf", "m.gguf")], "generate m.gguf -p a -n 2 -t 2", None, &[])?;
        add("inspect-gguf", &[("model.gguf", "m.gguf")], "inspect m.gguf -t 2", None, &[])?;
        add("generate-adapter", &[model, ("lora/final", "a")], "generate m --adapter a -p the -n 2 -t 2", None, &[])?;
        add("chat", &[model], "chat m -p hello -n 2 -t 2 -q", None, &[])?;
        add("eval", &[model, text], "eval m --text text.txt --context 32 --chunks 2 -t 2", None, &[])?;
        let load = "eval m --text text.txt --context 32 --chunks 2 --load-logits saved.logits -t 2";
        add("eval-saved", &[model, text, ("saved.logits", "saved.logits")], load, None, &[])?;
        let images = ("images", "images");
        add("eval-images", &[("net-run/final", "m"), images], "eval m --data images -t 2", None, &[])?;
        let train = "train --model-config config.json --data images --output run --steps 2 --batch-size 4 -t 2";
        add("train-images", &[("convnet.json", "config.json"), images], train, Some("run/final"), &["--resume"])?;
        add("compress", &[model], "compress m out --bits 4 -t 2", Some("out"), &[])?;
        add("compress-moe", &[("moe", "m")], "compress m out --bits 3 --group-size 16 -t 2", Some("out"), &[])?;
        let plan = "compress m out --plan plan.json -t 2";
        add("compress-plan", &[model, ("plan.json", "plan.json")], plan, Some("out"), &[])?;
        let gptq =
            "compress m out --bits 4 --calibration text.txt --calibration-samples 2 --calibration-length 16 -t 2";
        add("compress-calibrated", &[model, text], gptq, Some("out"), &[])?;
        let net = "compress m out --method prune:0.5,quantize:8 -t 2";
        add("compress-images", &[("net-run/final", "m")], net, Some("out"), &[])?;
        add("merge", &[model, ("lora/final", "a")], "merge m a out -t 2", Some("out"), &[])?;
        add("merge-packed", &[("packed", "m"), ("lora/final", "a")], "merge m a out -t 2", Some("out"), &[])?;
        add("plan", &[("config.json", "config.json")], "plan config.json --memory 1GB", None, &[])?;
        add("plan-images", &[("convnet.json", "config.json")], "plan config.json --memory 1GB", None, &[])?;
        let new = [("config.json", "config.json"), ("tokenizer.json", "tokenizer.json"), ("data.jsonl", "data.jsonl")];
        let train = "train --model-config config.json --tokenizer tokenizer.json --data data.jsonl --output run --steps 2 \
                     --context 16 --batch-size 2 --save-every 1 -t 2";
        add("train", &new, train, Some("run/final"), &["--resume"])?;
        let toml = "train --config run.toml -t 2";
        add("train-toml", &[&new[..], &[("run.toml", "run.toml")]].concat(), toml, Some("run/final"), &["--resume"])?;
        let chat = "train --model m --data chat.jsonl --output run --steps 1 --context 32 --batch-size 2 -t 2";
        add("train-chat", &[model, ("chat.jsonl", "chat.jsonl")], chat, Some("run/final"), &["--resume"])?;
        let lora =
            "train --model m --data data.jsonl --output run --lora-rank 2 --steps 1 --context 16 --batch-size 2 -t 2";
        add("train-lora", &[("packed", "m"), ("data.jsonl", "data.jsonl")], lora, Some("run/final"), &["--resume"])?;
        let classes =
            "train --model m --task classification --data labelled.jsonl --output run --steps 1 --batch-size 2 -t 2";
        add(
            "train-classes",
            &[model, ("labelled.jsonl", "labelled.jsonl")],
            classes,
            Some("run/final"),
            &["--resume"],
        )?;
        let resume = "train --model-config config.json --tokenizer tokenizer.json --data data.jsonl --output first --steps 3 \
                      --context 16 --batch-size 2 --save-every 1 --resume -t 2";
        add("resume", &[&new[..], &[("first", "first")]].concat(), resume, None, &[])?;
        Ok(world)
    }
}

/// Configurations, tokenizer and data.
fn texts(base: &Path) -> Result<()> {
    let config = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 260, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "eos_token_id": 1, "bos_token_id": 0
    });
    write(&base.join("config.json"), &config)?;
    write(&base.join("tokenizer.json"), &tokenizer())?;
    let convnet = json!({
        "architectures": ["ConvNet"], "model_type": "convnet", "image_size": [1, 8, 8],
        "normalize": {"mean": [0.3], "std": [0.4]},
        "layers": [
            {"type": "conv2d", "out_channels": 8, "kernel_size": 3, "padding": 1, "bias": false},
            {"type": "batch_norm"}, {"type": "relu"},
            {"type": "conv2d", "out_channels": 8, "kernel_size": 3, "stride": 2, "padding": 1},
            {"type": "relu"}, {"type": "adaptive_avg_pool", "output_size": 1}, {"type": "flatten"},
            {"type": "linear", "out_features": 4}
        ]
    });
    write(&base.join("convnet.json"), &convnet)?;
    let names = ["a", "b", "c"];
    let lines = |line: &dyn Fn(usize) -> Value| (0..24).map(|i| format!("{}\n", line(i))).collect::<String>();
    fs::write(base.join("data.jsonl"), lines(&|i| json!({"text": format!("line {i}: the fox has {} things", i * i)})))?;
    fs::write(
        base.join("chat.jsonl"),
        lines(
            &|i| json!({"messages": [{"role": "user", "content": format!("{i}?")}, {"role": "assistant", "content": "yes"}]}),
        ),
    )?;
    fs::write(base.join("labelled.jsonl"), lines(&|i| json!({"text": format!("text {i}"), "label": names[i % 3]})))?;
    fs::write(base.join("text.txt"), "the quick brown fox jumps over the lazy dog; pack my box.\n".repeat(30))?;
    fs::write(
        base.join("run.toml"),
        "model_config = \"config.json\"\ntokenizer = \"tokenizer.json\"\ndata = [\"data.jsonl\"]\noutput = \"run\"\nsteps = 2\n\
         context = 16\nbatch_size = 2\nlearning_rate = 1e-3\npreset = \"quarter\"\nbeta2 = 0.95\nseed = 3\nkeep = 1\n",
    )?;
    Ok(())
}

/// A byte-level tokenizer with two merges.
fn tokenizer() -> Value {
    let mut vocab = serde_json::Map::new();
    let mut add = |token: String| _ = vocab.insert(token, json!(vocab.len()));
    add("<s>".into());
    add("</s>".into());
    let printable = |b: &u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    for byte in 0..=255_u32 {
        let nth = (0..byte).filter(|b| !printable(b)).count() as u32;
        let code = if printable(&byte) { byte } else { 256 + nth };
        add(char::from_u32(code).unwrap_or('?').to_string());
    }
    add("th".into());
    add("the".into());
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false})
    };
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special(0, "<s>"), special(1, "</s>")],
        "normalizer": null, "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": ["t h", "th e"]}
    })
}

/// Idx files of 8 x 8 pixels and four classes.
fn images(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    for (part, count) in [("train", 24u32), ("t10k", 8)] {
        let idx = |sizes: &[u32], bytes: Vec<u8>| {
            let head = [0, 0, 8, sizes.len() as u8].into_iter().chain(sizes.iter().flat_map(|s| s.to_be_bytes()));
            head.chain(bytes).collect::<Vec<u8>>()
        };
        let pixels = (0..count * 64).map(|i| (i * 37 % 251) as u8).collect();
        fs::write(folder.join(format!("{part}-images-idx3-ubyte")), idx(&[count, 8, 8], pixels))?;
        let labels = (0..count).map(|i| (i % 4) as u8).collect();
        fs::write(folder.join(format!("{part}-labels-idx1-ubyte")), idx(&[count], labels))?;
    }
    Ok(())
}

fn write(file: &Path, value: &Value) -> Result<()> {
    fs::create_dir_all(file.parent().context("a file lies in a folder")?)?;
    Ok(fs::write(file, value.to_string())?)
}

/// Copies a file or a directory.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    if from.is_dir() {
        fs::create_dir_all(to)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            copy(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    fs::create_dir_all(to.parent().context("a file lies in a folder")?)?;
    fs::copy(from, to).with_context(|| from.display().to_string())?;
    Ok(())
}

/// Every plain file below a directory, in the order of their names.
pub fn files(place: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![place.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            match entry.file_type()? {
                kind if kind.is_dir() => folders.push(entry.path()),
                kind if kind.is_file() => found.push(entry.path()),
                _ => {}
            }
        }
    }
    found.sort();
    Ok(found)
}
