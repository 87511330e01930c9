//! Dividing a budget among tensors, against trying everything.

use fourfold_compress::CompressError;
use fourfold_compress::plan::{Choice, Entry, HeaderBytes, Plan, allocate};
use fourfold_tensor::{DType, Form};
use proptest::prelude::*;

fn choices(sizes: &[(u64, f64)]) -> Vec<Choice> {
    let choice = |&(bytes, cost): &(u64, f64)| {
        let form = Form::Dense { shape: vec![bytes as usize], dtype: DType::F16 };
        Choice::of(form, Entry { bytes, ..Entry::keep("x") }, cost)
    };
    sizes.iter().map(choice).collect()
}

/// [`allocate`], whose entries say their bytes.
fn divide(tensors: &[Vec<(u64, f64)>], budget: u64, header: &HeaderBytes) -> Result<Plan, CompressError> {
    let tensors = tensors.iter().map(|t| choices(t)).collect();
    allocate(tensors, budget, header)
}

/// The least cost of all combinations that fit.
fn best(tensors: &[Vec<(u64, f64)>], budget: u64) -> Option<f64> {
    let Some((first, rest)) = tensors.split_first() else { return Some(0.0) };
    let with = |&(bytes, cost): &(u64, f64)| Some(cost + best(rest, budget.checked_sub(bytes)?)?);
    first.iter().filter_map(with).min_by(f64::total_cmp)
}

fn cost(tensors: &[Vec<(u64, f64)>], picked: &[u64]) -> f64 {
    let of = |(sizes, &bytes): (&Vec<(u64, f64)>, &u64)| {
        sizes.iter().filter(|s| s.0 == bytes).map(|s| s.1).min_by(f64::total_cmp).unwrap()
    };
    tensors.iter().zip(picked).map(of).sum()
}

#[test]
fn bytes_go_where_they_save_most() {
    let tensors = [vec![(10, 8.0), (20, 2.0), (30, 1.0)], vec![(10, 3.0), (20, 1.0), (30, 0.9)]];
    let plan = divide(&tensors, 40, &|_| 0).unwrap();
    assert_eq!(plan.tensors.iter().map(|t| t.bytes).collect::<Vec<_>>(), [20, 20]);
    let refused = divide(&tensors, 19, &|_| 0);
    assert!(matches!(refused, Err(CompressError::Budget { smallest: 20, budget: 19 })));
}

#[test]
fn headers_count_and_may_depend_on_what_is_picked() {
    let tensors = [vec![(10, 8.0), (20, 2.0), (30, 1.0)], vec![(10, 3.0), (20, 1.0), (30, 0.9)]];
    let elements = |form: &Form| match form {
        Form::Dense { shape, .. } => shape[0] as u64,
        other => panic!("{other:?}"),
    };
    let header = |forms: &[(String, Form)]| forms.iter().map(|(_, form)| elements(form) / 10).sum::<u64>();
    for (budget, wanted) in [(44, [20, 20]), (43, [20, 10]), (33, [20, 10]), (32, [10, 10]), (22, [10, 10])] {
        let plan = divide(&tensors, budget, &header).unwrap();
        assert_eq!(plan.tensors.iter().map(|t| t.bytes).collect::<Vec<_>>(), wanted, "{budget}");
    }
    let refused = divide(&tensors, 21, &header);
    assert!(matches!(refused, Err(CompressError::Budget { smallest: 22, budget: 21 })));
}

proptest! {
    /// Never over the budget, never worse than the smallest plan, and close to the best there is: no farther than one step of
    /// one tensor.
    #[test]
    fn close_to_the_best(
        tensors in prop::collection::vec(prop::collection::vec((1u64..60, 0.0f64..10.0), 1..5), 1..5),
        budget in 1u64..250,
    ) {
        match divide(&tensors, budget, &|_| 0) {
            Ok(plan) => {
                let picked: Vec<u64> = plan.tensors.iter().map(|t| t.bytes).collect();
                prop_assert!(picked.iter().sum::<u64>() <= budget);
                let (found, least) = (cost(&tensors, &picked), best(&tensors, budget).unwrap());
                let widest = tensors.iter().map(|t| {
                    let costs = t.iter().map(|c| c.1);
                    costs.clone().fold(0.0, f64::max) - costs.fold(f64::INFINITY, f64::min)
                });
                prop_assert!(found <= least + widest.fold(0.0, f64::max) + 1e-9, "{} against {}", found, least);
            }
            Err(_) => prop_assert!(best(&tensors, budget).is_none()),
        }
    }
}
