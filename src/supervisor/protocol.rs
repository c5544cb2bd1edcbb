//! The frames between the server and a supervisor.
//!
//! A frame is a nonce (8 bytes), a kind (1 byte), a length (4 bytes) and that many bytes of payload, numbers
//! big-endian. A payload is a list of sections: a length (4 bytes) and that many bytes each.
//!
//! | kind | from | nonce | sections |
//! |---|---|---|---|
//! | 1 hello | server | the attachment's | the caps as JSON |
//! | 2 run | server | the run's | options as JSON, code, data as JSON, stdin |
//! | 3 interrupt | server | the run's | none |
//! | 4 file | server | the exchange's | operation as JSON, path, data: see files.rs |
//! | 129 hello | supervisor | the attachment's | what it is and sees of its layers, as JSON |
//! | 130 done | supervisor | the run's | report, result or error as JSON, stdout, stderr, listing as JSON, extras as JSON |
//! | 131 output | supervisor | the run's | 1 for stdout or 2 for stderr, bytes; none where it is cut from here on |
//! | 132 file | supervisor | the exchange's | facts or the word for a refusal as JSON, data |
//!
//! A report is 28 bytes: exit status and signal of the run's process (4 each, -1 for none), what came on its
//! result pipe (0 nothing, 1 a result, 2 an error), what stopped it (0 nothing, 1 its timeout, 2 an interrupt,
//! 3 its CPU time), what was cut (bits: 1 stdout, 2 stderr, 4 listing, 8 the result pipe; 16: the kernel was lost), why the process got a SIGKILL (0 unknown,
//! 1 not for want of memory, 2 for want of memory), then wall time and CPU time in microseconds (8 each).
//!
//! Ahead of each hello stands `fresh_start`. A supervisor may outlive the server that started it, and meet a later
//! one: what is added to a frame stands at its end, and nobody minds what he does not know of.
//!
//! What a supervisor sends is a stranger's: a frame that is too long, of an unknown kind or with the wrong
//! nonce condemns its sandbox, and nobody guesses where the next one starts.

use bytes::{Buf, Bytes, BytesMut};

/// Bytes before the payload.
pub(super) const HEADER_BYTES: usize = 13;

/// The kinds that the server sends.
#[derive(Debug, Clone, Copy)]
pub enum Request {
    /// Who is there?
    Hello = 1,
    /// Run this.
    Run = 2,
    /// Interrupt the run that goes on.
    Interrupt = 3,
    /// Do something with a file.
    File = 4,
}

/// The kinds that a supervisor sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// What the supervisor is.
    Hello = 129,
    /// The end of a run.
    Done = 130,
    /// What a run has just printed.
    Output = 131,
    /// How it went with a file.
    File = 132,
}

/// A frame from a supervisor.
#[derive(Debug)]
pub struct Frame {
    /// Of the request that it answers.
    pub nonce: u64,
    /// What it is.
    pub kind: Answer,
    /// Its sections.
    pub payload: Bytes,
}

/// Why what a supervisor sent is no frame of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A kind that does not exist.
    #[error("a frame of kind {0}, which there is not")]
    Kind(u8),
    /// Longer than all caps together.
    #[error("a frame of {0} bytes, more than all caps together")]
    Length(u64),
    /// An answer to something that was not asked.
    #[error("a frame with a nonce that is not the expected one")]
    Nonce,
    /// Sections that do not fit their frame, or fewer than there must be.
    #[error("a frame whose sections do not fit")]
    Sections,
    /// A section that does not hold what it must.
    #[error("a section that does not hold what it must: {0}")]
    Content(&'static str),
}

/// Writes a frame at the end of `buffer`.
pub fn encode(buffer: &mut Vec<u8>, nonce: u64, kind: Request, sections: &[&[u8]]) {
    let length: usize = sections.iter().map(|section| 4 + section.len()).sum();
    buffer.reserve(HEADER_BYTES + length);
    buffer.extend_from_slice(&nonce.to_be_bytes());
    buffer.push(kind as u8);
    buffer.extend_from_slice(&length_of(length));
    for section in sections {
        buffer.extend_from_slice(&length_of(section.len()));
        buffer.extend_from_slice(section);
    }
}

fn length_of(length: usize) -> [u8; 4] {
    u32::try_from(length).expect("the caps on body and code keep every frame far below 4 GiB").to_be_bytes()
}

/// What goes ahead of each hello: whoever sees it forgets all that came before, which may be the beginning of a frame
/// whose server was killed in the middle of it. To a supervisor that does not know of it, it is a frame of an unknown
/// kind, which it passes over.
///
/// Made when it is needed, lest a file that holds this program be taken for one.
pub(super) fn fresh_start() -> [u8; 16] {
    let [a, b, c] = [0xf5, 0xc0, 0xfe_u8].map(std::hint::black_box);
    [a, b, c, a, b, c, a, b, 255, 0, 0, 0, 3, c, b, a]
}

