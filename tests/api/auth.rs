//! Who may come in.

use serde_json::{Value, json};

use crate::support::{PROGRAM, Server, command_line, eventually, header};

/// A server that takes the keys of two tenants, and these keys.
struct Guarded {
    server: Server,
    alice: String,
    bob: String,
    directory: tempfile::TempDir,
}

/// What `codesandbox key new` prints: the key, and its line for the file.
fn new_key(tenant: &str) -> (String, String) {
    let (status, out, err) = command_line(&["key", "new", "--tenant", tenant], "");
    assert_eq!((status, err.as_str()), (0, ""));
    let value = |line: &str| line.rsplit_once(": ").unwrap().1.to_owned();
    let mut lines = out.lines();
    (value(lines.next().unwrap()), value(lines.next().unwrap()))
}

fn guarded() -> Guarded {
    let ((alice, alice_line), (bob, bob_line)) = (new_key("alice"), new_key("bob"));
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("keys");
    std::fs::write(&file, format!("# our tenants\n\n{alice_line}\n{bob_line}\n")).unwrap();
    let file = format!("auth.keys_file=\"{}\"", file.display());
    let server = Server::start(&["--set", "pool.size=1", "--set", "auth.mode=keys", "--set", &file]);
    Guarded { server, alice, bob, directory }
}

impl Guarded {
    fn run(&self, headers: &[(&str, &str)], code: &str) -> (u16, Value) {
        let mut all = vec![("content-type", "application/json")];
        all.extend_from_slice(headers);
        let body = json!({"user_id": "a", "code": code}).to_string();
        let (status, _, text) = self.server.request("POST", "/run", &all, &body);
        (status, serde_json::from_str(&text).unwrap())
    }

    fn run_as(&self, key: &str, code: &str) -> Value {
        let (status, answer) = self.run(&[("authorization", &format!("Bearer {key}"))], code);
        assert_eq!(status, 200, "{answer}");
        answer
    }
}

#[test]
fn the_keys_are_read_again_at_sighup_and_a_file_that_is_wrong_changes_nothing() {
    let guarded = guarded();
    let file = guarded.directory.path().join("keys");
    let (carol, carol_line) = new_key("carol");
    let status = |key: &str| guarded.run(&[("x-api-key", key)], "result = 1").0;
    assert_eq!((status(&guarded.alice), status(&carol)), (200, 401));
    std::fs::write(&file, format!("{carol_line}\n")).unwrap();
    guarded.server.signal(libc::SIGHUP);
    eventually("the new key", || status(&carol) == 200);
    assert_eq!(status(&guarded.alice), 401, "a key that is gone opens nothing");
    std::fs::write(&file, "nonsense\n").unwrap();
    guarded.server.signal(libc::SIGHUP);
    eventually("a word on the wrong file", || guarded.server.log().contains("they stay as they were"));
    assert_eq!(status(&carol), 200);
}

#[test]
fn a_known_key_opens_the_door_in_either_header() {
    let guarded = guarded();
    let bearer = format!("Bearer {}", guarded.alice);
    let lower = format!("bearer {}", guarded.bob);
    for header in [
        ("authorization", bearer.as_str()),
        ("Authorization", lower.as_str()),
        ("x-api-key", &guarded.alice),
        ("X-API-Key", &guarded.bob),
    ] {
        let (status, answer) = guarded.run(&[header], "result = 1");
        assert_eq!((status, &answer["result"]), (200, &json!(1)), "{header:?}: {answer}");
    }
}

#[test]
fn without_a_known_key_a_request_is_401_and_told_how() {
    let guarded = guarded();
    let Guarded { server, alice, .. } = &guarded;
    let shorter = &alice[..alice.len() - 1];
    let hash = new_key("alice").1.split_once(':').unwrap().1.to_owned();
    for value in [
        String::new(),
        "Bearer".into(),
        "Bearer ".into(),
        "Bearer wrong".into(),
        format!("Bearer {shorter}"),
        format!("Bearer {alice}x"),
        format!("Bearer {}", alice.to_uppercase()),
        format!("Basic {alice}"),
        format!("Bearer {hash}"),
        alice.clone(),
    ] {
        let (status, answer) = guarded.run(&[("authorization", &value)], "result = 1");
        assert_eq!((status, &answer["code"]), (401, &json!("unauthorized")), "{value}");
    }
    assert_eq!(guarded.run(&[("x-api-key", "wrong")], "result = 1").0, 401);
    let (status, headers, body) = server.request("POST", "/run", &[], "");
    assert_eq!((status, header(&headers, "www-authenticate")), (401, Some("Bearer")), "{body}");
    assert_eq!(server.metric("codesandbox_sandboxes{state=\"claimed\"}"), 0.0, "nothing ran");
}

#[test]
fn only_what_tells_nothing_of_users_is_open() {
    let Guarded { server, alice, .. } = &guarded();
    for path in ["/healthz", "/readyz", "/metrics"] {
        assert_eq!(server.get(path).0, 200, "{path}");
    }
    for (method, path) in
        [("GET", "/capabilities"), ("GET", "/sessions/a"), ("DELETE", "/sessions/a"), ("HEAD", "/sessions/a")]
    {
        assert_eq!(server.request(method, path, &[], "").0, 401, "{method} {path}");
    }
    assert_eq!(server.request("GET", "/capabilities", &[("x-api-key", alice)], "").0, 200);
    assert!(!server.get("/metrics").1.contains("alice"), "no tenant is named there");
}

#[test]
fn a_body_without_a_key_is_refused_before_it_is_read() {
    let guarded = guarded();
    let mut wire = crate::support::Wire::new(&guarded.server);
    wire.send("POST /run HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n");
    assert_eq!(wire.answer().unwrap().status, 401);
}

