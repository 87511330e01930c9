//! Sessions, generation and evaluation on tiny random models.

use std::io::{Cursor, Write};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use fourfold_infer::eval::{
    Base, Evaluation, EvaluationReport, Protocol, ReadSeek, SavedLogits, SavedLogitsWriter, Window, dump_logits,
    evaluate, windows,
};
use fourfold_infer::{GenerationSettings, InferError, Sampler, SamplerSettings, Session, Stop, generate};
use fourfold_kernels::{KvDtype, Reference};
use fourfold_models::testing::RandomWeights;
use fourfold_models::{Model, ModelSpec, spec_from_config};
use serde_json::json;

fn spec() -> ModelSpec {
    spec_from_config(&json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 61, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false
    }))
    .unwrap()
}

fn model(seed: u64) -> Arc<Model> {
    let spec = spec();
    Arc::new(Model::load(&spec, &RandomWeights::new(&spec, seed), Arc::new(Reference), &mut |_| {}).unwrap())
}

fn session(context: usize) -> Session {
    Session::new(model(1), KvDtype::F32, context)
}

fn never() -> bool {
    false
}

fn close(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(x, y)| (x - y).abs() < 1e-4)
}

#[test]
fn pushing_tokens_is_prompting_with_them() {
    let ids = [3, 14, 15, 9, 2, 6];
    let (_, whole) = session(32).prompt(&ids, &never).unwrap();
    let mut stepwise = session(32);
    let (_, mut logits) = stepwise.prompt(&ids[..2], &never).unwrap();
    assert!(!close(&logits, &whole));
    for &id in &ids[2..] {
        logits = stepwise.push(id).unwrap();
    }
    assert!(close(&logits, &whole));
    assert_eq!(stepwise.ids(), ids);
}

#[test]
fn a_prompt_reuses_what_is_cached_of_its_beginning() {
    let mut s = session(32);
    s.prompt(&[1, 2, 3, 4], &never).unwrap();
    let (reused, logits) = s.prompt(&[1, 2, 3, 9, 8], &never).unwrap();
    assert_eq!(reused, 3);
    let (none, fresh) = session(32).prompt(&[1, 2, 3, 9, 8], &never).unwrap();
    assert_eq!(none, 0);
    assert!(close(&logits, &fresh));
    // The same prompt again: its last token has to be computed for its logits.
    let (again, same) = s.prompt(&[1, 2, 3, 9, 8], &never).unwrap();
    assert_eq!(again, 4);
    assert!(close(&same, &fresh));
}

#[test]
fn what_cannot_run_is_refused_and_the_session_lives_on() {
    let mut s = session(4);
    assert!(matches!(s.prompt(&[], &never), Err(InferError::EmptyPrompt)));
    assert!(matches!(s.prompt(&[1, 61], &never), Err(InferError::TokenOutOfRange { id: 61, position: 1, .. })));
    assert!(matches!(s.prompt(&[1; 5], &never), Err(InferError::ContextFull { tokens: 5, context: 4 })));
    assert!(matches!(s.prompt(&[1, 2], &|| true), Err(InferError::Interrupted)));
    s.prompt(&[1, 2, 3, 4], &never).unwrap();
    assert!(matches!(s.push(1), Err(InferError::ContextFull { .. })));
    assert!(s.cache_bytes() > 0);
    assert_eq!(session(1000).context(), 64, "never more than the model has positions for");
}

fn run(settings: &GenerationSettings, context: usize, interrupted: &dyn Fn() -> bool) -> (Vec<u32>, Stop) {
    let greedy = SamplerSettings { temperature: 0.0, ..SamplerSettings::default() };
    let mut told = Vec::new();
    let done = generate::<InferError>(
        &mut session(context),
        &mut Sampler::new(greedy),
        &[5, 6, 7],
        settings,
        interrupted,
        |id| {
            told.push(id);
            Ok(())
        },
    )
    .unwrap();
    assert_eq!(done.ids, told);
    assert_eq!((done.prompt_tokens, done.reused_tokens), (3, 0));
    (done.ids, done.stop)
}

#[test]
fn generation_ends_for_each_of_its_reasons() {
    let most = |n| GenerationSettings { max_tokens: Some(n), stop_ids: vec![] };
    let (free, stop) = run(&most(6), 32, &never);
    assert_eq!((free.len(), stop), (6, Stop::Length));
    let at = free.iter().position(|id| *id != free[0]).unwrap_or(0);
    let ending = GenerationSettings { max_tokens: Some(6), stop_ids: vec![free[at]] };
    assert_eq!(run(&ending, 32, &never), (free[..at].to_vec(), Stop::EndOfText));
    let (filled, stop) = run(&GenerationSettings::default(), 8, &never);
    assert_eq!((filled.len(), stop), (6, Stop::Context), "5 positions are left, and the last token is not pushed");
    let asked = std::cell::Cell::new(0);
    let third = || {
        asked.set(asked.get() + 1);
        asked.get() > 3
    };
    let (some, stop) = run(&most(6), 32, &third);
    assert_eq!((some.len(), stop), (2, Stop::Interrupted));
    assert_eq!(run(&most(0), 32, &never).0.len(), 0);
}

