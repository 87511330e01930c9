//! Convolutional operations: every backend against the reference, the same bits from any number of threads, and the reference's
//! gradients against its own forward.

mod common;

use common::{check, each, noise};
use fourfold_kernels::spatial::{Averages, Spatial, Window};
use fourfold_kernels::{Reference, Tensor};

const WINDOWS: &[Window] = &[
    Window { image: [6, 7], kernel: [3, 3], stride: [1, 1], padding: [1, 1] },
    Window { image: [7, 5], kernel: [3, 2], stride: [2, 1], padding: [1, 0] },
    Window { image: [4, 4], kernel: [1, 1], stride: [1, 1], padding: [0, 0] },
    Window { image: [9, 9], kernel: [5, 1], stride: [3, 2], padding: [2, 0] },
    Window { image: [40, 33], kernel: [3, 3], stride: [2, 2], padding: [1, 1] },
];

fn dot(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!((a.rows(), a.cols()), (b.rows(), b.cols()));
    a.host().iter().zip(b.host()).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

fn pixels(window: &Window) -> usize {
    window.image[0] * window.image[1]
}

#[test]
fn patches_and_their_gradient() {
    each(|candidate| {
        let mut outputs = Vec::new();
        for (seed, window) in WINDOWS.iter().enumerate() {
            let x = noise(3 * pixels(window), 10, seed as u64);
            let lines = 3 * window.output().unwrap()[0];
            for (channels, lines) in [(0..10, 0..lines), (2..7, 1..lines - 1)] {
                let what = format!("{} {window:?} {channels:?} {lines:?}", candidate.label);
                let expected = Reference.patches(&x, window, channels.clone(), lines.clone());
                let found = candidate.backend.patches(&x, window, channels.clone(), lines.clone());
                assert_eq!(found, expected, "{what}");
                let dy = noise(found.rows(), found.cols(), 99);
                let start = noise(x.rows(), x.cols(), 5);
                let (mut expected, mut dx) = (start.clone(), start.clone());
                Reference.add_patches(&dy, window, channels.clone(), lines.clone(), &mut expected);
                candidate.backend.add_patches(&dy, window, channels, lines, &mut dx);
                check(&what, &dx, &expected, |_| 1e-5);
                // Taking patches and adding them are each other's transpose.
                let sum = dot(&dx, &x) - dot(&start, &x);
                assert!((sum - dot(&dy, &found)).abs() < 1e-3, "{what}: {sum}");
                outputs.extend([found, dx]);
            }
        }
        outputs
    });
}

#[test]
fn pools_and_their_gradients() {
    each(|candidate| {
        let mut outputs = Vec::new();
        for (seed, window) in WINDOWS.iter().enumerate() {
            let x = noise(3 * pixels(window), 6, 20 + seed as u64);
            let what = format!("{} {window:?}", candidate.label);
            let (y, taps) = candidate.backend.max_pool(&x, window);
            assert_eq!((y.clone(), taps.clone()), Reference.max_pool(&x, window), "{what}");
            let dy = noise(y.rows(), y.cols(), 7);
            let dx = candidate.backend.max_pool_backward(&dy, &taps, window);
            check(&what, &dx, &Reference.max_pool_backward(&dy, &taps, window), |_| 1e-5);
            // Each gradient goes to where the largest value came from.
            assert!((dot(&dx, &x) - dot(&dy, &y)).abs() < 1e-3, "{what}");
            outputs.extend([y, dx]);

            let parts = [window.image[0].min(3), window.image[1].min(2)];
            for averages in [Averages::windows(window), Averages::adaptive(window.image, parts)] {
                let y = candidate.backend.average_pool(&x, &averages);
                check(&what, &y, &Reference.average_pool(&x, &averages), |_| 1e-5);
                let dy = noise(y.rows(), y.cols(), 8);
                let dx = candidate.backend.average_pool_backward(&dy, &averages);
                check(&what, &dx, &Reference.average_pool_backward(&dy, &averages), |_| 1e-5);
                assert!((dot(&dx, &x) - dot(&dy, &y)).abs() < 1e-3, "{what}");
                outputs.extend([y, dx]);
            }
        }
        outputs
    });
}

#[test]
fn columns_signs_and_order() {
    each(|candidate| {
        let backend = &candidate.backend;
        let mut outputs = Vec::new();
        for (rows, cols) in [(1, 3), (70, 5), (1111, 33)] {
            let what = format!("{} {rows}x{cols}", candidate.label);
            let mut x = noise(rows, cols, 3);
            // A mean far from zero must not swallow the variance.
            x.host_mut().iter_mut().for_each(|v| *v += 50.0);
            let (found, expected) = (backend.moments(&x), Reference.moments(&x));
            check(&what, &found.mean, &expected.mean, |_| 1e-4);
            check(&what, &found.variance, &expected.variance, |_| 1e-4);
            let (dy, weight) = (noise(rows, cols, 4), noise(1, cols, 5));
            let gradient = |backend: &dyn Spatial| {
                let (mut dx, mut dw, mut db) = (dy.clone(), noise(1, cols, 6), noise(1, cols, 7));
                backend.batch_norm_backward(&x, &expected, 1e-2, &weight, &mut dx, &mut dw, &mut db);
                [dx, dw, db]
            };
            let found_gradient = gradient(backend);
            for (found, expected) in found_gradient.iter().zip(gradient(&Reference)) {
                check(&what, found, &expected, |_| 2e-3);
            }
            let (mut found_x, mut expected_x) = (dy.clone(), dy.clone());
            backend.scale_shift(&mut found_x, &weight, &noise(1, cols, 8));
            Reference.scale_shift(&mut expected_x, &weight, &noise(1, cols, 8));
            check(&what, &found_x, &expected_x, |_| 1e-6);
            let signs = backend.signs(&dy);
            assert_eq!(signs, Reference.signs(&dy), "{what}");
            let mut masked = dy.clone();
            backend.mask(&mut masked, &signs);
            let mut relu = dy.clone();
            backend.relu(&mut relu);
            assert_eq!(masked, relu, "{what}");
            outputs.extend(found_gradient.into_iter().chain([found.mean, found.variance, found_x, relu]));
        }
        let x = noise(24, 5, 1);
        let flat = backend.channels_first(&x, 6);
        assert_eq!((flat.rows(), flat.row(1)[7]), (4, x.row(6 + 1)[1]));
        assert_eq!(flat, Reference.channels_first(&x, 6));
        assert_eq!(backend.channels_last(&flat, 6), x);
        outputs
    });
}

#[test]
fn the_gradient_of_batch_norm_by_differences() {
    let (x, weight, dy) = (noise(6, 3, 1), noise(1, 3, 2), noise(6, 3, 3));
    let bias = noise(1, 3, 4);
    let eps = 1e-2;
    let loss = |x: &Tensor, weight: &Tensor, bias: &Tensor| {
        let moments = Reference.moments(x);
        let mut sum = 0.0;
        for (r, c) in (0..6).flat_map(|r| (0..3).map(move |c| (r, c))) {
            let deviation = (f64::from(moments.variance.host()[c]) + f64::from(eps)).sqrt();
            let normed = f64::from(x.row(r)[c] - moments.mean.host()[c]) / deviation;
            sum += f64::from(dy.row(r)[c]) * (normed * f64::from(weight.host()[c]) + f64::from(bias.host()[c]));
        }
        sum
    };
    let (mut dx, mut dw, mut db) = (dy.clone(), Tensor::zeros(1, 3), Tensor::zeros(1, 3));
    let moments = Reference.moments(&x);
    Reference.batch_norm_backward(&x, &moments, eps, &weight, &mut dx, &mut dw, &mut db);
    let h = 1.0 / 256.0;
    let difference = |tensor: &Tensor, i: usize, loss: &dyn Fn(&Tensor) -> f64| {
        let moved = |by: f32| {
            let mut moved = tensor.clone();
            moved.host_mut()[i] += by;
            loss(&moved)
        };
        (moved(h) - moved(-h)) / f64::from(2.0 * h)
    };
    for i in 0..18 {
        let expected = difference(&x, i, &|x| loss(x, &weight, &bias));
        assert!((f64::from(dx.host()[i]) - expected).abs() < 2e-3, "dx[{i}]: {}, {expected}", dx.host()[i]);
    }
    for i in 0..3 {
        let expected = difference(&weight, i, &|weight| loss(&x, weight, &bias));
        assert!((f64::from(dw.host()[i]) - expected).abs() < 2e-3, "dw[{i}]");
        let expected = difference(&bias, i, &|bias| loss(&x, &weight, bias));
        assert!((f64::from(db.host()[i]) - expected).abs() < 2e-3, "db[{i}]");
    }
}
