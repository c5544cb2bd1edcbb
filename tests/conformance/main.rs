//! One suite, every behaviour on every driver: `cargo test --test conformance docker::` for one of them.
//!
//! The trials are named `DRIVER::PART::BEHAVIOUR`. A driver that is absent is passed over with the reason, unless
//! TEST_REQUIRE names it. `tests/engines.sh run cargo test --test conformance` brings the engines up.
//!
//! A driver's servers are shared by its trials; when the last of these has ended they are stopped, and whatever
//! is left of their sandboxes fails the suite.

#[macro_use]
mod behaviour;
mod aftermath;
mod contract;
mod daemon;
mod drivers;
mod engine;
mod fates;
mod files;
mod hostile;
mod isolation;
mod kernel;
mod proxy;
mod pythons;
mod recovery;
mod runtime;
mod stream;
// Each of the two test programs uses a part of it.
#[allow(dead_code)]
#[path = "../api/support.rs"]
mod support;
mod trouble;

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Completion, Trial};

use behaviour::Behaviour;
use drivers::Driver;

/// At once: two cores are to be busy, not swamped, and most of a trial is waiting for an engine.
const THREADS: usize = 4;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(THREADS);
    let mut trials: Vec<Trial> = drivers::NAMES.into_iter().flat_map(trials_of).collect();
    trials.extend(runtime::on_the_fake());
    let conclusion = libtest_mimic::run(&arguments, trials);
    let complaints = drivers::complaints();
    for complaint in &complaints {
        eprintln!("FAILED: {complaint}");
    }
    if complaints.is_empty() { conclusion.exit_code() } else { ExitCode::from(101) }
}

/// Every behaviour that a driver is held to.
///
/// Other versions of an engine, and other ways to set it up, differ in the API and in what outlives a server: they
/// are held to the contract (another version), the driver's own, the fates, the recovery and the trouble. What a program
/// meets inside is the kernel, the image, our supervisor and the settings that the driver asks for, which are the same:
/// that is tried on one of each kind. What is said through an engine's own stream, and not past it, is tried on
/// `docker_relay`, `podman5` and `podman_stdin`.
fn behaviours_of(name: &str) -> Vec<Behaviour> {
    let mut all = Vec::new();
    if name != "podman_stdin" {
        all.extend(contract::behaviours());
    }
    if !drivers::is_a_variant(name) || name == "docker_relay" {
        all.extend([files::behaviours(), kernel::behaviours(), stream::behaviours()].concat());
    }
    if !drivers::is_a_variant(name) {
        all.extend([aftermath::behaviours(), isolation::behaviours(), hostile::behaviours()].concat());
    }
    if name == "docker_relay" {
        all.extend(recovery::behaviours());
    } else if !name.starts_with("embedded") {
        let parts =
            [fates::behaviours(), pythons::behaviours(), recovery::behaviours(), trouble::behaviours()];
        all.extend(parts.concat());
    }
    if daemon::is_ours(name) {
        all.extend(daemon::behaviours());
    }
    all.extend(runtime::behaviours());
    all
}

fn trials_of(name: &'static str) -> Vec<Trial> {
    let behaviours = behaviours_of(name).into_iter();
    match Driver::find(name) {
        Ok(driver) => {
            let driver = Arc::new(driver);
            let trial = |Behaviour { name: behaviour, holds }: Behaviour| {
                let driver = driver.clone();
                Trial::test(format!("{name}::{behaviour}"), move || {
                    holds(&driver);
                    Ok(())
                })
            };
            behaviours.map(trial).collect()
        }
        Err(why) if drivers::is_required(name) => {
            vec![Trial::test(format!("{name}::is_there"), move || Err(why.into()))]
        }
        Err(why) => {
            eprintln!("{name} is passed over: {why}");
            let ignored = |behaviour: Behaviour| {
                let why = why.clone();
                let name = format!("{name}::{}", behaviour.name);
                Trial::ignorable_test(name, move || Ok(Completion::ignored_with(why)))
            };
            behaviours.map(ignored).collect()
        }
    }
}
