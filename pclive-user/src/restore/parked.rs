//! One process of the skeleton: stopped, emptied, and filled with what the source's process has.

mod table;

use super::files::OpenedFiles;
use super::memory::Placement;
use super::timers::OutOfReach;
use super::vmas::{drop_pages, move_specials, remap, unmap};
use super::{descriptors, process as process_state, threads};
use pclive_sys::mem::ProcessMemory;
use pclive_sys::pidfd::{pidfd_getfd, pidfd_open};
use pclive_sys::ptrace::{Stop, Tracee};
use pclive_sys::script::{Arena, Arg, Borrowed, Outcome, Script, SyscallInstruction, run_all};
use pclive_sys::thread::{set_scheduling, unbind};
use pclive_sys::uffd::{self, Features, Uffd};
use pclive_wire::layout::{is_begun_anew, special_mappings};
use pclive_wire::manifest::{Backing, Process, SpecialMapping, Thread};
use pclive_wire::{HostPid, NsPid, PageRange, VirtAddr};
use procfs::process::{MMapPath, Process as Procfs};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

/// Bytes for scripts. The largest is that of a process with thousands of mappings; larger ones are made in parts.
const ARENA_SIZE: u64 = 4 << 20;
/// Where the search for room for the arena begins.
const ARENA_SEARCH_START: VirtAddr = VirtAddr(0x20_0000);
/// Descriptor that every parked process keeps for the init's executable, until its own table is installed.
const EXECUTABLE_FD: i32 = 3;
/// Wanted VMAs that are mapped with one script.
const VMAS_PER_SCRIPT: usize = 2048;

/// Why a parked process could not be made what it must be.
#[derive(Debug, thiserror::Error)]
pub enum ParkedError {
    /// A kernel interface said no.
    #[error(transparent)]
    Sys(#[from] pclive_sys::Error),
    /// Its own mappings could not be read.
    #[error("cannot read its mappings")]
    Maps(#[source] procfs::ProcError),
    /// It has no vDSO, or other special mappings than the source's process.
    #[error(
        "the kernel's {wanted:?} mapping is {here} bytes here, {source_bytes} at the source: the kernels differ"
    )]
    #[allow(missing_docs)]
    Special { wanted: SpecialMapping, here: u64, source_bytes: u64 },
    /// No room for scripts was found between the mappings.
    #[error("no room of {0} bytes between its mappings")]
    NoRoom(u64),
    /// A call of this process failed.
    #[error("{call}")]
    #[allow(missing_docs)]
    Call { call: &'static str, source: nix::Error },
    /// A file under /proc could not be written.
    #[error("cannot write {path}")]
    #[allow(missing_docs)]
    Write { path: String, source: std::io::Error },
    /// The last manifest lacks the state of something.
    #[error("the last manifest lacks the state of {0}")]
    Incomplete(NsPid),
    /// The kernel made something else than was asked for.
    #[error("clone3 of {asked} made {made} tasks")]
    #[allow(missing_docs)]
    Clone { asked: NsPid, made: usize },
    /// It has descriptors with larger numbers than the sandbox has room for.
    #[error(
        "its open files have numbers up to {fd}, two more are needed for a moment, and the bundle allows {limit} in all: \
         raise its hard RLIMIT_NOFILE"
    )]
    #[allow(missing_docs)]
    OpenFiles { fd: i32, limit: u64 },
    /// A timer cannot have the id that it had.
    #[error(transparent)]
    Timer(#[from] OutOfReach),
}

fn call(call: &'static str) -> impl Fn(nix::Error) -> ParkedError {
    move |source| ParkedError::Call { call, source }
}

/// A parked process.
#[derive(Debug)]
pub struct Parked {
    pid: NsPid,
    pidfd: OwnedFd,
    leader: Tracee,
    /// All threads but the leader.
    threads: BTreeMap<NsPid, Tracee>,
    syscall: SyscallInstruction,
    arena: Arena,
    sid: NsPid,
    pgid: NsPid,
    /// Descriptors that its table has room for, and the limit for them once it has been asked.
    fd_size: u32,
    fd_limit: Option<u64>,
}

