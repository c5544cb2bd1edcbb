//! Floors 4 and 5 on the fake engine: who holds which sandbox, until when. Time is paused.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use codesandbox::metrics::Metrics;
use codesandbox::pool::{self, Pool};
use codesandbox::reaper::reap;
use codesandbox::runtime::fake::{Call, Fake, Fault};
use codesandbox::runtime::{
    self, Claiming, Engine, Fate, Found, KeySecret, Runtime, Sandbox, SandboxId, SandboxSpec, SessionKey,
};
use codesandbox::session::{self, Done, Error, Owner, Sessions};
use codesandbox::supervisor::{self, Caps, ErrorKind, Run};
use tokio::io::DuplexStream;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, sleep, timeout};

pub(crate) const MS: Duration = Duration::from_millis(1);
pub(crate) const SECOND: Duration = Duration::from_secs(1);
/// Longer than any wait of the floors under test, where none is meant to be endless.
const LONG: Duration = Duration::from_secs(600);

/// The fake engine with slow calls, and eyes on what must hold at any moment.
#[derive(Debug)]
struct Slow {
    fake: Arc<Fake>,
    pause: Duration,
    most: AtomicUsize,
    /// The next sandbox has ended when it is there, and its stream says nothing and has no end.
    stillborn: AtomicBool,
    silent: Mutex<Vec<DuplexStream>>,
}

#[async_trait]
impl Runtime for Slow {
    fn name(&self) -> &'static str {
        self.fake.name()
    }

    fn secret(&self) -> KeySecret {
        self.fake.secret()
    }

    async fn probe(&self, first: &SandboxId, spec: &SandboxSpec) -> runtime::Result<Engine> {
        self.fake.probe(first, spec).await
    }

    async fn create(&self, spec: &SandboxSpec) -> runtime::Result<Sandbox> {
        sleep(self.pause).await;
        let made = self.fake.create(spec).await;
        self.most.fetch_max(self.fake.alive(), Ordering::SeqCst);
        if self.stillborn.swap(false, Ordering::SeqCst) {
            let id = made?.id;
            self.fake.kill(id.0.parse().unwrap());
            let (stream, other) = tokio::io::duplex(1 << 20);
            self.silent.lock().unwrap().push(other);
            return Ok(Sandbox { id, stream: Box::new(stream) });
        }
        made
    }

    async fn attach(&self, id: &SandboxId) -> runtime::Result<Sandbox> {
        self.fake.attach(id).await
    }

    async fn claim(&self, id: &SandboxId, owner: &SessionKey) -> runtime::Result<Claiming> {
        sleep(self.pause).await;
        self.fake.claim(id, owner).await
    }

    async fn list(&self) -> runtime::Result<Vec<Found>> {
        self.fake.list().await
    }

    async fn fate(&self, id: &SandboxId) -> runtime::Result<Fate> {
        sleep(self.pause).await;
        self.fake.fate(id).await
    }

    async fn remove(&self, id: &SandboxId) -> runtime::Result<()> {
        sleep(self.pause).await;
        self.fake.remove(id).await
    }
}

/// Floors 1 to 5, of a test's own.
struct House {
    engine: Arc<Slow>,
    fake: Arc<Fake>,
    metrics: Arc<Metrics>,
    sessions: Sessions,
    reaper: AbortHandle,
}

/// What differs from test to test.
#[derive(Clone, Copy)]
struct Plan {
    pause: Duration,
    size: usize,
    max: usize,
    queue: usize,
    idle_timeout: Duration,
    lifetime_max: Duration,
}

const PLAN: Plan = Plan {
    pause: Duration::ZERO,
    size: 0,
    max: 4,
    queue: 2,
    idle_timeout: Duration::from_secs(60),
    lifetime_max: Duration::from_secs(3600),
};

