//! Threads that lend themselves to injected calls, and the memory where their scripts are put.

use super::footing::{Footing, SyscallInstruction};
use super::way_back::{RECORD_SIZE, Signals, Track, WayBack, unnoticed_signal};
use super::{CALL_SIZE, Expect, HEADER_SIZE, Outcome, RESULT_OFFSET, Script, done_offset, interpreter};
use crate::mem::ProcessMemory;
use crate::ptrace::{Stop, Tracee};
use crate::registers::{going_on, may_wait_with_another_mask};
use crate::{Error, Result};
use nix::errno::Errno;
use pclive_wire::manifest::Registers;
use pclive_wire::{HostPid, PageRange, VirtAddr};
use std::cell::Cell;

/// Above the lowest addresses and below where programs and libraries are usually mapped.
const LOW: VirtAddr = VirtAddr(0x20_0000);

/// Memory in another process where scripts are put: one private mapping, readable, writable and executable.
#[derive(Debug)]
pub struct Arena {
    range: PageRange,
    memory: ProcessMemory,
}

impl Arena {
    /// Where it is.
    pub fn range(&self) -> PageRange {
        self.range
    }

    /// All of it that scripts may take.
    pub(super) fn room(&self) -> Room {
        Room { free: self.range.start.offset(HEADER_SIZE as u64), end: self.range.end() }
    }
}

/// What scripts have not yet taken of an arena.
pub(super) struct Room {
    free: VirtAddr,
    end: VirtAddr,
}

impl Room {
    /// Takes a place for a script.
    pub(super) fn place(&mut self, script: &Script) -> Result<Place> {
        let (len, capacity) = (script.size(), (self.end.0 - self.free.0) as usize);
        if len > capacity {
            return Err(Error::ScriptTooLarge { len, capacity });
        }
        let start = self.free;
        self.free = start.offset(len as u64);
        Ok(Place { start, end: self.free })
    }
}

/// Where in an arena one script has its thread's record, its data, its calls and its stack.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    start: VirtAddr,
    end: VirtAddr,
}

impl Place {
    /// Where the thread's record is.
    pub(super) fn record(self) -> VirtAddr {
        self.start
    }

    fn text(self) -> VirtAddr {
        self.start.offset(RECORD_SIZE as u64)
    }
}

/// A script that a thread has been let go to run. Who has it must call [`Borrowed::finish`].
#[must_use]
#[derive(Debug)]
pub(super) struct Running<'s> {
    arena: &'s Arena,
    place: Place,
    script: &'s Script,
}

/// A stopped thread that lends itself to injected calls. Registers and signal mask are given back by
/// [`Borrowed::give_back`]; until then no signal reaches it.
#[derive(Debug)]
pub struct Borrowed<'t> {
    tracee: &'t Tracee,
    registers: Registers,
    mask: u64,
    ground: Ground<'t>,
    ending: Ending,
    /// Whether it has mapped an arena, which it would have to unmap on its way back.
    has_arena: Cell<bool>,
}

/// Where a borrowed thread makes its calls from.
#[derive(Clone, Copy, Debug)]
enum Ground<'t> {
    /// The vDSO's own instruction: what becomes of the thread if pclive dies is nobody's care. A thread of a container has
    /// its footing nonetheless.
    Bare(SyscallInstruction, Option<&'t Footing>),
    /// Where it finds its way back.
    Safe { footing: &'t Footing, way_back: &'t WayBack, track: Track },
}

/// How pclive learns that a script is at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// A trap, which kills a thread that nobody traces.
    Trap,
    /// A signal that the thread sends to itself.
    Signal(i32),
    /// By following all calls of the script.
    Followed,
}

impl Ending {
    /// What is blocked meanwhile. The kernel resets the handler of a trap that is blocked.
    fn mask(self) -> u64 {
        match self {
            Self::Trap => !(1 << (libc::SIGTRAP - 1)),
            Self::Signal(_) | Self::Followed => u64::MAX,
        }
    }

    /// What the interpreter has in r15.
    fn argument(self) -> u64 {
        match self {
            Self::Trap => u64::MAX,
            Self::Signal(signal) => signal as u64,
            // To see whether a signal could be sent: a call like any other.
            Self::Followed => 0,
        }
    }
}

