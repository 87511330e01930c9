//! How fast this machine reads memory: what bounds decoding.

use std::time::Instant;

use super::pool::Pool;
use super::quant::arena::Lines;
use super::quant::layout::Line;

/// Bytes read in a pass: several times the last-level cache of most machines.
const BYTES: usize = 192 << 20;

/// Passes; the fastest counts.
const PASSES: usize = 6;

/// Bytes a second that the pool's threads read from memory together, each a part of a large array from start to end, in
/// memory like that of packed weights. Takes a tenth of a second or two, and 192 MiB while it runs.
pub fn measure_read_bandwidth(pool: &Pool) -> f64 {
    let mut lines = Lines::zeros(BYTES / size_of::<Line>());
    // Untouched memory may be one page of zeros that all addresses share.
    lines.fill(Line([1; 64]));
    let mut best = f64::INFINITY;
    for _ in 0..PASSES {
        let begin = Instant::now();
        pool.for_ranges(lines.len(), 4096, |range| {
            // Four vectors of sums, so that additions do not wait for each other.
            let mut sums = [[0u8; 64]; 4];
            for four in lines[range].as_chunks::<4>().0 {
                for (sums, line) in sums.iter_mut().zip(four) {
                    sums.iter_mut().zip(line.0).for_each(|(sum, byte)| *sum = sum.wrapping_add(byte));
                }
            }
            std::hint::black_box(sums);
        });
        best = best.min(begin.elapsed().as_secs_f64());
    }
    BYTES as f64 / best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_reads_more_than_nothing() {
        let rate = measure_read_bandwidth(&Pool::new(2));
        assert!(rate.is_finite() && rate > 1e6, "{rate}");
    }
}
