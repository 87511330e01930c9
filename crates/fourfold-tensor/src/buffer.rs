//! Storage of elements: owned, or a view into bytes that somebody else keeps alive (a memory-mapped file).

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use bytemuck::Pod;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::DType;

/// Bytes shared by many buffers: a memory-mapped file, most often.
pub type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A run of `T`, owned or borrowed from [`SharedBytes`]. Dereferences to a slice.
pub enum Buffer<T> {
    /// Elements in memory of our own.
    Owned(Vec<T>),
    /// Elements inside shared bytes, aligned for `T`; made by [`Buffer::from_shared`] alone.
    Shared(SharedView<T>),
}

/// A view of shared bytes as `T`. Its constructor has checked range and alignment.
pub struct SharedView<T> {
    bytes: SharedBytes,
    offset: usize,
    byte_len: usize,
    _element: std::marker::PhantomData<T>,
}

impl<T: Pod> Buffer<T> {
    /// A view of `byte_len` bytes from `offset`. Bytes that are not aligned for `T` are copied instead.
    /// Returns `None` where the range lies outside `bytes` or is no whole number of elements.
    pub fn from_shared(bytes: &SharedBytes, offset: usize, byte_len: usize) -> Option<Self> {
        let end = offset.checked_add(byte_len)?;
        let slice = (**bytes).as_ref().get(offset..end)?;
        if !byte_len.is_multiple_of(size_of::<T>()) {
            return None;
        }
        match bytemuck::try_cast_slice::<u8, T>(slice) {
            Ok(_) => Some(Self::Shared(SharedView {
                bytes: Arc::clone(bytes),
                offset,
                byte_len,
                _element: std::marker::PhantomData,
            })),
            Err(_) => Some(Self::Owned(bytemuck::allocation::pod_collect_to_vec(slice))),
        }
    }

    /// The elements as bytes, little-endian as the machine holds them.
    pub fn as_bytes(&self) -> &[u8] {
        bytemuck::cast_slice(self)
    }

    /// Bytes the elements take.
    pub fn byte_len(&self) -> usize {
        self.len() * size_of::<T>()
    }
}

impl<T: Pod> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Self::Owned(values) => values,
            Self::Shared(view) => {
                bytemuck::cast_slice(&(*view.bytes).as_ref()[view.offset..view.offset + view.byte_len])
            }
        }
    }
}

impl<T> From<Vec<T>> for Buffer<T> {
    fn from(values: Vec<T>) -> Self {
        Self::Owned(values)
    }
}

impl<T: Pod> Clone for Buffer<T> {
    fn clone(&self) -> Self {
        match self {
            Self::Owned(values) => Self::Owned(values.clone()),
            Self::Shared(view) => Self::Shared(SharedView {
                bytes: Arc::clone(&view.bytes),
                offset: view.offset,
                byte_len: view.byte_len,
                _element: std::marker::PhantomData,
            }),
        }
    }
}

impl<T: Pod + PartialEq> PartialEq for Buffer<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<T: Pod> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer[{} x {} bytes]", self.len(), size_of::<T>())
    }
}

/// A buffer of one of the three float types that weights and scales are stored in.
#[derive(Clone, Debug, PartialEq)]
pub enum FloatBuffer {
    /// 4 bytes an element.
    F32(Buffer<f32>),
    /// 2 bytes an element.
    F16(Buffer<f16>),
    /// 2 bytes an element.
    Bf16(Buffer<bf16>),
}

impl FloatBuffer {
    /// Rounds `values` to `dtype` (nearest, ties to even).
    ///
    /// # Panics
    /// When `dtype` is none of F32, F16, BF16: a mistake of the caller's.
    pub fn from_f32(values: Vec<f32>, dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32(values.into()),
            DType::F16 => Self::F16(values.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>().into()),
            DType::Bf16 => Self::Bf16(values.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>().into()),
            other => panic!("{other} is not a float buffer's type"),
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(b) => b.len(),
            Self::F16(b) => b.len(),
            Self::Bf16(b) => b.len(),
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::F16(_) => DType::F16,
            Self::Bf16(_) => DType::Bf16,
        }
    }

    /// Bytes the elements take.
    pub fn byte_len(&self) -> usize {
        self.as_bytes().len()
    }

    /// The elements as little-endian bytes.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::F32(b) => b.as_bytes(),
            Self::F16(b) => b.as_bytes(),
            Self::Bf16(b) => b.as_bytes(),
        }
    }

    /// Element `i` as f32.
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Self::F32(b) => b[i],
            Self::F16(b) => b[i].to_f32(),
            Self::Bf16(b) => b[i].to_f32(),
        }
    }

    /// Writes elements `start .. start + out.len()` to `out`.
    pub fn read_f32(&self, start: usize, out: &mut [f32]) {
        let end = start + out.len();
        match self {
            Self::F32(b) => out.copy_from_slice(&b[start..end]),
            Self::F16(b) => b[start..end].convert_to_f32_slice(out),
            Self::Bf16(b) => out.iter_mut().zip(&b[start..end]).for_each(|(o, v)| *o = v.to_f32()),
        }
    }

    /// All elements as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        self.read_f32(0, &mut out);
        out
    }
}
