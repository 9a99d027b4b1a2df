//! The messages of the control stream, and the first message of every connection.
//!
//! ```text
//!   source                                        destination
//!     │ ── Open::Control ──────────────────────────▶ │  host facts, name of the container
//!     │ ◀──────────────────── Accepted | Rejected ── │  session token
//!     │ ══ Open::Pages ════════════════════════════▶ │  on every page stream
//!   ┌ │ ── Manifest, RoundEnd ─────────────────────▶ │  pages and a barrier on the page streams
//!   └ │ ◀─────────────── Reconciled, RoundApplied ── │  again for every round; the last manifest is final
//!     │ ◀─────────────────────────────────── Ready ── │  built, not running
//!     │ ── Commit ─────────────────────────────────▶ │  the point of no return
//!     │ ◀───────────────────────────────── Running ── │
//!     │ ── Destroyed ──────────────────────────────▶ │
//! ```
//!
//! Until `Commit` the source may send `Abort` and the destination `Failed` at any time. The two directions are two
//! types, so that no side can send what only the other may say. There are no keep-alive messages: a dead host or link
//! is noticed by TCP itself (`TCP_USER_TIMEOUT`, set in `transport::control`), a peer that hangs by the time limit of
//! each step.

use crate::facts::{HostFacts, HostMismatch};
use crate::limits::{MAX_NAME, MAX_PAGE_STREAMS};
use crate::manifest::Manifest;
use crate::page_frame::{PageRun, RunKind};
use crate::phase::Phase;
use crate::units::Round;
use crate::validate::ManifestError;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::fmt;

/// The first message of a connection: what the connection is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Open {
    /// A migration begins.
    Control(Box<Proposal>),
    /// A page stream of a migration that was accepted.
    Pages {
        /// As given in [`Accepted`].
        token: SessionToken,
        /// Number of the stream, from 0.
        index: u16,
    },
}

/// What the source asks of the destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposal {
    /// The container's name at both hosts.
    pub container: String,
    /// When the destination applies the pages it gets.
    pub apply: ApplyMode,
    /// Rounds before this one are kept at the destination and applied from this one on.
    pub restore_from: Round,
    /// Page streams that will follow.
    pub page_streams: u16,
    /// The source host.
    pub facts: HostFacts,
}

/// A proposal that cannot be meant well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum ProposalError {
    /// The name is used as a directory name.
    #[error(
        "container name {0:?} is empty, too long or has characters other than letters, digits and _ + - ."
    )]
    Name(String),
    /// None, or more than allowed.
    #[error("{0} page streams, 1 to {MAX_PAGE_STREAMS} are possible")]
    PageStreams(u16),
}

impl Proposal {
    /// Checks what the destination will use: the name as a directory below its bundles, the number of streams.
    pub fn validate(&self) -> Result<(), ProposalError> {
        let name = &self.container;
        // What runc itself allows for a container id.
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '+' | '-' | '.');
        let short = !name.is_empty() && name.len() <= MAX_NAME;
        if !short || name == "." || name == ".." || !name.chars().all(allowed) {
            return Err(ProposalError::Name(name.chars().take(MAX_NAME).collect()));
        }
        if !(1..=MAX_PAGE_STREAMS).contains(&self.page_streams) {
            return Err(ProposalError::PageStreams(self.page_streams));
        }
        Ok(())
    }
}

/// When the destination applies the pages it receives: all that the modes differ in, seen from there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ApplyMode {
    /// As they arrive (PCLiveG).
    OnArrival,
    /// When a round is complete (PCLive).
    AtRoundEnd,
    /// When everything has arrived (one-shot).
    AtFreeze,
}

/// What a connection must know to belong to a session; given out by the destination, 128 random bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SessionToken(pub [u8; 16]);

impl fmt::Debug for SessionToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionToken(…)")
    }
}

