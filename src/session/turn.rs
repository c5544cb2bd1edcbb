//! A run's turn: the seat is its own, from the end of the last run to the end of this one.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use tokio::sync::{Notify, OwnedMutexGuard};
use tokio::time::Instant;
use tracing::Instrument;

use super::loss::Loss;
use super::{ATTEMPTS, Done, Error, Place, Seat, Timing, VERDICT_WAIT};
use crate::phase::phase;
use crate::pool;
use crate::runtime::{self, Fate};
use crate::supervisor::{self, Aftermath, ErrorDetail, ErrorKind, Outcome, Report, Run};

/// What an engine held back while it was stopped comes within milliseconds of its next answer; a guess.
const SILENCE: Duration = Duration::from_millis(500);

/// The right to use a session's sandbox. Seat and place are there until it is dropped.
pub(super) struct Turn {
    pub(super) seat: Option<OwnedMutexGuard<Seat>>,
    pub(super) place: Option<Place>,
    pub(super) interrupt: Arc<Notify>,
}

impl Turn {
    pub(super) fn seat(&mut self) -> &mut Seat {
        self.seat.as_mut().expect("only drop takes the seat")
    }

    pub(super) fn place(&self) -> &Place {
        self.place.as_ref().expect("only drop takes the place")
    }

    pub(super) fn supervisor(&mut self) -> Option<&mut supervisor::Supervisor> {
        self.seat().claimed.as_mut().map(|claimed| &mut claimed.held.supervisor)
    }

    /// Hands the run over, and tells since when and with what answer; `None` where the session ended before its code
    /// began, so that it is to begin anew in the next one.
    pub(super) async fn execute(
        &mut self,
        run: &Run<'_>,
    ) -> Result<Option<(Instant, Result<Report, supervisor::Error>)>, Error> {
        let mut attempts = 1;
        loop {
            let reason = if attempts == 1 { "not_recovered" } else { "idle" };
            let new = self.have_sandbox(reason).instrument(phase!("claim")).await?;
            let claimed = Instant::now();
            let interrupt = self.interrupt.clone();
            let Some(supervisor) = self.supervisor() else { return Ok(None) };
            let answer =
                supervisor.run(&Run { interrupt: Some(&interrupt), ..*run }).instrument(phase!("run")).await;
            if attempts == ATTEMPTS || !matches!(answer, Err(supervisor::Error::NotBegun)) {
                return Ok(Some((claimed, answer)));
            }
            // Nothing of it was executed, so it may be: in the same sandbox where that lives, else in a new one.
            attempts += 1;
            if new { self.give_up_sandbox() } else { self.let_go() }
        }
    }

    /// A sandbox that is attached to: the session's own, as long as it is not known to be lost, else a new one; tells
    /// whether it is new. None where the session is over.
    ///
    /// Where the engine does not answer nothing is known, and the session's sandbox stays what it is.
    pub(super) async fn have_sandbox(&mut self, reason: &str) -> Result<bool, Error> {
        let (sessions, session) = (self.place().sessions.clone(), self.place().session.clone());
        if let Some(kept) = &self.seat().kept {
            let attached = sessions.0.pool.attach(kept).await; // it stays in its seat until that is done
            match attached {
                Err(error) if !error.proves_a_loss() => return Err(error.into()),
                Ok(supervisor) => {
                    session.attached(&supervisor);
                    let kept = self.seat().kept.take().expect("nobody else has the seat");
                    self.seat().claimed = Some(kept.attached(supervisor));
                }
                Err(error) => {
                    tracing::warn!(session = %session.key, %error, reason, "a sandbox that nobody talked to was lost");
                    sessions.0.metrics.lost.with_label_values(&[reason]).inc();
                    self.give_up_sandbox();
                    self.seat().lost = true;
                }
            }
        }
        let new = self.seat().claimed.is_none();
        if new && !self.is_over() {
            self.claim().await?;
        }
        Ok(new)
    }

    /// Whether the session is out of the table, or is about to be.
    fn is_over(&mut self) -> bool {
        self.seat().closed || self.place().session.glance().deleted
    }

