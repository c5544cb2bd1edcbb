//! An engine in trouble, by a faulty proxy on its socket: every request gets an answer or a 503 in time, nothing that
//! was acknowledged is lost, nothing leaks, and all recovers without a restart of ours.
//!
//! `daemon` does the same to real daemons.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::drivers::{self, Driver};
use crate::engine::Engine;
use crate::proxy::{Call, Proxy};
use crate::support::{Server, Wire, eventually, header, post_bytes};

behaviours! {
    "trouble":
    an_engine_that_is_frozen_for_a_while,
    an_engine_that_is_frozen_while_a_client_goes_away,
    an_engine_that_answers_late,
    lost_answers_to_create,
    lost_answers_to_rename,
    lost_answers_to_remove,
    lost_answers_to_list,
    lost_answers_to_inspect,
    an_engine_that_is_gone_and_comes_back,
    streams_that_break_are_established_again,
    a_direct_stream_needs_no_engine,
}

/// Warm sandboxes of each server here.
const WARM: usize = 2;
/// Beyond a run's own time: the grace to obey, and what any answer may take.
const GRACE_AND_MARGIN: Duration = Duration::from_secs(2 + 5);
/// What a new user waits for a sandbox at most: `pool.wait_timeout`.
const WAIT: Duration = Duration::from_secs(15);
/// From the end of the trouble until everything is as before: the longest pause between two tries is 10 s.
const RECOVERY: Duration = Duration::from_secs(40);
const USERS: [&str; 3] = ["a", "b", "c"];

/// A server whose engine can be in trouble, and users who have a file each.
pub(crate) struct House<'a> {
    pub(crate) server: Server,
    engine: &'a Engine,
    instance: String,
}

impl<'a> House<'a> {
    /// Whose streams go through the engine, as those of one on another host do.
    fn behind_a_proxy(driver: &'a Driver) -> (Proxy, House<'a>) {
        House::with_streams(driver, false)
    }

    fn with_streams(driver: &'a Driver, direct: bool) -> (Proxy, House<'a>) {
        let engine = driver.engine().expect("trouble is for engines with an API");
        let proxy = Proxy::to(engine.socket());
        let url = format!("{}.url=\"unix://{}\"", driver.configured(), proxy.socket().display());
        let direct = driver.direct(direct);
        let house = House::new(driver, &["--set", &url, "--set", &direct]);
        (proxy, house)
    }

