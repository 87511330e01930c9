//! Several sequences through the model at once: every weight is read once for all their tokens.

use fourfold_kernels::{Backend, Tensor};

use crate::{BlockCache, Cache};

/// Tokens that follow those in a cache.
pub struct Sequence<'a> {
    /// The tokens, at least one.
    pub ids: &'a [u32],
    /// What came before them; they are added to it.
    pub cache: &'a mut Cache,
}

/// Consecutive rows of a batch that belong to one sequence.
pub struct Segment<'a> {
    /// How many.
    pub rows: usize,
    /// One block's cache of the sequence.
    pub cache: &'a mut BlockCache,
}

/// What `f` makes of each sequence's rows of `parts`, one below the other. Each part has a row, or equally many, for each of
/// the segments' rows.
pub(crate) fn each_sequence<const N: usize>(
    backend: &dyn Backend,
    segments: &mut [Segment],
    parts: [Tensor; N],
    mut f: impl FnMut([Tensor; N], &mut BlockCache) -> Tensor,
) -> Tensor {
    if let [only] = segments {
        return f(parts, only.cache);
    }
    let rows: usize = segments.iter().map(|segment| segment.rows).sum();
    let mut first = 0;
    let mut results = Vec::with_capacity(segments.len());
    for segment in segments {
        let of_sequence = parts.each_ref().map(|part| {
            let each = part.rows() / rows;
            let wanted: Vec<usize> = (first * each..(first + segment.rows) * each).collect();
            backend.gather_rows(part, &wanted)
        });
        first += segment.rows;
        results.push(f(of_sequence, segment.cache));
    }
    stack(backend, &results)
}

/// Matrices of equal widths, one below the other.
fn stack(backend: &dyn Backend, parts: &[Tensor]) -> Tensor {
    let rows = parts.iter().map(Tensor::rows).sum();
    let mut whole = backend.zeros(rows, parts.first().map_or(0, Tensor::cols));
    let mut first = 0;
    for part in parts {
        let to: Vec<usize> = (first..first + part.rows()).collect();
        backend.scatter_add_rows(&mut whole, part, &to, &vec![1.0; part.rows()]);
        first += part.rows();
    }
    whole
}
