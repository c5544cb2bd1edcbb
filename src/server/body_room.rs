//! How much of all requests' bodies is in memory at once, and how one is read.

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::Settings;
use super::error::Error;

/// Room is given in these: a semaphore counts up to 2^32 of them.
const UNIT_BYTES: usize = 64 * 1024;
/// What a body may have without room: as much as a connection's buffers. So nobody's small body waits for large ones.
const SMALL_BYTES: usize = UNIT_BYTES;

/// The room for all bodies together.
#[derive(Debug)]
pub struct BodyRoom(Semaphore);

impl BodyRoom {
    /// Room for that many bytes.
    pub fn new(bytes: usize) -> BodyRoom {
        BodyRoom(Semaphore::new(bytes.div_ceil(UNIT_BYTES).min(Semaphore::MAX_PERMITS)))
    }

    /// Reads a body. One that turns out to be large waits for room, for all of it at once, since several that have a
    /// part of theirs each would wait for each other; the room is given back with the permit.
    pub(super) async fn read(
        &self,
        body: Incoming,
        settings: &Settings,
    ) -> Result<(Bytes, SemaphorePermit<'_>), Error> {
        let most = settings.body_bytes;
        let announced = body.size_hint().exact().map(|length| usize::try_from(length).unwrap_or(usize::MAX));
        if announced.is_some_and(|length| length > most) {
            return Err(too_large(most)); // said so itself: not a byte of it is read
        }
        let mut room = self.0.try_acquire_many(0).map_err(|_| Error::Overloaded)?;
        let mut waits = false;
        let all = self.collect(body, announced, most, &mut room, &mut waits);
        let body = match tokio::time::timeout(settings.body_timeout, all).await {
            Ok(body) => body?,
            Err(_) if waits => return Err(Error::Overloaded),
            Err(_) => return Err(Error::RequestTimeout(settings.body_timeout)),
        };
        // One that did not announce its length had room for the longest.
        drop(room.split(room.num_permits().saturating_sub(units(body.len()))));
        Ok((body, room))
    }

    /// Into one buffer of the announced length: a large one goes back to the system as a whole.
    async fn collect<'a>(
        &'a self,
        mut body: Incoming,
        announced: Option<usize>,
        most: usize,
        room: &mut SemaphorePermit<'a>,
        waits: &mut bool,
    ) -> Result<Bytes, Error> {
        let mut bytes = BytesMut::with_capacity(announced.unwrap_or(0));
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| Error::invalid("the body", format!("broke off: {error}")))?;
            let Ok(data) = frame.into_data() else { continue }; // trailers
            let length = bytes.len() + data.len();
            if length > most {
                return Err(too_large(most));
            }
            if length > SMALL_BYTES && room.num_permits() == 0 {
                *waits = true;
                let wanted = u32::try_from(units(announced.unwrap_or(most))).unwrap_or(u32::MAX);
                room.merge(self.0.acquire_many(wanted).await.map_err(|_| Error::Overloaded)?);
                *waits = false;
            }
            bytes.extend_from_slice(&data);
        }
        Ok(bytes.freeze())
    }
}

/// Beyond what a body may have without room.
fn units(length: usize) -> usize {
    length.saturating_sub(SMALL_BYTES).div_ceil(UNIT_BYTES)
}

fn too_large(limit: usize) -> Error {
    Error::TooLarge { what: "the body", limit }
}
