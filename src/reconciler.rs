//! Floor 5: compares the engine's list of sandboxes with ours, at the start and on a period, and mends both.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::runtime::{Found, SandboxId};
use crate::session::Sessions;

/// What an earlier server had not claimed by its end may be about to be: the engine had heard of that already.
const CLAIM_GRACE: Duration = Duration::from_secs(5);

/// When to look, and what may yet become somebody's.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Between two looks.
    pub period: Duration,
    /// A sandbox that nobody knows of is left alone for that long: longer than a creation may take, whose sandbox
    /// the engine knows before we do.
    pub grace: Duration,
}

/// The one that compares.
#[derive(Debug)]
pub struct Reconciler {
    sessions: Sessions,
    settings: Settings,
    /// Sandboxes that nobody knows of, and when they are to be cleared up.
    strangers: HashMap<SandboxId, Instant>,
    /// Of these, the ones that were there at the start.
    left: HashSet<SandboxId>,
}

impl Reconciler {
    /// Takes up what an earlier server had claimed, as the engine listed it before there was a pool.
    pub fn new(sessions: Sessions, settings: Settings, left: Vec<Found>) -> Reconciler {
        let (claimed, unclaimed): (Vec<_>, Vec<_>) =
            left.into_iter().partition(|found| found.claim.is_some());
        sessions.recover(claimed);
        let due = Instant::now() + CLAIM_GRACE;
        let left: HashSet<_> = unclaimed.into_iter().map(|found| found.id).collect();
        let strangers = left.iter().map(|id| (id.clone(), due)).collect();
        Reconciler { sessions, settings, strangers, left }
    }

    /// Never ends by itself: its owner drops it.
    pub async fn run(mut self) {
        loop {
            let due = self.strangers.values().copied();
            let next = due.fold(Instant::now() + self.settings.period, Instant::min);
            tokio::time::sleep_until(next).await;
            self.look().await;
        }
    }

    async fn look(&mut self) {
        let pool = self.sessions.pool();
        let known = pool.known();
        let found = match pool.list().await {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(%error, "cannot compare the engine's sandboxes with ours");
                let later = Instant::now() + self.settings.period;
                self.strangers.values_mut().for_each(|due| *due = later.max(*due));
                return;
            }
        };
        let listed: HashSet<_> = found.iter().map(|found| &found.id).collect();
        self.sessions.missing(&known.iter().filter(|id| !listed.contains(id)).cloned().collect());
        self.strangers.retain(|id, _| listed.contains(id));
        self.clear_up(found, &known);
        self.sessions.pool().check().await;
    }

    /// Of those that nobody knows of: what is due. One that was `known` before the list may have been removed since.
    fn clear_up(&mut self, found: Vec<Found>, known: &HashSet<SandboxId>) {
        let now = Instant::now();
        let pool = self.sessions.pool();
        let (mut left, mut due) = (Vec::new(), Vec::new());
        for found in found {
            if known.contains(&found.id) || pool.knows(&found.id) {
                self.strangers.remove(&found.id);
            } else if *self.strangers.entry(found.id.clone()).or_insert(now + self.settings.grace) <= now {
                self.strangers.remove(&found.id);
                if self.left.remove(&found.id) {
                    left.push(found);
                } else {
                    tracing::warn!(sandbox = %found.id, claimed = found.claim.is_some(), "a sandbox that nobody knew");
                    due.push(found);
                }
            }
        }
        self.sessions.unknown(left, due);
    }
}
