//! The document against real answers: each is one that it describes, and all that it describes are real.

use std::collections::BTreeSet;

use codesandbox::config::Driver;
use serde_json::{Value, json};

use crate::support::{Answer, Server, Wire, command_line, eventually, header, post_bytes};

/// Headers of ours; the others are hyper's.
const HEADERS: [&str; 5] = ["x-request-id", "server-timing", "retry-after", "allow", "www-authenticate"];
/// What no healthy server answers, and what takes long to bring about: tests/api/files.rs and the others do.
const UNSEEN: [(&str, &str, &[u16]); 7] = [
    ("POST", "/run", &[503]),
    ("GET", "/sessions/{user_id}/files", &[400, 409, 429, 503]),
    ("PUT", "/sessions/{user_id}/files", &[204, 400, 408, 409, 413, 429, 503, 507]),
    ("GET", "/sessions/{user_id}/files/{path}", &[409, 429, 503]),
    ("PUT", "/sessions/{user_id}/files/{path}", &[408, 413, 415, 429, 503, 507]),
    ("DELETE", "/sessions/{user_id}/files/{path}", &[409, 429, 503]),
    ("POST", "/sessions/{user_id}/interrupt", &[]),
];

struct Document {
    /// Its schemas let no field pass that they do not describe.
    strict: Value,
    seen: BTreeSet<(String, String, u16)>,
}

impl Document {
    fn of(server: &Server) -> Document {
        let (status, text) = server.get("/openapi.json");
        assert_eq!(status, 200);
        let mut strict: Value = serde_json::from_str(&text).unwrap();
        for schema in strict["components"]["schemas"].as_object_mut().unwrap().values_mut() {
            if schema.get("properties").is_some() {
                schema["additionalProperties"] = json!(false);
            }
        }
        Document { strict, seen: BTreeSet::new() }
    }

    /// What a reference stands for.
    fn follow<'a>(&'a self, value: &'a Value) -> &'a Value {
        match value.get("$ref").and_then(Value::as_str) {
            Some(reference) => self.strict.pointer(&reference[1..]).expect("the unit tests follow them all"),
            None => value,
        }
    }

    /// The template of a path.
    fn template(&self, path: &str) -> &'static str {
        let session = |rest: &str| match rest.split_once('/') {
            None => "/sessions/{user_id}",
            Some((_, "interrupt")) => "/sessions/{user_id}/interrupt",
            Some((_, "files")) => "/sessions/{user_id}/files",
            Some((_, rest)) if rest.starts_with("files/") => "/sessions/{user_id}/files/{path}",
            Some(_) => panic!("{path} is in no document"),
        };
        match path.strip_prefix("/sessions/") {
            Some(rest) => session(rest),
            None => ["/run", "/healthz", "/readyz", "/metrics", "/capabilities", "/openapi.json"]
                .into_iter()
                .find(|template| *template == path)
                .unwrap_or_else(|| panic!("{path} is in no document")),
        }
    }

    fn check(&mut self, method: &str, path: &str, answer: &Answer) {
        let Answer { status, headers, body } = answer;
        let template = self.template(path);
        let what = format!("{method} {template}: {status} {headers:?} {body}");
        let response = match status {
            405 => &self.strict["components"]["responses"]["MethodNotAllowed"],
            _ => {
                let operation = &self.strict["paths"][template][method.to_lowercase()];
                self.follow(&operation["responses"][status.to_string()])
            }
        };
        assert!(response.is_object(), "not described: {what}");
        self.check_headers(response, headers, &what);
        match response.get("content").and_then(Value::as_object) {
            None => assert_eq!(body, "", "{what}"),
            Some(content) => {
                let given = header(headers, "content-type").unwrap_or_default();
                let media_type = given.split(';').next().unwrap();
                let content = content.get(media_type).unwrap_or_else(|| panic!("content type: {what}"));
                let Some(schema) = content.get("schema") else { return self.saw(method, template, *status) };
                let value = if media_type == "application/json" {
                    serde_json::from_str(body).unwrap()
                } else {
                    json!(body)
                };
                self.validate(schema, &value, &what);
            }
        }
        self.saw(method, template, *status);
    }

    fn saw(&mut self, method: &str, template: &str, status: u16) {
        self.seen.insert((method.to_owned(), template.to_owned(), status));
    }

    fn check_headers(&self, response: &Value, headers: &[(String, String)], what: &str) {
        let none = serde_json::Map::new();
        let described = response.get("headers").and_then(Value::as_object).unwrap_or(&none);
        let described: std::collections::BTreeMap<_, _> =
            described.iter().map(|(name, value)| (name.to_lowercase(), self.follow(value))).collect();
        for name in HEADERS {
            match (header(headers, name), described.get(name)) {
                (None, None) => {}
                (Some(value), Some(wanted)) => {
                    let number = || value.parse::<u64>().map(|number| json!(number));
                    let numeric = wanted["schema"]["type"] == "integer";
                    let value = if numeric { number().unwrap() } else { json!(value) };
                    self.validate(&wanted["schema"], &value, what);
                }
                (given, wanted) => panic!("header {name}: {given:?} where {wanted:?} is described: {what}"),
            }
        }
    }

    fn validate(&self, schema: &Value, value: &Value, what: &str) {
        let mut schema = schema.clone();
        schema["components"] = self.strict["components"].clone();
        let validator = jsonschema::options().should_validate_formats(true).build(&schema).unwrap();
        let errors: Vec<_> = validator.iter_errors(value).map(|error| error.to_string()).collect();
        assert!(errors.is_empty(), "{errors:?}: {what}");
    }

    /// A request, and whether its answer is one that is described.
    fn ask(
        &mut self,
        server: &Server,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> u16 {
        let (status, headers, body) = server.request(method, path, headers, body);
        self.check(method, path, &Answer { status, headers, body });
        status
    }

    /// Likewise, with bytes that no client library would send.
    fn post(&mut self, server: &Server, bytes: &str) -> u16 {
        let mut wire = Wire::new(server);
        wire.send(bytes);
        let answer = wire.answer().unwrap();
        self.check("POST", "/run", &answer);
        answer.status
    }

    fn run(&mut self, server: &Server, body: Value) -> u16 {
        self.post(server, &post_bytes(&body.to_string()))
    }

    fn operations(&self) -> Vec<(String, String)> {
        let mut operations = Vec::new();
        for (path, item) in self.strict["paths"].as_object().unwrap() {
            let methods = item.as_object().unwrap().keys().filter(|key| *key != "parameters");
            operations.extend(methods.map(|method| (method.to_uppercase(), path.clone())));
        }
        operations
    }

    /// What is described for each operation.
    fn described(&self) -> BTreeSet<(String, String, u16)> {
        let mut all = BTreeSet::new();
        for (method, path) in self.operations() {
            let responses = &self.strict["paths"][&path][method.to_lowercase()]["responses"];
            let statuses = responses.as_object().unwrap().keys();
            all.extend(statuses.map(|status| (method.clone(), path.clone(), status.parse().unwrap())));
        }
        all
    }
}

