//! The root file system of every sandbox, built once: read-only, no set-uid, no devices but six.
//!
//! Runs in the launcher, in a mount namespace of its own. Sources are opened before anything is
//! mounted, so that no mount of ours hides one. Afterwards the launcher's own root holds nothing but
//! `/template`, `/proc` of its pid namespace and `/sandbox`, where a sandbox pivots from.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_bind,
    mount_change, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, pivot_root};

use super::layers::{
    DEVICE_LINKS, DEVICES, HOST_DIRECTORIES, HOST_ETC, INTERPRETER, OWN_DIRECTORY, OWN_ETC, SUPERVISOR,
};
use super::wire::{Failure, Preparation, step};

/// Where the template stands once the launcher has pivoted.
pub(super) const TEMPLATE: &str = "/template";
/// Where a sandbox puts its copy before it pivots into it.
pub(super) const SANDBOX: &str = "/sandbox";
/// A directory that every Linux has; hidden from us alone while we build.
const BASE: &str = "/tmp";

/// Directories that a sandbox mounts something on, or that hold what we make.
const MOUNT_POINTS: [&str; 7] = ["workspace", "tmp", "proc", "dev", "dev/shm", "dev/pts", "run/codesandbox"];
/// Directories of an unpacked image that we never take over: they are ours.
const NOT_OF_IMAGE: [&str; 6] = ["workspace", "tmp", "proc", "sys", "dev", "run"];

/// The template's parts that change after it stands.
#[derive(Debug)]
pub(super) struct Template {
    /// The template's tmpfs, writable, and seen by the launcher alone.
    writable: PathBuf,
}

impl Template {
    /// Builds the template and pivots the launcher into its small root.
    pub(super) fn build(preparation: &Preparation) -> Result<Template, Failure> {
        step(
            "make mounts private",
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC),
        )?;
        let plan = Plan::of(preparation)?;
        let base = Path::new(BASE);
        step("mount a tmpfs", mount("tmpfs", base, "tmpfs", MountFlags::NOSUID, c"mode=0755,size=256m"))?;
        for name in ["template", "proc", "sandbox", "writable"] {
            step("make a directory", fs::create_dir(base.join(name)))?;
        }
        let root = base.join("template");
        step("mount a tmpfs", mount("tmpfs", &root, "tmpfs", MountFlags::NOSUID, c"mode=0755,size=256m"))?;
        step("bind the template", mount_bind(&root, base.join("writable")))?;
        plan.make(&root)?;
        step(
            "mount /proc of a new pid namespace",
            mount(
                "proc",
                base.join("proc"),
                "proc",
                MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
                None,
            ),
        )?;
        pivot(base).map_err(|error| Failure::new("pivot_root", &error))?;
        Ok(Template { writable: PathBuf::from("/writable") })
    }

    /// Puts the compiled supervisor in its place.
    pub(super) fn install_supervisor(&self, compiled: OwnedFd) -> Result<(), Failure> {
        let path = self.writable.join(&SUPERVISOR[1..]);
        let copy = || -> io::Result<()> {
            let mut target = File::create(&path)?;
            io::copy(&mut File::from(compiled), &mut target)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o444))
        };
        step("install the supervisor", copy())
    }
}

/// What the template is to hold, with every source already open.
struct Plan {
    directories: Vec<PathBuf>,
    links: Vec<(PathBuf, PathBuf)>,
    trees: Vec<(PathBuf, OwnedFd)>,
    devices: Vec<(PathBuf, OwnedFd)>,
    etc_is_of_image: bool,
    interpreter: OwnedFd,
}

impl Plan {
    fn of(preparation: &Preparation) -> Result<Plan, Failure> {
        let image = preparation.rootfs.as_deref();
        let mut plan = Plan {
            directories: MOUNT_POINTS.iter().map(PathBuf::from).collect(),
            links: DEVICE_LINKS
                .iter()
                .map(|(name, to)| (Path::new("dev").join(name), PathBuf::from(to)))
                .collect(),
            trees: Vec::new(),
            devices: Vec::new(),
            etc_is_of_image: image.is_some_and(|directory| directory.join("etc").is_dir()),
            interpreter: open_interpreter(image.unwrap_or(Path::new("/")), &preparation.python)?,
        };
        match image {
            Some(directory) => plan.add_image(directory)?,
            None => plan.add_host(&preparation.python_prefixes)?,
        }
        for name in DEVICES {
            let source = Path::new("/dev").join(name);
            plan.devices.push((Path::new("dev").join(name), open(&source)?));
        }
        Ok(plan)
    }

    fn add_host(&mut self, prefixes: &[PathBuf]) -> Result<(), Failure> {
        for directory in HOST_DIRECTORIES.iter().map(Path::new).chain(prefixes.iter().map(PathBuf::as_path)) {
            self.add(directory, relative(directory))?;
        }
        for name in HOST_ETC {
            self.add(&Path::new("/etc").join(name), Path::new("etc").join(name))?;
        }
        Ok(())
    }

