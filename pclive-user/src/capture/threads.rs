//! Stopping every thread of the container, and reading what only a stopped thread shows.

use super::SourceProcess;
use super::proc::{self, Status};
use super::tree::{TreeError, ns_tid};
use nix::sched::CpuSet;
use pclive_sys::mem::ProcessMemory;
use pclive_sys::ptrace::{Seize, Tracee};
use pclive_sys::registers::{CODE_BEFORE, restartable};
use pclive_sys::script::{Arg, CallRef, DataRef, Outcome, Script};
use pclive_sys::thread::{robust_list, scheduling};
use pclive_wire::manifest::{AltStack, Credentials, Thread, ThreadState};
use pclive_wire::{HostPid, NsPid, VirtAddr};
use std::collections::HashSet;

/// Why threads could not be stopped or read.
#[derive(Debug, thiserror::Error)]
pub enum ThreadError {
    /// The list of threads could not be read.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A kernel interface said no.
    #[error(transparent)]
    Sys(#[from] pclive_sys::Error),
    /// A call about a thread failed.
    #[error("{call} on {tid}")]
    Call {
        /// Name of the call.
        call: &'static str,
        /// Thread.
        tid: HostPid,
        /// Why.
        source: nix::Error,
    },
}

/// A thread that pclive has stopped.
#[derive(Debug)]
pub struct StoppedThread {
    /// As the container numbers it.
    pub ns_tid: NsPid,
    /// What it was when it stopped.
    pub status: Status,
    /// The key to it.
    pub tracee: Tracee,
}

/// A process all of whose threads are stopped. Dropping it lets them run again, by the kernel, when the tracing thread
/// ends; [`StoppedProcess::resume`] does so at once.
#[derive(Debug)]
pub struct StoppedProcess {
    /// Thread group id on this host.
    pub pid: HostPid,
    /// The leader first.
    pub threads: Vec<StoppedThread>,
    /// Whether a signal has stopped it before.
    pub by_signal: bool,
}

impl StoppedProcess {
    /// Stops every thread of `process`, also those that are being made meanwhile.
    pub fn stop(process: &SourceProcess) -> Result<Self, ThreadError> {
        let pid = process.pid;
        let mut stopped: Vec<Tracee> = Vec::new();
        let mut by_signal = false;
        loop {
            let known: HashSet<HostPid> = stopped.iter().map(Tracee::tid).collect();
            let mut new = proc::threads(pid).map_err(TreeError::from)?;
            new.retain(|tid| !known.contains(tid));
            if new.is_empty() {
                return Ok(Self { pid, threads: with_status(pid, stopped)?, by_signal });
            }
            for tracee in interrupt(new)? {
                match tracee.wait_trap() {
                    Ok(group_stop) => {
                        by_signal |= group_stop;
                        stopped.push(tracee);
                    }
                    Err(pclive_sys::Error::Gone(_)) => {}
                    Err(e) => return Err(e.into()),
                }
            }
        }
    }

    /// The thread group leader.
    pub fn leader(&self) -> &StoppedThread {
        &self.threads[0]
    }

    /// All other threads.
    pub fn members(&self) -> impl Iterator<Item = &StoppedThread> {
        self.threads.iter().skip(1)
    }

