//! A server that is killed, and the one that comes after it: sessions and their files are as they were.

use std::io::Write;
use std::process::Stdio;
use std::time::Duration;

use codesandbox::runtime::Sandbox;
use codesandbox::supervisor::{Outcome, Run, SOURCE};
use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::drivers::{self, Driver};
use crate::engine::Engine;
use crate::runtime;
use crate::support::{Server, Wire, eventually};

behaviours! {
    "recovery":
    sessions_outlive_a_killed_server_and_the_next_one,
    a_file_that_was_put_outlives_a_killed_server_and_half_a_one_does_not,
    what_nobody_had_claimed_is_removed_at_the_next_start,
    strangers_on_the_engine_are_left_alone,
    two_servers_on_one_engine_do_not_touch_each_other,
    a_run_that_went_on_when_the_server_died_is_over,
    a_server_that_stops_well_leaves_nothing_to_recover,
    a_server_that_keeps_its_sessions_leaves_them_to_the_next_one,
    a_server_that_is_stopped_twice_costs_no_session_its_files,
    a_second_server_of_an_instance_is_refused,
    what_an_engine_made_for_nobody_is_removed,
    programs_that_run_without_a_server_leave_each_other_alone,
    a_kernel_outlives_a_server_or_is_told_lost,
    a_frame_that_its_server_left_unfinished_is_forgotten,
}

fn engine(driver: &Driver) -> &Engine {
    driver.engine().expect("only containers outlive a server")
}

fn start(driver: &Driver, instance: &str) -> Server {
    driver.start(instance, &["--set", "pool.size=1"])
}

fn kill(mut server: Server) {
    server.signal(libc::SIGKILL);
    server.wait();
}

fn content(server: &Server, user: &str) -> serde_json::Value {
    let answer = server.run(user, "result = open('f').read()");
    assert_eq!(answer.get("session"), None, "{user}: {answer}");
    answer["result"].clone()
}

fn sessions_outlive_a_killed_server_and_the_next_one(driver: &Driver) {
    let instance = drivers::new_instance();
    let mut server = start(driver, &instance);
    for user in ["a", "b"] {
        server.run_with(user, "open('f', 'w').write(text)", json!({"data": {"text": user}}));
    }
    for time in ["once", "twice", "three times"] {
        kill(server);
        server = start(driver, &instance);
        for user in ["a", "b"] {
            assert_eq!(server.get(&format!("/sessions/{user}")).0, 200, "{user}, killed {time}");
            assert_eq!(content(&server, user), user, "killed {time}");
        }
        assert_eq!(server.run("a", "print(1)")["stdout"], "1\n", "killed {time}");
        assert_eq!(server.run("a", "1 / 0")["error_detail"]["name"], "ZeroDivisionError", "killed {time}");
    }
    let late = server.run_with("a", "while True: pass", json!({"timeout_ms": 300}));
    assert_eq!((&late["error_detail"]["kind"], late.get("session")), (&json!("timeout"), None), "{late}");
    assert_eq!(content(&server, "a"), "a");
    assert_eq!(server.request("DELETE", "/sessions/a", &[], "").0, 204);
    assert_eq!(server.run("a", "import os\nresult = os.listdir()")["result"], json!([]));
}

fn a_file_that_was_put_outlives_a_killed_server_and_half_a_one_does_not(driver: &Driver) {
    let instance = drivers::new_instance();
    let mut server = start(driver, &instance);
    for time in ["once", "twice"] {
        assert!([201, 204].contains(&server.put("/sessions/a/files/d/f", time)), "{time}");
        let mut wire = Wire::new(&server);
        wire.send("PUT /sessions/a/files/half HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nbegun");
        let taken = || server.metric("codesandbox_file_bytes_total{direction=\"in\"}") >= 9.0;
        eventually("half of it is in", taken);
        kill(server);
        server = start(driver, &instance);
        assert_eq!(server.get("/sessions/a/files/d/f"), (200, time.to_owned()));
        let listed = server.get("/sessions/a/files").1;
        assert!(!listed.contains("half") && listed.matches("path").count() == 2, "{time}: {listed}");
    }
    std::thread::scope(|scope| {
        let code = "import time, os\nwhile not os.path.exists('late'): time.sleep(0.01)\nresult = 1";
        let run = scope.spawn(|| server.run("a", code));
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(server.put("/sessions/a/files/late", "x"), 201, "beside a run, too");
        assert_eq!(run.join().unwrap()["result"], 1);
    });
}

fn what_nobody_had_claimed_is_removed_at_the_next_start(driver: &Driver) {
    let instance = drivers::new_instance();
    let server = driver.start(&instance, &["--set", "pool.size=2"]);
    server.run("a", "open('f', 'w').write('a')");
    eventually("two are warm", || server.metric("codesandbox_sandboxes{state=\"warm\"}") == 2.0);
    let before = engine(driver).containers_of(&instance);
    assert_eq!(before.len(), 3, "{before:?}");
    kill(server);
    let server = driver.start(&instance, &["--set", "pool.size=0"]);
    eventually("only the claimed one is left", || engine(driver).containers_of(&instance).len() == 1);
    assert!(before.contains(&engine(driver).containers_of(&instance)[0]));
    assert_eq!(content(&server, "a"), "a");
}

