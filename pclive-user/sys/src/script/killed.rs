//! What becomes of a process while its tracer is killed, again and again, whatever it does with it just then.

use super::sleeper::{NOTHING_CAUGHT, Sleeper, footing_of, sleeps, stop};
use super::{Arg, Borrowed, Dispositions, Script, run_all};
use crate::ptrace::{Seize, Tracee};
use crate::{Error, Result};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use pclive_wire::HostPid;
use pclive_wire::manifest::Registers;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, abort};
use std::time::{Duration, Instant};

/// What the victim ends with when it finds that something has been changed.
const CHANGED: i32 = 99;
/// What a tracer ends with that finds a thread still on its way back.
const RETURNING: i32 = 98;
/// How long it may take until a process is as it was.
const PATIENCE: Duration = Duration::from_secs(10);

/// A process that was forked from this one. It is killed when this is dropped.
pub(super) struct Fork {
    pub(super) pid: HostPid,
}

impl Fork {
    /// One that does `life`.
    pub(super) fn new(life: impl FnOnce()) -> Self {
        // SAFETY: the child is of a process with several threads, of which only this one is left in it. It allocates, which
        // glibc's fork sees to, and takes no other lock that another thread could have held.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // A panic must not go on into what this is a copy of.
            let _ = catch_unwind(AssertUnwindSafe(life));
            exit(CHANGED);
        }
        assert!(pid > 0, "fork");
        Self { pid: HostPid(pid) }
    }

    /// How it has ended, if it has. It keeps its id until this is dropped.
    fn ended(&self) -> Option<WaitStatus> {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        let status = waitid(Id::Pid(Pid::from_raw(self.pid.0)), flags).unwrap();
        Some(status).filter(|status| *status != WaitStatus::StillAlive)
    }

    fn wait(&self) -> WaitStatus {
        loop {
            match self.ended() {
                Some(status) => return status,
                None => std::thread::yield_now(),
            }
        }
    }

    /// Kills it. How it has ended.
    fn kill(self) -> WaitStatus {
        // SAFETY: takes two integers; the child keeps its id until it is dropped.
        unsafe { libc::kill(self.pid.0, libc::SIGKILL) };
        self.wait()
    }
}

impl Drop for Fork {
    fn drop(&mut self) {
        // SAFETY: both calls take integers. Only the owner of this waits for the child, so that its id is its own until then.
        unsafe {
            libc::kill(self.pid.0, libc::SIGKILL);
            libc::waitpid(self.pid.0, std::ptr::null_mut(), 0);
        }
    }
}

fn exit(status: i32) -> ! {
    // SAFETY: ends this process at once.
    unsafe { libc::_exit(status) }
}

extern "C" fn say_changed() -> ! {
    exit(CHANGED)
}

/// Checks without end that registers, flags and the red zone are what they were. With `sleeping` it does so around a system
/// call that the kernel restarts if it is interrupted.
fn watch_registers(sleeping: bool) -> ! {
    let short = libc::timespec { tv_sec: 0, tv_nsec: 50_000 };
    // SAFETY: it never returns, whatever registers it changes; its own stack is all the memory that it writes, and what it
    // reads lives on.
    unsafe {
        std::arch::asm!(
            "sub rsp, 256",
            "mov [rsp], rdi",
            "mov [rsp + 8], rsi",
            "mov rax, 0x1234567890abcdef",
            "mov [rsp - 64], rax",
            "movq xmm7, rax",
            "movq xmm15, rax",
            "mov rbx, 11",
            "mov rdx, 12",
            "mov rbp, 13",
            "mov r8, 14",
            "mov r9, 15",
            "mov r10, 16",
            "mov r12, 17",
            "mov r13, 18",
            "mov r14, 19",
            "mov r15, 20",
            "2:",
            "mov rcx, 21",
            "mov r11, 22",
            "mov rax, 35", // nanosleep
            "stc",
            "pause",
            "pause",
            "pause",
            "pause",
            "jnc 9f",
            "cmp rcx, 21; jne 9f",
            "cmp r11, 22; jne 9f",
            "cmp rax, 35; jne 9f",
            "cmp qword ptr [rsp + 8], 0",
            "je 3f",
            "mov rsi, 0",
            "syscall",
            "cmp rax, 0; jne 9f",
            "mov rsi, [rsp + 8]",
            "3:",
            "cmp rdi, [rsp]; jne 9f",
            "cmp rsi, [rsp + 8]; jne 9f",
            "mov rax, [rsp - 64]",
            "movq [rsp + 16], xmm7",
            "cmp rax, [rsp + 16]; jne 9f",
            "movq [rsp + 16], xmm15",
            "cmp rax, [rsp + 16]; jne 9f",
            "cmp rbx, 11; jne 9f",
            "cmp rdx, 12; jne 9f",
            "cmp rbp, 13; jne 9f",
            "cmp r8, 14; jne 9f",
            "cmp r9, 15; jne 9f",
            "cmp r10, 16; jne 9f",
            "cmp r12, 17; jne 9f",
            "cmp r13, 18; jne 9f",
            "cmp r14, 19; jne 9f",
            "cmp r15, 20",
            "je 2b",
            "9:",
            "call {changed}",
            "ud2",
            changed = sym say_changed,
            in("rdi") &raw const short,
            in("rsi") u64::from(sleeping),
            options(noreturn),
        )
    }
}

