//! The raw tensors of one file or of all shards, read by name.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use bytemuck::Pod;
use fourfold_tensor::{Buffer, SharedBytes};

use super::header::{Entry, ForeignEntry, Header, HeaderError, header_length, parse_header};
use super::index::{Index, IndexError};
use crate::{Access, FormatError, mmap, regular};

/// One safetensors file, its header checked.
pub struct DataFile {
    path: PathBuf,
    file: File,
    map: Option<SharedBytes>,
    header: Header,
    length: u64,
}

impl DataFile {
    /// Opens a file and checks its header.
    ///
    /// # Errors
    /// [`FormatError::Io`], [`FormatError::Header`].
    pub fn open(path: &Path, access: Access) -> Result<Self, FormatError> {
        let io = || FormatError::io(path);
        let problem = |problem| FormatError::Header { file: path.to_owned(), problem };
        let file = regular::open(path).map_err(io())?;
        let length = file.metadata().map_err(io())?.len();
        if length < 8 {
            return Err(problem(HeaderError::TooShort { length }));
        }
        let mut first = [0; 8];
        read_at(&file, 0, &mut first).map_err(io())?;
        let header_len = header_length(first, length).map_err(problem)?;
        let mut text = vec![0; header_len as usize];
        read_at(&file, 8, &mut text).map_err(io())?;
        let header = parse_header(&text, 8 + header_len, length).map_err(problem)?;
        let map = match access {
            Access::Read => None,
            Access::Map => Some(mmap::map(path)?),
        };
        Ok(Self { path: path.to_owned(), file, map, header, length })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its bytes, header included.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Its header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// A tensor's elements. A tensor read by position is in memory of its own and leaves nothing else resident.
    ///
    /// # Errors
    /// [`FormatError::Io`]: the file has changed since it was opened, or the disk fails.
    pub fn read<T: Pod>(&self, entry: &Entry) -> Result<Buffer<T>, FormatError> {
        if let Some(map) = &self.map {
            let shared = Buffer::from_shared(map, entry.offset as usize, entry.bytes as usize);
            return shared.ok_or_else(|| {
                let shrunk =
                    std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the file shrank while it was open");
                FormatError::Io { file: self.path.clone(), source: shrunk }
            });
        }
        let mut values = bytemuck::zeroed_vec::<T>(entry.bytes as usize / size_of::<T>());
        self.read_bytes(entry, 0, bytemuck::cast_slice_mut(&mut values))?;
        Ok(values.into())
    }

    /// Bytes `from .. from + out.len()` of a tensor: for readers that never want all of it at once.
    ///
    /// # Errors
    /// As [`DataFile::read`].
    pub fn read_bytes(&self, entry: &Entry, from: u64, out: &mut [u8]) -> Result<(), FormatError> {
        read_at(&self.file, entry.offset + from, out).map_err(FormatError::io(&self.path))
    }
}

/// Fills `out` from byte `offset` of `file`.
#[cfg(unix)]
fn read_at(file: &File, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

/// Fills `out` from byte `offset` of `file`.
#[cfg(windows)]
fn read_at(file: &File, mut offset: u64, mut out: &mut [u8]) -> std::io::Result<()> {
    while !out.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, out, offset)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => {
                out = &mut out[n..];
                offset += n as u64;
            }
        }
    }
    Ok(())
}

/// All raw tensors of a checkpoint.
pub struct Store {
    files: Vec<DataFile>,
    /// File and entry of each tensor, in the order of files and bytes.
    tensors: Vec<(usize, usize)>,
    by_name: HashMap<String, usize>,
}

impl Store {
    /// A single file.
    ///
    /// # Errors
    /// As [`DataFile::open`].
    pub fn single(path: &Path, access: Access) -> Result<Self, FormatError> {
        let file = DataFile::open(path, access)?;
        let tensors = (0..file.header.entries.len()).map(|e| (0, e)).collect();
        Ok(Self::new(vec![file], tensors))
    }