    pub(crate) fn new(driver: &'a Driver, flags: &[&str]) -> House<'a> {
        let engine = driver.engine().expect("trouble is for engines with an API");
        let instance = drivers::new_instance();
        let size = format!("pool.size={WARM}");
        let own = ["--set", &size, "--set", "limits.create_timeout=10s", "--set", "pool.wait_timeout=15s"];
        let soon = ["--set", "pool.reconcile_period=500ms"];
        let server = driver.start(&instance, &[&own[..], &soon, flags].concat());
        let house = House { server, engine, instance };
        USERS.iter().for_each(|user| house.write(user));
        house.is_at_rest();
        house
    }

    /// Acknowledged: from now on it is there, or an answer says `lost`. Where no sandbox can be had at first, a while
    /// after trouble, one can be later.
    pub(crate) fn write(&self, user: &str) {
        let code = format!("open('f', 'w').write({user:?})");
        let begun = Instant::now();
        while !self.asks(user, &code, 10_000).acknowledges() {
            assert!(begun.elapsed() < RECOVERY, "{user}: {}", self.server.log());
        }
    }

    /// What the user wrote is there, and nobody says that anything was lost; a while after trouble at the latest.
    pub(crate) fn has_its_file(&self, user: &str) {
        let begun = Instant::now();
        let answer = loop {
            let reply = self.asks(user, "result = open('f').read()", 10_000);
            reply.is_fine(Duration::MAX);
            if reply.status == 200 {
                break reply.answer;
            }
            assert!(begun.elapsed() < RECOVERY, "{user}: {reply:?}: {}", self.server.log());
        };
        assert_eq!(answer["result"], user, "{user}: {answer}: {}", self.server.log());
    }

    /// What the user wrote is gone, and the first answer that there is says so.
    pub(crate) fn has_lost_its_file(&self, user: &str) {
        let begun = Instant::now();
        loop {
            let reply = self.asks(user, "import os\nresult = os.listdir()", 10_000);
            if reply.status == 200 {
                let told = (&reply.answer["result"], &reply.answer["session"]);
                return assert_eq!(told, (&json!([]), &json!("lost")), "{user}: {reply:?}");
            }
            reply.is_fine(Duration::MAX);
            assert!(begun.elapsed() < RECOVERY, "{user}: {reply:?}: {}", self.server.log());
        }
    }

    pub(crate) fn asks(&self, user: &str, code: &str, timeout_ms: u64) -> Reply {
        let body = json!({"user_id": user, "code": code, "timeout_ms": timeout_ms}).to_string();
        let begun = Instant::now();
        let json = [("content-type", "application/json")];
        let (status, headers, text) = self.server.request("POST", "/run", &json, &body);
        let answer = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let retry_after = header(&headers, "retry-after").and_then(|seconds| seconds.parse().ok());
        Reply { status, retry_after, answer, took: begun.elapsed() }
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.server.get("/readyz").0 == 200
    }

    /// The pool is full, and the engine has a sandbox for each session and each warm one, and no other.
    pub(crate) fn is_at_rest(&self) {
        let warm = || self.server.metric("codesandbox_sandboxes{state=\"warm\"}") as usize;
        let claimed = || self.server.metric("codesandbox_sandboxes{state=\"claimed\"}") as usize;
        let sessions = || self.server.metric("codesandbox_sessions") as usize;
        let there = || self.engine.containers_of(&self.instance).len();
        let begun = Instant::now();
        while !(warm() == WARM && claimed() == sessions() && there() == WARM + sessions()) {
            let state = format!("{} warm, {} sessions, {} containers", warm(), sessions(), there());
            assert!(begun.elapsed() < RECOVERY, "{state}: {}", self.server.log());
            std::thread::sleep(Duration::from_millis(50));
        }
        let owners = self.owners();
        let different: HashSet<_> = owners.iter().collect();
        assert_eq!(different.len(), owners.len(), "two sandboxes of one session: {owners:?}");
        assert_eq!(owners.len(), sessions(), "each session's sandbox is named: {owners:?}");
    }

    /// By the names of their containers.
    fn owners(&self) -> Vec<String> {
        let names = self.engine.names_of(&self.instance).into_iter();
        let rests = names.filter_map(|name| {
            let rest =
                name.trim_start_matches('/').strip_prefix(&format!("codesandbox-{}-", self.instance))?;
            Some(rest.split_once('-')?.0.to_owned())
        });
        rests.filter(|owner| owner != "new").collect()
    }

    pub(crate) fn lost(&self) -> Vec<String> {
        let (_, metrics) = self.server.get("/metrics");
        let lost = metrics.lines().filter(|line| line.starts_with("codesandbox_sandboxes_lost_total"));
        lost.map(str::to_owned).collect()
    }
}

/// What a request got, and when.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) retry_after: Option<u64>,
    pub(crate) answer: Value,
    pub(crate) took: Duration,
}

impl Reply {
    /// An answer or a 503 that says when to come again, in time; and no word of a loss.
    pub(crate) fn is_fine(&self, limit: Duration) {
        match self.status {
            200 => assert_eq!(self.answer.get("session"), None, "{self:?}"),
            503 => {
                assert_eq!(self.answer["code"], "engine_unavailable", "{self:?}");
                assert!(self.retry_after.is_some(), "{self:?}");
            }
            _ => panic!("{self:?}"),
        }
        assert!(self.took <= limit, "{self:?}");
    }

    pub(crate) fn is_unavailable(&self, limit: Duration) {
        assert_eq!(self.status, 503, "{self:?}");
        self.is_fine(limit);
    }

    /// The code came to its end, and nothing was wrong; else no sandbox could be had.
    pub(crate) fn acknowledges(&self) -> bool {
        self.is_fine(Duration::MAX);
        self.status == 200 && self.answer.get("error").is_none()
    }
}

/// It leaves a file when it begins, and another at its end.
pub(crate) fn sleeping(seconds: u64) -> String {
    format!(
        "import time\nopen('begun', 'w').close()\ntime.sleep({seconds})\nopen('g', 'w').close()\nresult = 'slept'"
    )
}