/// What undoes a call, should pclive die before it has made another one.
#[derive(Clone, Copy, Debug)]
enum Undo {
    Nothing,
    /// Closes the descriptor that it returned.
    Close,
    /// Unmaps so many bytes where it mapped them.
    Unmap(u64),
}

impl<'t> Borrowed<'t> {
    /// Has `errand` done in the leader of a process of the container, which is in a ptrace stop, and gives it back whether or
    /// not that succeeds.
    pub fn lend<T, E: From<Error>>(
        tracee: &'t Tracee,
        footing: &'t Footing,
        errand: impl FnOnce(&Self) -> Result<T, E>,
    ) -> Result<T, E> {
        let borrowed = Self::leader(tracee, footing)?;
        let done = errand(&borrowed);
        borrowed.give_back_after(done)
    }

    /// Borrows a thread of a skeleton that is in a ptrace stop.
    pub fn new(tracee: &'t Tracee, syscall: SyscallInstruction) -> Result<Self> {
        Self::bare(tracee, tracee.registers()?, Ground::Bare(syscall, None))
    }

    fn bare(tracee: &'t Tracee, registers: Registers, ground: Ground<'t>) -> Result<Self> {
        let (mask, ending) = (tracee.signal_mask()?, Ending::Trap);
        tracee.set_signal_mask(ending.mask())?;
        Ok(Self { tracee, registers, mask, ground, ending, has_arena: Cell::new(false) })
    }

    fn leader(tracee: &'t Tracee, footing: &'t Footing) -> Result<Self> {
        let registers = footing.registers_of(tracee)?;
        let Some(way_back) = footing.way_back() else {
            return Self::bare(tracee, registers, Ground::Bare(footing.syscall(), Some(footing)));
        };
        let mask = tracee.signal_mask()?;
        let track = way_back.lay(&going_on(registers), mask)?;
        Self::enter(tracee, (registers, mask), (footing, way_back, track))
    }

    /// Registers with which another thread of the process goes on after it has done something else.
    ///
    /// [`Error::Returning`] if it does so just now: nothing may be written for others then.
    pub(super) fn registers_of(&self, tracee: &Tracee) -> Result<Registers> {
        match self.ground {
            Ground::Bare(_, None) => tracee.registers(),
            Ground::Bare(_, Some(footing)) | Ground::Safe { footing, .. } => footing.registers_of(tracee),
        }
    }

