//! Interval timers, and POSIX timers, which a process knows by ids that the kernel chooses.
//!
//! Since Linux 6.15 a process may name the id (`PR_TIMER_CREATE_RESTORE_IDS`). Before, the kernel counts up from 0 in each
//! process (`posix_timer_add` in kernel/time/posix-timers.c): the ids in between are used up by timers that are deleted at
//! once.

use pclive_sys::prctl::{PR_TIMER_CREATE_RESTORE_IDS, can_name_timers};
use pclive_sys::script::{Arg, DataRef, Script};
use pclive_wire::manifest::{ItimerSpec, PosixTimer};

/// How many ids are used up at most, in all of a process: two system calls each, in the blackout.
const MAX_SKIPPED: i32 = 1024;

/// How timers get the ids that they had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimerIds {
    /// They are named.
    Named,
    /// They are counted.
    Counted,
}

impl TimerIds {
    /// What this kernel offers.
    pub fn here() -> Self {
        if can_name_timers() { Self::Named } else { Self::Counted }
    }
}

/// A timer whose id would take too long to count to.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "timer {0}: this kernel counts timers, and more than {MAX_SKIPPED} ids are to be skipped; Linux 6.15 or newer takes any"
)]
pub struct OutOfReach(i32);

/// Adds the call that arms interval timer `which` (`ITIMER_*`).
pub fn interval(script: &mut Script, which: u64, timer: &ItimerSpec) {
    if let Some(spec) = expiry(script, timer.value_us, timer.interval_us, 1_000_000) {
        script.call("setitimer", libc::SYS_setitimer, [which.into(), spec.into(), 0.into()]);
    }
}

/// Adds what a process that never had a POSIX timer calls to have these.
pub fn posix(script: &mut Script, timers: &[PosixTimer], ids: TimerIds) -> Result<(), OutOfReach> {
    if timers.is_empty() {
        return Ok(());
    }
    match ids {
        TimerIds::Named => {
            name_ids(script, true);
            timers.iter().for_each(|timer| create(script, timer));
            name_ids(script, false);
        }
        TimerIds::Counted => count(script, timers)?,
    }
    timers.iter().for_each(|timer| arm(script, timer));
    Ok(())
}

fn name_ids(script: &mut Script, on: bool) {
    let args: [Arg; 5] =
        [PR_TIMER_CREATE_RESTORE_IDS.into(), i32::from(on).into(), 0.into(), 0.into(), 0.into()];
    script.call("PR_TIMER_CREATE_RESTORE_IDS", libc::SYS_prctl, args);
}

fn count(script: &mut Script, timers: &[PosixTimer]) -> Result<(), OutOfReach> {
    let mut ascending: Vec<&PosixTimer> = timers.iter().collect();
    ascending.sort_by_key(|timer| timer.id);
    let skipped = script.room(size_of::<i32>());
    let mut next = 0;
    for (made, timer) in (0..).zip(ascending) {
        if timer.id - made > MAX_SKIPPED {
            return Err(OutOfReach(timer.id));
        }
        for id in next..timer.id {
            let args: [Arg; 3] = [libc::CLOCK_MONOTONIC.into(), 0.into(), skipped.into()];
            script.call(format!("timer_create of {id}, to be skipped"), libc::SYS_timer_create, args);
            script.call("timer_delete", libc::SYS_timer_delete, [Arg::Word(skipped, 0)]);
        }
        create(script, timer);
        script.call(
            format!("timer_getoverrun of {}", timer.id),
            libc::SYS_timer_getoverrun,
            [timer.id.into()],
        );
        next = timer.id + 1;
    }
    Ok(())
}

fn create(script: &mut Script, timer: &PosixTimer) {
    let mut event = [0u8; 64]; // struct sigevent
    event[..8].copy_from_slice(&timer.value.to_ne_bytes());
    event[8..12].copy_from_slice(&timer.signal.to_ne_bytes());
    event[12..16].copy_from_slice(&timer.notify.to_ne_bytes());
    event[16..20].copy_from_slice(&timer.thread.0.to_ne_bytes());
    let event = script.data(&event);
    let id = script.data(&timer.id.to_ne_bytes());
    let label = format!("timer_create of {}", timer.id);
    script.call(label, libc::SYS_timer_create, [timer.clock.into(), event.into(), id.into()]);
}