fn strangers_on_the_engine_are_left_alone(driver: &Driver) {
    let engine = engine(driver);
    let instance = drivers::new_instance();
    // An instance whose name begins as ours does, one without a label of ours, and one with another label's.
    let labels = [
        json!({"codesandbox.instance": format!("{instance}0")}),
        json!({}),
        json!({"instance": instance, "other.instance": instance}),
    ];
    let strangers: Vec<_> =
        labels.iter().map(|labels| engine.make_stranger(&drivers::image(), labels)).collect();
    let strangers = Strangers(engine, strangers);
    let server = start(driver, &instance);
    server.run("a", "open('f', 'w').write('a')");
    kill(server);
    let server = start(driver, &instance);
    assert_eq!(content(&server, "a"), "a");
    drop(server);
    std::thread::sleep(Duration::from_millis(200));
    assert!(strangers.are_unharmed(), "a container of somebody else's was touched");
}

/// Removed in the end, however the trial goes.
struct Strangers<'a>(&'a Engine, Vec<String>);

impl Strangers<'_> {
    fn are_unharmed(&self) -> bool {
        self.1.iter().all(|id| self.0.is_running(id))
    }
}

impl Drop for Strangers<'_> {
    fn drop(&mut self) {
        self.1.iter().for_each(|id| self.0.remove(id));
    }
}

fn two_servers_on_one_engine_do_not_touch_each_other(driver: &Driver) {
    let (one, other) = (drivers::new_instance(), drivers::new_instance());
    let (first, second) = (start(driver, &one), start(driver, &other));
    for (server, text) in [(&first, "first"), (&second, "second")] {
        server.run_with("a", "open('f', 'w').write(text)", json!({"data": {"text": text}}));
    }
    kill(first);
    let first = start(driver, &one);
    assert_eq!((content(&first, "a"), content(&second, "a")), (json!("first"), json!("second")));
    drop(second); // takes its own containers away, and no other
    assert_eq!(engine(driver).containers_of(&other), Vec::<String>::new());
    assert_eq!(content(&first, "a"), "first");
}

fn a_run_that_went_on_when_the_server_died_is_over(driver: &Driver) {
    let instance = drivers::new_instance();
    let server = start(driver, &instance);
    server.run("a", "open('f', 'w').write('0')");
    let code = "import os, time\nfor n in range(600):\n with open('g', 'w') as file: file.write(str(n))\n \
                os.replace('g', 'f')\n time.sleep(0.1)"; // never a file that is empty, whenever it is killed
    let body = json!({"user_id": "a", "code": code, "timeout_ms": 60_000}).to_string();
    let mut wire = crate::support::Wire::new(&server);
    wire.send(crate::support::post_bytes(&body));
    eventually("it runs", || server.get("/sessions/a").1.contains("running"));
    std::thread::sleep(Duration::from_millis(500));
    kill(server);
    assert!(wire.answer().is_none(), "nobody is there to answer");
    let server = start(driver, &instance);
    let at = |server: &Server| content(server, "a").as_str().unwrap().parse::<u32>().unwrap();
    let first = at(&server);
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(at(&server), first, "nothing of it goes on");
}

fn a_server_that_stops_well_leaves_nothing_to_recover(driver: &Driver) {
    let instance = drivers::new_instance();
    let server = start(driver, &instance);
    server.run("a", "open('f', 'w').write('a')");
    drop(server);
    assert_eq!(engine(driver).containers_of(&instance), Vec::<String>::new());
}

fn a_server_that_keeps_its_sessions_leaves_them_to_the_next_one(driver: &Driver) {
    let instance = drivers::new_instance();
    let flags = ["--set", "pool.size=1", "--set", "shutdown.sessions=\"keep\""];
    let server = driver.start(&instance, &flags);
    server.run("a", "open('f', 'w').write('a')");
    drop(server);
    let kept = engine(driver).containers_of(&instance);
    assert_eq!(kept.len(), 1, "the warm one is gone, the session's is not: {kept:?}");
    let server = start(driver, &instance);
    assert_eq!(content(&server, "a"), "a");
    drop(server);
    assert_eq!(engine(driver).containers_of(&instance), Vec::<String>::new());
}

fn a_server_that_is_stopped_twice_costs_no_session_its_files(driver: &Driver) {
    let instance = drivers::new_instance();
    let mut server = start(driver, &instance);
    server.run("a", "open('f', 'w').write('a')");
    let mut wire = crate::support::Wire::new(&server);
    let body = json!({"user_id": "a", "code": "import time\ntime.sleep(60)", "timeout_ms": 60_000});
    wire.send(crate::support::post_bytes(&body.to_string()));
    eventually("it runs", || server.get("/sessions/a").1.contains("running"));
    server.signal(libc::SIGTERM);
    eventually("it stops", || server.log().contains("stopping"));
    std::thread::sleep(Duration::from_millis(200)); // sooner it would be an echo of the first
    server.signal(libc::SIGTERM);
    assert_eq!(server.wait().code(), Some(1), "{}", server.log());
    let server = start(driver, &instance);
    assert_eq!(content(&server, "a"), "a");
    drop(server);
    assert_eq!(engine(driver).containers_of(&instance), Vec::<String>::new());
}

