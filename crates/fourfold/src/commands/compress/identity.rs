//! What decides the bytes of a compression, and where it may write.

use std::path::{Path, PathBuf};

use anyhow::Result;
use fourfold_disk::{Identity, Inputs, Use, output_directory, output_file};
use fourfold_formats::writer::SafetensorsWriter;

use super::choice::ChoiceArgs;
use super::{CompressArgs, GridArgs, OutputArgs};
use crate::context::Context;
use crate::identity;

/// Where the output goes, apart from all that is read; looked at before any work.
pub fn check_outputs(args: &CompressArgs) -> Result<Option<PathBuf>> {
    let mut inputs = vec![("MODEL".to_owned(), PathBuf::from(&args.model))];
    inputs.extend(args.plan.iter().map(|file| ("--plan".to_owned(), file.clone())));
    inputs.extend(args.output.imatrix.iter().map(|file| ("--imatrix".to_owned(), file.clone())));
    inputs.extend(args.calibration.files().iter().map(|file| ("--calibration".to_owned(), file.clone())));
    if let Some(file) = args.write_plan.as_deref().filter(|file| *file != Path::new("-")) {
        output_file(file, &inputs)?;
    }
    let Some(out) = args.out() else { return Ok(None) };
    if args.is_gguf() {
        return crate::gguf::check_out(out, &inputs, args.output.overwrite).map(Some);
    }
    let place = output_directory(out, &inputs, Use::Replaced)?;
    SafetensorsWriter::check(&place, args.output.overwrite)?;
    Ok(Some(place))
}

/// Every setting is named here: one that is added is decided on before this compiles.
pub fn of(args: &CompressArgs, model: &Path, context: &Context) -> Result<Identity> {
    let CompressArgs {
        model: _,
        out: _,
        out_flag: _,
        ratio,
        max_bytes,
        bits,
        plan,
        write_plan: _,
        method,
        quantize_biases,
        embedding,
        choice: choice @ ChoiceArgs { effort: _, exclude, only, fusible, uniform, no_gate },
        grid: GridArgs { group_size, symmetric: _, asymmetric, learned_levels, scales, scale_rule },
        calibration,
        output: OutputArgs { format, imatrix, split_size: _, max_shard_size, overwrite: _ },
    } = args;
    let mut inputs = Inputs::default();
    identity::model(&mut inputs, "MODEL", model)?;
    identity::files(&mut inputs, "--plan", plan.as_slice())?;
    identity::files(&mut inputs, "--imatrix", imatrix.as_slice())?;
    identity::files(&mut inputs, "--calibration", calibration.files())?;
    let mut identity = identity::of(&inputs, context)?;
    // What is left to its default is that of one size: four times smaller.
    let size = (ratio.is_none() && max_bytes.is_none() && bits.is_none() && plan.is_none() && method.is_none())
        .then_some(4.0)
        .or(*ratio);
    let mut set = |name: &str, value: String| identity.set(name, value);
    set("--ratio", format!("{size:?}"));
    set("--max-bytes", format!("{max_bytes:?}"));
    set("--bits", format!("{bits:?}"));
    set("--method", method.as_ref().map_or("the default".to_owned(), |words| words.text.clone()));
    set("--quantize-biases", format!("{quantize_biases:?}"));
    set("--embedding", format!("{embedding:?}"));
    set("--effort", format!("{:?}", choice.effort(calibration.is_given())));
    set("--exclude", format!("{exclude:?}"));
    set("--only", format!("{only:?}"));
    set("--fusible", fusible.to_string());
    set("--uniform", uniform.to_string());
    set("--no-gate", no_gate.to_string());
    set("--group-size", format!("{group_size:?}"));
    set("--asymmetric", asymmetric.to_string());
    set("--learned-levels", learned_levels.to_string());
    set("--scales", format!("{scales:?}"));
    set("--scale-rule", format!("{scale_rule:?}"));
    set("--format", format!("{format:?}"));
    set("--max-shard-size", max_shard_size.to_string());
    calibration.identify(&mut identity);
    Ok(identity)
}
