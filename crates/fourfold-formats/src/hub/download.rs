//! One file: what the hub announces of it, and its bytes into the cache, checked.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest as _, Sha256};
use ureq::Body;
use ureq::http::Response;

use super::http::{Ask, Client, check_status, etag, header};
use super::{HubError, Progress};

/// Bytes that are read at once.
const CHUNK: usize = 1 << 16;

/// What a hub says of a file before it sends it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Announced {
    /// Its name in the cache; for large files the SHA-256 of the content.
    pub etag: String,
    /// Its length in bytes.
    pub size: u64,
}

impl Announced {
    /// Asks for it.
    pub(super) fn ask(client: &Client, path: &str, name: &str) -> Result<Self, HubError> {
        let response = client.send(path, Ask::About)?;
        check_status(&response, name)?;
        Self::of(&response, name)
    }

    fn of(response: &Response<Body>, name: &str) -> Result<Self, HubError> {
        let nothing = |what: &str| HubError::Answer { reason: format!("{name}: no {what} was announced") };
        let etag = etag(response).ok_or_else(|| nothing("ETag"))?;
        let is_name = |c: char| c.is_ascii_alphanumeric() || ['-', '_', '.'].contains(&c);
        if etag.len() > 128 || etag.starts_with('.') || !etag.chars().all(is_name) {
            return Err(HubError::Answer { reason: format!("{name}: the ETag {etag:?}") });
        }
        let size = header(response, "x-linked-size").or_else(|| header(response, "content-length"));
        let size = size.and_then(|s| s.trim().parse().ok()).ok_or_else(|| nothing("size"))?;
        Ok(Self { etag: etag.to_owned(), size })
    }
}

/// What an ETag says of the content, where it says it.
enum Check {
    /// 64 hexadecimal digits: the content's SHA-256.
    Sha256(Sha256),
    /// 40: git's name of the content, the SHA-1 of `blob SIZE`, a zero byte and the content.
    Git(Sha1),
    /// Something of the server's own.
    Nothing,
}

impl Check {
    fn new(announced: &Announced) -> Self {
        let is_hex = announced.etag.chars().all(|c| c.is_ascii_hexdigit());
        match (is_hex, announced.etag.len()) {
            (true, 64) => Self::Sha256(Sha256::new()),
            (true, 40) => Self::Git(Sha1::new().chain_update(format!("blob {}\0", announced.size))),
            _ => Self::Nothing,
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Git(hash) => hash.update(bytes),
            Self::Nothing => {}
        }
    }

    /// The hash of what came, where there is one.
    fn found(self) -> Option<String> {
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect();
        match self {
            Self::Sha256(hash) => Some(hex(&hash.finalize())),
            Self::Git(hash) => Some(hex(&hash.finalize())),
            Self::Nothing => None,
        }
    }
}

/// Brings a file's content to `part`, going on where an earlier try was cut, checks it and names it `blob`.
pub(super) fn download(
    client: &Client,
    path: &str,
    name: &str,
    announced: &Announced,
    [part, blob]: [&Path; 2],
    progress: &mut dyn Progress,
) -> Result<(), HubError> {
    let of_disk = |e: io::Error| HubError::Cache { reason: format!("{name}: {e}") };
    let mut file = OpenOptions::new().read(true).append(true).create(true).open(part).map_err(of_disk)?;
    let mut check = Check::new(announced);
    let mut have = file.metadata().map_err(of_disk)?.len();
    if have > announced.size {
        file.set_len(0).map_err(of_disk)?;
        have = 0;
    }
    hash(&mut file, &mut check).map_err(of_disk)?;
    progress.start(name, announced.size);
    progress.advance(have);
    if have < announced.size {
        let mut response = client.send(path, Ask::Content(have))?;
        if response.status() == 416 {
            // What lies here is of no use to this server.
            file.set_len(0).map_err(of_disk)?;
        }
        check_status(&response, name)?;
        let goes_on = response.status() == 206;
        if goes_on && !begins_at(&response, have) {
            return Err(HubError::Answer { reason: format!("{name}: another range than was asked for") });
        }
        if !goes_on && have > 0 {
            file.set_len(0).map_err(of_disk)?;
            (have, check) = (0, Check::new(announced));
            progress.start(name, announced.size);
        }
        let mut body = response.body_mut().as_reader();
        let mut buffer = vec![0; CHUNK];
        while have <= announced.size {
            let read = body.read(&mut buffer);
            let n = read.map_err(|e| HubError::Unreachable { reason: format!("{name}: {e}") })?;
            if n == 0 {
                break;
            }
            have += n as u64;
            file.write_all(&buffer[..n]).map_err(of_disk)?;
            check.update(&buffer[..n]);
            progress.advance(n as u64);
        }
    }
    if have != announced.size {
        if have > announced.size {
            file.set_len(0).map_err(of_disk)?;
        }
        return Err(HubError::Length { file: name.to_owned(), found: have, total: announced.size });
    }
    if let Some(found) = check.found().filter(|found| !found.eq_ignore_ascii_case(&announced.etag)) {
        fs::remove_file(part).map_err(of_disk)?;
        return Err(HubError::Content { file: name.to_owned(), found, announced: announced.etag.clone() });
    }
    file.sync_all().map_err(of_disk)?;
    fs::rename(part, blob).map_err(of_disk)?;
    progress.finish();
    Ok(())
}

/// Hashes what is there already.
fn hash(file: &mut File, check: &mut Check) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(()),
            n => check.update(&buffer[..n]),
        }
    }
}

/// Whether an answer to a range is of the bytes from `first` on.
fn begins_at(response: &Response<Body>, first: u64) -> bool {
    let range = header(response, "content-range").and_then(|r| r.trim().strip_prefix("bytes "));
    range.and_then(|r| r.split_once('-')).is_some_and(|(begin, _)| begin.trim().parse() == Ok(first))
}