/// From the source to the destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SourceMessage {
    /// What the container looks like now; the pages of its round belong to this layout.
    Manifest(Box<Manifest>),
    /// Everything of a round has been sent.
    RoundEnd(RoundSummary),
    /// The container is the destination's: run it.
    Commit,
    /// The migration is off: remove what was built.
    Abort(AbortReason),
    /// The source's copy is gone.
    Destroyed,
}

/// A message of one direction, checked as a whole when it arrives.
pub trait Message: Serialize + DeserializeOwned + fmt::Debug {
    /// Checks everything that can be checked without knowing what came before.
    fn validate(&self) -> Result<(), ManifestError>;
}

impl Message for SourceMessage {
    fn validate(&self) -> Result<(), ManifestError> {
        match self {
            Self::Manifest(manifest) => manifest.validate(),
            Self::RoundEnd(_) | Self::Commit | Self::Abort(_) | Self::Destroyed => Ok(()),
        }
    }
}

impl Message for DestinationMessage {
    /// Numbers and texts for reports: nothing that the source acts on.
    fn validate(&self) -> Result<(), ManifestError> {
        Ok(())
    }
}

/// What a round consisted of, for the destination to compare with what arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundSummary {
    /// Which round.
    pub round: Round,
    /// Pages sent with all of their contents.
    pub pages: u64,
    /// Pages of which only some blocks were sent, because the others had not changed.
    pub patched_pages: u64,
    /// Pages sent as zero.
    pub zero_pages: u64,
    /// Pages reported as gone.
    pub absent_pages: u64,
}

impl RoundSummary {
    /// A round of which nothing has been sent, or has arrived.
    pub fn none(round: Round) -> Self {
        Self { round, pages: 0, patched_pages: 0, zero_pages: 0, absent_pages: 0 }
    }

    /// Adds a run.
    pub fn count(&mut self, run: &PageRun) {
        let of_its_kind = match run.kind {
            RunKind::Raw => &mut self.pages,
            RunKind::Patch(_) => &mut self.patched_pages,
            RunKind::Zero => &mut self.zero_pages,
            RunKind::Absent => &mut self.absent_pages,
        };
        *of_its_kind += run.range.pages;
    }
}

/// Why the source gave up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum AbortReason {
    /// The operator stopped it.
    #[error("cancelled at the source")]
    Cancelled,
    /// The destination cannot take the container.
    #[error("the hosts do not fit: {}", list(.0))]
    HostMismatch(Vec<HostMismatch>),
    /// The source failed.
    #[error("the source failed: {0}")]
    Failed(Failure),
}

/// From the destination to the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DestinationMessage {
    /// The proposal is taken up.
    Accepted(Accepted),
    /// It is not; nothing was made.
    Rejected(RemoteError),
    /// The skeleton equals the manifest of this round.
    Reconciled {
        /// Which round.
        round: Round,
        /// How long that took.
        duration_us: u64,
    },
    /// All pages of a round are where its policy wants them.
    RoundApplied(RoundApplied),
    /// The container is built and waits for the commit.
    Ready,
    /// The container runs.
    Running(Box<RunningReport>),
    /// Building it failed; what was made has been removed, unless the error says otherwise.
    Failed(RemoteError),
    /// What was built has been removed, as asked by [`SourceMessage::Abort`].
    Removed,
}

/// The destination takes part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// For the page streams.
    pub token: SessionToken,
    /// The destination host.
    pub facts: HostFacts,
}

/// A round at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundApplied {
    /// Which round.
    pub round: Round,
    /// Pages that arrived with contents.
    pub pages: u64,
    /// Time spent on applying pages since the last round, over all streams.
    pub apply_us: u64,
}

/// What the destination measured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunningReport {
    /// From the last byte of the final state to the container running.
    pub restore_us: u64,
    /// The destination's phases, on its clock.
    pub phases: Vec<Phase>,
    /// When the commit arrived, on the destination's clock: see [`crate::phase::ClockJoin`].
    pub commit_received_us: i64,
    /// When this report was sent, on the destination's clock.
    pub sent_us: i64,
    /// Processor time of this migration at the destination.
    pub cpu_us: u64,
    /// Peak resident memory of the destination's pclive.
    pub peak_rss_bytes: u64,
}

