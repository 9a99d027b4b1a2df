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

/// Highest resident set of this process so far, in bytes; 0 if the kernel does not tell. Not `ru_maxrss`, which begins
/// with that of whoever executed this program.
pub fn peak_rss_bytes() -> u64 {
    let status = procfs::process::Process::myself().and_then(|me| me.status());
    status.ok().and_then(|status| status.vmhwm).unwrap_or_default() * 1024
}
