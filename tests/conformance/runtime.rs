//! The contract of `codesandbox::runtime::Runtime`, line by line, on every driver and on the fake, without a server.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use codesandbox::runtime::fake::{Fake, Inside};
use codesandbox::runtime::{Duplex, Error, Fate, Sandbox, SandboxId, SandboxSpec, SessionKey, SharedRuntime};
use codesandbox::supervisor::{Caps, SOURCE, Supervisor};
use libtest_mimic::Trial;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::Instant;

use crate::behaviour::Behaviour;
use crate::drivers::{self, Driver};

/// What has not come by then does not come.
const PATIENCE: Duration = Duration::from_secs(20);
/// From nothing done to all done, on every driver: a creation is dropped at each of these moments.
const MOMENTS_MS: [u64; 12] = [0, 1, 2, 4, 8, 15, 30, 50, 75, 100, 150, 250];
/// A supervisor's first frame, without anything in it.
const HELLO_TO_DIE_OF: &[u8] = &[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0];

/// Whose sandboxes outlive them are told apart from those that end with their driver.
struct Subject {
    runtime: SharedRuntime,
    /// Another one on the same engine, of another instance.
    other: SharedRuntime,
    outlives: bool,
}

macro_rules! lines {
    ($($name:ident),* $(,)?) => {
        /// Each line of the contract, by name.
        async fn check(name: &str, subject: Subject) {
            match name {
                $(stringify!($name) => $name(&subject).await,)*
                other => unreachable!("{other} is no line"),
            }
        }
        const LINES: &[&str] = &[$(stringify!($name)),*];
    };
}

lines! {
    a_new_sandbox_runs_and_is_nobodys,
    a_claim_is_in_the_list_with_its_time,
    a_second_claim_goes_over_the_first,
    a_claim_of_what_is_gone_is_gone,
    a_removed_sandbox_is_gone,
    remove_twice_is_fine,
    removals_at_once_of_one_sandbox_are_fine,
    removal_of_one_that_is_just_ending_is_fine,
    remove_of_what_never_was_is_fine,
    the_fate_of_what_never_was_is_gone,
    attach_to_what_is_gone_is_gone,
    attach_again_where_sandboxes_outlive_the_server,
    the_list_holds_its_own_instance_alone,
    the_stream_of_a_removed_sandbox_ends,
    sandboxes_made_at_once_are_different,
    a_creation_dropped_midway_leaves_nothing,
    the_secret_does_not_change,
}

/// As trials of a driver.
pub(crate) fn behaviours() -> Vec<Behaviour> {
    let line = |name: &&'static str| {
        let name = *name;
        Behaviour::new(format!("runtime::{name}"), move |driver: &Driver| {
            in_tokio(async {
                check(name, subject(driver).await).await;
            });
        })
    };
    LINES.iter().map(line).collect()
}

/// As trials of the fake.
pub(crate) fn on_the_fake() -> Vec<Trial> {
    let fake = || -> SharedRuntime { Fake::new(silent_guest) };
    let line = |name: &&'static str| {
        let name = *name;
        Trial::test(format!("fake::runtime::{name}"), move || {
            in_tokio(async {
                check(name, Subject { runtime: fake(), other: fake(), outlives: true }).await;
            });
            Ok(())
        })
    };
    LINES.iter().map(line).collect()
}

/// Holds its end of the stream, and says nothing.
fn silent_guest(stream: DuplexStream, _inside: Arc<Inside>) -> tokio::task::AbortHandle {
    let hold = async move {
        let _stream = stream;
        std::future::pending::<()>().await;
    };
    tokio::spawn(hold).abort_handle()
}

/// The conversation over a fresh stream.
pub(crate) async fn greeted(stream: Duplex) -> Supervisor {
    let caps = Caps {
        stdout: 1024,
        stderr: 1024,
        result: 1024,
        error: 1024,
        listing_lines: 10,
        artifacts: 0,
        grace_ms: 1000,
        rlimits: Default::default(),
    };
    Supervisor::attach(stream, &caps, Instant::now() + PATIENCE).await.unwrap().0
}

pub(crate) fn in_tokio(future: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(future);
    runtime.shutdown_timeout(PATIENCE); // what a driver does in the background, as a removal, comes to its end
}

async fn subject(driver: &Driver) -> Subject {
    let [runtime, other] = [drivers::new_instance(), drivers::new_instance()];
    let (runtime, other) = (driver.runtime(&runtime, SOURCE).await, driver.runtime(&other, SOURCE).await);
    Subject { runtime, other, outlives: !driver.is_embedded() }
}

pub(crate) fn spec() -> SandboxSpec {
    SandboxSpec {
        memory_bytes: 256 << 20,
        processes: 32,
        cpus: 1.0,
        open_files: 256,
        workspace_bytes: 8 << 20,
        tmp_bytes: 8 << 20,
        shm_bytes: 8 << 20,
        inodes: 1000,
    }
}

