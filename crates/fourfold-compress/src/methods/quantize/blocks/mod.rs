//! ggml's block types: the grids of GGUF files, with rounding as good as this program's own.
//!
//! A block's scales are chosen on its weights as errors have changed them, by what is left of an error in each column; then its columns
//! are rounded one after another, each one's error taken up by those still to come (GPTQ, see [`super::gptq`]), with the scales fixed. At the
//! end codes and scales are moved one at a time where that lowers the error of the layer's output ([`polish`]). Without text, weights
//! are rounded to nearest, with scales that minimise the squared error, weighted by the inputs' second moments where those are known.

mod fit;
mod polish;
mod round;

use fourfold_tensor::{
    BlockGrid, BlockScales, BlockType, Buffer, DType, Double, DoubleCodes, FloatBuffer, Form, IQ4_VALUES, Offsets,
    Quantized, Scales, Weight, pack_row, packed_words_per_row,
};
use serde::{Deserialize, Serialize};

pub(crate) use fit::{Block, BlockFitter};

use super::rtn::column_weights;
use crate::MethodError;
use crate::factor::{Factor, damped};
use crate::hessian::Hessian;
use crate::methods::range::{Stored, check_f16};
use crate::methods::{Compressed, Method, Needs, Stats, matrix};

/// The name in plans.
pub const NAME: &str = "ggml";

/// Rounding to a block type. With a Hessian errors are fed back and codes polished, with second moments scales are weighted by them.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Blocks {
    /// ggml's name of the type: `Q4_K`.
    #[serde(rename = "type")]
    kind: String,
    /// Added to the Hessian's diagonal, as a share of its mean.
    #[serde(default = "default_damping")]
    damping: f64,
    /// Rounds of coordinate descent afterwards.
    #[serde(default = "default_polish")]
    polish: usize,
}

fn default_damping() -> f64 {
    0.01
}

fn default_polish() -> usize {
    2
}

impl Blocks {
    /// The defaults for a type.
    pub fn new(kind: BlockType) -> Self {
        Self { kind: kind.name().to_owned(), damping: default_damping(), polish: default_polish() }
    }

    /// With other damping.
    #[must_use]
    pub fn damped(self, damping: f64) -> Self {
        Self { damping, ..self }
    }

    /// The type.
    ///
    /// # Errors
    /// A name that is none.
    pub fn kind(&self) -> Result<BlockType, MethodError> {
        BlockType::from_name(&self.kind).ok_or_else(|| {
            let known: Vec<&str> = BlockType::all().map(BlockType::name).collect();
            MethodError::Settings(format!("{:?} is no block type; there are {}", self.kind, known.join(", ")))
        })
    }
}

impl Method for Blocks {
    fn name(&self) -> &'static str {
        NAME
    }

    fn needs(&self) -> Needs {
        Needs::Moments
    }

    fn form(&self, rows: usize, cols: usize) -> Result<Option<Form>, MethodError> {
        let kind = self.kind()?;
        let form = kind.form(rows, cols).ok_or_else(|| {
            let (name, block) = (kind.name(), kind.block_len());
            MethodError::Settings(format!("rows of {cols} do not divide into {name} blocks of {block}"))
        })?;
        Ok(Some(Form::Quantized(form)))
    }

    fn compress(&self, weight: &Weight, stats: Stats) -> Result<Compressed, MethodError> {
        let kind = self.kind()?;
        let (rows, cols) = (weight.rows(), weight.cols());
        self.form(rows, cols)?;
        // What lies on the grid already stays as it is.
        if let Weight::Quantized(q) = weight
            && BlockType::of(q) == Some(kind)
        {
            return Ok(Compressed { weight: weight.clone(), error: 0.0 });
        }
        let values = matrix::read(weight)?;
        let fitter = BlockFitter::new(kind);
        let rounded = match stats.hessian {
            Some(hessian) if hessian.size() != cols => {
                return Err(MethodError::Width { found: hessian.size(), expected: cols });
            }
            Some(hessian) => {
                let factor = factor(hessian, kind, self.damping)?;
                round::gptq(&fitter, &values, cols, &factor, self.polish)
            }
            None => round::nearest(&fitter, &values, cols, column_weights(&stats, cols)?),
        };
        check_f16(&rounded.blocks.iter().map(|b| b.scale).collect::<Vec<f32>>(), Stored::Blocks)?;
        let weight = Weight::Quantized(rounded.finish(kind, rows, cols));
        let error = matrix::relative_error(&values, &weight, &stats);
        Ok(Compressed { weight, error })
    }
}

