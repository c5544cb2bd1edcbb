//! How a server stops, what it forgets and when, and how it recovers.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Server, Wire, eventually, is_root, post_bytes};

fn server(flags: &[&str]) -> Server {
    let mut all = vec!["--set", "pool.size=1"];
    all.extend(flags);
    Server::start(&all)
}

fn claimed(server: &Server) -> f64 {
    server.metric("codesandbox_sandboxes{state=\"claimed\"}")
}

fn ended(server: &Server, reason: &str) -> f64 {
    server.metric(&format!("codesandbox_sessions_ended_total{{reason=\"{reason}\"}}"))
}

/// A run that has begun, on a connection of its own.
fn begin(server: &Server, user_id: &str, code: &str) -> Wire {
    let mut wire = Wire::new(server);
    wire.send(post_bytes(&json!({"user_id": user_id, "code": code}).to_string()));
    let path = format!("/sessions/{user_id}");
    eventually("the run begins", || server.get(&path).1.contains("running"));
    wire
}

/// Parents by process, of the whole host.
fn parents() -> BTreeMap<u32, u32> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let parent = |name: &str| {
        let stat = fs::read_to_string(format!("/proc/{name}/stat")).ok()?;
        let parent = stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()?;
        Some((name.parse().ok()?, parent))
    };
    processes.filter_map(|entry| parent(&entry.file_name().to_string_lossy())).collect()
}

/// A process's children, their children, and so on.
fn descendants(pid: u32) -> Vec<u32> {
    let parents = parents();
    let mut found = vec![pid];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(parents.iter().filter(|(_, of)| **of == parent).map(|(child, _)| *child));
        next += 1;
    }
    found.split_off(1)
}

/// The first processes of a server's sandboxes: 1 in a namespace below the launcher's.
fn supervisors(server: &Server) -> Vec<u32> {
    let is_first = |pid: &u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
        let ids: Vec<_> = ids.split_whitespace().collect();
        ids.len() >= 3 && ids.last() == Some(&"1")
    };
    descendants(server.pid()).into_iter().filter(is_first).collect()
}

fn kill(pid: u32) {
    // SAFETY: sends a signal to a process that a server of this test started and that was just seen alive.
    assert_eq!(unsafe { libc::kill(pid as i32, libc::SIGKILL) }, 0);
}

/// Directories under /sys/fs/cgroup that a server of this pid made.
fn control_groups(pid: u32) -> Vec<String> {
    let (mut found, mut pending) = (Vec::new(), vec![Path::new("/sys/fs/cgroup").to_path_buf()]);
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("codesandbox-") && name.split('-').any(|part| part == pid.to_string()) {
                found.push(entry.path().display().to_string());
            }
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                pending.push(entry.path());
            }
        }
    }
    found
}

/// Awaits a server's good end and looks for what it left behind.
fn ends_without_a_trace(mut server: Server, before: &[u32]) {
    let pid = server.pid();
    let status = server.wait();
    assert_eq!(status.code(), Some(0), "{}", server.log());
    let alive =
        || before.iter().filter(|pid| Path::new(&format!("/proc/{pid}")).exists()).collect::<Vec<_>>();
    eventually("its processes are gone", || alive().is_empty());
    assert_eq!(control_groups(pid), Vec::<String>::new());
}

// -- the end of a server -----------------------------------------------------------------------------

#[test]
fn a_stop_lets_the_run_that_goes_on_end_and_leaves_nothing() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let server = server(&[]);
        let mut wire = begin(&server, "u", "import time\ntime.sleep(1.2)\nresult = 'in time'");
        let processes = descendants(server.pid());
        assert!(processes.len() >= 4, "{processes:?}");
        assert!(!is_root() || !control_groups(server.pid()).is_empty(), "there is something to leave behind");
        server.signal(signal);
        eventually("it takes no more connections", || TcpStream::connect(&server.address).is_err());
        let answer = wire.answer().expect("the run may end");
        assert!(answer.body.contains("in time"), "{answer:?}");
        ends_without_a_trace(server, &processes);
    }
}

#[test]
fn a_key_at_the_terminal_ends_no_run() {
    // Which is a signal to all processes of the foreground.
    use std::os::unix::process::CommandExt;
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let mut command = std::process::Command::new(crate::support::PROGRAM);
        command.process_group(0);
        if !is_root() {
            command.args(["--allow-unenforced", "memory,cpus,uids"]);
        }
        let mut server = Server::spawn(command, None);
        let mut wire = begin(&server, "u", "import time\ntime.sleep(1.2)\nresult = 'in time'");
        // SAFETY: signals a process group that was made for this server.
        assert_eq!(unsafe { libc::killpg(server.pid() as i32, signal) }, 0);
        let answer = wire.answer().expect("the run may end");
        assert!(answer.body.contains("in time"), "{answer:?}");
        assert!(server.wait().success());
    }
}

