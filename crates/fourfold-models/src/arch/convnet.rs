//! Convolutional networks, described by a small file in place of a published configuration:
//!
//! ```json
//! { "architectures": ["ConvNet"], "model_type": "convnet", "image_size": [1, 28, 28],
//!   "normalize": { "mean": [0.286], "std": [0.353] },
//!   "layers": [
//!     { "type": "conv2d", "out_channels": 16, "kernel_size": 3, "padding": 1, "bias": false },
//!     { "type": "batch_norm" }, { "type": "relu" }, { "type": "max_pool", "kernel_size": 2 },
//!     { "type": "residual", "name": "block", "layers": [ … ], "shortcut": [ … ] }, { "type": "relu" },
//!     { "type": "adaptive_avg_pool", "output_size": 1 }, { "type": "flatten" }, { "type": "linear", "out_features": 10 } ] }
//! ```
//!
//! A layer's name is its place in its list, as in `torch.nn.Sequential`, unless it has a `name`. Layers of a residual block are
//! named below it: `block.layers.0` and `block.shortcut.0`, or `block.` and their own name.

use fourfold_kernels::spatial::Window;
use serde_json::Value;

use crate::config::{COUNTS, Config, WIDTHS};
use crate::layers::{BatchNormSpec, Conv2dSpec, LayerSpec, LinearSpec, kept_inputs, segments};
use crate::{ModelError, Role, WeightSpec};

/// Residual blocks inside one another.
const DEEPEST: usize = 8;

/// Elements of an image and of what a layer makes of one.
const MOST_ELEMENTS: usize = 1 << 28;

/// A convolutional classifier.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvNetSpec {
    /// Channels, height and width of an image.
    pub image: [usize; 3],
    /// Classes it tells apart.
    pub classes: usize,
    /// What is taken from each channel of an image of values in [0, 1].
    pub mean: Vec<f32>,
    /// What it is divided by then.
    pub std: Vec<f32>,
    /// The stack.
    pub layers: Vec<LayerSpec>,
}

impl ConvNetSpec {
    /// Whether a configuration describes a convolutional network.
    pub fn is_described_by(config: &Value) -> bool {
        let class = config.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
        config.get("model_type").and_then(Value::as_str) == Some("convnet") || class == Some("ConvNet")
    }

    /// Reads the description.
    ///
    /// # Errors
    /// A key that is missing or out of range, a layer that does not fit the one before it.
    pub fn from_config(config: &Value) -> Result<Self, ModelError> {
        let config = Config::new(config)?;
        let image = triple(&config, "image_size")?;
        let [channels, height, width] = image;
        let normalize = config.object("normalize")?;
        let numbers = |key: &str, default: f32| -> Result<Vec<f32>, ModelError> {
            let Some(values) = normalize.as_ref().and_then(|n| n.get(key)) else { return Ok(vec![default; channels]) };
            let list: Option<Vec<f32>> =
                values.as_array().and_then(|list| list.iter().map(|v| v.as_f64().map(|v| v as f32)).collect());
            match list.filter(|list| list.len() == channels && list.iter().all(|v| v.is_finite())) {
                Some(list) => Ok(list),
                None => Err(config.bad("normalize", format!("{key}: {channels} numbers are expected"))),
            }
        };
        let (mean, std) = (numbers("mean", 0.0)?, numbers("std", 1.0)?);
        if std.iter().any(|&s| s <= 0.0) {
            return Err(config.bad("normalize", "std: positive numbers are expected"));
        }
        let mut shape = Shape::Image { channels, size: [height, width] };
        let list = config.get("layers").ok_or_else(|| config.missing("layers"))?;
        let layers = read_layers(list, &mut shape, "", "", 0)?;
        let Shape::Flat(classes) = shape else {
            return Err(
                config.bad("layers", "the last layer must give one row an image: flatten and linear are missing")
            );
        };
        let spec = Self { image, classes, mean, std, layers };
        let mut names = std::collections::HashSet::new();
        match spec.weights().into_iter().find(|w| !names.insert(w.name.clone())) {
            Some(twice) => Err(ModelError::Inconsistent(format!("two layers have a tensor {}", twice.name))),
            None => Ok(spec),
        }
    }

    /// Every tensor, in the order of the stack.
    pub fn weights(&self) -> Vec<WeightSpec> {
        let mut all = Vec::new();
        for (block, part) in self.parts().into_iter().enumerate() {
            let weights = self.layers[part].iter().flat_map(LayerSpec::weights);
            all.extend(weights.map(|w| WeightSpec { block: Some(block), ..w }));
        }
        all
    }