/// Runs that last through all of it, that end in the middle by their own time, that are begun in the middle by users
/// with a sandbox, a warm one, or none at all.
fn an_engine_that_is_frozen_for_a_while(driver: &Driver) {
    let (proxy, house) = House::behind_a_proxy(driver);
    // Once as long as it may be; elsewhere as long as it takes to see every deadline pass.
    let seconds = if driver.name == "docker" { 30 } else { 10 };
    let new_users = ["n0", "n1", "n2", "n3", "n4"];
    std::thread::scope(|scope| {
        let house = &house;
        let long = scope.spawn(|| house.asks("a", &sleeping(2), 60_000));
        let short = scope.spawn(|| house.asks("b", &sleeping(2), 3_000));
        for user in ["a", "b"] {
            eventually("it runs", || house.server.get(&format!("/sessions/{user}")).1.contains("running"));
        }
        std::thread::sleep(Duration::from_millis(500)); // the frames are on their way to the sandboxes
        proxy.freeze();
        let begun = Instant::now();
        let idle = scope.spawn(|| house.asks("c", "result = 1", 2_000));
        let new = new_users.map(|user| scope.spawn(|| house.asks(user, "result = 1", 2_000)));
        std::thread::sleep(Duration::from_secs(seconds).saturating_sub(begun.elapsed()));
        assert_eq!(house.server.get("/healthz").0, 200);
        proxy.thaw();
        let long = long.join().unwrap();
        assert_eq!((long.status, &long.answer["result"]), (200, &json!("slept")), "{long:?}");
        short.join().unwrap().is_fine(Duration::from_secs(3) + GRACE_AND_MARGIN);
        idle.join().unwrap().is_fine(Duration::from_secs(2) + GRACE_AND_MARGIN);
        for new in new {
            new.join().unwrap().is_fine(WAIT + Duration::from_secs(2) + GRACE_AND_MARGIN);
        }
    });
    USERS.iter().for_each(|user| house.has_its_file(user));
    for user in new_users {
        house.write(user);
        house.has_its_file(user);
    }
    assert!(house.is_ready());
    assert_eq!(house.lost(), [""; 0]);
    house.is_at_rest();
}

fn an_engine_that_is_frozen_while_a_client_goes_away(driver: &Driver) {
    let (proxy, house) = House::behind_a_proxy(driver);
    let body = json!({"user_id": "a", "code": sleeping(60), "timeout_ms": 60_000}).to_string();
    let mut wire = Wire::new(&house.server);
    wire.send(post_bytes(&body));
    eventually("it runs", || house.server.get("/sessions/a").1.contains("running"));
    std::thread::sleep(Duration::from_millis(500)); // the frame is on its way to the sandbox
    proxy.freeze();
    drop(wire);
    // Longer than the supervisor may take to obey.
    let cancelled = "codesandbox_runs_total{outcome=\"cancelled\"}";
    eventually("it is given up", || house.server.metric(cancelled) == 1.0);
    proxy.thaw();
    USERS.iter().for_each(|user| house.has_its_file(user));
    assert_eq!(house.lost(), [""; 0]);
    house.is_at_rest();
}

fn an_engine_that_answers_late(driver: &Driver) {
    let (proxy, house) = House::behind_a_proxy(driver);
    proxy.delay(Duration::from_millis(300));
    let new_users = ["n0", "n1", "n2", "n3"]; // more than are warm
    std::thread::scope(|scope| {
        for user in USERS {
            scope.spawn(|| house.has_its_file(user));
        }
        for user in new_users {
            let house = &house;
            scope.spawn(move || {
                house.write(user);
                house.has_its_file(user);
            });
        }
    });
    // What takes up a sandbox again is slower, too, and works.
    proxy.cut_streams();
    USERS.iter().for_each(|user| house.has_its_file(user));
    assert_eq!(house.server.request("DELETE", "/sessions/n0", &[], "").0, 204);
    assert!(house.is_ready());
    assert_eq!(house.lost(), [""; 0]);
    house.is_at_rest();
}

/// New users come, some go, and every stream breaks, while two of three such calls get no answer.
fn answers_are_lost(driver: &Driver, call: Call) {
    let direct = matches!(call, Call::Inspect); // by which one asks for the process to take a stream from
    let (proxy, house) = House::with_streams(driver, direct);
    proxy.lose(Some(call));
    let new_users = ["n0", "n1", "n2", "n3", "n4", "n5"];
    let mut keepers: Vec<_> = USERS.into();
    for _ in 0..2 {
        std::thread::scope(|scope| {
            let write = |user| {
                let reply = house.asks(user, &format!("open('f', 'w').write({user:?})"), 10_000);
                reply.is_fine(WAIT + Duration::from_secs(10) + GRACE_AND_MARGIN);
                reply.acknowledges().then_some(user)
            };
            let new = new_users.map(|user| scope.spawn(move || write(user)));
            keepers.extend(new.into_iter().filter_map(|new| new.join().unwrap()));
            for user in USERS {
                house.asks(user, "result = 1", 10_000).is_fine(Duration::from_secs(10) + GRACE_AND_MARGIN);
            }
        });
        assert_eq!(house.server.request("DELETE", "/sessions/n0", &[], "").0, 204);
        keepers.retain(|user| *user != "n0");
        proxy.cut_streams();
    }
    eventually("some were lost", || proxy.chances() >= 3);
    proxy.lose(None);
    keepers.iter().for_each(|user| house.has_its_file(user));
    for user in new_users {
        house.write(user);
    }
    assert!(house.is_ready());
    assert_eq!(house.lost(), [""; 0]);
    house.is_at_rest();
}

