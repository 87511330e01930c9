//! Compression into a GGUF file.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use fourfold_compress::{CompressJob, Goal};
use fourfold_formats::gguf::write::GgufModel;

use super::CompressArgs;
use crate::commands::export::model_name;
use crate::context::Context;
use crate::gguf::{self, GUESSED};
use crate::model::OpenModel;

/// Whether what is asked for can be stored in GGUF.
pub fn check(args: &CompressArgs, goal: &Goal) -> Result<()> {
    if args.quantize_biases.is_some() {
        bail!("--quantize-biases: GGUF files hold biases as floats");
    }
    match goal {
        Goal::Uniform { method, .. } if method == "rtn" || method == "gptq" => bail!(
            "--bits N without a point is a grid of this program's own; for GGUF give a size in bits a parameter (--bits 4.0), or use \
             `fourfold export MODEL OUT.gguf --type q4_k`"
        ),
        Goal::Uniform { method, .. } => bail!("--method {method}: GGUF has no type for pruned or decomposed matrices"),
        Goal::Plan(_) | Goal::Ratio(_) | Goal::Bytes(_) => Ok(()),
    }
}

/// All of the file but its tensors.
pub fn describe(args: &CompressArgs, open: &OpenModel, job: &CompressJob, context: &Context) -> Result<GgufModel> {
    let file_type = match &job.goal {
        Goal::Plan(plan) => gguf::file_type(&open.spec, plan),
        Goal::Uniform { .. } | Goal::Ratio(_) | Goal::Bytes(_) => GUESSED,
    };
    gguf::model(open, &model_name(&args.model), file_type, context)
}

/// The file to open an output by.
pub fn first_file(out: &Path, is_gguf: bool) -> PathBuf {
    let files = if is_gguf { gguf::written_files(out) } else { Vec::new() };
    files.into_iter().next().unwrap_or_else(|| out.to_owned())
}
