//! What befalls a sandbox from outside, with the engine's own means: the answer, the log and the metric tell the
//! causes apart, and the next run begins anew.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::drivers::Driver;
use crate::engine::Engine;
use crate::proxy::Proxy;
use crate::support::{Server, eventually};

behaviours! {
    "fates":
    a_sandbox_killed_from_outside,
    a_sandbox_that_is_paused,
    a_sandbox_whose_pid_1_runs_out_of_memory,
    a_run_out_of_memory_does_not_lose_its_sandbox,
    a_sandbox_removed_behind_our_back,
    a_sandbox_that_is_killed_while_it_idles_costs_one_run_at_most,
    a_warm_sandbox_that_is_killed_is_given_to_nobody,
    an_engine_that_goes_and_comes_back,
    a_runtime_that_the_engine_does_not_have_stops_the_start,
    an_image_that_is_missing_and_may_not_be_pulled_stops_the_start,
    an_image_that_goes_missing_is_told_as_that,
}

/// A server without warm sandboxes: each container is a session's.
fn server(driver: &Driver, instance: &str) -> Server {
    driver.start(instance, &["--set", "pool.size=0"])
}

/// The one container of an instance.
fn only_container(engine: &Engine, instance: &str) -> String {
    let containers = engine.containers_of(instance);
    assert_eq!(containers.len(), 1, "{containers:?}");
    containers.into_iter().next().unwrap()
}

/// A run goes on while something is done to its container; the answer, which has to come in time.
fn during_a_run(driver: &Driver, timeout_ms: u64, act: impl Fn(&Engine, &str)) -> (Server, Value) {
    let engine = driver.engine().expect("fates are for engines with an API");
    let instance = crate::drivers::new_instance();
    let server = server(driver, &instance);
    let answer = std::thread::scope(|scope| {
        let code = "print('before', flush=True)\nimport time\ntime.sleep(60)";
        let run = scope.spawn(|| server.run_with("u", code, json!({"timeout_ms": timeout_ms})));
        eventually("it runs", || server.get("/sessions/u").1.contains("running"));
        eventually("its container is there", || engine.containers_of(&instance).len() == 1);
        std::thread::sleep(Duration::from_millis(500));
        act(engine, &only_container(engine, &instance));
        run.join().unwrap()
    });
    (server, answer)
}

/// The sandbox is lost, and it is told why, in the answer, in the log and to the metrics.
fn is_lost(server: &Server, answer: &Value, kind: &str, value: &str, reason: &str) {
    assert_eq!(answer["session"], "lost", "{answer}");
    assert_eq!(answer["error_detail"]["kind"], kind, "{answer}");
    assert!(answer["error_detail"]["value"].as_str().unwrap().contains(value), "{answer}");
    let lost = format!("codesandbox_sandboxes_lost_total{{reason=\"{reason}\"}}");
    assert_eq!(server.metric(&lost), 1.0, "{lost}: {}", server.get("/metrics").1);
    eventually("the log says so", || server.log().contains("lost"));
    let next = server.run("u", "import os\nresult = os.listdir()");
    assert_eq!((&next["result"], next.get("session")), (&json!([]), None), "the next begins anew: {next}");
}

fn a_sandbox_killed_from_outside(driver: &Driver) {
    let kill = |engine: &Engine, id: &str| engine.post(&format!("/containers/{id}/kill"));
    let begun = Instant::now();
    let (server, answer) = during_a_run(driver, 30_000, kill);
    assert!(begun.elapsed() < Duration::from_secs(10), "not only at its timeout: {answer}");
    is_lost(&server, &answer, "crashed", "the sandbox was killed from outside", "killed");
}

fn a_sandbox_that_is_paused(driver: &Driver) {
    let pause = |engine: &Engine, id: &str| engine.post(&format!("/containers/{id}/pause"));
    if !driver.can_pause() {
        return eprintln!(
            "{}: passed over: no freezer control group, so this engine cannot pause",
            driver.name
        );
    }
    let (server, answer) = during_a_run(driver, 1_000, pause);
    is_lost(&server, &answer, "timeout", "the sandbox is paused", "paused");
}

