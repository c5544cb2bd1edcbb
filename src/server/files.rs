//! The calls about files: `/sessions/{user_id}/files` and what is below.

use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::BodyExt;
use hyper::body::{Body as _, Incoming};
use hyper::header::{
    ACCEPT, ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, EXPECT, HeaderName,
    HeaderValue, IF_MATCH, IF_NONE_MATCH, IF_UNMODIFIED_SINCE, LAST_MODIFIED, X_CONTENT_TYPE_OPTIONS,
};
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};
use serde::Serialize;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::io::StreamReader;

use super::State;
use super::error::Error;
use super::file_headers::{self, Part};
use super::handlers::decode;
use super::route::Answer;
use super::stream_body::Body;
use super::tar::{self, Packer};
use super::walk::{Found, Walk};
use crate::session::Owner;
use crate::session::files::{self, Facts, Files, Kind, Missing, Reader, Refusal, Writer};

const TAR: &str = "application/x-tar";
/// Of a file that a request puts.
const MODE: u32 = 0o644;
/// Bytes of a path: as many as Linux takes.
const PATH_BYTES: usize = 4096;
/// Bytes of a refused body that are read all the same, and how long the next ones are waited for: a client that
/// writes its all before it reads would else see a broken connection, and no answer.
const LINGER_BYTES: u64 = 16 << 20;
const CONDITIONS: [HeaderName; 3] = [IF_MATCH, IF_NONE_MATCH, IF_UNMODIFIED_SINCE];
const LINGER: Duration = Duration::from_millis(300);
const IS_CUT: HeaderName = HeaderName::from_static("x-truncated");
/// What a path has as it is, in a listing that has to escape it.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'.').remove(b'-').remove(b'_').remove(b'~');

/// Serves `/sessions/{user_id}/{rest}`, where `rest` begins with `files`.
pub(super) async fn serve(
    state: &State,
    tenant: &str,
    user_id: &str,
    rest: &str,
    request: Request<Incoming>,
) -> Result<Answer, Error> {
    let path = parse_path(rest)?;
    let user_id = decode(user_id)?;
    let owner = Owner { tenant, user_id: &user_id };
    let open = |missing| state.sessions.files(owner, missing);
    let is_tar = |name| names_tar(request.headers(), name);
    match *request.method() {
        Method::GET | Method::HEAD if path.is_empty() && !is_tar(ACCEPT) => {
            list(state, open(Missing::Refuse).await?).await
        }
        Method::GET | Method::HEAD => {
            let files = open(Missing::Refuse).await?;
            let wants_tar = is_tar(ACCEPT);
            if wants_tar && files.stat(&path).await?.kind == Kind::Directory {
                return pack(state, files, &path);
            }
            get(files, &path, request.headers()).await
        }
        // Nothing of ours asks and writes in one step, and who sets a condition relies on it.
        Method::PUT | Method::DELETE
            if CONDITIONS.iter().any(|name| request.headers().contains_key(name)) =>
        {
            Err(Error::invalid("if-match, if-none-match and if-unmodified-since", "are taken with GET only"))
        }
        Method::PUT if is_tar(CONTENT_TYPE) => {
            let files = open(Missing::Make).await?;
            let mut body = request.into_body();
            let unpacked = unpack(state, files, &path, &mut body).await;
            unless_done(unpacked, body).await
        }
        Method::PUT if path.is_empty() => Err(Error::UnsupportedMediaType(TAR)),
        Method::PUT => {
            if request.headers().contains_key(CONTENT_RANGE) {
                return Err(Error::invalid("content-range", "is not taken: a file is put as a whole"));
            }
            let files = open(Missing::Make).await?;
            let waits = request.headers().contains_key(EXPECT);
            let mut body = request.into_body();
            let writer = match files.create(&path, body.size_hint().exact()).await {
                Ok(writer) => writer,
                Err(error) if waits => return Err(error.into()), // nothing of it is under way
                Err(error) => return unless_done(Err(error.into()), body).await,
            };
            let done = put(state, writer, &mut body).await;
            unless_done(done, body).await
        }
        Method::DELETE if !path.is_empty() => {
            open(Missing::Refuse).await?.remove(&path).await?;
            Ok(empty(StatusCode::NO_CONTENT))
        }
        _ => Err(Error::NotFound), // the routes let no other in
    }
}

