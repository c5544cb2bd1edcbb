//! The phases of a run in the log.

use crate::support::{Server, eventually};

const PHASES: [&str; 7] = [":body", ":parse", ":queue", ":claim", ":run:send", ":run:sandbox{", ":respond"];

#[test]
fn a_filter_that_names_the_phases_has_the_end_of_each_logged_below_its_request() {
    let server = Server::start(&["--set", "log=\"info,codesandbox::phase=debug\""]);
    let (_, headers, _) =
        server.request("POST", "/run", &[], r#"{"user_id":"u","code":"result = 'secret'"}"#);
    let id = crate::support::header(&headers, "x-request-id").unwrap();
    let request = format!("request{{id=\"{id}\"}}");
    eventually("the request's own end", || server.log().contains(&format!("{request}: close")));
    let log = server.log();
    for phase in PHASES {
        let line = log.lines().find(|line| line.contains(&format!("{request}{phase}")));
        assert!(line.is_some_and(|line| line.contains("time.idle=")), "{phase}: {log}");
    }
    let sandbox = log.lines().find(|line| line.contains(":run:sandbox{")).unwrap();
    assert!(sandbox.contains("wall=") && sandbox.contains("cpu="), "{sandbox}");
    assert!(!log.contains("secret"), "{log}");
}

#[test]
fn the_level_debug_alone_does_not_mean_them() {
    let server = Server::start(&["--set", "log=debug"]);
    server.run("u", "result = 1");
    eventually("the answer's line", || server.log().contains("answered"));
    assert!(!server.log().contains("time.idle="), "{}", server.log());
}
