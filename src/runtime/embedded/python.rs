//! Finds the interpreter that sandboxes run, and the directories that it needs.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use tokio::process::Command;

use super::layers::HOST_DIRECTORIES;
use crate::runtime::{Error, Result};

/// Where an unpacked image has its interpreter: the official images', then the distributions'.
const IMAGE_PATHS: [&str; 2] = ["/usr/local/bin/python3", "/usr/bin/python3"];
/// The oldest that the supervisor runs on.
const OLDEST: (u32, u32) = (3, 8);
/// Prints executable, version and the directories of the installation, a line each.
const TELL: &str = "import sys; print(sys.executable, '%d.%d' % sys.version_info[:2], \
                    *dict.fromkeys([sys.prefix, sys.base_prefix, sys.base_exec_prefix]), sep='\\n')";

/// The interpreter as a sandbox sees it.
#[derive(Debug, Clone)]
pub(super) struct Python {
    pub(super) path: PathBuf,
    /// Directories beyond the system's own.
    pub(super) prefixes: Vec<PathBuf>,
}

/// Finds it on this host, or in an unpacked image.
pub(super) async fn find(rootfs: Option<&Path>, configured: Option<&Path>) -> Result<Python> {
    match rootfs {
        Some(root) => in_image(root, configured),
        None => on_host(configured).await,
    }
}

fn in_image(root: &Path, configured: Option<&Path>) -> Result<Python> {
    let candidates: Vec<&Path> = match configured {
        Some(path) => vec![path],
        None => IMAGE_PATHS.iter().map(Path::new).collect(),
    };
    let exists = |path: &&&Path| root.join(path.strip_prefix("/").unwrap_or(path)).symlink_metadata().is_ok();
    match candidates.iter().find(exists) {
        Some(path) => Ok(Python { path: path.to_path_buf(), prefixes: Vec::new() }),
        None => Err(Error::Unusable {
            what: format!("find python3 in {}", root.display()),
            why: format!("none of {candidates:?} is there"),
            remedy: "unpack an image that has Python 3.8 or newer, or set embedded.python to its path in the image"
                .into(),
        }),
    }
}

async fn on_host(configured: Option<&Path>) -> Result<Python> {
    let candidates: Vec<PathBuf> = match configured {
        Some(path) => vec![path.to_path_buf()],
        None => ["python3", "/usr/bin/python3", "/usr/local/bin/python3"].map(PathBuf::from).to_vec(),
    };
    let mut why = String::new();
    for candidate in &candidates {
        match ask(candidate.as_os_str()).await {
            Ok(python) => return Ok(python),
            Err(error) => why = format!("{}: {error}", candidate.display()),
        }
    }
    Err(Error::Unusable {
        what: "find python3 on this host".into(),
        why,
        remedy: "install Python 3.8 or newer (apt-get install python3), or set embedded.python to its path"
            .into(),
    })
}

async fn ask(candidate: &OsStr) -> io::Result<Python> {
    let output = Command::new(candidate).args(["-I", "-S", "-c", TELL]).kill_on_drop(true).output();
    let output = tokio::time::timeout(std::time::Duration::from_secs(20), output).await??;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut lines = text.lines();
    let (Some(path), Some(version)) = (lines.next(), lines.next()) else {
        return Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    };
    let number = |part: Option<&str>| part.and_then(|part| part.parse::<u32>().ok()).unwrap_or(0);
    let mut parts = version.split('.');
    if (number(parts.next()), number(parts.next())) < OLDEST {
        return Err(io::Error::other(format!("it is Python {version}, older than 3.8")));
    }
    let environment =
        Path::new(path).ancestors().nth(2).filter(|directory| directory.join("pyvenv.cfg").exists());
    let of_system =
        |prefix: &&str| HOST_DIRECTORIES.iter().any(|directory| Path::new(prefix).starts_with(directory));
    let prefixes = lines.filter(|prefix| !of_system(prefix)).map(PathBuf::from);
    let prefixes = prefixes.chain(environment.map(Path::to_path_buf)).collect();
    Ok(Python { path: PathBuf::from(path), prefixes })
}
