//! Threads of a parked process: making them with their final ids, and giving them the source's state.

use pclive_sys::ptrace::Tracee;
use pclive_sys::script::{Arg, Script};
use pclive_wire::NsPid;
use pclive_wire::manifest::{Credentials, ThreadState};

/// Highest capability number that this code knows to drop; the kernel refuses higher ones with `EINVAL`.
const CAPABILITIES: u64 = 41;
/// `_LINUX_CAPABILITY_VERSION_3`.
const CAPABILITY_VERSION: u32 = 0x2008_0522;
/// `SECBIT_NO_SETUID_FIXUP`: changing ids leaves capabilities alone.
const SECBIT_NO_SETUID_FIXUP: u64 = 1 << 2;

/// `struct clone_args` up to `set_tid_size` (Linux 5.5), as words.
const CLONE_ARGS_WORDS: usize = 11;

/// Appends a `clone3(2)` that makes a process or thread with id `id` in the container's pid namespace.
pub fn clone_with_id(script: &mut Script, flags: i32, exit_signal: i32, id: NsPid) {
    let set_tid = script.data(&id.0.to_ne_bytes());
    let mut words = [0u64; CLONE_ARGS_WORDS];
    words[0] = flags as u64;
    words[4] = exit_signal as u64;
    words[9] = 1; // one id: that of the innermost namespace
    let args = script.data(&words.map(u64::to_ne_bytes).concat());
    script.pointer(args, 8 * 8, set_tid);
    let size = (CLONE_ARGS_WORDS * 8) as u64;
    script.call(format!("clone3 of {id}"), libc::SYS_clone3, [args.into(), size.into()]);
}

/// Flags of a thread.
pub const THREAD_FLAGS: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM;

/// What the thread itself must call to become the source's; its credentials come last, because they take away the right
/// to the rest.
pub fn state_script(tid: NsPid, tgid: NsPid, state: &ThreadState, dumpable: u32) -> Script {
    let mut script = Script::new();
    let (head, len) = state.robust_list;
    script.call("set_robust_list", libc::SYS_set_robust_list, [head.into(), len.into()]);
    script.call("set_tid_address", libc::SYS_set_tid_address, [state.clear_child_tid.into()]);
    let mut stack = [0u8; 24];
    stack[..8].copy_from_slice(&state.altstack.sp.0.to_ne_bytes());
    stack[8..12].copy_from_slice(&state.altstack.flags.to_ne_bytes());
    stack[16..].copy_from_slice(&state.altstack.size.to_ne_bytes());
    let stack = script.data(&stack);
    script.call("sigaltstack", libc::SYS_sigaltstack, [stack.into(), 0.into()]);
    let comm = script.string(&state.comm);
    prctl(&mut script, "PR_SET_NAME", libc::PR_SET_NAME, comm.into());
    prctl(&mut script, "PR_SET_TIMERSLACK", libc::PR_SET_TIMERSLACK, state.timer_slack_ns.into());
    if let Some(rseq) = state.rseq {
        let size = u64::from(rseq.size);
        let (flags, signature) = (u64::from(rseq.flags), u64::from(rseq.signature));
        let args: [Arg; 4] = [rseq.address.into(), size.into(), flags.into(), signature.into()];
        script.call("rseq", libc::SYS_rseq, args);
    }
    for info in &state.pending {
        queue_signal(&mut script, libc::SYS_rt_tgsigqueueinfo, &[tgid, tid], info);
    }
    credentials(&mut script, &state.credentials);
    // A change of ids resets both of these.
    prctl(&mut script, "PR_SET_PDEATHSIG", libc::PR_SET_PDEATHSIG, state.parent_death_signal.into());
    if dumpable <= 1 {
        prctl(&mut script, "PR_SET_DUMPABLE", libc::PR_SET_DUMPABLE, u64::from(dumpable).into());
    }
    script
}

