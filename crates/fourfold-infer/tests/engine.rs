//! The engine: many requests at once get what each gets alone.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex};

use fourfold_infer::engine::{
    Constraint, Engine, EngineSettings, Event, Finish, PIECE, Request, SubmitError, TokenEvent,
};
use fourfold_infer::{InferError, SamplerSettings, Stop};
use fourfold_kernels::{Cpu, CpuOptions, KvDtype};
use fourfold_models::testing::RandomWeights;
use fourfold_models::{Model, spec_from_config};
use serde_json::json;

const VOCAB: u32 = 61;

fn model() -> Arc<Model> {
    let spec = spec_from_config(&json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false
    }))
    .unwrap();
    let cpu = Arc::new(Cpu::new(CpuOptions { threads: 2, ..CpuOptions::default() }).unwrap());
    Arc::new(Model::load(&spec, &RandomWeights::new(&spec, 5), cpu, &mut |_| {}).unwrap())
}

fn settings() -> EngineSettings {
    EngineSettings { parallel: 9, queue: 64, context: 512, kv: KvDtype::F16, prefix_bytes: 1 << 20 }
}

fn request(ids: Vec<u32>, tokens: usize) -> (Request, Receiver<Event>) {
    let (sender, receiver) = channel();
    let request = Request {
        ids,
        max_tokens: Some(tokens),
        stop_ids: vec![],
        sampling: SamplerSettings { temperature: 0.0, ..SamplerSettings::default() },
        logit_bias: vec![],
        logprobs: None,
        constraint: None,
        embed: false,
        on_event: Box::new(move |event| sender.send(event).is_ok()),
    };
    (request, receiver)
}

fn answer(events: &Receiver<Event>) -> (Vec<TokenEvent>, Finish) {
    let mut tokens = Vec::new();
    loop {
        match events.recv().expect("an answer ends") {
            Event::Started { .. } | Event::Reading { .. } | Event::Embedding(_) => {}
            Event::Token(token) => tokens.push(token),
            Event::Finished(finish) => return (tokens, finish),
            Event::Failed(error) => panic!("{error}"),
        }
    }
}

fn ids(tokens: &[TokenEvent]) -> Vec<u32> {
    tokens.iter().map(|token| token.id).collect()
}

/// Prompts of many lengths, most of which begin alike.
fn prompt(number: usize) -> Vec<u32> {
    let shared = (0..3 * PIECE).map(|i| (i * i % 59) as u32);
    let own = (0..number * 7 % 90 + 1).map(|i| ((i * 31 + number * 13) % 61) as u32);
    let shared = shared.take(if number.is_multiple_of(3) { 20 } else { 3 * PIECE - number % 5 });
    shared.chain(own).collect()
}

#[test]
fn a_crowd_gets_what_each_gets_alone() {
    let model = model();
    let sampled = |number: usize| {
        let (mut request, events) = request(prompt(number), 5 + number % 20);
        if number.is_multiple_of(2) {
            request.sampling = SamplerSettings { seed: number as u64, ..SamplerSettings::default() };
        }
        (request, events)
    };
    let alone: Vec<Vec<u32>> = (0..40)
        .map(|number| {
            let engine = Engine::start(Arc::clone(&model), settings()).unwrap();
            let (request, events) = sampled(number);
            engine.submit(request).unwrap();
            ids(&answer(&events).0)
        })
        .collect();
    assert!(alone.windows(2).any(|pair| pair[0] != pair[1]), "answers differ, or nothing is shown");
    let engine = Engine::start(model, settings()).unwrap();
    let crowd: Vec<_> = (0..40)
        .map(|number| {
            let (request, events) = sampled(number);
            engine.submit(request).unwrap();
            events
        })
        .collect();
    for (number, (events, alone)) in crowd.iter().zip(&alone).enumerate() {
        let (tokens, finish) = answer(events);
        assert_eq!(ids(&tokens), *alone, "request {number}");
        assert_eq!((finish.tokens, finish.prompt_tokens), (tokens.len(), prompt(number).len()));
    }
    let counters = engine.counters();
    // An answer is counted after its end is told.
    while counters.completed.load(SeqCst) < 40 {
        std::thread::yield_now();
    }
    assert!(counters.cached_tokens.load(SeqCst) > 1000, "shared pieces are computed once");
    let (steps, tokens) = (counters.decode_steps.load(SeqCst), counters.generated_tokens.load(SeqCst));
    assert!(steps * 3 < tokens, "{tokens} tokens in {steps} steps: they are made together");
}

