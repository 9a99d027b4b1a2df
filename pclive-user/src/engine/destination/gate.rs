//! The page streams at the destination, and what keeps them in step with the skeleton.
//!
//! A stream's thread may place pages of a round only when the skeleton has that round's mappings: it waits at the gate.
//! A round is complete when every stream has brought its barrier. Pages that are to be applied later wait in one backlog
//! for all streams, in the order of their arrival.

use crate::engine::background::Background;
use crate::policy::mode::{applies_on_arrival, backlog_is_due};
use crate::restore::skeleton::SharedPlacements;
use crate::transport::{Batch, Cancellation, PageEvent, PageReceiver};
use pclive_wire::control::{ApplyMode, RoundSummary};
use pclive_wire::page_frame::RunKind;
use pclive_wire::{NsPid, PageRange, Round};
use std::collections::{BTreeSet, HashMap};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Why pages could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum PageError {
    /// The stream failed.
    #[error(transparent)]
    Transport(#[from] crate::transport::Error),
    /// A page could not be placed.
    #[error("cannot place pages of process {pid}")]
    Place {
        /// Whose, as the container numbers it.
        pid: NsPid,
        /// Why.
        source: pclive_sys::Error,
    },
    /// A round did not become complete in time.
    #[error("the pages of round {0} did not arrive within {1:?}")]
    Late(Round, Duration),
    /// A stream's thread has stopped because of an earlier error, or because the migration is over.
    #[error("the page streams are closed")]
    Closed,
}

impl PageError {
    /// Whether the source has gone, or cannot be reached: the control stream tells that, too, and why.
    fn is_disconnection(&self) -> bool {
        use crate::transport::Error;
        matches!(self, Self::Transport(Error::Closed(_) | Error::Socket { .. }))
    }
}

/// What the streams of one migration share.
#[derive(Debug)]
pub struct Gate {
    apply: ApplyMode,
    restore_from: Round,
    placements: SharedPlacements,
    state: Mutex<State>,
    changed: Condvar,
    /// Cancelled when a stream fails, unless the source has gone.
    failed: Cancellation,
}

#[derive(Debug, Default)]
struct State {
    /// Rounds before this one may be placed.
    open_below: Round,
    /// Streams that have brought the barrier of a round.
    barriers: HashMap<Round, usize>,
    arrived: HashMap<Round, RoundSummary>,
    backlog: Vec<Batch>,
    /// Pages that have vanished at the source, and are yet to be dropped here.
    absent: HashMap<(Round, NsPid), Vec<PageRange>>,
    apply_time: Duration,
    /// How far placing steps back behind other work now.
    nice: u8,
    closed: bool,
    failure: Option<PageError>,
}

impl Gate {
    /// A gate that is closed for every round. A failure here cancels `failed`: whoever waits for the source's next message
    /// would wait for long, because the source waits for its pages to be taken.
    pub fn new(
        apply: ApplyMode,
        restore_from: Round,
        placements: SharedPlacements,
        failed: Cancellation,
    ) -> Self {
        Self { apply, restore_from, placements, state: Mutex::default(), changed: Condvar::new(), failed }
    }

    /// Takes everything that a stream brings, until it is closed. Failures are kept for [`Gate::wait_for_round`] and
    /// [`Gate::failure`].
    pub fn run(&self, mut stream: PageReceiver) {
        let (mut nice, mut background) = (0, None);
        loop {
            let event = stream.recv();
            let wanted = self.lock().nice;
            if std::mem::replace(&mut nice, wanted) != wanted {
                drop(background.take());
                background = Background::enter(wanted);
            }
            let result = event.map_err(PageError::from).and_then(|event| match event {
                PageEvent::Batch(batch) => self.take(batch),
                PageEvent::Barrier(round) => {
                    *self.lock().barriers.entry(round).or_default() += 1;
                    self.changed.notify_all();
                    Ok(())
                }
            });
            if let Err(error) = result {
                return self.fail(error);
            }
            background.iter_mut().for_each(Background::give_way);
        }
    }

    fn fail(&self, error: PageError) {
        let mut state = self.lock();
        if !state.closed {
            if !error.is_disconnection() {
                self.failed.cancel();
            }
            state.failure = Some(error);
            state.closed = true;
        }
        self.changed.notify_all();
    }

    /// Why a stream has failed, once.
    pub fn failure(&self) -> Option<PageError> {
        self.lock().failure.take()
    }

    /// Lets the pages of `round` in, to be placed as far behind other work as `nice` says. What waits for processes that
    /// have ended goes: another one may get the same number.
    pub fn open(&self, round: Round, nice: u8) {
        let placements = self.placements.read().expect("no thread panics while it places pages");
        let mut state = self.lock();
        state.backlog.retain(|batch| placements.contains_key(&batch.process));
        state.absent.retain(|(_, pid), _| placements.contains_key(pid));
        state.open_below = Round(round.0 + 1);
        state.nice = nice;
        drop(state);
        self.changed.notify_all();
    }

    /// Ends every wait: the migration is over.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Waits until `streams` streams have brought everything of `round`; returns what arrived.
    pub fn wait_for_round(
        &self,
        round: Round,
        streams: usize,
        limit: Duration,
    ) -> Result<RoundSummary, PageError> {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        loop {
            if let Some(failure) = state.failure.take() {
                return Err(failure);
            }
            if state.barriers.get(&round) == Some(&streams) {
                state.barriers.remove(&round);
                return Ok(state.arrived.remove(&round).unwrap_or(RoundSummary::none(round)));
            }
            if state.closed {
                return Err(PageError::Closed);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(PageError::Late(round, limit));
            }
            state = self.changed.wait_timeout(state, left).expect("no thread panics with the lock").0;
        }
    }

    /// Places the backlog, if the policy says that its time has come with the end of `round`, and has `drop_pages` drop
    /// what vanished at the source: round by round, because a page that vanished may be back in a later one.
    pub fn settle<E: From<PageError>>(
        &self,
        round: Round,
        last: bool,
        mut drop_pages: impl FnMut(NsPid, &[PageRange]) -> Result<(), E>,
    ) -> Result<(), E> {
        if !backlog_is_due(self.apply, self.restore_from, round, last) {
            return Ok(());
        }
        let mut state = self.lock();
        let (backlog, absent) = (std::mem::take(&mut state.backlog), std::mem::take(&mut state.absent));
        drop(state);
        let rounds: BTreeSet<Round> =
            backlog.iter().map(|batch| batch.round).chain(absent.keys().map(|&(round, _)| round)).collect();
        for round in rounds {
            for batch in backlog.iter().filter(|batch| batch.round == round) {
                self.place(batch)?;
            }
            for ((_, pid), ranges) in absent.iter().filter(|((of, _), _)| *of == round) {
                drop_pages(*pid, ranges)?;
            }
        }
        Ok(())
    }

    /// Time spent on placing pages since the last call, over all streams.
    pub fn take_apply_time(&self) -> Duration {
        std::mem::take(&mut self.lock().apply_time)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics with the lock")
    }

    fn take(&self, batch: Batch) -> Result<(), PageError> {
        let round = batch.round;
        let mut state = self.lock();
        while state.open_below <= round && !state.closed {
            state = self.changed.wait(state).expect("no thread panics with the lock");
        }
        if state.closed {
            return Err(PageError::Closed);
        }
        let arrived = state.arrived.entry(round).or_insert(RoundSummary::none(round));
        for run in batch.runs() {
            arrived.count(run);
        }
        for run in batch.runs().iter().filter(|run| run.kind == RunKind::Absent) {
            state.absent.entry((round, batch.process)).or_default().push(run.range);
        }
        drop(state);
        if applies_on_arrival(self.apply, self.restore_from, round) {
            return self.place(&batch);
        }
        let kept = batch.keep()?;
        self.lock().backlog.push(kept);
        Ok(())
    }

    fn place(&self, batch: &Batch) -> Result<(), PageError> {
        let start = Instant::now();
        let pid = batch.process;
        let placements = self.placements.read().expect("no thread panics while it places pages");
        // A process that ended before its pages were due.
        let Some(placement) = placements.get(&pid) else { return Ok(()) };
        for (run, contents) in batch.pieces() {
            let placed = match run.kind {
                RunKind::Raw => placement.place(run.range.start, contents),
                RunKind::Patch(mask) => placement.patch(run.range, mask, contents),
                RunKind::Zero => placement.place_zeros(run.range),
                RunKind::Absent => Ok(()),
            };
            placed.map_err(|source| PageError::Place { pid, source })?;
        }
        drop(placements);
        self.lock().apply_time += start.elapsed();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::restore::memory::tests::placement;
    use pclive_wire::PAGE_SIZE;
    use pclive_wire::page_frame::{BLOCK_LEN, BlockMask};

    #[test]
    fn pages_that_wait_for_a_process_go_when_it_does() {
        const PID: NsPid = NsPid(7);
        let page = PAGE_SIZE as usize;
        let (map, memory, start) = placement();
        let placements = SharedPlacements::default();
        placements.write().unwrap().insert(PID, memory);
        let failed = Cancellation::new().unwrap();
        let gate = Gate::new(ApplyMode::OnArrival, Round(3), placements.clone(), failed);
        gate.open(Round(0), 0);
        gate.take(Batch::of_pages(PID, Round(0), start, &vec![1; 2 * page])).unwrap();
        let memory = placements.write().unwrap().remove(&PID).unwrap();
        gate.open(Round(1), 0);
        // Another process has its number.
        placements.write().unwrap().insert(PID, memory);
        gate.open(Round(2), 0);
        gate.take(Batch::of_pages(PID, Round(2), start, &vec![2; page])).unwrap();
        gate.settle::<PageError>(Round(2), false, |_, _| Ok(())).unwrap();
        assert!(map[..page].iter().all(|&byte| byte == 2));
        let second = PageRange::new(start.offset(PAGE_SIZE), 1);
        let patched =
            placements.read().unwrap()[&PID].patch(second, BlockMask::new(1).unwrap(), &[3; BLOCK_LEN]);
        patched.expect_err("nothing was placed there");
    }

    #[test]
    fn a_failure_ends_waiting_for_the_source_but_its_going_does_not() {
        let peer = "127.0.0.1:1".parse().unwrap();
        let place = || PageError::Late(Round(0), Duration::ZERO);
        let gone = || PageError::Transport(crate::transport::Error::Closed(peer));
        for (error, interrupts) in [(place(), true), (gone(), false)] {
            let failed = Cancellation::new().unwrap();
            let gate = Gate::new(ApplyMode::OnArrival, Round(0), SharedPlacements::default(), failed.clone());
            gate.fail(error);
            gate.fail(PageError::Closed);
            assert_eq!(failed.is_cancelled(), interrupts);
            assert!(!matches!(gate.failure(), Some(PageError::Closed) | None), "the first one counts");
        }
    }
}
