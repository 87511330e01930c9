//! `--stride` against the recipe of the transformers documentation, computed by it (`scripts/golden_perplexity.py`).

#[path = "../../fourfold-models/tests/support/mod.rs"]
mod support;

use std::ops::ControlFlow;

use fourfold_infer::eval::{Base, Evaluation, Protocol, evaluate, windows};
use fourfold_kernels::KvDtype;

#[test]
fn sliding_windows_come_to_the_documentations_perplexity() {
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../fourfold-models/tests/golden/llama_gqa_tied");
    let case = support::Case::open(golden.into());
    let model = case.model(support::cpu(1));
    let ids: Vec<u32> = (0..150).map(|i| (7 * i * i + 3 * i + 1) % 64).collect();
    let golden: Vec<(usize, usize, usize, f64)> = serde_json::from_str(include_str!("golden_perplexity.json")).unwrap();
    assert!(golden.len() >= 8);
    let measured = |context, stride, tokens: usize| {
        let windows = windows(&ids[..tokens], None, context, Protocol::Sliding { stride }, None).unwrap();
        let evaluation = Evaluation { model: &model, base: Base::None, save: None, kv: KvDtype::F32 };
        evaluate(evaluation, &windows, &mut |_| ControlFlow::Continue(())).unwrap().perplexity.perplexity
    };
    for &(context, stride, tokens, expected) in &golden {
        let found = measured(context, stride, tokens);
        let what = format!("context {context}, stride {stride}, {tokens} tokens");
        assert!((found / expected - 1.0).abs() < 1e-5, "{what}: {found}, by transformers {expected}");
    }
    // Negative control: another stride gives another figure.
    let (context, stride, tokens, expected) = golden[0];
    assert!((measured(context, stride + 8, tokens) / expected - 1.0).abs() > 1e-4);
}
