//! Floor 5: removes the sandboxes of sessions that nobody uses. Sleeps until the next expiry.

use tokio::time::sleep_until;

use crate::session::Sessions;

/// Never ends by itself: its owner drops it.
pub async fn reap(sessions: Sessions) {
    loop {
        let next = sessions.expire();
        tokio::select! {
            biased;
            () = sleep_until(next) => {}
            // An expiry may now be nearer than the one expected; idle times are all the same, so only then.
            () = sessions.recovered() => {}
        }
    }
}
