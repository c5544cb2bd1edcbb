//! A supervisor without Python, for tests of the floors above on the fake engine.
//!
//! Its programs are words: `sleep 50` (milliseconds), `held 50` (its report is, for that long), `die`, `hang`, `garbage`, `raise`, `killed`; `write X`, which
//! adds a line to its workspace and gives back its serial number and every line; anything else gives back its data
//! as the result, or null.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::AbortHandle;

use crate::runtime::fake::Inside;

use super::protocol::{self, HEADER_BYTES};

/// Its workspace has no files that could be asked for.
const NO_FILE: &str = r#"{"error":"not_found"}"#;
const HELLO: &str = r#"{"python":"3.0.0","pid":1,"uid":1000}"#;

/// Spawns one; the way to `runtime::fake::Fake::new`.
pub fn spawn(stream: DuplexStream, inside: Arc<Inside>) -> AbortHandle {
    tokio::spawn(serve(stream, inside)).abort_handle()
}

async fn serve(mut stream: DuplexStream, inside: Arc<Inside>) {
    let mut buffer = BytesMut::new();
    while let Some((nonce, kind, payload)) = next(&mut stream, &mut buffer).await {
        let answered = match kind {
            1 => send(&mut stream, nonce, 129, &[HELLO.as_bytes()]).await,
            4 => send(&mut stream, nonce, 132, &[NO_FILE.as_bytes(), b""]).await,
            2 => run(&mut stream, &mut buffer, nonce, payload, &inside).await,
            _ => Some(()),
        };
        if answered.is_none() {
            return; // and whoever attaches to it later is served anew, unless it has died
        }
    }
}

/// `None` where this conversation is over.
async fn run(
    stream: &mut DuplexStream,
    buffer: &mut BytesMut,
    nonce: u64,
    payload: Bytes,
    inside: &Inside,
) -> Option<()> {
    let [options, code, data, _stdin] = protocol::sections::<4>(payload).ok()?;
    let options: serde_json::Value = serde_json::from_slice(&options).ok()?;
    let timeout = options["timeout_ms"].as_u64()?;
    let code = std::str::from_utf8(&code).ok()?;
    let mut words = code.split(' ');
    let written;
    let failed = r#"{"kind":"raised","name":"E","value":"v","traceback":"t"}"#;
    // Signal, what was said, what stopped it; see the protocol.
    let ((signal, said, stopped), payload) = match words.next()? {
        "die" => {
            inside.dead.store(true, Ordering::SeqCst);
            return None;
        }
        "hang" => return std::future::pending().await,
        "held" => {
            let held: u64 = words.next()?.parse().ok()?;
            tokio::time::sleep(std::time::Duration::from_millis(held)).await;
            ((-1, 1, 0), "null")
        }
        "garbage" => {
            stream.write_all(&[b'x'; 64]).await.ok()?;
            return Some(());
        }
        "raise" => ((-1, 2, 0), failed),
        "write" => {
            let mut files = inside.files.lock().ok()?;
            files.push(words.next()?.to_owned());
            written = serde_json::json!({"serial": inside.serial, "files": *files}).to_string();
            ((-1, 1, 0), written.as_str())
        }
        "killed" => ((9, 0, 0), ""),
        "sleep" => {
            let wanted: u64 = words.next()?.parse().ok()?;
            let sleep = tokio::time::sleep(std::time::Duration::from_millis(wanted.min(timeout)));
            tokio::select! {
                biased;
                () = sleep => (if wanted > timeout { (-1, 0, 1) } else { (-1, 1, 0) }, "null"),
                _ = next(stream, buffer) => ((-1, 0, 2), ""),
            }
        }
        _ => ((-1, 1, 0), if data.is_empty() { "null" } else { std::str::from_utf8(&data).ok()? }),
    };
    let mut report = [0_i32.to_be_bytes(), i32::to_be_bytes(signal)].concat();
    report.extend([said, stopped, 0, 0]);
    report.extend([0; 16]);
    send(stream, nonce, 130, &[&report, payload.as_bytes(), b"", b"", b"[\"total 0\"]", b""]).await
}

async fn next(stream: &mut DuplexStream, buffer: &mut BytesMut) -> Option<(u64, u8, Bytes)> {
    loop {
        if let Some(mut header) = buffer.first_chunk::<HEADER_BYTES>().map(|header| &header[..]) {
            let (nonce, kind, length) = (header.get_u64(), header.get_u8(), header.get_u32() as usize);
            if buffer.len() >= HEADER_BYTES + length {
                buffer.advance(HEADER_BYTES);
                return Some((nonce, kind, buffer.split_to(length).freeze()));
            }
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
}

async fn send(stream: &mut DuplexStream, nonce: u64, kind: u8, sections: &[&[u8]]) -> Option<()> {
    let length: usize = sections.iter().map(|section| 4 + section.len()).sum();
    let mut frame = Vec::new();
    frame.extend_from_slice(&nonce.to_be_bytes());
    frame.push(kind);
    frame.extend_from_slice(&(length as u32).to_be_bytes());
    for section in sections {
        frame.extend_from_slice(&(section.len() as u32).to_be_bytes());
        frame.extend_from_slice(section);
    }
    stream.write_all(&frame).await.ok()
}