impl House {
    fn new(plan: Plan) -> House {
        let Plan { pause, size, max, queue, idle_timeout, lifetime_max } = plan;
        let fake = Fake::new(supervisor::fake::spawn);
        let engine = Arc::new(Slow {
            fake: fake.clone(),
            pause,
            most: AtomicUsize::new(0),
            stillborn: AtomicBool::new(false),
            silent: Mutex::default(),
        });
        let metrics = Arc::new(Metrics::new());
        let settings = pool::Settings {
            size,
            starting_max: 2,
            capacity: max + size,
            create_timeout: 20 * SECOND,
            wait_timeout: 60 * SECOND,
            recycle_after: 3600 * SECOND,
            idle_after: None,
            seed: 0,
            spec: spec(),
            caps: caps(),
        };
        let pool = Pool::new(engine.clone(), settings, metrics.clone());
        let settings = session::Settings { idle_timeout, lifetime_max, max, queue, keep: false };
        let sessions = Sessions::new(pool, settings, metrics.clone());
        let reaper = tokio::spawn(reap(sessions.clone())).abort_handle();
        House { engine, fake, metrics, sessions, reaper }
    }

    async fn run(&self, user_id: &str, code: &str) -> Result<Done, Error> {
        run(&self.sessions, user_id, code).await
    }

    /// In a task of its own, which has got as far as it gets without time passing.
    async fn begin(&self, user_id: &str, code: &str) -> JoinHandle<Result<Done, Error>> {
        let (sessions, user_id, code) = (self.sessions.clone(), user_id.to_owned(), code.to_owned());
        let task = tokio::spawn(async move { run(&sessions, &user_id, &code).await });
        settle().await;
        task
    }

    async fn delete(&self, user_id: &str) -> Result<(), Error> {
        self.sessions.delete(Owner { tenant: "", user_id }).await
    }

    fn state(&self, user_id: &str) -> Option<&'static str> {
        self.sessions.describe(Owner { tenant: "", user_id }).map(|description| description.state)
    }

    fn outcomes(&self, outcome: &str) -> u64 {
        self.metrics.runs.with_label_values(&[outcome]).get()
    }

    fn ended(&self, reason: &str) -> u64 {
        self.metrics.sessions_ended.with_label_values(&[reason]).get()
    }

    fn claimed(&self) -> i64 {
        self.metrics.sandboxes.with_label_values(&["claimed"]).get()
    }

    /// Stops, and looks that nothing is left.
    async fn close(self, grace: Duration) {
        let begun = Instant::now();
        let drained = timeout(grace + LONG, self.sessions.drain(begun + grace)).await;
        self.reaper.abort();
        assert!(drained.is_ok(), "it does not end: {} alive", self.fake.alive());
        assert_eq!(self.fake.alive(), 0);
        assert_eq!((self.claimed(), self.metrics.sessions.get()), (0, 0));
    }
}

/// The one place that knows what a run is made of.
async fn run(sessions: &Sessions, user_id: &str, code: &str) -> Result<Done, Error> {
    let run = Run::new(code, 30 * SECOND);
    sessions.run(Owner { tenant: "", user_id }, &run).await
}

/// Lets every task go on until it waits for time to pass.
pub(crate) async fn settle() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

pub(crate) fn spec() -> SandboxSpec {
    SandboxSpec {
        memory_bytes: 1 << 26,
        processes: 8,
        cpus: 1.0,
        open_files: 64,
        workspace_bytes: 1 << 20,
        tmp_bytes: 1 << 20,
        shm_bytes: 1 << 20,
        inodes: 64,
    }
}

pub(crate) fn caps() -> Caps {
    Caps {
        stdout: 1024,
        stderr: 1024,
        result: 1024,
        error: 1024,
        listing_lines: 10,
        artifacts: 0,
        grace_ms: 1000,
        rlimits: Default::default(),
    }
}

fn kind(done: &Done) -> Option<ErrorKind> {
    done.outcome.as_ref().err().map(|detail| detail.kind)
}

