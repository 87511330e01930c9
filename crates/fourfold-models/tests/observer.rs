//! Calibration sees the input of every weight it may quantize.

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use fourfold_kernels::{Backend, KvDtype, Reference, Tensor};
use fourfold_models::{Block, Embedding, Head, Observer, Role};
use support::cases;

/// Rows and columns seen for each weight.
#[derive(Default)]
struct Seen(BTreeMap<String, (usize, usize)>);

impl Observer for Seen {
    fn linear_input(&mut self, weight_name: &str, input: &Tensor) {
        let seen = self.0.entry(weight_name.to_owned()).or_insert((0, input.cols()));
        seen.0 += input.rows();
        assert_eq!(seen.1, input.cols(), "{weight_name}");
    }
}

#[test]
fn every_linear_weight_shows_its_input() {
    let backend: Arc<dyn Backend> = Arc::new(Reference);
    for case in cases() {
        let spec = case.spec();
        // Prefill in one call, and token by token: the two forms of latent attention.
        for step in [case.ids.len(), 1] {
            let mut seen = Seen::default();
            let embedding = Embedding::load(&spec, &case.weights, &backend).unwrap();
            let blocks: Vec<Block> =
                (0..spec.blocks.len()).map(|i| Block::load(&spec, i, &case.weights, &backend).unwrap()).collect();
            let mut caches: Vec<_> = blocks.iter().map(|block| block.new_cache(KvDtype::F32)).collect();
            let head = Head::load(&spec, &case.weights, &backend).unwrap();
            for ids in case.ids.chunks(step) {
                let mut x = embedding.forward(ids);
                for (block, cache) in blocks.iter().zip(&mut caches) {
                    x = block.forward(x, cache, &mut seen);
                }
                head.logits_observed(&head.norm(&x), &mut seen);
            }
            for weight in spec.weights() {
                let is_matrix = weight.shape.len() == 2;
                let name = format!("{}: {}", case.name, weight.name);
                match (weight.role, seen.0.get(&weight.name)) {
                    (Role::Norm | Role::Bias, found) => assert_eq!(found, None, "{name}"),
                    (Role::Embedding, found) => assert_eq!(found.is_some(), spec.tied, "{name}"),
                    // An expert sees the tokens it got, perhaps none.
                    (Role::RoutedExpert, found) => {
                        if let Some(&(rows, cols)) = found {
                            assert!(rows < case.ids.len() && cols == weight.shape[1], "{name}");
                        }
                    }
                    (_, found) if is_matrix => assert_eq!(found, Some(&(case.ids.len(), weight.shape[1])), "{name}"),
                    (_, found) => assert_eq!(found, None, "{name}"),
                }
            }
        }
    }
}

/// Token counts of the experts add up to the experts of a token.
#[test]
fn each_token_goes_to_its_number_of_experts() {
    let backend: Arc<dyn Backend> = Arc::new(Reference);
    let case = cases().into_iter().find(|case| case.name == "deepseek_v2_moe").unwrap();
    let spec = case.spec();
    let block = Block::load(&spec, 1, &case.weights, &backend).unwrap();
    let mut seen = Seen::default();
    let x = Embedding::load(&spec, &case.weights, &backend).unwrap().forward(&case.ids);
    block.forward(x, &mut block.new_cache(KvDtype::F32), &mut seen);
    let routed = |part: &str| -> usize {
        seen.0.iter().filter(|(name, _)| name.contains(".experts.") && name.contains(part)).map(|(_, s)| s.0).sum()
    };
    for part in ["gate_proj", "up_proj", "down_proj"] {
        assert_eq!(routed(part), 3 * case.ids.len());
    }
}
