//! Weights of leaf forms in device memory: packed as they are stored, in parts of some rows where one buffer does not hold them.

use std::ops::Range;

use fourfold_kernels::KernelError;
use fourfold_tensor::{
    DType, Dense, Double, DoubleCodes, FloatBuffer, Fp8, Offsets, Quantized, Scales, Sparse, SparseValues, Weight,
    mask_words_per_row, packed_words_per_row,
};

use crate::device::{Buffer, Device};
use crate::kernels::{FormKernels, OF_DENSE, OF_FP8, OF_QUANTIZED, OF_SPARSE};

/// Columns of a row before which the values kept are counted.
const COUNTED: usize = 256;

/// Words after a part's last section: kernels read eight elements at a time.
const PADDING: usize = 8;

/// A weight in device memory.
#[derive(Debug)]
pub struct Leaf {
    pub rows: usize,
    pub cols: usize,
    pub kernels: &'static FormKernels,
    pub constants: Vec<(&'static str, u32)>,
    pub parts: Vec<Part>,
}

/// Some rows of a weight.
#[derive(Debug)]
pub struct Part {
    pub rows: Range<usize>,
    pub buffer: Buffer,
    pub sections: Sections,
}

/// Where the sections of a part begin, in words, and what else its kernels are told: the middle of `Params` in `params.wgsl`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sections {
    pub words: u32,
    pub scales: u32,
    pub scale_floats: u32,
    pub scale_span: u32,
    pub offsets: u32,
    pub offset_floats: u32,
    pub offset_span: u32,
    pub extra: u32,
    pub columns: u32,
}

impl Leaf {
    /// Takes a weight to the device.
    ///
    /// # Errors
    /// Parts that do not fit together, or memory that is used up.
    pub fn upload(device: &dyn Device, weight: Weight) -> Result<Self, KernelError> {
        let leaf = match &weight {
            Weight::Dense(w) => dense(device, w),
            Weight::Quantized(w) => {
                w.validate()?;
                quantized(device, w)
            }
            Weight::Fp8(w) => fp8(device, w),
            Weight::Sparse(w) => sparse(device, w),
            Weight::LowRank(_) | Weight::Sum(_) => unreachable!("composite weights are given leaf by leaf"),
        };
        device.check()?;
        Ok(leaf)
    }

    /// Bytes in device memory.
    pub fn byte_len(&self) -> usize {
        self.parts.iter().map(|part| part.buffer.bytes()).sum()
    }
}

/// The sections of a part.
#[derive(Default)]
struct Words(Vec<u32>);

impl Words {
    /// Adds bytes, and says at which word they begin.
    fn add(&mut self, bytes: &[u8]) -> u32 {
        let first = self.0.len();
        self.0.resize(first + bytes.len().div_ceil(4), 0);
        bytemuck::cast_slice_mut(&mut self.0[first..])[..bytes.len()].copy_from_slice(bytes);
        first as u32
    }

    fn upload(mut self, device: &dyn Device) -> Buffer {
        self.0.resize(self.0.len() + PADDING, 0);
        device.upload(bytemuck::cast_slice(&self.0))
    }
}

/// Rows in parts of `largest` bytes, when a row takes `row` bytes.
fn parts(rows: usize, row: usize, largest: usize) -> impl Iterator<Item = Range<usize>> {
    let step = ((largest - 64 * 1024) / row.max(1)).max(1);
    (0..rows).step_by(step).map(move |first| first..(first + step).min(rows))
}

/// How kernels name a type.
fn type_of(floats: &FloatBuffer) -> u32 {
    match floats {
        FloatBuffer::F32(_) => 0,
        FloatBuffer::F16(_) => 1,
        FloatBuffer::Bf16(_) => 2,
    }
}

/// Some elements as bytes.
fn bytes_of(floats: &FloatBuffer, range: Range<usize>) -> &[u8] {
    match floats {
        FloatBuffer::F32(values) => bytemuck::cast_slice(&values[range]),
        FloatBuffer::F16(values) => bytemuck::cast_slice(&values[range]),
        FloatBuffer::Bf16(values) => bytemuck::cast_slice(&values[range]),
    }
}

