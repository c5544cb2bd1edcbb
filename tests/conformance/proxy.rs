//! A way to an engine that can be cut: what a daemon that dies looks like from outside, without killing one.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Passes on every connection to its socket, until it is cut.
pub(crate) struct Proxy {
    directory: tempfile::TempDir,
    cut: Arc<AtomicBool>,
    open: Arc<Mutex<Vec<UnixStream>>>,
}

impl Proxy {
    pub(crate) fn to(engine: &Path) -> Proxy {
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let proxy = Proxy { directory, cut: Arc::default(), open: Arc::default() };
        let listener = UnixListener::bind(proxy.socket()).unwrap();
        std::fs::set_permissions(proxy.socket(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let (cut, open, engine) = (proxy.cut.clone(), proxy.open.clone(), engine.to_owned());
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if cut.load(Ordering::SeqCst) {
                    continue; // closed, as by a daemon that dies
                }
                let Ok(server) = UnixStream::connect(&engine) else { continue };
                for end in [&client, &server] {
                    open.lock().unwrap().push(end.try_clone().unwrap());
                }
                pass_on(client.try_clone().unwrap(), server.try_clone().unwrap());
                pass_on(server, client);
            }
        });
        proxy
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("engine.sock")
    }

    /// Ends every connection, and takes no more.
    pub(crate) fn cut(&self) {
        self.cut.store(true, Ordering::SeqCst);
        for end in self.open.lock().unwrap().drain(..) {
            let _ = end.shutdown(Shutdown::Both); // it may have ended by itself
        }
    }

    pub(crate) fn mend(&self) {
        self.cut.store(false, Ordering::SeqCst);
    }
}

/// Until one of the two ends.
fn pass_on(mut from: UnixStream, mut to: UnixStream) {
    std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            if to.write_all(&buffer[..length]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}
