//! Data files: found, told apart by their names, unpacked and opened.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use flate2::bufread::MultiGzDecoder;
use fourfold_train::data::rows::{RowFormat, Rows};
use fourfold_train::data::{Columns, JsonShape, Record, Seen, Source};
use ruzstd::decoding::StreamingDecoder;

#[cfg(feature = "parquet")]
mod parquet;

/// How a file is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataFormat {
    /// A text from beginning to end.
    Text,
    /// Rows.
    Rows(RowFormat),
    /// Rows of a Parquet file.
    Parquet,
}

impl DataFormat {
    /// By the name that `--data-format` has for it.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "text" => Self::Text,
            "jsonl" => Self::Rows(RowFormat::JsonLines),
            "json" => Self::Rows(RowFormat::Json),
            "csv" => Self::Rows(RowFormat::Csv),
            "tsv" => Self::Rows(RowFormat::Tsv),
            "parquet" => Self::Parquet,
            _ => return None,
        })
    }

    /// By a file's name, in capitals or not; packed or not.
    pub fn of(path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        let name = PACKED.iter().find_map(|packed| name.strip_suffix(packed)).unwrap_or(&name);
        match name.rsplit_once('.').map(|(_, suffix)| suffix) {
            Some("jsonl" | "ndjson" | "jsonlines") => Self::Rows(RowFormat::JsonLines),
            Some("json") => Self::Rows(RowFormat::Json),
            Some("csv") => Self::Rows(RowFormat::Csv),
            Some("tsv") => Self::Rows(RowFormat::Tsv),
            Some("parquet") => Self::Parquet,
            _ => Self::Text,
        }
    }
}

/// Ends of the names of packed files.
const PACKED: [&str; 4] = [".gz", ".gzip", ".zst", ".zstd"];

/// A file to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile {
    /// Where it is.
    pub path: PathBuf,
    /// Whether it was found in a directory.
    pub is_found: bool,
}

/// The files that paths name: each by itself, those below a directory in order of their names. Files and directories whose names begin with a
/// point are left out and counted.
pub fn files(paths: &[PathBuf]) -> Result<(Vec<DataFile>, u64)> {
    let (mut files, mut hidden) = (Vec::new(), 0);
    for path in paths {
        let kind = fs::metadata(path).with_context(|| path.display().to_string())?;
        if !kind.is_dir() {
            files.push(DataFile { path: path.clone(), is_found: false });
            continue;
        }
        let (mut found, mut folders, mut known) = (Vec::new(), vec![path.clone()], HashSet::new());
        while let Some(folder) = folders.pop() {
            let named = || folder.display().to_string();
            // A link to a folder above it is no new folder.
            if !known.insert(fs::canonicalize(&folder).with_context(named)?) {
                continue;
            }
            for entry in fs::read_dir(&folder).with_context(named)? {
                let path = entry.with_context(named)?.path();
                if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')) {
                    hidden += 1;
                } else if path.is_dir() {
                    folders.push(path);
                } else {
                    found.push(path);
                }
            }
        }
        if found.is_empty() {
            bail!("{}: a directory without data files", path.display());
        }
        found.sort();
        files.extend(found.into_iter().map(|path| DataFile { path, is_found: true }));
    }
    Ok((files, hidden))
}

/// Opens a file of text or rows, unpacked as its first bytes say.
pub fn open(path: &Path) -> Result<Source<'static>> {
    let name = path.display().to_string();
    let mut file = regular(path)?;
    let packed = file.fill_buf().with_context(|| name.clone())?;
    let lower = name.to_ascii_lowercase();
    let reader: Box<dyn Read> = match packed {
        [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(file)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Box::new(Zstandard::new(file)),
        [] => Box::new(file),
        _ if PACKED.iter().any(|end| lower.ends_with(end)) => {
            bail!("{name}: its name says that it is packed, its first bytes do not: neither gzip nor Zstandard")
        }
        _ => Box::new(file),
    };
    Ok(Source::new(&name, reader)?)
}

/// Opens a file, and nothing that has no end or waits for a writer.
fn regular(path: &Path) -> Result<BufReader<File>> {
    let named = || path.display().to_string();
    let kind = fs::metadata(path).with_context(named)?;
    if kind.is_dir() {
        bail!("{}: a directory, where a file is expected", path.display());
    }
    if !kind.is_file() {
        bail!(
            "{}: a pipe, a socket or a device: data are read from regular files, write it into one first",
            path.display()
        );
    }
    Ok(BufReader::with_capacity(1 << 16, File::open(path).with_context(named)?))
}

/// The rows of a file.
pub fn rows(path: &Path, format: RowFormat) -> Result<Rows<'static>> {
    Ok(format.rows(open(path)?)?)
}

/// The rows of a Parquet file.
#[cfg(feature = "parquet")]
pub fn parquet_rows(path: &Path) -> Result<Rows<'static>> {
    regular(path)?;
    parquet::rows(path)
}