#[test]
fn a_hangup_ends_no_server() {
    let server = server(&[]);
    server.signal(libc::SIGHUP);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(server.run("u", "result = 1")["result"], 1);
}

#[test]
fn an_upload_that_takes_its_time_holds_no_stop_up() {
    let mut server = server(&["--set", "shutdown.timeout=1s"]);
    server.run("u", "pass");
    let mut wire = Wire::new(&server);
    wire.send("PUT /sessions/u/files/f HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nx");
    eventually("it is under way", || server.get("/metrics").1.contains("codesandbox_file_transfers 1"));
    let begun = Instant::now();
    server.signal(libc::SIGTERM);
    assert!(server.wait().success());
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[test]
fn a_server_without_a_run_stops_at_once() {
    let mut server = server(&["--set", "pool.size=4"]);
    for user_id in ["a", "b", "c"] {
        server.run(user_id, "pass");
    }
    let _idle = Wire::new(&server);
    let mut kept = Wire::new(&server);
    kept.send("GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n");
    kept.answer().unwrap();
    let begun = Instant::now();
    server.signal(libc::SIGTERM);
    assert!(server.wait().success());
    assert!(
        begun.elapsed() < Duration::from_secs(3),
        "connections that idle hold nobody up: {:?}",
        begun.elapsed()
    );
}

#[test]
fn runs_longer_than_the_grace_are_cut() {
    let server = server(&["--set", "shutdown.timeout=500ms"]);
    let mut wire = begin(&server, "u", "import time\ntime.sleep(60)");
    let stubborn = "while True:\n  try:\n    while True: pass\n  except BaseException: pass";
    let mut other = begin(&server, "v", stubborn);
    let processes = descendants(server.pid());
    let begun = Instant::now();
    server.signal(libc::SIGTERM);
    for wire in [&mut wire, &mut other] {
        // Cut off, or told that it was: both are honest.
        assert!(wire.answer().is_none_or(|answer| answer.body.contains("cancelled")));
    }
    ends_without_a_trace(server, &processes);
    let took = begun.elapsed();
    assert!(took > Duration::from_millis(450) && took < Duration::from_secs(6), "{took:?}");
}

#[test]
fn runs_that_wait_in_a_queue_are_told_that_the_server_stops() {
    let mut server = server(&[]);
    let mut running = begin(&server, "u", "import time\ntime.sleep(1)\nresult = 1");
    let mut waiting = Wire::new(&server);
    waiting.send(post_bytes(&json!({"user_id": "u", "code": "result = 2"}).to_string()));
    std::thread::sleep(Duration::from_millis(200));
    server.signal(libc::SIGTERM);
    assert_eq!(running.answer().unwrap().status, 200);
    let answer = waiting.answer().unwrap();
    assert!(answer.status == 503 && answer.body.contains("draining") || answer.status == 200, "{answer:?}");
    assert!(server.wait().success());
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let mut server = server(&[]);
    let mut wire = begin(&server, "u", "import time\ntime.sleep(60)");
    let processes = descendants(server.pid());
    server.signal(libc::SIGTERM);
    eventually("it stops", || server.log().contains("stopping"));
    server.signal(libc::SIGTERM); // an echo of the first
    std::thread::sleep(Duration::from_millis(200));
    assert!(!server.has_ended(), "{}", server.log());
    let begun = Instant::now();
    server.signal(libc::SIGTERM);
    assert_eq!(server.wait().code(), Some(1), "{}", server.log());
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    assert!(wire.answer().is_none());
    eventually("its processes are gone", || {
        processes.iter().all(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists())
    });
}

#[test]
fn a_signal_right_at_the_start_is_no_trouble() {
    for pause in [0, 1] {
        let mut server = server(&[]);
        server.signal(libc::SIGTERM);
        std::thread::sleep(Duration::from_millis(pause));
        if server.wait().success() {
            continue;
        }
        panic!("{}", server.log());
    }
}

/// SIGKILL: nobody is left to clean up, so the kernel does, and the next start removes the directories.
#[test]
fn a_killed_server_leaves_no_process_behind() {
    let server = server(&[]);
    let _wire = begin(&server, "u", "import time\ntime.sleep(60)");
    let processes = descendants(server.pid());
    let pid = server.pid();
    let mut server = server;
    server.signal(libc::SIGKILL);
    assert!(!server.wait().success());
    let alive = || processes.iter().any(|pid| Path::new(&format!("/proc/{pid}")).exists());
    eventually("its processes are gone", || !alive());
    drop(self::server(&[]));
    assert_eq!(control_groups(pid), Vec::<String>::new());
}

// -- the end of a session ----------------------------------------------------------------------------

#[test]
fn an_idle_session_is_reaped_and_its_files_are_gone() {
    let server = server(&["--set", "session.idle_timeout=300ms"]);
    server.run("u", "open('f', 'w')");
    eventually("it is reaped", || ended(&server, "idle") == 1.0);
    assert_eq!(server.get("/sessions/u").0, 404);
    eventually("its sandbox is removed", || claimed(&server) == 0.0);
    assert_eq!(server.run("u", "import os\nresult = os.listdir()")["result"], json!([]));
}

#[test]
fn a_running_session_is_never_idle() {
    let server = server(&["--set", "session.idle_timeout=1s"]);
    let answer = server.run("u", "open('f', 'w')\nimport time\ntime.sleep(2)\nresult = 1");
    assert_eq!((&answer["result"], answer.get("session")), (&json!(1), None), "{answer}");
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(500));
        let files = server.run("u", "import os\nresult = os.listdir()");
        assert_eq!(files["result"], json!(["f"]), "its time begins anew with the end of each run");
    }
    assert_eq!(ended(&server, "idle"), 0.0);
}

