//! A checkpoint's tensors are checked by every command before anything is made of them: names, shapes, types, numbers.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Folder, Run, config, folder, fourfold, model, text, weights};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

const WEIGHTS: &str = "model.safetensors";

/// A tensor on its way through a change: name, type, shape, bytes.
type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

fn read(file: &Path) -> Vec<Tensor> {
    let bytes = fs::read(file).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.tensors().into_iter();
    let mut all: Vec<Tensor> =
        tensors.map(|(name, t)| (name, t.dtype(), t.shape().to_vec(), t.data().to_vec())).collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

fn write(file: &Path, tensors: &[Tensor]) {
    let views = tensors.iter().map(|(n, d, s, b)| (n.clone(), TensorView::new(*d, s.clone(), b).unwrap()));
    fs::write(file, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn find<'a>(tensors: &'a mut [Tensor], name: &str) -> &'a mut Tensor {
    tensors.iter_mut().find(|t| t.0 == name).unwrap()
}

/// Gives a tensor another shape, with bytes to match.
fn reshape(name: &'static str, shape: &'static [usize]) -> impl Fn(&mut Vec<Tensor>) {
    move |tensors| {
        let tensor = find(tensors, name);
        tensor.2 = shape.to_vec();
        tensor.3.resize(2 * shape.iter().product::<usize>(), 60);
    }
}

/// The tiny model with changes to its tensors, and a sound one beside it.
fn changed(change: impl Fn(&mut Vec<Tensor>)) -> (Folder, PathBuf, PathBuf) {
    let place = folder();
    let (sound, spoiled) = (place.path().join("sound"), place.path().join("spoiled"));
    model(&sound);
    model(&spoiled);
    let mut tensors = read(&spoiled.join(WEIGHTS));
    change(&mut tensors);
    write(&spoiled.join(WEIGHTS), &tensors);
    (place, sound, spoiled)
}

/// Every command that reads a model's weights, on `spoiled`.
fn commands(place: &Path, sound: &Path, spoiled: &Path) -> Vec<Run> {
    let text = text(place, 400);
    let (out, trained) = (place.join("out"), place.join("trained"));
    let train = |model: &Path, more: &[&str]| {
        let mut list = args!["train", "--model", model, "--data", &text, "--output", &trained].to_vec();
        list.extend(["--steps", "1", "--batch-size", "1", "--context", "32"].map(Into::into));
        list.extend(more.iter().map(|word| word.into()));
        fourfold(list)
    };
    let teacher = spoiled.display().to_string();
    let runs = vec![
        fourfold(args!["generate", spoiled, "-p", "the", "-n", "2"]),
        fourfold(args!["chat", spoiled, "-p", "the", "-n", "2"]),
        fourfold(args!["eval", spoiled, "--text", &text, "--context", "32", "--chunks", "1"]),
        fourfold(args!["bench", spoiled, "-p", "2", "-n", "2", "-r", "1"]),
        fourfold(args!["compress", spoiled, &out, "--bits", "4"]),
        fourfold(args!["compare", sound, spoiled]),
        train(spoiled, &[]),
        train(spoiled, &["--lora-rank", "2"]),
        train(sound, &["--teacher", &teacher]),
    ];
    assert!(!out.exists() && !trained.join("final").exists());
    runs
}

/// Every command refuses it with these words; with `listing` those too that read no numbers.
fn refused(change: impl Fn(&mut Vec<Tensor>), listing: bool, words: &[&str]) {
    let (place, sound, spoiled) = changed(change);
    let mut runs = commands(place.path(), &sound, &spoiled);
    if listing {
        runs.push(fourfold(args!["inspect", &spoiled]));
        runs.push(fourfold(args!["plan", &spoiled]));
    }
    for run in &runs {
        for word in words {
            assert!(run.error().contains(word), "{word:?} is not in: {}", run.stderr);
        }
    }
}

#[test]
fn shapes_that_are_not_the_configurations_are_refused() {
    const UP: &str = "model.layers.0.mlp.up_proj.weight";
    for shape in [&[129, 64][..], &[127, 64], &[64, 128], &[128, 65], &[8192], &[128, 64, 1]] {
        refused(reshape(UP, shape), true, &[UP, "[128, 64]", &format!("{shape:?}")]);
    }
    refused(reshape("model.norm.weight", &[65]), true, &["model.norm.weight", "[64]", "[65]"]);
    refused(reshape("model.embed_tokens.weight", &[261, 64]), true, &["model.embed_tokens.weight", "[261, 64]"]);
}

#[test]
fn types_and_names_that_are_no_weights_are_refused() {
    const Q: &str = "model.layers.1.self_attn.q_proj.weight";
    refused(|tensors| find(tensors, Q).1 = Dtype::I16, true, &[Q, "I16", "[64, 64]"]);
    refused(|tensors| tensors.retain(|t| t.0 != Q), true, &["no tensor named", Q]);
    let prefixed = |tensors: &mut Vec<Tensor>| tensors.iter_mut().for_each(|t| t.0 = format!("module.{}", t.0));
    refused(prefixed, true, &["model.embed_tokens.weight", "module.…", "DataParallel"]);
    // Some with, some without.
    let half = |tensors: &mut Vec<Tensor>| {
        let late = tensors.iter_mut().filter(|t| t.0.contains("layers.1."));
        late.for_each(|t| t.0 = format!("_orig_mod.{}", t.0));
    };
    refused(half, true, &["model.layers.1.", "_orig_mod.…", "torch.compile"]);
    let gptq = |tensors: &mut Vec<Tensor>| find(tensors, Q).0 = Q.replace("weight", "qweight");
    refused(gptq, true, &[Q, "qweight", "GPTQ"]);
    let both = |tensors: &mut Vec<Tensor>| {
        let mut copy = find(tensors, Q).clone();
        copy.0 = Q.strip_prefix("model.").unwrap().to_owned();
        tensors.push(copy);
    };
    refused(both, true, &[Q, "twice"]);
}

#[test]
fn infinities_and_nan_are_refused_wherever_weights_are_read() {
    for (name, value) in [("model.layers.1.mlp.down_proj.weight", 0x7fc0u16), ("model.norm.weight", 0xff80)] {
        let spoil = |tensors: &mut Vec<Tensor>| find(tensors, name).3[10..12].copy_from_slice(&value.to_le_bytes());
        refused(spoil, false, &[name, "element [0, 5] is", if value == 0x7fc0 { "NaN" } else { "-inf" }]);
    }
}

/// What nothing reads is no error, whatever it is, and is said.
#[test]
fn tensors_that_no_layer_reads_are_counted() {
    let (place, sound, spoiled) = changed(|tensors| {
        tensors.push(("freqs_cis".into(), Dtype::C64, vec![2, 2], vec![0; 32]));
        tensors.push(("model.layers.2.mlp.up_proj.weight".into(), Dtype::BF16, vec![3], vec![1; 6]));
        tensors.push(("model.layers.0.self_attn.rotary_emb.inv_freq".into(), Dtype::I64, vec![1], vec![0; 8]));
    });
    for run in commands_that_succeed(place.path(), &sound, &spoiled) {
        run.succeeded();
        assert!(run.stderr.contains("no layer reads 2 of its tensors: "), "{}", run.stderr);
    }
}

fn commands_that_succeed(place: &Path, sound: &Path, spoiled: &Path) -> Vec<Run> {
    let text = text(place, 400);
    let (out, trained) = (place.join("out"), place.join("trained"));
    vec![
        fourfold(args!["generate", spoiled, "-p", "the", "-n", "2"]),
        fourfold(args!["compress", spoiled, &out, "--bits", "4"]),
        fourfold(args!["compare", sound, spoiled]),
        fourfold(
            ["train", "--steps", "1", "--batch-size", "1", "--context", "32", "--model"]
                .map(std::ffi::OsString::from)
                .into_iter()
                .chain(args![spoiled, "--data", &text, "--output", &trained]),
        ),
    ]
}

#[test]
fn names_of_a_bare_base_model_are_read() {
    let (place, sound, bare) = changed(|tensors| {
        tensors.iter_mut().for_each(|t| t.0 = t.0.strip_prefix("model.").unwrap_or(&t.0).to_owned());
    });
    let text = text(place.path(), 400);
    let loss = |model: &Path| fourfold(args!["eval", model, "--text", &text, "--context", "32", "--json"]).json();
    assert_eq!(loss(&sound)["perplexity"], loss(&bare)["perplexity"]);
    // What is written has the names of the whole model.
    let out = place.path().join("out");
    fourfold(args!["compress", &bare, &out, "--bits", "8"]).succeeded();
    assert!(read(&out.join(WEIGHTS)).iter().any(|t| t.0.starts_with("model.layers.0.mlp.up_proj.weight")));
}

/// A tied configuration over a checkpoint with an output projection of its own: what is stored counts, and all that is
/// written says so.
#[test]
fn a_tied_model_with_a_head_of_its_own_keeps_it() {
    let place = folder();
    let (tied, untied) = (place.path().join("tied"), place.path().join("untied"));
    for (dir, tie) in [(&tied, true), (&untied, false)] {
        model(dir);
        let mut config = config();
        config["tie_word_embeddings"] = json!(false);
        fs::write(dir.join(WEIGHTS), weights(&config)).unwrap();
        config["tie_word_embeddings"] = json!(tie);
        fs::write(dir.join("config.json"), config.to_string()).unwrap();
    }
    let text = text(place.path(), 400);
    let eval = |model: &Path| fourfold(args!["eval", model, "--text", &text, "--context", "32", "--json"]);
    let expected = eval(&untied).json()["perplexity"].clone();
    let run = eval(&tied);
    assert_eq!(run.json()["perplexity"], expected);
    assert!(run.stderr.contains("lm_head.weight"), "{}", run.stderr);
    let is_untied = |dir: &Path| {
        let config: Value = serde_json::from_str(&fs::read_to_string(dir.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["tie_word_embeddings"], false, "{}", dir.display());
        assert!(read(&dir.join(WEIGHTS)).iter().any(|t| t.0.starts_with("lm_head.weight")), "{}", dir.display());
    };
    let (out, trained) = (place.path().join("out"), place.path().join("trained"));
    fourfold(args!["compress", &tied, &out, "--bits", "8"]).succeeded();
    is_untied(&out);
    let mut list = args!["train", "--model", &tied, "--data", &text, "--output", &trained].to_vec();
    list.extend(["--steps", "1", "--batch-size", "1", "--context", "32"].map(Into::into));
    fourfold(list).succeeded();
    is_untied(&trained.join("final"));

    // A copy of the embedding is no projection of its own, and is passed over without a word.
    let mut tensors = read(&tied.join(WEIGHTS));
    let (_, dtype, shape, bytes) = find(&mut tensors, "model.embed_tokens.weight").clone();
    *find(&mut tensors, "lm_head.weight") = ("lm_head.weight".into(), dtype, shape, bytes);
    write(&tied.join(WEIGHTS), &tensors);
    let run = eval(&tied);
    assert_ne!(run.json()["perplexity"], expected);
    assert!(!run.stderr.contains("lm_head"), "{}", run.stderr);
    // In its place alone it is the embedding.
    let perplexity = run.json()["perplexity"].clone();
    tensors.retain(|t| t.0 != "model.embed_tokens.weight");
    write(&tied.join(WEIGHTS), &tensors);
    assert_eq!(eval(&tied).json()["perplexity"], perplexity);
    // Of another shape it is an error.
    find(&mut tensors, "lm_head.weight").2 = vec![130, 128];
    write(&tied.join(WEIGHTS), &tensors);
    assert!(eval(&tied).error().contains("[130, 128]"));
}

#[test]
fn convolutional_networks_are_checked_alike() {
    let place = folder();
    let dir = place.path().join("net");
    fs::create_dir(&dir).unwrap();
    let layers = json!([
        {"type": "conv2d", "out_channels": 2, "kernel_size": 3, "padding": 1}, {"type": "relu"},
        {"type": "flatten"}, {"type": "linear", "out_features": 3},
    ]);
    let config =
        json!({"architectures": ["ConvNet"], "model_type": "convnet", "image_size": [1, 4, 4], "layers": layers});
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let float = |shape: &[usize]| vec![63; 4 * shape.iter().product::<usize>()];
    for (name, shape, words) in [
        ("0.weight", vec![2, 1, 3, 4], "[2, 1, 3, 3]"),
        ("0.weight", vec![1, 2, 3, 3], "[2, 1, 3, 3]"),
        ("0.bias", vec![3], "[2]"),
        ("3.weight", vec![32, 3], "[3, 32]"),
        ("3.bias", vec![2], "[3]"),
    ] {
        let sound =
            [("0.weight", vec![2, 1, 3, 3]), ("0.bias", vec![2]), ("3.weight", vec![3, 32]), ("3.bias", vec![3])];
        let tensors: Vec<Tensor> = sound
            .into_iter()
            .map(|(n, s)| if n == name { (n, shape.clone()) } else { (n, s) })
            .map(|(n, s)| (n.to_owned(), Dtype::F32, s.clone(), float(&s)))
            .collect();
        write(&dir.join(WEIGHTS), &tensors);
        let (out, data) = (place.path().join("out"), place.path().join("images"));
        for run in [
            fourfold(args!["compress", &dir, &out, "--bits", "4"]),
            fourfold(args!["eval", &dir, "--data", place.path()]),
            fourfold(args!["train", "--model", &dir, "--data", &data, "--output", &out, "--steps", "1"]),
            fourfold(args!["plan", &dir]),
        ] {
            assert!(run.error().contains(name) && run.error().contains(words), "{words}: {}", run.stderr);
        }
    }
}