/// The rows of a Parquet file.
#[cfg(not(feature = "parquet"))]
pub fn parquet_rows(path: &Path) -> Result<Rows<'static>> {
    bail!(
        "{}: this program was built without Parquet; `cargo install --path crates/fourfold --features parquet` builds it with, or \
         in Python `pandas.read_parquet(FILE).to_json(\"data.jsonl\", orient=\"records\", lines=True)` writes rows that it reads",
        path.display()
    )
}

/// What a file is, as far as its name and its first bytes tell.
pub enum Opened {
    /// A text; whether it is JSON all the same.
    Text(Source<'static>, bool),
    /// Rows, and what their file is called.
    Rows(Rows<'static>, bool),
}

/// Opens a file as `format` says, else as its name does. What looks like rows and is not named so is refused; a file in a directory that
/// is one JSON object and no row (a configuration) is a text.
pub fn open_as(file: &DataFile, format: Option<DataFormat>, columns: &Columns) -> Result<Opened> {
    let path = &file.path;
    if let Some(DataFormat::Parquet) = format {
        return Ok(Opened::Rows(parquet_rows(path)?, false));
    }
    let by_name = DataFormat::of(path);
    match (format.unwrap_or(by_name), format.is_some()) {
        (DataFormat::Parquet, _) => Ok(Opened::Rows(parquet_rows(path)?, false)),
        (DataFormat::Rows(RowFormat::Json), false) if file.is_found => {
            let source = open(path)?;
            match source.json_shape() {
                JsonShape::One(row) if columns.record("", &row, &mut Seen::default()).is_err() => {
                    Ok(Opened::Text(source, true))
                }
                _ => with_mark(RowFormat::Json, source),
            }
        }
        (DataFormat::Rows(format), _) => with_mark(format, open(path)?),
        (DataFormat::Text, true) => Ok(Opened::Text(open(path)?, false)),
        (DataFormat::Text, false) => {
            let source = open(path)?;
            match source.json_shape() {
                JsonShape::None => Ok(Opened::Text(source, false)),
                JsonShape::One(row) if file.is_found && columns.record("", &row, &mut Seen::default()).is_err() => {
                    Ok(Opened::Text(source, true))
                }
                _ => bail!(
                    "{}: holds JSON, and its name does not say so: name it .jsonl (an object a line) or .json, or say --data-format \
                     jsonl or json; --data-format text learns its characters as they are",
                    path.display()
                ),
            }
        }
    }
}

fn with_mark(format: RowFormat, source: Source<'static>) -> Result<Opened> {
    let has_mark = source.has_mark();
    Ok(Opened::Rows(format.rows(source)?, has_mark))
}

/// The text of a file to measure or calibrate on: of rows, what each of them says, with an empty line between.
pub fn text(path: &Path) -> Result<String> {
    let file = DataFile { path: path.to_owned(), is_found: false };
    let (columns, mut text) = (Columns::default(), String::new());
    match open_as(&file, None, &columns)? {
        Opened::Text(mut source, _) => while source.text(&mut text)? {},
        Opened::Rows(rows, _) => {
            let (name, mut seen) = (path.display().to_string(), Seen::default());
            for row in rows {
                let said = plain(&columns.record(&name, &row?, &mut seen)?);
                if !text.is_empty() && !said.is_empty() {
                    text.push_str("\n\n");
                }
                text.push_str(&said);
            }
        }
    }
    Ok(text)
}

/// What a row says, without a template.
fn plain(record: &Record) -> String {
    match record {
        Record::Text(text) => text.clone(),
        Record::Completion { prompt, completion } => format!("{prompt}{completion}"),
        Record::Chat(conversation) => said(conversation),
        Record::Instruction(instruction) => said(&instruction.conversation()),
    }
}

fn said(conversation: &fourfold_train::data::Conversation) -> String {
    let texts = conversation.messages.iter().filter_map(|turn| turn.get("content")?.as_str());
    texts.filter(|text| !text.is_empty()).collect::<Vec<_>>().join("\n")
}

/// All frames of a Zstandard file, one after the other.
struct Zstandard {
    /// The frame at hand, or what follows the last one.
    state: Option<Frame>,
}

enum Frame {
    Between(BufReader<File>),
    In(Box<StreamingDecoder<BufReader<File>, ruzstd::decoding::FrameDecoder>>),
}

impl Zstandard {
    fn new(file: BufReader<File>) -> Self {
        Self { state: Some(Frame::Between(file)) }
    }
}

impl Read for Zstandard {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
        loop {
            match self.state.take() {
                None => return Ok(0),
                Some(Frame::Between(mut file)) => {
                    let head = file.fill_buf()?;
                    if head.is_empty() {
                        return Ok(0);
                    }
                    if let [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] = head {
                        // A frame to be skipped: its length follows its magic number.
                        let mut head = [0; 8];
                        file.read_exact(&mut head)?;
                        let length = u64::from(u32::from_le_bytes([head[4], head[5], head[6], head[7]]));
                        if io::copy(&mut (&mut file).take(length), &mut io::sink())? < length {
                            return Err(io::ErrorKind::UnexpectedEof.into());
                        }
                        self.state = Some(Frame::Between(file));
                        continue;
                    }
                    let decoder = StreamingDecoder::new(file).map_err(|e| invalid(e.to_string()))?;
                    self.state = Some(Frame::In(Box::new(decoder)));
                }
                Some(Frame::In(mut decoder)) => {
                    let read = decoder.read(out)?;
                    if read > 0 || out.is_empty() {
                        self.state = Some(Frame::In(decoder));
                        return Ok(read);
                    }
                    let frame = &decoder.decoder;
                    if let (Some(stored), Some(found)) =
                        (frame.get_checksum_from_data(), frame.get_calculated_checksum())
                        && stored != found
                    {
                        return Err(invalid(
                            "the checksum of a Zstandard frame differs: the file is damaged".to_owned(),
                        ));
                    }
                    self.state = Some(Frame::Between(decoder.into_inner()));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_told_by_name() {
        let format = |name: &str| DataFormat::of(Path::new(name));
        for name in ["a.jsonl", "A.JSONL", "a.ndjson", "a.b.jsonl.gz", "a.JSONL.ZST"] {
            assert_eq!(format(name), DataFormat::Rows(RowFormat::JsonLines), "{name}");
        }
        assert_eq!(format("a.Json"), DataFormat::Rows(RowFormat::Json));
        assert_eq!(format("a.csv.gz"), DataFormat::Rows(RowFormat::Csv));
        assert_eq!(format("a.TSV"), DataFormat::Rows(RowFormat::Tsv));
        assert_eq!(format("train-00000-of-00001.parquet"), DataFormat::Parquet);
        for name in ["a.txt", "jsonl", "a.gz", "a.rs", "README"] {
            assert_eq!(format(name), DataFormat::Text, "{name}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_directory_is_read_once_whatever_links_are_in_it() {
        let place = tempfile::tempdir().unwrap();
        let inner = place.path().join("inner");
        fs::create_dir(&inner).unwrap();
        fs::write(inner.join("b.txt"), "b").unwrap();
        fs::write(place.path().join("z.txt"), "z").unwrap();
        fs::write(place.path().join(".hidden"), "h").unwrap();
        std::os::unix::fs::symlink(place.path(), inner.join("up")).unwrap();
        let (found, hidden) = files(&[place.path().to_path_buf()]).unwrap();
        let names: Vec<_> = found.iter().map(|f| f.path.file_name().unwrap().to_string_lossy().into_owned()).collect();
        assert_eq!((names, hidden), (vec!["b.txt".to_owned(), "z.txt".to_owned()], 1));
        assert!(open(Path::new("/dev/zero")).err().unwrap().to_string().contains("regular files"));
        fs::create_dir(place.path().join("empty")).unwrap();
        assert!(files(&[place.path().join("empty")]).unwrap_err().to_string().contains("without data files"));
    }

    /// Two frames with a skippable one between, as `zstd` and `pzstd` write them ("ab\n" and "cd\n", stored raw, with checksums).
    #[test]
    fn packed_files_are_read_to_their_end() {
        use std::io::Write;
        let place = tempfile::tempdir().unwrap();
        let read = |name: &str, bytes: &[u8]| {
            let path = place.path().join(name);
            fs::write(&path, bytes).unwrap();
            text(&path)
        };
        let mut gzip = Vec::new();
        for part in ["ab\n", "cd\n"] {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(part.as_bytes()).unwrap();
            gzip.extend(encoder.finish().unwrap());
        }
        assert_eq!(read("a.txt.gz", &gzip).unwrap(), "ab\ncd\n");
        assert!(read("b.txt.gz", &gzip[..gzip.len() - 9]).is_err(), "cut");
        let frame = |text: &[u8; 3]| [&[0x28, 0xb5, 0x2f, 0xfd, 0x20, 3, 0x19, 0, 0][..], text].concat();
        let skipped = [0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 9, 9];
        let frames = [&frame(b"ab\n")[..], &skipped, &frame(b"cd\n")].concat();
        assert_eq!(read("a.txt.zst", &frames).unwrap(), "ab\ncd\n");
        assert!(read("b.txt.zst", &frames[..frames.len() - 1]).is_err(), "cut");
        assert!(read("c.txt.gz", b"plain").unwrap_err().to_string().contains("its first bytes do not"));
        let rows = "{\"text\": \"ab\"}\n{\"messages\": [{\"role\": \"user\", \"content\": \"cd\"}]}\n";
        assert_eq!(read("a.jsonl", rows.as_bytes()).unwrap(), "ab\n\ncd");
        assert!(read("rows.txt", rows.as_bytes()).unwrap_err().to_string().contains("holds JSON"));
    }
}