fn owner(letter: &str) -> SessionKey {
    SessionKey(letter.repeat(32))
}

impl Subject {
    async fn create(&self) -> Sandbox {
        self.runtime.create(&spec()).await.unwrap()
    }

    /// The stream has to be dropped before.
    async fn remove(&self, sandbox: Sandbox) -> SandboxId {
        let Sandbox { id, stream } = sandbox;
        drop(stream);
        self.runtime.remove(&id).await.unwrap();
        id
    }

    async fn listed(&self) -> Vec<SandboxId> {
        self.runtime.list().await.unwrap().into_iter().map(|found| found.id).collect()
    }
}

async fn a_new_sandbox_runs_and_is_nobodys(subject: &Subject) {
    let sandbox = subject.create().await;
    let fate = subject.runtime.fate(&sandbox.id).await.unwrap();
    assert!(matches!(fate, Fate::Running { .. }), "{fate:?}");
    let found = subject.runtime.list().await.unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!((&found[0].id, &found[0].claim), (&sandbox.id, &None));
    subject.remove(sandbox).await;
}

async fn a_claim_is_in_the_list_with_its_time(subject: &Subject) {
    let (one, other) = (subject.create().await, subject.create().await);
    let before = SystemTime::now() - Duration::from_millis(2);
    subject.runtime.claim(&one.id, &owner("a")).await.unwrap().await.unwrap();
    for found in subject.runtime.list().await.unwrap() {
        match found.claim {
            Some(claim) => {
                assert_eq!((&found.id, &claim.owner), (&one.id, &owner("a")));
                assert!(claim.at >= before && claim.at <= SystemTime::now(), "{claim:?}");
            }
            None => assert_eq!(found.id, other.id),
        }
    }
    assert!(matches!(subject.runtime.fate(&one.id).await.unwrap(), Fate::Running { .. }));
    subject.remove(one).await;
    subject.remove(other).await;
}

async fn a_second_claim_goes_over_the_first(subject: &Subject) {
    let sandbox = subject.create().await;
    for letter in ["a", "b"] {
        subject.runtime.claim(&sandbox.id, &owner(letter)).await.unwrap().await.unwrap();
    }
    let found = subject.runtime.list().await.unwrap();
    assert_eq!(found[0].claim.as_ref().unwrap().owner, owner("b"));
    // One session's next sandbox may come while its last one is still on its way out.
    let next = subject.create().await;
    subject.runtime.claim(&next.id, &owner("b")).await.unwrap().await.unwrap();
    subject.remove(sandbox).await;
    subject.remove(next).await;
}

async fn a_claim_of_what_is_gone_is_gone(subject: &Subject) {
    let sandbox = subject.create().await;
    let id = subject.remove(sandbox).await;
    let claimed = async { subject.runtime.claim(&id, &owner("a")).await?.await }.await;
    assert!(matches!(claimed, Err(Error::Gone(_))), "{claimed:?}");
}

async fn a_removed_sandbox_is_gone(subject: &Subject) {
    let sandbox = subject.create().await;
    let id = subject.remove(sandbox).await;
    assert_eq!(subject.runtime.fate(&id).await.unwrap(), Fate::Gone);
    assert_eq!(subject.listed().await, []);
}

async fn remove_twice_is_fine(subject: &Subject) {
    let sandbox = subject.create().await;
    let id = subject.remove(sandbox).await;
    subject.runtime.remove(&id).await.unwrap();
    assert_eq!(subject.runtime.fate(&id).await.unwrap(), Fate::Gone);
}

async fn removals_at_once_of_one_sandbox_are_fine(subject: &Subject) {
    let Sandbox { id, stream } = subject.create().await;
    drop(stream);
    let remove = || subject.runtime.remove(&id);
    let (first, second, third) = tokio::join!(remove(), remove(), remove());
    for removed in [first, second, third] {
        removed.unwrap();
        assert_eq!(subject.runtime.fate(&id).await.unwrap(), Fate::Gone, "who was told so may rely on it");
    }
}

async fn removal_of_one_that_is_just_ending_is_fine(subject: &Subject) {
    for step in (0..12).step_by(3) {
        let made = futures_util::future::join_all((0..3).map(|_| subject.create())).await;
        for (step, sandbox) in (step..).zip(made) {
            let Sandbox { id, stream } = dying(sandbox).await;
            tokio::time::sleep(Duration::from_millis(4 * step)).await;
            drop(stream);
            subject.runtime.remove(&id).await.unwrap();
        }
    }
    if subject.runtime.name() == "fake" {
        return; // has no supervisor
    }
    let Sandbox { id, stream } = dying(subject.create().await).await;
    let ended = async {
        while matches!(subject.runtime.fate(&id).await.unwrap(), Fate::Running { .. }) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, ended).await.expect("these have been ending, indeed");
    drop(stream);
    subject.runtime.remove(&id).await.unwrap();
}

