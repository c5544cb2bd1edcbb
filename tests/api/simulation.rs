//! Floors 4 and 5 in a seeded simulation: users, an engine that errs, a server that is killed and comes back. After
//! every step what SECURITY.md promises is looked at. Time is paused; `SEED=n` repeats one seed, `SEEDS=n` sets how
//! many are tried, `STEPS=n` how long each is.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use codesandbox::metrics::Metrics;
use codesandbox::pool::{self, Pool};
use codesandbox::reaper::reap;
use codesandbox::reconciler::{self, Reconciler};
use codesandbox::runtime::Runtime;
use codesandbox::runtime::fake::{Call, Fake, Fault};
use codesandbox::session::{self, Done, Error, Owner, Sessions};
use codesandbox::supervisor::{self, Run};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, sleep};

use crate::sessions::{Random, SECOND, caps, settle, spec};

const USERS: u64 = 6;
const SESSIONS: usize = 4;
const WARM: usize = 2;
const IDLE: Duration = Duration::from_secs(20);
const LIFETIME: Duration = Duration::from_secs(120);
/// Longer than any chain of deadlines.
const LONG: Duration = Duration::from_secs(900);

/// What a client may hold the server to.
#[derive(Debug, Default)]
struct Books {
    users: HashMap<u64, User>,
    /// Whose a sandbox is, for ever.
    owners: HashMap<u64, u64>,
    /// Sandboxes whose claim the engine carried out after the start of a server.
    late: HashSet<u64>,
    violations: Vec<String>,
    /// Moments, in the order of what happens to the books.
    now: u64,
    /// When this life of the server began: sessions that it took up expire from then on.
    life: Option<Instant>,
}

#[derive(Debug, Default)]
struct User {
    /// The sandbox of the last answer.
    serial: Option<u64>,
    /// The lines that an answer has shown to be in it.
    acknowledged: Vec<String>,
    /// The last moment at which something ended the session by the rules: it begins anew, and nobody says so.
    ended: Option<u64>,
    /// The last moment at which its sandbox may have been lost: the next answer has to say so.
    struck: Option<u64>,
    /// The last moment of either, for runs that it came upon in the middle.
    disturbed: u64,
    /// Of the last answer, and of the first request that this sandbox served.
    last: Option<Instant>,
    first: Option<Instant>,
}

/// One seed's run, over all lives of the server.
struct World {
    random: Random,
    fake: Arc<Fake>,
    books: Arc<Mutex<Books>>,
    next_line: u64,
    steps: u64,
}

/// Programs that their sandbox does not outlive.
const DEADLY: [&str; 3] = ["die", "garbage", "hang"];

/// How a life of the server ended.
#[derive(Debug, PartialEq)]
enum End {
    Killed,
    Kept,
    Done,
}

/// One life of the server.
struct House {
    sessions: Sessions,
    metrics: Arc<Metrics>,
    background: Vec<AbortHandle>,
    runs: Vec<JoinHandle<()>>,
    /// What there was when it began.
    found: usize,
}

impl House {
    async fn new(fake: &Arc<Fake>) -> House {
        let metrics = Arc::new(Metrics::new());
        let left = fake.list().await.unwrap();
        let found = left.len();
        let settings = pool::Settings {
            size: WARM,
            starting_max: 2,
            capacity: SESSIONS + WARM,
            create_timeout: 20 * SECOND,
            wait_timeout: 60 * SECOND,
            recycle_after: 50 * SECOND,
            idle_after: None,
            seed: 0,
            spec: spec(),
            caps: caps(),
        };
        let pool = Pool::new(fake.clone(), settings, metrics.clone());
        let settings = session::Settings {
            idle_timeout: IDLE,
            lifetime_max: LIFETIME,
            max: SESSIONS,
            queue: 2,
            keep: true,
        };
        let sessions = Sessions::new(pool, settings, metrics.clone());
        let settings = reconciler::Settings { period: 15 * SECOND, grace: 25 * SECOND };
        let reconciler = Reconciler::new(sessions.clone(), settings, left);
        let background = vec![
            tokio::spawn(reap(sessions.clone())).abort_handle(),
            tokio::spawn(reconciler.run()).abort_handle(),
        ];
        House { sessions, metrics, background, runs: Vec::new(), found }
    }

    fn state(&self, state: &str) -> i64 {
        self.metrics.sandboxes.with_label_values(&[state]).get()
    }
}

impl World {
    fn new(seed: u64) -> World {
        World {
            random: Random(seed),
            fake: Fake::new(supervisor::fake::spawn),
            books: Arc::default(),
            next_line: 0,
            steps: 0,
        }
    }