#[test]
fn real_answers_are_those_of_the_document() {
    let flags = [
        "pool.size=1",
        "session.max=2",
        "session.queue=0",
        "limits.stdout=1KiB",
        "limits.body=64KiB",
        "limits.code=1KiB",
        "server.body_timeout=300ms",
    ];
    let server = Server::start(&flags.iter().flat_map(|flag| ["--set", flag]).collect::<Vec<_>>());
    let mut document = Document::of(&server);
    for path in ["/healthz", "/readyz", "/metrics", "/capabilities", "/openapi.json"] {
        assert_eq!(document.ask(&server, "GET", path, &[], ""), 200);
    }
    assert_eq!(document.ask(&server, "GET", "/sessions/u", &[], ""), 404);
    for fields in [
        json!({"code": "result = x", "data": {"x": [1, 2.5, null, {"y": "ä"}]}, "mode": "fresh", "timeout_ms": 1000}),
        json!({"code": "import sys; print('x' * 2000); print('y', file=sys.stderr); open('f', 'w')", "stdin": "z"}),
        json!({"code": "1/0"}),
        json!({"code": "1 +"}),
        json!({"code": "while True: pass", "timeout_ms": 50}),
        json!({"code": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"}),
        json!({"code": "result = {1, 2}"}),
        json!({"code": "{1, 2}", "mode": "kernel", "limits": {"cpu_ms": 500, "memory_bytes": 50_000_000, "output_bytes": 10}}),
    ] {
        let mut body = fields;
        body["user_id"] = json!("u");
        document.validate(
            &document.strict["components"]["schemas"]["RunRequest"].clone(),
            &body,
            "a request",
        );
        assert_eq!(document.run(&server, body), 200);
    }
    assert_eq!(document.ask(&server, "GET", "/sessions/u", &[], ""), 200);
    assert_eq!(document.run(&server, json!({"user_id": "u"})), 400);
    assert_eq!(document.run(&server, json!({"user_id": "u", "code": "x".repeat(2000)})), 413);
    assert_eq!(document.post(&server, "POST /run HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n"), 408);
    let text = post_bytes("{}").replace("application/json", "text/plain");
    assert_eq!(document.post(&server, &text), 415);
    let mut running = Wire::new(&server);
    running.send(post_bytes(r#"{"user_id":"u","code":"import time; time.sleep(60)"}"#));
    eventually("it runs", || server.get("/sessions/u").1.contains("running"));
    assert_eq!(document.ask(&server, "POST", "/sessions/u/interrupt", &[], ""), 204);
    document.check("POST", "/run", &running.answer().unwrap());
    running.send(post_bytes(r#"{"user_id":"u","code":"import time; time.sleep(60)"}"#));
    eventually("it runs again", || server.get("/sessions/u").1.contains("running"));
    assert_eq!(document.ask(&server, "GET", "/sessions/u", &[], ""), 200);
    assert_eq!(document.run(&server, json!({"user_id": "u", "code": "1"})), 429);
    server.run("v", "1");
    assert_eq!(document.run(&server, json!({"user_id": "w", "code": "1"})), 429);
    assert_eq!(document.ask(&server, "GET", "/readyz", &[], ""), 503);
    assert_eq!(document.ask(&server, "DELETE", "/sessions/u", &[], ""), 204);
    document.check("POST", "/run", &running.answer().unwrap()); // lost with its session
    for method in ["GET", "DELETE"] {
        assert_eq!(document.ask(&server, method, "/sessions/%00", &[], ""), 400);
    }
    files(&mut document, &server);
    refused_at_the_door(&mut document, &server);
    let described = document.described();
    let unseen: BTreeSet<_> = UNSEEN
        .into_iter()
        .flat_map(|(method, path, statuses)| {
            statuses.iter().map(move |status| (method.to_owned(), path.to_owned(), *status))
        })
        .collect();
    assert_eq!(&described - &document.seen, unseen);
}

fn files(document: &mut Document, server: &Server) {
    let mut ask = |method: &str, path: &str, headers: &[(&str, &str)], body: &str, status: u16| {
        let path = format!("/sessions/v/{path}");
        assert_eq!(document.ask(server, method, &path, headers, body), status, "{method} {path}");
    };
    ask("PUT", "files/d/f", &[], "content", 201);
    ask("PUT", "files/d/f", &[], "other", 204);
    ask("PUT", "files/d", &[], "content", 409);
    ask("PUT", "files/../f", &[], "content", 400);
    ask("PUT", "files", &[], "content", 415);
    ask("GET", "files", &[], "", 200);
    ask("GET", "files/d/f", &[], "", 200);
    ask("GET", "files/d/f", &[("range", "bytes=1-2")], "", 206);
    ask("GET", "files/d/f", &[("if-none-match", "*")], "", 304);
    ask("GET", "files/d/f", &[("range", "bytes=9-")], "", 416);
    ask("GET", "files/none", &[], "", 404);
    ask("GET", "files/../f", &[], "", 400);
    ask("DELETE", "files/d", &[], "", 204);
    ask("DELETE", "files/d", &[], "", 404);
    ask("DELETE", "files/../f", &[], "", 400);
    ask("POST", "interrupt", &[], "", 409);
    assert_eq!(document.ask(server, "POST", "/sessions/%00/interrupt", &[], ""), 400);
    assert_eq!(document.ask(server, "GET", "/sessions/nobody/files", &[], ""), 404);
}

/// 401, 403 and 405 of every operation that answers them.
fn refused_at_the_door(document: &mut Document, open: &Server) {
    let directory = tempfile::tempdir().unwrap();
    let keys = directory.path().join("keys");
    let (_, made, _) = command_line(&["key", "new", "--tenant", "a"], "");
    std::fs::write(&keys, made.lines().last().unwrap().rsplit_once(": ").unwrap().1).unwrap();
    let keys = format!("auth.keys_file=\"{}\"", keys.display());
    let guarded = Server::start(&["--set", "pool.size=0", "--set", "auth.mode=keys", "--set", &keys]);
    let described = document.described();
    for (method, path) in document.operations() {
        let asks = described.contains(&(method.clone(), path.clone(), 401));
        let status =
            document.ask(&guarded, &method, &path.replace("{user_id}", "u").replace("{path}", "f"), &[], "");
        assert_eq!(status == 401, asks, "{method} {path}");
    }
    for (method, path) in document.operations() {
        if described.contains(&(method.clone(), path.clone(), 403)) {
            let path = path.replace("{user_id}", "u").replace("{path}", "f");
            assert_eq!(document.ask(open, &method, &path, &[("origin", "http://x")], ""), 403);
        }
    }
    let mut methods = std::collections::BTreeMap::<_, Vec<_>>::new();
    for (method, path) in document.operations() {
        methods.entry(path).or_default().push(method);
    }
    for (path, methods) in methods {
        let real = path.replace("{user_id}", "u").replace("{path}", "f");
        let (status, headers, _) = open.request("PATCH", &real, &[], "");
        assert_eq!(status, 405, "{path}");
        let allowed: BTreeSet<_> = header(&headers, "allow").unwrap().split(", ").collect();
        let mut described: BTreeSet<_> = methods.iter().map(String::as_str).collect();
        if described.contains("GET") {
            described.insert("HEAD");
        }
        assert_eq!(allowed, described, "{path}");
        assert_eq!(document.ask(open, "PATCH", &real, &[], ""), 405);
    }
    document.seen.retain(|(.., status)| *status != 405); // of methods that no operation has
}

#[test]
fn every_driver_is_described() {
    let server = Server::start(&["--set", "pool.size=0"]);
    let document = Document::of(&server);
    let described = document.strict["components"]["schemas"]["Driver"]["enum"].as_array().unwrap();
    let Err(error) = serde_json::from_str::<Driver>("\"?\"") else { panic!("? is a driver") };
    let known: BTreeSet<_> = error.to_string().split('`').skip(3).step_by(2).map(str::to_owned).collect();
    assert_eq!(
        described.iter().map(|name| name.as_str().unwrap().to_owned()).collect::<BTreeSet<_>>(),
        known
    );
}
