//! Any bytes as a GGUF file: opening it and reading all its tensors ends in a value or an error.
#![no_main]

use std::cell::RefCell;
use std::io::{Seek, SeekFrom, Write};

use fourfold_formats::gguf::checkpoint;
use libfuzzer_sys::fuzz_target;
use tempfile::NamedTempFile;

thread_local! {
    static FILE: RefCell<NamedTempFile> = RefCell::new(
        tempfile::Builder::new().suffix(".gguf").tempfile_in("/dev/shm").expect("a file in memory"),
    );
}

fuzz_target!(|data: &[u8]| {
    FILE.with_borrow_mut(|file| {
        file.as_file().set_len(0).expect("truncated");
        file.seek(SeekFrom::Start(0)).expect("rewound");
        file.write_all(data).expect("written");
        let Ok(model) = checkpoint(file.path()) else { return };
        for tensor in model.weights.tensors() {
            if let Ok(weight) = model.weights.load(&tensor.name) {
                assert_eq!(weight.shape(), tensor.shape, "{}", tensor.name);
                if let fourfold_tensor::Weight::Quantized(q) = &weight {
                    q.validate().expect("a sound form");
                }
                assert_eq!(weight.to_f32().len() as u64, tensor.elements());
            }
        }
    });
});
