//! A container engine as an operator with `curl` meets it: its API over a unix socket, without any of our code.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// The label that tells whose a container is.
const INSTANCE_LABEL: &str = "codesandbox.instance";
/// A call that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// An engine that answers. Podman is asked in Docker's own words, which it knows, too.
#[derive(Debug)]
pub(crate) struct Engine {
    socket: PathBuf,
}

impl Engine {
    /// The engine that the variable names, or why there is none.
    pub(crate) fn named_by(variable: &str) -> Result<Engine, String> {
        let Ok(url) = std::env::var(variable) else {
            return Err(format!("{variable} is not set (tests/engines.sh run COMMAND sets it)"));
        };
        let socket = url.strip_prefix("unix://").ok_or(format!("{variable} is no unix:// address: {url}"))?;
        let engine = Engine { socket: socket.into() };
        match engine.ask("GET", "/_ping", &Value::Null) {
            Ok((200, _)) => Ok(engine),
            other => Err(format!("{url} does not answer: {other:?}")),
        }
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) fn url(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    /// Status and body. By HTTP/1.0, whose answers end with the connection.
    fn ask(&self, method: &str, path: &str, body: &Value) -> std::io::Result<(u16, String)> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.0\r\nhost: engine\r\ncontent-type: application/json\r\ncontent-length: {length}"
        );
        stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes())?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let answer = String::from_utf8_lossy(&answer);
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        Ok((status.unwrap_or(0), body.to_owned()))
    }

    /// What it answers; the call has to go well.
    pub(crate) fn call(&self, method: &str, path: &str, body: &Value) -> Value {
        let (status, text) = self.ask(method, path, body).unwrap_or_else(|error| panic!("{path}: {error}"));
        assert!((200..300).contains(&status), "{method} {path}: {status} {text}");
        serde_json::from_str(&text).unwrap_or(Value::Null)
    }

    pub(crate) fn get(&self, path: &str) -> Value {
        self.call("GET", path, &Value::Null)
    }

    pub(crate) fn post(&self, path: &str) {
        self.call("POST", path, &Value::Null);
    }

    /// The containers of the instances that begin so: their ids.
    pub(crate) fn containers_of(&self, instance: &str) -> Vec<String> {
        let ours = self.list_of(instance).into_iter();
        ours.filter_map(|container| Some(container["Id"].as_str()?.to_owned())).collect()
    }

    /// And their names.
    pub(crate) fn names_of(&self, instance: &str) -> Vec<String> {
        let ours = self.list_of(instance).into_iter();
        ours.filter_map(|container| Some(container["Names"][0].as_str()?.to_owned())).collect()
    }

    fn list_of(&self, instance: &str) -> Vec<Value> {
        let path = "/containers/json?all=1";
        let begun = Instant::now();
        let mut all: Vec<Value> = loop {
            match self.ask("GET", path, &Value::Null) {
                Ok((200, text)) => break serde_json::from_str(&text).expect("a list is a list"),
                // Podman's fails while anybody's container is being removed.
                other => assert!(begun.elapsed() < PATIENCE, "{path}: {other:?}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        all.retain(|container| {
            container["Labels"][INSTANCE_LABEL].as_str().is_some_and(|label| label.starts_with(instance))
        });
        all
    }

    /// A container that is none of ours, unless its labels say so.
    pub(crate) fn make_stranger(&self, image: &str, labels: &Value) -> String {
        let wanted = json!({"Image": image, "Cmd": ["python3", "-c", "import time; time.sleep(1000)"], "Labels": labels,
            "HostConfig": {"NetworkMode": "none"}});
        let made = self.call("POST", "/containers/create", &wanted);
        let id = made["Id"].as_str().expect("a container has an id").to_owned();
        self.post(&format!("/containers/{id}/start"));
        id
    }

    pub(crate) fn is_running(&self, id: &str) -> bool {
        let (status, text) = self.ask("GET", &format!("/containers/{id}/json"), &Value::Null).unwrap();
        let container: Value = serde_json::from_str(&text).unwrap_or_default();
        status == 200 && container["State"]["Running"] == true
    }

    /// Fine where it is gone already.
    pub(crate) fn remove(&self, id: &str) {
        let path = format!("/containers/{id}?force=1&v=1&timeout=0"); // without it Podman waits for ten seconds
        let (status, text) = self.ask("DELETE", &path, &Value::Null).unwrap();
        assert!([200, 204, 404, 409].contains(&status), "{status} {text}");
    }
}