/// How a frame from a supervisor begins.
pub(super) fn mark(nonce: u64, kind: Answer) -> [u8; 9] {
    let mut mark = [kind as u8; 9];
    mark[..8].copy_from_slice(&nonce.to_be_bytes());
    mark
}

/// Takes the next frame from `buffer` where it is there as a whole. Looks at no byte that it did not bound.
///
/// # Errors
/// What is no frame of ours, or has a payload of more than `longest` bytes.
pub fn decode(buffer: &mut BytesMut, longest: usize) -> Result<Option<Frame>, Violation> {
    let Some(header) = buffer.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
    let mut header = &header[..];
    let nonce = header.get_u64();
    let kind = match header.get_u8() {
        129 => Answer::Hello,
        130 => Answer::Done,
        131 => Answer::Output,
        132 => Answer::File,
        other => return Err(Violation::Kind(other)),
    };
    let length = header.get_u32() as usize;
    if length > longest {
        return Err(Violation::Length(length as u64));
    }
    if buffer.len() < HEADER_BYTES + length {
        buffer.reserve(HEADER_BYTES + length - buffer.len());
        return Ok(None);
    }
    buffer.advance(HEADER_BYTES);
    Ok(Some(Frame { nonce, kind, payload: buffer.split_to(length).freeze() }))
}

/// The `N` sections of a payload, no more and no fewer.
///
/// # Errors
/// `Sections` where they do not fit.
pub fn sections<const N: usize>(mut payload: Bytes) -> Result<[Bytes; N], Violation> {
    let mut sections = [const { Bytes::new() }; N];
    for section in &mut sections {
        if payload.len() < 4 {
            return Err(Violation::Sections);
        }
        let length = payload.get_u32() as usize;
        if length > payload.len() {
            return Err(Violation::Sections);
        }
        *section = payload.split_to(length);
    }
    if payload.is_empty() { Ok(sections) } else { Err(Violation::Sections) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(nonce: u64, kind: u8, payload: &[u8]) -> BytesMut {
        let mut frame = BytesMut::new();
        frame.extend_from_slice(&nonce.to_be_bytes());
        frame.extend_from_slice(&[kind]);
        frame.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        frame.extend_from_slice(payload);
        frame
    }

    #[test]
    fn a_frame_in_pieces_is_taken_once_it_is_whole() {
        let whole = answer(7, 130, b"\0\0\0\x02hi");
        for cut in 0..whole.len() {
            let mut buffer = BytesMut::from(&whole[..cut]);
            assert!(decode(&mut buffer, 100).unwrap().is_none(), "cut at {cut}");
            buffer.extend_from_slice(&whole[cut..]);
            let frame = decode(&mut buffer, 100).unwrap().unwrap();
            assert_eq!((frame.nonce, frame.kind), (7, Answer::Done));
            assert_eq!(sections::<1>(frame.payload).unwrap()[0], "hi");
            assert!(buffer.is_empty());
        }
    }

    #[test]
    fn the_longest_frame_passes_and_one_byte_more_does_not() {
        assert!(decode(&mut answer(1, 129, &[0; 10]), 10).unwrap().is_some());
        let error = decode(&mut answer(1, 129, &[0; 11]), 10).unwrap_err();
        assert_eq!(error, Violation::Length(11));
    }

    #[test]
    fn a_length_is_refused_before_its_bytes_are_awaited() {
        let mut huge = answer(1, 130, b"");
        huge[9..13].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(decode(&mut huge, 1 << 20).unwrap_err(), Violation::Length(u64::from(u32::MAX)));
    }

    #[test]
    fn an_unknown_kind_is_refused() {
        assert_eq!(decode(&mut answer(1, 2, b""), 10).unwrap_err(), Violation::Kind(2));
    }

    #[test]
    fn sections_must_fit_exactly() {
        for bad in [&b"\0\0\0"[..], b"\0\0\0\x03hi", b"\0\0\0\x02hi!", b""] {
            assert_eq!(
                sections::<1>(Bytes::copy_from_slice(bad)).unwrap_err(),
                Violation::Sections,
                "{bad:?}"
            );
        }
    }

    /// Not a fuzzer, but every byte of a small alphabet in every place: nothing panics, nothing grows.
    #[test]
    fn no_bytes_make_the_decoder_panic_or_reserve_more_than_the_cap() {
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..200_000 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let mut bytes = BytesMut::from(&seed.to_be_bytes()[..]);
            bytes.extend_from_slice(&[
                if seed & 1 == 0 { 130 } else { 129 },
                0,
                0,
                (seed >> 8) as u8,
                seed as u8,
            ]);
            bytes.extend_from_slice(&seed.to_le_bytes());
            if let Ok(Some(frame)) = decode(&mut bytes, 1024) {
                let _ = sections::<5>(frame.payload.clone());
                let _ = sections::<1>(frame.payload);
            }
            assert!(bytes.capacity() <= 4096);
        }
    }
}
