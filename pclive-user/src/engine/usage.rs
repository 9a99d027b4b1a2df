//! What pclive itself uses of its host.

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use std::time::Duration;

/// Processor time, user and system, of this process or this thread so far.
pub fn cpu_time(who: UsageWho) -> Duration {
    let usage = getrusage(who).expect("getrusage(2) fails for bad arguments only");
    let us = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Duration::from_micros(us as u64)
}

/// Highest resident set of this process so far, in bytes.
pub fn peak_rss_bytes() -> u64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("getrusage(2) fails for bad arguments only");
    usage.max_rss() as u64 * 1024
}