impl Parked {
    /// Takes a stopped process that has just executed the init.
    pub fn new(pid: NsPid, leader: Tracee) -> Result<Self, ParkedError> {
        let host = leader.tid();
        let maps = own_mappings(host)?;
        let syscall = find_syscall(host, &maps)?;
        let room = room_between(maps.iter().map(|mapping| mapping.range), ARENA_SIZE)?;
        let arena = Borrowed::new(&leader, syscall)?.map_arena(ARENA_SIZE, Some(room))?;
        let pidfd = pidfd_open(host).map_err(call("pidfd_open"))?;
        // PID 1 was made a session leader by the runtime; who has just been cloned has its parent's session.
        Ok(Self {
            pid,
            pidfd,
            leader,
            threads: BTreeMap::new(),
            syscall,
            arena,
            sid: pid,
            pgid: pid,
            fd_size: 0,
            fd_limit: None,
        })
    }

    /// Session, as the container numbers it.
    pub fn session(&self) -> NsPid {
        self.sid
    }

    /// Notes that it was cloned by a process of this session and group.
    pub fn inherit_session(&mut self, parent: &Parked) {
        (self.sid, self.pgid) = (parent.sid, parent.pgid);
    }

    /// Makes it the leader of a session of its own.
    pub fn start_session(&mut self) -> Result<(), ParkedError> {
        let mut script = Script::new();
        script.call("setsid", libc::SYS_setsid, []);
        self.run(&script)?;
        (self.sid, self.pgid) = (self.pid, self.pid);
        Ok(())
    }

    /// Puts it into a process group of its session.
    pub fn set_group(&mut self, pgid: NsPid) -> Result<(), ParkedError> {
        if pgid != self.pgid {
            let mut script = Script::new();
            script.call(format!("setpgid to {pgid}"), libc::SYS_setpgid, [0.into(), pgid.0.into()]);
            self.run(&script)?;
            self.pgid = pgid;
        }
        Ok(())
    }

    /// Runs a script in the leader.
    pub fn run(&self, script: &Script) -> Result<Outcome, ParkedError> {
        Ok(Borrowed::new(&self.leader, self.syscall)?.run(&self.arena, script)?)
    }

    /// Has a child that shares this process's address space execute the init: it then has its own.
    pub fn exec_init(&self, child: Tracee) -> Result<Tracee, ParkedError> {
        let mut script = Script::new();
        let empty = script.string(b"");
        let arguments = script.room(8);
        let args: [Arg; 5] = [
            EXECUTABLE_FD.into(),
            empty.into(),
            arguments.into(),
            arguments.into(),
            libc::AT_EMPTY_PATH.into(),
        ];
        script.call("execveat of the init", libc::SYS_execveat, args);
        Borrowed::new(&child, self.syscall)?.run_to_exec(&self.arena, &script)?;
        // The exec has not yet returned: go on to the first instruction of the init.
        child.interrupt()?;
        child.resume(0)?;
        child.wait_trap()?;
        Ok(child)
    }

    /// Unmaps everything that exec made, moves the kernel's special mappings to where the source has them, and opens a
    /// userfaultfd on the now empty address space.
    pub fn empty_address_space(&mut self, wanted: &Process) -> Result<Placement, ParkedError> {
        self.keep_arena_clear(wanted)?;
        let maps = own_mappings(self.leader.tid())?;
        let moves = special_moves(&maps, &special_mappings(&wanted.vmas))?;
        let arena = self.arena.range();
        let mut script = Script::new();
        for mapping in &maps {
            if mapping.special.is_none() && mapping.range != arena {
                unmap(&mut script, mapping.range);
            }
        }
        let taken = wanted.vmas.iter().map(|vma| vma.range).chain(maps.iter().map(|mapping| mapping.range));
        let scratch = room_between(taken, moves.iter().map(|(from, _)| from.bytes()).sum())?;
        move_specials(&mut script, &moves, scratch);
        // Children that end while the tree is rebuilt shall leave neither zombies nor pending signals.
        let ignore = script.data(&[1u64, 0, 0, 0].map(u64::to_ne_bytes).concat());
        let args: [Arg; 4] = [libc::SIGCHLD.into(), ignore.into(), 0.into(), 8.into()];
        script.call("rt_sigaction of SIGCHLD", libc::SYS_rt_sigaction, args);
        let fd = script.call("userfaultfd", libc::SYS_userfaultfd, [uffd::CREATE_FLAGS.into()]);
        let fd = self.run(&script)?.result(fd) as i32;
        self.syscall = find_syscall(self.leader.tid(), &own_mappings(self.leader.tid())?)?;
        let ours = pidfd_getfd(self.pidfd.as_fd(), fd).map_err(call("pidfd_getfd"))?;
        let mut script = Script::new();
        script.call("close", libc::SYS_close, [fd.into()]);
        self.run(&script)?;
        let uffd = Uffd::adopt(ours, self.leader.tid(), Features::PLACEMENT)?;
        Ok(Placement::new(uffd)?)
    }

