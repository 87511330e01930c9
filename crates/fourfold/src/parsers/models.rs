//! Readers of a model's files.

use std::path::Path;
use std::sync::OnceLock;

use fourfold_compress::Plan;
use fourfold_formats::gguf::Arch;
use fourfold_formats::gguf::imatrix::Imatrix;
use fourfold_formats::safetensors::Index;
use fourfold_formats::{Access, Checkpoint, OpenOptions, hub, open_with};
use fourfold_infer::{Sampler, SamplerSettings, generation_remarks};
use fourfold_models::testing::RandomWeights;
use fourfold_models::{ConvNetSpec, ModelSpec, config_remarks, spec_from_config};
use fourfold_tensor::Weight;
use fourfold_train::checkpoint::save_weights;
use fourfold_train::image_memory::image_memory;
use fourfold_train::memory::{Work, train_memory};
use fourfold_train::recipe::Recipe;
use fourfold_train::store::ParameterStore;
use serde_json::{Value, json};

use super::{files, put, texts};
use crate::gguf::describe as gguf_metadata;
use crate::model::adaptable;
use crate::tokenizer::TokenizerText;

/// The configuration of the smallest model.
pub(super) fn tiny_config() -> Value {
    json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 8,
        "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true
    })
}

/// What it says.
pub(super) fn tiny() -> Option<&'static ModelSpec> {
    static SPEC: OnceLock<Option<ModelSpec>> = OnceLock::new();
    SPEC.get_or_init(|| spec_from_config(&tiny_config()).ok()).as_ref()
}

/// Loads every tensor of a checkpoint; whether any could be.
fn load_all(checkpoint: &Checkpoint) -> bool {
    let mut any = false;
    for tensor in checkpoint.weights.tensors() {
        let Ok(weight) = checkpoint.weights.load(&tensor.name) else { continue };
        assert_eq!(weight.shape(), tensor.shape, "{}", tensor.name);
        if let Weight::Quantized(quantized) = &weight {
            assert_eq!(quantized.validate().map_err(|e| e.to_string()), Ok(()), "{}", tensor.name);
        }
        assert_eq!(weight.to_f32().len() as u64, tensor.elements(), "{}", tensor.name);
        any = true;
    }
    any
}

/// A GGUF file, its tensors and its tokenizer.
pub(super) fn gguf(input: &[u8], dir: &Path) -> bool {
    let read = || {
        put(dir, "model.gguf", input)?;
        let checkpoint = fourfold_formats::open(&dir.join("model.gguf")).ok()?;
        let _ = spec_from_config(&checkpoint.config);
        if let Ok(text) = TokenizerText::of(&checkpoint) {
            texts::use_tokenizer(&text);
        }
        load_all(&checkpoint).then_some(())
    };
    read().is_some()
}

/// `config.json` and `model.safetensors`: plain, FP8, compressed-tensors, this program's own forms.
pub(super) fn safetensors(input: &[u8], dir: &Path) -> bool {
    let [config, model] = files(input);
    let read = || {
        put(dir, "config.json", config)?;
        put(dir, "model.safetensors", model)?;
        let access = if input.len().is_multiple_of(2) { Access::Read } else { Access::Map };
        let checkpoint = open_with(dir, OpenOptions { access }).ok()?;
        load_all(&checkpoint).then_some(())
    };
    read().is_some()
}

/// An importance matrix, as GGUF or in the older form.
pub(super) fn imatrix(input: &[u8], _: &Path) -> bool {
    let Ok(found) = Imatrix::parse(input) else { return false };
    let _ = found.of(Arch::Llama, "model.layers.0.self_attn.q_proj.weight", 8);
    let _ = found.of(Arch::DeepSeek2, "model.layers.0.mlp.experts.1.up_proj.weight", 8);
    let (new, old) = (found.to_gguf(), found.to_dat());
    new.len() + old.len() > 0
}

/// `model.safetensors.index.json`.
pub(super) fn index(input: &[u8], dir: &Path) -> bool {
    let read = || {
        put(dir, "model.safetensors.index.json", input)?;
        let index = Index::read(&dir.join("model.safetensors.index.json")).ok()?;
        (!index.shards().is_empty()).then_some(())
    };
    read().is_some()
}

/// `config.json` of a language model or a network that reads images, and what is computed from it alone.
pub(super) fn config(input: &[u8], _: &Path) -> bool {
    let read = || {
        let config: Value = serde_json::from_slice(input).ok()?;
        if ConvNetSpec::is_described_by(&config) {
            let spec = ConvNetSpec::from_config(&config).ok()?;
            let _ = image_memory(&spec, &Recipe::QUARTER, 8, 1);
            return Some(());
        }
        let spec = spec_from_config(&config).ok()?;
        config_remarks(&config).ok()?;
        let _ = adaptable(&spec);
        let _ = gguf_metadata(&spec, "model", 0);
        let tokens = spec.max_positions.clamp(2, 256) as u64;
        let _ = train_memory(&spec, &Recipe::QUARTER, &Work::sequences(8, tokens, 1, &Recipe::QUARTER));
        Some(())
    };
    read().is_some()
}

/// `generation_config.json`, and a token drawn as it says.
pub(super) fn generation_config(input: &[u8], _: &Path) -> bool {
    let read = || {
        let config: Value = serde_json::from_slice(input).ok()?;
        generation_remarks(&config).ok()?;
        let settings = SamplerSettings::from_generation_config(Some(&config));
        let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.7).sin() * 4.0).collect();
        Sampler::new(SamplerSettings { seed: 1, ..settings }).sample(&logits, &[1, 2, 3, 2]).ok()
    };
    read().is_some()
}

/// `adapter_config.json` and `adapter_model.safetensors`, over the smallest model.
pub(super) fn adapter(input: &[u8], dir: &Path) -> bool {
    let [config, model] = files(input);
    let read = || {
        let (base, adapter, spec) = (dir.join("base"), dir.join("adapter"), tiny()?);
        if !base.join("model.safetensors").exists() {
            std::fs::create_dir_all(&base).ok()?;
            std::fs::create_dir_all(&adapter).ok()?;
            put(&base, "config.json", tiny_config().to_string().as_bytes())?;
            let store = ParameterStore::initialize(spec, 0.1, 1, &Recipe::QUARTER);
            save_weights(&base.join("model.safetensors"), &store).ok()?;
        }
        put(&adapter, "adapter_config.json", config)?;
        put(&adapter, "adapter_model.safetensors", model)?;
        let checkpoint = fourfold_formats::open(&base).ok()?;
        let adapted = fourfold_formats::with_adapter(checkpoint, &adapter, &adaptable(spec)).ok()?;
        load_all(&adapted).then_some(())
    };
    read().is_some()
}

/// A plan for the smallest model.
pub(super) fn plan(input: &[u8], _: &Path) -> bool {
    let read = || {
        let mut plan = Plan::from_json(std::str::from_utf8(input).ok()?).ok()?;
        let spec = tiny()?;
        let forms = plan.resolve(spec, &RandomWeights::new(spec, 3)).ok()?;
        fourfold_formats::writer::header_bytes(&forms, 5_000_000_000).ok()
    };
    read().is_some()
}

/// The hub's list of a revision's files.
pub(super) fn hub_files(input: &[u8], _: &Path) -> bool {
    hub::list_of_files(input).is_ok()
}
