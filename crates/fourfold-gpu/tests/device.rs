//! Memory and failures of a device.

mod common;

use common::{gpu, gpu_of};
use fourfold_kernels::conformance::{Form, noise, weight};
use fourfold_kernels::{Backend, KernelError, LinearArg, Memory, Tensor};
use fourfold_tensor::{DType, Dense, FloatBuffer};

#[test]
fn memory_is_counted_and_given_back() {
    let Some(gpu) = gpu() else { return };
    let before = gpu.device_usage().unwrap();
    let bytes = 100 << 20;
    let x = gpu.tensor(1, bytes / 4, vec![1.0; bytes / 4]);
    let with = gpu.device_usage().unwrap();
    assert!((with.live_bytes - before.live_bytes) as usize >= bytes, "{with:?}");
    // A sixteenth of a power of two is the most that sizes are rounded up by.
    assert!((with.live_bytes - before.live_bytes) as usize <= bytes + bytes / 8, "{with:?}");
    assert!(gpu.read(&x).unwrap().iter().all(|&v| v == 1.0));
    drop(x);
    let after = gpu.device_usage().unwrap();
    assert_eq!((after.live_bytes, after.peak_bytes), (before.live_bytes, with.peak_bytes));
    assert_eq!((after.downloads - before.downloads, after.uploads - before.uploads), (1, 1));
}

/// What is asked for beyond the limit fails with an error that says so, at the first read and at every one after.
#[test]
fn memory_that_is_used_up_is_an_error() {
    let Some(gpu) = gpu_of(Some(8 << 20)) else { return };
    let small = gpu.tensor(1, 3, vec![1.0, 2.0, 3.0]);
    assert_eq!(*gpu.read(&small).unwrap(), [1.0, 2.0, 3.0]);
    let large = gpu.zeros(1024, 1024 * 4);
    let mut sum = gpu.zeros(1024, 1024 * 4);
    gpu.add(&mut sum, &large);
    for x in [&sum, &small] {
        let error = gpu.read(x).unwrap_err();
        assert!(matches!(error, KernelError::DeviceMemory { asked, .. } if asked >= 16 << 20), "{error}");
        assert!(error.to_string().contains("out of memory"), "{error}");
    }
    let refused = gpu.upload(weight(Form::Dense(DType::F32), 4, 4, 1));
    assert!(matches!(refused, Err(KernelError::DeviceMemory { .. })));
}

/// A weight larger than one buffer may be is read in parts.
#[test]
fn a_weight_in_several_parts_is_one_weight() {
    let Some(gpu) = gpu() else { return };
    // 160 MB: more than the software driver's largest buffer.
    let (rows, cols) = (80_000, 1024);
    let value = |r: usize, c: usize| ((r * 31 + c * 7) % 17) as f32 - 8.0;
    let values: Vec<f32> = (0..rows * cols).map(|i| value(i / cols, i % cols)).collect();
    let stored = Dense::new(vec![rows, cols], FloatBuffer::from_f32(values, DType::F16));
    let w = gpu.upload(stored.into()).unwrap();
    let x = Tensor::new(1, cols, (0..cols).map(|c| f32::from(c % 5 == 0)).collect());
    let put = gpu.tensor(1, cols, x.host().to_vec());
    let y = gpu.take(gpu.linear(&put, &[LinearArg { weight: &w, bias: None }]).remove(0)).unwrap();
    for r in (0..rows).step_by(997).chain([rows - 1]) {
        let expected: f32 = (0..cols).filter(|c| c % 5 == 0).map(|c| value(r, c)).sum();
        assert_eq!(y[r], expected, "row {r}");
    }
    let ids = [0, 79_999, 40_000, 33_333];
    let rows_read = gpu.take(gpu.embedding(&w, &ids)).unwrap();
    for (i, &id) in ids.iter().enumerate() {
        assert!((0..cols).all(|c| rows_read[i * cols + c] == value(id as usize, c)), "row {id}");
    }
    // Rows of two parts, transposed.
    let range = 65_000..66_000;
    let put = gpu.tensor(1, range.len(), vec![1.0; range.len()]);
    let y = gpu.take(gpu.linear_transposed(&put, &w, range.clone())).unwrap();
    for c in (0..cols).step_by(101) {
        assert_eq!(y[c], range.clone().map(|r| value(r, c)).sum::<f32>(), "column {c}");
    }
}

/// Caches keep what they hold as they grow, are cut, copied and joined.
#[test]
fn caches_are_cut_copied_and_joined() {
    use fourfold_kernels::{AttentionSpec, KvCache, KvDtype, Reference, Values};
    let Some(gpu) = gpu() else { return };
    let spec = AttentionSpec {
        heads: 1,
        kv_heads: 1,
        key_dim: 5,
        value_dim: 5,
        scale: 0.4,
        first_position: 399,
        window: None,
    };
    for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16] {
        let (mut host, mut device) = (KvCache::new(5, dtype), KvCache::new(5, dtype));
        for (seed, rows) in [(1, 60), (2, 200), (3, 1), (4, 139)] {
            let x = noise(rows, 5, seed);
            host.append(&x);
            device.append(&gpu.tensor(rows, 5, x.host().to_vec()));
        }
        let q = noise(1, 5, 9);
        let put = gpu.tensor(1, 5, q.host().to_vec());
        let mut joined = device.copy(0..123);
        joined.extend(&device.copy(123..400));
        device.truncate(300);
        let mut cut = device.clone();
        let rest = host.copy(300..400);
        drop(device);
        let x = noise(139, 5, 4);
        let last = Tensor::new(100, 5, x.host()[39 * 5..].to_vec());
        cut.append(&gpu.tensor(100, 5, last.host().to_vec()));
        assert_eq!(rest.len(), 100);
        let expected = Reference.attention(&q, &host, Values::PrefixOfKeys, &spec);
        for cache in [&joined, &cut] {
            let y = gpu.take(gpu.attention(&put, cache, Values::PrefixOfKeys, &spec)).unwrap();
            let far = y.iter().zip(expected.host()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(far < 3e-6, "{dtype:?}: {far}");
        }
    }
}
