//! A convolutional network with its weights in memory, while it is taken apart: such networks are small, and a decomposition changes
//! their layers.

use std::collections::BTreeMap;
use std::sync::Arc;

use fourfold_kernels::Tensor;
use fourfold_kernels::backward::Backward;
use fourfold_models::layers::LayerSpec;
use fourfold_models::{ConvNet, ConvNetSpec, ModelError};
use fourfold_tensor::{Dense, Form, SourceError, TensorInfo, Weight, WeightSource};

use crate::CompressError;

/// Layers and their tensors.
#[derive(Clone, Debug)]
pub struct Network {
    /// The layers.
    pub spec: ConvNetSpec,
    infos: Vec<TensorInfo>,
    weights: BTreeMap<String, Weight>,
}

impl Network {
    /// Reads every tensor, packed ones too, as f32 and in its own shape.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub fn read(spec: ConvNetSpec, source: &dyn WeightSource) -> Result<Self, CompressError> {
        let mut weights = BTreeMap::new();
        for spec in spec.weights() {
            let weight = source.load(&spec.name)?;
            let (found, values) = (weight.shape(), weight.to_f32());
            let matrix = [spec.shape[0], spec.shape[1..].iter().product()];
            if found != spec.shape && found != matrix {
                return Err(ModelError::Shape { tensor: spec.name, expected: spec.shape, found }.into());
            }
            weights.insert(spec.name, Dense::from_f32(spec.shape, values).into());
        }
        Ok(Self::new(spec, weights))
    }

    /// Joins layers to their tensors, of which there may be more.
    pub fn new(spec: ConvNetSpec, mut weights: BTreeMap<String, Weight>) -> Self {
        let names: Vec<String> = spec.weights().into_iter().map(|w| w.name).collect();
        weights.retain(|name, _| names.contains(name));
        let info = |name: &String| {
            let weight = weights.get(name)?;
            let bytes = Form::of(weight).file_bytes();
            Some(TensorInfo { name: name.clone(), shape: weight.shape(), storage: weight.describe(), bytes })
        };
        let infos = names.iter().filter_map(info).collect();
        Self { spec, infos, weights }
    }

    /// The tensors, by name.
    pub fn weights(&self) -> &BTreeMap<String, Weight> {
        &self.weights
    }

    /// Names and forms, in the order of the stack.
    pub fn forms(&self) -> Vec<(String, Form)> {
        self.infos.iter().filter_map(|i| Some((i.name.clone(), Form::of(self.weights.get(&i.name)?)))).collect()
    }

    /// One tensor as f32.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn values(&self, name: &str) -> Result<Vec<f32>, CompressError> {
        Ok(self.load(name)?.to_f32())
    }

    /// Its convolutions and linear layers, in the order of the stack.
    pub fn products(&self) -> Vec<LayerSpec> {
        let mut found = Vec::new();
        collect(&self.spec.layers, &mut found);
        found
    }

    /// Ready to run.
    ///
    /// # Errors
    /// A tensor that the kernels cannot take.
    pub fn run(&self, backend: &Arc<dyn Backward>) -> Result<ConvNet, ModelError> {
        ConvNet::load(&self.spec, self, backend.clone())
    }

    /// The class probabilities of each image, as logits.
    ///
    /// # Errors
    /// As [`Network::run`].
    pub fn logits(&self, images: &[Tensor], backend: &Arc<dyn Backward>) -> Result<Vec<Tensor>, ModelError> {
        let net = self.run(backend)?;
        Ok(images.iter().map(|batch| net.logits(batch.clone())).collect())
    }
}

fn collect(layers: &[LayerSpec], found: &mut Vec<LayerSpec>) {
    for layer in layers {
        match layer {
            LayerSpec::Conv2d(_) | LayerSpec::Linear(_) => found.push(layer.clone()),
            LayerSpec::Residual { body, shortcut, .. } => {
                collect(body, found);
                collect(shortcut, found);
            }
            LayerSpec::BatchNorm(_)
            | LayerSpec::Relu
            | LayerSpec::MaxPool(_)
            | LayerSpec::AveragePool(_)
            | LayerSpec::AdaptiveAveragePool { .. }
            | LayerSpec::Flatten { .. } => {}
        }
    }
}

/// Name of a product's weight; `None` for other layers.
pub fn weight_name(layer: &LayerSpec) -> Option<String> {
    match layer {
        LayerSpec::Conv2d(conv) => Some(format!("{}.weight", conv.name)),
        LayerSpec::Linear(linear) => Some(format!("{}.weight", linear.name)),
        LayerSpec::BatchNorm(_)
        | LayerSpec::Relu
        | LayerSpec::MaxPool(_)
        | LayerSpec::AveragePool(_)
        | LayerSpec::AdaptiveAveragePool { .. }
        | LayerSpec::Flatten { .. }
        | LayerSpec::Residual { .. } => None,
    }
}

impl WeightSource for Network {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn load(&self, name: &str) -> Result<Weight, SourceError> {
        self.weights
            .get(name)
            .cloned()
            .ok_or_else(|| SourceError::Missing { file: "the network".into(), tensor: name.to_owned() })
    }
}