/// What went wrong at the destination, as the destination saw it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum RemoteError {
    /// The source's first message cannot be used.
    #[error("proposal refused")]
    Proposal(#[source] ProposalError),
    /// The source speaks another version of the protocol.
    #[error("destination speaks protocol version {ours}, the source {theirs}")]
    #[allow(missing_docs)]
    Version { ours: u16, theirs: u16 },
    /// The hosts differ in something that a running program can notice.
    #[error("the hosts do not fit: {}", list(.0))]
    HostMismatch(Vec<HostMismatch>),
    /// There is no OCI bundle for the container.
    #[error("destination has no bundle for container {container:?}")]
    #[allow(missing_docs)]
    NoBundle { container: String },
    /// The runtime has a container of that name already.
    #[error("destination already has a container {container:?}")]
    #[allow(missing_docs)]
    NameTaken { container: String },
    /// A manifest contradicts itself or the protocol.
    #[error("manifest refused")]
    Manifest(#[source] ManifestError),
    /// The source did what the protocol does not allow in this state.
    #[error("protocol violation: {message} in state {state}")]
    #[allow(missing_docs)]
    Protocol { state: String, message: String },
    /// Pages of a round are missing, or there are too many.
    #[error("round {}: sent {sent:?}, arrived {arrived:?}", sent.round)]
    #[allow(missing_docs)]
    RoundIncomplete { sent: RoundSummary, arrived: RoundSummary },
    /// Something that the destination tried failed.
    #[error("{0}")]
    Failed(Failure),
    /// Something failed, and so did removing what had been made: the destination needs its operator.
    #[error("{error}; and then the clean-up failed: {cleanup}")]
    #[allow(missing_docs)]
    NotCleanedUp { error: Failure, cleanup: Failure },
}

/// An error of the other host, with everything it would have printed there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The error and its causes, outermost first.
    pub chain: Vec<String>,
    /// The system's error number, where one of the causes has it.
    pub errno: Option<i32>,
}

impl Failure {
    /// Takes `error` and its causes.
    pub fn from_error(error: &(dyn std::error::Error + 'static)) -> Self {
        let causes = std::iter::successors(Some(error), |e| e.source());
        let errno = causes
            .clone()
            .filter_map(|e| e.downcast_ref::<std::io::Error>())
            .find_map(std::io::Error::raw_os_error);
        Self { chain: causes.map(ToString::to_string).collect(), errno }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.chain.join(": "))
    }
}

fn list(mismatches: &[HostMismatch]) -> String {
    mismatches.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proposal(container: &str, page_streams: u16) -> Proposal {
        Proposal {
            container: container.into(),
            apply: ApplyMode::OnArrival,
            restore_from: Round(0),
            page_streams,
            facts: HostFacts::default(),
        }
    }

    #[test]
    fn a_container_name_cannot_leave_the_directory_of_bundles() {
        for name in ["redis", "web-1.example", "a+b_c"] {
            assert_eq!(proposal(name, 1).validate(), Ok(()));
        }
        for name in ["", ".", "..", "a/b", "../x", "a\0b", "ä", &"x".repeat(256)] {
            assert!(matches!(proposal(name, 1).validate(), Err(ProposalError::Name(_))), "{name:?}");
        }
    }

    #[test]
    fn the_number_of_streams_is_limited() {
        for (streams, good) in [(0, false), (1, true), (16, true), (17, false), (u16::MAX, false)] {
            assert_eq!(proposal("x", streams).validate().is_ok(), good, "{streams}");
        }
    }

    #[test]
    fn a_failure_keeps_the_whole_chain_and_the_error_number() {
        #[derive(Debug, thiserror::Error)]
        #[error("mount of /proc")]
        struct Mount(#[source] std::io::Error);
        let failure = Failure::from_error(&Mount(std::io::Error::from_raw_os_error(13)));
        assert_eq!(failure.errno, Some(13));
        assert_eq!(failure.to_string(), "mount of /proc: Permission denied (os error 13)");
    }
}
