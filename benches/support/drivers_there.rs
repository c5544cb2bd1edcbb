//! The drivers that are measured, where they are there; the suite's own way to find them.

use crate::drivers::Driver;

/// Each of them; one that is absent is told, with the reason.
pub(crate) fn drivers_there(bench: &str) -> impl Iterator<Item = Driver> {
    ["embedded", "docker", "podman"].into_iter().filter_map(move |name| match Driver::find(name) {
        Ok(driver) => Some(driver),
        Err(why) => {
            eprintln!("{bench}/{name}: not measured: {why}");
            None
        }
    })
}
