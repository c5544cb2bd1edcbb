//! What a client may rely on, line by line.

use std::time::Duration;

use serde_json::{Value, json};

use crate::drivers::{self, Driver};
use crate::support::{Server, Wire, eventually, header, post_bytes};

behaviours! {
    "contract":
    the_first_example_is_answered_byte_for_byte,
    what_is_no_run_request_is_refused_by_name,
    bytes_that_are_no_utf_8_are_a_bad_request,
    a_user_id_has_up_to_256_bytes_of_anything_but_control_characters,
    data_arrives_exactly_and_goes_back_exactly,
    a_key_of_data_that_cannot_be_a_variable_is_named,
    a_key_that_python_would_normalise_is_a_variable_or_refused,
    data_may_be_nested_a_hundred_deep,
    absent_and_null_fields_mean_the_same,
    standard_input_is_what_the_request_says_and_empty_otherwise,
    a_fresh_run_keeps_files_and_forgets_variables,
    a_run_that_comes_just_as_its_sandbox_comes_to_rest_is_as_any_other,
    fields_that_have_nothing_to_say_are_absent,
    an_exception_is_shown_as_python_shows_it_and_never_our_own_lines,
    code_that_is_no_python_is_a_syntax_error_with_its_line,
    an_exit_with_a_status_is_an_error_and_one_without_is_none,
    a_run_out_of_time_is_told_so_and_keeps_what_it_printed_and_wrote,
    the_default_timeout_is_the_configured_one,
    a_run_out_of_memory_is_told_apart_from_a_crash,
    a_signal_that_ends_a_run_is_a_crash_with_its_name,
    a_result_that_json_has_not_is_an_error_that_names_the_part,
    a_result_over_its_cap_is_an_error_and_one_at_it_is_not,
    a_deleted_session_ends_its_run_as_cancelled_and_lost,
    output_is_kept_up_to_its_cap_and_truncated_says_what_was_cut,
    output_that_is_no_utf_8_is_replaced_not_lost,
    an_error_is_cut_at_its_cap_and_said_to_be,
    the_workspace_is_listed_as_ls_prints_it,
    the_listing_is_cut_at_its_cap,
    nothing_is_done_after_an_answer,
    server_timing_tells_three_phases,
    a_request_id_is_taken_where_it_is_sound_and_made_where_not,
    unknown_paths_are_404_and_wrong_methods_405_with_allow,
    only_json_is_taken_or_no_type_at_all,
    a_body_over_its_cap_is_413_however_it_comes,
    a_full_queue_is_session_busy,
    when_all_sessions_are_in_use_a_new_user_is_told_when_to_come_back,
    a_server_that_stops_refuses_new_runs_as_draining,
    user_ids_are_compared_byte_for_byte,
    a_user_id_is_percent_encoded_in_a_path,
    a_session_tells_of_itself,
    a_session_with_a_run_in_it_is_running,
    a_session_is_destroyed_at_once_and_twice_is_fine,
    health_and_readiness_are_200_while_it_serves,
    metrics_are_the_prometheus_text_format,
    capabilities_tell_what_the_server_is_and_enforces,
}

const JSON: [(&str, &str); 1] = [("content-type", "application/json")];

/// The code of a refused request; its message has to hold `says`.
fn refused(server: &Server, body: &str, status: u16, says: &str) {
    let (got, answer) = server.post(body);
    assert_eq!(got, status, "{body}: {answer}");
    let message = answer["error"].as_str().unwrap_or_else(|| panic!("{body}: no message: {answer}"));
    assert!(message.contains(says), "{body}: {message}");
    assert!(answer["code"].is_string(), "{body}: {answer}");
    assert_eq!(answer.as_object().unwrap().len(), 2, "{body}: {answer}");
}

/// The kind of a failed run, after a look at what every failed run has.
fn kind(answer: &Value) -> &str {
    assert_eq!(answer["result"], Value::Null, "{answer}");
    let error = answer["error"].as_str().unwrap_or_else(|| panic!("no error: {answer}"));
    assert!(error.starts_with("Error running code: "), "{error}");
    let detail = answer["error_detail"].as_object().unwrap();
    let mut fields: Vec<_> = detail.keys().map(String::as_str).collect();
    fields.sort_unstable();
    assert_eq!(fields, ["kind", "name", "traceback", "value"], "{answer}");
    assert!(detail.values().all(Value::is_string), "{answer}");
    answer["error_detail"]["kind"].as_str().unwrap()
}

fn raw_run(server: &Server, body: &str) -> String {
    let (status, _, text) = server.request("POST", "/run", &JSON, body);
    assert_eq!(status, 200, "{text}");
    text
}

// -- the request -------------------------------------------------------------------------------------

