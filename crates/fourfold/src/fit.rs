//! Whether a model fits into the memory there is, before it is loaded.

use anyhow::{Result, bail};
use fourfold_infer::PROMPT_BATCH;

use crate::context::Context;
use crate::device::DeviceArg;
use crate::model::OpenModel;
use crate::{human, memory};

/// Room for what nobody counts: threads' stacks, buffers of files and kernels.
const BUFFERS: u64 = 4 << 20;
/// What a process takes that has read no model yet: measured.
const PROGRAM: u64 = 15 << 20;
/// What a token of the vocabulary takes in a tokenizer and what its file left behind: measured from 49,000 to 152,000 tokens.
const TOKENIZER: u64 = 440;

/// What the program takes with a tokenizer of so many tokens, before a model is loaded.
pub fn program(vocab_size: usize) -> u64 {
    PROGRAM + BUFFERS + TOKENIZER * vocab_size as u64
}

/// The ratio beyond which no compression is advised.
const MOST_RATIO: f64 = 8.0;

/// Positions that are given whatever memory there is.
const FEWEST: usize = 512;
/// Most positions on a card whose free memory is not known here.
const ON_A_CARD: usize = 8192;

/// What a run of a model is to hold.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Positions of the KV caches, of all sequences together.
    pub tokens: usize,
    /// Rows of logits at a time.
    pub rows: usize,
}

impl Room {
    /// One sequence of so many tokens, answered token by token.
    pub fn sequence(tokens: usize) -> Self {
        Self { tokens, rows: 1 }
    }
}

/// Bytes that a run takes, by component.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    pub weights: u64,
    pub kv_cache: u64,
    pub activations: u64,
    pub logits: u64,
    /// The program with its tokenizer, as it stands, and its buffers.
    pub program: u64,
}

impl Need {
    /// What `open` takes in a run of this process.
    pub fn of(open: &OpenModel, room: Room, context: &Context) -> Self {
        let weights = open.checkpoint.weight_bytes.saturating_sub(open.unread_bytes());
        let m = open.spec.run_memory(weights, room.tokens as u64, PROMPT_BATCH as u64, context.kv);
        Self {
            weights,
            kv_cache: m.kv_cache,
            activations: m.activations + m.rotary_tables,
            logits: m.logits * room.rows as u64,
            program: memory::resident_now().unwrap_or(PROGRAM) + BUFFERS,
        }
    }

    /// The sum.
    pub fn total(&self) -> u64 {
        self.weights + self.kv_cache + self.activations + self.logits + self.program
    }
}

/// Positions of context where none are asked for: as many as the model has, or as keys and values of `sequences` sequences find room for
/// in half of the memory that the model leaves, which is said.
pub fn positions(asked: Option<usize>, open: &OpenModel, sequences: usize, context: &Context) -> usize {
    let most = open.spec.max_positions;
    if let Some(asked) = asked {
        return asked.min(most);
    }
    if matches!(context.global.device, DeviceArg::Gpu(_)) {
        return most.min(ON_A_CARD);
    }
    let Some(free) = memory::available() else { return most };
    let need = Need::of(open, Room::sequence(0), context);
    let left = (free + memory::resident_now().unwrap_or(0)).saturating_sub(need.total());
    let a_token = (open.spec.kv_bytes_per_token(context.kv) * sequences).max(1) as u64;
    let fit = usize::try_from(left / 2 / a_token).unwrap_or(usize::MAX).max(FEWEST);
    if fit < most {
        context.remark(&format!(
            "The context is {fit} of the model's {most} tokens: keys and values of all would take {}, and {} are left beside the \
             model (--ctx-size)",
            human::bytes(a_token * most as u64),
            human::bytes(left),
        ));
    }
    fit.min(most)
}

/// Refuses a model that would not fit, with what takes the room and what fits instead.
pub fn check(open: &OpenModel, room: Room, context: &Context) -> Result<()> {
    if context.global.no_memory_check {
        return Ok(());
    }
    // What the process has already is part of what it needs.
    let Some(available) = memory::available().map(|free| free + memory::resident_now().unwrap_or(0)) else {
        return Ok(());
    };
    let need = Need::of(open, room, context);
    if need.total() <= available {
        return Ok(());
    }
    bail!(
        "{} takes {} here (weights {}, KV cache of {} tokens {}, the rest {}), and {} of memory are available; {}; \
         --no-memory-check runs all the same",
        open.checkpoint.path.display(),
        human::bytes(need.total()),
        human::bytes(need.weights),
        room.tokens,
        human::bytes(need.kv_cache),
        human::bytes(need.total() - need.weights - need.kv_cache),
        human::bytes(available),
        way_out(&need, room.tokens, available)
    )
}

/// What would fit.
fn way_out(need: &Need, tokens: usize, available: u64) -> String {
    let without_cache = need.total() - need.kv_cache;
    let a_token = need.kv_cache.checked_div(tokens as u64).unwrap_or(0);
    if let Some(fits) = available.checked_sub(without_cache).and_then(|left| left.checked_div(a_token))
        && fits >= 16
    {
        return format!("a context of {fits} tokens fits");
    }
    let rest = need.total() - need.weights;
    let ratio = available.checked_sub(rest).filter(|room| *room > 0).map(|room| need.weights as f64 / room as f64);
    match ratio {
        // Rounded up, so that what is advised does fit.
        Some(ratio) if ratio <= MOST_RATIO => {
            format!("`fourfold compress MODEL OUT --ratio {:.1}` makes one that fits", (ratio * 10.0).ceil() / 10.0)
        }
        _ => "neither a smaller context nor a compression to an eighth fits".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEED: Need = Need { weights: 8 << 30, kv_cache: 1 << 30, activations: 0, logits: 0, program: 1 << 20 };

    #[test]
    fn the_way_out_fits() {
        let few = way_out(&NEED, 4096, (8 << 30) + (512 << 20));
        let tokens: u64 = few.split(' ').nth(3).unwrap().parse().unwrap();
        assert!((2000..=2048).contains(&tokens), "{few}");
        let smaller = way_out(&NEED, 4096, 4 << 30);
        assert!(smaller.contains("--ratio 2.7"), "{smaller}");
        assert!(NEED.weights as f64 / 2.7 + (NEED.total() - NEED.weights) as f64 <= (4u64 << 30) as f64);
        assert!(way_out(&NEED, 4096, 1 << 30).contains("neither"));
        assert!(way_out(&NEED, 0, 1 << 30).contains("neither"));
    }
}