/// Has a handler run every millisecond, in the threads that do not block its signal. The calling thread does.
fn have_signals_handled() {
    extern "C" fn nothing(_: i32) {}
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    SigSet::from(Signal::SIGALRM).thread_block().unwrap();
    let millisecond = libc::timeval { tv_sec: 0, tv_usec: 1000 };
    let often = libc::itimerval { it_interval: millisecond, it_value: millisecond };
    // SAFETY: the handler does nothing; setitimer reads a value that lives on.
    unsafe {
        sigaction(Signal::SIGALRM, &action).unwrap();
        assert_eq!(libc::setitimer(libc::ITIMER_REAL, &raw const often, std::ptr::null_mut()), 0);
    }
}

/// What the victim's leader does.
#[derive(Clone, Copy, Debug)]
enum Leader {
    /// It waits in a system call for what it is told, and says it again.
    Echoes,
    /// It never makes a call.
    Spins,
    /// It sleeps again and again.
    Sleeps,
}

/// A process with three threads that notices what is done to it. One of them spins and handles signals meanwhile, one sleeps
/// and has blocked all.
struct Victim {
    process: Fork,
    voice: File,
    ear: File,
    before: Looks,
}

/// What is not to change: mappings, descriptors, and of each thread its blocked and pending signals and that it runs. And
/// how many bytes are mapped as only an arena is.
#[derive(Default)]
struct Looks {
    lines: Vec<String>,
    arenas: u64,
}

/// Bytes of the mapping in a line of `maps`.
fn size(line: &str) -> u64 {
    let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
    u64::from_str_radix(end, 16).unwrap() - u64::from_str_radix(start, 16).unwrap()
}

impl Victim {
    fn start(leader: Leader) -> Self {
        let ((heard, voice), (ear, said)) = (nix::unistd::pipe().unwrap(), nix::unistd::pipe().unwrap());
        let (mut heard, mut said) = (File::from(heard), File::from(said));
        let process = Fork::new(|| {
            have_signals_handled();
            for sleeping in [false, true] {
                let said = said.try_clone().unwrap();
                std::thread::spawn(move || {
                    if sleeping {
                        SigSet::all().thread_block().unwrap();
                    } else {
                        SigSet::from(Signal::SIGALRM).thread_unblock().unwrap();
                    }
                    nix::unistd::write(&said, b"x").unwrap();
                    watch_registers(sleeping)
                });
            }
            said.write_all(b"x").unwrap();
            let mut byte = [0];
            match leader {
                Leader::Spins => watch_registers(false),
                Leader::Sleeps => watch_registers(true),
                Leader::Echoes => loop {
                    let in_and_out = (heard.read(&mut byte), said.write(&byte));
                    if !matches!(in_and_out, (Ok(1), Ok(1))) {
                        exit(CHANGED);
                    }
                },
            }
        });
        let mut victim = Self { process, voice: voice.into(), ear: ear.into(), before: Looks::default() };
        victim.ear.read_exact(&mut [0; 3]).unwrap();
        victim.before = victim.look();
        victim
    }

