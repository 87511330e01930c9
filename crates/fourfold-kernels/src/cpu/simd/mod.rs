//! Vectors of f32 lanes: kernels are written once, generic over [`Simd`], and compiled for each instruction set by
//! [`for_isa!`](for_isa).
//!
//! A value of an implementing type is a token: whoever holds one may run its instructions. Tokens are made by `for_isa!`
//! alone, after the run-time check.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod math;
mod portable;

use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
pub use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub use avx512::Avx512;

pub use math::{Map2, dot, exp, map2, map2_in_place, softmax_exp};
pub use portable::Portable;

/// The most lanes any instruction set has.
pub const MAX_LANES: usize = 16;

/// An instruction set's vectors.
pub trait Simd: Copy {
    /// `LANES` values of f32.
    type V: Copy;
    /// Lanes of a vector.
    const LANES: usize;
    /// Rows of a register tile (see `tile`): as many accumulators as registers allow.
    const TILE_ROWS: usize;

    /// Runs a kernel in a function of its own, compiled for this instruction set: for code too large to inline everywhere.
    fn call<K: Kernel<Self>>(self, kernel: K);
    /// Asks for a cache line that will be read soon; any address will do.
    fn prefetch<T>(self, _line: *const T) {}
    /// `v` in every lane.
    fn splat(self, v: f32) -> Self::V;
    /// Lanes from memory.
    ///
    /// # Safety
    /// `LANES` elements are readable.
    unsafe fn load(self, from: *const f32) -> Self::V;
    /// Lanes from memory, widened.
    ///
    /// # Safety
    /// `LANES` elements are readable.
    unsafe fn load_f16(self, from: *const f16) -> Self::V;
    /// Lanes from memory, widened.
    ///
    /// # Safety
    /// `LANES` elements are readable.
    unsafe fn load_bf16(self, from: *const bf16) -> Self::V;
    /// Lanes of E4M3 codes from memory, widened and times 2^−8: what a code's fields say where an f16 has them, whose bias is 15 and
    /// not 7. NaN is none of the codes.
    ///
    /// # Safety
    /// `LANES` bytes are readable.
    unsafe fn load_e4m3(self, from: *const u8) -> Self::V;
    /// Lanes to memory.
    ///
    /// # Safety
    /// `LANES` elements are writable.
    unsafe fn store(self, to: *mut f32, v: Self::V);
    /// `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a − b`.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b`.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// The greater of each pair.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The lesser of each pair.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b + c`, rounded once where there is an instruction for it.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Each lane to the nearest integer.
    fn round(self, v: Self::V) -> Self::V;
    /// `2^v` of integral lanes from −126 to 127.
    fn pow2(self, v: Self::V) -> Self::V;
    /// The sum of the lanes.
    fn sum(self, v: Self::V) -> f32;
    /// The sum of the lanes of each of four vectors.
    fn four_sums(self, v: [Self::V; 4]) -> [f32; 4] {
        v.map(|v| self.sum(v))
    }
    /// The greatest lane.
    fn largest(self, v: Self::V) -> f32;
    /// Transposes a square of `LANES` vectors: lane j of vector i becomes lane i of vector j. Lanes keep their bits.
    fn transpose(self, square: &mut [Self::V; MAX_LANES]);

    /// Each 32-bit lane of `a` and `b` holds two 16-bit integers: adds both products to the 32-bit integer in the lane of `acc`.
    fn dot_ints(self, acc: Self::V, a: Self::V, b: Self::V) -> Self::V;
    /// Lanes of 32-bit integers as f32.
    fn of_ints(self, v: Self::V) -> Self::V;
    /// Rounds to 16-bit integers, ties to even: lane i becomes the pair (`first[i]`, `second[i]`). Values are below 2¹⁵ or do not matter.
    fn int_pairs(self, first: Self::V, second: Self::V) -> Self::V;
    /// Rounds to 16-bit integers: lanes become the pairs of neighbours of `first`, then those of `second`.
    fn int_neighbours(self, first: Self::V, second: Self::V) -> Self::V;
    /// The greater magnitude of each pair, by their bits: a NaN is greater than any number. `largest` holds magnitudes.
    fn largest_magnitudes(self, largest: Self::V, v: Self::V) -> Self::V;
    /// The greatest of magnitudes, by their bits.
    fn largest_bits(self, v: Self::V) -> f32;

    /// The first `n` lanes from memory, zeros beyond.
    ///
    /// # Safety
    /// `n` elements are readable; `n ≤ LANES`.
    #[inline(always)]
    unsafe fn load_first<E: Element>(self, from: *const E, n: usize) -> Self::V {
        if n == Self::LANES {
            // SAFETY: the caller promises n elements.
            return unsafe { E::load(self, from) };
        }
        let mut lanes = [E::default(); MAX_LANES];
        // SAFETY: the caller promises n elements; the array has more.
        unsafe {
            std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), n);
            E::load(self, lanes.as_ptr())
        }
    }

    /// The first `n` lanes to memory.
    ///
    /// # Safety
    /// `n` elements are writable; `n ≤ LANES`.
    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, v: Self::V, n: usize) {
        if n == Self::LANES {
            // SAFETY: the caller promises n elements.
            return unsafe { self.store(to, v) };
        }
        let mut lanes = [0.0; MAX_LANES];
        // SAFETY: the array has LANES elements or more; the caller promises n.
        unsafe {
            self.store(lanes.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, n);
        }
    }
}