    fn add_image(&mut self, directory: &Path) -> Result<(), Failure> {
        let entries = step(format!("read {}", directory.display()), fs::read_dir(directory))?;
        for entry in entries {
            let name = step(format!("read {}", directory.display()), entry)?.file_name();
            if !NOT_OF_IMAGE.iter().any(|other| name == **other) {
                self.add(&directory.join(&name), PathBuf::from(&name))?;
            }
        }
        Ok(())
    }

    /// A link is made again, anything else is bound; what the host does not have is left out.
    fn add(&mut self, source: &Path, target: PathBuf) -> Result<(), Failure> {
        let Ok(kind) = fs::symlink_metadata(source) else { return Ok(()) };
        if kind.is_symlink() {
            let to = step(format!("read the link {}", source.display()), fs::read_link(source))?;
            self.links.push((target, to));
        } else {
            let tree = open(source)?;
            if kind.is_dir() {
                self.directories.push(target.clone());
            }
            self.trees.push((target, tree));
        }
        Ok(())
    }

    fn make(self, root: &Path) -> Result<(), Failure> {
        for directory in &self.directories {
            step(format!("make /{}", directory.display()), fs::create_dir_all(root.join(directory)))?;
        }
        step("make /etc", fs::create_dir_all(root.join("etc")))?;
        for (name, tree) in &self.trees {
            place(tree.as_fd(), &root.join(name))?;
        }
        for (name, text) in OWN_ETC {
            let done = match self.etc_is_of_image {
                true => cover(root, name, text),
                false => fs::write(root.join("etc").join(name), text),
            };
            step(format!("make /etc/{name}"), done)?;
        }
        for (name, to) in &self.links {
            step(format!("link /{}", name.display()), link(&root.join(name), to))?;
        }
        step("copy the interpreter", copy_interpreter(self.interpreter, root))?;
        for (name, _) in &self.devices {
            step(format!("make /{}", name.display()), File::create(root.join(name)))?;
        }
        step("mount_setattr (Linux 5.12 or newer)", protect(root, libc::MOUNT_ATTR_NODEV, true))?;
        for (name, device) in &self.devices {
            let target = root.join(name);
            place(device.as_fd(), &target)?;
            step("mount_setattr of a device", protect(&target, libc::MOUNT_ATTR_NOEXEC, false))?;
        }
        Ok(())
    }
}

/// Our text over a file of the image's own /etc, which is never written to.
fn cover(root: &Path, name: &str, text: &str) -> io::Result<()> {
    let ours = root.join(&OWN_DIRECTORY[1..]).join(name);
    fs::write(&ours, text)?;
    match mount_bind(&ours, root.join("etc").join(name)) {
        Err(rustix::io::Errno::NOENT) => Ok(()), // an image without this file does without it
        other => Ok(other?),
    }
}

fn link(path: &Path, to: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    symlink(to, path)
}

/// Follows links as the sandbox will: an absolute one begins at its root, not at ours.
fn open_interpreter(root: &Path, python: &Path) -> Result<OwnedFd, Failure> {
    let what = || format!("open the interpreter {} in {}", python.display(), root.display());
    let root = step(what(), rustix::fs::open(root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()))?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    step(what(), openat2(root, python, flags, Mode::empty(), ResolveFlags::IN_ROOT))
}

fn copy_interpreter(source: OwnedFd, root: &Path) -> io::Result<()> {
    let target = root.join(&INTERPRETER[1..]);
    io::copy(&mut File::from(source), &mut File::create(&target)?)?;
    fs::set_permissions(&target, fs::Permissions::from_mode(0o111))
}

fn open(source: &Path) -> Result<OwnedFd, Failure> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    step(format!("open_tree {}", source.display()), open_tree(CWD, source, flags))
}

fn place(tree: BorrowedFd<'_>, target: &Path) -> Result<(), Failure> {
    let what = || format!("move_mount to {}", target.display());
    if !target.exists() {
        if let Some(parent) = target.parent() {
            step(what(), fs::create_dir_all(parent))?;
        }
        step(what(), File::create(target))?;
    }
    step(what(), move_mount(tree, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH))
}

/// Read-only and no set-uid, and `more`; for all that is mounted below, too, where `recursive`.
fn protect(path: &Path, more: u64, recursive: bool) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | more,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    let path = CString::new(path.as_os_str().as_encoded_bytes())?;
    let flags = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the kernel reads a path that ends in NUL and a struct of the size given; both outlive the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes a mounted directory the root and lets go of the old one.
pub(super) fn pivot(root: &Path) -> io::Result<()> {
    chdir(root)?;
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    Ok(chdir("/")?)
}

fn relative(path: &Path) -> PathBuf {
    path.strip_prefix("/").unwrap_or(path).to_path_buf()
}
