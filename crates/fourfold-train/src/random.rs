//! Random numbers as a function of a counter: element i of tensor t at step s always gets the same number, whichever thread
//! asks and in whatever order. A resumed run needs no generator state.
//!
//! The principle is that of Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3". The mixing function here is a
//! two-multiplication 32-bit finalizer, which vectorises; stochastic rounding needs 16 good bits, not a cryptographic stream.

/// A stream of 32-bit words addressed by index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    low: u32,
    high: u32,
}

impl Stream {
    /// The stream of tensor `tensor` at step `step` of the run seeded with `seed`.
    pub fn new(seed: u64, step: u64, tensor: u64) -> Self {
        let key = mix64(mix64(mix64(seed).wrapping_add(step)).wrapping_add(tensor));
        Self { low: key as u32, high: (key >> 32) as u32 }
    }

    /// What the stream is made of.
    pub fn key(self) -> u64 {
        u64::from(self.high) << 32 | u64::from(self.low)
    }

    /// Word `index`.
    #[inline(always)]
    pub fn word(self, index: usize) -> u32 {
        mix32((index as u32 ^ self.low).wrapping_add(mix32(self.high ^ (index >> 32) as u32)))
    }

    /// The words from `first` on, which lie below the next multiple of 2³²: the upper half of the index is mixed in once, so that
    /// the loop is vectorised.
    #[inline(always)]
    pub fn words(self, first: usize, out: &mut [u32]) {
        let high = mix32(self.high ^ (first >> 32) as u32);
        for (i, word) in out.iter_mut().enumerate() {
            *word = mix32(((first as u32).wrapping_add(i as u32) ^ self.low).wrapping_add(high));
        }
    }

    /// Word `index` as a number in [0, 1).
    #[inline]
    pub fn unit(self, index: usize) -> f32 {
        (self.word(index) >> 8) as f32 * (1.0 / (1 << 24) as f32)
    }
}

/// `0..len` in a random order.
pub fn shuffled(len: usize, stream: Stream) -> Vec<usize> {
    let mut order: Vec<usize> = (0..len).collect();
    shuffle(&mut order, stream);
    order
}

/// Brings items into a random order (Fisher & Yates 1938; the bias of the remainder is below 2^-32 · their number).
pub fn shuffle<T>(items: &mut [T], stream: Stream) {
    for i in (1..items.len()).rev() {
        let other = (u64::from(stream.word(i)) * (i as u64 + 1)) >> 32;
        items.swap(i, other as usize);
    }
}

/// SplitMix64's output function (Steele et al. 2014).
fn mix64(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A bijective 32-bit mixer of low bias.
#[inline(always)]
fn mix32(mut x: u32) -> u32 {
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_uniform_and_streams_differ() {
        let n = 1 << 16;
        let stream = Stream::new(1, 2, 3);
        let mut ones = [0u32; 32];
        let mut mean = 0.0f64;
        for i in 0..n {
            let word = stream.word(i);
            (0..32).for_each(|bit| ones[bit] += (word >> bit) & 1);
            mean += f64::from(stream.unit(i)) / n as f64;
        }
        // Binomial: standard deviation √n / 2 = 128; six of them.
        assert!(ones.iter().all(|&count| count.abs_diff(n as u32 / 2) < 6 * 128), "{ones:?}");
        assert!((mean - 0.5).abs() < 6.0 / (12.0f64 * n as f64).sqrt(), "{mean}");
        for other in [Stream::new(2, 2, 3), Stream::new(1, 3, 3), Stream::new(1, 2, 4)] {
            let same = (0..n).filter(|&i| stream.word(i) & 0xffff == other.word(i) & 0xffff).count();
            assert!(same < 16, "{same} of {n} words agree in their low half, 1 expected");
        }
    }

    #[test]
    fn words_in_a_row_are_the_words_one_by_one() {
        let stream = Stream::new(3, 1, 4);
        for first in [0, 77, (1 << 32) - 4, (5 << 32) + 9] {
            let mut words = [0; 4];
            stream.words(first, &mut words);
            assert_eq!(words, [0, 1, 2, 3].map(|i| stream.word(first + i)), "from {first}");
        }
    }

    #[test]
    fn neighbouring_words_are_uncorrelated() {
        let n = 1 << 16;
        let stream = Stream::new(7, 0, 0);
        let product: f64 =
            (0..n).map(|i| f64::from(stream.unit(i) - 0.5) * f64::from(stream.unit(i + 1) - 0.5)).sum::<f64>()
                / n as f64;
        // Each factor has variance 1/12.
        assert!((product * 12.0).abs() < 6.0 / (n as f64).sqrt(), "{product}");
    }
}
