//! Image files as the trainer's images.

use std::path::Path;

use anyhow::{Result, bail, ensure};
pub use fourfold_formats::images::Split;
use fourfold_formats::images::{FolderImages, IdxImages};
use fourfold_models::ConvNetSpec;
use fourfold_train::data::DataError;
use fourfold_train::images::Images;

/// The images of a directory, idx files or a folder for each class, checked against the network that is to read them.
pub fn open(folder: &Path, split: Split, spec: &ConvNetSpec) -> Result<OpenImages> {
    let images = match IdxImages::are_in(folder) {
        true => OpenImages::Idx(IdxImages::open(folder, split)?),
        false => OpenImages::Folder(FolderImages::open(folder, split, spec.image)?),
    };
    ensure!(
        images.shape() == spec.image,
        "{}: images of {:?} (channels, height, width), the network reads {:?}",
        folder.display(),
        images.shape(),
        spec.image
    );
    let known = spec.classes;
    match &images {
        OpenImages::Folder(images) => {
            let found = images.classes().len();
            ensure!(found <= known, "{}: {found} classes, the network tells {known} apart", folder.display());
        }
        OpenImages::Idx(images) => {
            let beyond = images.labels().iter().position(|&label| usize::from(label) >= known);
            if let Some(index) = beyond {
                let label = images.labels()[index];
                bail!(
                    "{}: image {index} has the label {label}, the network tells {known} classes apart (0 to {})",
                    folder.display(),
                    known.saturating_sub(1)
                );
            }
        }
    }
    Ok(images)
}

/// Open images.
pub enum OpenImages {
    /// In idx files.
    Idx(IdxImages),
    /// In files of their own.
    Folder(FolderImages),
}

impl Images for OpenImages {
    fn count(&self) -> usize {
        match self {
            Self::Idx(images) => images.labels().len(),
            Self::Folder(images) => images.count(),
        }
    }

    fn shape(&self) -> [usize; 3] {
        match self {
            Self::Idx(images) => {
                let [height, width] = images.size();
                [1, height, width]
            }
            Self::Folder(images) => images.shape(),
        }
    }

    fn label(&self, index: usize) -> u32 {
        match self {
            Self::Idx(images) => u32::from(images.labels()[index]),
            Self::Folder(images) => images.label(index),
        }
    }

    fn read(&self, index: usize, pixels: &mut [u8]) -> Result<(), DataError> {
        let read = match self {
            Self::Idx(images) => images.read(index, pixels),
            Self::Folder(images) => images.read(index, pixels),
        };
        read.map_err(|error| DataError::Empty { file: format!("image {index}"), reason: error.to_string() })
    }
}