// -- queues and places -------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn as_many_runs_wait_as_the_queue_holds_and_one_more_is_busy() {
    let house = House::new(Plan { queue: 3, ..PLAN });
    let mut tasks = vec![house.begin("u", "sleep 1000").await];
    for _ in 0..3 {
        tasks.push(house.begin("u", "1").await);
    }
    assert!(matches!(house.run("u", "1").await, Err(Error::Busy { .. })));
    assert!(house.run("v", "1").await.is_ok(), "another user's queue is another one");
    for task in tasks {
        assert!(task.await.unwrap().is_ok());
    }
    assert!(house.run("u", "1").await.is_ok(), "there is room again");
    assert_eq!(house.fake.created(), 2);
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn a_queue_of_none_takes_one_run_at_a_time() {
    let house = House::new(Plan { queue: 0, ..PLAN });
    let task = house.begin("u", "sleep 1000").await;
    assert!(matches!(house.run("u", "1").await, Err(Error::Busy { .. })));
    task.await.unwrap().unwrap();
    assert!(house.run("u", "1").await.is_ok());
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn runs_of_a_user_are_served_first_come_first_served() {
    let house = House::new(Plan { queue: 10, ..PLAN });
    let order = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = Vec::new();
    for turn in 0..10 {
        let (sessions, order) = (house.sessions.clone(), order.clone());
        tasks.push(tokio::spawn(async move {
            run(&sessions, "u", "sleep 10").await.unwrap();
            order.lock().unwrap().push(turn);
        }));
        settle().await;
    }
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(*order.lock().unwrap(), (0..10).collect::<Vec<_>>());
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn a_users_wait_is_told_as_queue_time_and_nobody_elses() {
    let house = House::new(PLAN);
    let first = house.begin("u", "sleep 500").await;
    let second = house.begin("u", "sleep 100").await;
    let other = house.run("v", "1").await.unwrap();
    assert!(other.timing.queue < 10 * MS, "{:?}", other.timing);
    first.await.unwrap().unwrap();
    let second = second.await.unwrap().unwrap();
    assert!(second.timing.queue >= 490 * MS && second.timing.run < 200 * MS, "{:?}", second.timing);
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn first_requests_that_race_share_one_sandbox() {
    let house = House::new(Plan { pause: 20 * MS, queue: 50, ..PLAN });
    let mut tasks = Vec::new();
    for _ in 0..50 {
        tasks.push(house.begin("u", "1").await);
    }
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert_eq!((house.fake.created(), house.claimed()), (1, 1));
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn as_many_sessions_live_as_may_and_the_next_user_is_told_when_to_come_back() {
    let house = House::new(Plan { max: 2, ..PLAN });
    house.run("a", "1").await.unwrap();
    sleep(10 * SECOND).await;
    house.run("b", "1").await.unwrap();
    let Err(Error::TooMany { retry_after }) = house.run("c", "1").await else { panic!("there is no room") };
    assert!(retry_after <= 50 * SECOND && retry_after > 49 * SECOND, "when a's expires: {retry_after:?}");
    assert!(house.run("a", "1").await.is_ok());
    house.delete("a").await.unwrap();
    assert!(house.run("c", "1").await.is_ok());
    assert!(matches!(house.run("a", "1").await, Err(Error::TooMany { .. })));
    house.close(SECOND).await;
}

// -- expiry ------------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn idle_time_counts_from_the_end_of_the_last_run() {
    let house = House::new(Plan { idle_timeout: SECOND, ..PLAN });
    house.run("u", "sleep 5000").await.unwrap();
    sleep(900 * MS).await;
    assert_eq!(house.state("u"), Some("idle"));
    house.run("u", "1").await.unwrap();
    sleep(900 * MS).await;
    assert_eq!((house.fake.created(), house.state("u")), (1, Some("idle")), "the second run began it anew");
    sleep(1200 * MS).await;
    assert_eq!((house.state("u"), house.ended("idle")), (None, 1));
    assert_eq!((house.fake.alive(), house.claimed()), (0, 0));
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn a_session_is_reaped_soon_after_it_expired_though_the_reaper_slept() {
    let house = House::new(Plan { idle_timeout: 600 * SECOND, ..PLAN });
    house.run("u", "1").await.unwrap();
    sleep(599 * SECOND).await;
    assert_eq!(house.state("u"), Some("idle"));
    sleep(61 * SECOND).await;
    assert_eq!(house.ended("idle"), 1);
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn a_running_session_is_never_reaped() {
    let house = House::new(Plan { idle_timeout: 100 * MS, ..PLAN });
    let done = house.run("u", "sleep 20000").await.unwrap();
    assert!(done.outcome.is_ok() && !done.lost);
    assert_eq!(house.ended("idle"), 0);
    let waiting = house.begin("u", "sleep 20000").await;
    assert!(house.run("u", "1").await.is_ok());
    assert!(waiting.await.unwrap().is_ok());
    assert_eq!(house.fake.created(), 1);
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn a_lifetime_ends_between_two_runs() {
    let house = House::new(Plan { lifetime_max: SECOND, ..PLAN });
    house.run("u", "1").await.unwrap();
    for _ in 0..8 {
        sleep(100 * MS).await;
        house.run("u", "1").await.unwrap();
    }
    assert_eq!(house.fake.created(), 1);
    sleep(1200 * MS).await;
    assert_eq!((house.ended("lifetime"), house.ended("idle")), (1, 0));
    let done = house.run("u", "sleep 3000").await.unwrap();
    assert!(!done.lost, "a run that goes on may end");
    house.close(SECOND).await;
}

/// `session.lifetime_max`: "however busy". A client that always has the next run waiting is that.
#[tokio::test(start_paused = true)]
async fn a_queue_that_is_never_empty_does_not_outlive_the_lifetime() {
    let house = House::new(Plan { lifetime_max: SECOND, queue: 4, ..PLAN });
    let mut waiting = std::collections::VecDeque::new();
    for _ in 0..3 {
        waiting.push_back(house.begin("u", "sleep 100").await);
    }
    for _ in 0..100 {
        waiting.push_back(house.begin("u", "sleep 100").await);
        waiting.pop_front().unwrap().await.unwrap().unwrap();
    }
    assert!(house.fake.created() > 1, "ten seconds in one sandbox");
    for task in waiting {
        task.await.unwrap().unwrap();
    }
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn what_a_session_tells_of_its_end_is_what_happens() {
    let house = House::new(Plan { idle_timeout: 10 * SECOND, lifetime_max: 25 * SECOND, ..PLAN });
    let tell = || house.sessions.describe(Owner { tenant: "", user_id: "u" }).unwrap();
    house.run("u", "1").await.unwrap();
    sleep(4 * SECOND).await;
    let told = tell();
    assert!((3990..=4010).contains(&told.idle_ms) && (5990..=6010).contains(&told.expires_in_ms), "{told:?}");
    house.run("u", "sleep 20000").await.unwrap();
    let told = tell();
    assert!(told.idle_ms <= 10 && told.expires_in_ms <= 1010, "the lifetime is nearer now: {told:?}");
    sleep(12 * SECOND).await; // the reaper looks at least as often as sessions expire
    assert_eq!((house.state("u"), house.ended("lifetime")), (None, 1));
    house.close(SECOND).await;
}

// -- deletion ----------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn a_deleted_session_ends_its_run_and_waiting_runs_begin_anew() {
    let house = House::new(PLAN);
    let running = house.begin("u", "sleep 20000").await;
    let waiting = house.begin("u", "sleep 10").await;
    house.delete("u").await.unwrap();
    let done = running.await.unwrap().unwrap();
    assert_eq!((kind(&done), done.lost), (Some(ErrorKind::Cancelled), true));
    let done = waiting.await.unwrap().unwrap();
    assert!(done.outcome.is_ok() && !done.lost);
    assert_eq!((house.fake.created(), house.fake.alive(), house.ended("deleted")), (2, 1, 1));
    assert!(house.delete("nobody").await.is_ok());
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn a_deletion_while_the_sandbox_is_being_made_orphans_nothing() {
    let house = House::new(Plan { pause: 100 * MS, ..PLAN });
    let running = house.begin("u", "sleep 20000").await;
    assert_eq!(house.state("u"), None, "it has no sandbox yet");
    timeout(5 * SECOND, house.delete("u")).await.expect("it waits for the run").unwrap();
    sleep(SECOND).await;
    // Ended; or there was nothing to delete yet, and what came after it can be seen and deleted.
    if !running.is_finished() {
        assert_eq!(house.state("u"), Some("running"));
        house.delete("u").await.unwrap();
        sleep(SECOND).await;
    }
    assert!(running.is_finished(), "its run goes on after the deletion");
    assert_eq!(house.claimed(), 0);
    house.close(30 * SECOND).await;
}

/// The client of DELETE may go away, too.
#[tokio::test(start_paused = true)]
async fn a_deletion_whose_client_goes_away_leaves_nothing_behind() {
    let house = House::new(Plan { pause: 100 * MS, max: 1, ..PLAN });
    house.run("u", "1").await.unwrap();
    let _ = timeout(50 * MS, house.delete("u")).await;
    sleep(LONG).await;
    assert_eq!((house.fake.alive(), house.claimed()), (0, 0));
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn a_deletion_that_the_engine_fails_is_tried_again_until_it_is_done() {
    let house = House::new(PLAN);
    house.run("u", "1").await.unwrap();
    for _ in 0..3 {
        house.fake.fail_next(Call::Remove);
    }
    let _ = house.delete("u").await; // told or not: it has to be gone in the end
    sleep(LONG).await;
    assert_eq!((house.fake.alive(), house.claimed()), (0, 0));
    house.close(SECOND).await;
}

// -- clients that go away ----------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn a_run_whose_client_goes_away_is_cancelled_and_the_session_stays() {
    let house = House::new(PLAN);
    for turn in 1..=3 {
        let running = house.begin("u", "sleep 20000").await;
        assert_eq!(house.state("u"), Some("running"));
        running.abort();
        let begun = Instant::now();
        let done = house.run("u", "1").await.unwrap();
        assert!(done.outcome.is_ok() && begun.elapsed() < SECOND, "{:?}", begun.elapsed());
        assert_eq!((house.outcomes("cancelled"), house.fake.created()), (turn, 1));
    }
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_goes_away_while_it_waits_gives_its_place_back() {
    let house = House::new(Plan { queue: 1, ..PLAN });
    let running = house.begin("u", "sleep 1000").await;
    for _ in 0..20 {
        house.begin("u", "1").await.abort();
        settle().await;
    }
    let waiting = house.begin("u", "1").await;
    assert!(matches!(house.run("u", "1").await, Err(Error::Busy { .. })));
    running.await.unwrap().unwrap();
    waiting.await.unwrap().unwrap();
    assert_eq!((house.outcomes("ok"), house.outcomes("cancelled")), (2, 0), "those that waited never ran");
    house.close(SECOND).await;
}

/// Every call of the engine takes time here, and the client goes at each moment of it once.
#[tokio::test(start_paused = true)]
async fn whenever_a_client_goes_away_nothing_is_left_without_an_owner() {
    for size in [0, 1] {
        for program in ["sleep 100", "die", "garbage", "killed"] {
            for after in (0..600).step_by(25) {
                let house = House::new(Plan { pause: 50 * MS, size, ..PLAN });
                sleep(SECOND).await;
                let running = house.begin("u", program).await;
                sleep(Duration::from_millis(after)).await;
                running.abort();
                sleep(LONG).await;
                let what = format!("pool {size}, {program}, gone after {after} ms");
                let warm = house.sessions.pool().warm();
                assert_eq!(house.fake.alive(), warm, "{what}: a sandbox that nobody will remove");
                let done =
                    timeout(LONG, house.run("u", "1")).await.unwrap_or_else(|_| panic!("{what}: stuck"));
                assert!(done.is_ok_and(|done| done.outcome.is_ok()), "{what}");
                house.close(SECOND).await;
            }
        }
    }
}

// -- losses ------------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn a_sandbox_that_dies_lies_or_hangs_is_lost_and_the_next_run_gets_a_new_one() {
    let house = House::new(Plan { max: 1, ..PLAN });
    for (turn, (program, expected)) in
        [("die", ErrorKind::Crashed), ("garbage", ErrorKind::Crashed), ("hang", ErrorKind::Timeout)]
            .into_iter()
            .enumerate()
    {
        let done = house.run("u", program).await.unwrap();
        assert_eq!((kind(&done), done.lost), (Some(expected), true), "{program}");
        assert_eq!(done.aftermath.workspace_files, ["total 0"]);
        assert_eq!(house.state("u"), None, "{program}");
        settle().await;
        let done = house.run("u", "1").await.unwrap();
        assert!(done.outcome.is_ok() && !done.lost, "{program}");
        assert_eq!((house.fake.created(), house.fake.alive()), (turn as u64 + 2, 1));
    }
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn a_run_that_fails_by_itself_loses_nothing() {
    let house = House::new(PLAN);
    for program in ["raise", "killed", "sleep 40000"] {
        let done = house.run("u", program).await.unwrap();
        assert!(done.outcome.is_err() && !done.lost, "{program}");
    }
    assert_eq!(house.fake.created(), 1);
    assert_eq!((house.outcomes("raised"), house.outcomes("timeout")), (1, 1));
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn a_client_gone_from_a_hanging_sandbox_loses_it_in_bounded_time() {
    let house = House::new(PLAN);
    house.begin("u", "hang").await.abort();
    let begun = Instant::now();
    let done = house.run("u", "1").await.unwrap();
    assert!(done.outcome.is_ok() && begun.elapsed() < 5 * SECOND, "{:?}", begun.elapsed());
    assert_eq!((house.fake.created(), house.outcomes("cancelled")), (2, 1));
    house.close(SECOND).await;
}

/// What an engine that was stopped looks like: the stream is silent, and comes back a moment after the engine.
#[tokio::test(start_paused = true)]
async fn a_report_that_comes_with_the_engines_next_answer_is_no_loss() {
    let house = House::new(PLAN);
    house.run("u", "write a").await.unwrap();
    let (timeout, grace) = (30_000, 2 * 1000); // the supervisor's word is due after both
    let done = house.run("u", &format!("held {}", timeout + grace + 300)).await.unwrap();
    assert!(done.outcome.is_ok() && !done.lost, "{:?}", done.outcome);
    let done = house.run("u", "write b").await.unwrap();
    assert_eq!(done.outcome.unwrap().get(), r#"{"files":["a","b"],"serial":0}"#);
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn a_sandbox_is_silent_and_so_is_its_engine_which_proves_nothing_and_is_told_in_time() {
    let house = House::new(PLAN);
    house.run("u", "write a").await.unwrap();
    house.fake.fault_next(Call::Fate, Fault::Late(60 * SECOND));
    let begun = Instant::now();
    let done = house.run("u", "hang").await.unwrap();
    assert_eq!((kind(&done), done.lost), (Some(ErrorKind::Crashed), false));
    assert!(
        begun.elapsed() <= (30 + 1 + 5) * SECOND,
        "its time, the grace and a margin: {:?}",
        begun.elapsed()
    );
    let done = house.run("u", "write b").await.unwrap();
    assert_eq!((done.lost, done.outcome.unwrap().get()), (false, r#"{"files":["a","b"],"serial":0}"#));
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn a_client_gone_while_the_engine_is_silent_costs_no_files() {
    let house = House::new(PLAN);
    house.run("u", "write a").await.unwrap();
    house.fake.fault_next(Call::Fate, Fault::Late(60 * SECOND));
    house.begin("u", "hang").await.abort();
    let done = house.run("u", "write b").await.unwrap();
    assert_eq!((done.lost, done.outcome.unwrap().get()), (false, r#"{"files":["a","b"],"serial":0}"#));
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn warm_sandboxes_whose_streams_ended_are_no_sign_of_an_engine_that_works() {
    let house = House::new(Plan { size: 2, ..PLAN });
    settle().await;
    assert_eq!((house.sessions.pool().warm(), house.sessions.readiness()), (2, Ok(())));
    for _ in 0..20 {
        house.fake.fail_next(Call::Create);
    }
    (0..2).for_each(|serial| house.fake.cut(serial));
    sleep(15 * SECOND).await; // nobody comes
    assert_eq!(house.sessions.readiness(), Err("the engine makes no sandboxes"));
    house.fake.mend();
    sleep(15 * SECOND).await;
    assert_eq!((house.sessions.pool().warm(), house.sessions.readiness()), (2, Ok(())));
    house.close(SECOND).await;
}

/// The lost sandbox's removal takes its time; the session must not be without one for that.
#[tokio::test(start_paused = true)]
async fn the_run_after_a_loss_is_served_though_every_place_is_taken() {
    let house = House::new(Plan { pause: 100 * MS, max: 1, ..PLAN });
    assert!(house.run("u", "die").await.unwrap().lost);
    let done = house.run("u", "1").await;
    assert!(done.is_ok(), "{:?}", done.err());
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn a_freed_place_is_free_though_the_removal_goes_on() {
    let house = House::new(Plan { pause: 100 * MS, max: 1, idle_timeout: SECOND, ..PLAN });
    house.run("a", "1").await.unwrap();
    while house.ended("idle") == 0 {
        sleep(10 * MS).await;
    }
    let done = house.run("b", "1").await;
    assert!(done.is_ok(), "{:?}", done.err());
    house.close(SECOND).await;
}

// -- an engine that fails ----------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn an_engine_that_makes_nothing_is_unavailable_and_takes_no_place() {
    let house = House::new(Plan { max: 2, ..PLAN });
    for turn in 0..20 {
        let failures = if turn == 0 { 2 } else { 1 }; // the first one may be chance
        (0..failures).for_each(|_| house.fake.fail_next(Call::Create));
        let user_id = format!("u{turn}");
        assert!(matches!(house.run(&user_id, "1").await, Err(Error::Unavailable(_))));
        assert_eq!((house.state(&user_id), house.metrics.sessions.get()), (None, 0));
    }
    assert!(house.run("a", "1").await.is_ok() && house.run("b", "1").await.is_ok());
    assert_eq!(house.metrics.engine_errors.with_label_values(&["create", "unavailable"]).get(), 21);
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn a_create_that_fails_costs_the_runs_behind_it_nothing() {
    let house = House::new(Plan { pause: 10 * MS, ..PLAN });
    (0..2).for_each(|_| house.fake.fail_next(Call::Create));
    let first = house.begin("u", "1").await;
    let second = house.begin("u", "1").await;
    assert!(matches!(first.await.unwrap(), Err(Error::Unavailable(_))));
    assert!(second.await.unwrap().is_ok());
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn a_pool_whose_engine_fails_fills_later() {
    let fails = 5;
    let house = House::new(Plan { size: 2, ..PLAN });
    for _ in 0..fails {
        house.fake.fail_next(Call::Create);
    }
    sleep(60 * SECOND).await;
    assert_eq!(house.sessions.pool().warm(), 2);
    house.close(SECOND).await;
}

/// As Podman has it where a container ends between its start and our attach.
#[tokio::test(start_paused = true)]
async fn a_new_sandbox_that_is_dead_and_silent_is_found_out_before_its_time_is_over() {
    let house = House::new(PLAN);
    house.engine.stillborn.store(true, Ordering::SeqCst);
    let begun = Instant::now();
    assert!(house.run("u", "1").await.unwrap().outcome.is_ok(), "by the next one that is made");
    assert!(begun.elapsed() <= 4 * SECOND, "{:?}", begun.elapsed());
    assert_eq!((house.fake.created(), house.fake.alive()), (2, 1));
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn a_removal_that_fails_is_tried_again_until_it_is_done() {
    let house = House::new(Plan { idle_timeout: SECOND, ..PLAN });
    house.run("u", "1").await.unwrap();
    for _ in 0..5 {
        house.fake.fail_next(Call::Remove);
    }
    sleep(2 * SECOND).await;
    assert_eq!((house.fake.alive(), house.state("u")), (1, None), "it is nobody's, and still there");
    sleep(LONG).await;
    assert_eq!(house.fake.alive(), 0);
    assert_eq!(house.metrics.engine_errors.with_label_values(&["remove", "unavailable"]).get(), 5);
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn sandboxes_never_exceed_the_capacity() {
    let house = House::new(Plan { pause: 30 * MS, size: 3, max: 5, ..PLAN });
    for round in 0..20 {
        let mut tasks = Vec::new();
        for user in 0..12 {
            tasks.push(house.begin(&format!("{round}/{user}"), "sleep 20").await);
        }
        for task in tasks {
            let _ = task.await.unwrap();
        }
        for user in 0..12 {
            house.delete(&format!("{round}/{user}")).await.unwrap();
        }
    }
    let most = house.engine.most.load(Ordering::SeqCst);
    assert!((5..=8).contains(&most), "{most} at once");
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn the_pool_fills_again_after_claims_and_no_further() {
    let house = House::new(Plan { size: 3, max: 5, ..PLAN });
    sleep(SECOND).await;
    assert_eq!((house.sessions.pool().warm(), house.fake.alive()), (3, 3));
    for user in 0..5 {
        house.run(&user.to_string(), "1").await.unwrap();
        sleep(SECOND).await;
        assert_eq!((house.sessions.pool().warm(), house.fake.alive()), (3, 3 + user + 1));
    }
    house.close(SECOND).await;
}

// -- the end -----------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn a_drain_waits_for_runs_takes_no_more_and_leaves_nothing() {
    let house = House::new(Plan { size: 2, ..PLAN });
    let running = house.begin("u", "sleep 5000").await;
    let waiting = house.begin("u", "1").await;
    house.run("idle", "1").await.unwrap();
    let sessions = house.sessions.clone();
    let begun = Instant::now();
    let draining = tokio::spawn(async move { sessions.drain(begun + 60 * SECOND).await });
    settle().await;
    assert!(matches!(house.run("new", "1").await, Err(Error::Draining)));
    assert!(matches!(house.run("idle", "1").await, Err(Error::Draining)));
    assert!(house.sessions.readiness().is_err());
    assert!(running.await.unwrap().unwrap().outcome.is_ok());
    // It was taken before the stop: served in its turn, or told.
    assert!(matches!(waiting.await.unwrap(), Ok(_) | Err(Error::Draining)));
    draining.await.unwrap();
    assert!(begun.elapsed() < 6 * SECOND, "{:?}", begun.elapsed());
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn a_drain_tells_new_users_who_wait_for_a_sandbox_and_makes_none_for_them() {
    let house = House::new(Plan { pause: 5 * SECOND, max: 20, ..PLAN });
    let mut tasks = Vec::new();
    for user in 0..10 {
        tasks.push(house.begin(&user.to_string(), "1").await);
    }
    let begun = Instant::now();
    let sessions = house.sessions.clone();
    let draining = tokio::spawn(async move { sessions.drain(begun + 30 * SECOND).await });
    for task in tasks {
        assert!(matches!(task.await.unwrap(), Err(Error::Draining)));
    }
    assert!(begun.elapsed() < SECOND, "{:?}", begun.elapsed());
    draining.await.unwrap();
    assert!(house.fake.created() <= 2, "{} were made", house.fake.created());
    house.close(SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn a_creation_that_takes_longer_than_anybody_waits_is_tried_all_the_same() {
    let house = House::new(Plan { pause: 15 * SECOND, max: 20, ..PLAN });
    assert!(house.run("a", "1").await.is_ok());
    let mut tasks = Vec::new();
    for user in 0..12 {
        tasks.push(house.begin(&user.to_string(), "1").await);
    }
    // 15 s each, two at a time, and nobody waits for longer than a minute.
    let (mut served, mut refused) = (0, 0);
    for task in tasks {
        match task.await.unwrap() {
            Ok(_) => served += 1,
            Err(Error::Crowded { retry_after }) => {
                assert!(retry_after >= 30 * SECOND, "{retry_after:?}");
                refused += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(served >= 6 && refused >= 4, "{served} served, {refused} refused");
    assert!(house.run("z", "1").await.is_ok(), "and again");
    house.close(LONG).await;
}

#[tokio::test(start_paused = true)]
async fn a_drain_cuts_what_does_not_end_in_time() {
    let house = House::new(PLAN);
    let running = house.begin("u", "sleep 25000").await;
    let hanging = house.begin("v", "hang").await;
    let begun = Instant::now();
    house.close(SECOND).await;
    assert!(begun.elapsed() < 5 * SECOND, "{:?}", begun.elapsed());
    for task in [running, hanging] {
        let done = task.await.unwrap().unwrap();
        assert_eq!(
            (kind(&done), done.lost),
            (Some(ErrorKind::Cancelled), true),
            "the server's doing, no crash"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_drain_does_not_wait_for_a_run_that_begins_after_its_deadline() {
    let house = House::new(Plan { pause: 2 * SECOND, ..PLAN });
    let _running = house.begin("u", "sleep 29000").await;
    let begun = Instant::now();
    house.close(SECOND).await;
    assert!(begun.elapsed() < 15 * SECOND, "its sandbox came after the deadline: {:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_drain_outlasts_an_engine_that_fails_to_remove() {
    let house = House::new(Plan { size: 1, ..PLAN });
    house.run("u", "1").await.unwrap();
    for _ in 0..6 {
        house.fake.fail_next(Call::Remove);
    }
    house.close(SECOND).await;
}

// -- for the simulation -------------------------------------------------------------------------------

/// xorshift64: the same operations for the same seed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}
