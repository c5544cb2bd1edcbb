//! The file of audit lines. A thread of its own writes it: no run waits for the disk.
//!
//! tracing-appender has such a thread, too, but it counts no write that failed and opens nothing again.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::metrics::Metrics;

/// Lines that wait for the disk, each below a KiB: a guess at a second of the fastest machine.
const QUEUE_LINES: usize = 8192;
/// Between two warnings of lines that were lost.
const WARNING_PERIOD: Duration = Duration::from_secs(60);
/// How long the end of a server waits for the disk.
const CLOSE_WAIT: Duration = Duration::from_secs(5);

/// A file that lines are appended to. A cheap handle.
#[derive(Debug, Clone)]
pub struct AuditFile {
    orders: mpsc::Sender<Order>,
    losses: Arc<Losses>,
}

/// What its thread is to do next.
#[derive(Debug)]
enum Order {
    /// A line with its line break.
    Write(Vec<u8>),
    Reopen,
    Close,
}

impl AuditFile {
    /// Makes it where it is missing, for its owner's eyes only.
    ///
    /// # Errors
    /// Where it cannot be opened for appending.
    pub fn open(path: &Path, metrics: Arc<Metrics>) -> io::Result<AuditFile> {
        let losses = Arc::new(Losses { path: path.to_owned(), metrics, warned: Mutex::default() });
        let (orders, given) = mpsc::channel(QUEUE_LINES);
        let writer = Writer { file: append_to(path)?, torn: false, losses: losses.clone() };
        std::thread::Builder::new().name("audit".into()).spawn(|| writer.obey(given))?; // ends with its last handle
        Ok(AuditFile { orders, losses })
    }

    /// Appends a line, soon. One that finds too many before it is lost, and counted.
    pub(super) fn append(&self, line: Vec<u8>) {
        if self.orders.try_send(Order::Write(line)).is_err() {
            self.losses.count("the disk is too slow");
        }
    }

    /// Opens the path again: what stands there now is another file. Where that fails the old one goes on.
    pub async fn reopen(&self) {
        let _ = self.orders.send(Order::Reopen).await; // closed: the server ends
    }

    /// Has everything written, as far as the disk takes it in time. There is no sync: the kernel has it then.
    pub(super) async fn close(&self) {
        let written = async {
            let _ = self.orders.send(Order::Close).await; // closed already: by another handle
            self.orders.closed().await;
        };
        if tokio::time::timeout(CLOSE_WAIT, written).await.is_err() {
            self.losses.warn("the disk is too slow for the last lines");
        }
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

/// The thread's part.
struct Writer {
    file: File,
    /// The disk took a part of the last line: the next one begins a new one.
    torn: bool,
    losses: Arc<Losses>,
}

impl Writer {
    fn obey(mut self, mut orders: mpsc::Receiver<Order>) {
        while let Some(order) = orders.blocking_recv() {
            match order {
                Order::Write(line) => self.write(line),
                Order::Reopen => self.reopen(),
                Order::Close => return,
            }
        }
    }

    /// In one call, so that several servers may share a file.
    fn write(&mut self, mut line: Vec<u8>) {
        if self.torn {
            line.insert(0, b'\n');
        }
        match retry_on_interrupt(|| self.file.write(&line)) {
            Ok(length) if length == line.len() => self.torn = false,
            Ok(length) => {
                self.torn |= length > 0;
                self.losses.count("the disk took only a part of one");
            }
            Err(error) => self.losses.count(&error.to_string()),
        }
    }

    fn reopen(&mut self) {
        let path = &self.losses.path;
        match append_to(path) {
            Ok(file) => {
                (self.file, self.torn) = (file, false);
                tracing::info!(file = %path.display(), "opened the audit file again");
            }
            Err(error) => {
                tracing::error!(file = %path.display(), %error, "cannot open the audit file again: the old one goes on");
            }
        }
    }
}

fn retry_on_interrupt<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// Lines that did not get into the file.
#[derive(Debug)]
struct Losses {
    path: PathBuf,
    metrics: Arc<Metrics>,
    /// The last warning.
    warned: Mutex<Option<Instant>>,
}

impl Losses {
    fn count(&self, why: &str) {
        self.metrics.audit_lost.inc();
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.is_none_or(|last| last.elapsed() >= WARNING_PERIOD) {
            *warned = Some(Instant::now());
            self.warn(why);
        }
    }

    fn warn(&self, why: &str) {
        let (file, lost) = (self.path.display(), self.metrics.audit_lost.get());
        tracing::warn!(%file, why, lost, "audit lines are lost");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &[u8] = b"0123456789\n";

    /// A pipe that holds 64 KiB and is read when the test says so: a disk that hangs.
    fn slow_disk() -> (tempfile::TempDir, PathBuf, File) {
        use rustix::fs::{FileType, Mode, OFlags};
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit");
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let reader = rustix::fs::open(&path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap();
        (directory, path, reader.into())
    }

    #[tokio::test]
    async fn a_disk_that_hangs_costs_lines_and_no_time() {
        let (_directory, path, _reader) = slow_disk();
        let metrics = Arc::new(Metrics::new());
        let file = AuditFile::open(&path, metrics.clone()).unwrap();
        let begun = Instant::now();
        let line = [b'x'; 1024];
        for _ in 0..QUEUE_LINES + 200 {
            file.append(line.to_vec());
        }
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        let lost = metrics.audit_lost.get();
        assert!((100..=200).contains(&lost), "the pipe holds 64 lines, the queue the rest: {lost}");
        tokio::time::pause();
        file.close().await; // by its deadline, with lines still unwritten
    }

    #[tokio::test]
    async fn at_the_end_all_lines_are_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit");
        let file = AuditFile::open(&path, Arc::default()).unwrap();
        for _ in 0..1000 {
            file.append(LINE.to_vec());
        }
        file.close().await;
        assert_eq!(std::fs::read(&path).unwrap(), LINE.repeat(1000));
    }

    #[test]
    fn after_a_torn_line_the_next_one_begins_a_new_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit");
        std::fs::write(&path, "torn").unwrap();
        let losses = Losses { path: path.clone(), metrics: Arc::default(), warned: Mutex::default() };
        let mut writer = Writer { file: append_to(&path).unwrap(), torn: true, losses: losses.into() };
        writer.write(LINE.to_vec());
        writer.write(LINE.to_vec());
        assert_eq!(std::fs::read(&path).unwrap(), [b"torn\n", LINE, LINE].concat());
    }
}