    /// Has the session's sandbox removed, if it has one.
    fn give_up_sandbox(&mut self) {
        self.place().session.glance().sandbox = None;
        self.seat().empty();
    }

    /// The stream broke; the sandbox may live.
    pub(super) fn let_go(&mut self) {
        self.seat().let_go();
    }

    /// Before an answer: what it acknowledges has to be there after a restart, too.
    pub(super) async fn is_named(&mut self) -> Result<(), Error> {
        let Some(claimed) = self.seat().claimed.as_mut() else { return Ok(()) };
        let named = claimed.is_named().await;
        let pool = &self.place().sessions.0.pool;
        let error = match named {
            Ok(false) => return Ok(()),
            Ok(true) => {
                pool.heard();
                return Ok(());
            }
            Err(error) => error,
        };
        pool.note(&error);
        let session = self.place().session.clone();
        tracing::warn!(session = %session.key, %error, "cannot claim a sandbox");
        self.give_up_sandbox();
        Err(Error::Unavailable(error.into()))
    }

    async fn claim(&mut self) -> Result<(), Error> {
        let (sessions, session) = (self.place().sessions.clone(), self.place().session.clone());
        let claimed = sessions.0.pool.claim(&session.key).await.map_err(|error| match error {
            pool::Error::Closed => Error::Draining,
            pool::Error::Crowded { retry_after } => Error::Crowded { retry_after },
            error => Error::Unavailable(error),
        })?;
        if sessions.0.draining.load(Ordering::SeqCst) {
            return Err(Error::Draining);
        }
        if self.is_over() {
            return Ok(());
        }
        session.glance().sandbox = Some((claimed.held.id.clone(), SystemTime::now(), claimed.since));
        session.attached(&claimed.held.supervisor);
        let seat = self.seat();
        seat.claimed = Some(claimed);
        seat.out_of_memory_kills = 0;
        Ok(())
    }

    /// A sandbox past its lifetime takes no further run, however many wait for it.
    pub(super) fn retire_if_outlived(&mut self) {
        let lifetime = self.place().sessions.0.settings.lifetime_max;
        let since = self.place().session.glance().sandbox.as_ref().map(|(_, _, since)| *since);
        if since.is_some_and(|since| since.elapsed() >= lifetime) {
            self.give_up_sandbox();
            let seat = self.seat.as_mut().expect("only drop takes the seat");
            let place = self.place.as_ref().expect("only drop takes the place");
            place.leave(seat);
            place.sessions.0.ended("lifetime");
        }
    }

    pub(super) async fn conclude(&mut self, report: Report, timing: Timing) -> Done {
        let Report { outcome, aftermath, wall: _ } = report;
        let metrics = self.place().sessions.0.metrics.clone();
        metrics.run_cpu_seconds.inc_by(aftermath.cpu.as_secs_f64());
        let outcome = match outcome {
            Outcome::Result(value) => Ok(value),
            Outcome::Failed(detail) => Err(detail),
            Outcome::Killed => Err(self.who_killed().await),
        };
        if aftermath.kernel_lost {
            metrics.kernels_lost.inc();
        }
        Done { outcome, aftermath, lost: false, timing }
    }

    /// A SIGKILL that was not ours: the engine may have counted it as one for want of memory.
    async fn who_killed(&mut self) -> ErrorDetail {
        let sessions = self.place().sessions.clone();
        let Some(id) = self.seat().claimed.as_ref().map(|claimed| claimed.held.id.clone()) else {
            return ErrorDetail::out_of_memory();
        };
        match sessions.0.fate(&id, Instant::now() + VERDICT_WAIT).await {
            Ok(Fate::Running { out_of_memory_kills: Some(kills) })
                if kills <= self.seat().out_of_memory_kills =>
            {
                ErrorDetail::killed()
            }
            Ok(Fate::Running { out_of_memory_kills: Some(kills) }) => {
                self.seat().out_of_memory_kills = kills;
                ErrorDetail::out_of_memory()
            }
            _ => ErrorDetail::out_of_memory(),
        }
    }