    /// Borrows another thread of the process, the `index`th, which has these registers, for a script with this place.
    pub(super) fn beside(
        &self,
        (tracee, registers): (&'t Tracee, Registers),
        (arena, place, index): (&Arena, Place, usize),
    ) -> Result<Self> {
        let (footing, way_back) = match self.ground {
            Ground::Bare(..) => return Self::bare(tracee, registers, self.ground),
            Ground::Safe { footing, way_back, .. } => (footing, way_back),
        };
        let mask = tracee.signal_mask()?;
        let site = (arena.range.start, place, index);
        let track = way_back.lay_beside(&going_on(registers), mask, site)?;
        Self::enter(tracee, (registers, mask), (footing, way_back, track))
    }

    /// Takes a thread to the way back that has been laid for it, so that its signals can be blocked.
    fn enter(
        tracee: &'t Tracee,
        (registers, mask): (Registers, u64),
        (footing, way_back, track): (&'t Footing, &'t WayBack, Track),
    ) -> Result<Self> {
        let signals = Signals {
            of_process: footing.dispositions(),
            blocked: mask,
            pending: tracee.pending_mask(false)?,
            pending_for_all: tracee.pending_mask(true)?,
        };
        let ending = unnoticed_signal(signals).map_or(Ending::Followed, Ending::Signal);
        let ground = Ground::Safe { footing, way_back, track };
        let borrowed = Self { tracee, registers, mask, ground, ending, has_arena: Cell::new(false) };
        let enter = || {
            if may_wait_with_another_mask(&registers) {
                // From here on the kernel would not restore it, but make the call again, which takes it anew.
                tracee.set_signal_mask(mask)?;
            }
            borrowed.stand_at(way_back.back())?;
            tracee.set_signal_mask(ending.mask())
        };
        if let Err(error) = enter() {
            // It is gone, and the arena is not kept for it.
            let _ = borrowed.give_back();
            return Err(error);
        }
        Ok(borrowed)
    }

    /// How many other threads can be borrowed at the same time.
    pub(super) fn members(&self) -> usize {
        match self.ground {
            Ground::Bare(..) => usize::MAX,
            Ground::Safe { way_back, .. } => way_back.members(),
        }
    }

    /// The registers that the thread has while it is borrowed, with the instruction pointer at `rip`.
    fn registers_at(&self, rip: VirtAddr) -> Registers {
        let rbp = match self.ground {
            Ground::Bare(..) => self.registers.rbp,
            Ground::Safe { track, .. } => track.record.0,
        };
        Registers { rip: rip.0, rbp, orig_rax: u64::MAX, ..self.registers }
    }

    /// Where its way back begins.
    fn way_out(&self, way_back: &WayBack) -> VirtAddr {
        if self.has_arena.get() { way_back.leave() } else { way_back.back() }
    }

    fn stand_at(&self, rip: VirtAddr) -> Result<()> {
        self.tracee.set_registers(&self.registers_at(rip))
    }

    /// Whether its scripts are followed call by call: then each call of them costs tens of microseconds.
    pub fn is_followed(&self) -> bool {
        matches!(self.ending, Ending::Followed)
    }

    /// Makes one call in the thread, through two system-call stops. Returns what it returned, or the error.
    ///
    /// A single step (`PTRACE_SINGLESTEP`) would need one stop, but if pclive died afterwards the thread would go on stepping
    /// and be killed by the next trap: only `PTRACE_DETACH` ends that (`ptrace_disable`), not the tracer's death
    /// (`exit_ptrace` in kernel/ptrace.c).
    pub fn call<const N: usize>(&self, label: &str, number: i64, args: [u64; N]) -> Result<u64> {
        self.call_undone_by(Undo::Nothing, label, number, args)
    }

    /// Makes a call that returns a descriptor. If pclive dies before the next call, it is closed.
    pub fn open<const N: usize>(&self, label: &str, number: i64, args: [u64; N]) -> Result<i32> {
        self.call_undone_by(Undo::Close, label, number, args).map(|fd| fd as i32)
    }

    fn call_undone_by<const N: usize>(
        &self,
        undo: Undo,
        label: &str,
        number: i64,
        args: [u64; N],
    ) -> Result<u64> {
        let mut all = [0; 6];
        all[..N].copy_from_slice(&args);
        let [rdi, rsi, rdx, r10, r8, r9] = all;
        let (call, r12) = match self.ground {
            Ground::Bare(syscall, _) => (syscall.0, 0),
            Ground::Safe { way_back, .. } => (way_back.call(), self.way_out(way_back).0),
        };
        let (r14, r13) = match undo {
            Undo::Nothing => (0, 0),
            Undo::Close => (libc::SYS_close, 0),
            Undo::Unmap(len) => (libc::SYS_munmap, len),
        };
        let rax = number as u64;
        let (r14, base) = (r14 as u64, self.registers_at(call));
        self.tracee.set_registers(&Registers { rax, rdi, rsi, rdx, r10, r8, r9, r12, r13, r14, ..base })?;
        for _entry_then_exit in 0..2 {
            self.tracee.resume_to_syscall()?;
            self.expect_stop(Stop::Syscall)?;
        }
        let result = self.tracee.registers()?.rax;
        match failure(result as i64) {
            Some(errno) => Err(Error::ScriptCall { tid: self.tracee.tid(), label: label.into(), errno }),
            None => Ok(result),
        }
    }

    /// Maps an arena of `len` bytes where there is room, or exactly at `at`.
    pub fn map_arena(&self, len: u64, at: Option<VirtAddr>) -> Result<Arena> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | at.map_or(0, |_| libc::MAP_FIXED_NOREPLACE);
        let prot = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        // Without a wish: low, where no program that maps a range again right after it has freed it comes across the arena.
        let hint = at.unwrap_or(LOW).0;
        let args = [hint, len, prot as u64, flags as u64, u64::MAX, 0];
        let memory = ProcessMemory::open(self.tracee.tid())?;
        let base = self.call_undone_by(Undo::Unmap(len), "mmap of the script arena", libc::SYS_mmap, args)?;
        let base = VirtAddr(base);
        let arena = Arena { range: PageRange::between(base, base.offset(len)), memory };
        if let Ground::Safe { way_back, .. } = self.ground {
            // What undoes the call does not wait until other threads have left.
            way_back.note_arena(arena.range)?;
            self.has_arena.set(true);
            self.stand_at(self.way_out(way_back))?;
        }
        arena.memory.write(base, interpreter())?;
        Ok(arena)
    }

