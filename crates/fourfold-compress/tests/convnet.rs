//! Convolutional networks, compressed: what changes only how they are computed changes no answer, and what changes answers makes the
//! file smaller.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use fourfold_compress::convnet::chain::{Amount, Decomposition};
use fourfold_compress::convnet::{ConvNetJob, Goal, Network, Output, Recipe, compress, factorized, fold};
use fourfold_compress::{CompressError, Plan, Silent};
use fourfold_formats::writer::header_bytes;
use fourfold_kernels::backward::Backward;
use fourfold_kernels::{Reference, Tensor};
use fourfold_models::ConvNetSpec;
use fourfold_models::layers::LayerSpec;
use fourfold_tensor::{Dense, Form, Weight};
use serde_json::json;

fn backend() -> Arc<dyn Backward> {
    Arc::new(Reference)
}

/// Numbers that look random, the same every time.
fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..len).map(|_| next()).collect()
}

fn images(spec: &ConvNetSpec, batches: usize) -> Vec<Tensor> {
    let [channels, height, width] = spec.image;
    let rows = 4 * height * width;
    (0..batches).map(|b| Tensor::new(rows, channels, noise(b as u64 + 7, rows * channels))).collect()
}

/// The residual network whose answers PyTorch gave (`scripts/golden_convnet.py`).
fn resnet() -> Network {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fourfold-models/tests/golden_convnet/resnet");
    let checkpoint = fourfold_formats::open(&folder).unwrap();
    let spec = ConvNetSpec::from_config(&checkpoint.config).unwrap();
    Network::read(spec, &*checkpoint.weights).unwrap()
}

/// A network of weights by chance, wide enough for decompositions to make it smaller.
fn plain() -> Network {
    let config = json!({ "model_type": "convnet", "image_size": [2, 9, 8], "layers": [
        { "type": "conv2d", "out_channels": 16, "kernel_size": [3, 5], "stride": [2, 1], "padding": [1, 2] },
        { "type": "relu" },
        { "type": "conv2d", "out_channels": 24, "kernel_size": 3, "stride": [1, 2], "padding": [0, 1] },
        { "type": "relu" }, { "type": "flatten" },
        { "type": "linear", "out_features": 64 }, { "type": "relu" }, { "type": "linear", "out_features": 5 } ] });
    let spec = ConvNetSpec::from_config(&config).unwrap();
    let weight = |(i, w): (usize, fourfold_models::WeightSpec)| {
        let scale = (w.shape[1..].iter().product::<usize>().max(1) as f32).sqrt();
        let values = noise(i as u64 + 100, w.elements() as usize).into_iter().map(|v| 3.0 * v / scale).collect();
        (w.name, Dense::from_f32(w.shape, values).into())
    };
    let weights = spec.weights().into_iter().enumerate().map(weight).collect();
    Network::new(spec, weights)
}

fn run(network: &Network, goal: Goal, images: &[Tensor]) -> Result<Output, CompressError> {
    let header = |forms: &[(String, Form)]| header_bytes(forms, u64::MAX).unwrap();
    let (spec, backend) = (&network.spec, backend());
    compress(&ConvNetJob { spec, source: network, goal, images, backend, header: &header }, &mut Silent)
}

fn recipe(words: &str) -> Goal {
    Goal::Recipe(words.parse().unwrap())
}

fn bytes(network: &Network) -> u64 {
    network.forms().iter().map(|(_, form)| form.file_bytes()).sum()
}

/// The largest difference of two networks' logits.
fn distance(a: &Network, b: &Network) -> f32 {
    let images = images(&a.spec, 1);
    let (a, b) = (a.logits(&images, &backend()).unwrap(), b.logits(&images, &backend()).unwrap());
    a[0].host().iter().zip(b[0].host()).fold(0.0, |most, (a, b)| most.max((a - b).abs()))
}