    /// Elements that are trained.
    pub fn parameters(&self) -> u64 {
        let is_trained = |w: &&WeightSpec| !matches!(w.role, Role::RunningMean | Role::RunningVariance);
        self.weights().iter().filter(is_trained).map(WeightSpec::elements).sum()
    }

    /// The inputs that training with recomputation keeps of an image: rows and columns.
    pub fn kept_inputs(&self) -> Vec<[usize; 2]> {
        let [channels, height, width] = self.image;
        kept_inputs(&self.layers, [height * width, channels])
    }

    /// The parts of the stack that are run, learned and compressed one at a time.
    pub fn parts(&self) -> Vec<std::ops::Range<usize>> {
        segments(&self.layers)
    }
}

/// What goes from one layer to the next.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Shape {
    Image { channels: usize, size: [usize; 2] },
    Flat(usize),
}

fn triple(config: &Config, key: &str) -> Result<[usize; 3], ModelError> {
    let list = config.get(key).ok_or_else(|| config.missing(key))?.as_array();
    let sizes: Option<Vec<usize>> =
        list.and_then(|list| list.iter().map(|v| v.as_u64().and_then(|v| usize::try_from(v).ok())).collect());
    match sizes.as_deref() {
        Some(&[c, h, w]) if [c, h, w].iter().all(|v| WIDTHS.contains(v)) && c * h * w <= MOST_ELEMENTS => Ok([c, h, w]),
        _ => Err(config.bad(key, "channels, height and width are expected")),
    }
}

/// A number, or a number for each axis.
fn pair(config: &Config, key: &str, default: Option<[usize; 2]>, least: usize) -> Result<[usize; 2], ModelError> {
    let Some(value) = config.get(key) else { return default.ok_or_else(|| config.missing(key)) };
    let number = |v: &Value| v.as_u64().filter(|v| (least as u64..1 << 16).contains(v)).map(|v| v as usize);
    let both = match value {
        Value::Array(list) => match list.as_slice() {
            [a, b] => number(a).zip(number(b)),
            _ => None,
        },
        one => number(one).map(|v| (v, v)),
    };
    both.map(|(a, b)| [a, b]).ok_or_else(|| config.bad(key, format!("one or two numbers from {least} are expected")))
}

/// Reads a list of layers; `below` is what names begin with, `folder` what is between it and a layer's place in the list.
fn read_layers(
    list: &Value,
    shape: &mut Shape,
    below: &str,
    folder: &str,
    depth: usize,
) -> Result<Vec<LayerSpec>, ModelError> {
    let Some(list) = list.as_array().filter(|list| list.len() <= *COUNTS.end()) else {
        return Err(ModelError::Inconsistent(format!("{below}: layers: a list is expected")));
    };
    let mut layers = Vec::with_capacity(list.len());
    for (place, value) in list.iter().enumerate() {
        let config = Config::new(value)?;
        let name = match config.text("name")? {
            Some(name) => format!("{below}{name}"),
            None => format!("{below}{folder}{place}"),
        };
        layers.push(read_layer(&config, &name, shape, depth).map_err(|error| within(&name, error))?);
        let elements = match *shape {
            Shape::Image { channels, size } => channels.saturating_mul(size[0]).saturating_mul(size[1]),
            Shape::Flat(features) => features,
        };
        if elements > MOST_ELEMENTS {
            return Err(ModelError::Inconsistent(format!("layer {name}: {elements} elements an image are too many")));
        }
    }
    Ok(layers)
}

/// Says which layer an error is about.
fn within(name: &str, error: ModelError) -> ModelError {
    match error {
        ModelError::MissingKey { key } => ModelError::MissingKey { key: format!("layer {name}: {key}") },
        ModelError::Value { key, value, reason } => {
            ModelError::Value { key: format!("layer {name}: {key}"), value, reason }
        }
        other => other,
    }
}