fn the_first_example_is_answered_byte_for_byte(driver: &Driver) {
    let (server, _) = driver.server(&[]);
    let body = r#"{"user_id":"anonymous","code":"result = x + y","data":{"x":1,"y":2}}"#;
    assert_eq!(raw_run(&server, body), r#"{"result":3,"workspace_files":["total 0"]}"#);
    assert_eq!(raw_run(&server, body), r#"{"result":3,"workspace_files":["total 0"]}"#, "and again");
}

fn what_is_no_run_request_is_refused_by_name(driver: &Driver) {
    let server = driver.own(&["--set", "limits.timeout_max=60s"]);
    for (body, says) in [
        ("", "JSON object"),
        ("nonsense", "JSON object"),
        ("[1]", "JSON object"),
        ("null", "JSON object"),
        (r#"{"user_id":"u","code":"1""#, "body"),
        (r#"{"user_id":"u","code":"1"} x"#, "body"),
        (r#"{"code":"1"}"#, "user_id"),
        (r#"{"user_id":"","code":"1"}"#, "user_id"),
        (r#"{"user_id":7,"code":"1"}"#, "user_id"),
        (r#"{"user_id":["u"],"code":"1"}"#, "user_id"),
        (r#"{"user_id":"a\u0000b","code":"1"}"#, "user_id"),
        (r#"{"user_id":"a\nb","code":"1"}"#, "user_id"),
        (r#"{"user_id":"a\u007fb","code":"1"}"#, "user_id"),
        (r#"{"user_id":"a\u0085b","code":"1"}"#, "user_id"),
        (r#"{"user_id":"\udc00","code":"1"}"#, "user_id"),
        (r#"{"user_id":"u"}"#, "code"),
        (r#"{"user_id":"u","code":""}"#, "code"),
        (r#"{"user_id":"u","code":1}"#, "code"),
        (r#"{"user_id":"u","code":{}}"#, "code"),
        (r#"{"user_id":"u","code":"\ud800"}"#, "code"),
        (r#"{"user_id":"u","code":"1","data":[1]}"#, "data"),
        (r#"{"user_id":"u","code":"1","data":"x"}"#, "data"),
        (r#"{"user_id":"u","code":"1","data":1}"#, "data"),
        (r#"{"user_id":"u","code":"1","mode":"slow"}"#, "mode"),
        (r#"{"user_id":"u","code":"1","mode":1}"#, "mode"),
        (r#"{"user_id":"u","code":"1","timeout_ms":0}"#, "timeout_ms must be an integer from 1 to 60000"),
        (r#"{"user_id":"u","code":"1","timeout_ms":-1}"#, "timeout_ms"),
        (r#"{"user_id":"u","code":"1","timeout_ms":60001}"#, "timeout_ms"),
        (r#"{"user_id":"u","code":"1","timeout_ms":99999999999999999999999}"#, "timeout_ms"),
        (r#"{"user_id":"u","code":"1","timeout_ms":1.5}"#, "timeout_ms"),
        (r#"{"user_id":"u","code":"1","timeout_ms":"1"}"#, "timeout_ms"),
        (r#"{"user_id":"u","code":"1","timeout_ms":true}"#, "timeout_ms"),
        (r#"{"user_id":"u","code":"1","stdin":1}"#, "stdin"),
        (r#"{"user_id":"u","code":"1","stdin":["x"]}"#, "stdin"),
        (r#"{"user_id":"u","code":"1","colour":"red"}"#, "colour"),
        (r#"{"user_id":"u","code":"1","Code":"1"}"#, "Code"),
        (r#"{"user_id":"u","code":"1","code":"2"}"#, "code"),
    ] {
        refused(&server, body, 400, says);
    }
    assert_eq!(server.metric("codesandbox_refused_total{code=\"invalid_request\"}"), 37.0);
    assert_eq!(server.get("/sessions/u").0, 404, "no refused request makes a session");
}

fn bytes_that_are_no_utf_8_are_a_bad_request(driver: &Driver) {
    let (server, _) = driver.server(&[]);
    let mut wire = Wire::new(&server);
    wire.send(
        b"POST /run HTTP/1.1\r\nhost: x\r\ncontent-length: 27\r\n\r\n{\"user_id\":\"\xff\",\"code\":\"1\"} ",
    );
    assert_eq!(wire.answer().unwrap().status, 400);
}

fn a_user_id_has_up_to_256_bytes_of_anything_but_control_characters(driver: &Driver) {
    let (server, _) = driver.server(&[]);
    for user_id in ["u", "a b", "../..", "ü", "🐍", "a\"b\\c", &"u".repeat(256), &"é".repeat(128)] {
        assert_eq!(server.run(user_id, "result = 1")["result"], 1, "{user_id}");
    }
    for user_id in [&"u".repeat(257), &"é".repeat(129)] {
        let body = json!({"user_id": user_id, "code": "1"}).to_string();
        refused(&server, &body, 400, "user_id must not be longer than 256 bytes");
    }
}

fn data_arrives_exactly_and_goes_back_exactly(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let digits = "9".repeat(5000);
    for value in [
        "0.1",
        "0.30000000000000004",
        "1e-320",
        "1.7976931348623157e+308",
        "-0.0",
        "12345678901234567890123456789012345678901234567890",
        &digits,
        "-9223372036854775809",
        "true",
        "null",
        "[]",
        "{}",
        r#"[1,[2,{"a b":[null,false]}]]"#,
        r#""quote \" backslash \\ newline \n é 🐍""#,
        r#""'''\"\"\"; import os #""#,
        r#""\u0000\u0001""#,
    ] {
        let body = format!(r#"{{"user_id":"{u}","code":"result = x","data":{{"x":{value}}}}}"#);
        let answer = raw_run(&server, &body);
        assert!(answer.starts_with(&format!("{{\"result\":{value},\"workspace")), "{value}: {answer}");
    }
    let code = "result = [type(v).__name__ for v in (a, b, c, d, e, f, g)]";
    let data = r#"{"a":true,"b":null,"c":1,"d":1.0,"e":"","f":[],"g":{}}"#;
    let types = format!(r#"{{"user_id":"{u}","code":"{code}","data":{data}}}"#);
    assert!(
        raw_run(&server, &types).contains(r#"["bool","NoneType","int","float","str","list","dict"]"#),
        "types are Python's own"
    );
}

fn a_key_of_data_that_cannot_be_a_variable_is_named(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    for key in [
        "", "a b", "a-b", "1a", "a.b", "a\n", "class", "None", "True", "lambda", "async", "__name__", "__x",
        "__", "a'b", "🐍",
    ] {
        let body = json!({"user_id": u, "code": "1", "data": {"fine": 1, key: 1}}).to_string();
        refused(&server, &body, 400, &format!("{key:?}"));
    }
    for key in ["a", "_", "_x", "match", "type", "print", "ä", "变量", "x1", "result", "x__"] {
        let answer = server.run_with(&u, &format!("result = {key}"), json!({"data": {key: [1]}}));
        assert_eq!(answer["result"], json!([1]), "{key}: {answer}");
    }
}

/// Python reads identifiers in their NFKC form: `ﬁ` in a program is the variable `fi`.
fn a_key_that_python_would_normalise_is_a_variable_or_refused(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    for key in ["\u{fb01}", "\u{1d431}", "\u{aa}"] {
        let body = json!({"user_id": u, "code": format!("result = {key}"), "data": {key: 5}}).to_string();
        let (status, answer) = server.post(&body);
        assert!(status == 400 || answer["result"] == 5, "{key}: {status} {answer}");
    }
}

fn data_may_be_nested_a_hundred_deep(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let body = |depth: usize| {
        let value = format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        format!(r#"{{"user_id":"{u}","code":"result = x","data":{{"x":{value}}}}}"#)
    };
    raw_run(&server, &body(99));
    refused(&server, &body(100), 400, "nested");
    refused(&server, &body(50_000), 400, "nested");
}

fn absent_and_null_fields_mean_the_same(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let body =
        r#"{"user_id":"u","code":"result = 1","data":null,"mode":null,"timeout_ms":null,"stdin":null}"#;
    assert_eq!(
        raw_run(&server, &body.replace("\"u\"", &format!("{u:?}"))),
        r#"{"result":1,"workspace_files":["total 0"]}"#
    );
    let body =
        r#"{"user_id":"u","code":"result = 1","data":{},"mode":"fresh","timeout_ms":300000,"stdin":""}"#;
    assert_eq!(
        raw_run(&server, &body.replace("\"u\"", &format!("{u:?}"))),
        r#"{"result":1,"workspace_files":["total 0"]}"#
    );
}

fn standard_input_is_what_the_request_says_and_empty_otherwise(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let answer = server.run(&u, "input()");
    assert_eq!(kind(&answer), "raised");
    assert_eq!(answer["error_detail"]["name"], "EOFError");
    let code = "import sys\nresult = [input(), sys.stdin.read()]";
    let answer = server.run_with(&u, code, json!({"stdin": "first\nsecond é\n\0"}));
    assert_eq!(answer["result"], json!(["first", "second é\n\0"]));
    let long = "x".repeat(1 << 20);
    let answer = server.run_with(&u, "import sys\nresult = len(sys.stdin.read())", json!({"stdin": long}));
    assert_eq!(answer["result"], 1 << 20);
}

fn a_fresh_run_keeps_files_and_forgets_variables(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    server.run(&u, "kept = 1\nimport builtins\nbuiltins.kept = 2\nopen('file', 'w').write('hello')");
    let answer = server.run(&u, "result = [__name__, open('file').read(), 'kept' in dir(__builtins__)]");
    assert_eq!(answer["result"], json!(["__main__", "hello", false]));
    assert_eq!(server.run(&u, "kept")["error_detail"]["name"], "NameError");
    assert_eq!(server.run(&u, "import os\nresult = os.getcwd()")["result"], "/workspace");
}

/// From 2 ms without a task on the interpreter that waits is told to warm up, and may find the two in one read.
fn a_run_that_comes_just_as_its_sandbox_comes_to_rest_is_as_any_other(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    server.run(&u, "pass");
    for step in 0..60 {
        std::thread::sleep(Duration::from_micros(50 * step));
        let padding = "#".repeat(if step % 2 == 0 { 0 } else { 10_000 });
        let answer = server.run(&u, &format!("result = {step} {padding}"));
        assert_eq!(answer["result"], json!(step), "{answer}");
    }
}

// -- the answer --------------------------------------------------------------------------------------

fn fields_that_have_nothing_to_say_are_absent(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let fields = |answer: Value| {
        let mut keys: Vec<_> = answer.as_object().unwrap().keys().cloned().collect();
        keys.sort_unstable();
        keys.join(" ")
    };
    assert_eq!(fields(server.run(&u, "pass")), "result workspace_files");
    assert_eq!(server.run(&u, "pass")["result"], Value::Null);
    assert_eq!(fields(server.run(&u, "print(1)")), "result stdout workspace_files");
    assert_eq!(
        fields(server.run(&u, "import sys\nprint(1, file=sys.stderr)")),
        "result stderr workspace_files"
    );
    assert_eq!(fields(server.run(&u, "1/0")), "error error_detail result workspace_files");
}

fn an_exception_is_shown_as_python_shows_it_and_never_our_own_lines(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let answer = server.run(&u, "def f():\n    return 1 / 0\n\nresult = 5\nf()");
    assert_eq!(kind(&answer), "raised");
    assert_eq!(answer["error_detail"]["name"], "ZeroDivisionError");
    assert_eq!(answer["error_detail"]["value"], "division by zero");
    let traceback = answer["error_detail"]["traceback"].as_str().unwrap();
    assert!(
        traceback.starts_with("Traceback (most recent call last):\n  File \"<code>\", line 5"),
        "{traceback}"
    );
    assert!(traceback.contains("    return 1 / 0\n"), "{traceback}");
    assert!(traceback.ends_with("ZeroDivisionError: division by zero"), "{traceback}");
    assert!(!traceback.contains("supervisor") && !traceback.contains("exec("), "{traceback}");
    assert_eq!(answer["error"], format!("Error running code: {traceback}"));
}

fn code_that_is_no_python_is_a_syntax_error_with_its_line(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    for code in ["def", "x = 1\n  y = 2", "x = '", "\u{0}", "return 1", "# -*- coding: nonsense -*-\nx = ("] {
        let answer = server.run(&u, code);
        assert_eq!(kind(&answer), "syntax", "{code:?}: {answer}");
    }
    let answer = server.run(&u, "x = 1\ny = = 2");
    let traceback = answer["error_detail"]["traceback"].as_str().unwrap();
    assert!(traceback.contains("line 2") && traceback.contains("y = = 2"), "{traceback}");
}

fn an_exit_with_a_status_is_an_error_and_one_without_is_none(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    for code in ["import sys\nsys.exit(3)", "raise SystemExit(3)", "import os\nos._exit(3)", "exit(3)"] {
        let answer = server.run(&u, code);
        assert_eq!(kind(&answer), "exited", "{code}");
        assert!(answer["error_detail"]["value"].as_str().unwrap().contains('3'), "{answer}");
    }
    let answer = server.run(&u, "import sys\nsys.exit('so long')");
    assert_eq!((kind(&answer), &answer["stderr"]), ("exited", &json!("so long\n")));
    for code in ["result = 1\nimport sys\nsys.exit()", "result = 1\nraise SystemExit(0)"] {
        let answer = server.run(&u, code);
        assert_eq!(answer["result"], 1, "{code}: {answer}");
        assert!(answer.get("error").is_none(), "{answer}");
    }
}

fn a_run_out_of_time_is_told_so_and_keeps_what_it_printed_and_wrote(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let code = "open('kept', 'w')\nprint('before', flush=True)\nwhile True: pass";
    let answer = server.run_with(&u, code, json!({"timeout_ms": 300}));
    assert_eq!(kind(&answer), "timeout");
    assert_eq!(answer["stdout"], "before\n");
    assert!(answer["error"].as_str().unwrap().contains("300 ms"), "{answer}");
    assert!(answer.get("session").is_none(), "the files are kept: {answer}");
    assert_eq!(server.run(&u, "import os\nresult = os.listdir()")["result"], json!(["kept"]));
    assert_eq!(kind(&server.run_with(&u, "while True: pass", json!({"timeout_ms": 1}))), "timeout");
    let stubborn = "while True:\n  try:\n    while True: pass\n  except BaseException: pass";
    assert_eq!(kind(&server.run_with(&u, stubborn, json!({"timeout_ms": 100}))), "timeout");
}

fn the_default_timeout_is_the_configured_one(driver: &Driver) {
    let (server, u) = driver.server(&["--set", "limits.timeout=300ms"]);
    let begun = std::time::Instant::now();
    assert_eq!(kind(&server.run(&u, "import time\ntime.sleep(30)")), "timeout");
    assert!(begun.elapsed() < Duration::from_secs(10));
    let longer = server.run_with(&u, "import time\ntime.sleep(0.6)\nresult = 1", json!({"timeout_ms": 5000}));
    assert_eq!(longer["result"], 1, "a request may ask for more");
}

fn a_run_out_of_memory_is_told_apart_from_a_crash(driver: &Driver) {
    let (server, u) = driver.server(&[
        "--set",
        "limits.memory=128MiB",
        "--set",
        "limits.workspace=16MiB",
        "--set",
        "limits.tmp=16MiB",
    ]);
    let answer = server.run(&u, "open('kept', 'w')\nx = b'x' * (1 << 30)");
    assert_eq!(kind(&answer), "out_of_memory", "{answer}");
    assert_eq!(kind(&server.run(&u, "raise MemoryError")), "out_of_memory");
    let answer = server.run(&u, "result = 1");
    assert_eq!(answer["result"], 1, "the session goes on: {answer}");
}

fn a_signal_that_ends_a_run_is_a_crash_with_its_name(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    for (signal, name) in [(6, "SIGABRT"), (11, "SIGSEGV"), (15, "SIGTERM"), (9, "SIGKILL")] {
        let code = format!("import os\nprint('before', flush=True)\nos.kill(os.getpid(), {signal})");
        let answer = server.run(&u, &code);
        assert_eq!(kind(&answer), "crashed", "{name}: {answer}");
        assert_eq!(answer["error_detail"]["name"], name);
        assert_eq!(answer["stdout"], "before\n");
        assert!(answer.get("session").is_none(), "{answer}");
    }
    assert_eq!(kind(&server.run(&u, "import ctypes\nctypes.string_at(0)")), "crashed");
}

fn a_result_that_json_has_not_is_an_error_that_names_the_part(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    for (value, says) in [
        ("float('nan')", "result"),
        ("[1, {'a': float('inf')}]", "result[1]['a']"),
        ("[-float('inf')]", "result[0]"),
        ("{1, 2}", "set"),
        ("b'x'", "bytes"),
        ("object()", "object"),
        ("{'a': [1, 2j]}", "result['a'][1]"),
        ("{(1, 2): 3}", "key"),
        ("['\\ud800']", "result[0]"),
        ("[[]]", ""),
    ] {
        let code = match says {
            "" => "result = []\nresult.append(result)".to_owned(),
            _ => format!("result = {value}"),
        };
        let answer = server.run(&u, &code);
        assert_eq!(kind(&answer), "result_invalid", "{code}: {answer}");
        assert!(answer["error"].as_str().unwrap().contains(says), "{code}: {answer}");
    }
    let deep = server.run(&u, "result = []\nfor _ in range(500): result = [result]");
    assert_eq!(kind(&deep), "result_invalid");
}

fn a_result_over_its_cap_is_an_error_and_one_at_it_is_not(driver: &Driver) {
    let (server, u) = driver.server(&["--set", "limits.result=1KiB"]);
    assert_eq!(server.run(&u, "result = 'x' * 1022")["result"], "x".repeat(1022));
    assert_eq!(kind(&server.run(&u, "result = 'x' * 1023")), "result_too_large");
    assert_eq!(kind(&server.run(&u, "result = 'x' * 50_000_000")), "result_too_large");
}

fn a_deleted_session_ends_its_run_as_cancelled_and_lost(driver: &Driver) {
    let server = driver.own(&[]);
    let answer = std::thread::scope(|scope| {
        let run = scope.spawn(|| server.run("u", "open('f', 'w')\nimport time\ntime.sleep(20)"));
        eventually("the run goes on", || server.get("/sessions/u").1.contains("running"));
        let (status, _, body) = server.request("DELETE", "/sessions/u", &[], "");
        assert_eq!((status, body.as_str()), (204, ""));
        run.join().unwrap()
    });
    assert_eq!(kind(&answer), "cancelled");
    assert_eq!(answer["session"], "lost");
    assert_eq!(answer["workspace_files"], json!(["total 0"]));
    assert_eq!(server.get("/sessions/u").0, 404);
    assert_eq!(server.run("u", "import os\nresult = os.listdir()")["result"], json!([]));
}

fn output_is_kept_up_to_its_cap_and_truncated_says_what_was_cut(driver: &Driver) {
    let server = driver.own(&["--set", "limits.stdout=1KiB", "--set", "limits.stderr=2KiB"]);
    let at_the_cap = server.run("u", "print('x' * 1023)");
    assert_eq!(at_the_cap["stdout"].as_str().unwrap().len(), 1024);
    assert!(at_the_cap.get("truncated").is_none(), "{at_the_cap}");
    let over = server.run("u", "print('x' * 1024)");
    assert_eq!(over["stdout"].as_str().unwrap().len(), 1024);
    assert_eq!(over["truncated"], json!(["stdout"]));
    let both = server.run("u", "import sys\nfor _ in range(200):\n  print('o' * 999)\n  print('e' * 999, file=sys.stderr)\nresult = 1");
    assert_eq!(
        (both["stdout"].as_str().unwrap().len(), both["stderr"].as_str().unwrap().len()),
        (1024, 2048)
    );
    assert_eq!(both["truncated"], json!(["stdout", "stderr"]));
    assert_eq!(both["result"], 1);
    assert_eq!(server.metric("codesandbox_capped_total{field=\"stdout\"}"), 2.0);
}

fn output_that_is_no_utf_8_is_replaced_not_lost(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let answer = server.run(&u, r"import os; os.write(1, b'a\xffb'); os.write(2, b'\xf0\x9f')");
    assert_eq!((&answer["stdout"], &answer["stderr"]), (&json!("a\u{fffd}b"), &json!("\u{fffd}")));
    let answer = server.run(&u, "print('\\x00 \\x1b[31m é 🐍')");
    assert_eq!(answer["stdout"], "\u{0} \u{1b}[31m é 🐍\n");
}

fn an_error_is_cut_at_its_cap_and_said_to_be(driver: &Driver) {
    let (server, u) = driver.server(&["--set", "limits.error=1KiB"]);
    let answer = server.run(&u, "raise ValueError('x' * 5000)");
    assert_eq!(kind(&answer), "raised");
    assert_eq!(answer["truncated"], json!(["error"]));
    assert!(answer["error"].as_str().unwrap().len() < 1200, "{answer}");
    assert!(server.run(&u, "raise ValueError('x')").get("truncated").is_none());
}

fn the_workspace_is_listed_as_ls_prints_it(driver: &Driver) {
    let (server, _) = driver.server(&[]);
    let answer = server.run(
        "u",
        "import os\nopen('b.txt', 'w').write('hello')\nos.makedirs('sub/deep')\nopen('sub/deep/c', 'w')\n\
         open('a\\nb', 'w')\nopen('.hidden', 'w')\nos.symlink('b.txt', 'link')",
    );
    let lines: Vec<_> =
        answer["workspace_files"].as_array().unwrap().iter().map(|line| line.as_str().unwrap()).collect();
    assert!(lines[0].starts_with("total "), "{lines:?}");
    assert!(lines[1].starts_with("-rw-r--r-- 1 ") && lines[1].ends_with(r" a\nb"), "{lines:?}");
    assert!(lines[2].ends_with(" b.txt") && lines[2].contains(" 5 "), "{lines:?}");
    assert!(lines[3].starts_with("lrwx") && lines[3].ends_with(" link -> b.txt"), "{lines:?}");
    assert!(lines[4].starts_with("drwx") && lines[4].ends_with(" sub"), "{lines:?}");
    assert_eq!((lines[5], lines[6]), ("", "./sub:"));
    assert_eq!((lines[9], lines[10]), ("", "./sub/deep:"), "{lines:?}");
    assert!(lines[12].ends_with(" c") && lines.len() == 13, "{lines:?}");
}

fn the_listing_is_cut_at_its_cap(driver: &Driver) {
    let (server, u) = driver.server(&["--set", "limits.listing=5"]);
    let answer = server.run(&u, "for i in range(4): open(str(i), 'w')");
    assert_eq!(answer["workspace_files"].as_array().unwrap().len(), 5);
    assert!(answer.get("truncated").is_none(), "{answer}");
    let answer = server.run(&u, "open('5', 'w')");
    assert_eq!(answer["workspace_files"].as_array().unwrap().len(), 5);
    assert_eq!(answer["truncated"], json!(["workspace_files"]));
}

/// A run that tells its result itself, and then goes on, is over with its answer: what is listed is what is left.
fn nothing_is_done_after_an_answer(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    server.run(&u, "result = 1");
    let code = "import os, stat\n\
                file = os.open('f', os.O_CREAT | os.O_WRONLY | os.O_APPEND)\n\
                for fd in range(3, 64):\n \
                try: pipe = stat.S_ISFIFO(os.fstat(fd).st_mode)\n \
                except OSError: continue\n \
                if pipe: os.write(fd, bytes([1, 0, 0, 0, 1, 0, 0, 0, 0]) + b'1')\n\
                while True: os.write(file, b'x')";
    let body = json!({"user_id": u, "code": code, "timeout_ms": 2000}).to_string();
    let (_, answer) = server.post(&body);
    let line = answer["workspace_files"][1].as_str().unwrap().to_owned();
    let listed: u64 = line.split_whitespace().nth(4).unwrap().parse().unwrap();
    let left = server.run(&u, "import os; result = os.path.getsize('f')");
    assert_eq!(left["result"], listed, "{answer}");
}

fn server_timing_tells_three_phases(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let body = json!({"user_id": u, "code": "import time; time.sleep(0.1)"}).to_string();
    let (_, headers, _) = server.request("POST", "/run", &JSON, &body);
    let text = header(&headers, "server-timing").unwrap();
    let phases: Vec<_> = text.split(", ").map(|phase| phase.split_once(";dur=").unwrap()).collect();
    assert_eq!(phases.iter().map(|(name, _)| *name).collect::<Vec<_>>(), ["queue", "claim", "run"]);
    let times: Vec<f64> = phases.iter().map(|(_, time)| time.parse().unwrap()).collect();
    assert!(times.iter().all(|time| *time >= 0.0) && times[2] >= 100.0 && times[0] < 100.0, "{text}");
}

fn a_request_id_is_taken_where_it_is_sound_and_made_where_not(driver: &Driver) {
    let (server, _) = driver.server(&[]);
    let id = |sent: Option<&str>| {
        let sent = sent.map(|id| ("x-request-id", id));
        let (_, headers, _) = server.request("GET", "/healthz", &sent.into_iter().collect::<Vec<_>>(), "");
        header(&headers, "x-request-id").unwrap().to_owned()
    };
    assert_eq!(id(Some("abc-123")), "abc-123");
    assert_eq!(id(Some(&"x".repeat(128))), "x".repeat(128));
    for unsound in ["", "two words", "\u{e9}", &"x".repeat(129)] {
        let made = id(Some(unsound));
        assert!(
            made != unsound && made.len() == 16 && made.bytes().all(|byte| byte.is_ascii_hexdigit()),
            "{made}"
        );
    }
    assert_ne!(id(None), id(None));
    let (status, headers, _) = server.request("GET", "/nowhere", &[("x-request-id", "mine")], "");
    assert_eq!((status, header(&headers, "x-request-id")), (404, Some("mine")), "refusals bear it, too");
}

// -- what is not served ------------------------------------------------------------------------------

fn unknown_paths_are_404_and_wrong_methods_405_with_allow(driver: &Driver) {
    let (server, _) = driver.server(&[]);
    for path in ["/", "/nowhere", "/run/x", "/healthz/", "/RUN", "/sessions", "/sessions/a/b/c", "//run"] {
        let (status, _, body) = server.request("GET", path, &[], "");
        assert_eq!(status, 404, "{path}: {body}");
        assert!(body.contains(r#""code":"not_found""#), "{path}: {body}");
    }
    for (method, path, allow) in [
        ("GET", "/run", "POST"),
        ("PUT", "/run", "POST"),
        ("OPTIONS", "/run", "POST"),
        ("POST", "/healthz", "GET, HEAD"),
        ("DELETE", "/readyz", "GET, HEAD"),
        ("POST", "/metrics", "GET, HEAD"),
        ("POST", "/capabilities", "GET, HEAD"),
        ("PATCH", "/sessions/u", "GET, HEAD, DELETE"),
    ] {
        let (status, headers, body) = server.request(method, path, &[], "");
        assert_eq!((status, header(&headers, "allow")), (405, Some(allow)), "{method} {path}");
        assert!(body.contains(r#""code":"method_not_allowed""#), "{body}");
    }
    assert_eq!(server.get("/healthz?verbose=1").0, 200, "a query is passed over");
}

fn only_json_is_taken_or_no_type_at_all(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let body = &json!({"user_id": u, "code": "result = 1"}).to_string();
    let status = |kind: Option<&str>| {
        let mut wire = Wire::new(&server);
        let kind = kind.map_or(String::new(), |kind| format!("content-type: {kind}\r\n"));
        wire.send(format!(
            "POST /run HTTP/1.1\r\nhost: x\r\n{kind}content-length: {}\r\n\r\n{body}",
            body.len()
        ));
        let answer = wire.answer().unwrap();
        (answer.status, answer.body)
    };
    for right in [
        None,
        Some("application/json"),
        Some("Application/JSON; charset=utf-8"),
        Some("application/problem+json"),
    ] {
        assert_eq!(status(right).0, 200, "{right:?}");
    }
    for wrong in
        ["text/plain", "application/x-www-form-urlencoded", "text/json", "json", "", "application/jsonp"]
    {
        let (status, body) = status(Some(wrong));
        assert_eq!(status, 415, "{wrong}");
        assert!(body.contains(r#""code":"unsupported_media_type""#), "{body}");
    }
}

fn a_body_over_its_cap_is_413_however_it_comes(driver: &Driver) {
    let (server, _) = driver.server(&["--set", "limits.body=2KiB", "--set", "limits.code=1KiB"]);
    let fill = |length: usize| {
        let plain = r#"{"user_id":"u","code":"result = 1","stdin":""}"#.len();
        format!(r#"{{"user_id":"u","code":"result = 1","stdin":"{}"}}"#, "x".repeat(length - plain))
    };
    assert_eq!(server.post(fill(2048)).0, 200, "the edge passes");
    refused(&server, &fill(2049), 413, "2048");
    let code = format!("#{}", "x".repeat(1024));
    refused(&server, &json!({"user_id": "u", "code": code}).to_string(), 413, "code");
    assert_eq!(server.post(json!({"user_id": "u", "code": &code[1..]}).to_string()).0, 200);
    let mut chunked = Wire::new(&server);
    chunked.send("POST /run HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n");
    for _ in 0..3 {
        chunked.send(format!("400\r\n{}\r\n", " ".repeat(1024)));
    }
    let answer = chunked.answer().unwrap();
    assert_eq!(answer.status, 413);
    assert!(answer.body.contains(r#""code":"too_large""#), "{}", answer.body);
    let mut announced = Wire::new(&server);
    announced.send("POST /run HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n");
    assert_eq!(announced.answer().unwrap().status, 413, "not a byte of it is waited for");
}

fn a_full_queue_is_session_busy(driver: &Driver) {
    let server = driver.own(&["--set", "session.queue=1"]);
    std::thread::scope(|scope| {
        let sleep = || server.run("u", "import time\ntime.sleep(1.5)\nresult = 1");
        let first = scope.spawn(sleep);
        eventually("the first runs", || server.get("/sessions/u").1.contains("running"));
        let second = scope.spawn(|| server.run("u", "result = 2"));
        std::thread::sleep(Duration::from_millis(300));
        let (status, headers, body) =
            server.request("POST", "/run", &JSON, r#"{"user_id":"u","code":"result = 3"}"#);
        assert_eq!(status, 429, "{body}");
        assert!(body.contains(r#""code":"session_busy""#), "{body}");
        assert!(header(&headers, "retry-after").unwrap().parse::<u64>().unwrap() >= 1);
        assert_eq!(server.run("v", "result = 4")["result"], 4, "others are not concerned");
        assert_eq!(
            (&first.join().unwrap()["result"], &second.join().unwrap()["result"]),
            (&json!(1), &json!(2))
        );
    });
}

fn when_all_sessions_are_in_use_a_new_user_is_told_when_to_come_back(driver: &Driver) {
    let server = driver.own(&["--set", "session.max=1"]);
    server.run("a", "pass");
    let (status, headers, body) = server.request("POST", "/run", &JSON, r#"{"user_id":"b","code":"1"}"#);
    assert_eq!(status, 429, "{body}");
    assert!(body.contains(r#""code":"too_many_sessions""#), "{body}");
    let seconds: u64 = header(&headers, "retry-after").unwrap().parse().unwrap();
    assert!((800..=901).contains(&seconds), "until the idle one expires: {seconds}");
    assert_eq!(server.run("a", "result = 1")["result"], 1, "who has one keeps it");
    assert_eq!(server.request("DELETE", "/sessions/a", &[], "").0, 204);
    assert_eq!(server.run("b", "result = 1")["result"], 1);
}

fn a_server_that_stops_refuses_new_runs_as_draining(driver: &Driver) {
    let mut server = driver.own(&[]);
    let body = r#"{"user_id":"u","code":"result = 1"}"#;
    let request = post_bytes(body);
    let mut wire = Wire::new(&server);
    wire.send(&request[..request.len() - 1]);
    eventually("the request is being read", || server.metric("codesandbox_http_connections") >= 2.0);
    std::thread::sleep(Duration::from_millis(100));
    server.signal(libc::SIGTERM);
    eventually("it stops", || server.log().contains("stopping"));
    std::thread::sleep(Duration::from_millis(100));
    wire.send("}");
    let answer = wire.answer().unwrap();
    assert_eq!(answer.status, 503, "{answer:?}");
    assert!(answer.body.contains(r#""code":"draining""#), "{answer:?}");
    assert!(header(&answer.headers, "retry-after").is_some(), "{answer:?}");
    assert!(server.wait().success());
}

// -- users and sessions ------------------------------------------------------------------------------

fn user_ids_are_compared_byte_for_byte(driver: &Driver) {
    let server = driver.own(&[]);
    // The last two look the same: é as one character, and as e with an accent.
    let users = ["A", "a", "a ", " a", "a/b", "a%2Fb", "a+", "é", "e\u{301}"];
    for user in users {
        server.run(user, &format!("open('mine', 'w').write({user:?})").replace("\\u{301}", "\u{301}"));
    }
    for user in users {
        assert_eq!(server.run(user, "result = open('mine').read()")["result"], user);
    }
    assert_eq!(server.metric("codesandbox_sandboxes{state=\"claimed\"}"), users.len() as f64);
}

fn a_user_id_is_percent_encoded_in_a_path(driver: &Driver) {
    let server = driver.own(&[]);
    for (user, path) in [
        ("a ", "a%20"),
        ("a/b", "a%2Fb"),
        ("a%2Fb", "a%252Fb"),
        ("é", "%C3%A9"),
        ("a+", "a+"),
        ("a?b#c", "a%3Fb%23c"),
        ("..", "%2e%2e"),
    ] {
        assert_eq!(server.get(&format!("/sessions/{path}")).0, 404, "{user} has none yet");
        server.run(user, "pass");
        assert_eq!(server.get(&format!("/sessions/{path}")).0, 200, "{user}");
    }
    for unsound in ["%ff", "%00", "%0a", "", &"u".repeat(257)] {
        let (status, text) = server.get(&format!("/sessions/{unsound}"));
        assert_eq!(status, 400, "{unsound}: {text}");
        assert!(text.contains("user_id"), "{text}");
    }
}

fn a_session_tells_of_itself(driver: &Driver) {
    let server = driver.own(&["--set", "session.idle_timeout=60s"]);
    assert_eq!(server.get("/sessions/u").0, 404);
    let before = std::time::SystemTime::now();
    server.run("u", "pass");
    std::thread::sleep(Duration::from_millis(50));
    let (status, text) = server.get("/sessions/u");
    let session: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (status, &session["state"], &session["driver"]),
        (200, &json!("idle"), &json!(driver.configured()))
    );
    let (idle, left) = (session["idle_ms"].as_u64().unwrap(), session["expires_in_ms"].as_u64().unwrap());
    assert!((50..10_000).contains(&idle) && left <= 59_950 && left > 45_000, "{text}");
    let created = humantime::parse_rfc3339(session["created_at"].as_str().unwrap()).unwrap();
    let age = created.duration_since(before - Duration::from_secs(1)).unwrap();
    assert!(age < Duration::from_secs(10), "{text}");
    assert_eq!(session.as_object().unwrap().len(), 5, "{text}");
    let (status, _, body) = server.request("HEAD", "/sessions/u", &[], "");
    assert_eq!((status, body.as_str()), (200, ""));
}

fn a_session_with_a_run_in_it_is_running(driver: &Driver) {
    let server = driver.own(&[]);
    std::thread::scope(|scope| {
        let run = scope.spawn(|| server.run("u", "import time\ntime.sleep(0.5)"));
        eventually("it runs", || server.get("/sessions/u").1.contains(r#""state":"running""#));
        let session: Value = serde_json::from_str(&server.get("/sessions/u").1).unwrap();
        assert_eq!(session["idle_ms"], 0);
        run.join().unwrap();
    });
    assert!(server.get("/sessions/u").1.contains(r#""state":"idle""#));
}

fn a_session_is_destroyed_at_once_and_twice_is_fine(driver: &Driver) {
    let server = driver.own(&[]);
    server.run("u", "open('f', 'w')");
    for _ in 0..2 {
        let (status, headers, body) = server.request("DELETE", "/sessions/u", &[], "");
        assert_eq!((status, body.as_str()), (204, ""));
        assert!(header(&headers, "x-request-id").is_some());
    }
    assert_eq!(server.request("DELETE", "/sessions/never", &[], "").0, 204);
    assert_eq!(server.get("/sessions/u").0, 404);
    assert_eq!(server.run("u", "result = 1")["workspace_files"], json!(["total 0"]));
    assert_eq!(server.metric("codesandbox_sessions_ended_total{reason=\"deleted\"}"), 1.0);
}

// -- for operators -----------------------------------------------------------------------------------

fn health_and_readiness_are_200_while_it_serves(driver: &Driver) {
    let (server, _) = driver.server(&[]);
    for path in ["/healthz", "/readyz"] {
        let (status, headers, body) = server.request("GET", path, &[], "");
        assert_eq!((status, header(&headers, "content-type")), (200, Some("application/json")));
        assert!(serde_json::from_str::<Value>(&body).unwrap()["status"].is_string(), "{body}");
        let (status, _, body) = server.request("HEAD", path, &[], "");
        assert_eq!((status, body.as_str()), (200, ""));
    }
}

/// The name of a line's metric without its histogram's suffix.
fn family<'a>(series: &'a str, types: &std::collections::HashMap<&str, &str>) -> &'a str {
    let name = series.split(['{', ' ']).next().unwrap();
    let base = ["_bucket", "_sum", "_count"].into_iter().find_map(|suffix| name.strip_suffix(suffix));
    base.filter(|base| types.get(base) == Some(&"histogram")).unwrap_or(name)
}

fn metrics_are_the_prometheus_text_format(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    server.run(&u, "print(1)");
    server.run(&u, "1/0");
    server.get("/nowhere");
    let (status, headers, text) = server.request("GET", "/metrics", &[], "");
    assert_eq!(status, 200);
    assert!(header(&headers, "content-type").unwrap().starts_with("text/plain; version=0.0.4"));
    assert!(text.ends_with('\n'));
    let (mut types, mut helped, mut seen) = (
        std::collections::HashMap::new(),
        std::collections::HashSet::new(),
        std::collections::HashSet::new(),
    );
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            assert!(!help.is_empty() && helped.insert(name), "{line}");
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert!(types.insert(name, kind).is_none(), "twice: {line}");
        } else {
            let (series, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok() && seen.insert(series), "{line}");
            let name = family(series, &types);
            assert!(helped.contains(name) && types.contains_key(name), "no HELP or TYPE: {line}");
            assert!(types[name] != "counter" || name.ends_with("_total"), "{line}");
        }
    }
    for series in [
        "codesandbox_runs_total{outcome=\"ok\"}",
        "codesandbox_runs_total{outcome=\"raised\"}",
        "codesandbox_run_seconds_count{phase=\"total\"}",
        "codesandbox_http_requests_total{status=\"404\"}",
        "codesandbox_sandboxes{state=\"removing\"}",
        "codesandbox_sessions",
        "codesandbox_ready",
    ] {
        assert!(seen.contains(series), "{series} is missing in {text}");
    }
    promtool(&text);
}

/// Prometheus's own opinion, where it is installed.
fn promtool(text: &str) {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let started = Command::new("promtool").args(["check", "metrics"]).stdin(Stdio::piped()).spawn();
    let Ok(mut child) = started else { return eprintln!("skipped: promtool is not installed") };
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
}

fn capabilities_tell_what_the_server_is_and_enforces(driver: &Driver) {
    let (server, _) = driver.server(&["--set", "limits.memory=640MiB", "--set", "limits.cpus=0.5"]);
    let (status, text) = server.get("/capabilities");
    assert_eq!(status, 200);
    let told: Value = serde_json::from_str(&text).unwrap();
    let image = if driver.is_embedded() { "host".into() } else { drivers::image() };
    assert_eq!((&told["driver"], &told["image"]), (&json!(driver.configured()), &json!(image)));
    assert!(told["rootless"].is_boolean() && told["engine_version"].is_string(), "{text}");
    assert!(told["python"].as_str().unwrap().starts_with("3."), "{text}");
    let limits = &told["limits"];
    assert_eq!((&limits["memory_bytes"], &limits["cpus"]), (&json!(640 << 20), &json!(0.5)));
    assert_eq!((&limits["timeout_ms"], &limits["timeout_max_ms"]), (&json!(30_000), &json!(300_000)));
    for name in [
        "processes",
        "workspace_bytes",
        "body_bytes",
        "code_bytes",
        "result_bytes",
        "stdout_bytes",
        "stderr_bytes",
    ] {
        assert!(limits[name].as_u64().is_some_and(|limit| limit > 0), "{name}: {text}");
    }
    let layers = told["layers"].as_array().unwrap();
    for name in [
        "memory",
        "cpus",
        "processes",
        "user_namespace",
        "capabilities",
        "no_new_privileges",
        "seccomp",
        "network",
    ] {
        let layer =
            layers.iter().find(|layer| layer["name"] == name).unwrap_or_else(|| panic!("{name}: {text}"));
        let state = layer["state"].as_str().unwrap();
        assert!(["on", "off", "unenforced"].contains(&state), "{layer}");
        assert!(layer["by"].as_str().is_some_and(|by| !by.is_empty()), "{layer}");
        for (limit, given) in [("memory", driver.limits_memory()), ("cpus", driver.limits_cpus())] {
            assert!(name != limit || (state == "on") == given, "{layer}");
        }
    }
}
