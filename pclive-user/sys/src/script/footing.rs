//! Where a process makes injected calls.

use super::way_back::WayBack;
use crate::mem::ProcessMemory;
use crate::ptrace::Tracee;
use crate::registers::{SECTION_SIZE, SYSCALL_INSTRUCTION, out_of};
use crate::{Error, Result};
use pclive_wire::manifest::Registers;
use pclive_wire::{HostPid, PageRange, VirtAddr};
use std::sync::Arc;

/// Where a process has a `syscall` instruction.
#[derive(Clone, Copy, Debug)]
pub struct SyscallInstruction(pub(super) VirtAddr);

impl SyscallInstruction {
    /// Finds the one in the vDSO, mapped at `vdso`, so that nothing in the process needs to be overwritten.
    pub fn find(pid: HostPid, memory: &ProcessMemory, vdso: PageRange) -> Result<Self> {
        Self::find_in(pid, vdso, &read(memory, vdso)?)
    }

    fn find_in(pid: HostPid, vdso: PageRange, image: &[u8]) -> Result<Self> {
        let offset = image.windows(2).position(|bytes| bytes == SYSCALL_INSTRUCTION);
        offset.map(|offset| Self(vdso.start.offset(offset as u64))).ok_or(Error::NoSyscallInstruction(pid))
    }
}

fn read(memory: &ProcessMemory, vdso: PageRange) -> Result<Vec<u8>> {
    let mut image = vec![0; vdso.bytes() as usize];
    memory.read(vdso.start, &mut image)?;
    Ok(image)
}

/// Where a process of a container makes injected calls, so that its threads go on by themselves if pclive dies meanwhile.
#[derive(Debug)]
pub struct Footing {
    memory: Arc<ProcessMemory>,
    syscall: SyscallInstruction,
    way_back: Option<WayBack>,
    dispositions: Dispositions,
}

/// What a process does with signals.
#[derive(Clone, Copy, Debug)]
pub struct Dispositions {
    /// It has handlers for these.
    pub caught: u64,
    /// It is the first process of its pid namespace.
    pub is_init: bool,
}

impl Default for Dispositions {
    /// Nothing is known: all may be handled.
    fn default() -> Self {
        Self { caught: u64::MAX, is_init: false }
    }
}

impl Footing {
    /// Finds it in and behind the vDSO, mapped at `vdso`.
    pub fn find(pid: HostPid, memory: Arc<ProcessMemory>, vdso: PageRange) -> Result<Self> {
        let image = read(&memory, vdso)?;
        let syscall = SyscallInstruction::find_in(pid, vdso, &image)?;
        let way_back = WayBack::find(memory.clone(), vdso, &image);
        Ok(Self { memory, syscall, way_back, dispositions: Dispositions::default() })
    }

    /// What the process does with signals: until that is known, scripts are much slower.
    pub fn with_dispositions(self, dispositions: Dispositions) -> Self {
        Self { dispositions, ..self }
    }

    /// Besides the leader, how many threads can find their way back at the same time. `None` if none can, nor the leader: the
    /// vDSO leaves no room, or somebody else uses it. Then whoever makes a call when pclive dies is killed by its trap.
    pub fn most_members(&self) -> Option<usize> {
        self.way_back().map(WayBack::members)
    }

    pub(super) fn way_back(&self) -> Option<&WayBack> {
        self.way_back.as_ref().filter(|way_back| way_back.is_usable())
    }

    pub(super) fn syscall(&self) -> SyscallInstruction {
        self.syscall
    }

    pub(super) fn dispositions(&self) -> Dispositions {
        self.dispositions
    }

    /// Registers with which a stopped thread goes on after it has done something else.
    ///
    /// [`Error::Returning`] if it does so just now.
    pub(super) fn registers_of(&self, tracee: &Tracee) -> Result<Registers> {
        let registers = tracee.registers()?;
        if self.way_back.as_ref().is_some_and(|way_back| way_back.is_taken_by(&registers)) {
            return Err(Error::Returning(tracee.tid()));
        }
        // Kernels before 5.13 do not tell, and what cannot be read is nothing that the thread is in.
        let Ok(Some(rseq)) = tracee.rseq() else { return Ok(registers) };
        let mut section = [0; 8];
        let field = self.memory.read(rseq.address.offset(RSEQ_CS_OFFSET), &mut section);
        let address = VirtAddr(u64::from_ne_bytes(section));
        let mut section = [0; SECTION_SIZE];
        if field.is_err() || address.0 == 0 || self.memory.read(address, &mut section).is_err() {
            return Ok(registers);
        }
        Ok(out_of(section, registers))
    }
}

/// The address of the `struct rseq_cs`, in a `struct rseq`.
const RSEQ_CS_OFFSET: u64 = 8;

#[cfg(test)]
mod tests {
    use super::super::Borrowed;
    use super::super::killed::Fork;
    use super::super::sleeper::{NOTHING_CAUGHT, footing_of, stop};
    use crate::ptrace::Seize;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::{Duration, Instant};

    unsafe extern "C" {
        /// Where glibc (2.35) has a thread's `struct rseq`, from its thread pointer on.
        static __rseq_offset: isize;
    }

    /// Stays in a restartable sequence, and counts how often it is aborted.
    fn stay_in_a_sequence(aborted: &AtomicU64) -> ! {
        // SAFETY: it never returns. It writes the counter and this thread's own registration, which nobody else uses here.
        unsafe {
            std::arch::asm!(
                ".pushsection .data.rel.ro.pclive_sequence, \"aw\"",
                ".p2align 5",
                "5: .long 0, 0",
                ".quad 3f, 4f - 3f, 6f",
                ".popsection",
                "2: lea rax, [rip + 5b]",
                "mov fs:[rcx + 8], rax",
                "3: pause",
                "jmp 3b",
                "4: ud2",
                ".long 0x53053053", // RSEQ_SIG
                "6: lock inc qword ptr [rdi]",
                "jmp 2b",
                in("rcx") __rseq_offset,
                in("rdi") aborted,
                options(noreturn),
            )
        }
    }

    #[test]
    fn a_restartable_sequence_in_which_a_thread_is_stopped_is_aborted() {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh page of zeros that is never unmapped.
        let aborted = unsafe {
            let page =
                libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            assert_ne!(page, libc::MAP_FAILED);
            &*page.cast::<AtomicU64>()
        };
        let process = Fork::new(|| stay_in_a_sequence(aborted));
        let wait_for_more_than = |count| {
            let end = Instant::now() + Duration::from_secs(10);
            while aborted.load(Ordering::Relaxed) <= count {
                assert!(Instant::now() < end, "it goes on as if nothing had been");
                std::thread::yield_now();
            }
        };
        // By the kernel, when somebody else has got its processor.
        wait_for_more_than(0);
        for _ in 0..10 {
            let tracee = stop(process.pid, Seize::Source);
            let count = aborted.load(Ordering::Relaxed);
            Borrowed::lend(&tracee, &footing_of(process.pid, NOTHING_CAUGHT), |borrowed| {
                borrowed.call("getpid", libc::SYS_getpid, []).map(drop)
            })
            .unwrap();
            tracee.detach().unwrap();
            wait_for_more_than(count);
        }
    }
}