fn a_second_server_of_an_instance_is_refused(driver: &Driver) {
    let instance = drivers::new_instance();
    let server = start(driver, &instance);
    server.run("a", "open('f', 'w').write('a')");
    let mut command = driver.command();
    let second = command.args(["--listen", "127.0.0.1:0", "--instance", &instance]).output().unwrap();
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(!second.status.success() && said.contains("uses the engine at"), "{said}");
    assert_eq!(content(&server, "a"), "a");
}

/// A create whose server was killed comes to its end all the same, after the next server has looked.
fn what_an_engine_made_for_nobody_is_removed(driver: &Driver) {
    let instance = drivers::new_instance();
    let flags =
        ["--set", "pool.size=0", "--set", "limits.create_timeout=5s", "--set", "pool.reconcile_period=500ms"];
    let server = driver.start(&instance, &flags);
    server.run("a", "open('f', 'w').write('a')");
    let label = json!({"codesandbox.instance": instance});
    let late = engine(driver).make_stranger(&drivers::image(), &label);
    assert_eq!(engine(driver).containers_of(&instance).len(), 2);
    eventually("only the session's own is left", || !engine(driver).containers_of(&instance).contains(&late));
    assert_eq!(server.metric("codesandbox_reconciled_total{difference=\"unknown\"}"), 1.0);
    assert_eq!(content(&server, "a"), "a");
}

fn a_kernel_outlives_a_server_or_is_told_lost(driver: &Driver) {
    let instance = drivers::new_instance();
    let mut server = start(driver, &instance);
    let kernel = |server: &Server, code: &str| server.run_with("a", code, json!({"mode": "kernel"}));
    kernel(&server, "x = 41; open('f', 'w').write('kept')");
    for time in ["once", "twice"] {
        kill(server);
        server = start(driver, &instance);
        let answer = kernel(&server, "[open('f').read(), globals().get('x')]");
        let wanted = match answer.get("session") {
            None => json!(["kept", 41]),
            Some(lost) => {
                assert_eq!(lost, "kernel_lost", "killed {time}: {answer}");
                json!(["kept", null])
            }
        };
        assert_eq!(answer["result"], wanted, "killed {time}: {answer}");
        let again = kernel(&server, "x = 41; x");
        assert_eq!((&again["result"], again.get("session")), (&json!(41), None), "killed {time}: {again}");
    }
    let fresh = server.run("a", "result = open('f').read()");
    assert_eq!((&fresh["result"], fresh.get("session")), (&json!("kept"), None), "{fresh}");
}

fn programs_that_run_without_a_server_leave_each_other_alone(driver: &Driver) {
    let instance = drivers::new_instance();
    let run = |code: &str| {
        let mut command = driver.command();
        command.args(["run", "--instance", &instance, "-"]);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().expect("it was piped").write_all(code.as_bytes()).unwrap();
        child
    };
    let long = run("import time\nprint('begun', flush=True)\ntime.sleep(6)\nresult = 'long'");
    std::thread::sleep(Duration::from_secs(3)); // until it has its sandbox
    let short = run("result = 'short'");
    for (child, wanted) in [(short, "\"short\"\n"), (long, "begun\n\"long\"\n")] {
        let output = child.wait_with_output().unwrap();
        let (said, why) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!((said.as_ref(), output.status.code()), (wanted, Some(0)), "{why}");
    }
    let left = engine(driver).containers_of(&format!("{instance}-run"));
    assert!(left.is_empty(), "{left:?}");
}

fn a_frame_that_its_server_left_unfinished_is_forgotten(driver: &Driver) {
    runtime::in_tokio(async {
        let engine = driver.runtime(&drivers::new_instance(), SOURCE).await;
        let Sandbox { id, mut stream } = engine.create(&runtime::spec()).await.unwrap();
        // A run of 300 bytes, of which a hello could be taken for the rest, and one that no hello would end.
        for length in [300_u32, 1 << 20] {
            let header = [&7_u64.to_be_bytes()[..], &[2], &length.to_be_bytes(), b"\0\0\0\x02{}"].concat();
            stream.write_all(&header).await.unwrap();
            stream.flush().await.unwrap();
            drop(stream);
            // Less than a server takes to start: until an engine has noticed, it passes on what it still has of the old
            // stream, and that might come between two frames of the new one.
            tokio::time::sleep(Duration::from_millis(200)).await;
            let mut supervisor = runtime::greeted(engine.attach(&id).await.unwrap().stream).await;
            let report = supervisor.run(&Run::new("result = 1", Duration::from_secs(10))).await.unwrap();
            assert!(matches!(report.outcome, Outcome::Result(result) if result.get() == "1"), "{length}");
            drop(supervisor);
            stream = engine.attach(&id).await.unwrap().stream;
        }
        drop(stream);
        engine.remove(&id).await.unwrap();
    });
}