fn a_sandbox_whose_pid_1_runs_out_of_memory(driver: &Driver) {
    if !driver.limits_memory() {
        return eprintln!("{}: passed over: no control group limits memory", driver.name);
    }
    // Nothing but the workspace grows, and when all who may be killed are, it is PID 1's turn.
    let flags =
        ["--set", "limits.memory=128MiB", "--set", "limits.workspace=64MiB", "--set", "limits.tmp=16MiB"];
    let server = driver.own(&[&flags[..], &["--set", "limits.shm=16MiB"]].concat());
    let code = "import os\nfd = os.memfd_create('x')\nfor n in range(400): os.write(fd, bytes(1 << 20))";
    let answer = server.run("u", code);
    assert_eq!(answer["error_detail"]["kind"], "out_of_memory", "{answer}");
    if answer["session"] == "lost" {
        is_lost(&server, &answer, "out_of_memory", "the sandbox ran out of memory", "out_of_memory");
    }
}

fn a_run_out_of_memory_does_not_lose_its_sandbox(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let answer = server.run(&u, "open('kept', 'w')\nx = b'x' * (1 << 32)");
    assert_eq!(answer["error_detail"]["kind"], "out_of_memory", "{answer}");
    assert!(answer.get("session").is_none(), "{answer}");
    assert_eq!(server.run(&u, "import os\nresult = os.listdir()")["result"], json!(["kept"]));
}

fn a_sandbox_removed_behind_our_back(driver: &Driver) {
    let (server, answer) = during_a_run(driver, 30_000, |engine, id| engine.remove(id));
    // An engine kills it before it forgets it, and a look at it may come between the two.
    let (value, reason) = match answer["error_detail"]["value"].as_str() {
        Some("the sandbox is gone") => ("the sandbox is gone", "gone"),
        _ => ("the sandbox was killed from outside", "killed"),
    };
    is_lost(&server, &answer, "crashed", value, reason);
}

