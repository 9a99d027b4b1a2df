//! Stopping, reading and steering threads with `ptrace(2)`.
//!
//! The kernel lets only the thread that attached make requests, so a [`Tracee`] cannot move to another thread. When that
//! thread dies, the kernel detaches every tracee and lets it run: a killed pclive leaves a running container behind.

use crate::{Error, Result, check};
use pclive_wire::manifest::{Registers, Rseq};
use pclive_wire::{HostPid, VirtAddr};
use std::collections::HashSet;
use std::marker::PhantomData;

const _: () = assert!(size_of::<libc::user_regs_struct>() == size_of::<Registers>());

/// The register set of the extended state (`linux/elf.h`), which libc lacks.
const NT_X86_XSTATE: i32 = 0x202;
/// `PTRACE_GET_RSEQ_CONFIGURATION` of `linux/ptrace.h`, which libc lacks.
const GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;

/// `struct ptrace_rseq_configuration`.
#[repr(C)]
#[derive(Default)]
struct RseqConfiguration {
    pointer: u64,
    size: u32,
    signature: u32,
    flags: u32,
    pad: u32,
}

const _: () = assert!(size_of::<RseqConfiguration>() == 24);

/// What became of a tracee when it was waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// `PTRACE_EVENT_STOP`: by [`Tracee::interrupt`], or the first stop of an auto-attached child.
    Trap,
    /// `PTRACE_EVENT_STOP` of a process that a signal has stopped, or is just stopping (a group stop).
    Group,
    /// About to receive this signal.
    Signal(i32),
    /// Entry to or exit from a system call.
    Syscall,
    /// `PTRACE_EVENT_*` other than a stop (clone, exec …).
    Event(i32),
    /// The thread is gone: exit status as `wait(2)` gives it.
    Gone(i32),
}

/// Options for [`Tracee::seize`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seize {
    /// A thread of the container at the source: only its own stops matter.
    Source,
    /// A process of the skeleton: its children and threads are attached before they run, and die with pclive.
    Skeleton,
}

/// A thread attached with `PTRACE_SEIZE` (Linux 3.4).
#[derive(Debug)]
pub struct Tracee {
    tid: HostPid,
    /// Requests are valid from the attaching thread only.
    _not_send: PhantomData<*const ()>,
}

impl Tracee {
    /// Attaches to a running thread without stopping it. Its seccomp filter is suspended for injected calls where the
    /// kernel allows that (`PTRACE_O_SUSPEND_SECCOMP`, Linux 4.3, `CAP_SYS_ADMIN`).
    pub fn seize(tid: HostPid, purpose: Seize) -> Result<Self> {
        let mut options = libc::PTRACE_O_TRACESYSGOOD;
        if purpose == Seize::Skeleton {
            options |= libc::PTRACE_O_TRACECLONE
                | libc::PTRACE_O_TRACEFORK
                | libc::PTRACE_O_TRACEVFORK
                | libc::PTRACE_O_TRACEEXEC
                | libc::PTRACE_O_EXITKILL;
        }
        let with_seccomp = options | libc::PTRACE_O_SUSPEND_SECCOMP;
        request("PTRACE_SEIZE", libc::PTRACE_SEIZE, tid, 0, with_seccomp as usize)
            .or_else(|_| request("PTRACE_SEIZE", libc::PTRACE_SEIZE, tid, 0, options as usize))?;
        Ok(Self::attached(tid))
    }

    /// A thread that the kernel attached by itself because its creator is traced.
    pub fn auto_attached(tid: HostPid) -> Self {
        Self::attached(tid)
    }

    fn attached(tid: HostPid) -> Self {
        Self { tid, _not_send: PhantomData }
    }

    /// The thread, as this host numbers it.
    pub fn tid(&self) -> HostPid {
        self.tid
    }

    /// Asks the thread to stop; [`Tracee::wait_trap`] tells when it has.
    pub fn interrupt(&self) -> Result<()> {
        request("PTRACE_INTERRUPT", libc::PTRACE_INTERRUPT, self.tid, 0, 0).map(drop)
    }

