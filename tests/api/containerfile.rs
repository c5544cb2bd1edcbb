//! `Containerfile` copies what the program is made of, and no more; `tests/images.sh` really builds it.

use std::fs;
use std::path::Path;
use std::process::Command;

/// The sources of its build stage, as `COPY A B TARGET` names them.
fn copied() -> Vec<String> {
    let text = fs::read_to_string("Containerfile").unwrap();
    let stage = text.split("\nFROM ").nth(1).expect("a stage to build in");
    let lines = stage.lines().filter_map(|line| line.strip_prefix("COPY "));
    let sources = lines.map(|line| line.split(' ').collect::<Vec<_>>()).flat_map(|mut words| {
        words.pop();
        words
    });
    sources.map(str::to_owned).collect()
}

#[test]
fn cargo_can_read_the_package_from_what_is_copied() {
    let place = tempfile::tempdir().unwrap();
    let sources = copied();
    assert!(sources.iter().any(|source| source == "Cargo.toml"), "{sources:?}");
    for source in &sources {
        let target = place.path().join(source);
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        let copied = Command::new("cp").arg("-r").args([Path::new(source), &target]).status().unwrap();
        assert!(copied.success(), "{source}");
    }
    // The cheapest that looks for each target as a build does: `metadata` forgives one that is not there.
    let host = format!("{}-unknown-linux-gnu", std::env::consts::ARCH); // whose crates are here
    let fetch = ["fetch", "--offline", "--locked", "--target", &host];
    let output = Command::new(env!("CARGO")).args(fetch).current_dir(place.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn what_is_copied_is_what_the_engines_may_see() {
    let seen =
        fs::read_to_string(".containerignore").or_else(|_| fs::read_to_string(".dockerignore")).unwrap();
    for source in copied() {
        assert!(seen.lines().any(|line| line == format!("!{source}")), "{source}");
    }
}
