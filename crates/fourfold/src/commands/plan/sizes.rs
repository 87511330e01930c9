//! What running a model takes, and training adapters on it, at several sizes of its weights.

use fourfold_infer::PROMPT_BATCH;
use fourfold_kernels::KvDtype;
use fourfold_models::ModelSpec;
use fourfold_models::layers::LoraSpec;
use fourfold_train::memory::{Adapters, Work, train_memory};
use fourfold_train::recipe::Recipe;
use serde::Serialize;

use crate::{fit, human};

/// Bits a parameter that are tried, the most first. What `compress --bits` makes of them counts everything in its files.
const BITS: [f64; 7] = [8.0, 6.0, 5.0, 4.0, 3.0, 2.5, 2.0];
/// The shortest context that is of use.
const LEAST_CONTEXT: u64 = 256;

/// A size of the weights, and what it takes.
#[derive(Clone, Debug, Serialize)]
pub struct Size {
    /// Bits a parameter, everything counted; none where the weights stay as they are.
    pub bits: Option<f64>,
    pub weights: u64,
    pub kv_cache: u64,
    pub rest: u64,
    /// Running it.
    pub total: u64,
    /// Training adapters on it.
    pub adapters: u64,
}

/// What is asked.
pub struct Sizes<'a> {
    pub spec: &'a ModelSpec,
    pub model: &'a str,
    /// Bytes of the weights as they are.
    pub stored: u64,
    /// Of the adapters.
    pub lora: &'a LoraSpec,
    /// Tokens of a running context.
    pub context: u64,
    /// Tokens of a training sequence.
    pub train_context: u64,
    /// The only size to look at, beside the model as it is.
    pub bits: Option<f64>,
    pub kv: KvDtype,
}

/// A command that fits, in words.
#[derive(Clone, Debug, Serialize)]
pub struct Advice {
    pub what: &'static str,
    pub commands: Vec<String>,
    pub total: u64,
}

impl Sizes<'_> {
    /// The model as it is, and the sizes that are smaller.
    pub fn all(&self) -> Vec<Size> {
        let parameters = self.spec.parameters();
        let bytes = |bits: f64| (bits * parameters as f64 / 8.0) as u64;
        let tried: Vec<f64> = self.bits.map_or(BITS.to_vec(), |bits| vec![bits]);
        let smaller = tried.into_iter().filter(|&bits| bytes(bits) < self.stored);
        std::iter::once(self.size(None, self.stored))
            .chain(smaller.map(|bits| self.size(Some(bits), bytes(bits))))
            .collect()
    }

    fn size(&self, bits: Option<f64>, weights: u64) -> Size {
        let (total, kv_cache) = self.run(weights, self.context);
        let recipe = Recipe::QUARTER;
        let adapters = Adapters { lora: self.lora, base: weights };
        let work = Work::sequences(1, self.train_context, 1, &recipe).with_adapters(Some(adapters));
        let adapters = train_memory(self.spec, &recipe, &work).total();
        Size { bits, weights, kv_cache, rest: total - weights - kv_cache, total, adapters }
    }

    /// Bytes of a run, and those of its cache.
    fn run(&self, weights: u64, context: u64) -> (u64, u64) {
        let m = self.spec.run_memory(weights, context, PROMPT_BATCH as u64, self.kv);
        (m.total() + fit::program(self.spec.vocab_size), m.kv_cache)
    }

    /// What fits into `memory`: the largest size that runs, and the largest that adapters can be trained on.
    pub fn advice(&self, sizes: &[Size], memory: u64) -> Vec<Advice> {
        let mut advice = Vec::new();
        if let Some(size) = sizes.iter().find(|size| size.total <= memory) {
            let (mut commands, model) = self.made(size);
            commands.push(format!("fourfold chat {model} -c {}", self.context));
            advice.push(Advice { what: "run", commands, total: size.total });
        } else if let Some((size, context)) = self.shorter(sizes, memory) {
            let (mut commands, model) = self.made(size);
            commands.push(format!("fourfold chat {model} -c {context}"));
            advice.push(Advice { what: "run", commands, total: self.run(size.weights, context).0 });
        }
        if let Some(size) = sizes.iter().find(|size| size.adapters <= memory) {
            let (mut commands, model) = self.made(size);
            commands.push(format!(
                "fourfold train --model {model} --lora-rank {} --batch-size 1 --context {} --data FILE -o ADAPTER",
                self.lora.rank, self.train_context
            ));
            advice.push(Advice { what: "train adapters", commands, total: size.adapters });
        }
        advice
    }

    /// The largest size that runs with a shorter context, and the longest such context.
    fn shorter<'s>(&self, sizes: &'s [Size], memory: u64) -> Option<(&'s Size, u64)> {
        let fits = |size: &Size, context: u64| self.run(size.weights, context).0 <= memory;
        let size = sizes.iter().find(|size| fits(size, LEAST_CONTEXT))?;
        let (mut low, mut high) = (LEAST_CONTEXT, self.context);
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            if fits(size, middle) { low = middle } else { high = middle - 1 }
        }
        Some((size, low))
    }

    /// The command that makes a size, if it has to be made, and the name of what it is then.
    fn made(&self, size: &Size) -> (Vec<String>, String) {
        match size.bits {
            None => (Vec::new(), self.model.to_owned()),
            Some(bits) => (vec![format!("fourfold compress {} OUT --bits {bits:.1}", self.model)], "OUT".to_owned()),
        }
    }

    /// The cheapest of all, for a memory that holds nothing.
    pub fn cheapest(&self, sizes: &[Size]) -> Option<String> {
        let least = sizes.last()?;
        let context = LEAST_CONTEXT.min(self.context);
        let bits = least.bits.map_or("as it is".to_owned(), |bits| format!("at {bits:.1} bits a parameter"));
        Some(format!(
            "running it {bits} with {context} tokens takes {}",
            human::bytes(self.run(least.weights, context).0)
        ))
    }
}

/// The sizes as a table; those that fit are marked where a memory is given.
pub fn table(sizes: &[Size], context: u64, memory: Option<u64>) -> String {
    let title = format!("peak memory of running, {context} tokens");
    let mut rows =
        vec![[title.as_str(), "weights", "KV cache", "rest", "total", "training adapters"].map(String::from).to_vec()];
    let marked = |bytes: u64| {
        let mark = memory.map_or("", |memory| if bytes <= memory { " fits" } else { "     " });
        human::bytes(bytes) + mark
    };
    rows.extend(sizes.iter().map(|size| {
        let name = size.bits.map_or("  as it is".to_owned(), |bits| format!("  compress --bits {bits:.1}"));
        let parts = [size.weights, size.kv_cache, size.rest].map(human::bytes);
        [name].into_iter().chain(parts).chain([marked(size.total), marked(size.adapters)]).collect()
    }));
    human::table(&rows)
}