/// The factor of a Hessian whose blocks come by falling mean of its diagonal, and columns within them likewise.
fn factor(hessian: &Hessian, kind: BlockType, damping: f64) -> Result<Factor, MethodError> {
    let (diagonal, size) = (hessian.diagonal(), kind.block_len());
    let means: Vec<f32> = diagonal.chunks(size).map(|d| d.iter().sum::<f32>() / d.len() as f32).collect();
    let mut order: Vec<usize> = (0..diagonal.len()).collect();
    order.sort_by(|&a, &b| {
        let (ga, gb) = (a / size, b / size);
        means[gb].total_cmp(&means[ga]).then(ga.cmp(&gb)).then(diagonal[b].total_cmp(&diagonal[a]))
    });
    let (matrix, damping) = damped(hessian, damping);
    Factor::new(matrix, order, damping)
}

/// Rows of codes and blocks.
pub(crate) struct Rounded {
    /// `[rows, cols]`.
    pub codes: Vec<u8>,
    /// `[rows, cols / block]`.
    pub blocks: Vec<Block>,
}

impl Rounded {
    /// The stored form.
    fn finish(self, kind: BlockType, rows: usize, cols: usize) -> Quantized {
        let (bits, groups) = (kind.bits(), kind.groups());
        let words = packed_words_per_row(cols, bits);
        let mut packed = vec![0u32; rows * words];
        for (codes, words) in self.codes.chunks_exact(cols).zip(packed.chunks_exact_mut(words)) {
            pack_row(codes, bits, words);
        }
        let floats = |pick: fn(&Block) -> f32| {
            FloatBuffer::from_f32(self.blocks.iter().map(pick).collect::<Vec<f32>>(), DType::F16)
        };
        let scale_codes = || self.blocks.iter().flat_map(|b| b.scale_codes[..groups].iter().copied());
        let scales = match kind.scales() {
            BlockScales::Float => Scales::Float(floats(|b| b.scale)),
            BlockScales::Unsigned(_) => {
                let codes: Vec<u8> = scale_codes().map(|code| code as u8).collect();
                Scales::Double(Double {
                    floats: floats(|b| b.scale),
                    codes: DoubleCodes::Unsigned(codes.into()),
                    span: groups,
                })
            }
            BlockScales::Signed(_) => {
                let codes: Vec<i8> = scale_codes().map(|code| code as i8).collect();
                Scales::Double(Double {
                    floats: floats(|b| b.scale),
                    codes: DoubleCodes::Signed(codes.into()),
                    span: groups,
                })
            }
        };
        let offsets = match (kind.grid(), kind.scales()) {
            (BlockGrid::Min, BlockScales::Float) => Offsets::Min(floats(|b| b.min)),
            (BlockGrid::Min, _) => {
                let codes: Vec<u8> = self.blocks.iter().flat_map(|b| b.min_codes[..groups].iter().copied()).collect();
                Offsets::Double(Double {
                    floats: floats(|b| b.min),
                    codes: DoubleCodes::Unsigned(codes.into()),
                    span: groups,
                })
            }
            (BlockGrid::Symmetric | BlockGrid::Codebook, _) => Offsets::Symmetric,
        };
        Quantized {
            rows,
            cols,
            bits,
            group_size: kind.group_len(),
            packed: Buffer::from(packed),
            scales,
            offsets,
            codebook: (kind.grid() == BlockGrid::Codebook).then(|| IQ4_VALUES.to_vec()),
            g_idx: None,
        }
    }
}
