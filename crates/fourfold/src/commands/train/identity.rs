//! What a run is: what decides what it learns, what may change when it goes on, and where it may write.

use std::path::{Path, PathBuf};

use anyhow::Result;
use fourfold_disk::{Identity, Inputs, Use, output_directory};
use fourfold_models::layers::LoraSpec;

use super::settings::{Settings, TeacherSettings};
use crate::context::Context;
use crate::{identity, model};

/// What a run writes in its output directory.
fn is_written(name: &str) -> bool {
    ["best", "final", ".fourfold", "metrics.jsonl"].contains(&name)
        || ["checkpoint-", "events.out.tfevents."].iter().any(|begin| name.starts_with(begin))
}

/// Refuses an output that would meet what the run reads; before any work.
pub(super) fn check_output(settings: &Settings) -> Result<()> {
    let named = |name: &str, path: &Path| (name.to_owned(), path.to_owned());
    let mut inputs: Vec<(String, PathBuf)> = Vec::new();
    inputs.extend(settings.model.iter().map(|path| named("--model", Path::new(path))));
    inputs.extend(settings.teacher.iter().map(|teacher| named("--teacher", Path::new(&teacher.model))));
    inputs.extend(settings.model_config.iter().map(|path| named("--model-config", path)));
    inputs.extend(settings.tokenizer.iter().map(|path| named("--tokenizer", path)));
    inputs.extend(settings.data.iter().map(|path| named("--data", path)));
    inputs.extend(settings.eval_data.iter().map(|path| named("--eval-data", path)));
    output_directory(&settings.output, &inputs, Use::Filled(&is_written))?;
    Ok(())
}

/// What a run must share with the checkpoint that it goes on from. Every setting is named here: one that is added is decided on before this
/// compiles. Preset and seed are told apart by the checkpoint itself.
pub(super) fn of(settings: &Settings, context: &Context) -> Result<Identity> {
    let Settings {
        model: base,
        model_config,
        tokenizer,
        task,
        data,
        eval_data,
        data_format,
        columns,
        label_columns,
        show_data: _,
        held_out,
        lora,
        lora_dropout,
        teacher,
        tune,
        output: _,
        recipe: _,
        momentum,
        gradient_accumulation,
        context: length,
        is_context_given: _,
        batch_size,
        steps: _,
        epochs: _,
        learning_rate,
        decay,
        min_learning_rate,
        warmup_steps,
        weight_decay,
        beta2,
        max_grad_norm,
        router_bias_update_rate,
        eval_every: _,
        save_every: _,
        keep: _,
        seed: _,
        factorize,
        flip,
        shift,
        resume: _,
        memory_check: _,
    } = settings;
    let mut inputs = Inputs::default();
    if let Some(name) = base {
        identity::model(&mut inputs, "--model", &model::locate(name, context)?)?;
    }
    if let Some(TeacherSettings { model: name, .. }) = teacher {
        identity::model(&mut inputs, "--teacher", &model::locate(name, context)?)?;
    }
    identity::files(&mut inputs, "--model-config", model_config.as_slice())?;
    if let Some(file) = tokenizer {
        inputs.file("--tokenizer", file);
        for other in [
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "chat_template.jinja",
            "chat_template.json",
        ] {
            let beside = file.with_file_name(other);
            if beside.is_file() {
                inputs.file(format!("--tokenizer {other}"), &beside);
            }
        }
    }
    identity::files(&mut inputs, "--data", data)?;
    identity::files(&mut inputs, "--eval-data", eval_data)?;
    let mut identity = identity::read(&inputs, context)?;
    let mut set = |name: &str, value: String| identity.set(name, value);
    set("--task", format!("{task:?}"));
    set("--data-format", format!("{data_format:?}"));
    set("the columns of --data", format!("{columns:?} {label_columns:?}"));
    set("--held-out", held_out.to_string());
    if let Some(LoraSpec { rank, alpha, targets }) = lora {
        set("--lora-rank", rank.to_string());
        set("--lora-alpha", alpha.to_string());
        set("--lora-targets", if targets.is_empty() { "all-linear".to_owned() } else { targets.join(",") });
    }
    if *lora_dropout > 0.0 {
        set("--lora-dropout", lora_dropout.to_string());
    }
    if let Some(TeacherSettings { soft, .. }) = teacher {
        set("--distill-temperature", soft.temperature.to_string());
        set("--distill-weight", soft.weight.to_string());
    }
    set("--trainable", tune.map_or("all".to_owned(), |tune| format!("{tune:?}")));
    set("--momentum", momentum.to_string());
    set("--gradient-accumulation", gradient_accumulation.to_string());
    set("--context", length.to_string());
    set("--batch-size", batch_size.to_string());
    set("--learning-rate", learning_rate.to_string());
    set("--schedule", decay.clone());
    set("--min-learning-rate", min_learning_rate.map_or("the usual".to_owned(), |rate| rate.to_string()));
    set("--warmup-steps", warmup_steps.map_or("3 % of all".to_owned(), |steps| steps.to_string()));
    set("--weight-decay", weight_decay.to_string());
    set("--beta2", beta2.to_string());
    set("--max-grad-norm", max_grad_norm.map_or("none".to_owned(), |norm| norm.to_string()));
    set("--router-bias-update-rate", router_bias_update_rate.to_string());
    set("--factorize", factorize.clone().unwrap_or_else(|| "nothing".to_owned()));
    set("--flip", flip.to_string());
    set("--shift", shift.to_string());
    Ok(identity)
}

/// What may be another when a run goes on, which is said.
pub(super) fn free(settings: &Settings, steps: u64, context: &Context) -> Identity {
    let mut identity = identity::program(context);
    identity.set("--steps", steps);
    let interval = |given: Option<u64>| given.map_or("a tenth of all".to_owned(), |steps| steps.to_string());
    identity.set("--eval-every", interval(settings.eval_every));
    identity.set("--save-every", interval(settings.save_every));
    identity.set("--keep", settings.keep);
    identity
}
