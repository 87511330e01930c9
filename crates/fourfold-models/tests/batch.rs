//! Several sequences at once give each the very bits that it gets alone.

mod support;

use std::sync::Arc;

use fourfold_kernels::{Backend, Cpu, CpuOptions, KvDtype, Tensor};
use fourfold_models::{Cache, Model, Sequence};
use support::{backends, cases};

/// Decoding steps that are batched.
const STEPS: usize = 4;

fn all_backends() -> Vec<Arc<dyn Backend>> {
    let fast: Arc<dyn Backend> = Arc::new(Cpu::new(CpuOptions { threads: 2, ..CpuOptions::default() }).unwrap());
    backends().into_iter().chain([fast]).collect()
}

/// The prompts of some sequences: of different lengths and beginnings.
fn prompts(ids: &[u32], count: usize) -> Vec<Vec<u32>> {
    (0..count).map(|i| ids[i % 5..ids.len() - STEPS - i].to_vec()).collect()
}

fn row(hidden: &Tensor, index: usize) -> Vec<u32> {
    hidden.row(index).iter().map(|value| value.to_bits()).collect()
}

#[test]
fn a_batch_of_sequences_equals_each_alone() {
    for backend in all_backends() {
        for case in cases() {
            let model = case.model(backend.clone());
            for count in [2, 7] {
                let prompts = prompts(&case.ids, count);
                let next = |sequence: usize, step: usize| [case.ids[case.ids.len() - STEPS + step - sequence % 2]];
                let alone: Vec<Vec<Vec<u32>>> = prompts
                    .iter()
                    .enumerate()
                    .map(|(i, prompt)| {
                        let mut cache = model.new_cache(KvDtype::F16);
                        model.hidden(prompt, &mut cache);
                        (0..STEPS).map(|step| row(&model.hidden(&next(i, step), &mut cache), 0)).collect()
                    })
                    .collect();
                let mut caches: Vec<Cache> = prompts
                    .iter()
                    .map(|prompt| {
                        let mut cache = model.new_cache(KvDtype::F16);
                        model.hidden(prompt, &mut cache);
                        cache
                    })
                    .collect();
                for step in 0..STEPS {
                    let ids: Vec<[u32; 1]> = (0..count).map(|i| next(i, step)).collect();
                    let mut batch: Vec<Sequence> =
                        ids.iter().zip(&mut caches).map(|(ids, cache)| Sequence { ids, cache }).collect();
                    let hidden = model.hidden_batch(&mut batch);
                    assert_eq!(hidden.rows(), count);
                    for (i, alone) in alone.iter().enumerate() {
                        let name = format!("{} on {}, {count} sequences, step {step}", case.name, backend.name());
                        assert_eq!(row(&hidden, i), alone[step], "{name}: sequence {i}");
                    }
                }
            }
        }
    }
}

/// Negative control: a sequence's cache is its own.
#[test]
fn a_sequence_with_anothers_cache_goes_another_way() {
    for case in cases() {
        let model = case.model(backends().remove(0));
        let prompts = prompts(&case.ids, 2);
        let caches = || prompts.iter().map(|prompt| filled(&model, prompt)).collect::<Vec<_>>();
        let step = |order: [usize; 2]| {
            let mut caches = caches();
            caches.swap(order[0], 0);
            let mut batch: Vec<Sequence> =
                caches.iter_mut().map(|cache| Sequence { ids: &case.ids[..1], cache }).collect();
            row(&model.hidden_batch(&mut batch), 0)
        };
        assert_ne!(step([0, 1]), step([1, 0]), "{}", case.name);
    }
}

fn filled(model: &Model, prompt: &[u32]) -> Cache {
    let mut cache = model.new_cache(KvDtype::F16);
    model.hidden(prompt, &mut cache);
    cache
}

#[test]
fn copied_positions_continue_as_the_original() {
    for case in cases() {
        let model = case.model(backends().remove(1));
        let (prompt, rest) = case.ids.split_at(case.ids.len() - 6);
        let mut original = filled(&model, prompt);
        let mut copy = model.new_cache(KvDtype::F16);
        copy.extend(&original.copy(0..5));
        copy.extend(&original.copy(5..prompt.len()));
        assert_eq!(copy.len(), prompt.len());
        let bits = |cache: &mut Cache| {
            model.hidden(rest, cache).host().iter().map(|value| value.to_bits()).collect::<Vec<_>>()
        };
        assert_eq!(bits(&mut copy), bits(&mut original), "{}", case.name);
    }
}