    /// Until the server's end, or the last step.
    async fn live(&mut self, steps: u64) -> End {
        let slow = self.random.below(8) == 0;
        if !slow {
            self.fake.catch_up();
        }
        lock(&self.books).begin(slow);
        let mut house = House::new(&self.fake).await;
        let (fake, books) = (self.fake.clone(), self.books.clone());
        let late = Duration::from_millis(self.random.below(3000));
        tokio::spawn(async move {
            sleep(late).await;
            let late = fake.catch_up();
            lock(&books).late.extend(late);
        });
        while self.steps < steps {
            self.steps += 1;
            if let Some(end) = self.step(&mut house).await {
                lock(&self.books).end();
                return end;
            }
            self.look(&house).await;
        }
        self.quiet(house).await;
        End::Done
    }

    async fn step(&mut self, house: &mut House) -> Option<End> {
        let user = self.random.below(USERS);
        match self.random.below(1000) {
            0..500 => self.begin(house, user),
            500..540 if !house.runs.is_empty() => {
                let client = self.random.below(house.runs.len() as u64) as usize;
                log(|| "a client goes away".into());
                house.runs.swap_remove(client).abort();
            }
            540..570 => {
                let sessions = house.sessions.clone();
                log(|| format!("user {user}: delete"));
                let now = lock(&self.books).moment();
                lock(&self.books).user(user).end(now);
                let deletion = Deletion { books: self.books.clone(), user };
                house.runs.push(tokio::spawn(async move {
                    let user_id = deletion.user.to_string();
                    let _ = sessions.delete(Owner { tenant: "", user_id: &user_id }).await;
                    drop(deletion);
                }));
            }
            570..690 => self.fault(),
            690..740 => self.strike(),
            740..750 => return Some(End::Killed),
            750..755 => {
                let deadline = Instant::now() + 5 * SECOND;
                house.sessions.drain(deadline).await;
                return Some(End::Kept);
            }
            755..760 => sleep(Duration::from_secs(self.random.below(60))).await,
            _ => sleep(Duration::from_millis(self.random.below(300))).await,
        }
        None
    }

    fn begin(&mut self, house: &mut House, user: u64) {
        const PROGRAMS: [&str; 12] = [
            "sleep 5",
            "sleep 300",
            "sleep 2000",
            "raise",
            "killed",
            "die",
            "garbage",
            "hang",
            "1",
            "1",
            "1",
            "1",
        ];
        let code = match self.random.below(4) {
            0 => PROGRAMS[self.random.below(PROGRAMS.len() as u64) as usize].to_owned(),
            _ => {
                self.next_line += 1;
                format!("write {user}.{}", self.next_line)
            }
        };
        let (sessions, books) = (house.sessions.clone(), self.books.clone());
        let begun = (lock(&books).moment(), Instant::now());
        house.runs.push(tokio::spawn(async move {
            let timeout = 3 * SECOND;
            let run = Run::new(&code, timeout);
            let user_id = user.to_string();
            if DEADLY.contains(&code.as_str()) {
                lock(&books).strike(user);
            }
            log(|| format!("user {user}: {code}"));
            let done = sessions.run(Owner { tenant: "", user_id: &user_id }, &run).await;
            log(|| format!("user {user}: {code}: {done:?}"));
            lock(&books).answer(user, begun, &code, done);
        }));
    }

    /// The engine errs.
    fn fault(&mut self) {
        const CALLS: [Call; 7] =
            [Call::Create, Call::Create, Call::Attach, Call::Claim, Call::List, Call::Fate, Call::Remove];
        let call = CALLS[self.random.below(7) as usize];
        let fault = match self.random.below(4) {
            0 => Fault::Unheard,
            1 => Fault::Late(Duration::from_millis(self.random.below(500))),
            2 => Fault::Late(Duration::from_secs(self.random.below(40))),
            _ => Fault::Fails,
        };
        log(|| format!("{call:?} {fault:?}"));
        self.fake.fault_next(call, fault);
    }

    /// Something happens to a sandbox.
    fn strike(&mut self) {
        let all = self.fake.created();
        let Some(back) = all.checked_sub(1 + self.random.below(8)) else { return };
        let how = self.random.below(3);
        log(|| format!("strike {how} on {back}"));
        match how {
            0 => return self.fake.cut(back),
            1 => self.fake.kill(back),
            _ => self.fake.vanish(back),
        }
        let mut books = lock(&self.books);
        match books.owners.get(&back).copied() {
            Some(user) => books.strike(user),
            // Somebody may have claimed it whom we have not heard of.
            None => (0..USERS).for_each(|user| books.strike(user)),
        }
    }

