//! What a run prints, from the conversation with its sandbox to whoever follows it.
//!
//! Whoever prints is never held up: what has not been taken waits here, in as many bytes as the caps allow to be printed,
//! whatever the pieces were that it came in.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::Field;

/// What is told of a run while it goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// It has its place in the session's queue.
    Accepted,
    /// It printed.
    Printed {
        /// `Field::Stdout` or `Field::Stderr`.
        stream: Field,
        /// Any bytes, cut anywhere.
        bytes: Vec<u8>,
    },
    /// Some of what it printed is not told, since the cap is reached.
    Cut(Field),
}

/// The side that tells; gone, nothing more is told.
#[derive(Debug)]
pub struct Teller(Arc<Shared>);

/// The side that follows.
#[derive(Debug)]
pub struct Follower(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    untold: Mutex<Untold>,
    more: Notify,
}

#[derive(Debug, Default)]
struct Untold {
    accepted: bool,
    streams: [Stream; 2],
    over: bool,
}

#[derive(Debug, Default)]
struct Stream {
    bytes: Vec<u8>,
    cut: bool,
}

const STREAMS: [Field; 2] = [Field::Stdout, Field::Stderr];

/// Both sides.
pub fn teller() -> (Teller, Follower) {
    let shared = Arc::<Shared>::default();
    (Teller(shared.clone()), Follower(shared))
}

impl Teller {
    /// It has its place.
    pub fn accepted(&self) {
        self.0.untold().accepted = true;
        self.0.more.notify_one();
    }

    /// No bytes at all mean that from here on some are missing.
    pub fn printed(&self, stream: Field, bytes: &[u8]) {
        let mut untold = self.0.untold();
        let stream = &mut untold.streams[usize::from(stream == Field::Stderr)];
        stream.bytes.extend_from_slice(bytes);
        stream.cut |= bytes.is_empty();
        drop(untold);
        self.0.more.notify_one();
    }
}

impl Drop for Teller {
    fn drop(&mut self) {
        self.0.untold().over = true;
        self.0.more.notify_one();
    }
}

impl Follower {
    /// What has come since, the order kept within each stream; `None` once nothing more can.
    pub async fn next(&mut self) -> Option<Told> {
        loop {
            {
                let mut untold = self.0.untold();
                if let Some(told) = untold.take() {
                    return Some(told);
                }
                if untold.over {
                    return None;
                }
            }
            self.0.more.notified().await;
        }
    }
}

impl Shared {
    fn untold(&self) -> MutexGuard<'_, Untold> {
        self.untold.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Untold {
    fn take(&mut self) -> Option<Told> {
        if std::mem::take(&mut self.accepted) {
            return Some(Told::Accepted);
        }
        let mut streams = self.streams.iter_mut().zip(STREAMS);
        streams.find_map(|(untold, stream)| match std::mem::take(&mut untold.bytes) {
            bytes if !bytes.is_empty() => Some(Told::Printed { stream, bytes }),
            _ => std::mem::take(&mut untold.cut).then_some(Told::Cut(stream)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_not_taken_is_told_in_one_piece_and_the_cut_after_it() {
        let (teller, mut follower) = teller();
        teller.accepted();
        for _ in 0..1000 {
            teller.printed(Field::Stdout, b"x");
            teller.printed(Field::Stderr, b"y");
        }
        teller.printed(Field::Stdout, b"");
        drop(teller);
        let printed = |stream, byte: &[u8]| Some(Told::Printed { stream, bytes: byte.repeat(1000) });
        assert_eq!(follower.next().await, Some(Told::Accepted));
        assert_eq!(follower.next().await, printed(Field::Stdout, b"x"));
        assert_eq!(follower.next().await, Some(Told::Cut(Field::Stdout)));
        assert_eq!(follower.next().await, printed(Field::Stderr, b"y"));
        assert_eq!(follower.next().await, None);
    }
}