    /// All tensors of several files of one layout.
    pub(crate) fn of_files(files: Vec<DataFile>) -> Self {
        let places =
            |(f, file): (usize, &DataFile)| (0..file.header.entries.len()).map(move |e| (f, e)).collect::<Vec<_>>();
        let tensors = files.iter().enumerate().flat_map(places).collect();
        Self::new(files, tensors)
    }

    /// All shards of an index, with all that they hold: a tensor that the index does not list is one all the same, as
    /// transformers has it.
    ///
    /// # Errors
    /// As [`Index::read`] and [`DataFile::open`]; [`IndexError::MissingShard`], [`IndexError::MissingTensor`],
    /// [`IndexError::OtherShard`], [`IndexError::InTwoShards`].
    pub fn sharded(index: &Index, access: Access) -> Result<Self, FormatError> {
        let problem = |problem| FormatError::Index { file: index.path.clone(), problem };
        let dir = index.path.parent().unwrap_or(Path::new(""));
        let shards = index.shards();
        let mut files = Vec::new();
        for &shard in &shards {
            let path = dir.join(shard);
            if !path.try_exists().map_err(FormatError::io(&path))? {
                let held: Vec<&str> =
                    index.weight_map.iter().filter(|(_, s)| s == shard).map(|(t, _)| t.as_str()).collect();
                let tensor = held.first().copied().unwrap_or_default().to_owned();
                return Err(problem(IndexError::MissingShard { shard: shard.to_owned(), tensor, tensors: held.len() }));
            }
            files.push(DataFile::open(&path, access)?);
        }
        let mut shard_of: HashMap<&str, &str> = HashMap::new();
        for (file, &shard) in files.iter().zip(&shards) {
            let known = file.header.entries.iter().map(|e| e.name.as_str());
            for tensor in known.chain(file.header.foreign.iter().map(|e| e.name.as_str())) {
                if let Some(first) = shard_of.insert(tensor, shard) {
                    let (first, second) = (first.to_owned(), shard.to_owned());
                    return Err(problem(IndexError::InTwoShards { tensor: tensor.to_owned(), first, second }));
                }
            }
        }
        for (tensor, shard) in &index.weight_map {
            let (tensor, shard) = (tensor.clone(), shard.clone());
            match shard_of.get(tensor.as_str()) {
                Some(&found) if found == shard => {}
                Some(&found) => {
                    return Err(problem(IndexError::OtherShard { tensor, shard, other: found.to_owned() }));
                }
                None => return Err(problem(IndexError::MissingTensor { tensor, shard })),
            }
        }
        Ok(Self::of_files(files))
    }

    fn new(files: Vec<DataFile>, tensors: Vec<(usize, usize)>) -> Self {
        let name = |&(f, e): &(usize, usize)| files[f].header.entries[e].name.clone();
        let by_name = tensors.iter().enumerate().map(|(i, place)| (name(place), i)).collect();
        Self { files, tensors, by_name }
    }

    /// Every raw tensor with the file that holds it, in the order of files and bytes.
    pub fn iter(&self) -> impl Iterator<Item = (&DataFile, &Entry)> {
        self.tensors.iter().map(|&(f, e)| (&self.files[f], &self.files[f].header.entries[e]))
    }

    /// Every tensor of a type that this program does not compute with, with its file.
    pub fn foreign(&self) -> impl Iterator<Item = (&DataFile, &ForeignEntry)> {
        self.files.iter().flat_map(|file| file.header.foreign.iter().map(move |entry| (file, entry)))
    }

    /// Bytes of all files, headers included.
    pub fn file_bytes(&self) -> u64 {
        self.files.iter().map(DataFile::length).sum()
    }

    /// One raw tensor.
    pub fn get(&self, name: &str) -> Option<(&DataFile, &Entry)> {
        let (f, e) = self.tensors[*self.by_name.get(name)?];
        Some((&self.files[f], &self.files[f].header.entries[e]))
    }

    /// Bytes of all tensor data.
    pub fn data_bytes(&self) -> u64 {
        self.iter().map(|(_, e)| e.bytes).sum::<u64>() + self.foreign().map(|(_, e)| e.bytes).sum::<u64>()
    }
}
