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

    /// Its name, as a user writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }
}

/// What both factors of a product of floats become with [`super::Activations::Fast`]; sums are f32 always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FloatProducts {
    /// Nothing: they stay f32.
    F32,
    /// bf16, two at once (AVX512-BF16).
    Bf16,
    /// Integers of 13 bits that share scales, two at once (AVX512-VNNI): as exact as bf16, see `dense/fixed.rs`.
    Int16,
}

impl FloatProducts {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::Int16];

    /// The fastest of an instruction set on this machine. Zen 4 and 5 take as long for `vdpbf16ps` as for f32's multiply-add, which does
    /// half as much; Intel's CPUs take four times as long (Emerald Rapids: 0.78 ns for 0.19), but multiply integers as fast as AMD's. By maker
    /// and not by measurement: a run that is resumed has to come to the same bits.
    pub fn fastest(isa: Isa) -> Self {
        #[cfg(target_arch = "x86_64")]
        if isa == Isa::Avx512 {
            // Asked once: under a hypervisor `cpuid` takes long, and predictions of memory ask for every product.
            static IS_INTEL: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
            let is_intel = *IS_INTEL.get_or_init(|| {
                let maker = std::arch::x86_64::__cpuid(0);
                [maker.ebx, maker.edx, maker.ecx].map(u32::to_le_bytes).as_flattened() == b"GenuineIntel"
            });
            return if is_intel { Self::Int16 } else { Self::Bf16 };
        }
        let _ = isa;
        Self::F32
    }

    /// Whether an instruction set has them.
    pub fn is_of(self, isa: Isa) -> bool {
        self == Self::F32 || isa == Isa::Avx512
    }

    /// Its name, as a user writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int16 => "int16",
        }
    }
}