    /// Lets every thread run on.
    pub fn resume(self) -> Result<(), ThreadError> {
        for thread in self.threads {
            thread.tracee.detach()?;
        }
        Ok(())
    }
}

/// Asks threads to stop. Those that ended meanwhile are left out.
fn interrupt(tids: Vec<HostPid>) -> Result<Vec<Tracee>, ThreadError> {
    let mut tracees = Vec::with_capacity(tids.len());
    for tid in tids {
        match Tracee::seize(tid, Seize::Source) {
            Ok(tracee) => {
                tracee.interrupt()?;
                tracees.push(tracee);
            }
            Err(e) if e.errno() == Some(nix::Error::ESRCH) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(tracees)
}

/// Reads the status of stopped threads, once: it does not change any more. Those that were killed meanwhile are left out.
fn with_status(pid: HostPid, tracees: Vec<Tracee>) -> Result<Vec<StoppedThread>, ThreadError> {
    let mut threads = Vec::with_capacity(tracees.len());
    for tracee in tracees {
        let tid = tracee.tid();
        match Status::of_thread(pid, tid) {
            Ok(status) => threads.push(StoppedThread { ns_tid: ns_tid(tid, &status)?, status, tracee }),
            Err(e) if e.is_gone() && tid != pid => {}
            Err(e) => return Err(TreeError::from(e).into()),
        }
    }
    Ok(threads)
}

/// Ends stopped processes for good.
pub fn kill_all(stopped: Vec<StoppedProcess>) {
    let tracees = stopped.into_iter().flat_map(|process| process.threads).map(|thread| thread.tracee);
    pclive_sys::ptrace::kill_all(tracees.collect());
}

/// Reads every thread of a stopped process. `answers` are what each has answered to `questions`; `unbound` is what the
/// kernel says of the processors of threads that are bound to none.
pub fn capture_threads(
    process: &StoppedProcess,
    memory: &ProcessMemory,
    questions: &Questions,
    answers: &[Outcome],
    unbound: &[CpuSet],
) -> Result<Vec<Thread>, ThreadError> {
    std::iter::zip(&process.threads, answers)
        .map(|(thread, answers)| {
            let state = capture_thread(thread, memory, questions, answers, unbound)?;
            Ok(Thread { tid: thread.ns_tid, state: Some(Box::new(state)) })
        })
        .collect()
}

fn capture_thread(
    thread: &StoppedThread,
    memory: &ProcessMemory,
    questions: &Questions,
    answers: &Outcome,
    unbound: &[CpuSet],
) -> Result<ThreadState, ThreadError> {
    let tracee = &thread.tracee;
    let tid = tracee.tid();
    let (registers, blocked) = (tracee.registers()?, tracee.signal_mask()?);
    let mut code = [0; CODE_BEFORE];
    // Unreadable: not the address after a system call.
    let _ = memory.read(VirtAddr(registers.rip.wrapping_sub(CODE_BEFORE as u64)), &mut code);
    let registers = restartable(registers, code);
    let call_error = |call| move |source| ThreadError::Call { call, tid, source };
    Ok(ThreadState {
        registers,
        xstate: tracee.xstate()?,
        blocked,
        pending: tracee.pending_signals(false)?,
        altstack: questions.altstack(answers),
        robust_list: robust_list(tid).map_err(call_error("get_robust_list"))?,
        clear_child_tid: questions.clear_child_tid(answers),
        rseq: tracee.rseq()?,
        comm: questions.comm(answers),
        parent_death_signal: questions.parent_death_signal(answers),
        timer_slack_ns: questions.timer_slack(answers),
        credentials: credentials(&thread.status, questions.securebits(answers)),
        scheduling: scheduling(tid, unbound).map_err(call_error("sched_getattr"))?,
    })
}

/// What only a thread itself can be asked, as a part of a script.
pub struct Questions {
    altstack: DataRef,
    tid_address: DataRef,
    comm: DataRef,
    death_signal: DataRef,
    timer_slack: CallRef,
    securebits: CallRef,
}

impl Questions {
    /// Has `script` ask them.
    pub fn ask(script: &mut Script) -> Self {
        let altstack = script.room(24);
        let tid_address = script.room(8);
        let comm = script.room(16);
        let death_signal = script.room(4);
        script.call("sigaltstack", libc::SYS_sigaltstack, [0.into(), altstack.into()]);
        let mut prctl = |label, option: i32, argument: Arg| {
            script.call(label, libc::SYS_prctl, [option.into(), argument])
        };
        prctl("PR_GET_TID_ADDRESS", libc::PR_GET_TID_ADDRESS, tid_address.into());
        prctl("PR_GET_NAME", libc::PR_GET_NAME, comm.into());
        prctl("PR_GET_PDEATHSIG", libc::PR_GET_PDEATHSIG, death_signal.into());
        let timer_slack = prctl("PR_GET_TIMERSLACK", libc::PR_GET_TIMERSLACK, 0.into());
        let securebits = prctl("PR_GET_SECUREBITS", libc::PR_GET_SECUREBITS, 0.into());
        Self { altstack, tid_address, comm, death_signal, timer_slack, securebits }
    }

    fn altstack(&self, answers: &Outcome) -> AltStack {
        let raw = answers.data(self.altstack);
        let word = |i: usize| u64::from_ne_bytes(raw[i..i + 8].try_into().expect("8 bytes"));
        AltStack { sp: VirtAddr(word(0)), flags: word(8) as i32, size: word(16) }
    }

    fn clear_child_tid(&self, answers: &Outcome) -> VirtAddr {
        VirtAddr(u64::from_ne_bytes(answers.data(self.tid_address).try_into().expect("8 bytes")))
    }

    fn comm(&self, answers: &Outcome) -> Vec<u8> {
        answers.data(self.comm).split(|&byte| byte == 0).next().unwrap_or_default().to_vec()
    }

    fn parent_death_signal(&self, answers: &Outcome) -> i32 {
        i32::from_ne_bytes(answers.data(self.death_signal).try_into().expect("4 bytes"))
    }

    fn timer_slack(&self, answers: &Outcome) -> u64 {
        answers.result(self.timer_slack) as u64
    }

    fn securebits(&self, answers: &Outcome) -> u32 {
        answers.result(self.securebits) as u32
    }
}

fn credentials(status: &Status, securebits: u32) -> Credentials {
    Credentials {
        uids: status.uids,
        gids: status.gids,
        groups: status.groups.clone(),
        inheritable: status.inheritable,
        permitted: status.permitted,
        effective: status.effective,
        bounding: status.bounding,
        ambient: status.ambient,
        securebits,
        no_new_privs: status.no_new_privs,
    }
}

#[cfg(test)]
mod tests {
    use super::super::proc::Stat;
    use super::super::tree::read_tree;
    use super::super::tree::tests::Contained;
    use super::*;
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;

    #[test]
    fn threads_that_come_and_go_are_all_stopped() {
        let script = "import threading, time\n\
                      def work():\n  threading.Thread(target=time.sleep, args=[0.0005]).start()\n\
                      def make():\n  while True: work()\n\
                      for i in range(3): threading.Thread(target=make).start()\n\
                      print('ready', flush=True)\n";
        let contained = Contained::start(script);
        for _ in 0..20 {
            let process = read_tree(&[contained.init]).unwrap().remove(0);
            let stopped = StoppedProcess::stop(&process).unwrap();
            let tids: Vec<HostPid> = stopped.threads.iter().map(|thread| thread.tracee.tid()).collect();
            let mut listed = proc::threads(contained.init).unwrap();
            assert_eq!((tids[0], stopped.leader().ns_tid), (contained.init, NsPid(1)));
            assert!(tids.iter().all(|&tid| Stat::of(tid).unwrap().state == 't'));
            listed.retain(|tid| !tids.contains(tid));
            assert_eq!(listed, [], "threads that run");
            let numbers: HashSet<NsPid> = stopped.threads.iter().map(|thread| thread.ns_tid).collect();
            assert_eq!(numbers.len(), tids.len());
            stopped.resume().unwrap();
        }
    }

    #[test]
    fn a_process_that_a_signal_has_stopped_is_told_from_one_that_runs() {
        let contained = Contained::start("import time\nprint('ready', flush=True)\ntime.sleep(1000)\n");
        let process = read_tree(&[contained.init]).unwrap().remove(0);
        let is_by_signal = |state: char| {
            while Stat::of(contained.init).unwrap().state != state {
                std::thread::yield_now();
            }
            let stopped = StoppedProcess::stop(&process).unwrap();
            let by_signal = stopped.by_signal;
            stopped.resume().unwrap();
            by_signal
        };
        let pid = Pid::from_raw(contained.init.0);
        assert!(!is_by_signal('S'));
        kill(pid, Signal::SIGSTOP).unwrap();
        assert!(is_by_signal('T'));
        kill(pid, Signal::SIGCONT).unwrap();
        assert!(!is_by_signal('S'));
    }
}
