//! Directories as tars, both ways, a bit at a time.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};
use tokio_tar::{Archive, EntryType, Header};

use super::error::Error;
use super::file_headers::modified;
use super::walk::{Found, Walk, join};
use crate::session::files::{self, FILE_BYTES, Files, Kind, Reader, Refusal};

const BLOCK_BYTES: usize = 512;
/// Names in a header itself.
const NAME_BYTES: usize = 100;
/// From the end of one entry's content to the begin of the next one's: headers, long names and attributes, which
/// are read into memory.
const HEADERS_BYTES: u64 = 64 * 1024;
/// Of an entry's name, in a message.
const SHOWN_BYTES: usize = 200;

/// A directory on its way out.
#[derive(Debug)]
pub(super) struct Packer {
    files: Files,
    walk: Walk,
    /// Bytes of each path that are not the tar's business: those of the directory itself.
    above: usize,
    reading: Option<Reading>,
    buffer: BytesMut,
    is_over: bool,
}

#[derive(Debug)]
struct Reading {
    reader: Reader,
    offset: u64,
}

impl Packer {
    pub(super) fn new(files: Files, directory: &[u8], most: usize) -> Packer {
        let walk = Walk::new(files.clone(), directory, most);
        let above = if directory.is_empty() { 0 } else { directory.len() + 1 };
        Packer { files, walk, above, reading: None, buffer: BytesMut::new(), is_over: false }
    }

    /// The next bytes; `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, files::Error> {
        while self.buffer.len() < FILE_BYTES && !self.is_over {
            match self.reading.take() {
                Some(reading) => self.reading = self.read(reading).await?,
                None => match self.walk.next().await? {
                    Some(found) => self.begin(found).await?,
                    None if self.walk.is_cut => return Err(Refusal::Failed.into()), // half a directory is none
                    None => self.end(),
                },
            }
        }
        let bytes = self.buffer.split().freeze();
        Ok(if bytes.is_empty() { None } else { Some(bytes) })
    }

    async fn begin(&mut self, Found { path, facts }: Found) -> Result<(), files::Error> {
        let mut name = path[self.above..].to_vec();
        let mut header = Header::new_gnu();
        header.set_mode(facts.mode);
        header.set_mtime(
            modified(&facts).duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.as_secs()),
        );
        header.set_size(0);
        header.set_uid(0);
        header.set_gid(0);
        let mut target = Bytes::new();
        match facts.kind {
            Kind::File => {
                let Some(reader) = unless_gone(self.files.open(&path).await)? else { return Ok(()) };
                header.set_entry_type(EntryType::Regular);
                header.set_size(reader.facts.size);
                self.reading = Some(Reading { reader, offset: 0 });
            }
            Kind::Directory => {
                header.set_entry_type(EntryType::Directory);
                name.push(b'/');
            }
            Kind::Symlink => {
                let Some(found) = unless_gone(self.files.target(&path).await)? else { return Ok(()) };
                header.set_entry_type(EntryType::Symlink);
                target = found;
            }
            Kind::Other => return Ok(()), // nothing with content
        }
        self.header(header, &name, &target);
        Ok(())
    }

    fn header(&mut self, mut header: Header, name: &[u8], target: &[u8]) {
        self.long_name(EntryType::GNULongName, name);
        self.long_name(EntryType::GNULongLink, target);
        let old = header.as_old_mut();
        for (field, value) in [(&mut old.name, name), (&mut old.linkname, target)] {
            let length = value.len().min(NAME_BYTES);
            field[..length].copy_from_slice(&value[..length]);
        }
        header.set_cksum();
        self.buffer.extend_from_slice(header.as_bytes());
    }

    /// In an entry before its own, where it does not fit there.
    fn long_name(&mut self, kind: EntryType, name: &[u8]) {
        if name.len() <= NAME_BYTES {
            return;
        }
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..13].copy_from_slice(b"././@LongLink");
        header.set_mode(0o644);
        header.set_entry_type(kind);
        header.set_size(name.len() as u64 + 1);
        header.set_cksum();
        self.buffer.extend_from_slice(header.as_bytes());
        self.buffer.extend_from_slice(name);
        self.buffer.extend_from_slice(b"\0");
        self.pad(name.len() as u64 + 1);
    }

    async fn read(&mut self, mut reading: Reading) -> Result<Option<Reading>, files::Error> {
        let size = reading.reader.facts.size;
        if reading.offset == size {
            self.pad(size);
            return Ok(None);
        }
        let data = reading.reader.read(reading.offset, size - reading.offset).await?;
        if data.is_empty() {
            return Err(Refusal::Failed.into()); // cut meanwhile: the header has promised more
        }
        reading.offset += data.len() as u64;
        self.buffer.extend_from_slice(&data);
        Ok(Some(reading))
    }

    fn pad(&mut self, size: u64) {
        let surplus = (size % BLOCK_BYTES as u64) as usize;
        if surplus > 0 {
            self.buffer.extend_from_slice(&[0; BLOCK_BYTES][surplus..]);
        }
    }

    fn end(&mut self) {
        self.is_over = true;
        self.buffer.extend_from_slice(&[0; 2 * BLOCK_BYTES]);
    }
}

