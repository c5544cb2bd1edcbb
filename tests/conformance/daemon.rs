//! The real daemons in trouble: stopped, killed and started again, under a server that goes on.
//!
//! Only for engines below the directory that TEST_ENGINES_TO_KILL names: see tests/trouble.sh, which runs them one by
//! one. Everywhere else they are passed over.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::drivers::Driver;
use crate::engine::Engine;
use crate::support::eventually;
use crate::trouble::{House, sleeping};

behaviours! {
    "daemon":
    a_daemon_that_is_stopped_for_a_while,
    a_daemon_that_is_killed_and_started_again,
    a_daemon_that_is_killed_is_not_missed_by_who_is_talked_to_past_it,
}

/// Whether a driver's daemon may be stopped and killed.
pub(crate) fn is_ours(name: &str) -> bool {
    Engine::named_by(&format!("TEST_{}_HOST", name.to_uppercase()))
        .is_ok_and(|engine| may_die(engine.socket()))
}

/// Whether the engine at that socket is there to be killed.
fn may_die(socket: &Path) -> bool {
    std::env::var_os("TEST_ENGINES_TO_KILL")
        .is_some_and(|directory| !directory.is_empty() && socket.starts_with(directory))
}

const USERS: [&str; 3] = ["a", "b", "c"];
/// For which the daemon is stopped.
const STOPPED: Duration = Duration::from_secs(10);

/// The processes of an engine's daemon, and not those of its containers.
struct Daemon {
    pids: Vec<i32>,
}

impl Daemon {
    /// By the directory that its socket is in: `dockerd` bears it in its configuration's path, Podman's service in
    /// its socket's.
    fn of(driver: &Driver) -> Daemon {
        let socket = driver.engine().expect("daemons are for engines with an API").socket();
        assert!(may_die(socket), "{} is not ours to kill", socket.display());
        let home = format!("{}/", socket.parent().expect("a socket is in a directory").display());
        let is_one = |arguments: &[&str]| match arguments {
            [program, rest @ ..] if program.ends_with("dockerd") => {
                rest.iter().any(|argument| argument.starts_with(&home))
            }
            [program, rest @ ..] if program.ends_with("podman") => {
                rest.contains(&"service") && rest.iter().any(|argument| argument.contains(&home))
            }
            _ => false,
        };
        let mut pids = Vec::new();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let line = std::fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
            if is_one(&line.split('\0').collect::<Vec<_>>()) {
                pids.push(pid);
            }
        }
        assert!(!pids.is_empty(), "there is no daemon in {home}");
        Daemon { pids }
    }

    fn signal(&self, signal: i32) {
        for pid in &self.pids {
            // SAFETY: sends a signal to a process that was just found to be a daemon that may die.
            unsafe { libc::kill(*pid, signal) };
        }
    }

    fn is_there(&self) -> bool {
        self.pids.iter().any(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
        })
    }
}

/// By tests/engines.sh, as it was started.
fn start_again(driver: &Driver) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/engines.sh");
    let output = Command::new(script).args(["--only", driver.name, "revive"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Whether sandboxes outlive a daemon that was killed, here.
fn containers_survive(driver: &Driver) -> bool {
    !driver.is_docker() || std::env::var("ENGINES_LIVE_RESTORE").as_deref() != Ok("false")
}

/// Whose users are talked to through the engine, as those of one on another host are.
fn house<'a>(driver: &'a Driver, direct: bool) -> House<'a> {
    House::new(driver, &["--set", &driver.direct(direct)])
}

fn a_daemon_that_is_stopped_for_a_while(driver: &Driver) {
    let house = house(driver, false);
    let daemon = Daemon::of(driver);
    std::thread::scope(|scope| {
        let house = &house;
        let long = scope.spawn(|| house.asks("a", &sleeping(2), 60_000));
        let short = scope.spawn(|| house.asks("b", &sleeping(2), 3_000));
        for user in ["a", "b"] {
            eventually("it runs", || house.server.get(&format!("/sessions/{user}")).1.contains("running"));
        }
        std::thread::sleep(Duration::from_millis(500)); // the frames are on their way to the sandboxes
        daemon.signal(libc::SIGSTOP);
        let begun = Instant::now();
        let idle = scope.spawn(|| house.asks("c", "result = 1", 2_000));
        let new = ["n0", "n1", "n2"].map(|user| scope.spawn(|| house.asks(user, "result = 1", 2_000)));
        std::thread::sleep(STOPPED.saturating_sub(begun.elapsed()));
        daemon.signal(libc::SIGCONT);
        let long = long.join().unwrap();
        assert_eq!((long.status, &long.answer["result"]), (200, &json!("slept")), "{long:?}");
        short.join().unwrap().is_fine(Duration::from_secs(3 + 7));
        idle.join().unwrap().is_fine(Duration::from_secs(2 + 7));
        for new in new {
            new.join().unwrap().is_fine(Duration::from_secs(15 + 2 + 7));
        }
    });
    USERS.iter().for_each(|user| house.has_its_file(user));
    assert_eq!(house.lost(), [""; 0]);
    house.is_at_rest();
}

fn a_daemon_that_is_killed_is_not_missed_by_who_is_talked_to_past_it(driver: &Driver) {
    if !containers_survive(driver) {
        return; // nobody is
    }
    let house = house(driver, true);
    let daemon = Daemon::of(driver);
    daemon.signal(libc::SIGKILL);
    eventually("it is dead", || !daemon.is_there());
    USERS.iter().for_each(|user| house.has_its_file(user));
    eventually("it says that it is not ready", || !house.is_ready());
    // There are warm ones, and nobody could be told whose they are.
    house.asks("n0", "result = 1", 10_000).is_unavailable(Duration::from_secs(10 + 7));
    start_again(driver);
    USERS.iter().for_each(|user| house.has_its_file(user));
    for user in ["n0", "n1", "n2"] {
        house.write(user);
        house.has_its_file(user);
    }
    eventually("it is ready again", || house.is_ready());
    assert_eq!(house.lost(), [""; 0]);
    house.is_at_rest();
}

fn a_daemon_that_is_killed_and_started_again(driver: &Driver) {
    let house = house(driver, false);
    std::thread::scope(|scope| {
        let house = &house;
        let running = scope.spawn(|| house.asks("a", &sleeping(60), 60_000));
        eventually("it runs", || house.server.get("/sessions/a").1.contains("running"));
        std::thread::sleep(Duration::from_millis(500)); // the frame is on its way to the sandbox
        let daemon = Daemon::of(driver);
        daemon.signal(libc::SIGKILL);
        running.join().unwrap().is_fine(Duration::from_secs(60 + 7));
        eventually("it is dead", || !daemon.is_there());
    });
    eventually("it says that it is not ready", || !house.is_ready());
    for user in USERS.into_iter().chain(["n0", "n1"]) {
        house.asks(user, "result = 1", 10_000).is_unavailable(Duration::from_secs(10 + 7));
    }
    start_again(driver);
    if containers_survive(driver) {
        USERS.iter().for_each(|user| house.has_its_file(user));
        assert_eq!(house.lost(), [""; 0]);
    } else {
        USERS.iter().for_each(|user| house.has_lost_its_file(user));
        USERS.iter().for_each(|user| house.write(user));
        USERS.iter().for_each(|user| house.has_its_file(user));
    }
    for user in ["n0", "n1", "n2"] {
        house.write(user);
        house.has_its_file(user);
    }
    eventually("it is ready again", || house.is_ready());
    house.is_at_rest();
}
