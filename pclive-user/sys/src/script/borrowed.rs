//! Threads that lend themselves to injected calls, and the memory where their scripts are put.

use super::{CALL_SIZE, DATA_OFFSET, Expect, Outcome, Script, interpreter};
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

    /// Where a script's data and calls begin.
    fn image(&self) -> VirtAddr {
        self.range.start.offset(DATA_OFFSET as u64)
    }
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
        borrowed.give_back()?;
        done
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
        let mut image = self.load(arena, script)?;
        let children = self.run_to_trap()?;
        let left = self.tracee.registers()?.r12 as usize;
        arena.memory.read(arena.image(), &mut image)?;
        let calls = image.split_off(script.calls_offset() - DATA_OFFSET);
        let results: Vec<i64> = calls
            .chunks_exact(CALL_SIZE)
            .map(|call| i64::from_ne_bytes(call[56..64].try_into().expect("8 bytes")))
            .collect();
        match left {
            0 => Ok(Outcome { data: image, results, children }),
            _ => Err(self.script_error(script, &results, script.calls.len().saturating_sub(left))),
        }
    }

    /// Runs a script that ends with an exec, up to the moment when the new program is in place
    /// (`PTRACE_EVENT_EXEC`, which [`crate::ptrace::Seize::Skeleton`] asks for).
    pub fn run_to_exec(self, arena: &Arena, script: &Script) -> Result<()> {
        self.load(arena, script)?;
        self.tracee.resume(0)?;
        match self.tracee.wait()? {
            Stop::Event(libc::PTRACE_EVENT_EXEC) => Ok(()),
            Stop::Signal(libc::SIGTRAP) => {
                let left = self.tracee.registers()?.r12 as usize;
                let failed = script.calls.len().saturating_sub(left);
                let mut result = [0; 8];
                let at = script.calls_offset() + failed * CALL_SIZE + 56;
                arena.memory.read(arena.range.start.offset(at as u64), &mut result)?;
                let errno = failure(i64::from_ne_bytes(result)).unwrap_or(Errno::UnknownErrno);
                Err(Error::ScriptCall {
                    tid: self.tracee.tid(),
                    label: script.calls[failed].label.clone(),
                    errno,
                })
            }
            Stop::Gone(_) => Err(Error::Gone(self.tracee.tid())),
            stop => Err(Error::UnexpectedStop { tid: self.tracee.tid(), stop }),
        }
    }

    /// Puts a script into the arena and points the thread at it; returns the script's image.
    fn load(&self, arena: &Arena, script: &Script) -> Result<Vec<u8>> {
        let capacity = arena.range.bytes() as usize;
        if script.size() > capacity {
            return Err(Error::ScriptTooLarge { len: script.size(), capacity });
        }
        let base = arena.range.start;
        let image = script.assemble(base);
        arena.memory.write(arena.image(), &image)?;
        self.tracee.set_registers(&Registers {
            rip: base.0,
            rbx: base.0 + script.calls_offset() as u64,
            r12: script.calls.len() as u64,
            r13: base.0,
            rsp: arena.range.end().0 - 16,
            orig_rax: u64::MAX,
            ..self.registers
        })?;
        Ok(image)
    }

    /// Gives the thread its registers and signal mask back. It stays stopped.
    pub fn give_back(self) -> Result<()> {
        self.tracee.set_registers(&self.registers)?;
        self.tracee.set_signal_mask(self.mask)
    }

    /// Lets the interpreter run to its trap; returns the processes and threads that were made on the way.
    fn run_to_trap(&self) -> Result<Vec<HostPid>> {
        let mut children = Vec::new();
        loop {
            self.tracee.resume(0)?;
            match self.tracee.wait()? {
                Stop::Signal(libc::SIGTRAP) => return Ok(children),
                Stop::Event(
                    libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK,
                ) => {
                    children.push(HostPid(self.tracee.event_message()? as i32));
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
