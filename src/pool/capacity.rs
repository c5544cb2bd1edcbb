//! How many sandboxes may exist, and which do.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use crate::runtime::SandboxId;

/// Room for sandboxes. Each holds a permit from before its creation until after its removal.
#[derive(Debug)]
pub(super) struct Capacity {
    max: usize,
    taken: Mutex<Taken>,
    /// Told when a permit comes back.
    freed: Notify,
}

#[derive(Debug, Default)]
struct Taken {
    permits: usize,
    ids: HashSet<SandboxId>,
}

impl Capacity {
    pub(super) fn new(max: usize) -> Arc<Capacity> {
        Arc::new(Capacity { max, taken: Mutex::default(), freed: Notify::new() })
    }

    /// `None` where as many exist as may.
    pub(super) fn permit(self: &Arc<Capacity>) -> Option<Permit> {
        let mut taken = self.taken();
        if taken.permits >= self.max {
            return None;
        }
        taken.permits += 1;
        Some(Permit { capacity: self.clone(), id: None })
    }

    /// For a sandbox that exists already, room or no room; until it is gone others wait.
    pub(super) fn permit_for(self: &Arc<Capacity>, id: SandboxId) -> Permit {
        self.taken().permits += 1;
        let mut permit = Permit { capacity: self.clone(), id: None };
        permit.name(id);
        permit
    }

    /// The sandboxes that hold a permit, as far as they have a name yet.
    pub(super) fn ids(&self) -> HashSet<SandboxId> {
        self.taken().ids.clone()
    }

    pub(super) fn knows(&self, id: &SandboxId) -> bool {
        self.taken().ids.contains(id)
    }

    /// Until no more than `left` permits are out.
    pub(super) async fn returned(&self, left: usize) {
        loop {
            let freed = self.freed.notified();
            let mut freed = std::pin::pin!(freed);
            freed.as_mut().enable(); // before the look: what comes back after it is heard
            if self.taken().permits <= left {
                return;
            }
            freed.await;
        }
    }

    /// Until a permit comes back.
    pub(super) fn freed(&self) -> Notified<'_> {
        self.freed.notified()
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to be one of the sandboxes. Comes back when it is dropped.
#[derive(Debug)]
pub(super) struct Permit {
    capacity: Arc<Capacity>,
    id: Option<SandboxId>,
}

impl Permit {
    /// The engine has given its sandbox a name.
    pub(super) fn name(&mut self, id: SandboxId) {
        self.capacity.taken().ids.insert(id.clone());
        self.id = Some(id);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut taken = self.capacity.taken();
        taken.permits -= 1;
        if let Some(id) = &self.id {
            taken.ids.remove(id);
        }
        drop(taken);
        self.capacity.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> SandboxId {
        SandboxId(name.into())
    }

    #[test]
    fn as_many_permits_are_out_as_may_and_each_comes_back() {
        let capacity = Capacity::new(2);
        let first = capacity.permit().unwrap();
        let second = capacity.permit().unwrap();
        assert!(capacity.permit().is_none());
        drop(first);
        assert!(capacity.permit().is_some(), "taken and dropped");
        drop(second);
        assert!(capacity.permit().is_some());
    }

    #[test]
    fn a_sandbox_that_exists_counts_even_where_there_is_no_room() {
        let capacity = Capacity::new(1);
        let (old, other) = (capacity.permit_for(id("a")), capacity.permit_for(id("b")));
        assert!(capacity.permit().is_none() && capacity.knows(&id("a")) && capacity.ids().len() == 2);
        drop(old);
        assert!(capacity.permit().is_none() && !capacity.knows(&id("a")));
        drop(other);
        assert!(capacity.permit().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_for_the_last_permit_ends_with_it() {
        let capacity = Capacity::new(2);
        let (stays, goes) = (capacity.permit().unwrap(), capacity.permit().unwrap());
        let second = std::time::Duration::from_secs(1);
        assert!(tokio::time::timeout(second, capacity.returned(1)).await.is_err());
        drop(goes);
        assert!(tokio::time::timeout(second, capacity.returned(1)).await.is_ok());
        drop(stays);
        capacity.returned(0).await;
    }
}
