//! PNG and JPEG files in a folder for each class, as torchvision's `ImageFolder` has them. Files are read and decoded when they are
//! asked for.

use std::fs;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use image::imageops::FilterType;
use image::{ImageReader, Limits};

use super::{ImageError, Split};
use crate::regular;

/// Most bytes that one file may be decoded to.
const MOST_BYTES: u64 = 1 << 28;

/// Images of several sizes, brought to one as they are read.
#[derive(Debug)]
pub struct FolderImages {
    classes: Vec<String>,
    files: Vec<(PathBuf, u32)>,
    shape: [usize; 3],
}

impl FolderImages {
    /// Lists `folder`: a folder for each class, in the order of their names, with images in it or below. A folder that has `train` and
    /// `test` (or `val`) is taken for both splits; one that has not is its own split. Images are read as `shape`: channels (1 or 3),
    /// height and width.
    ///
    /// # Errors
    /// There are no classes, or a class without images.
    pub fn open(folder: &Path, split: Split, shape: [usize; 3]) -> Result<Self, ImageError> {
        let names: &[&str] = match split {
            Split::Train => &["train"],
            Split::Test => &["test", "val"],
        };
        let root = names.iter().map(|name| folder.join(name)).find(|path| path.is_dir());
        let root = root.unwrap_or_else(|| folder.to_path_buf());
        let malformed = |file: &Path, reason: &str| ImageError::Malformed { file: file.into(), reason: reason.into() };
        if !matches!(shape[0], 1 | 3) {
            return Err(malformed(&root, &format!("images of {} channels; PNG and JPEG are read as 1 or 3", shape[0])));
        }
        let (mut classes, mut files) = (Vec::new(), Vec::new());
        for class in sorted(&root)?.into_iter().filter(|path| path.is_dir()) {
            let before = files.len();
            collect(&class, classes.len() as u32, &mut files)?;
            if files.len() == before {
                return Err(malformed(&class, "a class without PNG or JPEG images"));
            }
            classes.push(class.file_name().unwrap_or_default().to_string_lossy().into_owned());
        }
        match classes.is_empty() {
            true => {
                Err(malformed(&root, "there are neither idx files nor a folder of PNG or JPEG images for each class"))
            }
            false => Ok(Self { classes, files, shape }),
        }
    }

    /// Names of the classes, by number.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// Number of images.
    pub fn count(&self) -> usize {
        self.files.len()
    }

    /// Channels, height and width.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// The class of an image.
    pub fn label(&self, index: usize) -> u32 {
        self.files[index].1
    }

    /// The pixels of an image, `[height, width, channels]`; bilinear where the file has another size.
    ///
    /// # Errors
    /// The file cannot be read or decoded.
    pub fn read(&self, index: usize, pixels: &mut [u8]) -> Result<(), ImageError> {
        let (file, _) = &self.files[index];
        let io = |source| ImageError::Io { file: file.clone(), source };
        let opened = regular::open(file).map(BufReader::new).map(ImageReader::new);
        let mut reader = opened.and_then(ImageReader::with_guessed_format).map_err(io)?;
        let mut limits = Limits::default();
        limits.max_alloc = Some(MOST_BYTES);
        reader.limits(limits);
        let decoded =
            reader.decode().map_err(|error| ImageError::Malformed { file: file.clone(), reason: error.to_string() })?;
        let [channels, height, width] = self.shape;
        let decoded = match (decoded.height() as usize, decoded.width() as usize) == (height, width) {
            true => decoded,
            false => decoded.resize_exact(width as u32, height as u32, FilterType::Triangle),
        };
        let bytes = if channels == 1 { decoded.into_luma8().into_raw() } else { decoded.into_rgb8().into_raw() };
        pixels.copy_from_slice(&bytes);
        Ok(())
    }
}

/// What lies in a folder, by name.
fn sorted(folder: &Path) -> Result<Vec<PathBuf>, ImageError> {
    let io = |source| ImageError::Io { file: folder.to_path_buf(), source };
    let entries = fs::read_dir(folder).map_err(io)?;
    let mut paths = entries.map(|entry| Ok(entry.map_err(io)?.path())).collect::<Result<Vec<_>, ImageError>>()?;
    paths.sort();
    Ok(paths)
}

fn collect(folder: &Path, class: u32, files: &mut Vec<(PathBuf, u32)>) -> Result<(), ImageError> {
    for path in sorted(folder)? {
        let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
        if path.is_dir() {
            collect(&path, class, files)?;
        } else if matches!(extension.as_deref(), Some("png" | "jpg" | "jpeg")) {
            files.push((path, class));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use image::{GrayImage, Luma, Rgb, RgbImage};

    use super::*;

    #[test]
    fn folders_are_classes_and_files_are_images_of_the_size_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let place = |split: &str, class: &str| {
            let path = folder.path().join(split).join(class);
            fs::create_dir_all(&path).unwrap();
            path
        };
        let gray = GrayImage::from_fn(4, 3, |x, y| Luma([(10 * y + x) as u8]));
        gray.save(place("train", "b").join("x.png")).unwrap();
        RgbImage::from_pixel(8, 6, Rgb([200, 100, 50])).save(place("train", "a").join("y.JPG")).unwrap();
        fs::write(place("train", "a").join("notes.txt"), "no image").unwrap();
        gray.save(place("test", "b").join("z.png")).unwrap();

        let images = FolderImages::open(folder.path(), Split::Train, [1, 3, 4]).unwrap();
        assert_eq!((images.classes(), images.count()), (&["a".to_owned(), "b".to_owned()][..], 2));
        assert_eq!((images.label(0), images.label(1)), (0, 1));
        let mut pixels = [0; 12];
        images.read(1, &mut pixels).unwrap();
        assert_eq!(pixels, [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]);

        let images = FolderImages::open(folder.path(), Split::Train, [3, 3, 4]).unwrap();
        let mut pixels = [0; 36];
        images.read(0, &mut pixels).unwrap();
        // JPEG is not exact, and the image was halved.
        let near = |a: u8, b: u8| a.abs_diff(b) < 6;
        assert!(pixels.chunks(3).all(|p| near(p[0], 200) && near(p[1], 100) && near(p[2], 50)), "{pixels:?}");
        assert_eq!(FolderImages::open(folder.path(), Split::Test, [1, 3, 4]).unwrap().count(), 1);

        let broken = place("train", "c").join("broken.png");
        let empty = FolderImages::open(folder.path(), Split::Train, [1, 3, 4]).unwrap_err().to_string();
        assert!(empty.contains("a class without"), "{empty}");
        fs::write(&broken, b"\x89PNG\r\n\x1a\nrest").unwrap();
        let images = FolderImages::open(folder.path(), Split::Train, [1, 3, 4]).unwrap();
        let error = images.read(2, &mut [0; 12]).unwrap_err().to_string();
        assert!(error.contains("broken.png"), "{error}");
        assert!(FolderImages::open(folder.path(), Split::Train, [4, 3, 4]).is_err());
    }
}
