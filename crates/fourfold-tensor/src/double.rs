//! Double quantization: group scales that are themselves small integers times a float.

use crate::{Buffer, FloatBuffer};

/// `value[r, g] = floats[r, g / span] · codes[r, g]`: a byte a group, and a float for each run of `span` groups of a row.
///
/// QLoRA (Dettmers et al. 2023, section 3) has one float for many groups; GGUF's K-quants have one for 8 or 16 groups.
#[derive(Clone, Debug, PartialEq)]
pub struct Double {
    /// `[rows, ceil(groups / span)]`.
    pub floats: FloatBuffer,
    /// `[rows, groups]`.
    pub codes: DoubleCodes,
    /// Groups that share a float: a power of two, or all groups of a row.
    pub span: usize,
}

/// The integers of a [`Double`], `[rows, groups]`.
#[derive(Clone, Debug, PartialEq)]
pub enum DoubleCodes {
    /// 0 to 255.
    Unsigned(Buffer<u8>),
    /// −128 to 127.
    Signed(Buffer<i8>),
}

impl DoubleCodes {
    /// Code `i`. Exact: a byte fits an f32.
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Self::Unsigned(codes) => f32::from(codes[i]),
            Self::Signed(codes) => f32::from(codes[i]),
        }
    }

    /// How many there are, which is also the bytes they take.
    pub fn len(&self) -> usize {
        match self {
            Self::Unsigned(codes) => codes.len(),
            Self::Signed(codes) => codes.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The codes as bytes, signed ones in two's complement.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Unsigned(codes) => codes.as_bytes(),
            Self::Signed(codes) => codes.as_bytes(),
        }
    }
}

impl Double {
    /// One float a row.
    pub fn by_row(floats: FloatBuffer, codes: Vec<u8>, groups: usize) -> Self {
        Self { floats, codes: DoubleCodes::Unsigned(codes.into()), span: groups.max(1) }
    }

    /// Floats of a row of `groups`.
    pub fn spans(&self, groups: usize) -> usize {
        groups.div_ceil(self.span)
    }

    /// The value of row `r`, group `g` of `groups`.
    pub fn get(&self, r: usize, g: usize, groups: usize) -> f32 {
        self.floats.get(r * self.spans(groups) + g / self.span) * self.codes.get(r * groups + g)
    }

    /// Bytes of both parts.
    pub fn byte_len(&self) -> usize {
        self.floats.byte_len() + self.codes.len()
    }

    /// Whether a row of `groups` can have such runs.
    pub(crate) fn is_span(span: usize, groups: usize) -> bool {
        span.is_power_of_two() || (span > 0 && span == groups)
    }

    /// The length of the runs in a row of `groups` that has `spans` floats: the inverse of [`Double::spans`]. `None` where no
    /// run gives that many.
    pub fn span_of(groups: usize, spans: usize) -> Option<usize> {
        if spans <= 1 {
            return (spans == 1).then_some(groups.max(1));
        }
        // Halving a run more than doubles, or doubles less one, the floats: at most one power of two fits.
        (0..usize::BITS).map(|shift| 1 << shift).take_while(|&s| s < groups).find(|&s| groups.div_ceil(s) == spans)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_tell_their_length() {
        for groups in 1..70 {
            for span in (0..7).map(|shift| 1usize << shift).chain([groups]) {
                let spans = groups.div_ceil(span);
                // Runs beyond the row's end are the whole row.
                let wanted = if spans == 1 { groups } else { span };
                assert_eq!(Double::span_of(groups, spans), Some(wanted), "{groups} groups, runs of {span}");
            }
        }
        assert_eq!(Double::span_of(18, 4), None);
        assert_eq!(Double::span_of(18, 0), None);
        assert_eq!(Double::span_of(4, 5), None);
    }
}
