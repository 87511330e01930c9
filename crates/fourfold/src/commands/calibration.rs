//! Calibration text: which tokens a compression looks at.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use fourfold_disk::Identity;
use fourfold_formats::TokenizerSource;
use fourfold_kernels::Tensor;
use fourfold_models::ConvNetSpec;
use fourfold_train::images::{Subset, in_order};
use fourfold_train::vision::normalized;

use crate::images::{self, Split};
use crate::limits;
use crate::model::OpenModel;
use crate::{data_files, included_text};

#[derive(Args)]
#[command(next_help_heading = "Calibration")]
pub struct CalibrationArgs {
    /// Text files like what the model will see (never the text it is evaluated on) [default: a mixed text that comes with fourfold:
    /// prose, many languages, code, mathematics, conversations]. For networks that read images: a directory of them, of which the
    /// training images are taken.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    calibration: Vec<PathBuf>,
    /// Most sequences taken from the text, or images [default: by --effort, 16, 32 or 128 sequences; 512 images].
    #[arg(long, value_name = "N", value_parser = limits::WINDOWS)]
    calibration_samples: Option<u32>,
    /// Tokens of a sequence [default: 512, or fewer where the model has fewer positions].
    #[arg(long, value_name = "TOKENS", value_parser = limits::TRAIN_CONTEXT)]
    calibration_length: Option<usize>,
    /// Seed of the choice of sequences.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

/// Token ids of calibration text, all sequences of one length.
#[derive(Clone, Default)]
pub struct Sequences {
    /// To calibrate on.
    pub calibration: Vec<Vec<u32>>,
    /// Kept out of the calibration, to see what came of it.
    pub held_out: Vec<Vec<u32>>,
}

impl CalibrationArgs {
    /// Whether there is any text.
    pub fn is_given(&self) -> bool {
        !self.calibration.is_empty()
    }

    /// The files that were named.
    pub fn files(&self) -> &[PathBuf] {
        &self.calibration
    }

    /// Notes the settings; the files' content is noted by whoever reads them.
    pub fn identify(&self, identity: &mut Identity) {
        let Self { calibration: _, calibration_samples, calibration_length, seed } = self;
        identity.set("--calibration-samples", format!("{calibration_samples:?}"));
        identity.set("--calibration-length", format!("{calibration_length:?}"));
        identity.set("--seed", seed);
    }

    /// Batches of training images, normalised, from the directory that was given.
    pub fn images(&self, spec: &ConvNetSpec) -> Result<Vec<Tensor>> {
        let folder = match self.calibration.as_slice() {
            [] => return Ok(Vec::new()),
            [folder] => folder,
            _ => bail!("--calibration: one directory of images is expected"),
        };
        let all = images::open(folder, Split::Train, spec)?;
        let some = Subset::first(&all, self.calibration_samples.unwrap_or(512) as usize);
        let batches = in_order(&some, 64)?;
        Ok(batches.iter().map(|batch| normalized(spec, &batch.pixels)).collect())
    }

    /// `samples` sequences (or as many as were asked for) of the files that were named, or of the text that comes with fourfold.
    /// None where that gives no whole sequence with the model's tokenizer, or where there is no tokenizer: what was named is an error then.
    pub fn sequences(&self, open: &OpenModel, samples: u32) -> Result<Sequences> {
        let samples = self.calibration_samples.unwrap_or(samples) as usize;
        if self.is_given() {
            let named = |file: &PathBuf| Ok((file.display().to_string(), data_files::text(file)?));
            return self.cut(&self.calibration.iter().map(named).collect::<Result<Vec<_>>>()?, samples, open);
        }
        if open.checkpoint.tokenizer == TokenizerSource::None {
            return Ok(Sequences::default());
        }
        let (template, is_own) = open.chat_template()?;
        self.cut(&included_text::texts(is_own.then_some(&template))?, samples, open)
    }

    /// Sequences of equal length from all texts, as many from each: a text is cut into pieces, and pieces are picked at random. Those to
    /// calibrate on, and a quarter as many beside them that are held out. Of a text that has no more than the first, the last is held out.
    fn cut(&self, texts: &[(String, String)], samples: usize, open: &OpenModel) -> Result<Sequences> {
        let tokenizer = open.tokenizer()?;
        let positions = open.spec.max_positions;
        let length = self.calibration_length.unwrap_or(positions.min(512));
        if length > positions {
            bail!("--calibration-length {length}: the model has {positions} positions");
        }
        let mut random = self.seed;
        let share = samples.div_ceil(texts.len());
        let apart = share.div_ceil(4);
        let (mut sequences, mut held_out) = (Vec::new(), Vec::new());
        for (name, text) in texts {
            let body = usize::from(tokenizer.bos().is_some());
            // Some times more than needed, so that there is a choice; not a whole corpus.
            let wanted = share.saturating_mul(length).saturating_mul(8);
            let ids = tokenizer.encode_prefix(text, wanted)?;
            let mut pieces: Vec<&[u32]> = ids[body.min(ids.len())..].chunks_exact(length - body).collect();
            if pieces.is_empty() && self.is_given() {
                bail!("{name}: {} tokens are fewer than one sequence of {length}", ids.len());
            }
            // Fisher and Yates's shuffle, as far as it is needed.
            for i in 0..pieces.len().min(share + apart) {
                random = splitmix(random);
                let other = i + (random % (pieces.len() - i) as u64) as usize;
                pieces.swap(i, other);
            }
            let whole = |piece: &&[u32]| tokenizer.bos().into_iter().chain(piece.iter().copied()).collect();
            // A text that has no more than what is asked for keeps some of it apart all the same.
            let taken = share.min(pieces.len() - (pieces.len() / 5).min(apart));
            sequences.extend(pieces.iter().take(taken).map(whole));
            held_out.extend(pieces.iter().skip(taken).take(apart).map(whole));
        }
        sequences.truncate(samples);
        if held_out.is_empty() && sequences.len() > 1 {
            held_out.extend(sequences.pop());
        }
        Ok(Sequences { calibration: sequences, held_out })
    }
}

/// A step of splitmix64: enough to pick pieces, and the same everywhere and always.
fn splitmix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
