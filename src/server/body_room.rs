//! How much of all requests' bodies is in memory at once, and how one is read.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::Settings;
use super::error::Error;

/// Room is given in these: a semaphore counts up to 2^32 of them.
const UNIT_BYTES: usize = 1024;

/// The room for all bodies together.
#[derive(Debug)]
pub struct BodyRoom(Semaphore);

impl BodyRoom {
    /// Room for that many bytes.
    pub fn new(bytes: usize) -> BodyRoom {
        BodyRoom(Semaphore::new((bytes / UNIT_BYTES).min(Semaphore::MAX_PERMITS)))
    }

    /// Reads a body, waiting for room first; the room is given back with the permit.
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
        let length = announced.unwrap_or(most);
        let units = u32::try_from(length.div_ceil(UNIT_BYTES).max(1)).unwrap_or(u32::MAX);
        let room = within(settings.body_timeout, self.0.acquire_many(units)).await;
        let mut room = room.ok_or(Error::Overloaded)?.map_err(|_| Error::Overloaded)?;
        let all = collect(body, announced.unwrap_or(0), most);
        let body = within(settings.body_timeout, all).await;
        let body = body.ok_or(Error::RequestTimeout(settings.body_timeout))??;
        // One that did not announce its length had room for the longest.
        let surplus = (units as usize).saturating_sub(body.len().div_ceil(UNIT_BYTES).max(1));
        drop(room.split(surplus));
        Ok((body, room))
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(limit, work).await.ok()
}

/// Into one buffer of the announced length: a large one goes back to the system as a whole.
async fn collect(mut body: Incoming, announced: usize, most: usize) -> Result<Bytes, Error> {
    let mut bytes = BytesMut::with_capacity(announced);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Error::invalid("the body", format!("broke off: {error}")))?;
        let Ok(data) = frame.into_data() else { continue }; // trailers
        if bytes.len() + data.len() > most {
            return Err(too_large(most));
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes.freeze())
}

fn too_large(limit: usize) -> Error {
    Error::TooLarge { what: "the body", limit }
}
