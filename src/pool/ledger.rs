//! Who gets which sandbox, and when more are to be made: decisions only. They are taken under one short lock;
//! what they call for is done outside of it.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Error;

/// After a failed creation or removal; doubled up to the last with each more.
pub(super) const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// From a claim to the making of another warm one, which would only slow down the run that the claim is for.
pub(super) const REFILL_PAUSE: Duration = Duration::from_millis(30);
/// One failure may be the sandbox's; that many in a row are the engine's, and nobody waits for it any longer.
const FAILURES: u32 = 2;
/// For a client.
pub(super) const SILENCE: &str = "the engine does not answer";
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
    /// What the last of them was.
    trouble: &'static str,
    /// Until then none is made that nobody waits for: after a failure, and after a claim.
    retry_at: Instant,
    refill_at: Instant,
    last_claim: Instant,
    /// The engine does not answer, not even for what is made already: until then nobody is given one, who could not
    /// be told by a later server whose it is. `None` where it answers.
    silent_until: Option<Instant>,
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
            trouble: "",
            retry_at: now,
            refill_at: now,
            last_claim: now,
            silent_until: None,
            mean: None,
            closed: false,
        }
    }

    pub(super) fn claim(&mut self, now: Instant) -> Claim<T> {
        if self.closed {
            return Claim::Refused(Error::Closed);
        }
        self.last_claim = now;
        if let Some(until) = self.silent_until.filter(|until| now < *until) {
            return Claim::Refused(Error::Failing { trouble: SILENCE, retry_after: until - now });
        }
        if let Some((sandbox, _)) = self.warm.pop_front() {
            if self.refill_at <= now {
                self.refill_at = now + REFILL_PAUSE;
            }
            return Claim::Hit(sandbox);
        }
        self.forget_who_left();
        // While the engine fails no more wait than try it.
        if self.is_failing() && self.waiting.len() >= self.plan.starting_max {
            return Claim::Refused(Error::Failing {
                trouble: self.trouble,
                retry_after: self.retry_at.saturating_duration_since(now),
            });
        }
        let expected = self.expected_wait();
        // However slow one is: somebody has to try.
        if expected > self.plan.wait_timeout && self.waiting.len() >= self.plan.starting_max {
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

    /// How many creations are to be begun now: as many as may be for those who wait, one by one for nobody.
    pub(super) fn wanted(&mut self, now: Instant) -> usize {
        if self.closed {
            return 0;
        }
        self.forget_who_left();
        let held_back = now < self.retry_at.max(self.refill_at) || self.is_paused(now);
        let lacks = self.plan.size > self.warm.len() && !held_back;
        let goal = self.waiting.len().max(usize::from(lacks)).min(self.plan.starting_max);
        goal.saturating_sub(self.starting)
    }

    pub(super) fn begun(&mut self) {
        self.starting += 1;
    }

    /// A creation came to its end, which took `took`; gives back what nobody has a use for.
    pub(super) fn made(&mut self, sandbox: T, took: Duration, now: Instant) -> Option<T> {
        self.starting -= 1;
        self.failures = 0;
        self.heard();
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
    pub(super) fn failed(&mut self, now: Instant, jitter: f64, trouble: &'static str) {
        self.starting -= 1;
        self.trouble = trouble;
        self.failures += 1;
        let pause = pause(self.failures, jitter);
        self.retry_at = now + pause;
        if self.failures >= FAILURES {
            for tell in self.waiting.drain(..) {
                let _ = tell.send(Err(Error::Failing { retry_after: pause, trouble })); // who left needs no answer
            }
        }
    }

    /// The engine has not answered: the next claim that is let through tries it again.
    pub(super) fn silent(&mut self, now: Instant, jitter: f64) {
        self.silent_until = Some(now + RETRY.0.mul_f64(1.0 + jitter));
    }

    /// It has.
    pub(super) fn heard(&mut self) {
        self.silent_until = None;
    }

    pub(super) fn is_silent(&self) -> bool {
        self.silent_until.is_some()
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
        let soon = [aged, Some(self.retry_at), Some(self.refill_at)];
        let soon = soon.into_iter().flatten().filter(|at| *at > now).min();
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

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn ledger(size: usize, starting_max: usize) -> (Ledger<u32>, Instant) {
        let now = Instant::now();
        let plan = Plan {
            size,
            starting_max,
            wait_timeout: 60 * SECOND,
            recycle_after: 3600 * SECOND,
            idle_after: None,
        };
        (Ledger::new(plan, now), now)
    }

    fn begin(ledger: &mut Ledger<u32>, now: Instant) -> usize {
        let wanted = ledger.wanted(now);
        (0..wanted).for_each(|_| ledger.begun());
        wanted
    }

    type Told = oneshot::Receiver<Result<u32, Error>>;

    fn wait(ledger: &mut Ledger<u32>, now: Instant) -> (Told, &'static str) {
        match ledger.claim(now) {
            Claim::Wait { told, how } => (told, how),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn whoever_waits_longest_gets_what_is_ready_first_whoever_it_was_begun_for() {
        let (mut ledger, now) = ledger(0, 1);
        let (mut first, how) = wait(&mut ledger, now);
        assert_eq!((begin(&mut ledger, now), how), (1, "miss"));
        let (mut second, how) = wait(&mut ledger, now);
        assert_eq!((begin(&mut ledger, now), how), (0, "miss"), "one at a time");
        assert_eq!(ledger.made(1, SECOND, now), None);
        assert_eq!((first.try_recv().unwrap().unwrap(), second.try_recv().is_ok()), (1, false));
        assert_eq!(begin(&mut ledger, now), 1);
        let (mut third, _) = wait(&mut ledger, now);
        drop(second);
        assert_eq!(ledger.made(2, SECOND, now), None);
        assert_eq!(third.try_recv().unwrap().unwrap(), 2, "the second had left");
        assert_eq!(begin(&mut ledger, now), 0);
    }

    #[test]
    fn a_claim_that_finds_its_creation_under_way_waits_and_misses_nothing() {
        let (mut ledger, now) = ledger(2, 2);
        (0..2).for_each(|_| ledger.begun());
        let (first, second, third) = (wait(&mut ledger, now), wait(&mut ledger, now), wait(&mut ledger, now));
        assert_eq!((first.1, second.1, third.1), ("wait", "wait", "miss"));
    }

    #[test]
    fn the_pool_fills_to_its_size_and_no_further() {
        let (mut ledger, now) = ledger(3, 2);
        for sandbox in 1..=3 {
            assert_eq!(begin(&mut ledger, now), 1, "one by one, since nobody waits");
            assert_eq!(ledger.made(sandbox, SECOND, now), None);
        }
        assert_eq!((begin(&mut ledger, now), ledger.warm()), (0, 3));
        assert_eq!(ledger.place(4, now), Some(4));
        assert!(matches!(ledger.claim(now), Claim::Hit(1)), "the oldest first");
        assert_eq!((begin(&mut ledger, now), ledger.next_look(now)), (0, now + REFILL_PAUSE));
        let later = now + REFILL_PAUSE / 2;
        assert!(matches!(ledger.claim(later), Claim::Hit(2)));
        assert_eq!(begin(&mut ledger, now + REFILL_PAUSE), 1, "who comes later does not put it off");
    }

    #[test]
    fn one_failure_costs_nobody_and_two_in_a_row_are_told_to_all() {
        let (mut ledger, now) = ledger(1, 2);
        let (mut one, mut other) = (wait(&mut ledger, now).0, wait(&mut ledger, now).0);
        assert_eq!(begin(&mut ledger, now), 2);
        ledger.failed(now, 1.0, "x");
        assert!(one.try_recv().is_err() && !ledger.is_failing());
        assert_eq!(begin(&mut ledger, now), 1, "for who waits it is tried again at once");
        ledger.failed(now, 1.0, "x");
        for told in [&mut one, &mut other] {
            let Ok(Err(Error::Failing { retry_after, .. })) = told.try_recv() else {
                panic!("nobody was told")
            };
            assert_eq!(retry_after, 2 * RETRY.0);
        }
        ledger.failed(now, 1.0, "x");
        assert_eq!(begin(&mut ledger, now), 0, "nobody waits, and it backs off");
        assert_eq!(ledger.next_look(now), now + 4 * RETRY.0);
        assert_eq!(begin(&mut ledger, now + 4 * RETRY.0), 1);
    }

    #[test]
    fn while_the_engine_fails_no_more_wait_than_try_it() {
        let (mut ledger, now) = ledger(0, 1);
        for _ in 0..2 {
            ledger.begun();
            ledger.failed(now, 0.0, "x");
        }
        let _trying = wait(&mut ledger, now);
        assert!(matches!(ledger.claim(now), Claim::Refused(Error::Failing { .. })));
        assert_eq!(begin(&mut ledger, now), 1);
        assert_eq!(ledger.made(1, SECOND, now), None);
        assert!(!ledger.is_failing());
    }

    #[test]
    fn pauses_double_up_to_a_bound_and_are_spread() {
        let pauses: Vec<_> = (1..10).map(|failures| pause(failures, 1.0)).collect();
        assert_eq!(pauses[..3], [RETRY.0, 2 * RETRY.0, 4 * RETRY.0]);
        assert_eq!(pauses[8], RETRY.1);
        assert_eq!(pause(u32::MAX, 0.0), RETRY.1 / 2);
    }

    #[test]
    fn a_claim_that_would_wait_too_long_by_the_measured_rate_is_refused_with_that_time() {
        let (mut ledger, now) = ledger(0, 2);
        let mut waiting = vec![wait(&mut ledger, now)];
        assert_eq!(begin(&mut ledger, now), 1);
        ledger.made(1, 10 * SECOND, now); // 10 s each, two at a time: 12 of them in a minute
        while let Claim::Wait { told, how } = ledger.claim(now) {
            waiting.push((told, how));
        }
        assert_eq!(waiting.len() - 1, 12);
        let Claim::Refused(Error::Crowded { retry_after }) = ledger.claim(now) else { panic!("it waits") };
        assert_eq!(retry_after, 70 * SECOND);
    }

    #[test]
    fn an_old_one_is_replaced_one_at_a_time_while_the_pool_is_full() {
        let (mut ledger, now) = ledger(2, 2);
        begin(&mut ledger, now);
        ledger.made(1, SECOND, now);
        begin(&mut ledger, now);
        assert_eq!(ledger.outdated(now + 3600 * SECOND), None, "not full yet");
        ledger.made(2, SECOND, now + SECOND);
        assert_eq!(ledger.outdated(now + 3599 * SECOND), None);
        let later = now + 3602 * SECOND;
        assert_eq!((ledger.outdated(later), ledger.outdated(later)), (Some(1), None));
        assert_eq!(begin(&mut ledger, later), 1);
        ledger.made(3, SECOND, later);
        assert_eq!((ledger.outdated(later), ledger.warm()), (Some(2), 1));
    }

    #[test]
    fn a_paused_pool_makes_none_until_somebody_comes() {
        let (mut ledger, now) = ledger(1, 1);
        ledger.plan.idle_after = Some(10 * SECOND);
        let idle = now + 10 * SECOND;
        assert_eq!(ledger.wanted(idle), 0);
        let _waiting = wait(&mut ledger, idle);
        assert_eq!(begin(&mut ledger, idle), 1);
        ledger.made(1, SECOND, idle);
        assert_eq!(ledger.wanted(idle), 1, "and it is filled again");
    }

    #[test]
    fn a_closed_one_gives_up_what_it_has_and_takes_nothing() {
        let (mut ledger, now) = ledger(2, 2);
        begin(&mut ledger, now);
        ledger.made(1, SECOND, now);
        begin(&mut ledger, now);
        assert_eq!(ledger.close(), [1]);
        assert_eq!((ledger.made(2, SECOND, now), ledger.wanted(now)), (Some(2), 0));
        assert!(matches!(ledger.claim(now), Claim::Refused(Error::Closed)));
    }
}
