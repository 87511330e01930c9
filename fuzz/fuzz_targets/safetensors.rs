//! Any bytes as a model directory: a config.json, a zero byte, a model.safetensors. Opening it and reading all its tensors ends in
//! a value or an error.
#![no_main]

use std::cell::RefCell;

use fourfold_formats::{Access, OpenOptions, open_with};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

thread_local! {
    static DIR: RefCell<TempDir> = RefCell::new(tempfile::tempdir_in("/dev/shm").expect("a directory in memory"));
}

fuzz_target!(|data: &[u8]| {
    let split = data.iter().position(|&b| b == 0).unwrap_or(0);
    let (config, model) = (&data[..split], data.get(split + 1..).unwrap_or_default());
    DIR.with_borrow(|dir| {
        std::fs::write(dir.path().join("config.json"), config).expect("written");
        std::fs::write(dir.path().join("model.safetensors"), model).expect("written");
        let access = if data.len() % 2 == 0 { Access::Read } else { Access::Map };
        let Ok(model) = open_with(dir.path(), OpenOptions { access, ..OpenOptions::default() }) else { return };
        for tensor in model.weights.tensors() {
            let Ok(weight) = model.weights.load(&tensor.name) else { continue };
            assert_eq!(weight.shape(), tensor.shape, "{}", tensor.name);
            if let fourfold_tensor::Weight::Quantized(q) = &weight {
                q.validate().expect("a sound form");
            }
            assert_eq!(weight.to_f32().len() as u64, tensor.elements());
        }
    });
});
