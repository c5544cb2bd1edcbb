//! Who gets which sandbox, and when more are to be made: decisions only. They are taken under one short lock;
//! what they call for is done outside of it.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Error;

/// After a failed creation or removal; doubled up to the last with each more.
pub(super) const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// One failure may be the sandbox's; that many in a row are the engine's, and nobody waits for it any longer.
const FAILURES: u32 = 2;
/// Of the mean time of a creation, the part that the last one has.
const WEIGHT: f64 = 0.2;

/// What the pool is to hold.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) size: usize,
    pub(super) starting_max: usize,
    pub(super) wait_timeout: Duration,
    pub(super) recycle_after: Duration,
    pub(super) idle_after: Option<Duration>,
}

/// The books of the pool: `T` is a sandbox that waits for its user.
#[derive(Debug)]
pub(super) struct Ledger<T> {
    plan: Plan,
    /// The oldest first.
    warm: VecDeque<(T, Instant)>,
    /// First come, first served; nobody waits while one is warm.
    waiting: VecDeque<oneshot::Sender<Result<T, Error>>>,
    /// Creations that go on.
    starting: usize,
    /// In a row.
    failures: u32,
    /// Until then none is made that nobody waits for.
    retry_at: Instant,
    last_claim: Instant,
    /// Of a creation; `None` before the first.
    mean: Option<Duration>,
    closed: bool,
}

/// What a claim gets.
#[derive(Debug)]
pub(super) enum Claim<T> {
    /// A warm one.
    Hit(T),
    /// The next one that gets ready and that nobody who came before waits for.
    Wait {
        told: oneshot::Receiver<Result<T, Error>>,
        /// `wait` where its creation goes on already, `miss` where it has to be begun.
        how: &'static str,
    },
    Refused(Error),
}

/// How long to wait after so many failures in a row: `jitter`, from 0 to 1, keeps several servers apart.
pub(super) fn pause(failures: u32, jitter: f64) -> Duration {
    let doubled = RETRY.0 * 2_u32.saturating_pow(failures.saturating_sub(1).min(16));
    doubled.min(RETRY.1).mul_f64(0.5 + jitter / 2.0)
}

impl<T> Ledger<T> {
    pub(super) fn new(plan: Plan, now: Instant) -> Ledger<T> {
        Ledger {
            plan,
            warm: VecDeque::new(),
            waiting: VecDeque::new(),
            starting: 0,
            failures: 0,
            retry_at: now,
            last_claim: now,
            mean: None,
            closed: false,
        }
    }

    pub(super) fn claim(&mut self, now: Instant) -> Claim<T> {
        if self.closed {
            return Claim::Refused(Error::Closed);
        }
        self.last_claim = now;
        if let Some((sandbox, _)) = self.warm.pop_front() {
            return Claim::Hit(sandbox);
        }
        self.forget_who_left();
        // While the engine fails no more wait than try it.
        if self.is_failing() && self.waiting.len() >= self.plan.starting_max {
            return Claim::Refused(Error::Failing {
                retry_after: self.retry_at.saturating_duration_since(now),
            });
        }
        let expected = self.expected_wait();
        if expected > self.plan.wait_timeout {
            return Claim::Refused(Error::Crowded { retry_after: expected });
        }
        let how = if self.starting > self.waiting.len() { "wait" } else { "miss" };
        let (tell, told) = oneshot::channel();
        self.waiting.push_back(tell);
        Claim::Wait { told, how }
    }

    /// By the measured rate: how long one more claim would wait.
    pub(super) fn expected_wait(&self) -> Duration {
        let rounds = (self.waiting.len() + 1).div_ceil(self.plan.starting_max);
        self.mean.unwrap_or_default() * u32::try_from(rounds).unwrap_or(u32::MAX)
    }

    /// How many creations are to be begun now.
    pub(super) fn wanted(&mut self, now: Instant) -> usize {
        if self.closed {
            return 0;
        }
        self.forget_who_left();
        let held_back = now < self.retry_at || self.is_paused(now);
        let refill = if held_back { 0 } else { self.plan.size.saturating_sub(self.warm.len()) };
        let goal = (self.waiting.len() + refill).min(self.plan.starting_max);
        goal.saturating_sub(self.starting)
    }