/// A computation that [`Simd::call`] runs.
pub trait Kernel<S: Simd> {
    /// Runs it; `#[inline(always)]`.
    fn run(self, s: S);
}

/// An instruction set that multiplies pairs of bf16 (AVX512-BF16's `vdpbf16ps`).
pub trait PairDot: Simd {
    /// Each 32-bit lane of `a` and `b` holds two bf16: adds both products to the f32 lane of `acc`.
    fn dot_pairs(self, acc: Self::V, a: Self::V, b: Self::V) -> Self::V;
    /// Rounds to bf16: lane i becomes the pair (`first[i]`, `second[i]`).
    fn round_pairs(self, first: Self::V, second: Self::V) -> Self::V;
    /// Rounds to bf16: lanes become the pairs of neighbours of `first`, then those of `second`.
    fn round_neighbours(self, first: Self::V, second: Self::V) -> Self::V;
    /// Lane i becomes the pair (`first[i]`, `second[i]`), as they lie in memory.
    ///
    /// # Safety
    /// `LANES` elements are readable at each.
    unsafe fn pairs_of_bf16(self, first: *const bf16, second: *const bf16) -> Self::V;
}

/// A float type that vectors are loaded from.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// `LANES` elements as f32.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::V;

    /// `LANES` elements of two rows as bf16 pairs, rounded where they are wider.
    ///
    /// # Safety
    /// They are readable.
    #[inline(always)]
    unsafe fn load_pairs<S: PairDot>(s: S, first: *const Self, second: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.round_pairs(Self::load(s, first), Self::load(s, second)) }
    }
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load(from) }
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_f16(from) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_bf16(from) }
    }

    #[inline(always)]
    unsafe fn load_pairs<S: PairDot>(s: S, first: *const Self, second: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.pairs_of_bf16(first, second) }
    }
}

/// Defines `fn name(isa, args…)` that runs `kernel(token, args…)` compiled for `isa`. The kernel is `#[inline(always)]` and
/// generic over [`Simd`]; a call with an instruction set that the machine lacks panics.
macro_rules! for_isa {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$generic:ident: $bound:path>)? ($($arg:ident: $ty:ty),* $(,)?) = $kernel:path) => {
        $(#[$meta])*
        $vis fn $name $(<$generic: $bound>)? (isa: $crate::cpu::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
                fn avx512 $(<$generic: $bound>)? ($($arg: $ty),*) {
                    // SAFETY: this function is only called where its instructions are there.
                    $kernel(unsafe { $crate::cpu::simd::Avx512::<false>::assume() }, $($arg),*)
                }
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2 $(<$generic: $bound>)? ($($arg: $ty),*) {
                    // SAFETY: as above.
                    $kernel(unsafe { $crate::cpu::simd::Avx2::assume() }, $($arg),*)
                }
                match isa {
                    // SAFETY: an `Isa` is checked by `Cpu::new` before any kernel sees it.
                    $crate::cpu::Isa::Avx512 => return unsafe { avx512 $(::<$generic>)? ($($arg),*) },
                    // SAFETY: as above.
                    $crate::cpu::Isa::Avx2 => return unsafe { avx2 $(::<$generic>)? ($($arg),*) },
                    $crate::cpu::Isa::Portable => {}
                }
            }
            let _ = isa;
            $kernel($crate::cpu::simd::Portable, $($arg),*)
        }
    };
}
pub(crate) use for_isa;

/// Defines `fn name(args…)` that runs `kernel(token, args…)` for the instruction set that has [`PairDot`]: called only where
/// [`FloatProducts::Bf16`](crate::cpu::FloatProducts) are in use.
macro_rules! for_pairs {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$generic:ident: $bound:path>)? ($($arg:ident: $ty:ty),* $(,)?) = $kernel:path) => {
        $(#[$meta])*
        $vis fn $name $(<$generic: $bound>)? ($($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")]
                fn avx512 $(<$generic: $bound>)? ($($arg: $ty),*) {
                    // SAFETY: this function is only called where its instructions are there.
                    $kernel(unsafe { $crate::cpu::simd::Avx512::<true>::assume() }, $($arg),*)
                }
                // SAFETY: `Cpu::new` has checked that products of bf16 are there.
                unsafe { avx512 $(::<$generic>)? ($($arg),*) }
            }
            #[cfg(not(target_arch = "x86_64"))]
            {
                $(let _ = $arg;)*
                unreachable!("{} needs AVX512", stringify!($name))
            }
        }
    };
}
pub(crate) use for_pairs;
