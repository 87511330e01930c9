//! Image files as the trainer's images.

use std::path::Path;

use anyhow::{Result, ensure};
use fourfold_formats::images::IdxImages;
pub use fourfold_formats::images::Split;
use fourfold_models::ConvNetSpec;
use fourfold_train::data::DataError;
use fourfold_train::images::Images;

/// The images of a directory, checked against the network that is to read them.
pub fn open(folder: &Path, split: Split, spec: &ConvNetSpec) -> Result<OpenImages> {
    let images = OpenImages(IdxImages::open(folder, split)?);
    ensure!(
        images.shape() == spec.image,
        "{}: images of {:?} (channels, height, width), the network reads {:?}",
        folder.display(),
        images.shape(),
        spec.image
    );
    Ok(images)
}

/// Open images.
pub struct OpenImages(IdxImages);

impl Images for OpenImages {
    fn count(&self) -> usize {
        self.0.labels().len()
    }

    fn shape(&self) -> [usize; 3] {
        let [height, width] = self.0.size();
        [1, height, width]
    }

    fn label(&self, index: usize) -> u32 {
        u32::from(self.0.labels()[index])
    }

    fn read(&self, index: usize, pixels: &mut [u8]) -> Result<(), DataError> {
        self.0
            .read(index, pixels)
            .map_err(|error| DataError::Empty { file: format!("image {index}"), reason: error.to_string() })
    }
}
