//! `fourfold eval` of a sequence classifier.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use fourfold_tensor::WeightSource;
use fourfold_train::labelled::{LabelColumns, Labelled};
use fourfold_train::language::LanguageModel;
use fourfold_train::network::{Network, Run, Score};
use fourfold_train::recipe::Recipe;
use fourfold_train::store::ParameterStore;
use serde::Serialize;

use crate::commands::train::classification::{Encoder, read_files};
use crate::context::Context;
use crate::output::Report;
use crate::{human, interrupt, memory, model};

/// Texts that run at once.
const BATCH: usize = 16;

#[derive(Serialize)]
struct TextReport {
    model: String,
    data: PathBuf,
    classes: usize,
    texts: usize,
    accuracy: f64,
    standard_error: f64,
    loss: f64,
    weight_bytes: u64,
    seconds: f64,
    peak_memory: Option<u64>,
}

pub fn run(name: &str, data: &Path, context: &Context) -> Result<()> {
    let open = model::open(name, context)?;
    let Some(classes) = open.spec.classes else {
        bail!("{name}: no sequence classifier; a language model is measured on --text")
    };
    let tokenizer = open.tokenizer()?;
    let files = [data.to_path_buf()];
    let examples = Encoder::new(&tokenizer, &open.checkpoint.config, classes)
        .encode(&files, &read_files(&files, None, &LabelColumns::default())?)?;
    let positions = open.spec.max_positions;
    let longer = examples.iter().filter(|example| example.ids.len() > positions).count();
    if longer > 0 {
        let all = examples.len();
        context.remark(&format!("note: {longer} of {all} texts have more tokens than the model has positions ({positions}): they are cut there"));
    }
    let batches = Labelled::new(&data.display().to_string(), examples, positions, BATCH, 0)?.in_order();
    // Nothing is trained: what counts of a recipe is that a block's working memory does not grow with the batch.
    let recipe = Recipe::QUARTER;
    let weights: Arc<dyn WeightSource> = Arc::from(open.checkpoint.weights);
    let store = ParameterStore::frozen(weights, &recipe);
    let run = Run { backend: context.backward.clone(), recipe: &recipe, counts: false, dropout: None };
    let network = LanguageModel::new(open.spec);
    let _cooperation = interrupt::cooperate();
    let start = Instant::now();
    let bar = context.progress.bar("evaluating", batches.len() as u64, "batches");
    let mut total = Score::default();
    for batch in &batches {
        ensure!(!interrupt::requested(), "interrupted");
        network.check(batch)?;
        total = total.and(network.evaluate(&store, batch, &run)?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let accuracy = total.accuracy().unwrap_or(0.0);
    context.print(&TextReport {
        model: name.to_owned(),
        data: data.to_path_buf(),
        classes,
        texts: total.scored,
        accuracy,
        standard_error: (accuracy * (1.0 - accuracy) / total.scored.max(1) as f64).sqrt(),
        loss: total.mean_loss(),
        weight_bytes: open.checkpoint.weight_bytes,
        seconds: start.elapsed().as_secs_f64(),
        peak_memory: memory::peak_resident(),
    })
}

impl Report for TextReport {
    fn text(&self) -> String {
        format!(
            "{}: {} ± {} of {} texts right ({} classes), loss {:.4}\nweights {}, {}\n",
            self.model,
            human::percent(self.accuracy),
            human::percent(self.standard_error),
            self.texts,
            self.classes,
            self.loss,
            human::bytes(self.weight_bytes),
            human::duration(Duration::from_secs_f64(self.seconds)),
        )
    }
}