    /// What holds at any moment.
    async fn look(&self, house: &House) {
        settle().await;
        let mut owners = HashSet::new();
        let owned = self.fake.owned();
        for (serial, owner) in &owned {
            if lock(&self.books).late.contains(serial) {
                continue; // taken up or removed a while later
            }
            assert!(owners.insert(owner.clone()), "two sandboxes of one session: {owned:?}");
        }
        let most = SESSIONS + WARM + house.found;
        assert!(self.fake.alive() <= most, "{} of {most} sandboxes", self.fake.alive());
        assert!(house.metrics.sessions.get() <= (SESSIONS + house.found) as i64);
        let states = ["warm", "starting", "claimed", "removing"].map(|state| house.state(state));
        assert!(states.iter().all(|count| *count >= 0), "{states:?}");
        assert!(states[0] <= WARM as i64, "{states:?}");
        let books = lock(&self.books);
        assert!(books.violations.is_empty(), "{:#?}", books.violations);
    }

    /// Once nobody comes and nothing goes wrong any more, nothing is left that is nobody's, and nobody waits.
    async fn quiet(&self, mut house: House) {
        self.fake.mend();
        sleep(LONG).await;
        let stuck = house.runs.iter().filter(|run| !run.is_finished()).count();
        assert_eq!(stuck, 0, "runs without an answer");
        let states = ["warm", "starting", "claimed", "removing"].map(|state| house.state(state));
        assert_eq!(states, [WARM as i64, 0, 0, 0], "warm, starting, claimed, removing");
        assert_eq!((self.fake.alive(), house.metrics.sessions.get()), (WARM, 0), "sandboxes, sessions");
        let done = run(&house.sessions, "last", "1").await;
        assert!(done.is_ok(), "{:?}", done.err());
        self.look(&house).await;
        house.sessions.delete(Owner { tenant: "", user_id: "last" }).await.unwrap();
        house.sessions.drain(Instant::now() + SECOND).await;
        assert_eq!(self.fake.alive(), 0, "after the end");
        house.background.drain(..).for_each(|task| task.abort());
    }
}

async fn run(sessions: &Sessions, user_id: &str, code: &str) -> Result<Done, Error> {
    let run = Run::new(code, SECOND);
    sessions.run(Owner { tenant: "", user_id }, &run).await
}

fn lock(books: &Mutex<Books>) -> MutexGuard<'_, Books> {
    books.lock().unwrap_or_else(PoisonError::into_inner)
}

/// However it ends, the session may be gone from its begin on.
struct Deletion {
    books: Arc<Mutex<Books>>,
    user: u64,
}

impl Drop for Deletion {
    fn drop(&mut self) {
        let mut books = lock(&self.books);
        let now = books.moment();
        books.user(self.user).end(now);
    }
}

impl User {
    fn end(&mut self, now: u64) {
        (self.ended, self.disturbed) = (Some(now), now);
    }

    fn strike(&mut self, now: u64) {
        (self.struck, self.disturbed) = (Some(now), now);
    }

    fn forget(&mut self) {
        (self.serial, self.first) = (None, None);
        self.acknowledged.clear();
    }

    /// Whether its session may have, by what its client knows.
    fn has_expired(&self, now: Instant, life: Instant) -> bool {
        now - self.last.unwrap_or(life) >= IDLE || now - self.first.unwrap_or(life) >= LIFETIME
    }
}

impl Books {
    fn user(&mut self, user: u64) -> &mut User {
        self.users.entry(user).or_default()
    }

