//! All that is below a directory of a sandbox, one after the other.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::session::files::{Error, Facts, Files, Kind, Refusal};
use crate::supervisor::files::Entry;

/// Directories in each other that are gone into: each holds a page of entries, of up to 64 KiB.
const MOST_LEVELS: usize = 64;
/// Bytes of all paths together.
const PATHS_BYTES: usize = 2 << 20;

/// Each directory before what is in it, by the bytes of names.
#[derive(Debug)]
pub(super) struct Walk {
    files: Files,
    levels: Vec<Level>,
    entries_left: usize,
    bytes_left: usize,
    /// Something was left out, for there is more than may be.
    pub(super) is_cut: bool,
}

/// A directory that is being listed.
#[derive(Debug)]
struct Level {
    path: Vec<u8>,
    entries: VecDeque<Entry>,
    /// The last name of the page, after which the next one begins.
    last: Bytes,
    more: bool,
}

impl Level {
    fn new(path: Vec<u8>) -> Level {
        Level { path, entries: VecDeque::new(), last: Bytes::new(), more: true }
    }
}

/// A path from the workspace on, and what is there.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) path: Vec<u8>,
    pub(super) facts: Facts,
}

impl Walk {
    /// What is below `path`, up to `most`.
    pub(super) fn new(files: Files, path: &[u8], most: usize) -> Walk {
        let levels = vec![Level::new(path.to_vec())];
        Walk { files, levels, entries_left: most, bytes_left: PATHS_BYTES, is_cut: false }
    }

    pub(super) async fn next(&mut self) -> Result<Option<Found>, Error> {
        loop {
            let is_top = self.levels.len() == 1;
            let Some(level) = self.levels.last_mut() else { return Ok(None) };
            if let Some(Entry { name, facts }) = level.entries.pop_front() {
                let path = join(&level.path, &name);
                return Ok(self.find(path, facts));
            }
            if !level.more {
                self.levels.pop();
                continue;
            }
            match self.files.list(&level.path, &level.last).await {
                Ok((entries, more)) => {
                    level.last = entries.last().map(|entry| entry.name.clone()).unwrap_or_default();
                    (level.entries, level.more) = (entries.into(), more);
                }
                // A program goes on meanwhile: what is gone is not there.
                Err(Error::Refused(Refusal::NotFound | Refusal::NotADirectory | Refusal::Denied))
                    if !is_top =>
                {
                    self.levels.pop();
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn find(&mut self, path: Vec<u8>, facts: Facts) -> Option<Found> {
        if self.entries_left == 0 || self.bytes_left < path.len() {
            self.is_cut = true;
            self.levels.clear();
            return None;
        }
        self.entries_left -= 1;
        self.bytes_left -= path.len();
        if facts.kind == Kind::Directory {
            match self.levels.len() {
                MOST_LEVELS => self.is_cut = true,
                _ => self.levels.push(Level::new(path.clone())),
            }
        }
        Some(Found { path, facts })
    }
}

pub(super) fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() { name.to_vec() } else { [directory, b"/", name].concat() }
}