#[test]
fn a_session_does_not_live_for_ever_however_busy() {
    let server = server(&["--set", "session.lifetime_max=700ms"]);
    server.run("u", "open('f', 'w')");
    eventually("its lifetime is over", || {
        server.run("u", "pass");
        std::thread::sleep(Duration::from_millis(20));
        ended(&server, "lifetime") == 1.0
    });
    assert_eq!(server.run("u", "import os\nresult = os.listdir()")["result"], json!([]));
}

#[test]
fn the_pool_refills_after_each_claim() {
    let server = server(&["--set", "pool.size=3"]);
    let warm = || server.metric("codesandbox_sandboxes{state=\"warm\"}");
    eventually("it is full", || warm() == 3.0);
    for user_id in ["a", "b", "c", "d"] {
        server.run(user_id, "pass");
        eventually("it is full again", || warm() == 3.0);
    }
    assert_eq!(server.metric("codesandbox_claims_total{how=\"hit\"}"), 4.0);
    assert_eq!(claimed(&server), 4.0);
}

#[test]
fn a_full_house_has_room_again_after_an_end() {
    let server = server(&["--set", "session.max=2", "--set", "session.idle_timeout=500ms"]);
    let try_run =
        |user_id: &str| server.post(json!({"user_id": user_id, "code": "result = 1"}).to_string()).0;
    assert_eq!((try_run("a"), try_run("b"), try_run("c")), (200, 200, 429));
    server.request("DELETE", "/sessions/a", &[], "");
    assert_eq!((try_run("c"), try_run("d")), (200, 429));
    eventually("the idle ones go", || server.metric("codesandbox_sessions") == 0.0);
    assert_eq!((try_run("d"), try_run("e"), try_run("f")), (200, 200, 429));
}

/// A place is free when DELETE has answered: not a moment later, when the old sandbox is gone.
#[test]
fn a_full_house_without_spare_sandboxes_takes_the_next_user_at_once() {
    let server = Server::start(&["--set", "pool.size=0", "--set", "session.max=1"]);
    for turn in 0..10 {
        let user_id = format!("u{turn}");
        let (status, answer) = server.post(json!({"user_id": user_id, "code": "result = 1"}).to_string());
        assert_eq!(status, 200, "turn {turn}: {answer}");
        assert_eq!(server.request("DELETE", &format!("/sessions/{user_id}"), &[], "").0, 204);
    }
}

// -- many at once ------------------------------------------------------------------------------------

#[test]
fn first_requests_of_one_user_that_race_end_in_one_sandbox() {
    let server = server(&["--set", "session.queue=32"]);
    let code = "open('log', 'a').write('x')\nresult = len(open('log').read())";
    let mut counts: Vec<u64> = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..20).map(|_| scope.spawn(|| server.run("u", code))).collect();
        runs.into_iter().map(|run| run.join().unwrap()["result"].as_u64().unwrap()).collect()
    });
    counts.sort_unstable();
    assert_eq!(counts, (1..=20).collect::<Vec<_>>());
    assert_eq!(claimed(&server), 1.0);
    assert_eq!(server.metric("codesandbox_sessions"), 1.0);
}

#[test]
fn runs_of_one_user_are_served_in_the_order_in_which_they_came() {
    let server = server(&[]);
    let mut wires = vec![begin(&server, "u", "import time\ntime.sleep(0.8)\nopen('log', 'a').write('0')")];
    for turn in 1..8 {
        let mut wire = Wire::new(&server);
        let code = format!("open('log', 'a').write('{turn}')");
        wire.send(post_bytes(&json!({"user_id": "u", "code": code}).to_string()));
        wires.push(wire);
        std::thread::sleep(Duration::from_millis(30));
    }
    for wire in &mut wires {
        assert_eq!(wire.answer().unwrap().status, 200);
    }
    assert_eq!(server.run("u", "result = open('log').read()")["result"], "01234567");
}

