//! A supervisor without Python, for tests of the floors above on the fake engine.
//!
//! Its programs are words: `sleep 50` (milliseconds), `die`, `hang`, `garbage`, `raise`, `killed`; anything
//! else gives back its data as the result, or null.

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::AbortHandle;

use super::protocol::{self, HEADER_BYTES};

const HELLO: &str = r#"{"python":"3.0.0","pid":1,"uid":1000}"#;

/// Spawns one; the way to `runtime::fake::Fake::new`.
pub fn spawn(stream: DuplexStream) -> AbortHandle {
    tokio::spawn(serve(stream)).abort_handle()
}

async fn serve(mut stream: DuplexStream) {
    let mut buffer = BytesMut::new();
    while let Some((nonce, kind, payload)) = next(&mut stream, &mut buffer).await {
        let answered = match kind {
            1 => send(&mut stream, nonce, 129, &[HELLO]).await,
            2 => run(&mut stream, &mut buffer, nonce, payload).await,
            _ => Some(()),
        };
        if answered.is_none() {
            return;
        }
    }
}

/// `None` where this supervisor is to die.
async fn run(stream: &mut DuplexStream, buffer: &mut BytesMut, nonce: u64, payload: Bytes) -> Option<()> {
    let [options, code, data, _stdin] = protocol::sections::<4>(payload).ok()?;
    let options: serde_json::Value = serde_json::from_slice(&options).ok()?;
    let timeout = options["timeout_ms"].as_u64()?;
    let code = std::str::from_utf8(&code).ok()?;
    let mut words = code.split(' ');
    let failed = r#"{"kind":"raised","name":"E","value":"v","traceback":"t"}"#;
    let (changes, payload) = match words.next()? {
        "die" => return None,
        "hang" => return std::future::pending().await,
        "garbage" => {
            stream.write_all(&[b'x'; 64]).await.ok()?;
            return Some(());
        }
        "raise" => (r#""outcome":"error""#, failed),
        "killed" => (r#""outcome":null,"signal":9"#, ""),
        "sleep" => {
            let wanted: u64 = words.next()?.parse().ok()?;
            let sleep = tokio::time::sleep(std::time::Duration::from_millis(wanted.min(timeout)));
            tokio::select! {
                () = sleep => {
                    let changes = if wanted > timeout { r#""outcome":null,"stopped":"timeout""# } else { r#""outcome":"result""# };
                    (changes, "null")
                }
                _ = next(stream, buffer) => (r#""outcome":null,"stopped":"cancelled""#, ""),
            }
        }
        _ => {
            (r#""outcome":"result""#, if data.is_empty() { "null" } else { std::str::from_utf8(&data).ok()? })
        }
    };
    let rest = r#""oversized":false,"truncated":[],"run_us":1,"cpu_us":1,"page_faults":1"#;
    send(stream, nonce, 130, &[&format!("{{{changes},{rest}}}"), payload, "", "", "[\"total 0\"]"]).await
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

async fn send(stream: &mut DuplexStream, nonce: u64, kind: u8, sections: &[&str]) -> Option<()> {
    let length: usize = sections.iter().map(|section| 4 + section.len()).sum();
    let mut frame = Vec::new();
    frame.extend_from_slice(&nonce.to_be_bytes());
    frame.push(kind);
    frame.extend_from_slice(&(length as u32).to_be_bytes());
    for section in sections {
        frame.extend_from_slice(&(section.len() as u32).to_be_bytes());
        frame.extend_from_slice(section.as_bytes());
    }
    stream.write_all(&frame).await.ok()
}