/// A program goes on meanwhile: what is no more, or is something else, is left out.
fn unless_gone<T>(result: Result<T, files::Error>) -> Result<Option<T>, files::Error> {
    use Refusal::{Denied, IsDirectory, NotADirectory, NotAFile, NotFound, Outside};
    match result {
        Ok(found) => Ok(Some(found)),
        Err(files::Error::Refused(
            Denied | IsDirectory | NotADirectory | NotAFile | NotFound | Outside | Refusal::Failed,
        )) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Unpacks a tar into a directory. Each file is there as a whole or not at all; those before a bad entry stay.
pub(super) async fn unpack(
    files: &Files,
    directory: &[u8],
    body: impl AsyncRead + Send + Unpin,
    most: usize,
) -> Result<(), Error> {
    let budget = Arc::new(AtomicU64::new(HEADERS_BYTES));
    let mut archive = Archive::new(Metered { body, budget: budget.clone() });
    let mut entries = archive.entries().map_err(broken)?;
    for number in 0.. {
        budget.store(HEADERS_BYTES, Ordering::Relaxed);
        let Some(entry) = entries.next().await else { break };
        if number == most {
            return Err(Error::invalid("the tar", format!("must not have more than {most} entries")));
        }
        let mut entry = entry.map_err(broken)?;
        budget.store(u64::MAX, Ordering::Relaxed); // its content is not kept
        let name = entry.path_bytes().map_err(broken)?.into_owned();
        let done = unpack_entry(files, directory, &name, &mut entry).await;
        done.map_err(|error| name_entry(error, &name))?;
    }
    if directory.is_empty() { Ok(()) } else { Ok(files.make_directory(directory).await?) }
}

async fn unpack_entry<R: AsyncRead + Send + Unpin>(
    files: &Files,
    directory: &[u8],
    name: &[u8],
    entry: &mut tokio_tar::Entry<R>,
) -> Result<(), Error> {
    let kind = entry.header().entry_type();
    if kind == EntryType::XGlobalHeader {
        return Ok(()); // a comment: `git archive` leaves one
    }
    let Some(inside) = inside(name) else { return Err(Refusal::Outside.into()) };
    let path = if inside.is_empty() { directory.to_vec() } else { join(directory, &inside) };
    match kind {
        EntryType::Directory if path.is_empty() => Ok(()),
        EntryType::Directory => Ok(files.make_directory(&path).await?),
        EntryType::Symlink => {
            let target = entry.link_name_bytes().map_err(broken)?.unwrap_or_default().into_owned();
            Ok(files.link(&path, target.into()).await?)
        }
        EntryType::Regular | EntryType::Continuous => {
            let size = entry.effective_size();
            let writer = files.create(&path, Some(size)).await?;
            let mode = entry.header().mode().unwrap_or(0o644) & 0o777 | 0o600;
            let mtime = entry.header().mtime().ok().and_then(|time| i64::try_from(time).ok());
            let mut buffer = BytesMut::with_capacity(FILE_BYTES);
            let mut missing = size;
            loop {
                buffer.reserve(FILE_BYTES);
                let read = entry.read_buf(&mut buffer).await.map_err(broken)?;
                missing = missing.saturating_sub(read as u64);
                if buffer.len() >= FILE_BYTES / 2 || read == 0 {
                    writer.write(buffer.split().freeze()).await?;
                }
                if read == 0 {
                    break;
                }
            }
            if missing > 0 {
                return Err(broken(std::io::ErrorKind::UnexpectedEof.into())); // half a file is none
            }
            writer.commit(mode, mtime.and_then(|time| time.checked_mul(1_000_000_000))).await?;
            Ok(())
        }
        _ => Err(Refusal::NotAFile.into()),
    }
}

/// An entry's name without what means nothing in it; `None` where it leads out.
fn inside(name: &[u8]) -> Option<Vec<u8>> {
    let steps: Vec<&[u8]> =
        name.split(|byte| *byte == b'/').filter(|step| !matches!(*step, b"" | b".")).collect();
    let odd = name.first() == Some(&b'/') || name.contains(&0) || steps.iter().any(|step| *step == b"..");
    (!odd).then(|| steps.join(&b'/'))
}

/// What is wrong with an entry is the client's doing, and he is to know with which.
fn name_entry(error: Error, name: &[u8]) -> Error {
    use Refusal::{Denied, Exists, IsDirectory, NameTooLong, NotADirectory, NotAFile, Outside};
    match error {
        Error::Refused(
            why @ (Denied | Exists | IsDirectory | NameTooLong | NotADirectory | NotAFile | Outside),
        ) => {
            let shown = String::from_utf8_lossy(&name[..name.len().min(SHOWN_BYTES)]).into_owned();
            Error::invalid(&format!("the entry {shown:?}:"), why)
        }
        error => error,
    }
}

fn broken(error: std::io::Error) -> Error {
    match error.kind() {
        std::io::ErrorKind::TimedOut => Error::Stalled,
        _ => Error::invalid("the tar", format!("is broken: {error}")),
    }
}

/// Gives what its budget allows and no more.
struct Metered<R> {
    body: R,
    budget: Arc<AtomicU64>,
}

impl<R: AsyncRead + Unpin> AsyncRead for Metered<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.body).poll_read(context, buffer))?;
        let read = (buffer.filled().len() - before) as u64;
        let left = self.budget.load(Ordering::Relaxed);
        self.budget.store(left.saturating_sub(read), Ordering::Relaxed);
        if left < read {
            return Poll::Ready(Err(std::io::Error::other("headers are too long")));
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_inside_or_is_none() {
        for (name, is) in [
            ("a", Some("a")),
            ("./a//b/", Some("a/b")),
            ("./", Some("")),
            ("...", Some("...")),
            ("/a", None),
            ("..", None),
            ("a/../b", None),
            ("a\0b", None),
        ] {
            assert_eq!(inside(name.as_bytes()).as_deref(), is.map(str::as_bytes), "{name}");
        }
    }

    #[tokio::test]
    async fn headers_have_a_bound_and_content_has_none() {
        let budget = Arc::new(AtomicU64::new(10));
        let mut metered = Metered { body: tokio::io::repeat(0), budget: budget.clone() };
        metered.read_exact(&mut [0; 10]).await.unwrap();
        metered.read_exact(&mut [0; 1]).await.unwrap_err();
        budget.store(u64::MAX, Ordering::Relaxed);
        metered.read_exact(&mut vec![0; 1 << 20]).await.unwrap();
    }
}
