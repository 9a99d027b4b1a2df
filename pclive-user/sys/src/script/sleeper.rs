//! Processes in which the tests of scripts run them.

use super::{Arena, Borrowed, Dispositions, Footing, Outcome, Script, SyscallInstruction, run_all};
use crate::mem::ProcessMemory;
use crate::ptrace::{Seize, Stop, Tracee, kill_all};
use crate::{Error, Result};
use pclive_wire::manifest::Registers;
use pclive_wire::{HostPid, PageRange, VirtAddr};
use std::iter::zip;
use std::process::{Child, Command};
use std::sync::Arc;

pub const ARENA: u64 = 64 * 1024;

/// A process that sleeps, or whose child does. It is killed when the test ends.
pub struct Sleeper(pub Child);

impl Sleeper {
    fn start() -> Self {
        let mut sleeper = Self(Command::new("sleep").arg("1000").spawn().unwrap());
        while !sleeps(sleeper.pid()) {
            assert_eq!(sleeper.0.try_wait().unwrap(), None, "it has ended");
            std::thread::yield_now();
        }
        sleeper
    }

    fn pid(&self) -> HostPid {
        HostPid(self.0.id() as i32)
    }

    fn maps(&self) -> String {
        std::fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap()
    }

    fn vdso(&self) -> PageRange {
        vdso_of(self.pid())
    }

    fn memory(&self) -> ProcessMemory {
        ProcessMemory::open(self.pid()).unwrap()
    }

    /// Those where scripts end by a signal, and where they must be followed.
    fn footings(&self) -> [Footing; 2] {
        [NOTHING_CAUGHT, Dispositions::default()].map(|dispositions| footing_of(self.pid(), dispositions))
    }

