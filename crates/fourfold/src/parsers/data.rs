//! Readers of data to learn from.

use std::path::Path;

use fourfold_formats::images::{FolderImages, IdxImages, Split};
use fourfold_train::data::{Columns, Seen};
use fourfold_train::labelled::LabelColumns;

use super::{put, texts};
use crate::commands::train::try_row;
use crate::data_files::{DataFile, Opened, open_as};

/// A file of text or rows: every row as text and as labelled text, in tokens.
fn rows(input: &[u8], dir: &Path, name: &str) -> bool {
    let read = || {
        put(dir, name, input)?;
        let file = DataFile { path: dir.join(name), is_found: false };
        let columns = Columns::default();
        match open_as(&file, None, &columns).ok()? {
            Opened::Text(mut source, _) => {
                let mut text = String::new();
                while source.text(&mut text).ok()? {}
            }
            Opened::Rows(rows, _) => {
                let mut seen = Seen::default();
                let tokenizer = texts::tiny_tokenizer()?;
                for row in rows {
                    let row = row.ok()?;
                    let labelled = LabelColumns::default().read(name, &row).is_ok();
                    match columns.record(name, &row, &mut seen) {
                        Ok(record) => try_row(&record, tokenizer).ok()?,
                        Err(_) if labelled => {}
                        Err(_) => return None,
                    }
                }
            }
        }
        Some(())
    };
    read().is_some()
}

/// A text.
pub(super) fn text(input: &[u8], dir: &Path) -> bool {
    rows(input, dir, "data.txt")
}

/// An object a line.
pub(super) fn jsonl(input: &[u8], dir: &Path) -> bool {
    rows(input, dir, "data.jsonl")
}

/// A list of objects, or one.
pub(super) fn json(input: &[u8], dir: &Path) -> bool {
    rows(input, dir, "data.json")
}

/// Values with commas between.
pub(super) fn csv(input: &[u8], dir: &Path) -> bool {
    rows(input, dir, "data.csv")
}

/// Values with tabs between.
pub(super) fn tsv(input: &[u8], dir: &Path) -> bool {
    rows(input, dir, "data.tsv")
}

/// Packed by gzip.
pub(super) fn gzip(input: &[u8], dir: &Path) -> bool {
    rows(input, dir, "data.jsonl.gz")
}

/// Packed by Zstandard.
pub(super) fn zstandard(input: &[u8], dir: &Path) -> bool {
    rows(input, dir, "data.jsonl.zst")
}

/// Two images of two by three pixels, and their classes.
const IMAGES: &[u8] = &[0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
const LABELS: &[u8] = &[0, 0, 8, 1, 0, 0, 0, 2, 3, 9];

fn idx(images: &[u8], labels: &[u8], dir: &Path) -> bool {
    let read = || {
        put(dir, "train-images-idx3-ubyte", images)?;
        put(dir, "train-labels-idx1-ubyte", labels)?;
        let images = IdxImages::open(dir, Split::Train).ok()?;
        let [height, width] = images.size();
        for i in 0..images.labels().len() {
            images.read(i, &mut vec![0; height * width]).ok()?;
        }
        Some(())
    };
    read().is_some()
}

/// Images in an idx file.
pub(super) fn idx_images(input: &[u8], dir: &Path) -> bool {
    idx(input, LABELS, dir)
}

/// Classes in an idx file.
pub(super) fn idx_labels(input: &[u8], dir: &Path) -> bool {
    idx(IMAGES, input, dir)
}

/// A picture in the folder of its class.
fn picture(input: &[u8], dir: &Path, name: &str) -> bool {
    let read = || {
        std::fs::create_dir_all(dir.join("class")).ok()?;
        put(&dir.join("class"), name, input)?;
        let images = FolderImages::open(dir, Split::Train, [3, 4, 4]).ok()?;
        images.read(0, &mut [0; 48]).ok()
    };
    read().is_some()
}

/// A PNG file.
pub(super) fn png(input: &[u8], dir: &Path) -> bool {
    picture(input, dir, "picture.png")
}

/// A JPEG file.
pub(super) fn jpeg(input: &[u8], dir: &Path) -> bool {
    picture(input, dir, "picture.jpg")
}