    pub(super) fn begun(&mut self) {
        self.starting += 1;
    }

    /// A creation came to its end, which took `took`; gives back what nobody has a use for.
    pub(super) fn made(&mut self, sandbox: T, took: Duration, now: Instant) -> Option<T> {
        self.starting -= 1;
        self.failures = 0;
        self.retry_at = now;
        let mean = self.mean.unwrap_or(took);
        self.mean = Some(mean.mul_f64(1.0 - WEIGHT) + took.mul_f64(WEIGHT));
        self.place(sandbox, now)
    }

    /// To who waits longest, else to the warm ones; gives back what nobody has a use for.
    pub(super) fn place(&mut self, sandbox: T, now: Instant) -> Option<T> {
        let mut sandbox = sandbox;
        while let Some(tell) = self.waiting.pop_front() {
            match tell.send(Ok(sandbox)) {
                Ok(()) => return None,
                Err(unwanted) => sandbox = unwanted.expect("a sandbox was sent"),
            }
        }
        if self.closed || self.warm.len() >= self.plan.size {
            return Some(sandbox);
        }
        self.warm.push_back((sandbox, now));
        None
    }

    /// A creation failed. Where it is the engine that fails, everybody who waits is told.
    pub(super) fn failed(&mut self, now: Instant, jitter: f64) {
        self.starting -= 1;
        self.failures += 1;
        let pause = pause(self.failures, jitter);
        self.retry_at = now + pause;
        if self.failures >= FAILURES {
            for tell in self.waiting.drain(..) {
                let _ = tell.send(Err(Error::Failing { retry_after: pause })); // who left needs no answer
            }
        }
    }

    pub(super) fn is_failing(&self) -> bool {
        self.failures >= FAILURES
    }

    pub(super) fn warm(&self) -> usize {
        self.warm.len()
    }

    /// Every warm one, for a look at it.
    pub(super) fn look<R>(&mut self, mut each: impl FnMut(&mut T) -> R) -> Vec<R> {
        self.warm.iter_mut().map(|(sandbox, _)| each(sandbox)).collect()
    }

    /// Takes out the warm ones that are of no use.
    pub(super) fn sift(&mut self, mut useless: impl FnMut(&mut T) -> bool) -> Vec<T> {
        let mut out = Vec::new();
        for (mut sandbox, since) in std::mem::take(&mut self.warm) {
            match useless(&mut sandbox) {
                true => out.push(sandbox),
                false => self.warm.push_back((sandbox, since)),
            }
        }
        out
    }

    /// The oldest warm one, if it is too old. One at a time, and only while the pool is full: they came about
    /// together, and must not go together.
    pub(super) fn outdated(&mut self, now: Instant) -> Option<T> {
        let whole = self.warm.len() >= self.plan.size || self.is_paused(now);
        let old = self.warm.front().is_some_and(|(_, since)| *since + self.plan.recycle_after <= now);
        if whole && old { self.warm.pop_front().map(|(sandbox, _)| sandbox) } else { None }
    }

    /// When there may be something to do though nothing happens.
    pub(super) fn next_look(&self, now: Instant) -> Instant {
        let aged = self.warm.front().map(|(_, since)| *since + self.plan.recycle_after);
        let retry = Some(self.retry_at).filter(|at| *at > now);
        let soon = [aged.filter(|at| *at > now), retry].into_iter().flatten().min();
        soon.unwrap_or(now + RETRY.1).min(now + RETRY.1)
    }

    /// Makes no more; gives up all that is warm, and who waits is told.
    pub(super) fn close(&mut self) -> Vec<T> {
        self.closed = true;
        self.waiting.clear();
        self.warm.drain(..).map(|(sandbox, _)| sandbox).collect()
    }

    fn is_paused(&self, now: Instant) -> bool {
        self.plan.idle_after.is_some_and(|idle_after| self.last_claim + idle_after <= now)
    }

    fn forget_who_left(&mut self) {
        self.waiting.retain(|tell| !tell.is_closed());
    }
}
