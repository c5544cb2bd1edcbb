//! The description of all that the server takes and answers: `openapi.json`, OpenAPI 3.1.
//!
//! The tests below hold it to the routes, the fields and the codes; `tests/api/openapi.rs` to real answers.

use std::sync::LazyLock;

use bytes::Bytes;

static DOCUMENT: LazyLock<Bytes> = LazyLock::new(|| {
    let version = concat!("\"", env!("CARGO_PKG_VERSION"), "\"");
    include_str!("openapi.json").replacen("\"VERSION\"", version, 1).into()
});

pub(super) fn document() -> Bytes {
    DOCUMENT.clone()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::time::{Duration, SystemTime};

    use serde::Serialize;
    use serde::de::DeserializeOwned;
    use serde_json::{Value, json};

    use super::*;
    use crate::runtime::LayerState;
    use crate::server::error::Error;
    use crate::server::handlers::RunAnswer;
    use crate::server::route::{Call, ROUTES};
    use crate::session::{self, Description};
    use crate::supervisor::files::Refusal;
    use crate::supervisor::{Artifact, ErrorDetail, ErrorKind, Field};

    type Names = BTreeSet<String>;

    fn parsed() -> Value {
        serde_json::from_slice(&document()).unwrap()
    }

    fn keys(object: &Value) -> Names {
        object.as_object().unwrap_or_else(|| panic!("no object: {object}")).keys().cloned().collect()
    }

    fn strings(array: &Value) -> Names {
        let array = array.as_array().unwrap_or_else(|| panic!("no array: {array}"));
        array.iter().filter_map(|item| item.as_str()).map(str::to_owned).collect()
    }

    fn names<const N: usize>(names: [&str; N]) -> Names {
        names.map(str::to_owned).into()
    }

    fn schema(name: &str) -> Value {
        parsed()["components"]["schemas"][name].clone()
    }

    /// The names that serde expects: it lists them where it finds another one.
    fn expected(message: &str) -> Names {
        message.split('`').skip(3).step_by(2).map(str::to_owned).collect()
    }

    fn variants<T: DeserializeOwned>() -> Names {
        let Err(error) = serde_json::from_str::<T>("\"?\"") else { panic!("? is a variant") };
        expected(&error.to_string())
    }

    /// Whether a schema has the fields of the fullest value, and requires those of the emptiest.
    fn has_fields(name: &str, fullest: &impl Serialize, emptiest: &impl Serialize) {
        let schema = schema(name);
        assert_eq!(keys(&schema["properties"]), keys(&json!(fullest)), "{name}");
        assert_eq!(strings(&schema["required"]), keys(&json!(emptiest)), "{name}");
    }

    #[test]
    fn every_route_is_described_and_no_other() {
        let routes: BTreeSet<_> =
            ROUTES.iter().map(|(path, method, _)| format!("{} {path}", method.as_str())).collect();
        assert_eq!(routes.len(), ROUTES.len(), "a route stands in the table twice");
        let mut described = BTreeSet::new();
        for (path, item) in parsed()["paths"].as_object().unwrap() {
            let methods = keys(item).into_iter().filter(|key| key != "parameters");
            described.extend(methods.map(|method| format!("{} {path}", method.to_uppercase())));
        }
        assert_eq!(routes, described);
    }

    #[test]
    fn a_route_asks_for_a_key_where_the_document_says_so() {
        for (path, method, call) in &ROUTES {
            let operation = &parsed()["paths"][path][method.as_str().to_lowercase()];
            assert_eq!(operation.get("security").is_some(), call.is_open(), "{path}");
            assert_eq!(operation["responses"].get("401").is_none(), call.is_open(), "{path}");
        }
        assert!(!Call::Run.is_open());
    }

    #[test]
    fn every_parameter_in_a_path_is_described() {
        for (path, item) in parsed()["paths"].as_object().unwrap() {
            for (parameter, reference) in
                [("{user_id}", "parameters/UserId"), ("{path}", "parameters/FilePath")]
            {
                let described = item["parameters"].to_string().contains(reference);
                assert_eq!(described, path.contains(parameter), "{path}");
            }
        }
    }

    #[test]
    fn every_field_of_a_request_is_described() {
        let taken = serde_json::from_str::<crate::server::body::Fields<'_>>(r#"{"?":1}"#);
        let Err(error) = taken else { panic!("? is a field") };
        let schema = schema("RunRequest");
        assert_eq!(keys(&schema["properties"]), expected(&error.to_string()));
        assert_eq!(strings(&schema["required"]), names(["user_id", "code"]));
    }

    #[test]
    fn every_field_of_an_answer_is_described() {
        let detail = ErrorDetail::killed();
        let artifact = Artifact { name: "a".into(), media_type: "b".into(), base64: "c".into() };
        has_fields("Artifact", &artifact, &artifact);
        let (none, display) = (BTreeMap::new(), BTreeMap::from([("text/plain".into(), "x".into())]));
        let artifacts = [artifact];
        let emptiest = RunAnswer {
            error: None,
            error_detail: None,
            result: None,
            workspace_files: &[],
            stdout: "",
            stderr: "",
            artifacts: &[],
            display: &none,
            truncated: &[],
            session: None,
        };
        let fullest = RunAnswer {
            error: Some(detail.message()),
            error_detail: Some(&detail),
            stdout: "x",
            stderr: "x",
            artifacts: &artifacts,
            display: &display,
            truncated: &[Field::Stdout],
            session: Some("lost"),
            ..emptiest
        };
        has_fields("RunAnswer", &fullest, &emptiest);
        has_fields("ErrorDetail", &detail, &detail);
        let session = Description {
            state: "idle",
            created_at: SystemTime::UNIX_EPOCH,
            idle_ms: 0,
            expires_in_ms: 0,
            driver: "embedded",
        };
        has_fields("Session", &session, &session);
    }

    #[test]
    fn every_word_of_an_answer_is_described() {
        assert_eq!(strings(&schema("ErrorDetail")["properties"]["kind"]["enum"]), variants::<ErrorKind>());
        let fields = [Field::Stdout, Field::Stderr, Field::WorkspaceFiles, Field::Error, Field::Artifacts];
        fields.iter().for_each(|field| match field {
            // A new one goes above, too.
            Field::Stdout | Field::Stderr | Field::WorkspaceFiles | Field::Error | Field::Artifacts => {}
        });
        let described = &schema("RunAnswer")["properties"]["truncated"]["items"]["enum"];
        assert_eq!(strings(described), names(fields.map(Field::as_str)));
        let states = [LayerState::On, LayerState::Off, LayerState::Unenforced];
        states.iter().for_each(|state| match state {
            LayerState::On | LayerState::Off | LayerState::Unenforced => {} // likewise
        });
        let described = &schema("Layer")["properties"]["state"]["enum"];
        assert_eq!(strings(described), strings(&json!(states)));
    }

    /// One of each.
    fn errors() -> Vec<Error> {
        let (retry_after, session) = (Duration::ZERO, Error::Session);
        let errors = vec![
            Error::Invalid(String::new()),
            Error::Unauthorized,
            Error::Forbidden,
            Error::NotFound,
            Error::NoSession,
            Error::MethodNotAllowed(String::new()),
            Error::RequestTimeout(retry_after),
            Error::TooLarge { what: "", limit: 0 },
            Error::UnsupportedMediaType(""),
            Error::Stalled,
            Error::RangeNotSatisfiable { size: 0 },
            Error::Lost,
            Error::Refused(Refusal::NoSpace { available_bytes: 0 }),
            Error::Refused(Refusal::IsDirectory),
            session(session::Error::NotRunning),
            session(session::Error::Busy { retry_after }),
            session(session::Error::TooMany { retry_after }),
            session(session::Error::Crowded { retry_after }),
            session(session::Error::Draining),
            session(session::Error::Unavailable(crate::pool::Error::Late(retry_after))),
            Error::NotReady(""),
            Error::Overloaded,
        ];
        for error in &errors {
            use session::Error as E;
            match error {
                Error::Invalid(_) | Error::Unauthorized | Error::Forbidden | Error::NotFound => {}
                Error::NoSession | Error::MethodNotAllowed(_) | Error::RequestTimeout(_) => {}
                Error::TooLarge { .. } | Error::UnsupportedMediaType(_) | Error::NotReady(_) => {}
                Error::Overloaded | Error::Stalled | Error::RangeNotSatisfiable { .. } | Error::Lost => {}
                Error::Refused(_) => {} // by the table in `Error::status`, whose other codes are above
                Error::Session(E::Busy { .. } | E::TooMany { .. } | E::Crowded { .. }) => {}
                Error::Session(E::Draining | E::Unavailable(_) | E::NotRunning) => {} // a new one goes above, too
            }
        }
        errors
    }

    #[test]
    fn every_code_is_described_with_its_status_and_headers() {
        let document = parsed();
        let mut described = BTreeSet::new();
        for (name, response) in document["components"]["responses"].as_object().unwrap() {
            let schema = &response["content"]["application/json"]["schema"];
            for code in strings(&schema["properties"]["code"]["enum"]) {
                described.insert((code, name.clone()));
            }
        }
        let mut real = BTreeSet::new();
        for error in errors() {
            let (status, code) = error.status();
            let (_, name) = described.iter().find(|(listed, _)| listed == code).expect(code);
            let reference = format!(
                "\"{status}\":{{\"$ref\":\"#/components/responses/{name}\"}}",
                status = status.as_u16()
            );
            let somewhere = document["paths"].to_string().contains(&reference);
            assert!(somewhere || code == "method_not_allowed", "{code} is no {reference}");
            let headers = keys(&document["components"]["responses"][name]["headers"]);
            // What is no route of ours never says when to come back; all else says so either always or never.
            assert_eq!(headers.contains("Retry-After"), error.retry_after().is_some(), "{code}");
            assert_eq!(headers.contains("Allow"), status == 405, "{code}");
            assert_eq!(headers.contains("WWW-Authenticate"), status == 401, "{code}");
            assert!(headers.contains("X-Request-Id"), "{code}");
            real.insert((code.to_owned(), name.clone()));
        }
        assert_eq!(real, described);
        let codes: Names = real.into_iter().map(|(code, _)| code).collect();
        assert_eq!(strings(&schema("Error")["properties"]["code"]["enum"]), codes);
    }

    #[test]
    fn every_reference_leads_somewhere() {
        fn walk(value: &Value, document: &Value) {
            if let Some(reference) = value.get("$ref").and_then(Value::as_str) {
                let pointer = reference.strip_prefix('#').unwrap();
                assert!(document.pointer(pointer).is_some(), "{reference}");
            }
            match value {
                Value::Object(fields) => fields.values().for_each(|field| walk(field, document)),
                Value::Array(items) => items.iter().for_each(|item| walk(item, document)),
                _ => {}
            }
        }
        walk(&parsed(), &parsed());
    }

    #[test]
    fn the_version_is_cargos() {
        assert_eq!(parsed()["info"]["version"], env!("CARGO_PKG_VERSION"));
    }
}