fn an_engine_that_goes_and_comes_back(driver: &Driver) {
    let proxy = Proxy::to(driver.engine().expect("fates are for engines with an API").socket());
    let url = format!("{}.url=\"unix://{}\"", driver.configured(), proxy.socket().display());
    let through_it = format!("{}.direct=false", driver.configured());
    let server = driver.own(&["--set", "pool.size=0", "--set", &url, "--set", &through_it]);
    server.run("u", "open('f', 'w')");
    let answer = std::thread::scope(|scope| {
        let code = "import time\ntime.sleep(60)";
        let run = scope.spawn(|| server.run_with("u", code, json!({"timeout_ms": 30_000})));
        eventually("it runs", || server.get("/sessions/u").1.contains("running"));
        std::thread::sleep(Duration::from_millis(500));
        proxy.cut();
        run.join().unwrap()
    });
    assert_eq!(answer["error_detail"]["value"], "the engine does not answer", "{answer}");
    assert!(answer.get("session").is_none(), "nobody knows yet: {answer}");
    let (status, answer) = server.post(r#"{"user_id":"u","code":"result = 1"}"#);
    assert_eq!((status, &answer["code"]), (503, &json!("engine_unavailable")), "{answer}");
    let errors = "codesandbox_engine_errors_total{operation=\"attach\",reason=\"unavailable\"}";
    assert!(server.metric(errors) >= 1.0, "{}", server.get("/metrics").1);
    proxy.mend();
    let answer = server.run("u", "import os\nresult = os.listdir()");
    assert_eq!(
        (&answer["result"], answer.get("session")),
        (&json!(["f"]), None),
        "the files are there: {answer}"
    );
    // The same while nothing runs: the next run finds a broken stream.
    proxy.cut();
    let (status, answer) = server.post(r#"{"user_id":"u","code":"result = 1"}"#);
    assert_eq!(status, 503, "{answer}");
    proxy.mend();
    let answer = server.run("u", "import os\nresult = os.listdir()");
    assert_eq!((&answer["result"], answer.get("session")), (&json!(["f"]), None), "{answer}");
}

fn a_runtime_that_the_engine_does_not_have_stops_the_start(driver: &Driver) {
    let runtime = format!("{}.runtime=nonsense", driver.configured());
    let output = driver.command().args(["doctor", "--set", &runtime]).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("nonsense") && error.contains("runc") && error.contains("what helps"), "{error}");
}

fn a_sandbox_that_is_killed_while_it_idles_costs_one_run_at_most(driver: &Driver) {
    let engine = driver.engine().expect("fates are for engines with an API");
    let instance = crate::drivers::new_instance();
    let server = server(driver, &instance);
    server.run("u", "open('f', 'w')");
    engine.post(&format!("/containers/{}/kill", only_container(engine, &instance)));
    std::thread::sleep(Duration::from_millis(300));
    let first = server.run("u", "import os\nresult = os.listdir()");
    assert_eq!(first["session"], "lost", "the files are gone, and somebody has to say so: {first}");
    let next = server.run("u", "import os\nresult = os.listdir()");
    assert_eq!((&next["result"], next.get("session")), (&json!([]), None), "{next}");
}

fn a_warm_sandbox_that_is_killed_is_given_to_nobody(driver: &Driver) {
    let engine = driver.engine().expect("fates are for engines with an API");
    let instance = crate::drivers::new_instance();
    let server = driver.start(&instance, &["--set", "pool.size=1"]);
    eventually("it is warm", || server.metric("codesandbox_sandboxes{state=\"warm\"}") == 1.0);
    engine.post(&format!("/containers/{}/kill", only_container(engine, &instance)));
    std::thread::sleep(Duration::from_millis(300));
    let answer = server.run("u", "result = 1");
    assert_eq!((&answer["result"], answer.get("session")), (&json!(1), None), "{answer}");
}

fn an_image_that_is_missing_and_may_not_be_pulled_stops_the_start(driver: &Driver) {
    let mut command = driver.command();
    command.args(["--listen", "127.0.0.1:0", "--set", "image=localhost/nobody/nothing:1"]);
    command.args(["--instance", &crate::drivers::new_instance()]);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    let remedy = format!("{} pull localhost/nobody/nothing:1", driver.configured());
    for part in ["localhost/nobody/nothing:1", "pull = \"never\"", &remedy] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
}

fn an_image_that_goes_missing_is_told_as_that(driver: &Driver) {
    let engine = driver.engine().expect("fates are for engines with an API");
    let instance = crate::drivers::new_instance();
    let name = format!("localhost/{instance}");
    engine.post(&format!("/images/{}/tag?repo={name}&tag=1", crate::drivers::image()));
    let untag = || engine.call("DELETE", &format!("/images/{name}:1?noprune=1"), &Value::Null);
    let image = format!("image={name}:1");
    let server = driver.start(&instance, &["--set", "pool.size=0", "--set", &image]);
    let before = server.run("u", "result = 1");
    untag();
    assert_eq!(before["result"], 1, "{before}");
    let (status, answer) = server.post(json!({"user_id": "v", "code": "result = 1"}).to_string());
    assert_eq!((status, &answer["code"]), (503, &json!("engine_unavailable")), "{answer}");
    let error = answer["error"].as_str().unwrap_or_default();
    assert!(error.contains("the image of the sandboxes is missing"), "{error}");
    let series = "codesandbox_engine_errors_total{operation=\"create\",reason=\"image_missing\"}";
    assert!(server.metric(series) >= 1.0, "one for each try");
    assert_eq!(server.run("u", "result = 2")["result"], 2, "who has a sandbox keeps it");
}
