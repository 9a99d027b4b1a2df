//! Threads that lend themselves to injected calls, and the memory where their scripts are put.

use super::{CALL_SIZE, Expect, INTERPRETER_ROOM, Outcome, RESULT_OFFSET, STACK_SIZE, Script, interpreter};
use crate::mem::ProcessMemory;
use crate::ptrace::{Stop, Tracee};
use crate::{Error, Result};
use nix::errno::Errno;
use pclive_wire::manifest::Registers;
use pclive_wire::{HostPid, PageRange, VirtAddr};

/// Everything except SIGTRAP, which ends a script: the kernel resets the handler of a trap that is blocked.
const ALL_BUT_SIGTRAP: u64 = !(1 << (libc::SIGTRAP - 1));

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
        Room { free: self.range.start.offset(INTERPRETER_ROOM as u64), end: self.range.end() }
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

/// Where in an arena one script has its data, its calls and its stack.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    start: VirtAddr,
    end: VirtAddr,
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
/// [`Borrowed::give_back`]; until then no signal but SIGTRAP reaches it.
///
/// If pclive dies while a call or a script runs, the thread goes on in the interpreter and is killed by its trap. That
/// window is tens of microseconds for each process and cannot be closed without code that stays in the process.
#[derive(Debug)]
pub struct Borrowed<'t> {
    tracee: &'t Tracee,
    registers: Registers,
    mask: u64,
    syscall: SyscallInstruction,
}

/// Where a process has a `syscall` instruction.
#[derive(Clone, Copy, Debug)]
pub struct SyscallInstruction(VirtAddr);

impl SyscallInstruction {
    /// Finds the one in the vDSO, mapped at `vdso`, so that nothing in the process needs to be overwritten.
    pub fn find(pid: HostPid, memory: &ProcessMemory, vdso: PageRange) -> Result<Self> {
        const SYSCALL: [u8; 2] = [0x0f, 0x05];
        let mut code = vec![0; vdso.bytes() as usize];
        memory.read(vdso.start, &mut code)?;
        let offset = code.windows(2).position(|bytes| bytes == SYSCALL);
        offset.map(|offset| Self(vdso.start.offset(offset as u64))).ok_or(Error::NoSyscallInstruction(pid))
    }
}

impl<'t> Borrowed<'t> {
    /// Has `errand` done in a thread that is in a ptrace stop, and gives it back whether or not that succeeds.
    pub fn lend<T>(
        tracee: &'t Tracee,
        syscall: SyscallInstruction,
        errand: impl FnOnce(&Self) -> Result<T>,
    ) -> Result<T> {
        let borrowed = Self::new(tracee, syscall)?;
        let done = errand(&borrowed);
        borrowed.give_back_after(done)
    }

    /// Borrows a thread that is in a ptrace stop.
    pub fn new(tracee: &'t Tracee, syscall: SyscallInstruction) -> Result<Self> {
        let (registers, mask) = (tracee.registers()?, tracee.signal_mask()?);
        tracee.set_signal_mask(ALL_BUT_SIGTRAP)?;
        Ok(Self { tracee, registers, mask, syscall })
    }

    /// The registers and the signal mask that the thread had.
    pub fn original(&self) -> (&Registers, u64) {
        (&self.registers, self.mask)
    }

    /// Makes one call in the thread, through two system-call stops. Returns what it returned, or the error.
    ///
    /// A single step (`PTRACE_SINGLESTEP`) would need one stop, but if pclive died afterwards the thread would go on stepping
    /// and be killed by the next trap: only `PTRACE_DETACH` ends that (`ptrace_disable`), not the tracer's death
    /// (`exit_ptrace` in kernel/ptrace.c).
    pub fn call<const N: usize>(&self, label: &str, number: i64, args: [u64; N]) -> Result<u64> {
        let mut all = [0; 6];
        all[..N].copy_from_slice(&args);
        let [rdi, rsi, rdx, r10, r8, r9] = all;
        self.tracee.set_registers(&Registers {
            rip: self.syscall.0.0,
            rax: number as u64,
            orig_rax: u64::MAX,
            rdi,
            rsi,
            rdx,
            r10,
            r8,
            r9,
            ..self.registers
        })?;
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
        let base = VirtAddr(self.call("mmap of the script arena", libc::SYS_mmap, args)?);
        let arena = Arena {
            range: PageRange::between(base, base.offset(len)),
            memory: ProcessMemory::open(self.tracee.tid())?,
        };
        arena.memory.write(base, interpreter())?;
        Ok(arena)
    }

    /// Unmaps an arena.
    pub fn unmap_arena(&self, arena: Arena) -> Result<()> {
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
        arena.memory.write(place.start, &script.assemble(place.start))?;
        self.tracee.set_registers(&Registers {
            rip: arena.range.start.0,
            rbx: place.start.0 + script.calls_offset() as u64,
            r12: script.calls.len() as u64,
            r13: place.start.0,
            rsp: place.end.0,
            orig_rax: u64::MAX,
            ..self.registers
        })?;
        self.tracee.resume(0)?;
        Ok(Running { arena, place, script })
    }

    /// Waits for the end of a script that was started. The thread is stopped or gone afterwards, also if this fails.
    pub(super) fn finish(&self, running: Running<'_>) -> Result<Outcome> {
        let children = self.wait_for_trap()?;
        self.outcome(running, children)
    }

    /// What a script has left behind that has come to its trap.
    fn outcome(&self, running: Running<'_>, children: Vec<HostPid>) -> Result<Outcome> {
        let Running { arena, place, script } = running;
        let left = self.tracee.registers()?.r12 as usize;
        let mut data = vec![0; script.size() - STACK_SIZE];
        arena.memory.read(place.start, &mut data)?;
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

    /// Gives the thread its registers and signal mask back. It stays stopped.
    pub fn give_back(self) -> Result<()> {
        self.tracee.set_registers(&self.registers)?;
        self.tracee.set_signal_mask(self.mask)
    }

    /// Gives the thread back after an errand, whether or not that has succeeded.
    pub(super) fn give_back_after<T>(self, done: Result<T>) -> Result<T> {
        let given_back = self.give_back();
        // If both have failed, this is the cause: the thread is gone, say.
        let done = done?;
        given_back.map(|()| done)
    }

    /// Waits until the interpreter comes to its trap; returns the processes and threads that were made on the way.
    fn wait_for_trap(&self) -> Result<Vec<HostPid>> {
        let mut children = Vec::new();
        loop {
            match self.tracee.wait()? {
                Stop::Signal(libc::SIGTRAP) => return Ok(children),
                Stop::Event(
                    libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK,
                ) => {
                    children.push(HostPid(self.tracee.event_message()? as i32));
                    self.tracee.resume(0)?;
                }
                Stop::Gone(_) => return Err(Error::Gone(self.tracee.tid())),
                stop => return Err(Error::UnexpectedStop { tid: self.tracee.tid(), stop }),
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

/// The error that a raw system call result stands for, if any.
fn failure(result: i64) -> Option<Errno> {
    (-4095..0).contains(&result).then(|| Errno::from_raw(-result as i32))
}