    /// Makes its mappings those of `wanted`, keeping the pages of what stays.
    pub fn reconcile_mappings(
        &mut self,
        wanted: &Process,
        placement: &mut Placement,
    ) -> Result<(), ParkedError> {
        if placement.vmas() == wanted.vmas {
            return Ok(());
        }
        self.keep_arena_clear(wanted)?;
        if !placement.vmas().is_empty() && is_begun_anew(placement.vmas(), &wanted.vmas) {
            self.follow_exec(wanted, placement)?;
        }
        let mut mapped = Vec::new();
        if wanted.vmas.len() <= VMAS_PER_SCRIPT {
            let mut script = Script::new();
            mapped = remap(&mut script, placement.vmas(), &wanted.vmas);
            self.run(&script)?;
        } else {
            // In parts, from the bottom up: each part's layout is the new one up to a point and the old one above it.
            let mut standing = placement.vmas().to_vec();
            for upto in (VMAS_PER_SCRIPT..wanted.vmas.len() + VMAS_PER_SCRIPT).step_by(VMAS_PER_SCRIPT) {
                let part = super::vmas::splice(&wanted.vmas, upto, placement.vmas());
                let mut script = Script::new();
                mapped.extend(remap(&mut script, &standing, &part));
                self.run(&script)?;
                standing = part;
            }
        }
        placement.set_vmas(wanted.vmas.clone(), &mapped)?;
        Ok(())
    }

    /// The process has executed another program: none of its mappings is left, and the special ones are elsewhere.
    fn follow_exec(&mut self, wanted: &Process, placement: &mut Placement) -> Result<(), ParkedError> {
        let standing = placement.vmas().iter().filter(|vma| !matches!(vma.backing, Backing::Special(_)));
        for ranges in standing.map(|vma| vma.range).collect::<Vec<_>>().chunks(VMAS_PER_SCRIPT) {
            let mut script = Script::new();
            ranges.iter().for_each(|range| unmap(&mut script, *range));
            self.run(&script)?;
        }
        let maps = own_mappings(self.leader.tid())?;
        let moves = special_moves(&maps, &special_mappings(&wanted.vmas))?;
        let taken = wanted.vmas.iter().map(|vma| vma.range).chain(maps.iter().map(|mapping| mapping.range));
        let scratch = room_between(taken, moves.iter().map(|(from, _)| from.bytes()).sum())?;
        let mut script = Script::new();
        move_specials(&mut script, &moves, scratch);
        self.run(&script)?;
        self.syscall = find_syscall(self.leader.tid(), &own_mappings(self.leader.tid())?)?;
        placement.set_vmas(Vec::new(), &[])?;
        Ok(())
    }

    /// Makes its threads those of `wanted`.
    pub fn reconcile_threads(&mut self, wanted: &Process) -> Result<(), ParkedError> {
        let gone: Vec<NsPid> = self
            .threads
            .keys()
            .filter(|tid| !wanted.threads.iter().any(|thread| thread.tid == **tid))
            .copied()
            .collect();
        for tid in gone {
            let thread = self.threads.remove(&tid).expect("just listed");
            let mut script = Script::new();
            script.call("exit", libc::SYS_exit, [0.into()]);
            match Borrowed::new(&thread, self.syscall)?.run(&self.arena, &script) {
                Err(pclive_sys::Error::Gone(_)) => {}
                Err(e) => return Err(e.into()),
                Ok(_) => unreachable!("exit does not return"),
            }
        }
        for Thread { tid, .. } in &wanted.threads {
            if *tid != self.pid && !self.threads.contains_key(tid) {
                let thread = self.create_thread(*tid)?;
                self.threads.insert(*tid, thread);
            }
        }
        Ok(())
    }