fn read_layer(config: &Config, name: &str, shape: &mut Shape, depth: usize) -> Result<LayerSpec, ModelError> {
    let kind = config.text("type")?.ok_or_else(|| config.missing("type"))?;
    let image = |shape: &Shape| match *shape {
        Shape::Image { channels, size } => Ok((channels, size)),
        Shape::Flat(_) => Err(config.bad("type", "an image is expected before it, and there is a row")),
    };
    let window = |size, default_stride: Option<[usize; 2]>| {
        let kernel = pair(config, "kernel_size", None, 1)?;
        let stride = pair(config, "stride", default_stride.or(Some(kernel)), 1)?;
        let padding = pair(config, "padding", Some([0, 0]), 0)?;
        let window = Window { image: size, kernel, stride, padding };
        match window.output() {
            Some(output) if output[0] > 0 && output[1] > 0 => Ok((window, output)),
            _ => Err(config.bad("kernel_size", format!("does not fit an image of {}x{}", size[0], size[1]))),
        }
    };
    Ok(match kind {
        "conv2d" => {
            let (inputs, size) = image(shape)?;
            let outputs = config.size("out_channels", WIDTHS)?;
            let groups = config.size_or("groups", 1, WIDTHS)?;
            if !inputs.is_multiple_of(groups) || !outputs.is_multiple_of(groups) {
                return Err(config.bad("groups", format!("must divide {inputs} and {outputs} channels")));
            }
            let (window, size) = window(size, Some([1, 1]))?;
            *shape = Shape::Image { channels: outputs, size };
            let bias = config.flag("bias", true)?;
            LayerSpec::Conv2d(Conv2dSpec { name: name.to_owned(), inputs, outputs, groups, window, bias })
        }
        "batch_norm" => LayerSpec::BatchNorm(BatchNormSpec {
            name: name.to_owned(),
            channels: image(shape)?.0,
            eps: config.positive_or("eps", 1e-5)? as f32,
            momentum: config.positive_or("momentum", 0.1)?.min(1.0) as f32,
        }),
        "relu" => LayerSpec::Relu,
        "max_pool" => {
            let (channels, size) = image(shape)?;
            let (window, output) = window(size, None)?;
            let half = [window.kernel[0] / 2, window.kernel[1] / 2];
            if window.taps() > 256 || window.padding[0] > half[0] || window.padding[1] > half[1] {
                return Err(config.bad("kernel_size", "at most 256 places, and padding of at most half of it"));
            }
            *shape = Shape::Image { channels, size: output };
            LayerSpec::MaxPool(window)
        }
        "avg_pool" => {
            let (channels, size) = image(shape)?;
            let (window, output) = window(size, None)?;
            *shape = Shape::Image { channels, size: output };
            LayerSpec::AveragePool(window)
        }
        "adaptive_avg_pool" => {
            let (channels, size) = image(shape)?;
            let output = pair(config, "output_size", None, 1)?;
            if output[0] > size[0] || output[1] > size[1] {
                return Err(config.bad("output_size", format!("more than the image's {}x{}", size[0], size[1])));
            }
            *shape = Shape::Image { channels, size: output };
            LayerSpec::AdaptiveAveragePool { image: size, output }
        }
        "flatten" => {
            let (channels, size) = image(shape)?;
            *shape = Shape::Flat(channels * size[0] * size[1]);
            LayerSpec::Flatten { pixels: size[0] * size[1] }
        }
        "linear" => {
            let Shape::Flat(inputs) = *shape else {
                return Err(config.bad("type", "flatten is expected before it"));
            };
            let outputs = config.size("out_features", WIDTHS)?;
            *shape = Shape::Flat(outputs);
            let bias = config.flag("bias", true)?;
            LayerSpec::Linear(LinearSpec { name: name.to_owned(), outputs, inputs, bias, role: Role::Mlp })
        }
        "residual" => {
            if depth == DEEPEST {
                return Err(config.bad("type", format!("more than {DEEPEST} blocks inside one another")));
            }
            let (mut of_body, mut of_shortcut) = (*shape, *shape);
            let below = format!("{name}.");
            let body = config.get("layers").ok_or_else(|| config.missing("layers"))?;
            let body = read_layers(body, &mut of_body, &below, "layers.", depth + 1)?;
            let shortcut = match config.get("shortcut") {
                Some(list) => read_layers(list, &mut of_shortcut, &below, "shortcut.", depth + 1)?,
                None => Vec::new(),
            };
            if of_body != of_shortcut {
                return Err(config.bad("type", format!("its layers give {of_body:?}, its shortcut {of_shortcut:?}")));
            }
            *shape = of_body;
            LayerSpec::Residual { name: name.to_owned(), body, shortcut }
        }
        _ => {
            let known = "conv2d, batch_norm, relu, max_pool, avg_pool, adaptive_avg_pool, flatten, linear, residual";
            return Err(config.bad("type", format!("there are {known}")));
        }
    })
}
