//! `fourfold compress` of a convolutional network.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use fourfold_compress::Plan;
use fourfold_compress::convnet::{ConvNetJob, Goal, Output, Recipe, compress, write};
use fourfold_formats::regular;
use fourfold_formats::writer::{ModelFiles, SafetensorsWriter, WriteOptions, header_bytes};
use fourfold_tensor::Form;
use serde::Serialize;

use super::{Bits, CompressArgs, FormatArg, Storage, storage, write_plan};
use crate::context::Context;
use crate::model::OpenNetwork;
use crate::output::Report;
use crate::progress::Stages;
use crate::{human, limits, memory};

#[derive(Serialize)]
struct ConvNetReport {
    model: String,
    out: String,
    source_bytes: u64,
    output_bytes: u64,
    ratio: f64,
    /// Of the original's parameters.
    bits_per_parameter: f64,
    calibration_images: usize,
    /// Nats, on calibration images that nothing was chosen by.
    divergence: Option<f64>,
    uniform_divergence: Option<f64>,
    seconds: f64,
    peak_memory: Option<u64>,
    storage: Vec<Storage>,
}

pub fn run(open: &OpenNetwork, args: &CompressArgs, place: Option<&Path>, context: &Context) -> Result<()> {
    let start = Instant::now();
    let OpenNetwork { checkpoint, spec } = open;
    ensure!(args.output.format == FormatArg::Fourfold, "--format: networks that read images are written as fourfold");
    let images = args.calibration.images(spec)?;
    let header = |forms: &[(String, Form)]| header_bytes(forms, args.output.max_shard_size).unwrap_or(0);
    let job = ConvNetJob {
        spec,
        source: &*checkpoint.weights,
        goal: goal(args, checkpoint.weight_bytes, spec.parameters())?,
        images: &images,
        backend: context.backward.clone(),
        header: &header,
    };
    let mut stages = Stages::new(context.progress, "compress", &[("plan", 1.0), ("compress", 2.0)]);
    let Output { network, plan, divergence, uniform_divergence } = compress(&job, &mut stages)?;
    stages.finish();
    if let Some(file) = &args.write_plan {
        return write_plan(file, &plan);
    }
    let Some(out) = place else { bail!("OUT is missing") };
    let options = WriteOptions {
        max_shard_bytes: args.output.max_shard_size,
        overwrite: args.output.overwrite,
        identity: super::identity::of(args, &checkpoint.path, context)?,
        interchange: false,
    };
    let files = ModelFiles::config(network.spec.describe(&checkpoint.config)).made_from(checkpoint);
    write(&network, Box::new(SafetensorsWriter::create(out, files, options)?))?;
    let output_bytes = fourfold_formats::open(out)?.weight_bytes;
    let pixels = spec.image[1] * spec.image[2];
    context.print(&ConvNetReport {
        model: args.model.clone(),
        out: out.display().to_string(),
        source_bytes: checkpoint.weight_bytes,
        output_bytes,
        ratio: checkpoint.weight_bytes as f64 / output_bytes as f64,
        bits_per_parameter: output_bytes as f64 * 8.0 / spec.parameters() as f64,
        calibration_images: images.iter().map(|batch| batch.rows() / pixels).sum(),
        divergence,
        uniform_divergence,
        seconds: start.elapsed().as_secs_f64(),
        peak_memory: memory::peak_resident(),
        storage: storage(&flat(&plan)),
    })
}

fn goal(args: &CompressArgs, source_bytes: u64, parameters: u64) -> Result<Goal> {
    if let Some(file) = &args.plan {
        let text = regular::read_text(file, limits::MOST_BYTES).with_context(|| file.display().to_string())?;
        return Ok(Goal::Plan(Plan::from_json(&text).with_context(|| file.display().to_string())?));
    }
    let recipe = |text: &str| text.parse::<Recipe>().map_err(anyhow::Error::msg);
    if let Some(words) = &args.method {
        if args.bits.is_some() || args.ratio.is_some() || args.max_bytes.is_some() {
            bail!("--method with a recipe says all itself: leave out --bits, --ratio and --max-bytes");
        }
        return Ok(Goal::Recipe(recipe(&words.text)?));
    }
    Ok(match (args.bits, args.max_bytes) {
        (Some(Bits::Grid(bits)), _) => Goal::Recipe(recipe(&format!("quantize:{bits}"))?),
        (Some(Bits::Average(bits)), _) => Goal::Bytes((bits * parameters as f64 / 8.0) as u64),
        (None, Some(bytes)) => Goal::Bytes(bytes),
        (None, None) => Goal::Bytes((source_bytes as f64 / args.ratio.unwrap_or(4.0)) as u64),
    })
}

/// The plan with the factors of chains in place of the layers they replace.
fn flat(plan: &Plan) -> Plan {
    let factors = |entry: &fourfold_compress::plan::Entry| match entry.settings.get("factors") {
        Some(factors) => serde_json::from_value(factors.clone()).unwrap_or_default(),
        None => vec![entry.clone()],
    };
    Plan { tensors: plan.tensors.iter().flat_map(factors).collect() }
}

impl Report for ConvNetReport {
    fn text(&self) -> String {
        let mut rows = vec![["stored as", "tensors", "bytes", "mean error"].map(String::from).to_vec()];
        rows.extend(self.storage.iter().map(|s| {
            vec![s.name.clone(), s.tensors.to_string(), human::bytes(s.bytes), format!("{:.2e}", s.mean_error)]
        }));
        let mut text = human::table(&rows);
        text += &format!(
            "\n{} -> {}: {} -> {}, {:.3} : 1, {:.3} bits a parameter of the original\n",
            self.model,
            self.out,
            human::bytes(self.source_bytes),
            human::bytes(self.output_bytes),
            self.ratio,
            self.bits_per_parameter
        );
        if let Some(divergence) = self.divergence {
            text += &format!("divergence from the original {divergence:.5} nats an image");
            if let Some(uniform) = self.uniform_divergence {
                text += &format!(", {uniform:.5} with the most bits for all layers alike that fit");
            }
            text += "\n";
        }
        let peak = self.peak_memory.map(|m| format!(", peak memory {}", human::bytes(m))).unwrap_or_default();
        text + &format!("{}{peak}\n", human::duration(Duration::from_secs_f64(self.seconds)))
    }
}