#[test]
fn runs_of_different_users_do_not_wait_for_one_another() {
    let server = server(&["--set", "pool.size=4"]);
    let _sleeping = begin(&server, "slow", "import time\ntime.sleep(1.5)");
    let begun = Instant::now();
    for user_id in ["a", "b", "c"] {
        assert_eq!(server.run(user_id, "result = 1")["result"], 1);
    }
    assert!(begun.elapsed() < Duration::from_millis(1000), "{:?}", begun.elapsed());
    assert!(server.get("/sessions/slow").1.contains("running"), "it sleeps still");
}

// -- losses ------------------------------------------------------------------------------------------

fn lost(answer: &Value) -> bool {
    if answer.get("error").is_some() {
        assert_eq!(
            (&answer["error_detail"]["kind"], &answer["session"]),
            (&json!("crashed"), &json!("lost")),
            "{answer}"
        );
    }
    answer["session"] == "lost"
}

#[test]
fn a_run_whose_sandbox_dies_says_so_and_the_next_begins_anew() {
    if !is_root() {
        return eprintln!("skipped: only root sees and kills the processes of sandboxes");
    }
    let server = Server::start(&["--set", "pool.size=0"]);
    server.run("u", "open('f', 'w')");
    let mut wire = begin(&server, "u", "import time\nprint('x', flush=True)\ntime.sleep(60)");
    std::thread::sleep(Duration::from_millis(100));
    let [supervisor] = supervisors(&server)[..] else { panic!("{:?}", supervisors(&server)) };
    kill(supervisor);
    let answer = wire.answer().unwrap();
    let answer: Value = serde_json::from_str(&answer.body).unwrap();
    assert!(lost(&answer), "{answer}");
    assert_eq!(answer["workspace_files"], json!(["total 0"]));
    let next = server.run("u", "import os\nresult = os.listdir()");
    assert_eq!((&next["result"], next.get("session")), (&json!([]), None), "{next}");
    assert_eq!(server.metric("codesandbox_sandboxes_lost_total{reason=\"killed\"}"), 1.0);
    eventually("the dead one is removed", || claimed(&server) == 1.0 && supervisors(&server).len() == 1);
}

#[test]
fn a_sandbox_that_dies_while_it_idles_costs_one_run_at_most() {
    if !is_root() {
        return eprintln!("skipped: only root sees and kills the processes of sandboxes");
    }
    let server = Server::start(&["--set", "pool.size=0"]);
    server.run("u", "open('f', 'w')");
    kill(supervisors(&server)[0]);
    let first = server.run("u", "import os\nresult = os.listdir()");
    assert!(lost(&first), "the files are gone, and somebody has to say so: {first}");
    assert_eq!(server.run("u", "import os\nresult = os.listdir()")["result"], json!([]));
}

#[test]
fn a_warm_sandbox_that_died_is_given_to_nobody() {
    if !is_root() {
        return eprintln!("skipped: only root sees and kills the processes of sandboxes");
    }
    let server = server(&["--set", "pool.size=2"]);
    eventually("the pool is full", || server.metric("codesandbox_sandboxes{state=\"warm\"}") == 2.0);
    supervisors(&server).into_iter().for_each(kill);
    std::thread::sleep(Duration::from_millis(100));
    for user_id in ["a", "b", "c"] {
        let answer = server.run(user_id, "result = 1");
        assert_eq!((&answer["result"], answer.get("session")), (&json!(1), None), "{answer}");
    }
}

#[test]
fn the_server_outlives_its_launcher() {
    if !is_root() {
        return eprintln!("skipped: only root kills a launcher that is another user's");
    }
    let server = server(&["--set", "pool.size=2"]);
    server.run("u", "open('f', 'w')");
    let launcher = |pid: &u32| parents().get(pid) == Some(&server.pid());
    for turn in 0..2 {
        let outer: Vec<_> = descendants(server.pid()).into_iter().filter(launcher).collect();
        assert_eq!(outer.len(), 1, "turn {turn}");
        kill(outer[0]);
        std::thread::sleep(Duration::from_millis(100));
        assert!(lost(&server.run("u", "result = 1")), "the sandboxes died with it");
        assert_eq!(server.run("u", "result = 2")["result"], 2);
        assert_eq!(server.run(&format!("new{turn}"), "result = 3")["result"], 3);
        assert_eq!(server.get("/readyz").0, 200);
    }
    let processes = descendants(server.pid());
    server.signal(libc::SIGTERM);
    ends_without_a_trace(server, &processes);
}