/// Appends a call that queues a signal to the caller itself, with the `siginfo_t` it had.
pub fn queue_signal(script: &mut Script, call: i64, to: &[NsPid], info: &[u8]) {
    let signal = i32::from_ne_bytes(info[..4].try_into().expect("a siginfo_t begins with si_signo"));
    let info = script.data(info);
    let label = format!("queue pending signal {signal}");
    match *to {
        [tgid, tid] => script.call(label, call, [tgid.0.into(), tid.0.into(), signal.into(), info.into()]),
        [tgid] => script.call(label, call, [tgid.0.into(), signal.into(), info.into()]),
        _ => unreachable!("a process, or a process and a thread"),
    };
}

fn prctl(script: &mut Script, label: &str, option: i32, argument: Arg) {
    script.call(label, libc::SYS_prctl, [option.into(), argument]);
}

fn credentials(script: &mut Script, credentials: &Credentials) {
    let c = credentials;
    prctl(script, "PR_SET_SECUREBITS", libc::PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP.into());
    let id = |id: u32| Arg::from(u64::from(id));
    let groups = script.data(&c.groups.iter().flat_map(|gid| gid.to_ne_bytes()).collect::<Vec<_>>());
    script.call("setgroups", libc::SYS_setgroups, [(c.groups.len() as u64).into(), groups.into()]);
    let [real, effective, saved, filesystem] = c.gids.map(id);
    script.call("setresgid", libc::SYS_setresgid, [real, effective, saved]);
    script.call("setfsgid", libc::SYS_setfsgid, [filesystem]);
    let [real, effective, saved, filesystem] = c.uids.map(id);
    script.call("setresuid", libc::SYS_setresuid, [real, effective, saved]);
    script.call("setfsuid", libc::SYS_setfsuid, [filesystem]);
    for capability in (0..CAPABILITIES).filter(|&capability| c.bounding & 1 << capability == 0) {
        prctl(script, &format!("PR_CAPBSET_DROP {capability}"), libc::PR_CAPBSET_DROP, capability.into());
    }
    prctl(script, "PR_SET_SECUREBITS", libc::PR_SET_SECUREBITS, u64::from(c.securebits).into());
    capset(script, c);
    ambient(script, c.ambient);
    if c.no_new_privs {
        let args: [Arg; 5] = [libc::PR_SET_NO_NEW_PRIVS.into(), 1.into(), 0.into(), 0.into(), 0.into()];
        script.call("PR_SET_NO_NEW_PRIVS", libc::SYS_prctl, args);
    }
}

fn capset(script: &mut Script, c: &Credentials) {
    let header = script.data(&[CAPABILITY_VERSION.to_ne_bytes(), 0u32.to_ne_bytes()].concat());
    let half = |set: u64, high: bool| if high { (set >> 32) as u32 } else { set as u32 };
    let words =
        [false, true].map(|high| [c.effective, c.permitted, c.inheritable].map(|set| half(set, high)));
    let data = script.data(&words.concat().iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>());
    script.call("capset", libc::SYS_capset, [header.into(), data.into()]);
}

fn ambient(script: &mut Script, set: u64) {
    let mut change = |label: String, what: i32, capability: u64| {
        let args: [Arg; 5] =
            [libc::PR_CAP_AMBIENT.into(), what.into(), capability.into(), 0.into(), 0.into()];
        script.call(label, libc::SYS_prctl, args);
    };
    change("PR_CAP_AMBIENT_CLEAR_ALL".into(), libc::PR_CAP_AMBIENT_CLEAR_ALL, 0);
    for capability in (0..CAPABILITIES).filter(|&capability| set & 1 << capability != 0) {
        change(format!("PR_CAP_AMBIENT_RAISE {capability}"), libc::PR_CAP_AMBIENT_RAISE, capability);
    }
}

/// Gives a parked thread the registers and the signal mask with which it goes on when it is let go.
pub fn set_registers(tracee: &Tracee, state: &ThreadState) -> pclive_sys::Result<()> {
    tracee.set_xstate(&state.xstate)?;
    tracee.set_registers(&state.registers)?;
    tracee.set_signal_mask(state.blocked)
}