    fn create_thread(&self, tid: NsPid) -> Result<Tracee, ParkedError> {
        let mut script = Script::new();
        threads::clone_with_id(&mut script, threads::THREAD_FLAGS, 0, tid);
        let outcome = self.run(&script)?;
        let [host] = *outcome.children() else {
            return Err(ParkedError::Clone { asked: tid, made: outcome.children().len() });
        };
        let thread = Tracee::auto_attached(host);
        match thread.wait()? {
            Stop::Trap => Ok(thread),
            stop => Err(pclive_sys::Error::UnexpectedStop { tid: host, stop }.into()),
        }
    }

    /// Drops pages of its memory.
    pub fn drop_pages(&self, ranges: &[PageRange]) -> Result<(), ParkedError> {
        for ranges in ranges.chunks(VMAS_PER_SCRIPT) {
            let mut script = Script::new();
            drop_pages(&mut script, ranges);
            self.run(&script)?;
        }
        Ok(())
    }

    /// Gives it what only a frozen process has: state, descriptors, and for each thread its state and registers. The
    /// arena is unmapped; nothing of pclive is left in it but that it is stopped.
    pub fn finish(&mut self, process: &Process, files: &OpenedFiles) -> Result<(), ParkedError> {
        let state = process.state.as_ref().ok_or(ParkedError::Incomplete(process.pid))?;
        self.install_descriptors(state, files)?;
        let (_, spare) = descriptors::spare_fds(&state.fds);
        self.run(&process_state::state_script(process, state, spare)?)?;
        self.write_oom_score_adj(state.oom_score_adj)?;
        self.give_threads_their_state(process, state.dumpable)?;
        let arena = self.arena.range();
        Borrowed::new(&self.leader, self.syscall)?.unmap(arena)?;
        for thread in &process.threads {
            let wanted = thread.state.as_ref().ok_or(ParkedError::Incomplete(thread.tid))?;
            let tracee = self.thread(thread.tid)?;
            threads::set_registers(tracee, wanted)?;
            // Last: what a thread of low priority does for pclive takes long on a busy machine.
            set_scheduling(tracee.tid(), &wanted.scheduling).map_err(call("sched_setattr"))?;
            if wanted.scheduling.cpus.is_empty() {
                // It has inherited those of pclive.
                unbind(tracee.tid()).map_err(call("sched_setaffinity"))?;
            }
        }
        Ok(())
    }

    /// All threads take what only they themselves can take, at the same time. Whichever is the last to change its ids, which
    /// takes `dumpable` away from the whole process, sets that again afterwards.
    fn give_threads_their_state(&self, process: &Process, dumpable: u32) -> Result<(), ParkedError> {
        let script = |thread: &Thread| {
            let wanted = thread.state.as_ref().ok_or(ParkedError::Incomplete(thread.tid))?;
            Ok::<_, ParkedError>(threads::state_script(thread.tid, process.pid, wanted, dumpable))
        };
        let (leaders, others): (Vec<&Thread>, Vec<_>) =
            process.threads.iter().partition(|thread| thread.tid == self.pid);
        let of_leader = script(leaders.first().ok_or(ParkedError::Incomplete(self.pid))?)?;
        let of_other = |thread: &Thread| Ok((self.thread(thread.tid)?, script(thread)?));
        let of_others = others.into_iter().map(of_other).collect::<Result<Vec<_>, ParkedError>>()?;
        let leader = Borrowed::new(&self.leader, self.syscall)?;
        let given = run_all(&self.arena, (&leader, &of_leader), &of_others);
        leader.give_back_after(given)?;
        Ok(())
    }

    /// Has it live on if pclive dies, where it would die, too. A process with several threads dies with any of them.
    pub fn outlive_tracer(&self) -> Result<(), ParkedError> {
        let threads = self.threads.values().chain([&self.leader]);
        Ok(threads.into_iter().try_for_each(Tracee::outlive_tracer)?)
    }

    /// Lets all its threads run. One that cannot be let go does not keep the others.
    pub fn release(self) -> Result<(), ParkedError> {
        let threads = self.threads.into_values().chain([self.leader]);
        let detached: Vec<_> = threads.map(Tracee::detach).collect();
        Ok(detached.into_iter().collect::<Result<(), _>>()?)
    }

    /// Its threads, the leader first.
    pub fn into_tracees(self) -> Vec<Tracee> {
        std::iter::once(self.leader).chain(self.threads.into_values()).collect()
    }

    fn thread(&self, tid: NsPid) -> Result<&Tracee, ParkedError> {
        if tid == self.pid {
            return Ok(&self.leader);
        }
        self.threads.get(&tid).ok_or(ParkedError::Incomplete(tid))
    }

