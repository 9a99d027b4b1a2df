//! What `prctl(2)` tells about this kernel.

/// Has `timer_create(2)` take the id of a timer from its argument, or not, or tells which (Linux 6.15).
pub const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
const PR_TIMER_CREATE_RESTORE_IDS_GET: i32 = 2;

/// Whether the ids of timers can be named here ([`PR_TIMER_CREATE_RESTORE_IDS`]).
pub fn can_name_timers() -> bool {
    // SAFETY: this prctl takes integers and only tells the caller's own setting.
    unsafe { libc::prctl(PR_TIMER_CREATE_RESTORE_IDS, PR_TIMER_CREATE_RESTORE_IDS_GET, 0, 0, 0) >= 0 }
}
