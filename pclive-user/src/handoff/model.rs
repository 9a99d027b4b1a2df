//! Both machines with a connection between them: every interleaving of one migration, with every fault at every step.
//!
//! A world is the two machines, the messages on their way, and what really runs where. From each world the search takes
//! every step that an engine, the network or the operator could take. It finds all worlds there are, and checks the
//! module's promise in each.

use super::*;
use pclive_wire::control::{DestinationMessage, SourceMessage};
use std::collections::{HashSet, VecDeque};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AtSource {
    Running,
    Frozen,
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AtDestination {
    Nothing,
    Built,
    /// Being set running: it may already do things that the world sees.
    Resuming,
    Running,
}

#[derive(Clone, Debug)]
struct World {
    source: Source,
    destination: Destination,
    to_destination: VecDeque<DestinationEvent>,
    to_source: VecDeque<SourceEvent>,
    connected: bool,
    at_source: AtSource,
    at_destination: AtDestination,
}

fn failure() -> Failure {
    Failure { chain: vec!["fault".into()], errno: None }
}

fn remote() -> RemoteError {
    RemoteError::Failed(failure())
}

impl World {
    fn begin() -> Self {
        Self {
            source: Source::default(),
            destination: Destination::default(),
            to_destination: VecDeque::new(),
            to_source: VecDeque::new(),
            connected: true,
            at_source: AtSource::Running,
            at_destination: AtDestination::Nothing,
        }
    }

    fn source_step(mut self, event: SourceEvent, message: Option<DestinationEvent>) -> Self {
        for action in self.source.on(event) {
            match action {
                SourceAction::Resume => {
                    assert_eq!(self.at_source, AtSource::Frozen, "resumed: {self:?}");
                    self.at_source = AtSource::Running;
                }
                SourceAction::Detach => {}
                SourceAction::Send(message) => self.tell_destination((&message).into()),
                SourceAction::Destroy => self.at_source = AtSource::Gone,
            }
        }
        if let Some(message) = message {
            self.tell_destination(message);
        }
        self
    }

    fn destination_step(mut self, event: DestinationEvent, message: Option<SourceEvent>) -> Self {
        for action in self.destination.on(event) {
            match action {
                DestinationAction::Run => self.at_destination = AtDestination::Resuming,
                DestinationAction::Remove => {}
                DestinationAction::Send(message) => self.tell_source((&message).into()),
            }
        }
        if let Some(message) = message {
            self.tell_source(message);
        }
        self
    }

    fn tell_destination(&mut self, message: DestinationEvent) {
        if self.connected {
            self.to_destination.push_back(message);
        }
    }

    fn tell_source(&mut self, message: SourceEvent) {
        if self.connected {
            self.to_source.push_back(message);
        }
    }

    /// Every world that can come next.
    fn successors(&self) -> Vec<Self> {
        [self.network(), self.source_engine(), self.destination_engine()].concat()
    }

    fn network(&self) -> Vec<Self> {
        let mut next = Vec::new();
        let mut world = self.clone();
        if let Some(event) = world.to_destination.pop_front() {
            next.push(world.destination_step(event, None));
        }
        let mut world = self.clone();
        if let Some(event) = world.to_source.pop_front() {
            next.push(world.source_step(event, None));
        }
        if self.connected {
            // What is on its way is lost; that it arrives before the cut is another path.
            let mut cut = self.clone();
            cut.connected = false;
            cut.to_destination.clear();
            cut.to_source.clear();
            next.push(cut);
        }
        next
    }

    fn source_engine(&self) -> Vec<Self> {
        if self.source.outcome().is_some() {
            return Vec::new();
        }
        let step = |event, message| self.clone().source_step(event, message);
        let mut next = vec![step(SourceEvent::Failed(failure()), None), step(SourceEvent::Cancelled, None)];
        if !self.connected {
            next.push(step(SourceEvent::Lost(failure()), None));
        }
        match self.source.state() {
            SourceState::Rounds(p) | SourceState::Frozen(p) => {
                let frozen = matches!(self.source.state(), SourceState::Frozen(_));
                // At most two rounds, before the freeze or after it, and then the last manifest.
                for last in [false, true] {
                    let possible = if last { frozen && p.sent == p.manifests } else { p.manifests < 2 };
                    if possible && !p.last {
                        let round = Round(p.manifests);
                        let message = DestinationEvent::Manifest { round, last };
                        next.push(step(SourceEvent::ManifestSent { round, last }, Some(message)));
                    }
                }
                if frozen && !p.last {
                    let mut world = step(SourceEvent::Thawed, None);
                    world.at_source = AtSource::Running;
                    next.push(world);
                }
                if p.sent < p.manifests && !p.last {
                    let round = Round(p.sent);
                    next.push(step(SourceEvent::RoundSent(round), Some(DestinationEvent::RoundEnd(round))));
                }
                if !frozen {
                    let mut world = step(SourceEvent::Freeze, None);
                    world.at_source = AtSource::Frozen;
                    next.push(world);
                }
            }
            SourceState::Ready => next.push(step(SourceEvent::Commit, None)),
            SourceState::Destroying => next.push(step(SourceEvent::Destroyed, None)),
            _ => {}
        }
        next
    }

    fn destination_engine(&self) -> Vec<Self> {
        if self.destination.is_over() {
            return Vec::new();
        }
        let step = |event, message| self.clone().destination_step(event, message);
        let mut next = vec![step(DestinationEvent::Failed(remote()), None)];
        if !self.connected {
            next.push(step(DestinationEvent::Lost(failure()), None));
        }
        let with = |at, mut world: Self| {
            world.at_destination = at;
            world
        };
        match self.destination.state() {
            DestinationState::Proposed => {
                let prepared = step(DestinationEvent::Prepared, Some(SourceEvent::Accepted));
                next.push(with(AtDestination::Built, prepared));
                next.push(step(DestinationEvent::Refused(remote()), None));
            }
            DestinationState::Building(p) => {
                let applied = Round(p.applied);
                if p.applied < p.sent {
                    let message = SourceEvent::RoundApplied(applied);
                    next.push(step(DestinationEvent::RoundApplied(applied), Some(message)));
                }
                if p.complete() {
                    next.push(step(DestinationEvent::Built, None));
                }
            }
            DestinationState::Resuming => {
                let running = step(DestinationEvent::Running, Some(SourceEvent::Running));
                next.push(with(AtDestination::Running, running));
            }
            DestinationState::Removing(_) => {
                next.push(with(AtDestination::Nothing, step(DestinationEvent::Removed, None)));
            }
            _ => {}
        }
        next
    }

    fn check(&self) {
        let may_run_there = matches!(self.at_destination, AtDestination::Resuming | AtDestination::Running);
        assert!(!(self.at_source == AtSource::Running && may_run_there), "two copies run: {self:?}");
        if self.at_source == AtSource::Gone {
            assert_eq!(self.at_destination, AtDestination::Running, "the container is lost: {self:?}");
        }
    }

    /// Both sides are through.
    fn check_end(&self) {
        let outcome = self.source.outcome();
        assert!(outcome.is_some() && self.destination.is_over(), "stuck: {self:?}");
        match (outcome, self.at_source) {
            (Some(Outcome::Moved { .. }), AtSource::Gone) => {}
            (Some(Outcome::Stayed { remains, .. }), AtSource::Running) => {
                let clean = matches!(self.at_destination, AtDestination::Nothing);
                assert!(clean || remains != Remains::Nothing, "something is left: {self:?}");
            }
            (Some(Outcome::Unknown(_)), AtSource::Frozen) => {}
            _ => panic!("the outcome is not what happened: {self:?}"),
        }
    }
}

#[test]
fn never_two_copies_and_none_lost_in_every_interleaving_with_every_fault() {
    let mut seen = HashSet::new();
    let mut open = vec![World::begin()];
    let mut ends = [0; 3];
    while let Some(world) = open.pop() {
        if !seen.insert(format!("{world:?}")) {
            continue;
        }
        world.check();
        let next = world.successors();
        let idle = world.source.outcome().is_some() && world.destination.is_over();
        if next.is_empty() || idle {
            world.check_end();
            match world.source.outcome() {
                Some(Outcome::Moved { .. }) => ends[0] += 1,
                Some(Outcome::Stayed { .. }) => ends[1] += 1,
                _ => ends[2] += 1,
            }
        }
        open.extend(next);
    }
    assert!(ends.iter().all(|&count| count > 0), "some end was never reached: {ends:?}");
    assert!(seen.len() > 1000, "{} worlds are too few for this to have searched", seen.len());
    println!("{} worlds; moved, stayed, unknown: {ends:?}", seen.len());
}

/// A message type that an engine sends by itself must be one that the machine expects.
#[test]
fn messages_become_the_events_of_the_same_name() {
    assert_eq!(SourceEvent::from(&DestinationMessage::Ready), SourceEvent::PeerReady);
    assert_eq!(DestinationEvent::from(&SourceMessage::Commit), DestinationEvent::Commit);
}