fn dense(device: &dyn Device, w: &Dense) -> Leaf {
    let (rows, cols) = (w.rows(), w.cols());
    let size = if w.dtype() == DType::F32 { 4 } else { 2 };
    let part = |rows: Range<usize>| {
        let mut words = Words::default();
        words.add(bytes_of(w.data(), rows.start * cols..rows.end * cols));
        Part { rows, buffer: words.upload(device), sections: Sections::default() }
    };
    Leaf {
        rows,
        cols,
        kernels: &OF_DENSE,
        constants: vec![("DTYPE", type_of(w.data()))],
        parts: parts(rows, cols * size, device.largest_buffer()).map(part).collect(),
    }
}

/// Codes and floats of some rows; where they begin.
fn add_double(words: &mut Words, double: &Double, rows: &Range<usize>, groups: usize) -> [u32; 2] {
    let spans = double.spans(groups);
    let codes = words.add(&double.codes.as_bytes()[rows.start * groups..rows.end * groups]);
    [codes, words.add(bytes_of(&double.floats, rows.start * spans..rows.end * spans))]
}

fn is_signed(double: &Double) -> bool {
    matches!(double.codes, DoubleCodes::Signed(_))
}

fn quantized(device: &dyn Device, w: &Quantized) -> Leaf {
    let (groups, per_row) = (w.groups(), packed_words_per_row(w.cols, w.bits));
    let named = w.g_idx.is_some();
    let uniform = !named && (w.group_size.is_multiple_of(8) || w.group_size >= w.cols);
    let (scales, scale_type) = match &w.scales {
        Scales::Float(s) if s.len() == 1 => (1, type_of(s)),
        Scales::Float(s) => (0, type_of(s)),
        Scales::Double(double) => (2 + u32::from(is_signed(double)), type_of(&double.floats)),
    };
    let (offsets, offset_type) = match &w.offsets {
        _ if w.codebook.is_some() => (6, 0),
        Offsets::Symmetric => (0, 0),
        Offsets::ZeroPoint(z) if z.len() == 1 => (2, 0),
        Offsets::ZeroPoint(_) => (1, 0),
        Offsets::Min(m) => (3, type_of(m)),
        Offsets::Double(double) => (4 + u32::from(is_signed(double)), type_of(&double.floats)),
    };
    let part = |rows: Range<usize>| {
        let mut words = Words::default();
        words.add(bytemuck::cast_slice(&w.packed[rows.start * per_row..rows.end * per_row]));
        let mut sections = Sections { words: per_row as u32, scale_span: 1, offset_span: 1, ..Sections::default() };
        let of_rows = rows.start * groups..rows.end * groups;
        match &w.scales {
            Scales::Float(s) if s.len() == 1 => sections.scales = words.add(bytes_of(s, 0..1)),
            Scales::Float(s) => sections.scales = words.add(bytes_of(s, of_rows.clone())),
            Scales::Double(double) => {
                [sections.scales, sections.scale_floats] = add_double(&mut words, double, &rows, groups);
                sections.scale_span = double.span as u32;
            }
        }
        match &w.offsets {
            Offsets::Symmetric => {}
            Offsets::ZeroPoint(z) if z.len() == 1 => sections.offsets = words.add(&z[..1]),
            Offsets::ZeroPoint(z) => sections.offsets = words.add(&z[of_rows]),
            Offsets::Min(m) => sections.offsets = words.add(bytes_of(m, of_rows)),
            Offsets::Double(double) => {
                [sections.offsets, sections.offset_floats] = add_double(&mut words, double, &rows, groups);
                sections.offset_span = double.span as u32;
            }
        }
        if let Some(codebook) = &w.codebook {
            sections.extra = words.add(bytemuck::cast_slice(codebook));
        }
        if let Some(g_idx) = &w.g_idx {
            sections.columns = words.add(g_idx.as_bytes());
        }
        Part { rows, buffer: words.upload(device), sections }
    };
    // Codes, and at most four bytes a group of scales and offsets each, and what is there once.
    let row = per_row * 4 + groups * 10;
    let largest = device.largest_buffer() - w.g_idx.as_ref().map_or(0, |g| g.byte_len());
    Leaf {
        rows: w.rows,
        cols: w.cols,
        kernels: &OF_QUANTIZED,
        constants: vec![
            ("BITS", u32::from(w.bits)),
            ("GROUP", w.group_size.min(w.cols.max(1)) as u32),
            ("SCALES", scales),
            ("SCALE_TYPE", scale_type),
            ("OFFSETS", offsets),
            ("OFFSET_TYPE", offset_type),
            ("UNIFORM", u32::from(uniform)),
            ("NAMED", u32::from(named)),
        ],
        parts: parts(w.rows, row, largest).map(part).collect(),
    }
}

