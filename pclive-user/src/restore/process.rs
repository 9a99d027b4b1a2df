//! What belongs to a whole process: address-space bounds, limits, signal actions, timers, working directory.

use super::threads::queue_signal;
use super::timers::{self, OutOfReach, TimerIds};
use pclive_sys::script::{Arg, Script};
use pclive_wire::manifest::{MmBounds, Process, ProcessState, SigAction};

/// What the leader must call for the process, apart from descriptors, threads and credentials. `spare_fd` is a descriptor
/// number that is not in use.
pub fn state_script(process: &Process, state: &ProcessState, spare_fd: i32) -> Result<Script, OutOfReach> {
    let mut script = Script::new();
    bounds(&mut script, &process.mm, &process.exe, spare_fd);
    let cwd = script.string(&state.cwd);
    script.call("chdir", libc::SYS_chdir, [cwd.into()]);
    script.call("umask", libc::SYS_umask, [u64::from(state.umask).into()]);
    script.call("personality", libc::SYS_personality, [u64::from(state.personality).into()]);
    if state.child_subreaper {
        let args: [Arg; 2] = [libc::PR_SET_CHILD_SUBREAPER.into(), 1.into()];
        script.call("PR_SET_CHILD_SUBREAPER", libc::SYS_prctl, args);
    }
    for (resource, &(soft, hard)) in state.limits.iter().enumerate() {
        let limit = script.data(&[soft.to_ne_bytes(), hard.to_ne_bytes()].concat());
        let args: [Arg; 4] = [0.into(), (resource as u64).into(), limit.into(), 0.into()];
        script.call(format!("prlimit64 of resource {resource} to {soft}/{hard}"), libc::SYS_prlimit64, args);
    }
    for (index, action) in state.actions.iter().enumerate() {
        sigaction(&mut script, index as i32 + 1, action);
    }
    for info in &state.pending {
        queue_signal(&mut script, libc::SYS_rt_sigqueueinfo, &[process.pid], info);
    }
    for (which, timer) in state.itimers.iter().enumerate() {
        timers::interval(&mut script, which as u64, timer);
    }
    timers::posix(&mut script, &state.timers, TimerIds::here())?;
    Ok(script)
}

/// `PR_SET_MM_MAP` with the executable: everything that used the old one must be unmapped before. The structure holds the
/// descriptor's number, so the executable is moved to a known one.
fn bounds(script: &mut Script, mm: &MmBounds, exe: &[u8], spare_fd: i32) {
    let name = script.string(exe);
    let how: Arg = (libc::O_RDONLY | libc::O_CLOEXEC).into();
    let label = format!("open {}", String::from_utf8_lossy(exe));
    let fd = script.call(label, libc::SYS_openat, [libc::AT_FDCWD.into(), name.into(), how]);
    script.call("dup3", libc::SYS_dup3, [fd.into(), spare_fd.into(), libc::O_CLOEXEC.into()]);
    let auxv = script.data(&mm.auxv);
    let words = [
        mm.start_code,
        mm.end_code,
        mm.start_data,
        mm.end_data,
        mm.start_brk,
        mm.brk,
        mm.start_stack,
        mm.arg_start,
        mm.arg_end,
        mm.env_start,
        mm.env_end,
    ];
    let mut map: Vec<u8> = words.iter().flat_map(|addr| addr.0.to_ne_bytes()).collect();
    map.extend([0; 8]); // pointer to auxv
    map.extend((mm.auxv.len() as u32).to_ne_bytes());
    map.extend(spare_fd.to_ne_bytes());
    let size = map.len() as u64;
    let map = script.data(&map);
    script.pointer(map, words.len() * 8, auxv);
    let args: [Arg; 5] =
        [libc::PR_SET_MM.into(), libc::PR_SET_MM_MAP.into(), map.into(), size.into(), 0.into()];
    script.call("PR_SET_MM_MAP", libc::SYS_prctl, args);
    for fd in [fd.into(), Arg::from(spare_fd)] {
        script.call("close", libc::SYS_close, [fd]);
    }
}

fn sigaction(script: &mut Script, signal: i32, action: &SigAction) {
    if signal == libc::SIGKILL || signal == libc::SIGSTOP {
        return;
    }
    let words = [action.handler, action.flags, action.restorer, action.mask];
    let raw = script.data(&words.map(u64::to_ne_bytes).concat());
    let args: [Arg; 4] = [signal.into(), raw.into(), 0.into(), 8.into()];
    script.call(format!("rt_sigaction of signal {signal}"), libc::SYS_rt_sigaction, args);
}
