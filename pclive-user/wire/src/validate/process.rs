//! One process: its address space, threads and state.

use super::{Fault, Item, Place, Result};
use crate::limits::{MAX_AUXV, MAX_PENDING_SIGNALS, MAX_THREADS, MAX_VMAS, MAX_XSTATE};
use crate::manifest::{
    Backing, MmBounds, PosixTimer, Process, ProcessState, Thread, ThreadState, Vma, VmaFlags,
};
use crate::units::{NsPid, PAGE_SIZE, USER_END, VirtAddr};
use std::collections::{HashMap, HashSet};

/// `sizeof(siginfo_t)`.
const SIGINFO_LEN: usize = 128;
/// `_NSIG` on x86-64.
const SIGNALS: i32 = 64;
/// `RLIM_NLIMITS`.
const LIMITS: usize = 16;
/// `NGROUPS_MAX`.
const MAX_GROUPS: usize = 65536;
/// Legacy region and header: what every `XSAVE` area begins with.
const MIN_XSTATE: usize = 576;
/// `TASK_COMM_LEN` without its NUL.
const MAX_COMM: usize = 15;
/// Upper limit of `fs.nr_open` as the kernel ships it.
const MAX_FD: i32 = 1 << 20;

pub(super) fn check(
    process: &Process,
    last: bool,
    descriptions: usize,
    shared: &mut HashMap<u32, u64>,
) -> Result {
    let at = Place::Process(process.pid);
    at.ensure_path(&process.exe, Item::Executable)?;
    at.ensure(process.threads.len() <= MAX_THREADS, Fault::Count(Item::Threads))?;
    at.ensure(process.vmas.len() <= MAX_VMAS, Fault::Count(Item::Mappings))?;
    check_mm(at, &process.mm)?;
    check_vmas(process.pid, &process.vmas, shared)?;
    for Thread { tid, state } in &process.threads {
        match state {
            Some(state) => check_thread(Place::Thread(*tid), state)?,
            None => Place::Thread(*tid).ensure(!last, Fault::StateMissing)?,
        }
    }
    match &process.state {
        Some(state) => check_state(process, state, descriptions),
        None => at.ensure(!last, Fault::StateMissing),
    }
}

fn is_user_address(address: VirtAddr) -> bool {
    address.0 <= USER_END
}

fn check_mm(at: Place, mm: &MmBounds) -> Result {
    let ordered = [
        (mm.start_code, mm.end_code),
        (mm.start_data, mm.end_data),
        (mm.start_brk, mm.brk),
        (mm.arg_start, mm.arg_end),
        (mm.env_start, mm.env_end),
        (mm.start_stack, VirtAddr(USER_END)),
    ];
    let good = ordered.iter().all(|&(start, end)| start <= end && is_user_address(end));
    at.ensure(good, Fault::Range(Item::Addresses))?;
    // Pairs of 8-byte words.
    let good = mm.auxv.len().is_multiple_of(16) && mm.auxv.len() <= MAX_AUXV;
    at.ensure(good, Fault::Size(Item::AuxiliaryVector))
}

fn check_vmas(pid: NsPid, vmas: &[Vma], shared: &mut HashMap<u32, u64>) -> Result {
    let mut free_from = VirtAddr(0);
    for vma in vmas {
        let at = Place::Mapping(pid, vma.range.start);
        at.ensure(vma.range.is_valid_user_range(), Fault::Range(Item::Addresses))?;
        at.ensure(vma.range.start >= free_from, Fault::Order)?;
        free_from = vma.range.end();
        at.ensure(vma.prot <= 7, Fault::Range(Item::Protection))?;
        at.ensure(vma.flags.0 & !VmaFlags::ALL == 0, Fault::Range(Item::MappingFlags))?;
        check_backing(at, vma, shared)?;
    }
    Ok(())
}

fn check_backing(at: Place, vma: &Vma, shared: &mut HashMap<u32, u64>) -> Result {
    match &vma.backing {
        Backing::Anonymous | Backing::Special(_) => Ok(()),
        Backing::File { path, offset, size, .. } => {
            at.ensure_path(path, Item::BackingPath)?;
            check_offset(at, vma, *offset)?;
            at.ensure(i64::try_from(*size).is_ok(), Fault::Range(Item::FileOffset))
        }
        Backing::Shared { object, offset, size } => {
            check_offset(at, vma, *offset)?;
            at.ensure(i64::try_from(*size).is_ok(), Fault::Range(Item::FileOffset))?;
            at.ensure(*shared.entry(*object).or_insert(*size) == *size, Fault::SharedSize)
        }
    }
}

