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

    /// Reads a body, and waits for room where more has come than it has; the room is given back with the permit. What
    /// was announced and has not come takes none.
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
        let all = self.collect(body, announced.unwrap_or(0), most, &mut room, &mut waits);
        let all = tokio::time::timeout(settings.body_timeout, all).await;
        match all {
            Ok(body) => Ok((body?, room)),
            Err(_) if waits => Err(Error::Overloaded),
            Err(_) => Err(Error::RequestTimeout(settings.body_timeout)),
        }
    }

    /// Into one buffer of the announced length: a large one goes back to the system as a whole.
    async fn collect<'a>(
        &'a self,
        mut body: Incoming,
        announced: usize,
        most: usize,
        room: &mut SemaphorePermit<'a>,
        waits: &mut bool,
    ) -> Result<Bytes, Error> {
        let mut bytes = BytesMut::with_capacity(announced);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| Error::invalid("the body", format!("broke off: {error}")))?;
            let Ok(data) = frame.into_data() else { continue }; // trailers
            let length = bytes.len() + data.len();
            if length > most {
                return Err(too_large(most));
            }
            let lacks = length.saturating_sub(SMALL_BYTES).div_ceil(UNIT_BYTES) - room.num_permits();
            if lacks > 0 {
                *waits = true;
                let more = self.0.acquire_many(u32::try_from(lacks).unwrap_or(u32::MAX)).await;
                room.merge(more.map_err(|_| Error::Overloaded)?);
                *waits = false;
            }
            bytes.extend_from_slice(&data);
        }
        Ok(bytes.freeze())
    }
}

fn too_large(limit: usize) -> Error {
    Error::TooLarge { what: "the body", limit }
}
