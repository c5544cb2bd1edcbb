//! The floors of `src/lib.rs`: no lower one names a higher one.

use std::fs;
use std::path::{Path, PathBuf};

/// From the bottom; a module may name those of its own floor and below, except where said.
const FLOORS: [&[&str]; 7] = [
    &["metrics", "phase"],
    &["runtime"],
    &["runtime::docker", "runtime::embedded", "runtime::fake", "runtime::podman"],
    &["supervisor"],
    &["pool", "probe"],
    &["session", "reaper", "reconciler"],
    &["server"],
];
/// The top: may name all.
const TOP: [&str; 4] = ["cli", "config", "main", "lib"];

#[test]
fn no_lower_floor_names_a_higher_one() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut looked_at = 0;
    for file in sources(&root) {
        let module = module_of(file.strip_prefix(&root).unwrap());
        if TOP.contains(&module.split("::").next().unwrap()) {
            continue;
        }
        let floor = floor_of(&module)
            .unwrap_or_else(|| panic!("{module} stands on no floor: add it here and in lib.rs"));
        for named in named_modules(&fs::read_to_string(&file).unwrap()) {
            looked_at += 1;
            let top = TOP.contains(&named.split("::").next().unwrap());
            let other = floor_of(&named);
            let starts_drivers = module == "runtime" && named.starts_with("runtime::");
            assert!(
                !top && other.is_none_or(|other| other <= floor) || starts_drivers,
                "{module} names {named}"
            );
            let sideways = floor == 2 && other == Some(2) && driver(&module) != driver(&named);
            assert!(!sideways, "the driver {module} names the driver {named}");
        }
    }
    assert!(looked_at > 20, "the check read next to nothing: {looked_at}");
}

#[test]
fn the_check_sees_a_wrong_name() {
    assert_eq!(named_modules("use crate::pool::{self, Pool};"), ["pool::{self"]);
    assert_eq!(named_modules("use crate::{pool, session};"), ["pool", "session"]);
    assert!(floor_of("pool") > floor_of("supervisor::protocol"));
    assert_eq!(floor_of("runtime::embedded::link"), Some(2));
    assert_eq!(floor_of("runtime::spec"), Some(1));
}

fn driver(module: &str) -> Option<&str> {
    module.split("::").nth(1)
}

fn floor_of(module: &str) -> Option<usize> {
    let stands = |name: &&str| {
        module == *name || module.strip_prefix(*name).is_some_and(|rest| rest.starts_with("::"))
    };
    FLOORS.iter().rposition(|floor| floor.iter().any(stands))
}

fn module_of(file: &Path) -> String {
    let path = file.with_extension("").to_string_lossy().replace('/', "::");
    path.strip_suffix("::mod").unwrap_or(&path).to_owned()
}

/// What follows each `crate::`, up to two parts.
fn named_modules(source: &str) -> Vec<String> {
    let mut names = Vec::new();
    for line in source.lines().filter(|line| !line.trim_start().starts_with("//")) {
        for rest in line.split("crate::").skip(1) {
            match rest.strip_prefix('{') {
                Some(list) => names.extend(
                    list.split(&[',', '}', ';'][..])
                        .map(|name| name.trim().to_owned())
                        .filter(|name| !name.is_empty()),
                ),
                None => names.push(
                    rest.split(&[' ', ';', '(', ',', ')', '<'][..])
                        .next()
                        .unwrap_or_default()
                        .splitn(3, "::")
                        .take(2)
                        .collect::<Vec<_>>()
                        .join("::"),
                ),
            }
        }
    }
    names
}

fn sources(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}
