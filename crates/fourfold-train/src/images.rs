//! Labelled images into batches: order by seed, random crops and flips by counter.

use crate::data::DataError;
use crate::network::BatchSource;
use crate::random::{Stream, shuffled};
use crate::vision::ImageBatch;

/// Labelled images of one size, read when they are needed.
pub trait Images {
    /// Images there are.
    fn count(&self) -> usize;

    /// Channels, height and width.
    fn shape(&self) -> [usize; 3];

    /// The class of an image.
    fn label(&self, index: usize) -> u32;

    /// The pixels of an image, `[height, width, channels]`.
    ///
    /// # Errors
    /// The image cannot be read.
    fn read(&self, index: usize, pixels: &mut [u8]) -> Result<(), DataError>;
}

/// Some of the images.
pub struct Subset<'a> {
    images: &'a dyn Images,
    chosen: Vec<usize>,
}

impl<'a> Subset<'a> {
    /// The first `count` of the images in an order by chance.
    pub fn first(images: &'a dyn Images, count: usize) -> Self {
        let mut chosen = shuffled(images.count(), Stream::new(0, 0, 3 << 32));
        chosen.truncate(count);
        Self { images, chosen }
    }

    /// The images apart from a share for measuring, and these: the same ones whatever a run's seed is.
    pub fn split(images: &'a dyn Images, held_out: f64) -> (Self, Self) {
        let count = (images.count() as f64 * held_out).round() as usize;
        let mut rest = Self::first(images, images.count());
        let chosen = rest.chosen.drain(..count.min(images.count())).collect();
        (rest, Self { images, chosen })
    }
}

impl Images for Subset<'_> {
    fn count(&self) -> usize {
        self.chosen.len()
    }

    fn shape(&self) -> [usize; 3] {
        self.images.shape()
    }

    fn label(&self, index: usize) -> u32 {
        self.images.label(self.chosen[index])
    }

    fn read(&self, index: usize, pixels: &mut [u8]) -> Result<(), DataError> {
        self.images.read(self.chosen[index], pixels)
    }
}

/// How images are varied in training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Augmentation {
    /// Mirror every second image, left to right.
    pub flip: bool,
    /// Move the image by up to so many pixels along each axis; what comes in is black.
    pub shift: usize,
}

/// Batches of images in an order that depends on seed and epoch alone. An epoch's last images that do not fill a batch wait for
/// another epoch.
pub struct ImageBatches<'a> {
    images: &'a dyn Images,
    size: usize,
    seed: u64,
    augmentation: Augmentation,
    order: (u64, Vec<usize>),
}

impl<'a> ImageBatches<'a> {
    /// Batches of `size` images.
    ///
    /// # Errors
    /// There are fewer images than a batch has.
    pub fn new(images: &'a dyn Images, size: usize, seed: u64, augmentation: Augmentation) -> Result<Self, DataError> {
        if images.count() < size.max(1) {
            let reason = format!("{} images do not fill a batch of {size}", images.count());
            return Err(DataError::Empty { file: "the images".to_owned(), reason });
        }
        let order = (0, shuffled(images.count(), order_stream(seed, 0)));
        Ok(Self { images, size, seed, augmentation, order })
    }

    /// Batches of an epoch.
    pub fn per_epoch(&self) -> u64 {
        (self.images.count() / self.size) as u64
    }
}

impl BatchSource<ImageBatch> for ImageBatches<'_> {
    fn get(&mut self, number: u64) -> Result<ImageBatch, DataError> {
        let (epoch, place) = (number / self.per_epoch(), (number % self.per_epoch()) as usize);
        if self.order.0 != epoch {
            self.order = (epoch, shuffled(self.images.count(), order_stream(self.seed, epoch)));
        }
        let chosen = self.order.1[place * self.size..(place + 1) * self.size].iter().copied();
        let stream = Stream::new(self.seed, number, 1 << 32);
        let mut batch = read(self.images, chosen)?;
        let [channels, height, width] = self.images.shape();
        let image_len = channels * height * width;
        for (i, pixels) in batch.pixels.chunks_exact_mut(image_len).enumerate() {
            if self.augmentation != Augmentation::default() {
                vary(pixels, [channels, height, width], self.augmentation, stream, 3 * i);
            }
        }
        Ok(batch)
    }
}

/// All images in order, in batches of at most `size`.
///
/// # Errors
/// An image cannot be read.
pub fn in_order(images: &dyn Images, size: usize) -> Result<Vec<ImageBatch>, DataError> {
    let count = images.count();
    (0..count).step_by(size.max(1)).map(|start| read(images, start..(start + size).min(count))).collect()
}

