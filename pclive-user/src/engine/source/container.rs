//! The container at the source: its processes, what tracks them, and what stops them.

use super::sent::Sent;
use crate::capture::SourceProcess;
use crate::capture::descriptors::Descriptor;
use crate::capture::env::{ContainerEnv, EnvError};
use crate::capture::process::{
    ProcessError, call_wait, capture_layout, capture_running_layout, capture_stopped,
};
use crate::capture::threads::{StoppedProcess, ThreadError};
use crate::capture::tree::{TreeError, has_ended, read_threads, reread_tree};
use crate::capture::vmas::{FlagSource, VmaReader};
use crate::runtime::{Cgroup, CgroupError, Cpuset};
use crate::track::attach::{Dirty, TrackError, TrackedProcess, Walk};
use nix::sched::CpuSet;
use pclive_sys::kcmp::{Shared, compare_tasks};
use pclive_sys::mem::ProcessMemory;
use pclive_wire::manifest::{Process, Thread, Vma};
use pclive_wire::{HostPid, NsPid, PageRange, PageSet, VirtAddr};
use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

/// Why the container could not be read or stopped.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ContainerError {
    #[error(transparent)]
    Tree(#[from] TreeError),
    #[error(transparent)]
    Env(#[from] EnvError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("cannot read process {pid}")]
    Process { pid: HostPid, source: ProcessError },
    #[error("cannot track the writes of process {pid}")]
    Track { pid: HostPid, source: TrackError },
    #[error("cannot stop process {pid}")]
    Stop { pid: HostPid, source: ThreadError },
    /// The container has no processes.
    #[error("the container has ended")]
    Ended,
}

/// The last pages of a process, and where they are to be read.
pub type LastPages = (Arc<ProcessMemory>, Dirty);

/// What is kept about a process from round to round.
#[derive(Debug)]
struct Live {
    vmas: VmaReader,
    tracked: Option<TrackedProcess>,
}

impl Live {
    /// The layout of the process, and the round that begins.
    fn round(
        &mut self,
        process: &SourceProcess,
        parent: NsPid,
        attach_stop: &mut Duration,
    ) -> Result<(Process, Walk), ContainerError> {
        let pid = process.pid;
        let at = |source| ContainerError::Process { pid, source };
        let track = |source| ContainerError::Track { pid, source };
        loop {
            let threads = running_threads(pid)?;
            let layout = capture_running_layout(process, parent, &threads, &mut self.vmas).map_err(at)?;
            let tracked = match &mut self.tracked {
                Some(tracked) => tracked,
                none => {
                    let attached = TrackedProcess::attach(process).map_err(track)?;
                    *attach_stop += attached.stopped_for;
                    none.insert(attached)
                }
            };
            match tracked.begin_round(&layout.vmas) {
                Ok(walk) => return Ok((layout, walk)),
                // It executed another program: its new address space is tracked from the beginning.
                Err(error) if error.is_gone() && !has_ended(pid) => self.tracked = None,
                Err(error) => return Err(track(error)),
            }
        }
    }

    /// The same after the freeze, with the pages that have vanished.
    fn last_round(
        &mut self,
        process: &SourceProcess,
        parent: NsPid,
        stopped: &StoppedProcess,
        sent: &PageSet,
        asking: &mut Asking,
    ) -> Result<(Process, LastPages), ContainerError> {
        let pid = process.pid;
        let track = |source| ContainerError::Track { pid, source };
        let threads =
            stopped.threads.iter().map(|thread| Thread { tid: thread.ns_tid, state: None }).collect();
        let fd_size = stopped.leader().status.fd_size;
        let read = || asking.read(stopped, &mut self.vmas);
        let layout = capture_layout(process, parent, threads, fd_size, read)
            .map_err(|source| ContainerError::Process { pid, source })?;
        loop {
            let tracked = match &mut self.tracked {
                Some(tracked) => tracked,
                none => none.insert(TrackedProcess::untracked(pid).map_err(track)?),
            };
            match tracked.last_round(&layout.vmas, sent) {
                Ok(dirty) => return Ok((layout, (tracked.memory(), dirty))),
                Err(error) if error.is_gone() => self.tracked = None,
                Err(error) => return Err(track(error)),
            }
        }
    }
}

/// Whom flags of mappings are asked of while the container stands still.
#[derive(Debug, Default)]
struct Asking {
    source: Option<Box<dyn FlagSource>>,
    told: ToldFlags,
}

/// Mappings that were new or had changed when the container was stopped.
#[derive(Clone, Copy, Debug, Default)]
pub struct ToldFlags {
    /// Those whose flags were told.
    pub told: u64,
    /// Those whose flags were read from `smaps`, with those of all others, as not all could be told.
    pub read: u64,
}

impl Asking {
    /// The mappings of a stopped process.
    fn read(&mut self, stopped: &StoppedProcess, vmas: &mut VmaReader) -> Result<Vec<Vma>, ProcessError> {
        let Self { source: Some(source), told } = self else { return Ok(vmas.read()?.to_vec()) };
        let ask = |vdso: PageRange, mappings: &[VirtAddr]| {
            source.pose(stopped.pid, mappings);
            call_wait(stopped, vdso)?;
            let flags = source.answers(mappings.len());
            let count = if flags.contains(&None) { &mut told.read } else { &mut told.told };
            *count += mappings.len() as u64;
            Ok::<_, ProcessError>(flags)
        };
        Ok(vmas.read_asking(ask)?.to_vec())
    }
}

/// The processes of the container.
#[derive(Debug)]
pub struct Container {
    cgroup: Cgroup,
    env: ContainerEnv,
    cpuset: Cpuset,
    /// Parents before children.
    processes: Vec<SourceProcess>,
    live: HashMap<HostPid, Live>,
    asking: Asking,
    attach_stop: Duration,
}

impl Container {
    /// The container whose PID 1 is `init` on this host.
    pub fn open(init: HostPid) -> Result<Self, ContainerError> {
        let mut container = Self {
            cgroup: Cgroup::of(init)?,
            env: ContainerEnv::open(init)?,
            cpuset: Cpuset::of(init)?,
            processes: Vec::new(),
            live: HashMap::new(),
            asking: Asking::default(),
            attach_stop: Duration::ZERO,
        };
        container.refresh()?;
        Ok(container)
    }

    /// Its cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Its surroundings.
    pub fn env(&self) -> &ContainerEnv {
        &self.env
    }

    /// Its processors.
    pub fn cpuset(&self) -> &Cpuset {
        &self.cpuset
    }

    /// Its processes, parents before children, as of the last [`Container::refresh`].
    pub fn processes(&self) -> &[SourceProcess] {
        &self.processes
    }

    /// For how long processes were stopped to attach, together.
    pub fn attach_stop(&self) -> Duration {
        self.attach_stop
    }

    /// Has the flags of mappings that have changed before the freeze asked of `source`, instead of read.
    pub fn ask_flags_of(&mut self, source: Box<dyn FlagSource>) {
        self.asking.source = Some(source);
    }

    /// What was asked in the last round.
    pub fn told_flags(&self) -> ToldFlags {
        self.asking.told
    }

    /// Reads the process tree again.
    pub fn refresh(&mut self) -> Result<(), ContainerError> {
        self.processes = reread_tree(&self.processes, &self.cgroup.processes()?)?;
        if self.processes.first().is_none_or(|first| first.ns_pid != NsPid(1)) {
            return Err(ContainerError::Ended);
        }
        let alive: HashSet<HostPid> = self.processes.iter().map(|process| process.pid).collect();
        self.live.retain(|pid, _| alive.contains(pid));
        for process in &self.processes {
            let vmas = || Live { vmas: VmaReader::new(process.pid), tracked: None };
            self.live.entry(process.pid).or_insert_with(vmas);
        }
        Ok(())
    }

    /// The layout of every process, and the round that begins: [`Container::next_pages`] returns its pages. Processes that
    /// end meanwhile are left out; the next round knows.
    pub fn begin_round(&mut self) -> Result<Vec<(Process, Walk)>, ContainerError> {
        self.refresh()?;
        let mut round = Vec::with_capacity(self.processes.len());
        let mut gone = HashSet::new();
        for process in &self.processes {
            let pid = process.pid;
            if gone.contains(&process.parent) {
                gone.insert(pid);
                continue;
            }
            let parent = ns_pid(&self.processes, process.parent);
            let live = self.live.get_mut(&pid).expect("every process has an entry");
            match live.round(process, parent, &mut self.attach_stop) {
                Ok(begun) => round.push(begun),
                Err(error) if is_gone(&error) && process.ns_pid != NsPid(1) => {
                    gone.insert(pid);
                }
                Err(error) => return Err(error),
            }
        }
        for pid in &gone {
            self.live.remove(pid);
        }
        Ok(round)
    }

    /// The next pages of a round, about `pages` of them; `None` at its end.
    pub fn next_pages(
        &self,
        pid: NsPid,
        walk: &mut Walk,
        pages: u64,
    ) -> Result<Option<PageSet>, ContainerError> {
        let Some((host_pid, tracked)) = self.tracked(pid) else { return Ok(None) };
        let found = match tracked.next_pages(walk, pages) {
            Err(error) if error.is_gone() => return Ok(None),
            found => found.map_err(|source| ContainerError::Track { pid: host_pid, source })?,
        };
        Ok((!found.is_empty()).then_some(found))
    }

    /// The memory of a process whose round has begun.
    pub fn memory(&self, pid: NsPid) -> Option<Arc<ProcessMemory>> {
        self.tracked(pid).map(|(_, tracked)| tracked.memory())
    }

    fn tracked(&self, pid: NsPid) -> Option<(HostPid, &TrackedProcess)> {
        let pid = self.processes.iter().find(|process| process.ns_pid == pid)?.pid;
        Some((pid, self.live.get(&pid)?.tracked.as_ref()?))
    }

    /// The pages that each process has written since they were last sent.
    pub fn written(&self) -> Result<HashMap<NsPid, PageSet>, ContainerError> {
        let tracked = |process: &SourceProcess| {
            let tracked = self.live.get(&process.pid)?.tracked.as_ref()?;
            let at = |source| ContainerError::Track { pid: process.pid, source };
            match tracked.written() {
                // It has ended or executed another program since its round: the next one knows.
                Err(error) if error.is_gone() => None,
                written => Some(written.map_err(at).map(|written| (process.ns_pid, written))),
            }
        };
        self.processes.iter().filter_map(tracked).collect()
    }

    /// Stops every thread of every process, also those that are being made meanwhile.
    pub fn stop(&mut self) -> Result<Vec<StoppedProcess>, ContainerError> {
        let mut stopped: Vec<StoppedProcess> = Vec::new();
        loop {
            self.refresh()?;
            let known: HashSet<HostPid> = stopped.iter().map(|process| process.pid).collect();
            let new: Vec<&SourceProcess> =
                self.processes.iter().filter(|process| !known.contains(&process.pid)).collect();
            if new.is_empty() {
                break;
            }
            for process in new {
                let pid = process.pid;
                match StoppedProcess::stop(process) {
                    Ok(process) => stopped.push(process),
                    Err(_) if has_ended(pid) => {}
                    Err(source) => return Err(ContainerError::Stop { pid, source }),
                }
            }
        }
        // In the order of the tree.
        let place = |pid: HostPid| self.processes.iter().position(|process| process.pid == pid);
        stopped.retain(|process| place(process.pid).is_some());
        stopped.sort_by_key(|process| place(process.pid));
        Ok(stopped)
    }

    /// Processes that run in the memory of their parent, as between `vfork` and `exec`: a state that passes.
    pub fn sharing_memory(&self) -> Vec<NsPid> {
        let shares = |process: &&SourceProcess| {
            let order = compare_tasks(process.parent, process.pid, Shared::Vm);
            process.ns_pid != NsPid(1) && order.is_ok_and(Ordering::is_eq)
        };
        self.processes.iter().filter(shares).map(|process| process.ns_pid).collect()
    }

    /// The layout and the last dirty pages of every process, and which of those `sent` have vanished. All threads are
    /// stopped.
    pub fn last_round(
        &mut self,
        stopped: &[StoppedProcess],
        sent: &Sent,
    ) -> Result<Vec<(Process, LastPages)>, ContainerError> {
        let mut round = Vec::with_capacity(stopped.len());
        self.asking.told = ToldFlags::default();
        for (process, stopped) in self.processes.iter().zip(stopped) {
            let parent = ns_pid(&self.processes, process.parent);
            let live = self.live.get_mut(&process.pid).expect("every process has an entry");
            let sent = sent.pages(process.ns_pid);
            round.push(live.last_round(process, parent, stopped, &sent, &mut self.asking)?);
        }
        Ok(round)
    }

    /// Adds to the layout of a process whose threads are stopped all other state but its descriptor table; see
    /// [`capture_stopped`].
    pub fn capture(
        &mut self,
        layout: Process,
        stopped: &StoppedProcess,
        unbound: &[CpuSet],
    ) -> Result<(Process, Option<Vec<Descriptor>>), ContainerError> {
        let flags = self.asking.source.as_deref_mut().map(|flags| flags as &mut dyn FlagSource);
        capture_stopped(layout, stopped, unbound, flags)
            .map_err(|source| ContainerError::Process { pid: stopped.pid, source })
    }

    /// The processes run on: those that are not tracked must be attached to anew.
    pub fn thawed(&mut self) {
        for live in self.live.values_mut() {
            live.tracked.take_if(|tracked| !tracked.is_tracked());
        }
    }

    /// Ends the tracking: nothing of pclive stays in the processes.
    pub fn detach(&mut self) {
        self.live.clear();
    }
}

/// The number of a process inside; 0 if it is not of the container.
fn ns_pid(processes: &[SourceProcess], host: HostPid) -> NsPid {
    processes.iter().find(|process| process.pid == host).map_or(NsPid(0), |process| process.ns_pid)
}

fn running_threads(pid: HostPid) -> Result<Vec<Thread>, ContainerError> {
    Ok(read_threads(pid)?.into_iter().map(|(_, tid)| Thread { tid, state: None }).collect())
}

/// Whether a process has to be left out of a round.
fn is_gone(error: &ContainerError) -> bool {
    match error {
        ContainerError::Tree(error) => error.is_gone(),
        // In the memory of its parent it has no pages of its own until it executes a program.
        ContainerError::Track { source: TrackError::SharedMemory(_), .. } => true,
        ContainerError::Process { pid, .. } | ContainerError::Track { pid, .. } => has_ended(*pid),
        _ => false,
    }
}
