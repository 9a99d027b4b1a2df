//! What belongs to a whole process: signal actions, timers, limits, bounds of the address space.

use super::SourceProcess;
use super::descriptors::{self, Descriptor};
use super::proc::{self, ProcError, Stat, Status};
use super::threads::{self, StoppedProcess, StoppedThread, ThreadError, capture_threads};
use super::vmas::{FlagSource, VmaError, VmaReader, changed_flags};
use nix::errno::Errno;
use nix::sched::CpuSet;
use pclive_sys::mem::ProcessMemory;
use pclive_sys::script::{
    Arena, Arg, Borrowed, CallRef, DataRef, Dispositions, Expect, Footing, Outcome, Script, run_all,
};
use pclive_wire::manifest::{
    Backing, FdEntry, ItimerSpec, MmBounds, PosixTimer, Process, ProcessState, SigAction, SpecialMapping,
    Thread, Vma,
};
use pclive_wire::{HostPid, NsPid, PageRange, VirtAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Room for the scripts of capture, in bytes: for as many threads as answer at the same time. What they do not fill costs
/// nothing; what they fill counts as memory of the container, which may be near its limit.
const ARENA_SIZE: u64 = 256 * 1024;
/// Highest signal number.
const SIGNALS: usize = 64;
/// Number of `RLIMIT_*` resources.
const LIMITS: usize = 16;
/// Bytes of the kernel's `struct sigaction` on x86-64.
const SIGACTION_SIZE: usize = 32;
/// How often a layout is read that an `execve(2)` may spoil.
const LAYOUT_ATTEMPTS: u32 = 50;
/// An `execve(2)` takes about as long as this.
const BETWEEN_LAYOUT_ATTEMPTS: Duration = Duration::from_micros(300);

/// Why the state of a process could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// Its threads.
    #[error(transparent)]
    Thread(#[from] ThreadError),
    /// Its mappings.
    #[error(transparent)]
    Vma(#[from] VmaError),
    /// A kernel interface said no.
    #[error(transparent)]
    Sys(#[from] pclive_sys::Error),
    /// A file under `/proc`.
    #[error(transparent)]
    Proc(#[from] ProcError),
    /// A file under `/proc` says something unknown.
    #[error("cannot understand {path}: {line:?}")]
    Parse {
        /// Which.
        path: PathBuf,
        /// What it says.
        line: String,
    },
    /// The vDSO is missing, so no call can be injected.
    #[error("process {0} has no vDSO")]
    NoVdso(HostPid),
    /// Its layout was never that of one program.
    #[error("process {0} executes one program after the other")]
    Executing(HostPid),
}

/// Where the vDSO of a process is.
pub fn vdso(vmas: &[Vma]) -> Option<PageRange> {
    vmas.iter().find(|vma| vma.backing == Backing::Special(SpecialMapping::Vdso)).map(|vma| vma.range)
}

/// Opens memory of a process and finds out, by its vDSO, where it makes calls.
pub fn prepare_injection(
    pid: HostPid,
    vdso: Option<PageRange>,
) -> Result<(Arc<ProcessMemory>, Footing), ProcessError> {
    let memory = Arc::new(ProcessMemory::open(pid)?);
    let footing = Footing::find(pid, memory.clone(), vdso.ok_or(ProcessError::NoVdso(pid))?)?;
    if footing.most_members().is_none() {
        tracing::debug!(
            "process {pid} dies if pclive is killed while it makes calls: there is no room behind its vDSO"
        );
    }
    Ok((memory, footing))
}

/// The layout of a process that runs, and may execute another program meanwhile.
///
/// In the midst of `execve(2)` the address space is not complete yet: the bounds of the program are set last
/// (`load_elf_binary` in fs/binfmt_elf.c). And what is read before and after it does not belong together.
pub fn capture_running_layout(
    process: &SourceProcess,
    parent: NsPid,
    threads: &[Thread],
    vmas: &mut VmaReader,
) -> Result<Process, ProcessError> {
    let pid = process.pid;
    let fd_size = Status::of_process(pid)?.fd_size;
    for _ in 0..LAYOUT_ATTEMPTS {
        let read = || Ok(vmas.read()?.to_vec());
        let layout = capture_layout(process, parent, threads.to_vec(), fd_size, read)?;
        let stat = Stat::of(pid)?;
        let bounds = (stat.start_code, stat.start_stack, stat.arg_start);
        let mm = &layout.mm;
        if stat.start_code != 0 && bounds == (mm.start_code.0, mm.start_stack.0, mm.arg_start.0) {
            return Ok(layout);
        }
        std::thread::sleep(BETWEEN_LAYOUT_ATTEMPTS);
    }
    Err(ProcessError::Executing(pid))
}

/// The layout of a process: everything that can be read without stopping it. Its mappings are what `read_vmas` reads.
pub fn capture_layout(
    process: &SourceProcess,
    parent: NsPid,
    threads: Vec<Thread>,
    fd_size: u32,
    read_vmas: impl FnOnce() -> Result<Vec<Vma>, ProcessError>,
) -> Result<Process, ProcessError> {
    let pid = process.pid;
    let exe = proc::link(&format!("{pid}/exe"))?;
    let stat = Stat::of(pid)?;
    let vmas = read_vmas()?;
    let start_brk = VirtAddr(stat.start_brk);
    let mm = MmBounds {
        start_code: VirtAddr(stat.start_code),
        end_code: VirtAddr(stat.end_code),
        start_data: VirtAddr(stat.start_data),
        end_data: VirtAddr(stat.end_data),
        start_brk,
        brk: heap_end(&vmas, start_brk),
        start_stack: VirtAddr(stat.start_stack),
        arg_start: VirtAddr(stat.arg_start),
        arg_end: VirtAddr(stat.arg_end),
        env_start: VirtAddr(stat.env_start),
        env_end: VirtAddr(stat.env_end),
        auxv: proc::read(&format!("{pid}/auxv"))?,
    };
    Ok(Process {
        pid: process.ns_pid,
        ppid: parent,
        pgid: process.pgid,
        sid: process.sid,
        exe,
        mm,
        vmas,
        threads,
        fd_size,
        state: None,
    })
}

/// The break is not shown under /proc: in a running process it is taken to be the end of the heap's mapping.
fn heap_end(vmas: &[Vma], start_brk: VirtAddr) -> VirtAddr {
    let heap =
        vmas.iter().rev().find(|vma| vma.range.start <= start_brk.page_ceil() && start_brk < vma.range.end());
    heap.map_or(start_brk, |vma| vma.range.end())
}

/// Adds to the `layout` of a stopped process everything that it lacks, apart from the descriptor table, of which it returns
/// what the process says of its numbers, unless that were too dear to ask. Nothing stays in the process, also on failure. `unbound` is what the kernel says of the processors of
/// threads that are bound to none. Of mappings whose flags `flags` tells the flags are those of now.
pub fn capture_stopped(
    mut layout: Process,
    stopped: &StoppedProcess,
    unbound: &[CpuSet],
    mut flags: Option<&mut dyn FlagSource>,
) -> Result<(Process, Option<Vec<Descriptor>>), ProcessError> {
    let (memory, footing) = footing_of(stopped, vdso(&layout.vmas))?;
    if let Some(flags) = &mut flags {
        let starts: Vec<VirtAddr> = layout.vmas.iter().map(|vma| vma.range.start).collect();
        flags.pose(stopped.pid, &starts);
    }
    let Asked { timers, of_process, of_thread, answers, descriptors } =
        Borrowed::lend(&stopped.leader().tracee, &footing, |borrowed| {
            borrowed.with_arena(ARENA_SIZE, |arena| Asked::ask(stopped, borrowed, arena))
        })?;
    if let Some(flags) = flags {
        let told = flags.answers(layout.vmas.len());
        for (vma, flags) in layout.vmas.iter_mut().zip(told) {
            vma.flags = flags.map_or(vma.flags, |flags| changed_flags(vma.flags, flags));
        }
    }
    layout.threads = capture_threads(stopped, &memory, &of_thread, &answers, unbound)?;
    let of_leader = &answers[0];
    layout.mm.brk = of_process.brk(of_leader);
    layout.state = Some(Box::new(process_state(stopped, &of_process, of_leader, timers)?));
    Ok((layout, descriptors))
}

/// The memory of a stopped process, and where its leader makes calls.
fn footing_of(
    stopped: &StoppedProcess,
    vdso: Option<PageRange>,
) -> Result<(Arc<ProcessMemory>, Footing), ProcessError> {
    let (memory, footing) = prepare_injection(stopped.pid, vdso)?;
    let leader = stopped.leader();
    let is_init = leader.ns_tid == NsPid(1);
    Ok((memory, footing.with_dispositions(Dispositions { caught: leader.status.caught, is_init })))
}

/// A call of `wait4(2)` that changes nothing, as the process whose leader makes it waits for itself, but passes by a tracepoint.
fn wait_for_itself(leader: &StoppedThread) -> [u64; 4] {
    [leader.ns_tid.0 as u64, 0, libc::WNOHANG as u64, 0]
}

/// Has the leader of a stopped process, which has its vDSO at `vdso`, call `wait4(2)`.
pub fn call_wait(stopped: &StoppedProcess, vdso: PageRange) -> Result<(), ProcessError> {
    let (_, footing) = footing_of(stopped, Some(vdso))?;
    let leader = stopped.leader();
    Borrowed::lend(&leader.tracee, &footing, |borrowed| {
        match borrowed.call("wait4", libc::SYS_wait4, wait_for_itself(leader)) {
            Err(error) if error.errno() != Some(Errno::ECHILD) => Err(error.into()),
            _ => Ok(()),
        }
    })
}

/// What the threads of a process have been asked, and what each has answered: the leader first, which answers for the
/// process, too.
struct Asked {
    timers: PosixTimers,
    of_process: Questions,
    of_thread: threads::Questions,
    answers: Vec<Outcome>,
    /// None if that was too dear to ask.
    descriptors: Option<Vec<Descriptor>>,
}

impl Asked {
    /// All threads are asked at the same time.
    fn ask(
        stopped: &StoppedProcess,
        borrowed_leader: &Borrowed<'_>,
        arena: &Arena,
    ) -> Result<Self, ProcessError> {
        let timers = PosixTimers::list(stopped)?;
        let mut thread = Script::new();
        let of_thread = threads::Questions::ask(&mut thread);
        let mut leader = thread.clone();
        let of_process = Questions::ask(&mut leader, &timers);
        // What the program behind a `FlagSource` answers at.
        let args = wait_for_itself(stopped.leader()).map(Arg::from);
        leader.call_expecting("wait4", libc::SYS_wait4, args, Expect::Any);
        let batches = match borrowed_leader.is_followed() {
            true => None,
            false => Some(descriptors::batches(stopped.pid)?),
        };
        let mut batches_ahead = batches.iter().flatten();
        let first = batches_ahead.next().map(|batch| descriptors::Questions::ask(&mut leader, batch));
        let members: Vec<_> = stopped.members().map(|member| (&member.tracee, &thread)).collect();
        let answers = run_all(arena, (borrowed_leader, &leader), &members)?;
        let mut told: Vec<Descriptor> =
            first.iter().flat_map(|first| first.descriptors(&answers[0])).collect();
        for batch in batches_ahead {
            let mut script = Script::new();
            let questions = descriptors::Questions::ask(&mut script, batch);
            told.extend(questions.descriptors(&borrowed_leader.run(arena, &script)?));
        }
        let descriptors = batches.is_some().then_some(told);
        Ok(Self { timers, of_process, of_thread, answers, descriptors })
    }
}

fn process_state(
    stopped: &StoppedProcess,
    questions: &Questions,
    answers: &Outcome,
    timers: PosixTimers,
) -> Result<ProcessState, ProcessError> {
    let (pid, leader) = (stopped.pid, stopped.leader());
    Ok(ProcessState {
        cwd: proc::link(&format!("{pid}/cwd"))?,
        umask: leader.status.umask.unwrap_or(0o22),
        limits: questions.limits(answers),
        dumpable: answers.result(questions.dumpable) as u32,
        child_subreaper: questions.child_subreaper(answers),
        personality: answers.result(questions.personality) as u32,
        oom_score_adj: parse_number(pid, "oom_score_adj")?,
        actions: questions.actions(answers),
        pending: leader.tracee.pending_signals(true)?,
        itimers: questions.itimers(answers),
        timers: timers.with_times(questions, answers),
        fds: Vec::<FdEntry>::new(),
    })
}

fn parse_number(pid: HostPid, file: &str) -> Result<i32, ProcessError> {
    let text = String::from_utf8_lossy(&proc::read(&format!("{pid}/{file}"))?).trim().to_owned();
    text.parse().map_err(|_| ProcessError::Parse { path: format!("/proc/{pid}/{file}").into(), line: text })
}

/// What only the process itself can be asked, as a part of its leader's script.
struct Questions {
    actions: Vec<(usize, DataRef)>,
    limits: Vec<DataRef>,
    itimers: [DataRef; 3],
    timers: Vec<DataRef>,
    subreaper: DataRef,
    brk: CallRef,
    dumpable: CallRef,
    personality: CallRef,
}

impl Questions {
    fn ask(script: &mut Script, timers: &PosixTimers) -> Self {
        let actions = (1..=SIGNALS)
            .filter(|&signal| signal as i32 != libc::SIGKILL && signal as i32 != libc::SIGSTOP)
            .map(|signal| {
                let room = script.room(SIGACTION_SIZE);
                let args: [Arg; 4] = [(signal as u64).into(), 0.into(), room.into(), 8.into()];
                script.call(format!("rt_sigaction of signal {signal}"), libc::SYS_rt_sigaction, args);
                (signal, room)
            })
            .collect();
        let limits = (0..LIMITS)
            .map(|resource| {
                let room = script.room(16);
                let args: [Arg; 4] = [0.into(), (resource as u64).into(), 0.into(), room.into()];
                script.call(format!("prlimit64 of resource {resource}"), libc::SYS_prlimit64, args);
                room
            })
            .collect();
        let itimers = std::array::from_fn(|which| {
            let room = script.room(32);
            script.call("getitimer", libc::SYS_getitimer, [(which as u64).into(), room.into()]);
            room
        });
        let timers = timers
            .0
            .iter()
            .map(|timer| {
                let room = script.room(32);
                script.call("timer_gettime", libc::SYS_timer_gettime, [timer.id.into(), room.into()]);
                room
            })
            .collect();
        let subreaper = script.room(4);
        script.call(
            "PR_GET_CHILD_SUBREAPER",
            libc::SYS_prctl,
            [libc::PR_GET_CHILD_SUBREAPER.into(), subreaper.into()],
        );
        let brk = script.call("brk", libc::SYS_brk, [0.into()]);
        let dumpable = script.call("PR_GET_DUMPABLE", libc::SYS_prctl, [libc::PR_GET_DUMPABLE.into()]);
        let query = u64::from(u32::MAX);
        let personality = script.call("personality", libc::SYS_personality, [query.into()]);
        Self { actions, limits, itimers, timers, subreaper, brk, dumpable, personality }
    }

    fn actions(&self, answers: &Outcome) -> Vec<SigAction> {
        let mut actions = vec![SigAction::default(); SIGNALS];
        for &(signal, room) in &self.actions {
            let [handler, flags, restorer, mask] = words(answers.data(room));
            actions[signal - 1] = SigAction { handler, flags, restorer, mask };
        }
        actions
    }

    fn limits(&self, answers: &Outcome) -> Vec<(u64, u64)> {
        self.limits.iter().map(|&room| words::<2>(answers.data(room)).into()).collect()
    }

    fn itimers(&self, answers: &Outcome) -> [ItimerSpec; 3] {
        self.itimers.map(|room| {
            let [interval_s, interval_us, value_s, value_us] = words(answers.data(room));
            ItimerSpec {
                value_us: value_s * 1_000_000 + value_us,
                interval_us: interval_s * 1_000_000 + interval_us,
            }
        })
    }

    fn child_subreaper(&self, answers: &Outcome) -> bool {
        answers.data(self.subreaper) != [0; 4]
    }

    fn brk(&self, answers: &Outcome) -> VirtAddr {
        VirtAddr(answers.result(self.brk) as u64)
    }
}

/// The first `N` 8-byte words of `raw`.
fn words<const N: usize>(raw: &[u8]) -> [u64; N] {
    std::array::from_fn(|i| u64::from_ne_bytes(raw[i * 8..i * 8 + 8].try_into().expect("8 bytes")))
}

/// The POSIX timers of a process, as `/proc/PID/timers` (Linux 3.10) lists them.
struct PosixTimers(Vec<PosixTimer>);

impl PosixTimers {
    fn list(stopped: &StoppedProcess) -> Result<Self, ProcessError> {
        let pid = stopped.pid;
        let text = String::from_utf8_lossy(&proc::read(&format!("{pid}/timers"))?).into_owned();
        let thread = |host| {
            let thread = stopped.threads.iter().find(|thread| thread.tracee.tid() == HostPid(host));
            thread.map(|thread| thread.ns_tid)
        };
        parse_timers(&text, thread)
            .map(Self)
            .map_err(|line| ProcessError::Parse { path: format!("/proc/{pid}/timers").into(), line })
    }

    fn with_times(self, questions: &Questions, answers: &Outcome) -> Vec<PosixTimer> {
        let with_time = |(mut timer, &room): (PosixTimer, &DataRef)| {
            let [interval_s, interval_ns, value_s, value_ns] = words(answers.data(room));
            timer.value_ns = value_s * 1_000_000_000 + value_ns;
            timer.interval_ns = interval_s * 1_000_000_000 + interval_ns;
            timer
        };
        self.0.into_iter().zip(&questions.timers).map(with_time).collect()
    }
}

/// Parses the `ID:`, `signal:`, `notify:` and `ClockID:` lines of `proc_pid_timers(5)`. The error is the bad line.
fn parse_timers(text: &str, namespace_tid: impl Fn(i32) -> Option<NsPid>) -> Result<Vec<PosixTimer>, String> {
    let mut timers = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let bad = || line.to_owned();
        let id = line.strip_prefix("ID: ").and_then(|id| id.parse().ok()).ok_or_else(bad)?;
        let mut field =
            |name: &str| lines.next().and_then(|l| l.strip_prefix(name)).map(str::trim).ok_or_else(bad);
        let (signal, value) = field("signal:")?.split_once('/').ok_or_else(bad)?;
        let (how, target) = field("notify:")?.split_once('/').ok_or_else(bad)?;
        let clock = field("ClockID:")?;
        let (target_kind, target) = target.split_once('.').ok_or_else(bad)?;
        let by_thread = target_kind == "tid";
        let notify = match how {
            "signal" if by_thread => libc::SIGEV_THREAD_ID,
            "signal" => libc::SIGEV_SIGNAL,
            "none" => libc::SIGEV_NONE,
            "thread" => libc::SIGEV_THREAD,
            _ => return Err(bad()),
        };
        let thread = match by_thread {
            true => target.parse().ok().and_then(&namespace_tid).ok_or_else(bad)?,
            false => NsPid(0),
        };
        timers.push(PosixTimer {
            id,
            clock: clock.parse().map_err(|_| bad())?,
            notify,
            signal: signal.parse().map_err(|_| bad())?,
            value: u64::from_str_radix(value.trim_start_matches("0x"), 16).map_err(|_| bad())?,
            thread,
            value_ns: 0,
            interval_ns: 0,
        });
    }
    Ok(timers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_are_parsed_as_proc_pid_timers_shows_them() {
        let text = "ID: 0\nsignal: 60/00007fff86e452a8\nnotify: signal/pid.2634\nClockID: 0\n\
                    ID: 3\nsignal: 34/0000000000000007\nnotify: signal/tid.2640\nClockID: 1\n";
        let timers = parse_timers(text, |host| (host == 2640).then_some(NsPid(7))).unwrap();
        assert_eq!(timers.len(), 2);
        let first = &timers[0];
        assert_eq!((first.id, first.signal, first.value), (0, 60, 0x7fff86e452a8));
        assert_eq!((first.notify, first.thread), (libc::SIGEV_SIGNAL, NsPid(0)));
        let second = &timers[1];
        assert_eq!(
            (second.id, second.clock, second.notify, second.thread),
            (3, 1, libc::SIGEV_THREAD_ID, NsPid(7))
        );
        assert!(parse_timers("ID: x\n", |_| None).is_err());
    }
}