fn lost_answers_to_create(driver: &Driver) {
    answers_are_lost(driver, Call::Create);
}

fn lost_answers_to_rename(driver: &Driver) {
    answers_are_lost(driver, Call::Rename);
}

fn lost_answers_to_remove(driver: &Driver) {
    answers_are_lost(driver, Call::Remove);
}

fn lost_answers_to_list(driver: &Driver) {
    answers_are_lost(driver, Call::List);
}

fn lost_answers_to_inspect(driver: &Driver) {
    answers_are_lost(driver, Call::Inspect);
}

fn an_engine_that_is_gone_and_comes_back(driver: &Driver) {
    let (proxy, house) = House::behind_a_proxy(driver);
    std::thread::scope(|scope| {
        let house = &house;
        let running = scope.spawn(|| house.asks("a", &sleeping(60), 60_000));
        eventually("it runs", || house.server.get("/sessions/a").1.contains("running"));
        std::thread::sleep(Duration::from_millis(500)); // the frame is on its way to the sandbox
        proxy.cut();
        let running = running.join().unwrap();
        running.is_fine(Duration::from_secs(5));
        assert_eq!(running.answer["error_detail"]["value"], "the engine does not answer", "{running:?}");
    });
    // Though nobody came meanwhile, and sandboxes were warm.
    eventually("it says that it is not ready", || !house.is_ready());
    for user in USERS.into_iter().chain(["n0", "n1", "n2"]) {
        house.asks(user, "result = 1", 10_000).is_unavailable(Duration::from_secs(5));
    }
    proxy.mend();
    USERS.iter().for_each(|user| house.has_its_file(user));
    eventually("it is ready again", || house.is_ready());
    for user in ["n0", "n1", "n2"] {
        house.write(user);
        house.has_its_file(user);
    }
    assert_eq!(house.lost(), [""; 0]);
    house.is_at_rest();
}

/// As by an engine that is restarted within a moment, and whose containers live.
fn streams_that_break_are_established_again(driver: &Driver) {
    let (proxy, house) = House::behind_a_proxy(driver);
    for _ in 0..2 {
        std::thread::scope(|scope| {
            let house = &house;
            let running = USERS.map(|user| scope.spawn(|| house.asks(user, &sleeping(60), 60_000)));
            for user in USERS {
                eventually("it runs", || {
                    house.server.get(&format!("/sessions/{user}")).1.contains("running")
                });
            }
            std::thread::sleep(Duration::from_millis(500)); // the frames are on their way to the sandboxes
            proxy.cut_streams();
            for running in running {
                let running = running.join().unwrap();
                running.is_fine(Duration::from_secs(5));
                assert_eq!(running.answer["error_detail"]["kind"], "crashed", "{running:?}");
            }
        });
        USERS.iter().for_each(|user| house.has_its_file(user));
        proxy.cut_streams(); // while nothing runs
        USERS.iter().for_each(|user| house.has_its_file(user));
        house.write("n0");
    }
    house.has_its_file("n0");
    assert_eq!(house.lost(), [""; 0]);
    house.is_at_rest();
}

/// Where frames go past it, an engine in trouble holds up new users only.
fn a_direct_stream_needs_no_engine(driver: &Driver) {
    let (proxy, house) = House::with_streams(driver, true);
    for trouble in [Proxy::freeze, Proxy::cut] {
        trouble(&proxy);
        for user in USERS {
            let reply = house.asks(user, "result = 1", 2_000);
            assert_eq!((reply.status, &reply.answer["result"]), (200, &json!(1)), "{reply:?}");
            reply.is_fine(Duration::from_secs(2));
        }
        proxy.thaw();
        proxy.mend();
        USERS.iter().for_each(|user| house.has_its_file(user));
    }
    assert_eq!(house.lost(), [""; 0]);
    house.is_at_rest();
}
