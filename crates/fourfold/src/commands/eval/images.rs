//! `fourfold eval` of a network that reads images.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use fourfold_models::ConvNet;
use fourfold_train::images::in_order;
use fourfold_train::network::Score;
use fourfold_train::vision::{normalized, score};
use serde::Serialize;

use crate::context::Context;
use crate::images::{self, Split};
use crate::model::{self, OpenNetwork};
use crate::output::Report;
use crate::{human, memory};

/// Images that run at once.
const BATCH: usize = 64;

#[derive(Serialize)]
struct ImageReport {
    model: String,
    images: usize,
    accuracy: f64,
    standard_error: f64,
    loss: f64,
    weight_bytes: usize,
    seconds: f64,
    peak_memory: Option<u64>,
}

pub fn run(name: &str, folder: &Path, context: &Context) -> Result<()> {
    let Some(OpenNetwork { checkpoint, spec }) = model::open_network(name, context)? else {
        bail!("{name}: no network that reads images; a language model is measured on --text")
    };
    let images = images::open(folder, Split::Test, &spec)?;
    let backend = context.backward.clone();
    let net = ConvNet::load(&spec, &*checkpoint.weights, backend.clone())?;
    let start = Instant::now();
    let mut total = Score::default();
    for batch in in_order(&images, BATCH)? {
        let mut logits = net.logits(normalized(&spec, &batch.pixels));
        total = total.and(score(&*backend, &mut logits, &batch.labels, 0.0));
    }
    let accuracy = total.accuracy().unwrap_or(0.0);
    context.print(&ImageReport {
        model: name.to_owned(),
        images: total.scored,
        accuracy,
        standard_error: (accuracy * (1.0 - accuracy) / total.scored.max(1) as f64).sqrt(),
        loss: total.mean_loss(),
        weight_bytes: net.weight_bytes(),
        seconds: start.elapsed().as_secs_f64(),
        peak_memory: memory::peak_resident(),
    })
}

impl Report for ImageReport {
    fn text(&self) -> String {
        format!(
            "{}: {} ± {} of {} images right, loss {:.4}\nweights in memory {}, {}\n",
            self.model,
            human::percent(self.accuracy),
            human::percent(self.standard_error),
            self.images,
            self.loss,
            human::bytes(self.weight_bytes as u64),
            human::duration(Duration::from_secs_f64(self.seconds)),
        )
    }
}