#[test]
fn nothing_is_kept_without_a_budget() {
    let engine = Engine::start(model(), EngineSettings { prefix_bytes: 0, ..settings() }).unwrap();
    for _ in 0..2 {
        let (request, events) = request(prompt(1), 3);
        engine.submit(request).unwrap();
        assert_eq!(answer(&events).1.cached_tokens, 0);
    }
}

/// A listener that holds the engine's thread until it is let go.
struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    fn new() -> Self {
        Self(Arc::new((Mutex::new(false), Condvar::new())))
    }

    fn hold(&self, request: &mut Request) {
        let gate = Arc::clone(&self.0);
        request.on_event = Box::new(move |_| {
            let open = gate.0.lock().unwrap();
            drop(gate.1.wait_while(open, |open| !*open).unwrap());
            true
        });
    }

    fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }
}

#[test]
fn more_than_the_queue_holds_is_refused_and_what_was_taken_is_answered() {
    let engine = Engine::start(model(), EngineSettings { parallel: 1, queue: 3, ..settings() }).unwrap();
    let gate = Gate::new();
    let (mut held, _) = request(vec![1, 2], 2);
    gate.hold(&mut held);
    engine.submit(held).unwrap();
    while engine.counters().running.load(SeqCst) == 0 {
        std::thread::yield_now();
    }
    let waiting: Vec<_> = (0..3)
        .map(|_| {
            let (request, events) = request(vec![3, 4], 2);
            engine.submit(request).unwrap();
            events
        })
        .collect();
    let (one_more, _) = request(vec![3, 4], 2);
    assert!(matches!(engine.submit(one_more), Err(SubmitError::QueueFull { waiting: 3 })));
    assert_eq!(engine.counters().refused.load(SeqCst), 1);
    gate.open();
    for events in &waiting {
        assert_eq!(answer(events).0.len(), 2);
    }
}

#[test]
fn a_client_that_goes_away_ends_its_request_within_one_token() {
    let engine = Engine::start(model(), settings()).unwrap();
    let (mut request, _) = request(prompt(1), 400);
    let told = Arc::new(Mutex::new(0));
    let count = Arc::clone(&told);
    request.on_event = Box::new(move |event| {
        *count.lock().unwrap() += usize::from(matches!(event, Event::Token(_)));
        *count.lock().unwrap() < 3
    });
    engine.submit(request).unwrap();
    while engine.counters().cancelled.load(SeqCst) == 0 {
        std::thread::yield_now();
    }
    assert_eq!(*told.lock().unwrap(), 3);
    drop(engine);
    assert_eq!(*told.lock().unwrap(), 3, "nothing more was computed");
}

#[test]
fn a_client_that_goes_away_while_its_prompt_is_read_is_not_read_on() {
    let engine = Engine::start(model(), settings()).unwrap();
    let (mut request, _) = request((0..500).map(|i| i % VOCAB).collect(), 4);
    request.on_event = Box::new(|event| {
        assert!(matches!(event, Event::Started { .. } | Event::Reading { read: PIECE, of: 500 }), "{event:?}");
        matches!(event, Event::Started { .. })
    });
    engine.submit(request).unwrap();
    while engine.counters().cancelled.load(SeqCst) == 0 {
        std::thread::yield_now();
    }
}

#[test]
fn what_cannot_be_computed_is_refused() {
    let engine = Engine::start(model(), settings()).unwrap();
    let refused = |ids: Vec<u32>| match engine.submit(request(ids, 1).0) {
        Err(SubmitError::Invalid(error)) => error,
        other => panic!("{other:?}"),
    };
    assert!(matches!(refused(vec![]), InferError::EmptyPrompt));
    assert!(matches!(refused(vec![1, VOCAB]), InferError::TokenOutOfRange { id: VOCAB, position: 1, .. }));
    assert!(matches!(refused(vec![1; 513]), InferError::ContextFull { tokens: 513, context: 512 }));
}

