//! A small GGUF writer for tests: it writes what it is told, right or wrong.
#![allow(dead_code, reason = "each test file uses a part of it")]

/// A metadata value, little-endian, with its type's number.
#[derive(Clone)]
pub struct Meta {
    pub kind: u32,
    pub bytes: Vec<u8>,
}

pub fn string_bytes(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes(), s.as_bytes()].concat()
}

impl From<u32> for Meta {
    fn from(v: u32) -> Self {
        Self { kind: 4, bytes: v.to_le_bytes().to_vec() }
    }
}

impl From<f32> for Meta {
    fn from(v: f32) -> Self {
        Self { kind: 6, bytes: v.to_le_bytes().to_vec() }
    }
}

impl From<bool> for Meta {
    fn from(v: bool) -> Self {
        Self { kind: 7, bytes: vec![u8::from(v)] }
    }
}

impl From<&str> for Meta {
    fn from(v: &str) -> Self {
        Self { kind: 8, bytes: string_bytes(v) }
    }
}

impl From<&[&str]> for Meta {
    fn from(v: &[&str]) -> Self {
        let items = v.iter().flat_map(|s| string_bytes(s)).collect();
        Self::array(8, v.len() as u64, items)
    }
}

impl From<&[f32]> for Meta {
    fn from(v: &[f32]) -> Self {
        Self::array(6, v.len() as u64, v.iter().flat_map(|x| x.to_le_bytes()).collect())
    }
}

impl From<&[i32]> for Meta {
    fn from(v: &[i32]) -> Self {
        Self::array(5, v.len() as u64, v.iter().flat_map(|x| x.to_le_bytes()).collect())
    }
}

impl Meta {
    pub fn array(element: u32, count: u64, items: Vec<u8>) -> Self {
        let bytes = [&element.to_le_bytes()[..], &count.to_le_bytes(), &items].concat();
        Self { kind: 9, bytes }
    }
}

/// A tensor: its shape is outermost first here, its offset follows from its place unless it is set.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<u64>,
    pub kind: u32,
    pub data: Vec<u8>,
    pub offset: Option<u64>,
}

impl Tensor {
    pub fn new(name: &str, shape: &[u64], kind: u32, data: Vec<u8>) -> Self {
        Self { name: name.to_owned(), shape: shape.to_vec(), kind, data, offset: None }
    }

    /// An F32 tensor.
    pub fn f32(name: &str, shape: &[u64], values: &[f32]) -> Self {
        assert_eq!(shape.iter().product::<u64>(), values.len() as u64, "{name}");
        Self::new(name, shape, 0, values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }
}

/// A whole file.
#[derive(Clone)]
pub struct File {
    pub magic: [u8; 4],
    pub version: u32,
    pub tensor_count: Option<u64>,
    pub meta_count: Option<u64>,
    pub meta: Vec<(String, Meta)>,
    pub tensors: Vec<Tensor>,
    pub alignment: u64,
}

impl Default for File {
    fn default() -> Self {
        Self {
            magic: *b"GGUF",
            version: 3,
            tensor_count: None,
            meta_count: None,
            meta: Vec::new(),
            tensors: Vec::new(),
            alignment: 32,
        }
    }
}

impl File {
    pub fn meta(mut self, key: &str, value: impl Into<Meta>) -> Self {
        self.meta.push((key.to_owned(), value.into()));
        self
    }

    pub fn tensor(mut self, tensor: Tensor) -> Self {
        self.tensors.push(tensor);
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.meta_count.unwrap_or(self.meta.len() as u64).to_le_bytes());
        for (key, value) in &self.meta {
            out.extend(string_bytes(key));
            out.extend(value.kind.to_le_bytes());
            out.extend(&value.bytes);
        }
        let mut data = Vec::new();
        for t in &self.tensors {
            let offset = t.offset.unwrap_or(data.len() as u64);
            data.extend(&t.data);
            data.resize(data.len().next_multiple_of(self.alignment as usize), 0);
            out.extend(string_bytes(&t.name));
            out.extend((t.shape.len() as u32).to_le_bytes());
            t.shape.iter().rev().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(t.kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(self.alignment as usize), 0);
        out.extend(data);
        out
    }
}