    fn tids(&self) -> Vec<HostPid> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.process.pid)).unwrap();
        let mut tids: Vec<i32> =
            tasks.map(|task| task.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect();
        tids.sort();
        tids.into_iter().map(HostPid).collect()
    }

    fn look(&self) -> Looks {
        const OF_THREAD: [&str; 3] = ["SigBlk", "SigPnd", "TracerPid"];
        let pid = self.process.pid;
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let (arenas, others): (Vec<&str>, Vec<&str>) = maps.lines().partition(|line| line.contains(" rwxp "));
        let mut lines: Vec<String> = others.into_iter().map(str::to_owned).collect();
        lines.push(format!("{} descriptors", fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()));
        for tid in self.tids() {
            let status = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).unwrap();
            let wanted = |line: &&str| OF_THREAD.iter().any(|name| line.starts_with(name));
            lines.extend(status.lines().filter(wanted).map(|line| format!("{tid}: {line}")));
            let stands = status.contains("(stopped)") || status.contains("(tracing stop)");
            lines.push(format!("{tid} {}", if stands { "stands still" } else { "runs" }));
        }
        Looks { lines, arenas: arenas.into_iter().map(size).sum() }
    }

    /// Waits until it is as it was. Whether it is, but for an arena that has stayed.
    fn check(&mut self, leader: Leader) -> bool {
        let end = Instant::now() + PATIENCE;
        let mut had_arena = false;
        loop {
            assert_eq!(self.process.ended(), None, "the victim has ended");
            let now = self.look();
            // Whether the leader is back, who unmaps it, is looked for after the mappings are.
            let has_arena = now.arenas > self.before.arenas;
            let is_back = now.lines == self.before.lines;
            if is_back && has_arena == had_arena {
                self.before = now;
                self.answer(leader);
                return !has_arena;
            }
            had_arena = is_back && has_arena;
            assert!(Instant::now() < end, "{:#?}\nbefore: {:#?}", now.lines, self.before.lines);
            std::thread::yield_now();
        }
    }

    fn answer(&mut self, leader: Leader) {
        if matches!(leader, Leader::Echoes) {
            self.voice.write_all(b"x").unwrap();
            self.ear.read_exact(&mut [0]).unwrap();
        }
    }

    /// What pclive does to attach.
    fn have_a_descriptor_opened(&self) -> Result<()> {
        let leader = stop(self.process.pid, Seize::Source);
        Borrowed::lend(&leader, &footing_of(self.process.pid, NOTHING_CAUGHT), |borrowed| {
            let fd = borrowed.open("eventfd2", libc::SYS_eventfd2, [0, 0])?;
            borrowed.call("close", libc::SYS_close, [fd as u64])
        })?;
        leader.detach()
    }

    /// What it does to ask all threads, and what it has in the end: the threads, which still stand still.
    fn run_scripts(&self, dispositions: Dispositions) -> Result<Vec<Tracee>> {
        let tracees: Vec<Tracee> = self.tids().into_iter().map(|tid| stop(tid, Seize::Source)).collect();
        let mut script = Script::new();
        let room = script.room(24);
        for _ in 0..10 {
            let args: [Arg; 2] = [0.into(), room.into()];
            script.call("sigaltstack", libc::SYS_sigaltstack, args);
        }
        let members: Vec<_> = tracees[1..].iter().map(|tracee| (tracee, &script)).collect();
        Borrowed::lend(&tracees[0], &footing_of(self.process.pid, dispositions), |leader| {
            leader.with_arena(1 << 16, |arena| run_all(arena, (leader, &script), &members).map(drop))
        })?;
        Ok(tracees)
    }
}

/// Has a process do `work` with a victim again and again until it is killed, after ever other times.
fn kill_again_and_again(leader: Leader, work: impl Fn(&Victim) -> Result<()>) {
    const TIMES: u32 = 150;
    /// That often it is longer than the work takes.
    const STEP: Duration = Duration::from_nanos(8_767);
    let mut victim = Victim::start(leader);
    let mut arenas_left = 0;
    for i in 0..TIMES {
        // A thread may still come back from the time before.
        while !is_killed_at_work(&victim, &work, i * STEP) {
            std::thread::yield_now();
        }
        arenas_left += u32::from(!victim.check(leader));
    }
    assert!(arenas_left < TIMES / 20, "of {TIMES} times an arena has stayed {arenas_left} times");
}

/// Has a process do `work` again and again and kills it after that time. Not if it has ended because a thread could not be
/// borrowed.
fn is_killed_at_work(victim: &Victim, work: &impl Fn(&Victim) -> Result<()>, after: Duration) -> bool {
    let (mut started, starting) = nix::unistd::pipe().map(|(a, b)| (File::from(a), b)).unwrap();
    let tracer = Fork::new(|| {
        nix::unistd::write(&starting, b"x").unwrap();
        loop {
            match work(victim) {
                Ok(()) => {}
                Err(Error::Returning(_)) => exit(RETURNING),
                Err(error) => panic!("{error}"),
            }
        }
    });
    started.read_exact(&mut [0]).unwrap();
    let start = Instant::now();
    while start.elapsed() < after {
        std::hint::spin_loop();
    }
    match tracer.kill() {
        WaitStatus::Signaled(_, Signal::SIGKILL, _) => true,
        WaitStatus::Exited(_, RETURNING) => false,
        other => panic!("its work has failed: {other:?}"),
    }
}

fn let_go(tracees: Vec<Tracee>) -> Result<()> {
    tracees.into_iter().try_for_each(Tracee::detach)
}

#[test]
fn a_process_in_which_descriptors_are_opened() {
    for leader in [Leader::Echoes, Leader::Spins, Leader::Sleeps] {
        kill_again_and_again(leader, Victim::have_a_descriptor_opened);
    }
}

