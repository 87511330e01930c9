//! Convolutional networks against PyTorch (`scripts/golden_convnet.py`): logits in evaluation; loss, gradients and running
//! statistics in training, with everything kept and with segments computed anew.

mod support;

use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;

use fourfold_kernels::backward::Backward;
use fourfold_kernels::{Activations, Bf16Tensor, Cpu, CpuOptions, Reference, Tensor};
use fourfold_models::layers::{Gradients, StackPass, Trained};
use fourfold_models::{ConvNet, ConvNetSpec};
use fourfold_tensor::WeightSource;
use serde_json::{Value, json};
use support::{File, distance};

struct Case {
    name: &'static str,
    spec: ConvNetSpec,
    weights: File,
    golden: File,
}

fn cases() -> Vec<Case> {
    let open = |name: &'static str| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden_convnet").join(name);
        let config: Value =
            serde_json::from_str(&std::fs::read_to_string(folder.join("config.json")).unwrap()).unwrap();
        Case {
            name,
            spec: ConvNetSpec::from_config(&config).unwrap(),
            weights: File::read(&folder.join("model.safetensors")),
            golden: File::read(&folder.join("golden.safetensors")),
        }
    };
    vec![open("plain"), open("resnet")]
}

impl Case {
    /// The golden images, a row a pixel.
    fn images(&self) -> Tensor {
        let values = self.golden.f32("images");
        let pixels = self.spec.image[1] * self.spec.image[2];
        let flat = Tensor::new(6, self.spec.image[0] * pixels, values);
        fourfold_kernels::spatial::Spatial::channels_last(&Reference, &flat, pixels)
    }
}

fn backends() -> Vec<Arc<dyn Backward>> {
    let cpu = Cpu::new(CpuOptions { threads: 2, activations: Activations::F32, ..CpuOptions::default() }).unwrap();
    vec![Arc::new(Reference), Arc::new(cpu)]
}

#[test]
fn logits_are_those_of_pytorch() {
    for case in cases() {
        for backend in backends() {
            let name = format!("{} {}", case.name, backend.name());
            let net = ConvNet::load(&case.spec, &case.weights, backend).unwrap();
            let logits = net.logits(case.images());
            assert_eq!((logits.rows(), logits.cols()), (6, case.spec.classes), "{name}");
            let worst = distance(logits.host(), &case.golden.f32("logits"));
            assert!(worst < 2e-5, "{name}: {worst}");
            // Negative control: other images give other logits.
            let mut other = case.images();
            other.host_mut()[7] += 1.0;
            assert!(distance(net.logits(other).host(), &case.golden.f32("logits")) > 1e-3, "{name}");
        }
    }
}

#[test]
fn gradients_and_statistics_are_those_of_pytorch() {
    for case in cases() {
        for (backend, recompute) in backends().into_iter().flat_map(|b| [(b.clone(), false), (b, true)]) {
            let name = format!("{} {} recompute {recompute}", case.name, backend.name());
            let stack = ConvNet::load_part(&case.spec, 0..case.spec.layers.len(), &case.weights, &backend).unwrap();
            let kept = case.spec.kept_inputs().into_iter().filter(|_| recompute);
            let inputs = kept.map(|[rows, cols]| Bf16Tensor::zeros(6 * rows, cols)).collect();
            let pass = StackPass { backend: &*backend, recompute, inputs: RefCell::new(inputs) };
            let mut running = Vec::new();
            let (logits, saved) = stack.train_forward(Arc::new(case.images()), &pass, &mut running);
            assert!(pass.inputs.borrow().is_empty(), "{name}: an input of another shape than was said");
            let mut dy = Arc::unwrap_or_clone(logits);
            let losses = backend.cross_entropy(&mut dy, &case.golden.ids("labels"), 1.0 / 6.0);
            let loss = losses.iter().sum::<f32>() / 6.0;
            assert!((loss - case.golden.f32("loss")[0]).abs() < 1e-5, "{name}: loss {loss}");
            let mut gradients = Gradients::new(Trained::All);
            assert!(stack.backward(saved, dy, false, &pass, &mut gradients).is_none(), "{name}: nobody wants it");
            // Segments computed anew start from inputs rounded to bf16: another of two nearly equal values may then be the largest
            // under a window, and with six images one such place shows.
            let bound = if recompute { 0.15 } else { 2e-5 };
            let found = gradients.take_all();
            let mut compared = 0;
            for info in case.golden.tensors() {
                if let Some(tensor) = info.name.strip_prefix("gradient.") {
                    let (expected, gradient) = (case.golden.f32(&info.name), &found[tensor]);
                    let largest = expected.iter().fold(0.0f32, |most, g| most.max(g.abs()));
                    let worst = distance(gradient.host(), &expected);
                    assert!(worst < bound * largest.max(0.1), "{name}: {tensor}: {worst} of {largest}");
                    compared += 1;
                } else if let Some(tensor) = info.name.strip_prefix("after.") {
                    let statistic = running.iter().find(|s| s.name == tensor).unwrap();
                    let after = statistic.after(&case.weights.f32(tensor));
                    assert!(distance(&after, &case.golden.f32(&info.name)) < 1e-5, "{name}: {tensor}");
                }
            }
            assert_eq!(compared, found.len(), "{name}: a gradient that PyTorch does not have");
        }
    }
}

#[test]
fn descriptions_that_do_not_fit_are_refused_by_layer() {
    let with = |layers: Value| {
        let config = json!({ "model_type": "convnet", "image_size": [1, 8, 8], "layers": layers });
        ConvNetSpec::from_config(&config).map(|_| ()).unwrap_err().to_string()
    };
    let linear = json!({ "type": "linear", "out_features": 2 });
    for (layers, expected) in [
        (json!([{ "type": "conv2d", "out_channels": 4, "kernel_size": 9 }]), "layer 0: kernel_size"),
        (json!([{ "type": "conv2d", "out_channels": 4, "kernel_size": 3, "groups": 3 }]), "layer 0: groups"),
        (json!([linear]), "layer 0: type"),
        (json!([{ "type": "flatten" }, { "type": "relu" }, { "type": "batch_norm" }]), "layer 2: type"),
        (json!([{ "type": "relu" }]), "flatten and linear are missing"),
        (json!([{ "type": "swish" }]), "layer 0: type"),
        (json!([{ "type": "max_pool", "kernel_size": 2, "stride": 0 }]), "layer 0: stride"),
        (
            json!([{ "type": "residual", "name": "b", "layers": [{ "type": "max_pool", "kernel_size": 2 }] }]),
            "layer b: type",
        ),
        (
            json!([{ "type": "flatten" }, { "type": "linear", "name": "a", "out_features": 2 },
                { "type": "linear", "name": "a", "out_features": 2 }]),
            "two layers have a tensor a.weight",
        ),
    ] {
        let message = with(layers);
        assert!(message.contains(expected), "{message}, {expected} expected");
    }
}
