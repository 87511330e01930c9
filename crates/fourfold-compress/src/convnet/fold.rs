//! Batch normalisation taken into the convolution before it (Jacob et al. 2018, section 3.2): with running statistics it is a factor
//! and a summand of each channel.

use std::collections::BTreeMap;

use fourfold_models::layers::{Conv2dSpec, LayerSpec};
use fourfold_tensor::{Dense, Weight};

use super::network::Network;
use crate::CompressError;

/// The network without the norms that follow a convolution. Others stay.
///
/// # Errors
/// A tensor of theirs is missing.
pub fn fold(network: &Network) -> Result<Network, CompressError> {
    let mut weights = network.weights().clone();
    let spec = network.spec.rewritten(&mut |layers| fold_list(layers, network, &mut weights))?;
    Ok(Network::new(spec, weights))
}

fn fold_list(
    layers: &[LayerSpec],
    network: &Network,
    weights: &mut BTreeMap<String, Weight>,
) -> Result<Vec<LayerSpec>, CompressError> {
    let mut out: Vec<LayerSpec> = Vec::with_capacity(layers.len());
    for layer in layers {
        if let (Some(LayerSpec::Conv2d(conv)), LayerSpec::BatchNorm(norm)) = (out.last_mut(), layer) {
            let (scale, shift) = norm.affine(network)?;
            take_over(conv, scale.host(), shift.host(), network, weights)?;
        } else {
            out.push(layer.clone());
        }
    }
    Ok(out)
}

/// `scale · (W·x + b) + shift` as one convolution.
fn take_over(
    conv: &mut Conv2dSpec,
    scale: &[f32],
    shift: &[f32],
    network: &Network,
    weights: &mut BTreeMap<String, Weight>,
) -> Result<(), CompressError> {
    let (weight, bias) = (format!("{}.weight", conv.name), format!("{}.bias", conv.name));
    let mut values = network.values(&weight)?;
    let cols = values.len() / conv.outputs.max(1);
    for (row, factor) in values.chunks_exact_mut(cols.max(1)).zip(scale) {
        row.iter_mut().for_each(|v| *v *= factor);
    }
    let before = if conv.bias { network.values(&bias)? } else { vec![0.0; conv.outputs] };
    let after = before.iter().zip(scale).zip(shift).map(|((b, s), t)| b * s + t).collect();
    weights.insert(weight, Dense::from_f32(conv.shape(), values).into());
    weights.insert(bias, Dense::from_f32(vec![conv.outputs], after).into());
    conv.bias = true;
    Ok(())
}