    fn write_oom_score_adj(&self, value: i32) -> Result<(), ParkedError> {
        let path = format!("/proc/{}/oom_score_adj", self.leader.tid());
        std::fs::write(&path, value.to_string()).map_err(|source| ParkedError::Write { path, source })
    }

    /// Moves the arena if `wanted` has a mapping where it is.
    fn keep_arena_clear(&mut self, wanted: &Process) -> Result<(), ParkedError> {
        let arena = self.arena.range();
        if !wanted.vmas.iter().any(|vma| vma.range.intersection(&arena).is_some()) {
            return Ok(());
        }
        let standing = own_mappings(self.leader.tid())?;
        let taken =
            wanted.vmas.iter().map(|vma| vma.range).chain(standing.iter().map(|mapping| mapping.range));
        let room = room_between(taken, ARENA_SIZE)?;
        let borrowed = Borrowed::new(&self.leader, self.syscall)?;
        let old = std::mem::replace(&mut self.arena, borrowed.map_arena(ARENA_SIZE, Some(room))?);
        Ok(borrowed.unmap_arena(old)?)
    }
}

/// A mapping of a parked process.
struct Standing {
    range: PageRange,
    special: Option<SpecialMapping>,
}

fn own_mappings(pid: HostPid) -> Result<Vec<Standing>, ParkedError> {
    let maps = Procfs::new(pid.0).and_then(|process| process.maps()).map_err(ParkedError::Maps)?;
    let standing = maps.into_iter().filter(|map| map.pathname != MMapPath::Vsyscall).map(|map| Standing {
        range: crate::capture::vmas::range(&map),
        special: crate::capture::vmas::special_mapping(&map.pathname),
    });
    Ok(standing.collect())
}

fn find_syscall(pid: HostPid, maps: &[Standing]) -> Result<SyscallInstruction, ParkedError> {
    let vdso = maps.iter().find(|mapping| mapping.special == Some(SpecialMapping::Vdso));
    let vdso = vdso.ok_or(pclive_sys::Error::NoSyscallInstruction(pid))?;
    Ok(SyscallInstruction::find(pid, &ProcessMemory::open(pid)?, vdso.range)?)
}

/// Where each special mapping must go. Both sides must have the same ones, in the same sizes.
fn special_moves(
    here: &[Standing],
    wanted: &[(SpecialMapping, PageRange)],
) -> Result<Vec<(PageRange, VirtAddr)>, ParkedError> {
    let find =
        |which| here.iter().find(|mapping| mapping.special == Some(which)).map(|mapping| mapping.range);
    let moved = |&(which, range): &(SpecialMapping, PageRange)| {
        let standing = find(which).unwrap_or(PageRange::new(VirtAddr(0), 0));
        if standing.pages != range.pages {
            let (here, source_bytes) = (standing.bytes(), range.bytes());
            return Err(ParkedError::Special { wanted: which, here, source_bytes });
        }
        Ok((standing, range.start))
    };
    wanted.iter().map(moved).collect()
}

/// The lowest room of `len` bytes between `taken` ranges (in any order).
fn room_between(taken: impl Iterator<Item = PageRange>, len: u64) -> Result<VirtAddr, ParkedError> {
    let mut taken: Vec<PageRange> = taken.collect();
    taken.sort_unstable();
    let mut at = ARENA_SEARCH_START;
    for range in taken {
        if range.start >= at.offset(len) {
            break;
        }
        at = at.max(range.end());
    }
    match at.offset(len).0 <= pclive_wire::units::USER_END {
        true => Ok(at),
        false => Err(ParkedError::NoRoom(len)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_found_in_the_first_gap_that_is_large_enough() {
        let range = |start: u64, end: u64| PageRange::between(VirtAddr(start), VirtAddr(end));
        let start = ARENA_SEARCH_START.0;
        let room = |taken: &[PageRange]| room_between(taken.iter().copied(), 0x2000).unwrap().0;
        assert_eq!(room(&[]), start);
        assert_eq!(room(&[range(start + 0x1000, start + 0x3000)]), start + 0x3000);
        let taken = [range(start + 0x4000, start + 0x5000), range(start - 0x1000, start + 0x1000)];
        assert_eq!(room(&taken), start + 0x1000);
        assert!(room_between([range(0x1000, 1 << 47)].into_iter(), 0x1000).is_err());
    }
}
