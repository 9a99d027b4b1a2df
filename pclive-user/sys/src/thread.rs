//! Calls that read or set what the kernel keeps for a thread.

use nix::errno::Errno;
use pclive_wire::manifest::Scheduling;
use pclive_wire::{HostPid, VirtAddr};

/// Head and length of a thread's robust futex list (`get_robust_list(2)`).
pub fn robust_list(tid: HostPid) -> nix::Result<(VirtAddr, u64)> {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: both pointers are to live words of the size that the call writes.
    let result = unsafe { libc::syscall(libc::SYS_get_robust_list, tid.0, &raw mut head, &raw mut len) };
    Errno::result(result)?;
    Ok((VirtAddr(head), len))
}

/// Policy, priority and nice value of a thread (`sched_getattr(2)`, Linux 3.14).
pub fn scheduling(tid: HostPid) -> nix::Result<Scheduling> {
    let mut attributes = sched_attr();
    let size = attributes.size;
    // SAFETY: `attributes` is `size` bytes large.
    let result = unsafe { libc::syscall(libc::SYS_sched_getattr, tid.0, &raw mut attributes, size, 0) };
    Errno::result(result)?;
    Ok(Scheduling {
        policy: attributes.sched_policy as i32,
        priority: attributes.sched_priority as i32,
        nice: attributes.sched_nice,
    })
}

/// Sets policy, priority and nice value of a thread (`sched_setattr(2)`).
pub fn set_scheduling(tid: HostPid, scheduling: &Scheduling) -> nix::Result<()> {
    let mut attributes = sched_attr();
    attributes.sched_policy = scheduling.policy as u32;
    attributes.sched_priority = scheduling.priority as u32;
    attributes.sched_nice = scheduling.nice;
    // SAFETY: `attributes` says its own size and is only read.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, tid.0, &raw const attributes, 0) };
    Errno::result(result).map(drop)
}

fn sched_attr() -> libc::sched_attr {
    libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: 0,
        sched_flags: 0,
        sched_nice: 0,
        sched_priority: 0,
        sched_runtime: 0,
        sched_deadline: 0,
        sched_period: 0,
    }
}
