//! Calls that read or set what the kernel keeps for a thread.

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
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

/// Policy, priority and nice value of a thread (`sched_getattr(2)`, Linux 3.14), and the CPUs that it is bound to: those
/// of `sched_getaffinity(2)`, unless that is what it says of `unbound` threads, too.
pub fn scheduling(tid: HostPid, unbound: &[CpuSet]) -> nix::Result<Scheduling> {
    let mut attributes = sched_attr();
    let size = attributes.size;
    // SAFETY: `attributes` is `size` bytes large.
    let result = unsafe { libc::syscall(libc::SYS_sched_getattr, tid.0, &raw mut attributes, size, 0) };
    Errno::result(result)?;
    Ok(Scheduling {
        policy: attributes.sched_policy as i32,
        priority: attributes.sched_priority as i32,
        nice: attributes.sched_nice,
        cpus: bound_to(tid, unbound)?,
    })
}

fn bound_to(tid: HostPid, unbound: &[CpuSet]) -> nix::Result<Vec<u16>> {
    let cpus = sched_getaffinity(Pid::from_raw(tid.0))?;
    if unbound.contains(&cpus) {
        return Ok(Vec::new());
    }
    Ok(numbers(&cpus).map(|cpu| cpu as u16).collect())
}

/// The numbers of the CPUs in a set, in ascending order.
pub fn numbers(cpus: &CpuSet) -> impl Iterator<Item = usize> {
    (0..CpuSet::count()).filter(|&cpu| cpus.is_set(cpu) == Ok(true))
}

/// Lets a thread run on all CPUs of its cgroup, now and when these change.
pub fn unbind(tid: HostPid) -> nix::Result<()> {
    let mut all = CpuSet::new();
    (0..CpuSet::count()).try_for_each(|cpu| all.set(cpu))?;
    sched_setaffinity(Pid::from_raw(tid.0), &all)
}

/// Sets policy, priority, nice value and, if there are any, CPUs of a thread (`sched_setattr(2)`, `sched_setaffinity(2)`).
/// `EINVAL` if its cgroup has none of the CPUs.
pub fn set_scheduling(tid: HostPid, scheduling: &Scheduling) -> nix::Result<()> {
    let mut attributes = sched_attr();
    attributes.sched_policy = scheduling.policy as u32;
    attributes.sched_priority = scheduling.priority as u32;
    attributes.sched_nice = scheduling.nice;
    // SAFETY: `attributes` says its own size and is only read.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, tid.0, &raw const attributes, 0) };
    Errno::result(result)?;
    if scheduling.policy == libc::SCHED_IDLE {
        // sched_setattr takes the nice value with SCHED_OTHER and SCHED_BATCH only (`__setscheduler_params`).
        // SAFETY: setpriority takes three integers.
        Errno::result(unsafe { libc::setpriority(libc::PRIO_PROCESS, tid.0 as u32, scheduling.nice) })?;
    }
    if scheduling.cpus.is_empty() {
        return Ok(());
    }
    let mut cpus = CpuSet::new();
    scheduling.cpus.iter().try_for_each(|&cpu| cpus.set(cpu.into()))?;
    sched_setaffinity(Pid::from_raw(tid.0), &cpus)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_policy_keeps_its_nice_value() {
        for policy in [libc::SCHED_OTHER, libc::SCHED_BATCH, libc::SCHED_IDLE] {
            let set = move || {
                // SAFETY: gettid takes nothing.
                let tid = HostPid(unsafe { libc::gettid() });
                let wanted = Scheduling { policy, priority: 0, nice: 5, cpus: Vec::new() };
                set_scheduling(tid, &wanted).unwrap();
                let all = sched_getaffinity(Pid::from_raw(0)).unwrap();
                assert_eq!(scheduling(tid, &[all]).unwrap(), wanted);
            };
            std::thread::spawn(set).join().unwrap();
        }
    }
}