    fn vdso_image(&self) -> Vec<u8> {
        let mut image = vec![0; self.vdso().bytes() as usize];
        self.memory().read(self.vdso().start, &mut image).unwrap();
        image
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        // Either fails if a test has ended it already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether it has reached `clock_nanosleep`.
pub fn sleeps(pid: HostPid) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/syscall")).is_ok_and(|call| call.starts_with("230 "))
}

fn vdso_of(pid: HostPid) -> PageRange {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let line = maps.lines().find(|line| line.ends_with("[vdso]")).unwrap();
    let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
    let addr = |hex| VirtAddr(u64::from_str_radix(hex, 16).unwrap());
    PageRange::between(addr(start), addr(end))
}

pub const NOTHING_CAUGHT: Dispositions = Dispositions { caught: 0, is_init: false };

/// That of a process that does this with signals.
pub fn footing_of(pid: HostPid, dispositions: Dispositions) -> Footing {
    let memory = Arc::new(ProcessMemory::open(pid).unwrap());
    let footing = Footing::find(pid, memory, vdso_of(pid)).unwrap();
    assert!(footing.most_members().is_some());
    footing.with_dispositions(dispositions)
}

/// Attaches to a thread and stops it.
pub fn stop(tid: HostPid, purpose: Seize) -> Tracee {
    let tracee = Tracee::seize(tid, purpose).unwrap();
    tracee.interrupt().unwrap();
    tracee.wait_trap().unwrap();
    tracee
}

/// Stops a sleeping process, has `test` run scripts in it, in each of the ways that there are, and checks that nothing stays
/// behind.
pub fn with_arena(test: impl Fn(&Borrowed<'_>, &Arena)) {
    let sleeper = Sleeper::start();
    let (maps, vdso) = (sleeper.maps(), sleeper.vdso_image());
    let tracee = stop(sleeper.pid(), Seize::Source);
    let before = standing(&tracee);
    let use_arena = |borrowed: &Borrowed<'_>| {
        borrowed.with_arena(ARENA, |arena| {
            test(borrowed, arena);
            Ok::<(), Error>(())
        })
    };
    let check = || {
        assert_eq!(standing(&tracee), before);
        assert_eq!(sleeper.maps(), maps);
        assert!(sleeper.vdso_image() == vdso);
    };
    for footing in sleeper.footings() {
        Borrowed::lend(&tracee, &footing, use_arena).unwrap();
        check();
    }
    let syscall = SyscallInstruction::find(sleeper.pid(), &sleeper.memory(), sleeper.vdso()).unwrap();
    let borrowed = Borrowed::new(&tracee, syscall).unwrap();
    use_arena(&borrowed).unwrap();
    borrowed.give_back().unwrap();
    check();
    tracee.detach().unwrap();
    assert!(sleeper.maps() == maps, "still running");
}

/// What makes a process's new task a thread.
const THREAD_FLAGS: i32 =
    libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND | libc::CLONE_THREAD;

/// A process with several threads, all of them stopped, each with its own registers and signal mask. Killed when the test
/// ends, and waited for: nobody else can wait for the threads.
pub struct Team {
    sleeper: Sleeper,
    /// The leader first.
    pub tracees: Vec<Tracee>,
    footing: Footing,
    before: Vec<(Registers, u64)>,
}

impl Team {
    pub fn start(size: usize) -> Self {
        let sleeper = Sleeper::start();
        let leader = stop(sleeper.pid(), Seize::Skeleton);
        let [footing, _] = sleeper.footings();
        let mut script = Script::new();
        for _ in 1..size {
            script.call("clone", libc::SYS_clone, [THREAD_FLAGS.into(), 0.into()]);
        }
        let make_threads = |leader: &Borrowed<'_>| {
            leader.with_arena(ARENA, |arena| Ok::<_, Error>(leader.run(arena, &script)?.children().to_vec()))
        };
        let threads = Borrowed::lend(&leader, &footing, make_threads).unwrap();
        let threads = threads.into_iter().map(|tid| {
            let thread = Tracee::auto_attached(tid);
            assert_eq!(thread.wait().unwrap(), Stop::Trap);
            thread
        });
        let tracees: Vec<Tracee> = std::iter::once(leader).chain(threads).collect();
        assert_eq!(tracees.len(), size);
        for (i, tracee) in tracees.iter().enumerate() {
            let registers = tracee.registers().unwrap();
            // Threads begin where the script has made them. They are elsewhere now, and never go on from there.
            tracee.set_registers(&Registers { r15: i as u64, rip: 0x1000, ..registers }).unwrap();
            tracee.set_signal_mask(1 << (libc::SIGRTMIN() as usize + i % 30 - 1)).unwrap();
        }
        let before = tracees.iter().map(standing).collect();
        Self { sleeper, tracees, footing, before }
    }

    /// Runs these scripts in the first threads.
    pub fn run_all(&self, scripts: &[Script]) -> Result<Vec<Outcome>> {
        let members: Vec<_> = zip(&self.tracees, scripts).skip(1).collect();
        Borrowed::lend(&self.tracees[0], &self.footing, |leader| {
            leader.with_arena(ARENA, |arena| run_all(arena, (leader, &scripts[0]), &members))
        })
    }

    /// Leaves a thread that is gone out of account.
    pub fn forget(&mut self, index: usize) {
        self.tracees.remove(index);
        self.before.remove(index);
    }

    /// All threads are stopped and have the registers and the mask that they had.
    pub fn check_untouched(&self) {
        assert_eq!(self.tracees.iter().map(standing).collect::<Vec<_>>(), self.before);
        for tracee in &self.tracees {
            let path = format!("/proc/{}/task/{}/stat", self.sleeper.pid(), tracee.tid());
            let stat = std::fs::read_to_string(path).unwrap();
            assert!(stat.rsplit(") ").next().unwrap().starts_with('t'), "{stat}");
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        kill_all(std::mem::take(&mut self.tracees));
    }
}

/// Registers and signal mask.
fn standing(tracee: &Tracee) -> (Registers, u64) {
    (tracee.registers().unwrap(), tracee.signal_mask().unwrap())
}