#[test]
fn folded_norms_change_no_answer() {
    let network = resnet();
    let folded = fold(&network).unwrap();
    let norms = |n: &Network| n.weights().keys().filter(|name| name.ends_with("running_mean")).count();
    assert!(norms(&network) > 0 && norms(&folded) == 0);
    assert!(distance(&network, &folded) < 1e-4, "{}", distance(&network, &folded));
    // Negative control: the norms do something.
    let mut weights = folded.weights().clone();
    let (name, weight) = weights.iter().find(|(name, _)| name.ends_with(".bias")).unwrap();
    let (name, values) = (name.clone(), weight.to_f32().iter().map(|v| v + 0.1).collect::<Vec<_>>());
    weights.insert(name, Dense::from_f32(vec![values.len()], values).into());
    assert!(distance(&network, &Network::new(folded.spec.clone(), weights)) > 1e-3);
}

/// The kernel that a chain's layers are together.
fn product(decomposition: Decomposition, factors: &[Weight], shape: [usize; 4]) -> Vec<f32> {
    let f: Vec<Vec<f32>> = factors.iter().map(Weight::to_f32).collect();
    let [outputs, inputs, height, width] = shape;
    let mut kernel = Vec::new();
    for (o, i, h, w) in (0..outputs).flat_map(|o| {
        (0..inputs).flat_map(move |i| (0..height).flat_map(move |h| (0..width).map(move |w| (o, i, h, w))))
    }) {
        let rank = factors[0].rows();
        kernel.push(match decomposition {
            Decomposition::Svd(_) => {
                (0..rank).map(|r| f[1][o * rank + r] * f[0][((r * inputs + i) * height + h) * width + w]).sum::<f32>()
            }
            Decomposition::Tucker(_) => {
                let of_outputs = factors[1].rows();
                let core = |a: usize, b: usize| f[1][((a * rank + b) * height + h) * width + w];
                (0..of_outputs)
                    .flat_map(|a| (0..rank).map(move |b| (a, b)))
                    .map(|(a, b)| f[2][o * of_outputs + a] * core(a, b) * f[0][b * inputs + i])
                    .sum()
            }
            Decomposition::Cp(_) => (0..rank)
                .map(|r| f[3][o * rank + r] * f[0][r * inputs + i] * f[1][r * height + h] * f[2][r * width + w])
                .sum(),
        });
    }
    kernel
}

#[test]
fn chains_compute_the_kernel_that_their_factors_multiply_to() {
    let network = plain();
    for words in ["svd:0.4", "tucker:0.5", "cp:6"] {
        let Output { network: chained, plan, .. } = run(&network, recipe(words), &[]).unwrap();
        let mut weights = network.weights().clone();
        let mut decomposed = 0;
        for layer in network.products() {
            let LayerSpec::Conv2d(conv) = &layer else { continue };
            let name = format!("{}.weight", conv.name);
            let entry = plan.tensors.iter().find(|e| e.name == name).unwrap();
            let settings = &entry.settings["decomposition"];
            let Ok(decomposition) = serde_json::from_value::<Decomposition>(settings.clone()) else { continue };
            let chain = decomposition.layers(&layer).unwrap();
            let factors: Vec<Weight> =
                chain.iter().map(|layer| chained.weights()[&layer.weights()[0].name].clone()).collect();
            let kernel = product(decomposition, &factors, conv.shape().try_into().unwrap());
            weights.insert(name, Dense::from_f32(conv.shape(), kernel).into());
            decomposed += 1;
        }
        for (name, weight) in chained.weights() {
            if let Some(linear) = name.strip_suffix(".up.weight") {
                // Linear layers: the matrices' product.
                let (down, whole) = (&chained.weights()[&format!("{linear}.down.weight")], format!("{linear}.weight"));
                if weights[&whole].shape().len() == 2 {
                    let pair = fourfold_tensor::LowRank::new(weight.clone(), down.clone()).unwrap();
                    let values = Weight::from(pair).to_f32();
                    weights.insert(whole.clone(), Dense::from_f32(weights[&whole].shape(), values).into());
                }
            }
        }
        let multiplied = Network::new(network.spec.clone(), weights);
        assert!(decomposed > 0 && bytes(&chained) < bytes(&network), "{words}");
        let (same, other) = (distance(&chained, &multiplied), distance(&chained, &network));
        assert!(same < 1e-4 && other > 1e-3, "{words}: {same}, from the original {other}");
        // The layers alone, for a network that is not trained yet.
        let specs = |spec: &ConvNetSpec| spec.weights();
        assert_eq!(specs(&factorized(&network.spec, &words.parse::<Recipe>().unwrap())), specs(&chained.spec));
    }
    assert!(Decomposition::Svd(Amount::Share(0.99)).layers(&network.products()[0]).is_none(), "would be larger");
}

