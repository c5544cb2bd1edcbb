//! The answer to a run as server-sent events: what it prints as it prints it, and the plain answer at last.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use futures_util::stream::unfold;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{HeaderMap, Request, Response};
use serde_json::json;
use sse_stream::{KeepAlive, Sse, SseBody};
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep};
use tracing::Instrument;

use super::State;
use super::error::Error;
use super::handlers::{self, Answered};
use super::route::{Answer, refusal};
use super::stream_body::Body;
use crate::supervisor::{Field, Follower, Told, teller};

/// Of silence, until a comment shows that the stream lives: proxies give up after 30 s and more.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
const EVENTS: HeaderValue = HeaderValue::from_static("text/event-stream");

/// Whether a client wants its answer as events.
pub(super) fn is_wanted(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    accepted.flat_map(|text| text.split(',')).any(|media_type| {
        let essence = media_type.split(';').next().unwrap_or_default();
        essence.trim().eq_ignore_ascii_case("text/event-stream")
    })
}

/// Begins once the run has its place in the queue: one that is refused gets the status that it would get without events.
///
/// The run goes on beside the stream, since a client that reads slowly must not hold it up. Dropping the stream
/// interrupts it.
pub(super) async fn run(
    state: Arc<State>,
    tenant: Arc<str>,
    request: Request<Incoming>,
) -> Result<Answer, Error> {
    let (teller, mut told) = teller();
    let mut run = JoinSet::new();
    let serving = state.clone();
    let answer = async move { handlers::answer(&serving, &tenant, request, Some(&teller)).await };
    run.spawn(answer.in_current_span());
    if told.next().await != Some(Told::Accepted) {
        let Answered { answer, .. } = ended(&mut run).await?; // an error, as a rule: it was never accepted
        return Ok(response(futures_util::stream::iter([Ok(event("done", answer))])));
    }
    let events = Events { state, told, run, partial: Default::default(), over: false };
    Ok(response(unfold(events, async |mut events| Some((Ok(events.next().await?), events)))))
}

fn response<S>(events: S) -> Answer
where
    S: Stream<Item = Result<Sse, std::convert::Infallible>> + Send + 'static,
{
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE);
    let body = SseBody::new(Box::pin(events)).with_keep_alive::<Timer>(keep_alive);
    let mut response = Response::new(Body::Stream(BodyExt::boxed_unsync(body.map_err(Into::into))));
    response.headers_mut().insert(CONTENT_TYPE, EVENTS);
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

async fn ended(run: &mut JoinSet<Result<Answered, Error>>) -> Result<Answered, Error> {
    let joined = run.join_next().await.expect("it is awaited once");
    joined.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

struct Events {
    state: Arc<State>,
    told: Follower,
    run: JoinSet<Result<Answered, Error>>,
    partial: [Partial; 2],
    over: bool,
}

impl Events {
    async fn next(&mut self) -> Option<Sse> {
        while !self.over {
            match self.told.next().await {
                Some(Told::Cut(stream)) => {
                    return Some(event("truncated", json!({"field": stream.as_str()}).to_string()));
                }
                Some(Told::Printed { stream, bytes }) => {
                    let partial = &mut self.partial[usize::from(stream == Field::Stderr)];
                    let text = partial.text(&bytes);
                    if !text.is_empty() {
                        return Some(printed(stream, &text));
                    }
                }
                Some(Told::Accepted) => {}
                None => return Some(self.last().await),
            }
        }
        None
    }

    /// What is left of half a character, then the answer.
    async fn last(&mut self) -> Sse {
        for (partial, stream) in self.partial.iter_mut().zip([Field::Stdout, Field::Stderr]) {
            if partial.end() {
                return printed(stream, "\u{fffd}");
            }
        }
        self.over = true;
        match ended(&mut self.run).await {
            Ok(Answered { answer, .. }) => event("done", answer),
            Err(error) => event("error", refusal(&self.state, &error)),
        }
    }
}

fn printed(stream: Field, text: &str) -> Sse {
    event(stream.as_str(), json!({"text": text}).to_string())
}

fn event(name: &str, data: String) -> Sse {
    Sse::default().event(name).data(data)
}

/// The bytes of a character that has not come as a whole.
#[derive(Default)]
struct Partial(Vec<u8>);

impl Partial {
    /// As far as it can be told; in all the same as `String::from_utf8_lossy` of the whole.
    fn text(&mut self, bytes: &[u8]) -> String {
        self.0.extend_from_slice(bytes);
        let (mut text, mut rest) = (String::new(), &self.0[..]);
        let left = loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text += valid;
                    break Vec::new();
                }
                Err(error) => {
                    let (valid, more) = rest.split_at(error.valid_up_to());
                    text += std::str::from_utf8(valid).expect("it was valid up to there");
                    let Some(bad) = error.error_len() else { break more.to_vec() };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &more[bad..];
                }
            }
        };
        self.0 = left;
        text
    }

    /// Whether half a character was left.
    fn end(&mut self) -> bool {
        !std::mem::take(&mut self.0).is_empty()
    }
}

/// tokio's, for `sse_stream`.
struct Timer(Pin<Box<Sleep>>);

impl Future for Timer {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        self.0.as_mut().poll(context)
    }
}

impl sse_stream::Timer for Timer {
    fn reset(mut self: Pin<&mut Self>, instant: std::time::Instant) {
        self.0.as_mut().reset(Instant::from_std(instant));
    }

    fn from_duration(duration: Duration) -> Timer {
        Timer(Box::pin(tokio::time::sleep(duration)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_in_pieces_is_the_text_of_the_whole() {
        for whole in
            ["aä\u{20ac}\u{1f600}z".as_bytes(), b"\xff\xe2\x82\xe2\x82\xac\xf0\x9f\x98", b"\xc3\xc3\xa4", b""]
        {
            for first in 0..=whole.len() {
                for second in first..=whole.len() {
                    let mut partial = Partial::default();
                    let mut text = String::new();
                    for piece in [&whole[..first], &whole[first..second], &whole[second..]] {
                        text += &partial.text(piece);
                    }
                    if partial.end() {
                        text.push(char::REPLACEMENT_CHARACTER);
                    }
                    assert_eq!(text, String::from_utf8_lossy(whole), "{whole:?} at {first} and {second}");
                }
            }
        }
    }
}
