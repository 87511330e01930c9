//! Labelled images in idx files, the format of MNIST and Fashion-MNIST (LeCun): two zero bytes, the type (8: bytes), the number of
//! dimensions, each dimension as a big-endian u32, then the elements. Images are read from the file when they are asked for; a
//! gzip file is unpacked to a temporary one first, so that memory does not grow with the data.

mod folder;

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use thiserror::Error;

pub use self::folder::FolderImages;

/// Why images cannot be read.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The operating system refused.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// Its reason.
        source: io::Error,
    },
    /// A file is not what its name promises.
    #[error("{}: {reason}", file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A directory holds no images of that name.
    #[error("{}: there is no {name} or {name}.gz", folder.display())]
    Missing {
        /// The directory.
        folder: PathBuf,
        /// The file looked for.
        name: String,
    },
}

/// Which images of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// To learn from.
    Train,
    /// To measure on.
    Test,
}

/// Images of one channel and one size, with their classes.
#[derive(Debug)]
pub struct IdxImages {
    file: Mutex<File>,
    path: PathBuf,
    first: u64,
    size: [usize; 2],
    labels: Vec<u8>,
}

impl IdxImages {
    /// Whether `folder` holds idx files of any split.
    pub fn are_in(folder: &Path) -> bool {
        let names = ["train-images-idx3-ubyte", "t10k-images-idx3-ubyte"];
        names.iter().any(|name| folder.join(name).is_file() || folder.join(format!("{name}.gz")).is_file())
    }

    /// Opens `train-images-idx3-ubyte` and its labels in `folder`, or `t10k-…` for the test images, packed by gzip or not.
    ///
    /// # Errors
    /// A file is missing, truncated, or of another kind; their counts differ.
    pub fn open(folder: &Path, split: Split) -> Result<Self, ImageError> {
        let stem = match split {
            Split::Train => "train",
            Split::Test => "t10k",
        };
        let mut labels = Idx::open(folder, &format!("{stem}-labels-idx1-ubyte"), 1)?;
        let images = Idx::open(folder, &format!("{stem}-images-idx3-ubyte"), 3)?;
        let [count, height, width] = [images.shape[0], images.shape[1], images.shape[2]];
        if count != labels.shape[0] {
            let reason = format!("{count} images for {} labels in {}", labels.shape[0], labels.path.display());
            return Err(ImageError::Malformed { file: images.path, reason });
        }
        let mut classes = vec![0; count];
        let read = labels.file.read_exact(&mut classes);
        read.map_err(|source| ImageError::Io { file: labels.path.clone(), source })?;
        let Idx { file, path, first, .. } = images;
        Ok(Self { file: Mutex::new(file), path, first, size: [height, width], labels: classes })
    }

    /// The class of each image.
    pub fn labels(&self) -> &[u8] {
        &self.labels
    }

    /// Height and width.
    pub fn size(&self) -> [usize; 2] {
        self.size
    }

    /// The pixels of an image, row by row.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read(&self, index: usize, pixels: &mut [u8]) -> Result<(), ImageError> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let at = self.first + (index * self.size[0] * self.size[1]) as u64;
        let read = file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(pixels));
        read.map_err(|source| ImageError::Io { file: self.path.clone(), source })
    }
}

/// An open idx file of bytes, its header read and its size checked.
struct Idx {
    file: File,
    path: PathBuf,
    first: u64,
    shape: Vec<usize>,
}

impl Idx {
    fn open(folder: &Path, name: &str, dimensions: usize) -> Result<Self, ImageError> {
        let plain = folder.join(name);
        let packed = folder.join(format!("{name}.gz"));
        let path = match (plain.is_file(), packed.is_file()) {
            (true, _) => plain,
            (false, true) => packed,
            (false, false) => return Err(ImageError::Missing { folder: folder.to_path_buf(), name: name.to_owned() }),
        };
        let failed = |source| ImageError::Io { file: path.clone(), source };
        let malformed = |reason: String| ImageError::Malformed { file: path.clone(), reason };
        let mut file = File::open(&path).map_err(failed)?;
        if path.extension().is_some_and(|e| e == "gz") {
            let mut unpacked = tempfile::tempfile().map_err(failed)?;
            io::copy(&mut flate2::read::GzDecoder::new(BufReader::new(file)), &mut unpacked).map_err(failed)?;
            unpacked.rewind().map_err(failed)?;
            file = unpacked;
        }
        let mut header = vec![0u8; 4 + 4 * dimensions];
        file.read_exact(&mut header).map_err(failed)?;
        if header[..4] != [0, 0, 8, dimensions as u8] {
            return Err(malformed(format!("no idx file of bytes in {dimensions} dimensions")));
        }
        let number = |b: &[u8]| b.iter().fold(0usize, |n, &b| n << 8 | usize::from(b));
        let shape: Vec<usize> = header[4..].chunks_exact(4).map(number).collect();
        let elements = shape.iter().try_fold(1u64, |product, &n| product.checked_mul(n as u64));
        let size = file.metadata().map_err(failed)?.len();
        match elements.and_then(|n| n.checked_add(header.len() as u64)) {
            Some(expected) if expected == size => Ok(Self { file, path, first: header.len() as u64, shape }),
            _ => Err(malformed(format!("{size} bytes unpacked do not hold {shape:?}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    fn idx(dimensions: &[u32], data: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0, 0, 8, dimensions.len() as u8];
        dimensions.iter().for_each(|d| bytes.extend(d.to_be_bytes()));
        bytes.extend(data);
        bytes
    }

    #[test]
    fn packed_and_plain_files_are_read_and_wrong_ones_refused() {
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).unwrap();
        let open = || IdxImages::open(folder.path(), Split::Train);
        assert!(matches!(open(), Err(ImageError::Missing { .. })));
        put("train-labels-idx1-ubyte", &idx(&[2], &[3, 9]));
        let images = idx(&[2, 2, 3], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packer.write_all(&images).unwrap();
        put("train-images-idx3-ubyte.gz", &packer.finish().unwrap());
        let set = open().unwrap();
        assert_eq!((set.labels(), set.size()), (&[3u8, 9][..], [2, 3]));
        let mut pixels = [0; 6];
        set.read(1, &mut pixels).unwrap();
        assert_eq!(pixels, [7, 8, 9, 10, 11, 12]);
        for wrong in [&images[..images.len() - 1], &idx(&[2, 2], &[1, 2, 3, 4]), &idx(&[u32::MAX; 3], &[1])] {
            put("train-images-idx3-ubyte", wrong);
            assert!(matches!(open(), Err(ImageError::Malformed { .. })), "{wrong:?}");
        }
        put("train-images-idx3-ubyte", &idx(&[1, 2, 3], &[1, 2, 3, 4, 5, 6]));
        assert!(open().unwrap_err().to_string().contains("1 images for 2 labels"));
    }
}
