//! The body of `POST /run`: parsed once, here; inside, the types are the proof.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use unicode_normalization::UnicodeNormalization;

use super::Settings;
use super::error::Error;
use crate::supervisor::{MAX_JSON_DEPTH, Mode, Narrowed, is_nested_too_deeply};

/// Less than this, and Python itself has no room to fail.
const MEMORY_MIN_BYTES: u64 = 1 << 20;
/// Bytes of a user_id.
const USER_ID_BYTES: usize = 256;

/// The keywords of Python 3.8 to 3.14; soft ones may be names.
const KEYWORDS: [&str; 35] = [
    "False", "None", "True", "and", "as", "assert", "async", "await", "break", "class", "continue", "def",
    "del", "elif", "else", "except", "finally", "for", "from", "global", "if", "import", "in", "is",
    "lambda", "nonlocal", "not", "or", "pass", "raise", "return", "try", "while", "with", "yield",
];

/// A run as asked for.
#[derive(Debug)]
pub(super) struct RunRequest<'a> {
    pub(super) user_id: Cow<'a, str>,
    pub(super) code: Cow<'a, str>,
    /// A JSON object, as it came; empty where there is none.
    pub(super) data: &'a str,
    pub(super) stdin: Cow<'a, str>,
    pub(super) timeout: Duration,
    pub(super) mode: Mode,
    pub(super) narrowed: Narrowed,
}

/// The fields, still unread, so that an error can name the one that is wrong.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Fields<'a> {
    #[serde(borrow)]
    user_id: Option<&'a RawValue>,
    #[serde(borrow)]
    code: Option<&'a RawValue>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
    #[serde(borrow)]
    mode: Option<&'a RawValue>,
    #[serde(borrow)]
    timeout_ms: Option<&'a RawValue>,
    #[serde(borrow)]
    stdin: Option<&'a RawValue>,
    #[serde(borrow)]
    limits: Option<&'a RawValue>,
}

/// Likewise.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Limits<'a> {
    #[serde(borrow)]
    cpu_ms: Option<&'a RawValue>,
    #[serde(borrow)]
    memory_bytes: Option<&'a RawValue>,
    #[serde(borrow)]
    output_bytes: Option<&'a RawValue>,
}

impl<'a> RunRequest<'a> {
    pub(super) fn parse(body: &'a [u8], settings: &Settings) -> Result<RunRequest<'a>, Error> {
        if body.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'{') {
            return Err(Error::invalid("the body", "must be a JSON object"));
        }
        let Fields { user_id, code, data, mode, timeout_ms, stdin, limits } =
            serde_json::from_slice(body).map_err(|error| Error::invalid("the body is not right:", error))?;
        let user_id = text("user_id", user_id)?.ok_or_else(|| Error::invalid("user_id", "is missing"))?;
        check_user_id(&user_id)?;
        let code = text("code", code)?.ok_or_else(|| Error::invalid("code", "is missing"))?;
        if code.is_empty() {
            return Err(Error::invalid("code", "must not be empty"));
        }
        if code.len() > settings.code_bytes {
            return Err(Error::TooLarge { what: "code", limit: settings.code_bytes });
        }
        let mode = match text("mode", mode)?.as_deref() {
            None | Some("fresh") => Mode::Fresh,
            Some("kernel") => Mode::Kernel,
            Some(_) => return Err(Error::invalid("mode", "must be \"fresh\" or \"kernel\"")),
        };
        Ok(RunRequest {
            user_id,
            code,
            data: data.map_or(Ok(""), check_data)?,
            stdin: text("stdin", stdin)?.unwrap_or_default(),
            timeout: timeout(timeout_ms, settings)?,
            mode,
            narrowed: limits.map_or(Ok(Narrowed::default()), |raw| narrowed(raw, settings))?,
        })
    }
}

/// The same rule for the field and for the path of `/sessions/{user_id}`.
pub(super) fn check_user_id(user_id: &str) -> Result<(), Error> {
    match user_id.len() {
        0 => Err(Error::invalid("user_id", "must not be empty")),
        1..=USER_ID_BYTES if !user_id.chars().any(char::is_control) => Ok(()),
        1..=USER_ID_BYTES => Err(Error::invalid("user_id", "must not contain control characters")),
        _ => Err(Error::invalid("user_id", format!("must not be longer than {USER_ID_BYTES} bytes"))),
    }
}

/// A string that is borrowed where it holds no escapes.
struct Text;

impl<'a> Visitor<'a> for Text {
    type Value = Cow<'a, str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_borrowed_str<E>(self, text: &'a str) -> Result<Self::Value, E> {
        Ok(Cow::Borrowed(text))
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Cow::Owned(text.to_owned()))
    }
}

fn text<'a>(field: &str, raw: Option<&'a RawValue>) -> Result<Option<Cow<'a, str>>, Error> {
    use serde::Deserializer;
    let Some(raw) = raw else { return Ok(None) };
    let mut parser = serde_json::Deserializer::from_str(raw.get());
    match parser.deserialize_str(Text) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.is_syntax() => {
            Err(Error::invalid(field, format!("is not Unicode text: {error}")))
        }
        Err(_) => Err(Error::invalid(field, "must be a string")),
    }
}

