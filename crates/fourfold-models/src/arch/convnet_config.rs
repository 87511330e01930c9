//! A convolutional network's description, written: the other direction of [`ConvNetSpec::from_config`].

use fourfold_kernels::spatial::Window;
use serde_json::{Value, json};

use super::ConvNetSpec;
use crate::layers::LayerSpec;

/// Makes another list of layers.
type Rewrite<'a, E> = dyn FnMut(&[LayerSpec]) -> Result<Vec<LayerSpec>, E> + 'a;

impl ConvNetSpec {
    /// `config` with this network's layers in place of its own, each that has tensors under its full name.
    pub fn describe(&self, config: &Value) -> Value {
        let mut config = config.clone();
        config["layers"] = list(&self.layers, "");
        config
    }

    /// The network with every list of layers, those of residual blocks too, replaced by what `rewrite` makes of it. The images and
    /// classes are to stay the same.
    ///
    /// # Errors
    /// What `rewrite` says.
    pub fn rewritten<E>(&self, rewrite: &mut Rewrite<'_, E>) -> Result<Self, E> {
        Ok(Self { layers: rewritten(&self.layers, rewrite)?, ..self.clone() })
    }
}

fn rewritten<E>(layers: &[LayerSpec], rewrite: &mut Rewrite<'_, E>) -> Result<Vec<LayerSpec>, E> {
    let mut inner = Vec::with_capacity(layers.len());
    for layer in layers {
        inner.push(match layer {
            LayerSpec::Residual { name, body, shortcut } => LayerSpec::Residual {
                name: name.clone(),
                body: rewritten(body, rewrite)?,
                shortcut: rewritten(shortcut, rewrite)?,
            },
            other => other.clone(),
        });
    }
    rewrite(&inner)
}

/// Layers, their names without `below`, which they all begin with.
fn list(layers: &[LayerSpec], below: &str) -> Value {
    layers.iter().map(|layer| value(layer, below)).collect()
}

fn value(layer: &LayerSpec, below: &str) -> Value {
    let own = |name: &str| name.strip_prefix(below).unwrap_or(name).to_owned();
    let window = |kind: &str, w: &Window| json!({ "type": kind, "kernel_size": w.kernel, "stride": w.stride, "padding": w.padding });
    match layer {
        LayerSpec::Conv2d(conv) => {
            let mut value = window("conv2d", &conv.window);
            value["name"] = own(&conv.name).into();
            value["out_channels"] = conv.outputs.into();
            value["groups"] = conv.groups.into();
            value["bias"] = conv.bias.into();
            value
        }
        LayerSpec::BatchNorm(norm) => json!({
            "type": "batch_norm", "name": own(&norm.name), "eps": shortest(norm.eps), "momentum": shortest(norm.momentum)
        }),
        LayerSpec::Relu => json!({ "type": "relu" }),
        LayerSpec::MaxPool(w) => window("max_pool", w),
        LayerSpec::AveragePool(w) => window("avg_pool", w),
        LayerSpec::AdaptiveAveragePool { output, .. } => json!({ "type": "adaptive_avg_pool", "output_size": output }),
        LayerSpec::Flatten { .. } => json!({ "type": "flatten" }),
        LayerSpec::Linear(linear) => json!({
            "type": "linear", "name": own(&linear.name), "out_features": linear.outputs, "bias": linear.bias
        }),
        LayerSpec::Residual { name, body, shortcut } => {
            let inside = format!("{name}.");
            let mut value = json!({ "type": "residual", "name": own(name), "layers": list(body, &inside) });
            if !shortcut.is_empty() {
                value["shortcut"] = list(shortcut, &inside);
            }
            value
        }
    }
}

/// An f32 as the shortest decimal that is read back as it: 0.1 and not 0.10000000149.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ModelError;

    #[test]
    fn what_is_written_is_read_back() {
        let config = json!({ "model_type": "convnet", "image_size": [3, 12, 12], "id2label": {"0": "a"}, "layers": [
            { "type": "conv2d", "out_channels": 4, "kernel_size": [3, 5], "padding": [1, 2], "bias": false },
            { "type": "batch_norm", "momentum": 0.3 }, { "type": "relu" }, { "type": "max_pool", "kernel_size": 3, "stride": 2 },
            { "type": "residual", "name": "block", "layers": [
                { "type": "conv2d", "name": "a", "out_channels": 8, "kernel_size": 3, "padding": 1, "groups": 2 },
                { "type": "residual", "layers": [{ "type": "batch_norm" }] } ],
              "shortcut": [{ "type": "conv2d", "out_channels": 8, "kernel_size": 1 }] },
            { "type": "avg_pool", "kernel_size": 2, "padding": 1 }, { "type": "adaptive_avg_pool", "output_size": [2, 1] },
            { "type": "flatten" }, { "type": "linear", "out_features": 5, "bias": false } ] });
        let spec = ConvNetSpec::from_config(&config).unwrap();
        let written = spec.describe(&config);
        assert_eq!(written["id2label"], config["id2label"]);
        assert_eq!(ConvNetSpec::from_config(&written).unwrap(), spec);
        // Layers keep their names where others before them go.
        let rest = |layers: &[LayerSpec]| layers.iter().filter(|l| **l != LayerSpec::Relu).cloned().collect();
        let shorter = spec.rewritten::<ModelError>(&mut |layers| Ok(rest(layers))).unwrap();
        assert_eq!((shorter.layers.len(), shorter.weights()), (spec.layers.len() - 1, spec.weights()));
        assert_eq!(ConvNetSpec::from_config(&shorter.describe(&config)).unwrap(), shorter);
    }
}
