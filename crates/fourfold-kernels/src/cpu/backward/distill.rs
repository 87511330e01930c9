//! The loss against a teacher's distribution.

use super::rowwise::{GRAIN, cross_entropy_rows_with, largest};
use crate::Tensor;
use crate::backward::{IGNORE, SoftTargets};
use crate::cpu::Isa;
use crate::cpu::pool::{Pool, SendPtr};
use crate::cpu::simd::{Simd, exp, for_isa};

/// Losses of rows; the logits become `factor · (w T (q − p) + (1 − w) (softmax − onehot))`, with q and p the distributions of student
/// and teacher at temperature T.
pub fn distillation(
    pool: &Pool,
    isa: Isa,
    logits: &mut Tensor,
    mut teacher: Tensor,
    targets: &[u32],
    soft: SoftTargets,
    factor: f32,
) -> Vec<f32> {
    assert_eq!(logits.rows(), targets.len(), "distillation: a target a row");
    assert_eq!((logits.rows(), logits.cols()), (teacher.rows(), teacher.cols()), "distillation: shapes");
    let vocabulary = logits.cols();
    let mut losses = vec![0.0f32; targets.len()];
    let (to, of_teacher) = (SendPtr::new(&mut losses), SendPtr::new(teacher.host_mut()));
    pool.for_chunks_mut(logits.host_mut(), vocabulary, GRAIN / vocabulary.max(1), |first, rows| {
        let count = rows.len() / vocabulary;
        // SAFETY: each row has a loss and a teacher's row of its own.
        let (losses, teacher) = unsafe {
            (
                std::slice::from_raw_parts_mut(to.get().add(first), count),
                std::slice::from_raw_parts_mut(of_teacher.get().add(first * vocabulary), rows.len()),
            )
        };
        distillation_rows(isa, rows, teacher, &targets[first..first + count], soft, factor, losses);
    });
    losses
}

for_isa! {
    fn distillation_rows(
        rows: &mut [f32], teacher: &mut [f32], targets: &[u32], soft: SoftTargets, factor: f32, losses: &mut [f32],
    ) = distillation_rows_with
}

#[inline(always)]
fn distillation_rows_with<S: Simd>(
    s: S,
    rows: &mut [f32],
    teacher: &mut [f32],
    targets: &[u32],
    soft: SoftTargets,
    factor: f32,
    losses: &mut [f32],
) {
    let vocabulary = rows.len() / targets.len();
    let SoftTargets { temperature, weight } = soft;
    let mut hard = Vec::new();
    let each = rows.chunks_exact_mut(vocabulary).zip(teacher.chunks_exact_mut(vocabulary)).zip(targets).zip(losses);
    for (((row, teacher), target), loss) in each {
        if *target == IGNORE {
            row.fill(0.0);
            continue;
        }
        let mut of_target = [0.0];
        if weight < 1.0 {
            hard.clear();
            hard.extend_from_slice(row);
            let target = std::slice::from_ref(target);
            cross_entropy_rows_with(s, &mut hard, target, (1.0 - weight) * factor, &mut of_target);
        }
        let [student_sum, teacher_sum, difference] = exponentials(s, row, teacher, 1.0 / temperature);
        // KL = Σ p (log p − log q), both logarithms less the largest logits.
        let divergence = difference / teacher_sum + (student_sum / teacher_sum).ln();
        *loss = weight * temperature * temperature * divergence + (1.0 - weight) * of_target[0];
        let scale = weight * temperature * factor;
        let (of_student, of_teacher) = (scale / student_sum, scale / teacher_sum);
        row.iter_mut().zip(teacher.iter()).for_each(|(q, p)| *q = of_student * *q - of_teacher * p);
        row.iter_mut().zip(&hard).for_each(|(d, hard)| *d += hard);
    }
}

/// Both rows become `e^((x − max x) · inverse)`. Returns their sums, and `Σ teacher's · (difference of the exponents)`.
#[inline(always)]
fn exponentials<S: Simd>(s: S, row: &mut [f32], teacher: &mut [f32], inverse: f32) -> [f32; 3] {
    let n = row.len();
    assert_eq!(teacher.len(), n);
    let (most_row, most_teacher) = (s.splat(largest(s, row)), s.splat(largest(s, teacher)));
    let inverse = s.splat(inverse);
    let mut sums = [s.splat(0.0); 3];
    let mut tail = [0.0f32; 3];
    for i in (0..n).step_by(S::LANES) {
        let count = S::LANES.min(n - i);
        // SAFETY: `count` elements of both are left.
        unsafe {
            let (at, at_teacher) = (row.as_mut_ptr().add(i), teacher.as_mut_ptr().add(i));
            let x = s.mul(s.sub(s.load_first(at.cast_const(), count), most_row), inverse);
            let y = s.mul(s.sub(s.load_first(at_teacher.cast_const(), count), most_teacher), inverse);
            let (q, p) = (exp(s, x), exp(s, y));
            s.store_first(at, q, count);
            s.store_first(at_teacher, p, count);
            let added = [q, p, s.mul(p, s.sub(y, x))];
            if count == S::LANES {
                sums.iter_mut().zip(added).for_each(|(sum, v)| *sum = s.add(*sum, v));
            } else {
                let mut lanes = [[0.0f32; crate::cpu::simd::MAX_LANES]; 3];
                for ((lanes, v), tail) in lanes.iter_mut().zip(added).zip(&mut tail) {
                    s.store_first(lanes.as_mut_ptr(), v, count);
                    *tail += lanes[..count].iter().sum::<f32>();
                }
            }
        }
    }
    [0, 1, 2].map(|i| s.sum(sums[i]) + tail[i])
}