#[test]
fn recipes_make_files_smaller_and_combine() {
    let network = plain();
    let whole = bytes(&network) as f64;
    for (words, most) in [
        ("quantize:16", 0.52),
        ("quantize:8", 0.29),
        ("quantize:4", 0.17),
        ("prune:0.75", 0.32),
        ("prune:2:4,quantize:8", 0.25),
        ("global:0.8,quantize:8", 0.17),
        ("tucker:0.5,svd:0.25,quantize:8", 0.15),
        ("tucker:0.5,svd:0.25,global:0.5,quantize:8", 0.13),
    ] {
        for images in [Vec::new(), images(&network.spec, 4)] {
            let output = run(&network, recipe(words), &images).unwrap();
            let share = bytes(&output.network) as f64 / whole;
            assert!(share < most, "{words}: {share}");
            assert_eq!(output.divergence.is_some(), !images.is_empty());
            // Its own plan gives the same again.
            let again = run(&network, Goal::Plan(Plan::from_json(&output.plan.to_json()).unwrap()), &images).unwrap();
            assert!(again.network.weights() == output.network.weights(), "{words}");
        }
    }
    // Of all kept values together the largest stay: the smallest kept one is no smaller than the largest that went.
    let pruned = run(&network, recipe("global:0.5"), &[]).unwrap().network;
    let (mut kept, mut gone) = (f32::INFINITY, 0.0f32);
    for layer in network.products() {
        let name = &layer.weights()[0].name;
        let (before, after) = (network.weights()[name].to_f32(), pruned.weights()[name].to_f32());
        if matches!(pruned.weights()[name], Weight::Sparse(_)) {
            for (b, a) in before.iter().zip(&after) {
                if *a == 0.0 { gone = gone.max(b.abs()) } else { kept = kept.min(b.abs()) }
            }
        }
    }
    assert!(kept.is_finite() && gone > 0.0 && kept >= gone, "{kept} {gone}");
}

#[test]
fn budgets_are_kept_and_the_mix_is_no_worse_than_the_uniform_choice() {
    let network = plain();
    let images = images(&network.spec, 6);
    let whole = bytes(&network);
    let header = |network: &Network| header_bytes(&network.forms(), u64::MAX).unwrap();
    for share in [4, 6] {
        let output = run(&network, Goal::Bytes(whole / share), &images).unwrap();
        let found = bytes(&output.network) + header(&output.network);
        assert!(found <= whole / share, "{found} of {}", whole / share);
        if let (Some(mixed), Some(uniform)) = (output.divergence, output.uniform_divergence) {
            assert!(mixed <= uniform, "{mixed} {uniform}");
        }
    }
    assert!(matches!(run(&network, Goal::Bytes(500), &images), Err(CompressError::Budget { .. })));
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let network = plain();
    let mut weights: BTreeMap<String, Weight> = network.weights().clone();
    let mut values = weights["2.weight"].to_f32();
    values[5] = f32::NAN;
    weights.insert("2.weight".into(), Dense::from_f32(weights["2.weight"].shape(), values).into());
    let broken = Network::new(network.spec.clone(), weights);
    for words in ["quantize:8", "tucker:0.5", "prune:0.9"] {
        let error = run(&broken, recipe(words), &[]).unwrap_err().to_string();
        assert!(error.contains("2.weight") && error.contains("NaN"), "{words}: {error}");
    }
    let plan = Plan::from_json(r#"{"tensors": [{"name": "9.weight", "method": "keep"}]}"#).unwrap();
    let error = run(&network, Goal::Plan(plan), &[]).unwrap_err().to_string();
    assert!(error.contains("9.weight"), "{error}");
    for words in ["", "tucker:0", "svd:1.5", "prune:1", "global:x", "quantize:9", "cp:1,cp:2", "prune:3:2"] {
        assert!(words.parse::<Recipe>().is_err(), "{words}");
    }
}
