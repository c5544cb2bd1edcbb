//! The calls that the engines' crates get wrong or cannot make, by hyper itself on the same socket. Each place that
//! uses it says why, so that it can go back to the crate when that is mended.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use futures_util::StreamExt;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::oneshot;
use tokio_util::codec::{Decoder, FramedRead};

use super::Duplex;
use super::container::{self, LastWords, Output};

/// An answer is longer only where it is none of an engine's.
const ANSWER_BYTES: usize = 16 << 20;
/// conmon's own buffer is 8 KiB; the length of a piece is a stranger's word all the same.
const PIECE_BYTES: usize = 1 << 20;

/// An engine's HTTP service.
#[derive(Debug, Clone)]
pub(super) struct Raw {
    address: Address,
    /// What every path begins with: the version of the API.
    prefix: &'static str,
}

/// Where it listens.
#[derive(Debug, Clone)]
enum Address {
    /// The path of a unix socket.
    Unix(String),
    /// Host and port.
    Tcp(String),
}

/// An answer that is none of success.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) message: String,
}

/// Why a call failed.
#[derive(Debug)]
pub(super) enum Failure {
    Refused(Refusal),
    /// No answer at all.
    Broken(io::Error),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Refused(Refusal { message, .. }) => f.write_str(message),
            Failure::Broken(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Failure {}

impl Raw {
    /// From `unix://…` or `tcp://…`, without TLS.
    pub(super) fn new(url: &str, prefix: &'static str) -> Option<Raw> {
        let unix = url.strip_prefix("unix://").map(|path| Address::Unix(path.to_owned()));
        let address =
            unix.or_else(|| url.strip_prefix("tcp://").map(|host| Address::Tcp(host.to_owned())))?;
        Some(Raw { address, prefix })
    }

    /// A call with a JSON body, or none, and a JSON answer, or none.
    pub(super) async fn call(&self, method: Method, path: &str, body: &Value) -> Result<Value, Failure> {
        let request = self.request(method, path, body, false)?;
        let (mut sender, _) = self.connect().await?;
        answer(sender.send_request(request).await.map_err(broken)?).await
    }

    /// A call without a body that returns as soon as the kernel has all of it: from then on the service gets it even
    /// where this program is killed. What comes back waits for the answer.
    pub(super) async fn begin(
        &self,
        method: Method,
        path: &str,
    ) -> Result<impl Future<Output = Result<Value, Failure>> + Send + use<>, Failure> {
        let request = self.request(method, path, &Value::Null, false)?;
        let (mut sender, sent) = self.connect().await?;
        let answered =
            tokio::spawn(async move { answer(sender.send_request(request).await.map_err(broken)?).await });
        let _ = sent.await; // an error: the connection ended before, which the answer tells better
        Ok(async { answered.await.unwrap_or_else(|panic| Err(broken(panic))) })
    }

    /// A call whose connection becomes a container's three streams.
    pub(super) async fn stream(&self, path: &str, body: &Value, words: LastWords) -> Result<Duplex, Failure> {
        let request = self.request(Method::POST, path, body, true)?;
        let (mut sender, _) = self.connect().await?;
        let response = sender.send_request(request).await.map_err(broken)?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            let status = response.status();
            let body = Limited::new(response.into_body(), ANSWER_BYTES).collect().await.map_err(broken)?;
            return Err(Failure::Refused(refusal(status, &body.to_bytes())));
        }
        let upgraded = hyper::upgrade::on(response).await.map_err(broken)?;
        let (read, write) = tokio::io::split(TokioIo::new(upgraded));
        Ok(container::duplex(FramedRead::new(read, Multiplexed).boxed(), write, words))
    }

    /// A connection, and the moment when its first request is out.
    async fn connect(&self) -> Result<(SendRequest<Full<Bytes>>, oneshot::Receiver<()>), Failure> {
        let stream: Box<dyn Stream> = match &self.address {
            Address::Unix(path) => Box::new(UnixStream::connect(path).await.map_err(Failure::Broken)?),
            Address::Tcp(address) => {
                let stream = TcpStream::connect(address).await.map_err(Failure::Broken)?;
                stream.set_nodelay(true).map_err(Failure::Broken)?;
                Box::new(stream)
            }
        };
        let (tell, sent) = oneshot::channel();
        let stream = Observed { stream, wrote: false, tell: Some(tell) };
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        tokio::spawn(connection.with_upgrades()); // ends with the answer, or with what it was upgraded to
        Ok((sender, sent))
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        body: &Value,
        upgrade: bool,
    ) -> Result<Request<Full<Bytes>>, Failure> {
        let bytes = match body {
            Value::Null => Bytes::new(),
            body => body.to_string().into(),
        };
        let uri = format!("{}{path}", self.prefix);
        let mut request = Request::builder().method(method).uri(uri).header(HOST, "engine");
        request = request.header(CONTENT_TYPE, "application/json");
        if upgrade {
            request = request.header(CONNECTION, "Upgrade").header(UPGRADE, "tcp");
        }
        request.body(Full::new(bytes)).map_err(broken)
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

async fn answer(response: Response<Incoming>) -> Result<Value, Failure> {
    let status = response.status();
    let body = Limited::new(response.into_body(), ANSWER_BYTES).collect().await.map_err(broken)?.to_bytes();
    if !status.is_success() && status != StatusCode::NOT_MODIFIED {
        return Err(Failure::Refused(refusal(status, &body)));
    }
    match body.is_empty() {
        true => Ok(Value::Null),
        false => serde_json::from_slice(&body).map_err(broken),
    }
}

/// A stream that tells when what was written first has been flushed: hyper flushes when a request is out.
struct Observed {
    stream: Box<dyn Stream>,
    wrote: bool,
    tell: Option<oneshot::Sender<()>>,
}

impl AsyncRead for Observed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Observed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.wrote = true;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_flush(context))?;
        if self.wrote
            && let Some(tell) = self.tell.take()
        {
            let _ = tell.send(()); // most callers only wait for the answer
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

fn refusal(status: StatusCode, body: &[u8]) -> Refusal {
    let told = serde_json::from_slice::<Value>(body).ok();
    let message = told.as_ref().and_then(|told| told["message"].as_str()).map(str::to_owned);
    Refusal { status, message: message.unwrap_or_else(|| String::from_utf8_lossy(body).into_owned()) }
}

fn broken(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Failure {
    Failure::Broken(io::Error::other(error))
}

/// Pieces of stdout and stderr in one stream: the number of the descriptor, three zeros, a length, the bytes.
struct Multiplexed;

impl Decoder for Multiplexed {
    type Item = Output;
    type Error = io::Error;

    fn decode(&mut self, bytes: &mut BytesMut) -> io::Result<Option<Output>> {
        let Some(&[descriptor, _, _, _, a, b, c, d]) = bytes.first_chunk::<8>() else { return Ok(None) };
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > PIECE_BYTES {
            return Err(io::Error::other(format!("a piece of {length} bytes")));
        }
        if bytes.len() < 8 + length {
            bytes.reserve(8 + length - bytes.len());
            return Ok(None);
        }
        bytes.advance(8);
        let piece = bytes.split_to(length).freeze();
        match descriptor {
            1 => Ok(Some(Output::Stdout(piece))),
            2 => Ok(Some(Output::Stderr(piece))),
            other => Err(io::Error::other(format!("a piece of the descriptor {other}"))),
        }
    }

    /// A container that ends in the middle of a piece has ended all the same.
    fn decode_eof(&mut self, bytes: &mut BytesMut) -> io::Result<Option<Output>> {
        self.decode(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_come_whole_and_by_their_descriptor() {
        let mut bytes = BytesMut::from(&b"\x01\0\0\0\0\0\0\x02hi\x02\0\0\0\0\0\0\x01!"[..]);
        let mut whole = Vec::new();
        while let Some(piece) = Multiplexed.decode(&mut bytes).unwrap() {
            whole.push(format!("{piece:?}"));
        }
        assert_eq!(whole, ["Stdout(b\"hi\")", "Stderr(b\"!\")"]);
        bytes.extend_from_slice(b"\x01\0\0\0\0\0\0\x02h");
        assert!(Multiplexed.decode(&mut bytes).unwrap().is_none(), "half a piece is none yet");
    }

    #[test]
    fn what_is_no_piece_is_an_error() {
        for wrong in [&b"\x03\0\0\0\0\0\0\x01x"[..], b"\x01\0\0\0\xff\xff\xff\xff"] {
            assert!(Multiplexed.decode(&mut BytesMut::from(wrong)).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn an_address_is_a_socket_or_a_host() {
        let address = |url| Raw::new(url, "").map(|raw| raw.address);
        assert!(matches!(address("unix:///run/p.sock"), Some(Address::Unix(path)) if path == "/run/p.sock"));
        assert!(matches!(address("tcp://10.0.0.1:1"), Some(Address::Tcp(host)) if host == "10.0.0.1:1"));
        assert!(address("ssh://host").is_none());
    }
}