    fn moment(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// A life of the server begins: what was lost with nobody to tell, nobody tells. Nor does anybody where the
    /// engine is slow to carry out claims that it had heard.
    fn begin(&mut self, slow: bool) {
        let now = self.moment();
        self.life = Some(Instant::now());
        // Where the last server had not removed one that was claimed late beside a session that it had taken up, the
        // later claim counts now: nothing at the engine tells which of the two was in use.
        let doubtful = slow || !std::mem::take(&mut self.late).is_empty();
        for user in self.users.values_mut() {
            (user.last, user.first) = (None, None);
            if user.struck.take().is_some() || doubtful {
                user.end(now);
            }
        }
    }

    /// It ends: what has expired by now is over.
    fn end(&mut self) {
        let (moment, now, life) = (self.moment(), Instant::now(), self.life.unwrap());
        for user in self.users.values_mut() {
            if user.has_expired(now, life) {
                user.end(moment);
            }
        }
    }

    fn strike(&mut self, user: u64) {
        let now = self.moment();
        self.user(user).strike(now);
    }

    /// `begun` is the moment of the request.
    fn answer(&mut self, user: u64, begun: (u64, Instant), code: &str, done: Result<Done, Error>) {
        let Ok(done) = done else { return };
        let (now, life, moment) = (Instant::now(), self.life.unwrap(), self.moment());
        let mut wrong = Vec::new();
        let before = format!("{:?}", self.users.get(&user));
        let book = self.users.entry(user).or_default();
        let expired = book.has_expired(now, life);
        let disturbed = book.disturbed > begun.0;
        book.last = Some(now);
        if done.lost {
            // One that was claimed late may be dead when it is taken up, and nobody had heard whose it was.
            if book.struck.is_none() && book.ended.is_none() && !disturbed && self.late.is_empty() {
                wrong.push("lost without a reason".to_owned());
            }
            book.forget();
        }
        if let (Some(line), Ok(result)) = (code.strip_prefix("write "), &done.outcome) {
            let shown: Shown = serde_json::from_str(result.get()).unwrap();
            let same = book.serial == Some(shown.serial);
            if book.serial.is_some() && !same && book.ended.is_none() && !expired && !disturbed {
                wrong.push("silently another sandbox".to_owned());
            }
            if same && let Some(line) = book.acknowledged.iter().find(|line| !shown.files.contains(line)) {
                wrong.push(format!("{line} was acknowledged and is gone"));
            }
            let distinct: HashSet<_> = shown.files.iter().collect();
            if distinct.len() != shown.files.len() {
                wrong.push("executed twice".to_owned());
            }
            let owner = *self.owners.entry(shown.serial).or_insert(user);
            let own = format!("{user}.");
            if owner != user || shown.files.iter().any(|line| !line.starts_with(&own)) {
                wrong.push(format!("it is the sandbox of {owner}"));
            }
            if !shown.files.iter().any(|other| other == line) {
                wrong.push("its own line is missing".to_owned());
            }
            if disturbed {
                book.forget(); // it may have been the last of its session
            } else {
                book.first = if same { book.first } else { Some(begun.1) };
                book.serial = Some(shown.serial);
                book.acknowledged = shown.files;
            }
        } else if expired || book.ended.is_some() {
            book.forget(); // it does not show which sandbox it ran in
        }
        let deadly = !done.lost && DEADLY.contains(&code);
        // What came before the request is over with its answer.
        for past in [&mut book.ended, &mut book.struck] {
            if past.is_some_and(|moment| moment < begun.0) && (done.lost || done.outcome.is_ok()) {
                *past = None;
            }
        }
        if deadly {
            book.struck = Some(moment); // which others, begun later, may have come before
        }
        let told = format!("{:?}, lost {}, before it {before}", done.outcome, done.lost);
        self.violations
            .extend(wrong.into_iter().map(|wrong| format!("user {user}, {code:?}: {wrong}: {told}")));
    }
}

/// What `write` answers.
#[derive(Debug, serde::Deserialize)]
struct Shown {
    serial: u64,
    files: Vec<String>,
}

/// With `LOG` set: what the server logs, and the steps.
fn log(what: impl FnOnce() -> String) {
    if std::env::var_os("LOG").is_some() {
        eprintln!("{}", what());
    }
}

/// A whole seed: as many lives of the server as it takes.
fn simulate(seed: u64, steps: u64) {
    let mut world = World::new(seed);
    loop {
        let time =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let end = time.block_on(world.live(steps));
        log(|| format!("--- {end:?} at step {}", world.steps));
        drop(time); // as SIGKILL does: nothing of the server goes on
        world.fake.server_gone();
        if end == End::Done {
            return;
        }
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn no_seed_breaks_a_promise() {
    let steps = number("STEPS").unwrap_or(1000);
    if let Some(seed) = number("SEED") {
        if std::env::var_os("LOG").is_some() {
            tracing_subscriber::fmt().with_writer(std::io::stderr).without_time().init();
        }
        return simulate(seed, steps);
    }
    let seeds = number("SEEDS").unwrap_or(1000);
    let first =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64 / 4096;
    let next = AtomicU64::new(1);
    let failed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let turn = next.fetch_add(1, Ordering::SeqCst);
                    if turn > seeds {
                        return;
                    }
                    let seed = first + turn;
                    if std::panic::catch_unwind(|| simulate(seed, steps)).is_err() {
                        failed.lock().unwrap().push(seed);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(
        failed.is_empty(),
        "{} of {seeds} seeds broke a promise; repeat one with SEED=n: {failed:?}",
        failed.len()
    );
}