#[test]
fn the_same_user_id_of_two_tenants_is_two_users() {
    let guarded = guarded();
    let Guarded { server, alice, bob, .. } = &guarded;
    guarded.run_as(alice, "open('mine', 'w').write('alice')");
    let listed = guarded.run_as(bob, "import os\nresult = os.listdir()");
    assert_eq!(listed["result"], json!([]));
    let with = |key: &str, method: &str| server.request(method, "/sessions/a", &[("x-api-key", key)], "").0;
    assert_eq!((with(alice, "GET"), with(bob, "GET")), (200, 200));
    assert_eq!(with(bob, "DELETE"), 204);
    assert_eq!((with(alice, "GET"), with(bob, "GET")), (200, 404), "bob's is gone, not alice's");
    assert_eq!(guarded.run_as(alice, "result = open('mine').read()")["result"], "alice");
}

/// Tenant and user_id are not simply put one after the other.
#[test]
fn no_tenant_reaches_another_by_the_choice_of_its_user_ids() {
    let ((short, short_line), (long, long_line)) = (new_key("a"), new_key("ab"));
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("keys");
    std::fs::write(&file, format!("{short_line}\n{long_line}\n")).unwrap();
    let file = format!("auth.keys_file=\"{}\"", file.display());
    let server = Server::start(&["--set", "pool.size=1", "--set", "auth.mode=keys", "--set", &file]);
    let run = |key: &str, user_id: &str| {
        let headers = [("content-type", "application/json"), ("x-api-key", key)];
        let body = json!({"user_id": user_id, "code": "import os\nresult = os.listdir()\nopen('mine', 'w')"});
        let (_, _, text) = server.request("POST", "/run", &headers, &body.to_string());
        serde_json::from_str::<Value>(&text).unwrap()["result"].clone()
    };
    assert_eq!(run(&short, "bc"), json!([]));
    assert_eq!(run(&long, "c"), json!([]));
    assert_eq!(run(&short, "bc"), json!(["mine"]));
}

#[test]
fn the_log_names_no_key() {
    let guarded = guarded();
    guarded.run_as(&guarded.alice, "result = 1");
    guarded.run(&[("x-api-key", "csb_a_wrong_one")], "result = 1");
    assert!(!guarded.server.log().contains("csb_"), "{}", guarded.server.log());
}

// -- the start ---------------------------------------------------------------------------------------

/// A start that has to fail: its message, after status 2.
fn refused(flags: &[&str]) -> String {
    let (status, _, err) = command_line(flags, "");
    assert_eq!(status, 2, "{flags:?}: {err}");
    assert!(err.starts_with("codesandbox: ") && !err.contains("panicked"), "{err}");
    err
}

#[test]
fn an_address_that_strangers_reach_needs_keys() {
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"] {
        let message = refused(&["--listen", address]);
        assert!(message.contains("listen") && message.contains("auth.mode"), "{address}: {message}");
    }
}

/// By `config` alone: no test of ours listens anywhere but on loopback.
#[test]
fn an_open_address_is_accepted_with_keys_or_with_none_said_aloud() {
    let accepted = |flags: &[&str]| {
        let (status, _, err) = command_line(&[&["config", "--listen", "0.0.0.0:0"], flags].concat(), "");
        assert_eq!(status, 0, "{flags:?}: {err}");
    };
    accepted(&["--set", "auth.mode=none"]);
    accepted(&["--set", "auth.mode=keys", "--set", "auth.keys_file=/some/keys"]);
    let by_variable = std::process::Command::new(PROGRAM)
        .args(["config", "--listen", "0.0.0.0:0"])
        .env("CODESANDBOX_AUTH__MODE", "none")
        .output()
        .unwrap();
    assert!(by_variable.status.success(), "{by_variable:?}");
    assert_eq!(command_line(&["config", "--listen", "127.9.9.9:0"], "").0, 0, "all of 127/8 is loopback");
    assert_eq!(command_line(&["config", "--listen", "[::1]:0"], "").0, 0);
}

#[test]
fn keys_that_cannot_be_read_stop_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keys");
    let flag = format!("auth.keys_file=\"{}\"", path.display());
    let flags = ["--listen", "127.0.0.1:0", "--set", "auth.mode=keys", "--set", &flag];
    let place = path.display().to_string();
    assert!(refused(&flags).contains(&place), "a file that is not there is named");
    for (content, says) in
        [("", "no key"), ("# only this\n", "no key"), ("alice:12\n", ":1:"), ("\nalice\n", ":2:")]
    {
        std::fs::write(&path, content).unwrap();
        let message = refused(&flags);
        assert!(message.contains(&place) && message.contains(says), "{content:?}: {message}");
    }
    assert!(refused(&flags[..4]).contains("auth.keys_file"));
}

#[test]
fn a_new_key_is_random_and_its_line_holds_only_its_hash() {
    let ((first, first_line), (second, second_line)) = (new_key("alice"), new_key("alice"));
    assert!(first != second && first_line != second_line);
    assert!(first.starts_with("csb_") && first.len() >= 40, "{first}");
    let (tenant, hash) = first_line.split_once(':').unwrap();
    assert_eq!((tenant, hash.len()), ("alice", 64));
    assert!(!first_line.contains(&first[4..]));
    for bad in ["", "a:b", "a\nb", " a", "#a"] {
        let (status, out, err) = command_line(&["key", "new", "--tenant", bad], "");
        assert_eq!((status, out.as_str()), (2, ""), "{bad:?}: {err}");
        assert!(err.contains("--tenant"), "{err}");
    }
}