#[test]
fn answers_end_at_stop_tokens_at_the_limit_and_at_the_context() {
    let engine = Engine::start(model(), EngineSettings { context: 20, ..settings() }).unwrap();
    let run = |change: &dyn Fn(&mut Request)| {
        let (mut request, events) = request(vec![1, 2, 3], 10);
        change(&mut request);
        engine.submit(request).unwrap();
        answer(&events)
    };
    let (tokens, finish) = run(&|_| ());
    assert_eq!((tokens.len(), finish.stop), (10, Stop::Length));
    let (all, finish) = run(&|request| request.max_tokens = None);
    assert_eq!((all.len(), finish.stop), (17, Stop::Context));
    assert_eq!(ids(&all)[..10], ids(&tokens));
    let end = all[5].id;
    let first = ids(&all).iter().position(|&id| id == end).unwrap();
    let (stopped, finish) = run(&|request| request.stop_ids = vec![end]);
    assert_eq!((ids(&stopped), finish.stop), (ids(&all)[..first].to_vec(), Stop::EndOfText));
    let (none, finish) = run(&|request| request.max_tokens = Some(0));
    assert_eq!((none.len(), finish.prompt_tokens), (0, 3));
}

/// Even tokens only, three of them.
struct EvenTokens(usize);

impl Constraint for EvenTokens {
    fn restrict(&mut self, logits: &mut [f32]) -> Result<(), InferError> {
        logits.iter_mut().skip(1).step_by(2).for_each(|logit| *logit = f32::NEG_INFINITY);
        Ok(())
    }

    fn accept(&mut self, id: u32) -> Result<bool, InferError> {
        assert!(id.is_multiple_of(2));
        self.0 += 1;
        Ok(self.0 == 3)
    }
}

#[test]
fn biases_constraints_and_probabilities() {
    let engine = Engine::start(model(), settings()).unwrap();
    let run = |change: &dyn Fn(&mut Request)| {
        let (mut request, events) = request(vec![1, 2, 3], 6);
        request.logprobs = Some(3);
        change(&mut request);
        engine.submit(request).unwrap();
        answer(&events)
    };
    let (free, _) = run(&|_| ());
    for token in &free {
        assert_eq!(token.top.len(), 3);
        assert_eq!((token.top[0].0, Some(token.top[0].1)), (token.id, token.logprob), "greedy takes the likeliest");
        assert!(token.top.is_sorted_by(|a, b| a.1 >= b.1) && token.top[0].1 < 0.0);
    }
    let all = run(&|request| request.logprobs = Some(VOCAB as usize)).0;
    let sum: f64 = all[0].top.iter().map(|&(_, logprob)| f64::from(logprob).exp()).sum();
    assert!((sum - 1.0).abs() < 1e-5, "{sum}");

    let (biased, _) = run(&|request| request.logit_bias = vec![(7, 100.0)]);
    assert!(biased.iter().all(|token| token.id == 7), "{biased:?}");
    assert_eq!(biased[0].top, free[0].top, "probabilities are the model's own");

    let (even, finish) = run(&|request| request.constraint = Some(Box::new(EvenTokens(0))));
    assert_eq!((even.len(), finish.stop), (3, Stop::EndOfText));
    assert!(free.iter().any(|token| token.id % 2 == 1), "without it there are odd ones");
}

#[test]
fn an_embedding_is_the_mean_of_the_hidden_rows() {
    let model = model();
    let prompt: Vec<u32> = (0..150).map(|i| i * 7 % VOCAB).collect();
    let engine = Engine::start(Arc::clone(&model), settings()).unwrap();
    let (mut wanted, events) = request(prompt.clone(), 0);
    wanted.embed = true;
    engine.submit(wanted).unwrap();
    let Event::Started { cached_tokens: 0 } = events.recv().unwrap() else { panic!("it begins") };
    let Event::Reading { .. } = events.recv().unwrap() else { panic!("two more pieces") };
    let Event::Reading { .. } = events.recv().unwrap() else { panic!("one more piece") };
    let Event::Embedding(mean) = events.recv().unwrap() else { panic!("the embedding") };
    let hidden = model.hidden(&prompt, &mut model.new_cache(KvDtype::F16));
    for (column, value) in mean.iter().enumerate() {
        let expected = (0..prompt.len()).map(|row| hidden.row(row)[column]).sum::<f32>() / prompt.len() as f32;
        assert!((value - expected).abs() < 1e-3, "{column}: {value} {expected}");
    }
}
