//! `embedded.rootfs`: the directory of an unpacked image in place of this host's own files.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::support::{PROGRAM, Server};

const PASSWD: &str = "root:x:0:0:the image's:/root:/bin/sh\n";

/// An image with little more than Python in it: the system's interpreter, its library and what it links to.
fn image() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    fs::set_permissions(root, fs::Permissions::from_mode(0o755)).unwrap();
    let python = fs::canonicalize("/usr/bin/python3").expect(".ci/setup installs the system's Python");
    let name = python.file_name().unwrap().to_str().unwrap();
    copy(&python, root);
    std::os::unix::fs::symlink(name, root.join("usr/bin/python3")).unwrap();
    copy(&Path::new("/usr/lib").join(name), root);
    for library in libraries(&python) {
        copy(&library, root);
    }
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::write(root.join("etc/passwd"), PASSWD).unwrap();
    fs::write(root.join("marker"), "of the image").unwrap();
    directory
}

fn libraries(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

/// To the same path below `root`; what a link points to, not the link.
fn copy(source: &Path, root: &Path) {
    let target = root.join(source.strip_prefix("/").unwrap());
    fs::create_dir_all(target.parent().unwrap()).unwrap();
    assert!(Command::new("cp").arg("-rL").arg(source).arg(&target).status().unwrap().success());
}

fn speaks_from_the_image(server: &Server) {
    let code = "import os, pwd, sys\n\
                result = [open('/marker').read(), sorted(os.listdir('/usr')), pwd.getpwuid(os.getuid()).pw_name]";
    let answer = server.run("u", code);
    assert_eq!(answer["result"], json!(["of the image", ["bin", "lib"], "sandbox"]), "{answer}");
    let refused = server.run("u", "open('/marker', 'w')");
    assert_eq!(refused["error_detail"]["name"], "OSError", "it is read-only: {refused}");
}

#[test]
fn an_unpacked_image_serves_and_is_left_as_it_was() {
    let image = image();
    let rootfs = format!("embedded.rootfs={}", image.path().display());
    speaks_from_the_image(&Server::start(&["--set", &rootfs]));
    speaks_from_the_image(&Server::start_as_ordinary_user(&["--set", &rootfs]));
    assert_eq!(fs::read_to_string(image.path().join("etc/passwd")).unwrap(), PASSWD);
    assert!(!image.path().join("workspace").exists());
}

#[test]
fn a_directory_without_python_is_refused_with_what_would_help() {
    let empty = tempfile::tempdir().unwrap();
    let rootfs = format!("embedded.rootfs={}", empty.path().display());
    let output = Command::new(PROGRAM).args(["doctor", "--set", &rootfs]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("find python3 in") && said.contains("embedded.python"), "{said}");
}
