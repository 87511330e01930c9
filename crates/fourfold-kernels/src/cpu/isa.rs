//! Which instructions the kernels may use.

/// An instruction set that kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust: any machine.
    Portable,
    /// AVX2, FMA, F16C.
    Avx2,
    /// AVX512 F, BW, DQ, VL and VNNI; BF16 where it is there.
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
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
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
    /// Integers of 13 bits that share scales, two at once (AVX512-VNNI, AVX2): as exact as bf16, see `dense/fixed.rs`.
    Int16,
}

impl FloatProducts {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::Int16];

    /// The fastest of an instruction set on this machine.
    ///
    /// With AVX512: Zen 4 and 5 take as long for `vdpbf16ps` as for f32's multiply-add, which does half as much; Intel's CPUs take four times as
    /// long (Emerald Rapids: 0.78 ns for 0.19), but multiply integers as fast as AMD's. With AVX2, where integers take two instructions, they pay
    /// on CPUs that multiply them in both of the units that multiply floats: from Skylake and Zen 3 on.
    ///
    /// By the CPU's family and not by measurement: a run that is resumed has to come to the same bits.
    pub fn fastest(isa: Isa) -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            // Asked once: under a hypervisor `cpuid` takes long, and predictions of memory ask for every product.
            static OF_AVX2_AND_AVX512: std::sync::OnceLock<[FloatProducts; 2]> = std::sync::OnceLock::new();
            let [of_avx2, of_avx512] = *OF_AVX2_AND_AVX512.get_or_init(|| {
                let maker = std::arch::x86_64::__cpuid(0);
                let is_intel =
                    [maker.ebx, maker.edx, maker.ecx].map(u32::to_le_bytes).as_flattened() == b"GenuineIntel";
                // What came with Skylake, and with Zen 3.
                let has_two =
                    if is_intel { is_x86_feature_detected!("xsavec") } else { is_x86_feature_detected!("vaes") };
                let has_fast_bf16 = !is_intel && Self::Bf16.is_of(Isa::Avx512);
                [if has_two { Self::Int16 } else { Self::F32 }, if has_fast_bf16 { Self::Bf16 } else { Self::Int16 }]
            });
            match isa {
                Isa::Portable => {}
                Isa::Avx2 => return of_avx2,
                Isa::Avx512 => return of_avx512,
            }
        }
        let _ = isa;
        Self::F32
    }

    /// Whether an instruction set has them on this machine.
    pub fn is_of(self, isa: Isa) -> bool {
        #[cfg(target_arch = "x86_64")]
        let has_bf16 = isa == Isa::Avx512 && is_x86_feature_detected!("avx512bf16");
        #[cfg(not(target_arch = "x86_64"))]
        let has_bf16 = false;
        self != Self::Bf16 || has_bf16
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