    /// Has `errand` done with an arena of `len` bytes, which is unmapped whether or not that succeeds.
    pub fn with_arena<T, E: From<Error>>(
        &self,
        len: u64,
        errand: impl FnOnce(&Arena) -> Result<T, E>,
    ) -> Result<T, E> {
        let arena = self.map_arena(len, None)?;
        let done = errand(&arena);
        first_failure(done, self.unmap_arena(arena))
    }

    /// Unmaps an arena.
    pub fn unmap_arena(&self, arena: Arena) -> Result<()> {
        self.has_arena.set(false);
        self.unmap(arena.range)
    }

    /// Unmaps a range.
    pub fn unmap(&self, range: PageRange) -> Result<()> {
        self.call("munmap", libc::SYS_munmap, [range.start.0, range.bytes()]).map(drop)
    }

    /// Runs a script to its end, or to the first call that does not return what it must.
    pub fn run(&self, arena: &Arena, script: &Script) -> Result<Outcome> {
        self.finish(self.start(arena, arena.room().place(script)?, script)?)
    }

    /// Runs a script that ends with an exec, up to the moment when the new program is in place
    /// (`PTRACE_EVENT_EXEC`, which [`crate::ptrace::Seize::Skeleton`] asks for).
    pub fn run_to_exec(self, arena: &Arena, script: &Script) -> Result<()> {
        let running = self.start(arena, arena.room().place(script)?, script)?;
        match self.tracee.wait()? {
            Stop::Event(libc::PTRACE_EVENT_EXEC) => Ok(()),
            // It must be a call that failed.
            stop @ Stop::Signal(libc::SIGTRAP) => {
                self.outcome(running, Vec::new())?;
                Err(Error::UnexpectedStop { tid: self.tracee.tid(), stop })
            }
            Stop::Gone(_) => Err(Error::Gone(self.tracee.tid())),
            stop => Err(Error::UnexpectedStop { tid: self.tracee.tid(), stop }),
        }
    }