/// A mapping may reach behind the end of its file, but not behind the largest offset (`loff_t`).
fn check_offset(at: Place, vma: &Vma, offset: u64) -> Result {
    let end = offset.checked_add(vma.range.bytes()).and_then(|end| i64::try_from(end).ok());
    at.ensure(offset.is_multiple_of(PAGE_SIZE) && end.is_some(), Fault::Range(Item::FileOffset))
}

fn check_thread(at: Place, state: &ThreadState) -> Result {
    let xstate = state.xstate.len();
    at.ensure((MIN_XSTATE..=MAX_XSTATE).contains(&xstate), Fault::Size(Item::ExtendedState))?;
    check_pending(at, &state.pending)?;
    at.ensure(state.comm.len() <= MAX_COMM && !state.comm.contains(&0), Fault::Size(Item::Name))?;
    let signal = state.parent_death_signal;
    at.ensure((0..=SIGNALS).contains(&signal), Fault::Range(Item::SignalNumber))?;
    at.ensure(state.credentials.groups.len() <= MAX_GROUPS, Fault::Count(Item::Groups))?;
    let pointers = [state.altstack.sp, state.robust_list.0, state.clear_child_tid];
    at.ensure(pointers.into_iter().all(is_user_address), Fault::Range(Item::Addresses))?;
    // rseq(2): the area is aligned to 32 bytes.
    let rseq =
        state.rseq.is_none_or(|rseq| rseq.address.0.is_multiple_of(32) && is_user_address(rseq.address));
    at.ensure(rseq, Fault::Range(Item::Rseq))
}

fn check_pending(at: Place, pending: &[Vec<u8>]) -> Result {
    at.ensure(pending.len() <= MAX_PENDING_SIGNALS, Fault::Count(Item::Signals))?;
    at.ensure(pending.iter().all(|info| info.len() == SIGINFO_LEN), Fault::Size(Item::SignalInfo))
}

fn check_state(process: &Process, state: &ProcessState, descriptions: usize) -> Result {
    let at = Place::Process(process.pid);
    at.ensure_path(&state.cwd, Item::WorkingDirectory)?;
    at.ensure(state.umask <= 0o777, Fault::Range(Item::Umask))?;
    at.ensure(state.dumpable <= 2, Fault::Range(Item::Dumpable))?;
    at.ensure((-1000..=1000).contains(&state.oom_score_adj), Fault::Range(Item::OomScoreAdjustment))?;
    at.ensure(state.limits.len() == LIMITS, Fault::Count(Item::Limits))?;
    at.ensure(state.actions.len() == SIGNALS as usize, Fault::Count(Item::Actions))?;
    check_pending(at, &state.pending)?;
    check_timers(process, &state.timers)?;

    let mut seen = HashSet::new();
    for entry in &state.fds {
        let at = Place::Descriptor(process.pid, entry.fd);
        at.ensure((0..MAX_FD).contains(&entry.fd), Fault::Range(Item::Descriptors))?;
        at.ensure_unique(&mut seen, entry.fd, Item::Descriptors)?;
        at.ensure((entry.description.0 as usize) < descriptions, Fault::Dangling(Item::Descriptions))?;
    }
    Ok(())
}

fn check_timers(process: &Process, timers: &[PosixTimer]) -> Result {
    let at = Place::Process(process.pid);
    let threads: HashSet<NsPid> = process.threads.iter().map(|thread| thread.tid).collect();
    let mut seen = HashSet::new();
    for timer in timers {
        at.ensure(timer.id >= 0, Fault::Range(Item::Timer))?;
        at.ensure_unique(&mut seen, timer.id, Item::Timer)?;
        at.ensure((0..=SIGNALS).contains(&timer.signal), Fault::Range(Item::SignalNumber))?;
        let to_process = timer.thread == NsPid(0);
        at.ensure(to_process || threads.contains(&timer.thread), Fault::Dangling(Item::Threads))?;
    }
    Ok(())
}