fn timeout(raw: Option<&RawValue>, settings: &Settings) -> Result<Duration, Error> {
    let wanted = integer("timeout_ms", raw, 1, settings.timeout_max.as_millis() as u64)?;
    Ok(wanted.map_or(settings.timeout, Duration::from_millis))
}

/// The configured limits bound it: a request may ask for less only.
fn narrowed(raw: &RawValue, settings: &Settings) -> Result<Narrowed, Error> {
    if !raw.get().starts_with('{') {
        return Err(Error::invalid("limits", "must be an object"));
    }
    let limits =
        serde_json::from_str(raw.get()).map_err(|error| Error::invalid("limits is not right:", error))?;
    let Limits { cpu_ms, memory_bytes, output_bytes } = limits;
    let cpu = integer("limits.cpu_ms", cpu_ms, 1, settings.cpu_max.as_millis() as u64)?;
    Ok(Narrowed {
        cpu: cpu.map(Duration::from_millis),
        memory_bytes: integer("limits.memory_bytes", memory_bytes, MEMORY_MIN_BYTES, settings.memory_bytes)?,
        output_bytes: integer("limits.output_bytes", output_bytes, 0, settings.output_bytes)?,
    })
}

fn integer(field: &str, raw: Option<&RawValue>, least: u64, most: u64) -> Result<Option<u64>, Error> {
    let Some(raw) = raw else { return Ok(None) };
    match raw.get().parse::<u64>() {
        Ok(wanted) if (least..=most).contains(&wanted) => Ok(Some(wanted)),
        _ => Err(Error::invalid(field, format!("must be an integer from {least} to {most}"))),
    }
}

pub(super) fn check_data(raw: &RawValue) -> Result<&str, Error> {
    if !raw.get().starts_with('{') {
        return Err(Error::invalid("data", "must be an object"));
    }
    if is_nested_too_deeply(raw.get()) {
        return Err(Error::invalid(
            "data",
            format!("must not be nested deeper than {MAX_JSON_DEPTH} levels"),
        ));
    }
    match serde_json::from_str::<Names>(raw.get()) {
        Ok(Names(None)) => Ok(raw.get()),
        Ok(Names(Some(bad))) => Err(Error::Invalid(bad)),
        Err(error) => Err(Error::invalid("data is not right:", error)),
    }
}

/// The first key of an object that cannot be a variable, as a message.
struct Names(Option<String>);

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Names, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = Names;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Names, A::Error> {
                let mut bad = None;
                while let Some(key) = map.next_key::<Cow<'de, str>>()? {
                    map.next_value::<IgnoredAny>()?;
                    bad = bad.or_else(|| not_a_variable(&key));
                }
                Ok(Names(bad))
            }
        }
        deserializer.deserialize_map(Keys)
    }
}