/// The names of a path, joined again: each is percent-decoded by itself, so that none can hold a slash.
fn parse_path(rest: &str) -> Result<Vec<u8>, Error> {
    let Some(path) = rest.strip_prefix("files/") else { return Ok(Vec::new()) };
    let mut decoded = Vec::with_capacity(path.len());
    for name in path.split('/') {
        let name: Vec<u8> = percent_decode_str(name).collect();
        let why = match &name[..] {
            b"" => "must not have empty parts",
            b"." | b".." => "must not have . or .. in it",
            name if name.contains(&0) || name.contains(&b'/') => "must not have NUL or an encoded / in it",
            _ => "",
        };
        if !why.is_empty() {
            return Err(Error::invalid("the path", why));
        }
        if !decoded.is_empty() {
            decoded.push(b'/');
        }
        decoded.extend(name);
    }
    if decoded.len() > PATH_BYTES {
        return Err(Error::invalid("the path", format!("must not be longer than {PATH_BYTES} bytes")));
    }
    Ok(decoded)
}

fn names_tar(headers: &HeaderMap, name: HeaderName) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    let essence = |value: &str| value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    values.flat_map(|value| value.split(',')).any(|value| essence(value) == TAR)
}

// -- listing -----------------------------------------------------------------------------------------

/// An entry of a listing.
#[derive(Serialize)]
struct Listed {
    path: String,
    size: u64,
    modified_at: String,
    kind: Kind,
    /// The path is no UTF-8, so it is told as it stands in a URL.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    encoded: bool,
}

impl From<Found> for Listed {
    fn from(Found { path, facts }: Found) -> Listed {
        let modified_at = humantime::format_rfc3339_millis(file_headers::modified(&facts)).to_string();
        let (path, encoded) = match String::from_utf8(path) {
            Ok(path) => (path, false),
            Err(error) => (percent_encode(error.as_bytes(), PLAIN).to_string(), true),
        };
        Listed { path, size: facts.size, modified_at, kind: facts.kind, encoded }
    }
}

/// The right to be one of `WALKS`, until the last byte is out.
fn permit(state: &State) -> Result<OwnedSemaphorePermit, Error> {
    state.walks.clone().try_acquire_owned().map_err(|_| Error::Overloaded)
}

async fn list(state: &State, files: Files) -> Result<Answer, Error> {
    let permit = permit(state)?;
    let mut walk = Walk::new(files, &[], state.settings.files);
    let mut listed = Vec::new();
    while let Some(found) = walk.next().await? {
        listed.push(Listed::from(found));
    }
    let text = serde_json::to_vec(&listed).expect("texts and numbers are JSON");
    drop(listed);
    let once = stream::unfold((Some(text), permit), |(text, permit)| async move {
        Some((Ok::<_, std::convert::Infallible>(Bytes::from(text?)), (None, permit)))
    });
    let mut response = Response::new(Body::stream(once));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if walk.is_cut {
        state.metrics.capped.with_label_values(&["files"]).inc();
        response.headers_mut().insert(IS_CUT, HeaderValue::from_static("files"));
    }
    Ok(response)
}

// -- out ---------------------------------------------------------------------------------------------

async fn get(files: Files, path: &[u8], headers: &HeaderMap) -> Result<Answer, Error> {
    let reader = files.open(path).await.map_err(|error| match error {
        files::Error::Refused(Refusal::IsDirectory) => {
            Error::invalid("the path", format!("is a directory: ask for it with Accept: {TAR}"))
        }
        error => error.into(),
    })?;
    let facts = reader.facts;
    let etag = file_headers::etag(&facts);
    if file_headers::is_known(headers, &etag) {
        let mut response = empty(StatusCode::NOT_MODIFIED);
        describe(response.headers_mut(), &facts);
        return Ok(response);
    }
    let (status, from, length) = match file_headers::part(headers, &etag, facts.size) {
        Part::Whole => (StatusCode::OK, 0, facts.size),
        Part::Range { from, length } => (StatusCode::PARTIAL_CONTENT, from, length),
        Part::Nowhere => return Err(Error::RangeNotSatisfiable { size: facts.size }),
    };
    let mut response = Response::new(content(reader, from, length));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    describe(headers, &facts);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    if status == StatusCode::PARTIAL_CONTENT {
        let range = format!("bytes {from}-{}/{}", from + length - 1, facts.size);
        headers.insert(CONTENT_RANGE, ascii(&range));
    }
    Ok(response)
}

/// A file's bytes. One that is cut short meanwhile ends the connection: the length is out already.
fn content(reader: Reader, from: u64, length: u64) -> Body {
    let begin = (reader, from, length);
    Body::stream(stream::try_unfold(begin, |(reader, from, left)| async move {
        if left == 0 {
            return Ok(None);
        }
        let data = reader.read(from, left).await?;
        match data.len() as u64 {
            0 => Err(files::Error::Refused(Refusal::Failed)),
            read => Ok(Some((data, (reader, from + read, left - read)))),
        }
    }))
}

fn pack(state: &State, files: Files, path: &[u8]) -> Result<Answer, Error> {
    let packer = (Packer::new(files, path, state.settings.files), permit(state)?);
    let mut response = Response::new(Body::stream(stream::try_unfold(packer, |mut packer| async move {
        let bytes = packer.0.next().await?;
        Ok::<_, files::Error>(bytes.map(|bytes| (bytes, packer)))
    })));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(TAR));
    Ok(response)
}

