//! The scales of one block: for each group the ones with the least weighted squared error, then the block's float and the small integers
//! that come closest to them.

use fourfold_tensor::{BlockGrid, BlockScales, BlockType, IQ4_VALUES};
use half::f16;

use super::super::fit::Fitter;
use super::super::grid::{ScaleFormat, ScaleRule, ZeroKind};
use super::super::lattice::{Group, Lattice};
use super::super::store::{round_min, round_scale};

/// Most groups of a block.
pub(crate) const GROUPS: usize = 16;

/// The scales of a block as they are stored, and what they are for each group.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Block {
    /// The block's float, as f16 holds it.
    pub scale: f32,
    /// The float of the offsets.
    pub min: f32,
    /// Each group's integer.
    pub scale_codes: [i16; GROUPS],
    /// Each group's integer of the offset.
    pub min_codes: [u8; GROUPS],
    /// Scale and offset of each group.
    pub groups: [Group; GROUPS],
}

/// Fits blocks of one type.
#[derive(Clone, Debug)]
pub(crate) struct BlockFitter {
    /// The type.
    pub kind: BlockType,
    /// Its levels.
    pub lattice: Lattice,
    fitter: Fitter,
}

impl BlockFitter {
    pub fn new(kind: BlockType) -> Self {
        let bits = kind.bits();
        let lattice = match kind.grid() {
            BlockGrid::Codebook => Lattice::codebook(IQ4_VALUES.iter().map(|&v| f32::from(v)).collect()),
            BlockGrid::Symmetric | BlockGrid::Min => Lattice::uniform(bits),
        };
        let zero = if kind.grid() == BlockGrid::Min { ZeroKind::Min } else { ZeroKind::Symmetric };
        let fitter = Fitter { lattice: lattice.clone(), bits, zero, rule: ScaleRule::Search, signed: true };
        Self { kind, lattice, fitter }
    }

    /// The zero of the codes.
    fn zero(&self) -> f32 {
        if self.kind.grid() == BlockGrid::Symmetric { (1u32 << (self.kind.bits() - 1)) as f32 } else { 0.0 }
    }

    /// The scales of block `x`, whose errors are weighted by `h` (all 1 where empty).
    pub fn fit(&self, x: &[f32], h: &[f32]) -> Block {
        let size = self.kind.group_len();
        let part = |g: usize| (&x[g * size..(g + 1) * size], h.get(g * size..(g + 1) * size).unwrap_or(&[]));
        let mut found = [Group::default(); GROUPS];
        for (g, group) in found[..self.kind.groups()].iter_mut().enumerate() {
            let (x, h) = part(g);
            *group = self.fit_group(x, h);
        }
        let mut block = match self.kind.scales() {
            BlockScales::Float => {
                let scale = round_scale(found[0].scale, ScaleFormat::F16);
                Block { scale, min: round_min(found[0].min), ..Block::default() }
            }
            BlockScales::Signed(range) => self.signed(range, &found, &part),
            BlockScales::Unsigned(limit) => self.unsigned(limit, &found),
        };
        self.spread(&mut block);
        if self.kind.scales() != BlockScales::Float {
            self.refine(&mut block, &part);
        }
        self.regress(&mut block, &part);
        block
    }

    /// One group, not yet rounded to its storage.
    fn fit_group(&self, x: &[f32], h: &[f32]) -> Group {
        let best = self.fitter.fit(x, h);
        match self.kind.grid() {
            BlockGrid::Symmetric => best,
            // The values reach farther down than up.
            BlockGrid::Codebook => {
                let turned: Vec<f32> = x.iter().map(|v| -v).collect();
                let mut other = self.fitter.fit(&turned, h);
                other.scale = -other.scale;
                if self.error(x, h, &other) < self.error(x, h, &best) { other } else { best }
            }
            BlockGrid::Min if self.kind.scales() == BlockScales::Float || best.min >= 0.0 => best,
            // Offsets of K-quants point down: all weights of this group lie above zero.
            BlockGrid::Min => {
                let top = ((1u32 << self.kind.bits()) - 1) as f32;
                let mut group = Group { scale: x.iter().fold(0.0f32, |m, &v| m.max(v)) / top, ..Group::default() };
                for _ in 0..3 {
                    let (mut xv, mut vv) = (0.0f32, 0.0f32);
                    for (i, &x) in x.iter().enumerate() {
                        let (v, h) = (f32::from(self.lattice.encode(x, &group)), h.get(i).copied().unwrap_or(1.0));
                        xv += h * x * v;
                        vv += h * v * v;
                    }
                    if vv > 0.0 && xv > 0.0 {
                        group.scale = xv / vv;
                    }
                }
                group
            }
        }
    }