fn text() -> Vec<u32> {
    (0..100_u32).map(|i| (i * i * 7 + i * 3) % 61).collect()
}

fn chunks() -> Vec<Window> {
    windows(&text(), Some(0), 16, Protocol::Chunks, None).unwrap()
}

fn evaluation<'a>(model: &'a Model, base: Base<'a>) -> Evaluation<'a> {
    Evaluation { model, base, save: None, kv: KvDtype::F32 }
}

fn measure(e: Evaluation, windows: &[Window]) -> EvaluationReport {
    evaluate(e, windows, &mut |_| ControlFlow::Continue(())).unwrap()
}

#[test]
fn perplexity_is_what_a_session_says_of_each_token() {
    let (model, windows) = (model(1), chunks());
    let report = measure(evaluation(&model, Base::None), &windows);
    let mut losses = Vec::new();
    for window in &windows {
        for p in window.first..window.ids.len() - 1 {
            let mut s = Session::new(model.clone(), KvDtype::F32, 64);
            let (_, logits) = s.prompt(&window.ids[..=p], &never).unwrap();
            let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
            losses.push(sum.ln() - f64::from(logits[window.ids[p + 1] as usize]));
        }
    }
    assert_eq!(report.perplexity.tokens, losses.len());
    assert_eq!(losses.len(), 6 * 7);
    let mean = losses.iter().sum::<f64>() / losses.len() as f64;
    assert!((report.perplexity.loss - mean).abs() < 1e-5, "{} {mean}", report.perplexity.loss);
    assert!((report.perplexity.perplexity - mean.exp()).abs() < 1e-3);
    assert!(report.divergence.is_none());
}

#[test]
fn a_model_does_not_diverge_from_itself_and_does_from_another() {
    let (a, b, windows) = (model(1), model(2), chunks());
    let same = measure(evaluation(&a, Base::Model(&a)), &windows).divergence.unwrap();
    assert_eq!((same.mean_kld, same.top1_agreement, same.mean_delta_p), (0.0, 1.0, 0.0));
    let other = measure(evaluation(&b, Base::Model(&a)), &windows);
    let divergence = other.divergence.unwrap();
    assert!(divergence.mean_kld > 0.01 && divergence.top1_agreement < 1.0, "{divergence:?}");
    let alone = measure(evaluation(&a, Base::None), &windows).perplexity;
    assert_eq!(other.original.unwrap(), alone);
}

/// A buffer that outlives the boxed writer.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn saved_predictions_stand_in_for_the_model() {
    let (a, b, windows) = (model(1), model(2), chunks());
    let file = Shared::default();
    let mut writer = SavedLogitsWriter::new(Box::new(file.clone()), &windows, 61).unwrap();
    measure(Evaluation { save: Some(&mut writer), ..evaluation(&a, Base::None) }, &windows);
    writer.finish().unwrap();
    let bytes = file.0.lock().unwrap().clone();
    let open = || SavedLogits::open(Box::new(Cursor::new(bytes.clone())) as Box<dyn ReadSeek>).unwrap();
    let itself = measure(evaluation(&a, Base::Saved(&mut open())), &windows).divergence.unwrap();
    assert!(itself.mean_kld.abs() < 1e-6 && itself.top1_agreement == 1.0, "{itself:?}");
    let live = measure(evaluation(&b, Base::Model(&a)), &windows).divergence.unwrap();
    let saved = measure(evaluation(&b, Base::Saved(&mut open())), &windows).divergence.unwrap();
    assert!((live.mean_kld - saved.mean_kld).abs() < 1e-4, "{live:?} {saved:?}");
    let other_text = windows_of_other_text();
    let refused = evaluate(evaluation(&b, Base::Saved(&mut open())), &other_text, &mut |_| ControlFlow::Continue(()));
    assert!(matches!(refused, Err(InferError::Incomparable(_))));
}

fn windows_of_other_text() -> Vec<Window> {
    let ids: Vec<u32> = text().iter().map(|id| (id + 1) % 61).collect();
    windows(&ids, Some(0), 16, Protocol::Chunks, None).unwrap()
}

#[test]
fn an_evaluation_can_be_broken_off_and_reports_what_it_did() {
    let (a, windows) = (model(1), chunks());
    let mut stop_at_two = |r: &EvaluationReport| {
        if r.windows == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let report = evaluate(evaluation(&a, Base::None), &windows, &mut stop_at_two).unwrap();
    assert_eq!((report.windows, report.perplexity.tokens), (2, 14));
}

#[test]
fn dumped_logits_are_those_of_the_session() {
    let (a, windows) = (model(1), chunks());
    let mut bytes = Vec::new();
    dump_logits(&a, KvDtype::F32, &windows[..2], &mut bytes).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("input_ids").unwrap().shape(), [2, 16]);
    let logits = file.tensor("logits").unwrap();
    assert_eq!(logits.shape(), [2, 16, 61]);
    let values: Vec<f32> =
        logits.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let (_, last) = Session::new(a, KvDtype::F32, 64).prompt(&windows[1].ids, &never).unwrap();
    assert!(close(&values[values.len() - 61..], &last));
}