fn arm(script: &mut Script, timer: &PosixTimer) {
    if let Some(spec) = expiry(script, timer.value_ns, timer.interval_ns, 1_000_000_000) {
        let args: [Arg; 4] = [timer.id.into(), 0.into(), spec.into(), 0.into()];
        script.call(format!("timer_settime of {}", timer.id), libc::SYS_timer_settime, args);
    }
}

/// The `struct itimerval` or `itimerspec` of a timer, in units of which a second has `per_second`; `None` if it is disarmed.
///
/// A timer that has expired, and whose signal is still pending, shows 0 until the signal is taken: the kernel starts its
/// next interval only then. The signal travels, the next interval begins here.
fn expiry(script: &mut Script, value: u64, interval: u64, per_second: u64) -> Option<DataRef> {
    let due_in = if value > 0 { value } else { interval };
    let words = [interval, due_in].map(|time| [time / per_second, time % per_second]).concat();
    (due_in > 0).then(|| script.data(&words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pclive_sys::mem::ProcessMemory;
    use pclive_sys::ptrace::{Seize, Tracee};
    use pclive_sys::script::{Borrowed, SyscallInstruction};
    use pclive_wire::{HostPid, NsPid, PageRange, VirtAddr};
    use procfs::process::{MMapPath, Process};
    use std::process::{Child, Command};

    fn timer(id: i32) -> PosixTimer {
        let clock = libc::CLOCK_MONOTONIC;
        let (notify, thread) = (libc::SIGEV_NONE, NsPid(0));
        PosixTimer { id, clock, notify, signal: 0, value: 0, thread, value_ns: 1 << 40, interval_ns: 0 }
    }

    /// The ids of a new process's timers after it has run the script.
    fn ids_after(script: &Script) -> Vec<i32> {
        let mut sleeper = Command::new("sleep").arg("1000").spawn().unwrap();
        let ids = std::panic::catch_unwind(|| run(&sleeper, script));
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
        ids.unwrap()
    }

    fn run(child: &Child, script: &Script) -> Vec<i32> {
        let pid = HostPid(child.id() as i32);
        let tracee = Tracee::seize(pid, Seize::Source).unwrap();
        tracee.interrupt().unwrap();
        tracee.wait_trap().unwrap();
        let maps = Process::new(pid.0).unwrap().maps().unwrap();
        let vdso = maps.iter().find(|map| map.pathname == MMapPath::Vdso).unwrap().address;
        let vdso = PageRange::between(VirtAddr(vdso.0), VirtAddr(vdso.1));
        let syscall = SyscallInstruction::find(pid, &ProcessMemory::open(pid).unwrap(), vdso).unwrap();
        let borrowed = Borrowed::new(&tracee, syscall).unwrap();
        borrowed.run(&borrowed.map_arena(1 << 20, None).unwrap(), script).unwrap();
        let timers = std::fs::read_to_string(format!("/proc/{pid}/timers")).unwrap();
        let ids = timers.lines().filter_map(|line| line.strip_prefix("ID: "));
        let mut ids: Vec<i32> = ids.map(|id| id.parse().unwrap()).collect();
        ids.sort();
        ids
    }

    fn script(timers: &[PosixTimer], ids: TimerIds) -> Result<Script, OutOfReach> {
        let mut script = Script::new();
        posix(&mut script, timers, ids).map(|()| script)
    }

    #[test]
    fn timers_have_the_ids_that_they_had() {
        let timers = [9, 0, 4].map(timer);
        for ids in [TimerIds::Counted, TimerIds::Named] {
            if ids == TimerIds::Counted || can_name_timers() {
                assert_eq!(ids_after(&script(&timers, ids).unwrap()), [0, 4, 9], "{ids:?}");
            }
        }
    }

    #[test]
    fn counting_has_an_end() {
        let far = [3, MAX_SKIPPED + 2].map(timer);
        assert_eq!(script(&far, TimerIds::Counted).unwrap_err(), OutOfReach(MAX_SKIPPED + 2));
        script(&far, TimerIds::Named).unwrap();
        script(&[0, MAX_SKIPPED + 1].map(timer), TimerIds::Counted).unwrap();
    }
}