fn not_a_variable(key: &str) -> Option<String> {
    // As Python reads it in code: names are compared in their NFKC form.
    let name = if key.is_ascii() { Cow::Borrowed(key) } else { Cow::Owned(key.nfkc().collect()) };
    let mut chars = name.chars();
    let begins = |char: char| char == '_' || unicode_ident::is_xid_start(char);
    let identifier = chars.next().is_some_and(begins) && chars.all(unicode_ident::is_xid_continue);
    let why = if !identifier {
        "is no Python identifier"
    } else if KEYWORDS.contains(&&*name) {
        "is a Python keyword"
    } else if name.starts_with("__") {
        "must not begin with __"
    } else {
        return None;
    };
    // A key may be as long as the body; the answer need not be.
    Some(format!("data: the key {:?} {why}", key.chars().take(100).collect::<String>()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        let second = Duration::from_secs(1);
        Settings {
            connections: 1,
            header_timeout: second,
            body_timeout: second,
            write_timeout: second,
            body_bytes: 1000,
            bodies_bytes: 1000,
            code_bytes: 10,
            timeout: second,
            timeout_max: second * 5,
            cpu_max: second * 5,
            memory_bytes: 2 << 20,
            output_bytes: 100,
            files: 10,
            capabilities: bytes::Bytes::new(),
        }
    }

    fn message(body: &str) -> String {
        RunRequest::parse(body.as_bytes(), &settings()).map(|_| ()).unwrap_err().to_string()
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, says) in [
            ("", "the body must be a JSON object"),
            ("[]", "the body must be a JSON object"),
            (r#"["a","b"]"#, "the body must be a JSON object"),
            ("{", "the body is not right"),
            ("{}", "user_id is missing"),
            (r#"{"user_id":null,"code":"1"}"#, "user_id is missing"),
            (r#"{"user_id":1,"code":"1"}"#, "user_id must be a string"),
            (r#"{"user_id":"","code":"1"}"#, "user_id must not be empty"),
            (r#"{"user_id":"a\u0000","code":"1"}"#, "user_id must not contain control characters"),
            (r#"{"user_id":"a\u009f","code":"1"}"#, "user_id must not contain control characters"),
            (r#"{"user_id":"\ud800","code":"1"}"#, "user_id is not Unicode text"),
            (r#"{"user_id":"a"}"#, "code is missing"),
            (r#"{"user_id":"a","code":""}"#, "code must not be empty"),
            (r#"{"user_id":"a","code":["x"]}"#, "code must be a string"),
            (r#"{"user_id":"a","code":"12345678901"}"#, "code must not be longer than 10 bytes"),
            (r#"{"user_id":"a","code":"1","user_id":"b"}"#, "duplicate field `user_id`"),
            (r#"{"user_id":"a","code":"1","colour":"b"}"#, "unknown field `colour`"),
            (r#"{"user_id":"a","code":"1","data":[]}"#, "data must be an object"),
            (
                r#"{"user_id":"a","code":"1","data":{"a b":1}}"#,
                "data: the key \"a b\" is no Python identifier",
            ),
            (r#"{"user_id":"a","code":"1","data":{"":1}}"#, "data: the key \"\" is no Python identifier"),
            (r#"{"user_id":"a","code":"1","data":{"1a":1}}"#, "is no Python identifier"),
            (
                r#"{"user_id":"a","code":"1","data":{"x":1,"class":1}}"#,
                "data: the key \"class\" is a Python keyword",
            ),
            (r#"{"user_id":"a","code":"1","data":{"__name__":1}}"#, "must not begin with __"),
            ("{\"user_id\":\"a\",\"code\":\"1\",\"data\":{\"_\u{ff3f}name\":1}}", "must not begin with __"),
            ("{\"user_id\":\"a\",\"code\":\"1\",\"data\":{\"\u{ff49}f\":1}}", "is a Python keyword"),
            (r#"{"user_id":"a","code":"1","mode":"slow"}"#, "mode must be"),
            (r#"{"user_id":"a","code":"1","timeout_ms":0}"#, "timeout_ms must be an integer from 1 to 5000"),
            (
                r#"{"user_id":"a","code":"1","timeout_ms":5001}"#,
                "timeout_ms must be an integer from 1 to 5000",
            ),
            (r#"{"user_id":"a","code":"1","timeout_ms":1.5}"#, "timeout_ms must be an integer"),
            (r#"{"user_id":"a","code":"1","timeout_ms":"1"}"#, "timeout_ms must be an integer"),
            (r#"{"user_id":"a","code":"1","timeout_ms":1e3}"#, "timeout_ms must be an integer"),
            (r#"{"user_id":"a","code":"1","stdin":1}"#, "stdin must be a string"),
            (r#"{"user_id":"a","code":"1","limits":[]}"#, "limits must be an object"),
            (r#"{"user_id":"a","code":"1","limits":{"cpu":1}}"#, "unknown field `cpu`"),
            (
                r#"{"user_id":"a","code":"1","limits":{"cpu_ms":0}}"#,
                "limits.cpu_ms must be an integer from 1 to 5000",
            ),
            (
                r#"{"user_id":"a","code":"1","limits":{"memory_bytes":2097153}}"#,
                "limits.memory_bytes must be an integer from 1048576 to 2097152",
            ),
            (
                r#"{"user_id":"a","code":"1","limits":{"output_bytes":101}}"#,
                "limits.output_bytes must be an integer from 0 to 100",
            ),
        ] {
            let message = message(body);
            assert!(message.contains(says), "{body}: {message}");
        }
    }

    #[test]
    fn the_edges_pass() {
        for body in [
            format!(r#"{{"user_id":"{}","code":"1"}}"#, "u".repeat(256)),
            r#"{"user_id":"a","code":"1234567890","timeout_ms":5000}"#.into(),
            r#"{"user_id":"a","code":"1","data":{"ä":1,"_":2,"match":3,"x1":{"a b":1}},"mode":"fresh"}"#
                .into(),
            r#" {"user_id":"a ","code":"\n","data":null,"stdin":null,"limits":null}"#.into(),
            r#"{"user_id":"a","code":"1","mode":"kernel","limits":{"cpu_ms":5000,"memory_bytes":2097152,"output_bytes":0}}"#
                .into(),
        ] {
            RunRequest::parse(body.as_bytes(), &settings()).unwrap();
        }
        let too_long = format!(r#"{{"user_id":"{}","code":"1"}}"#, "u".repeat(257));
        assert!(message(&too_long).contains("user_id must not be longer than 256 bytes"));
    }

    #[test]
    fn data_is_nested_up_to_the_depth_and_no_deeper() {
        let body = |depth: usize| {
            let data = format!("{{\"x\":{}{}}}", "[".repeat(depth - 1), "]".repeat(depth - 1));
            format!(r#"{{"user_id":"a","code":"1","data":{data}}}"#)
        };
        RunRequest::parse(body(MAX_JSON_DEPTH).as_bytes(), &settings()).unwrap();
        assert!(message(&body(MAX_JSON_DEPTH + 1)).contains("nested"));
        assert!(message(&body(100_000)).contains("nested"));
    }
}