/// Has its supervisor end.
async fn dying(mut sandbox: Sandbox) -> Sandbox {
    sandbox.stream.write_all(HELLO_TO_DIE_OF).await.unwrap();
    sandbox.stream.flush().await.unwrap();
    sandbox
}

async fn remove_of_what_never_was_is_fine(subject: &Subject) {
    for name in ["0123456789abcdef", "never", "99999"] {
        subject.runtime.remove(&SandboxId(name.into())).await.unwrap();
    }
}

async fn the_fate_of_what_never_was_is_gone(subject: &Subject) {
    assert_eq!(subject.runtime.fate(&SandboxId("99999".into())).await.unwrap(), Fate::Gone);
}

async fn attach_to_what_is_gone_is_gone(subject: &Subject) {
    let sandbox = subject.create().await;
    let id = subject.remove(sandbox).await;
    for id in [id, SandboxId("99999".into())] {
        let attached = subject.runtime.attach(&id).await;
        assert!(matches!(attached, Err(Error::Gone(_))), "{attached:?}");
    }
}

async fn attach_again_where_sandboxes_outlive_the_server(subject: &Subject) {
    let Sandbox { id, stream } = subject.create().await;
    drop(stream);
    match subject.runtime.attach(&id).await {
        Ok(again) => {
            assert!(subject.outlives && again.id == id);
            assert!(matches!(subject.runtime.fate(&id).await.unwrap(), Fate::Running { .. }));
            let tried = tokio::time::timeout(PATIENCE, async {
                while subject.listed().await != [id.clone()] {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            });
            tried.await.expect("whatever was tried to attach is removed behind one's back");
            subject.remove(again).await;
        }
        Err(error) => {
            assert!(!subject.outlives && matches!(error, Error::Gone(_)), "{error}");
            subject.runtime.remove(&id).await.unwrap();
        }
    }
}

async fn the_list_holds_its_own_instance_alone(subject: &Subject) {
    let sandbox = subject.create().await;
    let theirs = subject.other.create(&spec()).await.unwrap();
    assert_eq!(subject.listed().await, std::slice::from_ref(&sandbox.id));
    let others: Vec<_> = subject.other.list().await.unwrap().into_iter().map(|found| found.id).collect();
    assert_eq!(others, std::slice::from_ref(&theirs.id));
    subject.remove(sandbox).await;
    assert!(matches!(subject.other.fate(&theirs.id).await.unwrap(), Fate::Running { .. }));
    drop(theirs.stream);
    subject.other.remove(&theirs.id).await.unwrap();
}

async fn the_stream_of_a_removed_sandbox_ends(subject: &Subject) {
    let Sandbox { id, mut stream } = subject.create().await;
    let reading = tokio::spawn(async move {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes).await; // an error is an end, too
    });
    subject.runtime.remove(&id).await.unwrap();
    tokio::time::timeout(PATIENCE, reading).await.expect("the stream ends").unwrap();
}

async fn sandboxes_made_at_once_are_different(subject: &Subject) {
    let create = || subject.create();
    let (a, b, c, d) = tokio::join!(create(), create(), create(), create());
    let mut ids: Vec<_> = [&a, &b, &c, &d].iter().map(|sandbox| sandbox.id.to_string()).collect();
    ids.sort();
    ids.dedup();
    assert_eq!((ids.len(), subject.listed().await.len()), (4, 4));
    for sandbox in [a, b, c, d] {
        subject.remove(sandbox).await;
    }
    assert_eq!(subject.listed().await, []);
}

async fn a_creation_dropped_midway_leaves_nothing(subject: &Subject) {
    for moment in MOMENTS_MS {
        let spec = spec();
        let create = subject.runtime.create(&spec);
        if let Ok(made) = tokio::time::timeout(Duration::from_millis(moment), create).await {
            subject.remove(made.unwrap()).await;
        }
    }
    let gone = async {
        // A creation that goes on in the background has not made anything yet: nothing has to stay so.
        let mut nothing = 0;
        while nothing < 10 {
            nothing = if subject.listed().await.is_empty() { nothing + 1 } else { 0 };
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let waited = tokio::time::timeout(PATIENCE, gone).await;
    assert!(waited.is_ok(), "left behind: {:?}", subject.listed().await);
    let sandbox = subject.create().await;
    subject.remove(sandbox).await;
}

async fn the_secret_does_not_change(subject: &Subject) {
    let secret = subject.runtime.secret();
    let sandbox = subject.create().await;
    assert!(subject.runtime.secret() == secret);
    subject.remove(sandbox).await;
    assert!(subject.runtime.secret() == secret);
}
