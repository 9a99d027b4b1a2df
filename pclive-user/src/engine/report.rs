//! What a migration reports: printed by `pclive migrate --json`, read by benchmarks.

use pclive_wire::phase::Phase;
use serde::{Deserialize, Serialize};

/// The report of one migration.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// `one-shot`, `pclive` or `pclive-g`.
    pub mode: String,
    /// Tier of the tracker that was used.
    pub tracker: String,
    /// The container.
    pub container: String,
    /// One entry for each round; the last is the one after the freeze.
    pub rounds: Vec<RoundReport>,
    /// What eBPF saw during the rounds; zeros in the tier that only scans.
    pub observed: Observed,
    /// TCP sockets whose options had been read before the freeze, and had not changed in it: where eBPF notices `setsockopt(2)`.
    pub sockets_known: u64,
    /// Mappings that were new or had changed at the freeze, and whose flags eBPF told, so that `smaps` was not read.
    pub mappings_told: u64,
    /// Those for which `smaps` was read in the blackout, as eBPF could not tell the flags of all.
    pub mappings_read: u64,
    /// Pages that were zero and travelled without contents.
    pub zero_pages: u64,
    /// Bytes sent on the page streams.
    pub bytes_sent: u64,
    /// System calls that took them.
    pub sends: u64,
    /// Zero-copy sends.
    pub zerocopy: ZerocopyReport,
    /// From the first thread stopped at the source to the container running at the destination.
    pub blackout_us: u64,
    /// At the destination: from the last byte of the final state received to the container running.
    pub restore_us: u64,
    /// From the begin of the migration to the source's copy being gone.
    pub total_us: u64,
    /// For how long processes were stopped to attach the tracking, together.
    pub attach_stop_us: u64,
    /// Phases of both sides on the source's clock, sorted by begin.
    pub phases: Vec<Phase>,
    /// How exactly the destination's phases are placed on the source's clock.
    pub clock_uncertainty_us: i64,
    /// Processor time of pclive at the source.
    pub source_cpu_us: u64,
    /// Processor time of this migration at the destination.
    pub destination_cpu_us: u64,
    /// Peak resident memory of pclive at the destination.
    pub destination_peak_rss_bytes: u64,
    /// `running`: the container runs at the destination; `failed`: at the source; `unknown`.
    pub result: String,
    /// Why it failed.
    pub error: Option<String>,
}

/// One round.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct RoundReport {
    /// Pages sent with all of their contents.
    pub pages: u64,
    /// Pages of which only the blocks were sent that had changed.
    pub patched_pages: u64,
    /// Bytes of the page streams.
    pub bytes: u64,
    /// Pages that the tracker found dirty.
    pub dirty_pages: u64,
    /// From its begin to the destination having applied it.
    pub duration_us: u64,
    /// For how long the source's thread waited for a processor meanwhile, while it stood back behind others.
    pub waited_us: u64,
}

/// How zero copy did.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct ZerocopyReport {
    /// Sends with `MSG_ZEROCOPY`.
    pub sends: u64,
    /// Of these, sends that the kernel copied all the same.
    pub copied: u64,
}

/// What the tracker's eBPF programs saw.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Observed {
    /// Write faults.
    pub writes: u64,
    /// Changes of the process tree.
    pub changes: u64,
    /// Events that did not fit the buffers. The dirty sets come from scans, so no page is lost with them.
    pub lost: u64,
    /// Pages written at least once.
    pub working_set_pages: u64,
}
