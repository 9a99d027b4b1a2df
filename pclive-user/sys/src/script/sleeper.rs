//! Processes in which the tests of scripts run them.

use super::{Arena, Borrowed, Script, SyscallInstruction};
use crate::mem::ProcessMemory;
use crate::ptrace::{Seize, Stop, Tracee, kill_all};
use pclive_wire::manifest::Registers;
use pclive_wire::{HostPid, PageRange, VirtAddr};
use std::process::{Child, Command};

pub const ARENA: u64 = 64 * 1024;

/// A sleeping process, killed when the test ends.
struct Sleeper(Child);

impl Sleeper {
    fn start() -> Self {
        let sleeper = Self(Command::new("sleep").arg("1000").spawn().unwrap());
        while !std::fs::read_to_string(format!("/proc/{}/syscall", sleeper.pid()))
            .unwrap()
            .starts_with("230 ")
        {
            std::thread::yield_now(); // until it has reached clock_nanosleep
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
        let maps = self.maps();
        let line = maps.lines().find(|line| line.ends_with("[vdso]")).unwrap();
        let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let addr = |hex| VirtAddr(u64::from_str_radix(hex, 16).unwrap());
        PageRange::between(addr(start), addr(end))
    }

    fn stop(&self, purpose: Seize) -> (Tracee, SyscallInstruction) {
        let tracee = Tracee::seize(self.pid(), purpose).unwrap();
        tracee.interrupt().unwrap();
        tracee.wait_trap().unwrap();
        let memory = ProcessMemory::open(self.pid()).unwrap();
        let syscall = SyscallInstruction::find(self.pid(), &memory, self.vdso()).unwrap();
        (tracee, syscall)
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        // Either fails if a test has ended it already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Stops a sleeping process, has `test` run scripts in it, and checks that nothing stays behind.
pub fn with_arena(test: impl FnOnce(&Borrowed<'_>, &Arena)) {
    let sleeper = Sleeper::start();
    let maps = sleeper.maps();
    let (tracee, syscall) = sleeper.stop(Seize::Source);
    let before = standing(&tracee);
    let borrowed = Borrowed::new(&tracee, syscall).unwrap();
    let arena = borrowed.map_arena(ARENA, None).unwrap();
    test(&borrowed, &arena);
    borrowed.unmap_arena(arena).unwrap();
    borrowed.give_back().unwrap();
    assert_eq!(standing(&tracee), before);
    assert_eq!(sleeper.maps(), maps);
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
    pub syscall: SyscallInstruction,
    pub arena: Arena,
    before: Vec<(Registers, u64)>,
}

impl Team {
    pub fn start(size: usize) -> Self {
        let sleeper = Sleeper::start();
        let (leader, syscall) = sleeper.stop(Seize::Skeleton);
        let mut script = Script::new();
        for _ in 1..size {
            script.call("clone", libc::SYS_clone, [THREAD_FLAGS.into(), 0.into()]);
        }
        let (arena, threads) = Borrowed::lend(&leader, syscall, |borrowed| {
            let arena = borrowed.map_arena(ARENA, None)?;
            let threads = borrowed.run(&arena, &script)?.children().to_vec();
            Ok((arena, threads))
        })
        .unwrap();
        let threads = threads.into_iter().map(|tid| {
            let thread = Tracee::auto_attached(tid);
            assert_eq!(thread.wait().unwrap(), Stop::Trap);
            thread
        });
        let tracees: Vec<Tracee> = std::iter::once(leader).chain(threads).collect();
        assert_eq!(tracees.len(), size);
        for (i, tracee) in tracees.iter().enumerate() {
            let registers = tracee.registers().unwrap();
            tracee.set_registers(&Registers { r15: i as u64, ..registers }).unwrap();
            tracee.set_signal_mask(1 << (libc::SIGRTMIN() as usize + i % 30 - 1)).unwrap();
        }
        let before = tracees.iter().map(standing).collect();
        Self { sleeper, tracees, syscall, arena, before }
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