#[test]
fn a_process_whose_threads_run_scripts() {
    for leader in [Leader::Echoes, Leader::Spins, Leader::Sleeps] {
        kill_again_and_again(leader, |victim| let_go(victim.run_scripts(NOTHING_CAUGHT)?));
    }
}

#[test]
fn a_process_whose_scripts_are_followed() {
    kill_again_and_again(Leader::Echoes, |victim| let_go(victim.run_scripts(Dispositions::default())?));
}

/// Has a process do `work`, of which it dies.
fn dies_at(work: impl FnOnce()) {
    let status = Fork::new(work).wait();
    assert!(matches!(status, WaitStatus::Signaled(_, Signal::SIGABRT, _)), "its work has failed: {status:?}");
}

/// Has a process borrow the leader of another one for an `errand`, of which it dies.
fn dies_at_errand(
    leader: HostPid,
    dispositions: Dispositions,
    errand: impl FnOnce(&Borrowed<'_>) -> Result<()>,
) {
    dies_at(|| {
        let leader = stop(leader, Seize::Source);
        Borrowed::lend(&leader, &footing_of(leader.tid(), dispositions), errand).unwrap();
    });
}

#[test]
fn what_was_left_behind_does_not_prevent_the_next_time() {
    let mut victim = Victim::start(Leader::Echoes);
    dies_at_errand(victim.process.pid, NOTHING_CAUGHT, |_| abort());
    assert!(victim.check(Leader::Echoes));
    let_go(victim.run_scripts(NOTHING_CAUGHT).unwrap()).unwrap();
    assert!(victim.check(Leader::Echoes));
}

#[test]
fn an_arena_is_unmapped_whatever_was_called_last() {
    let mut victim = Victim::start(Leader::Echoes);
    dies_at_errand(victim.process.pid, NOTHING_CAUGHT, |borrowed| {
        borrowed.with_arena(1 << 16, |_| {
            borrowed.call("getpid", libc::SYS_getpid, [])?;
            abort()
        })
    });
    assert!(victim.check(Leader::Echoes));
}

#[test]
fn a_process_that_has_been_given_back_but_not_let_go() {
    let mut victim = Victim::start(Leader::Echoes);
    dies_at(|| {
        let _standing_still = victim.run_scripts(NOTHING_CAUGHT).unwrap();
        abort();
    });
    assert!(victim.check(Leader::Echoes));
}

#[test]
fn a_thread_that_is_on_its_way_back_is_not_borrowed() {
    let mut victim = Victim::start(Leader::Spins);
    let footing = footing_of(victim.process.pid, NOTHING_CAUGHT);
    let leader = stop(victim.process.pid, Seize::Source);
    let registers = leader.registers().unwrap();
    let on_its_way = Registers { rip: footing.way_back().unwrap().back().0, ..registers };
    leader.set_registers(&on_its_way).unwrap();
    let error = Borrowed::lend(&leader, &footing, |_| -> Result<()> { Ok(()) }).unwrap_err();
    assert!(matches!(error, Error::Returning(tid) if tid == leader.tid()), "{error}");
    assert_eq!(leader.registers().unwrap(), on_its_way);
    leader.set_registers(&registers).unwrap();
    leader.detach().unwrap();
    assert!(victim.check(Leader::Spins));
}

#[test]
fn the_init_of_a_container_that_handles_most_signals_is_not_stopped_by_its_own() {
    let mut command = Command::new("unshare");
    let unshare = command.args(["--pid", "--fork", "--kill-child", "sleep", "1000"]).spawn();
    let (unshare, end) = (Sleeper(unshare.unwrap()), Instant::now() + PATIENCE);
    let children = format!("/proc/{0}/task/{0}/children", unshare.0.id());
    let read = |path: String| fs::read_to_string(path).unwrap_or_default();
    let init = loop {
        let child = read(children.clone()).trim().parse().ok().map(HostPid);
        if let Some(init) = child.filter(|&child| sleeps(child)) {
            break init;
        }
        assert!(Instant::now() < end, "it does not start");
        std::thread::yield_now();
    };
    let dispositions = Dispositions { caught: !(1 << (libc::SIGTTIN - 1)), is_init: true };
    let script = Script::new();
    dies_at_errand(init, dispositions, |borrowed| {
        borrowed.with_arena(1 << 16, |arena| {
            let _running = borrowed.start(arena, arena.room().place(&script)?, &script)?;
            // A stop that nobody has waited for: the kernel delivers the signal when the tracer dies.
            while !read(format!("/proc/{init}/status")).contains("State:\tt") {
                std::thread::yield_now();
            }
            abort()
        })
    });
    let status = || read(format!("/proc/{init}/status"));
    while !status().contains("State:\tS") {
        assert!(Instant::now() < end, "{}", status());
        std::thread::yield_now();
    }
    assert!(!read(format!("/proc/{init}/maps")).contains("rwxp"));
}