    /// Puts a script into its place, points the thread at it and lets it go. If that fails, the thread has not moved.
    pub(super) fn start<'s>(
        &self,
        arena: &'s Arena,
        place: Place,
        script: &'s Script,
    ) -> Result<Running<'s>> {
        let data = place.text();
        arena.memory.write(data, &script.assemble(data))?;
        let way_out = match self.ground {
            Ground::Bare(..) => VirtAddr(0),
            Ground::Safe { way_back, .. } => self.way_out(way_back),
        };
        self.tracee.set_registers(&Registers {
            rbx: data.0 + script.calls_offset() as u64,
            r12: script.calls.len() as u64,
            r13: data.0,
            r14: way_out.0,
            r15: self.ending.argument(),
            rsp: place.end.0,
            ..self.registers_at(arena.range.start)
        })?;
        self.go_on()?;
        Ok(Running { arena, place, script })
    }

    /// Waits for the end of a script that was started. The thread is stopped or gone afterwards, also if this fails.
    pub(super) fn finish(&self, running: Running<'_>) -> Result<Outcome> {
        let children = self.wait_for_end(running.arena)?;
        if let Ending::Signal(_) = self.ending {
            // The script has unblocked it.
            self.tracee.set_signal_mask(self.ending.mask())?;
        }
        self.outcome(running, children)
    }

    /// Lets a thread go on with a script.
    fn go_on(&self) -> Result<()> {
        match self.ending {
            Ending::Followed => self.tracee.resume_to_syscall(),
            Ending::Trap | Ending::Signal(_) => self.tracee.resume(0),
        }
    }

    /// What a script has left behind that has come to its end.
    fn outcome(&self, running: Running<'_>, children: Vec<HostPid>) -> Result<Outcome> {
        let Running { arena, place, script } = running;
        let left = self.tracee.registers()?.r12 as usize;
        let mut data = vec![0; script.text_size()];
        arena.memory.read(place.text(), &mut data)?;
        let calls = data.split_off(script.calls_offset());
        let results: Vec<i64> = calls
            .chunks_exact(CALL_SIZE)
            .map(|call| i64::from_ne_bytes(call[RESULT_OFFSET..][..8].try_into().expect("8 bytes")))
            .collect();
        match left {
            0 => Ok(Outcome { data, results, children }),
            _ => Err(self.script_error(script, &results, script.calls.len().saturating_sub(left))),
        }
    }

    /// Gives the thread its signal mask and its registers back, in this order: as long as it does not have these, it finds
    /// its way back, and already with its own stack. It stays stopped.
    pub fn give_back(self) -> Result<()> {
        if let Ground::Safe { way_back, .. } = self.ground {
            // What fails here fails below, too.
            let _ = self.stand_at(way_back.back());
        }
        let mask = self.tracee.set_signal_mask(self.mask);
        let registers = self.tracee.set_registers(&self.registers);
        let cleared = match self.ground {
            Ground::Bare(..) => Ok(()),
            Ground::Safe { way_back, track, .. } => way_back.clear(track),
        };
        mask.and(registers).and(cleared)
    }

    /// Gives the thread back after an errand, whether or not that has succeeded.
    pub fn give_back_after<T, E: From<Error>>(self, done: Result<T, E>) -> Result<T, E> {
        first_failure(done, self.give_back())
    }

    /// Waits until a script comes to its end; returns the processes and threads that were made on the way.
    fn wait_for_end(&self, arena: &Arena) -> Result<Vec<HostPid>> {
        let mut children = Vec::new();
        let mut stops_of_last_call = 0;
        let done = arena.range.start.0 + done_offset();
        let is_done = || Ok::<_, Error>(self.tracee.registers()?.rip == done);
        loop {
            match (self.tracee.wait()?, self.ending) {
                (Stop::Signal(libc::SIGTRAP), Ending::Trap) => return Ok(children),
                (Stop::Signal(signal), Ending::Signal(last)) if signal == last && is_done()? => {
                    return Ok(children);
                }
                (Stop::Syscall, Ending::Followed) => {
                    stops_of_last_call += u32::from(is_done()?);
                    if stops_of_last_call == 2 {
                        return Ok(children);
                    }
                    self.go_on()?;
                }
                (
                    Stop::Event(
                        libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK,
                    ),
                    _,
                ) => {
                    children.push(HostPid(self.tracee.event_message()? as i32));
                    self.go_on()?;
                }
                (Stop::Gone(_), _) => return Err(Error::Gone(self.tracee.tid())),
                (stop, _) => return Err(Error::UnexpectedStop { tid: self.tracee.tid(), stop }),
            }
        }
    }

    fn script_error(&self, script: &Script, results: &[i64], failed: usize) -> Error {
        let (call, result) = (&script.calls[failed], results[failed]);
        let (tid, label) = (self.tracee.tid(), call.label.clone());
        match (failure(result), call.expect) {
            (None, Expect::Exactly(expected)) => {
                Error::ScriptResult { tid, label, result: result as u64, expected }
            }
            (errno, _) => Error::ScriptCall { tid, label, errno: errno.unwrap_or(Errno::UnknownErrno) },
        }
    }

    fn expect_stop(&self, expected: Stop) -> Result<()> {
        match self.tracee.wait()? {
            stop if stop == expected => Ok(()),
            Stop::Gone(_) => Err(Error::Gone(self.tracee.tid())),
            stop => Err(Error::UnexpectedStop { tid: self.tracee.tid(), stop }),
        }
    }
}

/// What was done, unless that or what had to be done afterwards has failed. If both have, the first is the cause: the thread
/// is gone, say.
fn first_failure<T, E: From<Error>>(done: Result<T, E>, afterwards: Result<()>) -> Result<T, E> {
    let done = done?;
    afterwards?;
    Ok(done)
}

/// The error that a raw system call result stands for, if any.
fn failure(result: i64) -> Option<Errno> {
    (-4095..0).contains(&result).then(|| Errno::from_raw(-result as i32))
}