    /// The weighted squared error of values rounded in a group.
    fn error(&self, x: &[f32], h: &[f32], group: &Group) -> f32 {
        let each = |(i, &x): (usize, &f32)| {
            let d = x - self.lattice.value(self.lattice.encode(x, group), group);
            h.get(i).copied().unwrap_or(1.0) * d * d
        };
        x.iter().enumerate().map(each).sum()
    }

    /// The float that signed integers come closest with to the groups' scales.
    fn signed<'x>(&self, range: u8, found: &[Group; GROUPS], part: &dyn Fn(usize) -> (&'x [f32], &'x [f32])) -> Block {
        let groups = self.kind.groups();
        let range = f32::from(range);
        let extreme =
            found[..groups].iter().map(|g| g.scale).fold(0.0f32, |m, s| if s.abs() > m.abs() { s } else { m });
        if extreme == 0.0 {
            return Block::default();
        }
        // How much a group's scale matters: the energy of its levels.
        let mut weights = [0.0f32; GROUPS];
        for (g, weight) in weights[..groups].iter_mut().enumerate() {
            let (x, h) = part(g);
            *weight = x.iter().enumerate().map(|(i, x)| h.get(i).copied().unwrap_or(1.0) * x * x).sum::<f32>()
                / found[g].scale.powi(2).max(f32::MIN_POSITIVE);
        }
        let mut best = (f32::INFINITY, Block::default());
        let steps = if range > 64.0 { 1 } else { 12 };
        for step in 0..steps {
            for sign in [-1.0f32, 1.0] {
                let reach = if sign < 0.0 { range } else { range - 1.0 };
                let scale = round_scale(sign * extreme / (reach - step as f32 * 0.5), ScaleFormat::F16);
                let mut block = Block { scale, ..Block::default() };
                let mut error = 0.0;
                for g in 0..groups {
                    let code = (found[g].scale / scale).round().clamp(-range, range - 1.0);
                    block.scale_codes[g] = code as i16;
                    error += weights[g] * (code * scale - found[g].scale).powi(2);
                }
                if error < best.0 {
                    best = (error, block);
                }
            }
        }
        best.1
    }

    /// The floats of scales and offsets that are unsigned integers.
    fn unsigned(&self, limit: u8, found: &[Group; GROUPS]) -> Block {
        let groups = self.kind.groups();
        let top = f32::from(limit - 1);
        // The float with the least squared distance to the groups' values, of those around the largest one's.
        let choose = |pick: fn(&Group) -> f32| {
            let largest = found[..groups].iter().map(pick).fold(0.0f32, f32::max);
            if largest <= 0.0 {
                return (0.0, [0u8; GROUPS]);
            }
            let mut best = (f32::INFINITY, 0.0, [0u8; GROUPS]);
            let steps = if limit > 32 { 1 } else { 8 };
            for step in 0..steps {
                let float = round_scale(
                    largest / (top - 0.5 * step as f32 + 0.5 * f32::from(u8::from(step > 0))),
                    ScaleFormat::F16,
                );
                let (mut codes, mut error) = ([0u8; GROUPS], 0.0);
                for g in 0..groups {
                    let wanted = pick(&found[g]).max(0.0);
                    let code = (wanted / float).round().clamp(0.0, top);
                    codes[g] = code as u8;
                    error += (code * float - wanted).powi(2);
                }
                if error < best.0 {
                    best = (error, float, codes);
                }
            }
            (best.1, best.2)
        };
        let ((scale, scale_codes), (min, min_codes)) = (choose(|g| g.scale), choose(|g| g.min));
        Block { scale, min, scale_codes: scale_codes.map(i16::from), min_codes, ..Block::default() }
    }

    /// Fills in the groups' scales and offsets.
    pub fn spread(&self, block: &mut Block) {
        let (zero, double) = (self.zero(), self.kind.scales() != BlockScales::Float);
        let has_min = self.kind.grid() == BlockGrid::Min;
        for g in 0..self.kind.groups() {
            let times = |float: f32, code: f32| if double { float * code } else { float };
            block.groups[g] = Group {
                scale: times(block.scale, f32::from(block.scale_codes[g])),
                zero,
                min: if has_min { times(block.min, f32::from(block.min_codes[g])) } else { 0.0 },
                code: 0,
            };
        }
    }

    /// The codes that a group's scale may have.
    pub fn code_range(&self) -> (i16, i16) {
        match self.kind.scales() {
            BlockScales::Float => (0, 0),
            BlockScales::Unsigned(limit) => (0, i16::from(limit) - 1),
            BlockScales::Signed(range) => (-i16::from(range), i16::from(range) - 1),
        }
    }

    /// Tries each group's integers one up and one down, by the error that they leave.
    fn refine<'x>(&self, block: &mut Block, part: &dyn Fn(usize) -> (&'x [f32], &'x [f32])) {
        let (low, high) = self.code_range();
        let has_min = self.kind.grid() == BlockGrid::Min;
        for g in 0..self.kind.groups() {
            let (x, h) = part(g);
            let (code, min) = (block.scale_codes[g], i16::from(block.min_codes[g]));
            let mut best = (f32::INFINITY, code, min);
            for m in if has_min { min - 1..=min + 1 } else { min..=min } {
                for c in code - 1..=code + 1 {
                    if c < low || c > high || m < 0 || m > high.max(0) {
                        continue;
                    }
                    let group = Group {
                        scale: block.scale * f32::from(c),
                        min: if has_min { block.min * f32::from(m) } else { 0.0 },
                        ..block.groups[g]
                    };
                    let error = self.error(x, h, &group);
                    // The codes there are win a draw.
                    if error < best.0 || (error == best.0 && (c, m) == (code, min)) {
                        best = (error, c, m);
                    }
                }
            }
            (block.scale_codes[g], block.min_codes[g]) = (best.1, best.2 as u8);
        }
        self.spread(block);
    }

    /// Least squares in the block's floats for the codes that they give, kept where the error falls.
    fn regress<'x>(&self, block: &mut Block, part: &dyn Fn(usize) -> (&'x [f32], &'x [f32])) {
        let has_min = self.kind.grid() == BlockGrid::Min;
        let double = self.kind.scales() != BlockScales::Float;
        let (mut ss, mut sm, mut mm, mut xs, mut xm) = (0.0f64, 0.0f64, 0.0f64, 0.0f64, 0.0f64);
        let mut before = 0.0f32;
        for g in 0..self.kind.groups() {
            let (x, h) = part(g);
            let group = &block.groups[g];
            let (c, m) =
                if double { (f32::from(block.scale_codes[g]), f32::from(block.min_codes[g])) } else { (1.0, 1.0) };
            before += self.error(x, h, group);
            for (i, &x) in x.iter().enumerate() {
                let h = f64::from(h.get(i).copied().unwrap_or(1.0));
                let s = f64::from(c * self.lattice.level(self.lattice.encode(x, group), group));
                let m = if has_min { -f64::from(m) } else { 0.0 };
                let x = f64::from(x);
                ss += h * s * s;
                sm += h * s * m;
                mm += h * m * m;
                xs += h * x * s;
                xm += h * x * m;
            }
        }
        let determinant = ss * mm - sm * sm;
        let (scale, min) = if has_min && determinant > 1e-9 * ss * mm {
            ((xs * mm - xm * sm) / determinant, (xm * ss - xs * sm) / determinant)
        } else if ss > 0.0 {
            (xs / ss, f64::from(block.min))
        } else {
            return;
        };
        let (scale, min) = (scale as f32, min as f32);
        let signed_min = !double || min >= 0.0;
        if !(scale.is_finite() && min.is_finite() && signed_min) || (scale <= 0.0 && self.code_range().0 == 0 && double)
        {
            return;
        }
        let mut other = Block { scale: round_scale(scale, ScaleFormat::F16), min: round_min(min), ..*block };
        self.spread(&mut other);
        let after: f32 = (0..self.kind.groups()).map(|g| self.error(part(g).0, part(g).1, &other.groups[g])).sum();
        if after < before {
            *block = other;
        }
    }
}

/// The nearest f16 as f32.
pub(crate) fn to_half(v: f32) -> f32 {
    f16::from_f32(v).to_f32()
}
