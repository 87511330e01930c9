//! CP and Tucker-2 of convolution kernels against TensorLy (`scripts/golden_decompose.py`).

use fourfold_compress::methods::decompose::cp::cp;
use fourfold_compress::methods::decompose::kernel::Kernel;
use fourfold_compress::methods::decompose::tucker::{Ranks, tucker2};
use serde_json::Value;

/// The kernel of the script.
fn kernel(shape: [usize; 4]) -> Kernel {
    let count: usize = shape.iter().product();
    let zeros = Kernel { shape, values: vec![0.0; count] };
    let mut values = Vec::with_capacity(count);
    zeros.each(|[o, i, h, w], _| {
        let [o, i, h, w] = [o as f64, i as f64, h as f64, w as f64];
        let at = values.len() as f64;
        let smooth = (0.3 * o + 0.7 * i).sin() * (0.9 * h).cos() + 0.5 * (0.5 * o * h).cos() * (0.4 * i + w).sin();
        values.push((smooth + 0.3 * (at * at * 0.37).sin()) as f32);
    });
    Kernel::new(shape, &values).unwrap()
}

fn cases() -> Vec<Value> {
    serde_json::from_str(include_str!("golden_decompose.json")).unwrap()
}

fn numbers<const N: usize>(value: &Value) -> [usize; N] {
    std::array::from_fn(|i| value[i].as_u64().unwrap() as usize)
}

#[test]
fn fits_are_no_worse_than_tensorlys() {
    for case in cases() {
        let kernel = kernel(numbers(&case["shape"]));
        let [outputs, inputs] = numbers(&case["tucker_ranks"]);
        let found = tucker2(&kernel, Ranks::Given { outputs, inputs }).unwrap();
        let expected = case["tucker_error"].as_f64().unwrap();
        assert!(found.error <= expected * 1.0001 + 1e-9, "{case}: Tucker-2 {}", found.error);
        // The factors give the error that is claimed.
        let mut wrong = 0.0;
        kernel.each(|[o, i, h, w], value| {
            let mut sum = 0.0;
            found.core.each(|[a, b, y, x], core| {
                if (y, x) == (h, w) {
                    sum += found.outputs.row(o)[a] * core * found.inputs.row(i)[b];
                }
            });
            wrong += (value - sum).powi(2);
        });
        assert!((wrong / kernel.energy() - found.error).abs() < 1e-9, "{case}: {wrong}");

        let rank = case["cp_rank"].as_u64().unwrap() as usize;
        let found = cp(&kernel, rank).unwrap();
        let expected = case["cp_error"].as_f64().unwrap();
        assert!(found.error <= expected * 1.005 + 1e-6, "{case}: CP {}", found.error);
        // Negative control: half the rank fits worse.
        assert!(cp(&kernel, rank / 2).unwrap().error > found.error, "{case}");
    }
}

#[test]
fn whole_ranks_are_exact_and_others_refused() {
    let kernel = kernel([5, 4, 3, 2]);
    let whole = tucker2(&kernel, Ranks::Energy(1.0)).unwrap();
    assert!(whole.error < 1e-9, "{}", whole.error);
    let part = tucker2(&kernel, Ranks::Energy(0.8)).unwrap();
    assert!(part.core.values.len() < kernel.values.len() && part.error < 0.4, "{:?} {}", part.core.shape, part.error);
    for ranks in [
        Ranks::Given { outputs: 6, inputs: 2 },
        Ranks::Given { outputs: 2, inputs: 5 },
        Ranks::Given { outputs: 0, inputs: 2 },
        Ranks::Energy(0.0),
        Ranks::Energy(1.5),
        Ranks::Energy(f64::NAN),
    ] {
        assert!(tucker2(&kernel, ranks).is_err(), "{ranks:?}");
    }
    assert!(cp(&kernel, 0).is_err() && cp(&kernel, 25).is_err());
    let zeros = Kernel::new([3, 2, 2, 2], &[0.0; 24]).unwrap();
    assert_eq!(tucker2(&zeros, Ranks::Given { outputs: 2, inputs: 1 }).unwrap().error, 0.0);
    assert_eq!(cp(&zeros, 2).unwrap().error, 0.0);
    assert!(Kernel::new([1, 1, 1, 2], &[1.0, f32::NAN]).unwrap_err().to_string().contains("NaN"));
}