    /// Waits for the next stop or the end of the thread.
    pub fn wait(&self) -> Result<Stop> {
        let mut status = 0;
        loop {
            // SAFETY: `status` is a valid place for the result.
            let got = unsafe { libc::waitpid(self.tid.0, &mut status, libc::__WALL) };
            match check("waitpid", self.tid, got.into()) {
                Ok(_) => return Ok(classify(status)),
                Err(e) if e.errno() == Some(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Waits until the thread has stopped after [`Tracee::interrupt`]. Signals that arrive meanwhile are delivered, and
    /// the interrupt is asked for again, because any stop uses it up. Whether a signal has stopped its process, too.
    pub fn wait_trap(&self) -> Result<bool> {
        loop {
            match self.wait()? {
                Stop::Trap => return Ok(false),
                Stop::Group => return Ok(true),
                Stop::Signal(signal) => {
                    self.interrupt()?;
                    self.resume(signal)?;
                }
                Stop::Syscall | Stop::Event(_) => {
                    self.interrupt()?;
                    self.resume(0)?;
                }
                Stop::Gone(_) => return Err(Error::Gone(self.tid)),
            }
        }
    }

    /// Lets the thread run on, delivering `signal` if not 0.
    pub fn resume(&self, signal: i32) -> Result<()> {
        request("PTRACE_CONT", libc::PTRACE_CONT, self.tid, 0, signal as usize).map(drop)
    }

    /// Lets the thread run on to the next entry to or exit from a system call.
    pub fn resume_to_syscall(&self) -> Result<()> {
        request("PTRACE_SYSCALL", libc::PTRACE_SYSCALL, self.tid, 0, 0).map(drop)
    }

    /// Takes back [`Seize::Skeleton`]: if pclive dies from here on, the stopped thread runs on, and what it makes is not
    /// attached.
    pub fn outlive_tracer(&self) -> Result<()> {
        let options = libc::PTRACE_O_TRACESYSGOOD;
        request("PTRACE_SETOPTIONS", libc::PTRACE_SETOPTIONS, self.tid, 0, options as usize).map(drop)
    }

    /// Ends the attachment; the thread runs on.
    pub fn detach(self) -> Result<()> {
        request("PTRACE_DETACH", libc::PTRACE_DETACH, self.tid, 0, 0).map(drop)
    }

    /// General registers of the stopped thread.
    pub fn registers(&self) -> Result<Registers> {
        let mut raw = [0u8; size_of::<Registers>()];
        self.get_regset(libc::NT_PRSTATUS, &mut raw)?;
        Ok(decode_registers(&raw))
    }

    /// Sets the general registers of the stopped thread.
    pub fn set_registers(&self, registers: &Registers) -> Result<()> {
        self.set_regset(libc::NT_PRSTATUS, &mut encode_registers(registers))
    }

    /// The extended state (`NT_X86_XSTATE`): x87, SSE, AVX and whatever else the CPU has, verbatim.
    pub fn xstate(&self) -> Result<Vec<u8>> {
        let mut buffer = vec![0u8; 32 * 1024];
        let len = self.get_regset(NT_X86_XSTATE, &mut buffer)?;
        buffer.truncate(len);
        Ok(buffer)
    }

    /// Sets the extended state. `EINVAL` or `EFAULT` if the size or the features are not this CPU's.
    pub fn set_xstate(&self, xstate: &[u8]) -> Result<()> {
        self.set_regset(NT_X86_XSTATE, &mut xstate.to_vec())
    }

    /// Blocked signals (`PTRACE_GETSIGMASK`, Linux 3.11).
    pub fn signal_mask(&self) -> Result<u64> {
        let mut mask = 0u64;
        request("PTRACE_GETSIGMASK", libc::PTRACE_GETSIGMASK, self.tid, 8, (&raw mut mask) as usize)?;
        Ok(mask)
    }

    /// Sets the blocked signals.
    pub fn set_signal_mask(&self, mask: u64) -> Result<()> {
        request("PTRACE_SETSIGMASK", libc::PTRACE_SETSIGMASK, self.tid, 8, (&raw const mask) as usize)
            .map(drop)
    }

    /// Pending signals as raw `siginfo_t`s: the whole process's if `shared`, else this thread's
    /// (`PTRACE_PEEKSIGINFO`, Linux 3.10).
    pub fn pending_signals(&self, shared: bool) -> Result<Vec<Vec<u8>>> {
        const BATCH: usize = 32;
        let mut pending = Vec::new();
        loop {
            let args = libc::ptrace_peeksiginfo_args {
                off: pending.len() as u64,
                flags: if shared { libc::PTRACE_PEEKSIGINFO_SHARED } else { 0 },
                nr: BATCH as i32,
            };
            let mut batch = [[0u8; SIGINFO_SIZE]; BATCH];
            let got = request(
                "PTRACE_PEEKSIGINFO",
                libc::PTRACE_PEEKSIGINFO,
                self.tid,
                (&raw const args) as usize,
                (&raw mut batch) as usize,
            )?;
            pending.extend(batch[..got as usize].iter().map(|info| info.to_vec()));
            if (got as usize) < BATCH {
                return Ok(pending);
            }
        }
    }

    /// Which signals are pending: for the whole process if `shared`, else for this thread.
    pub fn pending_mask(&self, shared: bool) -> Result<u64> {
        let number = |info: Vec<u8>| i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
        let pending = self.pending_signals(shared)?;
        Ok(pending.into_iter().map(number).fold(0, |mask, signal| mask | 1 << (signal - 1)))
    }

    /// The thread's restartable-sequences registration, if it has one (Linux 5.13).
    pub fn rseq(&self) -> Result<Option<Rseq>> {
        let mut raw = RseqConfiguration::default();
        let (size, place) = (size_of_val(&raw), (&raw mut raw) as usize);
        request("PTRACE_GET_RSEQ_CONFIGURATION", GET_RSEQ_CONFIGURATION, self.tid, size, place)?;
        Ok((raw.pointer != 0).then_some(Rseq {
            address: VirtAddr(raw.pointer),
            size: raw.size,
            signature: raw.signature,
            flags: raw.flags,
        }))
    }

    /// The host's id of the process or thread that a clone event announced.
    pub fn event_message(&self) -> Result<u64> {
        let mut message = 0u64;
        request("PTRACE_GETEVENTMSG", libc::PTRACE_GETEVENTMSG, self.tid, 0, (&raw mut message) as usize)?;
        Ok(message)
    }

    fn get_regset(&self, set: i32, buffer: &mut [u8]) -> Result<usize> {
        let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        request("PTRACE_GETREGSET", libc::PTRACE_GETREGSET, self.tid, set as usize, (&raw mut iov) as usize)?;
        Ok(iov.iov_len)
    }

    fn set_regset(&self, set: i32, buffer: &mut [u8]) -> Result<()> {
        let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        request("PTRACE_SETREGSET", libc::PTRACE_SETREGSET, self.tid, set as usize, (&raw mut iov) as usize)
            .map(drop)
    }
}

/// Kills the processes of these threads and waits until each thread is gone: a traced one that is not waited for stays,
/// and keeps its process and its pid namespace from ending. They go in an order that only the kernel knows (the last
/// thread of a namespace's init waits for all others), so whichever is gone is taken.
pub fn kill_all(tracees: Vec<Tracee>) {
    for tracee in &tracees {
        // SAFETY: kill takes two integers. It fails only for a thread that is gone, or is not a leader and dies with it.
        unsafe { libc::kill(tracee.tid.0, libc::SIGKILL) };
    }
    let mut left: HashSet<i32> = tracees.iter().map(|tracee| tracee.tid.0).collect();
    while !left.is_empty() {
        let mut status = 0;
        // SAFETY: `status` is a valid place for the result. Only children and tracees of this thread are waited for.
        let got = unsafe { libc::waitpid(-1, &mut status, libc::__WALL | libc::__WNOTHREAD) };
        match got {
            -1 if nix::errno::Errno::last() != nix::errno::Errno::EINTR => return, // ECHILD: nothing is left
            tid if matches!(classify(status), Stop::Gone(_)) => {
                left.remove(&tid);
            }
            _ => {}
        }
    }
}

/// Bytes in a `siginfo_t`.
pub const SIGINFO_SIZE: usize = 128;
const _: () = assert!(size_of::<libc::siginfo_t>() == SIGINFO_SIZE);

fn classify(status: i32) -> Stop {
    if !libc::WIFSTOPPED(status) {
        return Stop::Gone(status);
    }
    let signal = libc::WSTOPSIG(status);
    match status >> 16 {
        libc::PTRACE_EVENT_STOP if signal == libc::SIGTRAP => Stop::Trap,
        libc::PTRACE_EVENT_STOP => Stop::Group,
        0 if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
        0 => Stop::Signal(signal),
        event => Stop::Event(event),
    }
}

fn request(name: &'static str, request: libc::c_uint, tid: HostPid, addr: usize, data: usize) -> Result<i64> {
    // SAFETY: every caller in this module passes, where the request takes a pointer, one to a live value of the size that
    // the request reads or writes; the kernel touches no other memory of ours.
    let result = unsafe { libc::ptrace(request, tid.0, addr, data) };
    check(name, tid, result)
}

fn encode_registers(r: &Registers) -> [u8; size_of::<Registers>()] {
    let words = [
        r.r15, r.r14, r.r13, r.r12, r.rbp, r.rbx, r.r11, r.r10, r.r9, r.r8, r.rax, r.rcx, r.rdx, r.rsi,
        r.rdi, r.orig_rax, r.rip, r.cs, r.eflags, r.rsp, r.ss, r.fs_base, r.gs_base, r.ds, r.es, r.fs, r.gs,
    ];
    let mut raw = [0u8; size_of::<Registers>()];
    for (bytes, word) in raw.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    raw
}

fn decode_registers(raw: &[u8; size_of::<Registers>()]) -> Registers {
    let mut words =
        raw.chunks_exact(8).map(|bytes| u64::from_ne_bytes(bytes.try_into().expect("chunks of 8")));
    let mut next = || words.next().expect("one word for each register");
    Registers {
        r15: next(),
        r14: next(),
        r13: next(),
        r12: next(),
        rbp: next(),
        rbx: next(),
        r11: next(),
        r10: next(),
        r9: next(),
        r8: next(),
        rax: next(),
        rcx: next(),
        rdx: next(),
        rsi: next(),
        rdi: next(),
        orig_rax: next(),
        rip: next(),
        cs: next(),
        eflags: next(),
        rsp: next(),
        ss: next(),
        fs_base: next(),
        gs_base: next(),
        ds: next(),
        es: next(),
        fs: next(),
        gs: next(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    /// Has a thread stop a process that sleeps, and end as a killed pclive would; `prepare` comes before. Returns the state
    /// (proc_pid_stat(5)) that the process comes to: `expected`, or what it is after a while.
    fn after_the_tracers_death(purpose: Seize, prepare: fn(&Tracee), expected: char) -> char {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = HostPid(child.id() as i32);
        let state = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            stat.rsplit(") ").next().unwrap().chars().next().unwrap()
        };
        let trace = move || {
            let tracee = Tracee::seize(pid, purpose).unwrap();
            tracee.interrupt().unwrap();
            tracee.wait_trap().unwrap();
            prepare(&tracee);
        };
        std::thread::spawn(trace).join().unwrap();
        let end = Instant::now() + Duration::from_secs(5);
        let state = loop {
            let state = state();
            if state == expected || Instant::now() > end {
                break state;
            }
            std::thread::yield_now();
        };
        child.kill().unwrap();
        child.wait().unwrap();
        state
    }

    fn nothing(_: &Tracee) {}

    #[test]
    fn a_process_at_the_source_runs_on_when_its_tracer_dies() {
        assert_eq!(after_the_tracers_death(Seize::Source, nothing, 'S'), 'S');
        let stop = |tracee: &Tracee| {
            // SAFETY: kill takes two integers.
            unsafe { libc::kill(tracee.tid().0, libc::SIGSTOP) };
            tracee.resume(0).unwrap();
            assert_eq!(tracee.wait().unwrap(), Stop::Signal(libc::SIGSTOP));
            tracee.resume(libc::SIGSTOP).unwrap();
            assert_eq!(tracee.wait().unwrap(), Stop::Group);
        };
        assert_eq!(after_the_tracers_death(Seize::Source, stop, 'T'), 'T', "it was stopped before");
    }

    #[test]
    fn a_process_of_a_skeleton_dies_with_its_tracer_until_it_may_outlive_it() {
        assert_eq!(after_the_tracers_death(Seize::Skeleton, nothing, 'Z'), 'Z');
        let outlive = |tracee: &Tracee| tracee.outlive_tracer().unwrap();
        assert_eq!(after_the_tracers_death(Seize::Skeleton, outlive, 'S'), 'S');
    }

    #[test]
    fn registers_survive_encoding() {
        let registers = Registers { r15: 1, rip: 2, gs: 3, orig_rax: u64::MAX, ..Registers::default() };
        assert_eq!(decode_registers(&encode_registers(&registers)), registers);
    }
}
