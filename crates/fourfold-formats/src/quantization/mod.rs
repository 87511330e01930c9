//! Quantized weights in safetensors files: what `quantization_config` says of them, how the parts of a packed weight are laid
//! out, and FP8.
//!
//! A logical tensor `x.weight` that is packed is stored as parts, each named `x.weight_<part>`:
//!
//! | part | type | shape | what |
//! |---|---|---|---|
//! | `packed` | I32 | [N, ceil(K·b/32)] | codes, element i of a row at bit i·b, as compressed-tensors `pack-quantized` |
//! | `scale` | F16, BF16, F32 | [N, groups], [N, 1] or [1] | scales; with `scale_code` those of runs of groups, [N, runs] |
//! | `scale_code` | U8, I8 | [N, groups] | double quantization: scale = `scale`[r, run] · code (ours) |
//! | `zero_point` | I32 | [ceil(N·b/32), groups] | zero points, packed down the columns; per tensor I8 [1], less 2^(b−1) |
//! | `min` | F16, BF16, F32 | [N, groups] | real offsets (ours); with `min_code` those of runs of groups, [N, runs] |
//! | `min_code` | U8, I8 | [N, groups] | offset = `min`[r, run] · code (ours) |
//! | `codebook` | I8 | [2^b] | values of the codes (ours) |
//! | `g_idx` | I32 | [K] | group of each column |
//! | `shape` | I64 | [2] | N, K |
//!
//! Forms of our own (see [`composite`] for what config.json says of them):
//!
//! | part | type | shape | what |
//! |---|---|---|---|
//! | `mask` | I64 | [N, ceil(K/64)] | sparse: bit c % 64 of word c / 64 keeps column c |
//! | `values` | F16, BF16, F32 | [kept] | the kept values, row after row |
//! | `values_packed`, `values_scale` | I32, float | [ceil(kept·b/32)], [N, ceil(K/g)] | or their codes, and a scale for each group of columns |
//! | `up`, `down` | | [N, r], [r, K] | factors, each stored like a weight of its own name |
//! | `term0`, `term1`, … | | [N, K] | terms of a sum, likewise |

mod composite;
mod config;
mod emit;
mod fp8;
mod keys;
mod packed;
mod parts;

pub(crate) use composite::load as load_composite;
pub use composite::{Build, Composite};
pub use config::{ConfigError, Group, QuantizationConfig, Scheme, Strategy, Target};
pub use emit::{describe_storage, inexpressible, is_own, odd_experts, quantization_config};
pub use fp8::e8m0;
pub(crate) use fp8::{load_blocks, load_plain};
pub use keys::quantization_remarks;
pub(crate) use packed::{load_naive, load_packed, packed_shape, read_floats};
pub use parts::{PARTS, Part, part_bytes, parts};
