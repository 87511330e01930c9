//! Which instructions the kernels may use.

/// An instruction set that kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust: any machine.
    Portable,
    /// AVX2, FMA, F16C.
    Avx2,
    /// AVX512 F, BW, VL, VNNI and BF16.
    Avx512,
}

impl Isa {
    /// All of them, slowest first.
    pub const ALL: [Self; 3] = [Self::Portable, Self::Avx2, Self::Avx512];

    /// The best this machine has.
    pub fn detect() -> Self {
        [Self::Avx512, Self::Avx2].into_iter().find(|isa| isa.is_available()).unwrap_or(Self::Portable)
    }

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        let found = match self {
            Self::Portable => true,
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
                    && is_x86_feature_detected!("avx512bf16")
            }
        };
        #[cfg(not(target_arch = "x86_64"))]
        let found = self == Self::Portable;
        found
    }

    /// Whether `vdpbf16ps` does more than f32's multiply-add. Intel's CPUs take four times as long for it (Emerald Rapids: 0.78 ns for 0.19),
    /// so that f32 is twice as fast there, and more exact; Zen 4 and 5 take as long. By maker and not by measurement: a run that is
    /// resumed has to come to the same bits.
    pub fn has_fast_pairs() -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            static IS_FAST: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
            *IS_FAST.get_or_init(|| {
                let maker = std::arch::x86_64::__cpuid(0);
                [maker.ebx, maker.edx, maker.ecx].map(u32::to_le_bytes).as_flattened() != b"GenuineIntel"
            })
        }
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Whether this machine multiplies pairs of bf16, for which both factors are brought into that type.
    pub fn multiplies_pairs() -> bool {
        Self::detect() == Self::Avx512 && Self::has_fast_pairs()
    }

    /// Its name, as a user writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }
}