fn read(images: &dyn Images, chosen: impl Iterator<Item = usize>) -> Result<ImageBatch, DataError> {
    let image_len: usize = images.shape().iter().product();
    let mut batch = ImageBatch::default();
    for index in chosen {
        let start = batch.pixels.len();
        batch.pixels.resize(start + image_len, 0);
        images.read(index, &mut batch.pixels[start..])?;
        batch.labels.push(images.label(index));
    }
    Ok(batch)
}

fn order_stream(seed: u64, epoch: u64) -> Stream {
    Stream::new(seed, epoch, 2 << 32)
}

/// Moves and mirrors an image in place, by three words of `stream`.
fn vary(pixels: &mut [u8], shape: [usize; 3], augmentation: Augmentation, stream: Stream, word: usize) {
    let [channels, height, width] = shape;
    let before = pixels.to_vec();
    let mirrored = augmentation.flip && stream.word(word) & 1 == 1;
    let offset = |word| {
        let places = 2 * augmentation.shift as u64 + 1;
        ((u64::from(stream.word(word)) * places) >> 32) as isize - augmentation.shift as isize
    };
    let (down, right) = (offset(word + 1), offset(word + 2));
    for (y, x) in (0..height).flat_map(|y| (0..width).map(move |x| (y, x))) {
        let column = if mirrored { width - 1 - x } else { x };
        let from = y.checked_add_signed(-down).zip(column.checked_add_signed(-right));
        let to = &mut pixels[(y * width + x) * channels..][..channels];
        match from.filter(|&(y, x)| y < height && x < width) {
            Some((y, x)) => to.copy_from_slice(&before[(y * width + x) * channels..][..channels]),
            None => to.fill(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counting;

    impl Images for Counting {
        fn count(&self) -> usize {
            10
        }
        fn shape(&self) -> [usize; 3] {
            [1, 2, 3]
        }
        fn label(&self, index: usize) -> u32 {
            index as u32
        }
        fn read(&self, index: usize, pixels: &mut [u8]) -> Result<(), DataError> {
            pixels.iter_mut().enumerate().for_each(|(i, p)| *p = (10 * index + i) as u8);
            Ok(())
        }
    }

    #[test]
    fn an_epoch_shows_every_image_once_and_the_next_in_another_order() {
        let mut batches = ImageBatches::new(&Counting, 5, 3, Augmentation::default()).unwrap();
        let labels = |batches: &mut ImageBatches, epoch: u64| -> Vec<u32> {
            (2 * epoch..2 * epoch + 2).flat_map(|n| batches.get(n).unwrap().labels).collect()
        };
        let (first, second) = (labels(&mut batches, 0), labels(&mut batches, 1));
        let mut sorted = first.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..10).collect::<Vec<_>>());
        assert_ne!(first, second);
        // The same number gives the same batch, in whatever order batches are asked for.
        assert_eq!(labels(&mut batches, 0), first);
        let batch = batches.get(0).unwrap();
        assert_eq!(batch.pixels[6..12], [0, 1, 2, 3, 4, 5].map(|i| (10 * batch.labels[1]) as u8 + i));
    }

    #[test]
    fn held_out_images_are_learned_by_nobody() {
        let (learned, held_out) = Subset::split(&Counting, 0.3);
        let labels = |images: &Subset| (0..images.count()).map(|i| images.label(i)).collect::<Vec<_>>();
        let mut all = [labels(&learned), labels(&held_out)].concat();
        assert_eq!((learned.count(), held_out.count()), (7, 3));
        all.sort_unstable();
        assert_eq!(all, (0..10).collect::<Vec<_>>());
        let mut pixels = [0; 6];
        held_out.read(1, &mut pixels).unwrap();
        assert_eq!(u32::from(pixels[0]), 10 * held_out.label(1));
    }

    #[test]
    fn images_are_moved_and_mirrored() {
        let original: Vec<u8> = (1..=6).collect();
        let (mut mirrored, mut same) = (0, 0);
        for word in 0..64 {
            let mut pixels = original.clone();
            let flip = Augmentation { flip: true, shift: 0 };
            vary(&mut pixels, [1, 2, 3], flip, Stream::new(1, 0, 0), word);
            mirrored += usize::from(pixels == [3, 2, 1, 6, 5, 4]);
            same += usize::from(pixels == original);
        }
        assert!(mirrored + same == 64 && mirrored > 16 && same > 16, "{mirrored} {same}");
        let mut seen = std::collections::BTreeSet::new();
        for word in 0..200 {
            let mut pixels = original.clone();
            vary(&mut pixels, [1, 2, 3], Augmentation { flip: false, shift: 1 }, Stream::new(1, 0, 0), 3 * word);
            seen.insert(pixels);
        }
        assert_eq!(seen.len(), 9, "{seen:?}");
        assert!(seen.contains(&vec![0, 0, 0, 0, 1, 2]), "{seen:?}");
    }
}