fn describe(headers: &mut HeaderMap, facts: &Facts) {
    headers.insert(ETAG, ascii(&file_headers::etag(facts)));
    headers.insert(LAST_MODIFIED, ascii(&httpdate::fmt_http_date(file_headers::modified(facts))));
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
}

fn ascii(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).expect("digits and ASCII words are a header's value")
}

fn empty(status: StatusCode) -> Answer {
    let mut response = Response::new(Body::default());
    *response.status_mut() = status;
    response
}

// -- in ----------------------------------------------------------------------------------------------

async fn put(state: &State, writer: Writer, body: &mut Incoming) -> Result<Answer, Error> {
    while let Some(data) = next_data(body, state.settings.body_timeout).await? {
        writer.write(data).await?;
    }
    let facts = writer.commit(MODE, None).await?;
    let status = if facts.created { StatusCode::CREATED } else { StatusCode::NO_CONTENT };
    let mut response = empty(status);
    describe(response.headers_mut(), &facts);
    Ok(response)
}

async fn unpack(state: &State, files: Files, path: &[u8], body: &mut Incoming) -> Result<Answer, Error> {
    let limit = state.settings.body_timeout;
    let data = stream::try_unfold(body, move |body| async move {
        let data = next_data(body, limit).await.map_err(|error| match error {
            Error::Stalled => std::io::ErrorKind::TimedOut.into(),
            error => std::io::Error::other(error.to_string()),
        })?;
        Ok::<_, std::io::Error>(data.map(|data| (data, body)))
    });
    let reader = StreamReader::new(Box::pin(data) as Pin<Box<dyn stream::Stream<Item = _> + Send + '_>>);
    tar::unpack(&files, path, reader, state.settings.files).await?;
    Ok(empty(StatusCode::NO_CONTENT))
}

/// Takes what still comes of a body that was refused, if that is not much.
async fn unless_done(done: Result<Answer, Error>, mut body: Incoming) -> Result<Answer, Error> {
    let mut left = LINGER_BYTES;
    while done.is_err() && left > 0 && body.size_hint().lower() <= left {
        match next_data(&mut body, LINGER).await {
            Ok(Some(data)) => left = left.saturating_sub(data.len() as u64),
            Ok(None) | Err(_) => break,
        }
    }
    done
}

/// The next bytes of a body. It may be large, so its time counts from one bit to the next.
async fn next_data(body: &mut Incoming, limit: Duration) -> Result<Option<Bytes>, Error> {
    loop {
        let frame = tokio::time::timeout(limit, body.frame()).await.map_err(|_| Error::Stalled)?;
        let Some(frame) = frame else { return Ok(None) };
        let frame = frame.map_err(|error| Error::invalid("the body", format!("broke off: {error}")))?;
        if let Ok(data) = frame.into_data() {
            return Ok(Some(data)); // else trailers
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_split_before_it_is_decoded() {
        let parsed = |rest: &str| parse_path(rest).ok();
        assert_eq!(parsed("files"), Some(Vec::new()));
        assert_eq!(parsed("files/a/b%20c/%ff"), Some(b"a/b c/\xff".to_vec()));
        assert_eq!(parsed("files/..."), Some(b"...".to_vec()));
        for rest in [
            "files/",
            "files/a//b",
            "files/a/",
            "files/.",
            "files/..",
            "files/a/../b",
            "files/%2e%2e/b",
            "files/.%2E",
            "files/a%2fb",
            "files/%2Fetc%2Fpasswd",
            "files/a%00",
        ] {
            assert_eq!(parsed(rest), None, "{rest}");
        }
        assert!(parsed(&format!("files/{}", "a".repeat(PATH_BYTES))).is_some());
        assert!(parsed(&format!("files/{}", "a".repeat(PATH_BYTES + 1))).is_none());
    }

    #[test]
    fn a_name_that_is_no_utf_8_is_listed_as_in_a_url() {
        let found = Found { path: b"a b/\xff%".to_vec(), facts: Facts::default() };
        let text = serde_json::to_string(&Listed::from(found)).unwrap();
        assert!(
            text.starts_with(r#"{"path":"a%20b/%FF%25","#) && text.contains(r#""encoded":true"#),
            "{text}"
        );
    }

    #[test]
    fn a_tar_is_named_alone_in_a_list_or_with_parameters() {
        for (value, is) in [
            ("application/x-tar", true),
            ("text/html, Application/X-Tar;q=0.9", true),
            ("application/x-tarball", false),
            ("*/*", false),
        ] {
            let headers = HeaderMap::from_iter([(ACCEPT, value.parse().unwrap())]);
            assert_eq!(names_tar(&headers, ACCEPT), is, "{value}");
        }
    }
}