    /// The sandbox is of no more use: removes it, and says what is known of the reason.
    ///
    /// Where that is not for sure, the sandbox stays, and the next run looks.
    pub(super) async fn lose(&mut self, error: supervisor::Error, expected: Instant, timing: Timing) -> Done {
        let (sessions, session) = (self.place().sessions.clone(), self.place().session.clone());
        let deadline = expected.max(Instant::now()) + VERDICT_WAIT;
        let claimed = self.seat().claimed.as_mut().expect("a sandbox was claimed before");
        let id = claimed.held.id.clone();
        let fate = sessions.0.fate_after(&error, &id, deadline).await;
        let error = match hear_out(&mut claimed.held.supervisor, error, &fate).await {
            Ok(report) => return self.conclude(report, timing).await,
            Err(error) => error,
        };
        let deleted = session.glance().deleted;
        let reason = Loss::of(&error, &fate, deleted);
        let name = if reason == Loss::OutOfMemory { "MemoryError" } else { "SandboxLost" };
        let detail = ErrorDetail::new(reason.kind(), name, reason.text());
        let lost = !reason.is_open();
        tracing::warn!(
            session = %session.key, sandbox = %id, reason = reason.label(), %error, ?fate,
            "{}", if lost { "a sandbox was lost" } else { "a sandbox is out of reach" }
        );
        if lost {
            sessions.0.metrics.lost.with_label_values(&[reason.label()]).inc();
            self.give_up_sandbox();
        } else {
            self.let_go(); // it may well live, and the next run looks
        }
        Done {
            outcome: Err(detail),
            aftermath: Aftermath { workspace_files: vec!["total 0".into()], ..Aftermath::default() },
            lost,
            timing,
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let (Some(mut seat), Some(place)) = (self.seat.take(), self.place.take()) else { return };
        place.session.glance().interrupt = None;
        let Some(claimed) = &seat.claimed else {
            // Else there is something to tell at the next run, or the client went away while the sandbox was being
            // taken up: it is there as before.
            if seat.kept.is_none() && !seat.lost {
                place.leave(&mut seat);
            }
            return;
        };
        if claimed.held.supervisor.is_idle() {
            return;
        }
        // The client went away in the middle. Ends by the supervisor's own deadline.
        tokio::spawn(async move {
            let Some(claimed) = seat.claimed.as_mut() else { return };
            let inner = &place.sessions.0;
            match claimed.held.supervisor.cancel().await {
                Ok(report) => seat.miss_kernel(report.as_ref(), inner),
                Err(supervisor::Error::Ended) => seat.let_go(), // the next run looks what became of it
                Err(error) => {
                    let fate = inner.fate(&claimed.held.id, Instant::now() + VERDICT_WAIT).await;
                    match hear_out(&mut claimed.held.supervisor, error, &fate).await {
                        Ok(report) => seat.miss_kernel(Some(&report), inner),
                        Err(error) if Loss::of(&error, &fate, false).is_open() => seat.let_go(),
                        Err(_) => {
                            tracing::warn!(session = %place.session.key, "a sandbox was lost: a run cannot be cancelled");
                            inner.metrics.lost.with_label_values(&[Loss::Unresponsive.label()]).inc();
                            place.session.glance().sandbox = None;
                            seat.empty();
                            seat.lost = true; // which the next answer says
                        }
                    }
                }
            }
            inner.metrics.runs.with_label_values(&[ErrorKind::Cancelled.as_str()]).inc();
        });
    }
}

/// An engine that was stopped keeps a supervisor silent that is well: its report, where it comes now that the engine
/// answers.
async fn hear_out(
    supervisor: &mut supervisor::Supervisor,
    error: supervisor::Error,
    fate: &runtime::Result<Fate>,
) -> Result<Report, supervisor::Error> {
    match (error, fate) {
        (supervisor::Error::Unresponsive, Ok(Fate::Running { .. })) => {
            supervisor.late_report(Instant::now() + SILENCE).await
        }
        (error, _) => Err(error),
    }
}