fn fp8(device: &dyn Device, w: &Fp8) -> Leaf {
    let (rows, cols, across) = (w.rows(), w.cols(), w.blocks_across());
    let (block_rows, block_cols) = w.block();
    let part = |rows: Range<usize>| {
        let mut words = Words::default();
        words.add(&w.codes()[rows.start * cols..rows.end * cols]);
        let blocks = rows.start / block_rows * across..rows.end.div_ceil(block_rows) * across;
        let columns = (rows.start % block_rows) as u32;
        let sections = Sections { scales: words.add(bytes_of(w.scales(), blocks)), columns, ..Sections::default() };
        Part { rows, buffer: words.upload(device), sections }
    };
    Leaf {
        rows,
        cols,
        kernels: &OF_FP8,
        constants: vec![
            ("BLOCK_ROWS", block_rows as u32),
            ("BLOCK_COLS", block_cols as u32),
            ("SCALE_TYPE", type_of(w.scales())),
        ],
        // Codes, and as many scales as a row has where no other shares them.
        parts: parts(rows, cols + 4 * across, device.largest_buffer()).map(part).collect(),
    }
}

fn sparse(device: &dyn Device, w: &Sparse) -> Leaf {
    let (rows, cols) = (w.rows(), w.cols());
    let mask_words = mask_words_per_row(cols);
    let counted = cols.div_ceil(COUNTED);
    let mask = w.mask();
    let kept = |r: usize| mask.values(r);
    let part = |rows: Range<usize>| {
        let mut words = Words::default();
        let bits = &mask.words()[rows.start * mask_words..rows.end * mask_words];
        words.add(bytemuck::cast_slice(bits));
        let mut counts = Vec::with_capacity(rows.len() * counted);
        let mut count = 0u32;
        for row in bits.chunks(mask_words.max(1)) {
            for block in row.chunks(COUNTED / 64) {
                counts.push(count);
                count += block.iter().map(|word| word.count_ones()).sum::<u32>();
            }
        }
        let mut sections =
            Sections { words: 2 * mask_words as u32, offset_span: counted as u32, ..Sections::default() };
        sections.offsets = words.add(bytemuck::cast_slice(&counts));
        let values = if rows.is_empty() { 0..0 } else { kept(rows.start).start..kept(rows.end - 1).end };
        match w.values() {
            SparseValues::Float(floats) => sections.extra = words.add(bytes_of(floats, values)),
            SparseValues::Codes(codes) => {
                let bits = codes.bits as usize;
                let (first, end) = (values.start * bits / 32, (values.end * bits).div_ceil(32));
                sections.extra = words.add(bytemuck::cast_slice(&codes.packed[first..end]));
                sections.columns = (values.start * bits % 32) as u32;
                let groups = cols.div_ceil(codes.group_size);
                sections.scales = words.add(bytes_of(&codes.scales, rows.start * groups..rows.end * groups));
            }
        }
        Part { rows, buffer: words.upload(device), sections }
    };
    let (values, bytes) = match w.values() {
        SparseValues::Float(floats) => (vec![("VALUES", type_of(floats))], 4 * cols),
        SparseValues::Codes(codes) => {
            let constants = vec![
                ("VALUES", 3),
                ("BITS", u32::from(codes.bits)),
                ("GROUP", codes.group_size.min(cols.max(1)) as u32),
                ("SCALE_TYPE", type_of(&codes.scales)),
            ];
            (constants, cols + 4 * cols.div_ceil(codes.group_size))
        }
    };
    Leaf {
        rows,
        cols,
        kernels: &OF_SPARSE,
        constants: values,
        parts: parts(rows, bytes + 8 * mask_words + 4 * counted, device.largest_buffer()).map(part).collect(),
    }
}
