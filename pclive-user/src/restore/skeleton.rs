//! The skeleton: the destination's parked process tree.
//!
//! Every process of it is a real one, with its final pid, stopped under ptrace from its first instruction on. The first is
//! the init that the runtime started; each other one is cloned by its parent, with the id asked for, and then executes the
//! same init, so that it begins with an empty address space however full its parent's is by then. A skeleton is kept equal
//! to the newest manifest by [`Skeleton::reconcile`]; [`Skeleton::finish`] gives it what only the last manifest has, and
//! [`Skeleton::release`] lets it run.
//!
//! All of it happens in one thread, as ptrace demands. Pages are placed from other threads, through [`SharedPlacements`].

use super::files::OpenedFiles;
use super::memory::Placement;
use super::parked::{Parked, ParkedError};
use super::{Sandbox, threads, vmas};
use pclive_sys::ptrace::{Seize, Stop, Tracee, kill_all};
use pclive_sys::script::Script;
use pclive_wire::manifest::{Backing, Manifest, Process};
use pclive_wire::{NsPid, PageRange};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, RwLock};

/// Where pages go: the memory of every parked process.
pub type SharedPlacements = Arc<RwLock<HashMap<NsPid, Placement>>>;

/// Why the skeleton could not be made equal to a manifest.
#[derive(Debug, thiserror::Error)]
pub enum SkeletonError {
    /// Something in one process.
    #[error("process {pid}")]
    Process {
        /// As the container numbers it.
        pid: NsPid,
        /// What.
        source: ParkedError,
    },
    /// A kernel interface said no.
    #[error(transparent)]
    Sys(#[from] pclive_sys::Error),
    /// A manifest names a parent that does not exist.
    #[error("process {pid} has no parent {parent} in the container")]
    NoParent {
        /// Child.
        pid: NsPid,
        /// Parent.
        parent: NsPid,
    },
    /// The session of a process can be neither its own nor its parent's.
    #[error("process {pid} is in session {sid}, which is neither its own nor its parent's")]
    Session {
        /// Process.
        pid: NsPid,
        /// Session.
        sid: NsPid,
    },
    /// A file that is mapped does not fit.
    #[error("mapped file {path}: {problem}")]
    MappedFile {
        /// Path in the container.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A call of this process failed.
    #[error("{call}")]
    Call {
        /// Which.
        call: &'static str,
        /// Why.
        source: nix::Error,
    },
}

/// Adds to an error in which process it happened.
fn within<T>(pid: NsPid, result: Result<T, ParkedError>) -> Result<T, SkeletonError> {
    result.map_err(|source| SkeletonError::Process { pid, source })
}

/// The parked process tree.
#[derive(Debug)]
pub struct Skeleton {
    sandbox: Sandbox,
    processes: BTreeMap<NsPid, Parked>,
    placements: SharedPlacements,
    /// Mapped files that have been compared with the source's.
    checked_files: HashSet<(Vec<u8>, u64)>,
}

impl Skeleton {
    /// Takes the sandbox's init, which waits, and makes it the first parked process.
    pub fn adopt(sandbox: Sandbox) -> Result<Self, SkeletonError> {
        let leader = Tracee::seize(sandbox.init, Seize::Skeleton)?;
        leader.interrupt()?;
        leader.wait_trap()?;
        let pid = NsPid(1);
        let init = within(pid, Parked::new(pid, leader))?;
        let processes = BTreeMap::from([(pid, init)]);
        Ok(Self {
            sandbox,
            processes,
            placements: SharedPlacements::default(),
            checked_files: HashSet::new(),
        })
    }

    /// The sandbox in which it stands.
    pub fn sandbox(&self) -> &Sandbox {
        &self.sandbox
    }

    /// Where pages go.
    pub fn placements(&self) -> SharedPlacements {
        self.placements.clone()
    }

    /// Makes processes, threads and mappings those of `manifest`.
    pub fn reconcile(&mut self, manifest: &Manifest) -> Result<(), SkeletonError> {
        for process in &manifest.processes {
            self.check_files(process)?;
        }
        self.remove_gone(manifest)?;
        for process in &manifest.processes {
            if !self.processes.contains_key(&process.pid) {
                self.create(process)?;
            }
            self.reconcile_process(process)?;
        }
        Ok(())
    }

    /// Drops pages that the source has no longer.
    pub fn drop_pages(&mut self, pid: NsPid, ranges: &[PageRange]) -> Result<(), SkeletonError> {
        self.processes.get(&pid).map_or(Ok(()), |process| within(pid, process.drop_pages(ranges)))
    }

    /// Gives every process what only the last manifest has. Afterwards they need nothing but to be let go.
    pub fn finish(&mut self, manifest: &Manifest, files: &OpenedFiles) -> Result<(), SkeletonError> {
        for process in &manifest.processes {
            self.set_group(process)?;
        }
        let mut placements = self.placements.write().expect("no thread panics while it places pages");
        placements.clear(); // closes every userfaultfd: its pages are all there
        drop(placements);
        for process in &manifest.processes {
            let parked = self.processes.get_mut(&process.pid).expect("reconciled");
            within(process.pid, parked.finish(process, files))?;
        }
        Ok(())
    }

    /// Lets every thread run. From here on the container is alive.
    ///
    /// Should pclive be killed meanwhile, either all of it lives or nothing: until the last thread of the container's PID 1
    /// is allowed to outlive pclive, PID 1 dies, and takes all others with it (`zap_pid_ns_processes` in
    /// kernel/pid_namespace.c); afterwards the kernel detaches, and lets run, whatever is not yet detached.
    pub fn release(self) -> Result<(), SkeletonError> {
        for (pid, process) in self.processes.iter().rev() {
            within(*pid, process.outlive_tracer())?;
        }
        for (pid, process) in self.processes {
            // What runs already may end it, or one of its threads: that is the container's business.
            if let Err(error) = process.release() {
                tracing::warn!("process {pid} ended before all of it was let go: {error}");
            }
        }
        Ok(())
    }

    /// Ends every process. The sandbox's runtime still has to remove what it made.
    pub fn destroy(self) {
        let mut tracees: Vec<Tracee> = Vec::new();
        for process in self.processes.into_values() {
            tracees.extend(process.into_tracees());
        }
        kill_all(tracees);
    }

    fn reconcile_process(&mut self, process: &Process) -> Result<(), SkeletonError> {
        let pid = process.pid;
        let parked = self.processes.get_mut(&pid).expect("made before");
        // Before there are threads that share the table: see `make_room_for_descriptors`.
        within(pid, parked.make_room_for_descriptors(process.fd_size))?;
        within(pid, parked.reconcile_threads(process))?;
        let mut placements = self.placements.write().expect("no thread panics while it places pages");
        let placement = match placements.entry(pid) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(within(pid, parked.empty_address_space(process))?)
            }
        };
        within(pid, parked.reconcile_mappings(process, placement))
    }

    /// Ends the processes that the source no longer has, children before parents.
    fn remove_gone(&mut self, manifest: &Manifest) -> Result<(), SkeletonError> {
        let wanted: HashSet<NsPid> = manifest.processes.iter().map(|process| process.pid).collect();
        let gone: Vec<NsPid> =
            self.processes.keys().rev().filter(|pid| !wanted.contains(pid)).copied().collect();
        for pid in gone {
            self.placements.write().expect("no thread panics while it places pages").remove(&pid);
            let process = self.processes.remove(&pid).expect("just listed");
            kill_all(process.into_tracees());
        }
        Ok(())
    }

    fn create(&mut self, process: &Process) -> Result<(), SkeletonError> {
        let pid = process.pid;
        let missing = SkeletonError::NoParent { pid, parent: process.ppid };
        let parent = self.processes.get(&process.ppid).ok_or(missing)?;
        let mut script = Script::new();
        threads::clone_with_id(&mut script, libc::CLONE_VM, libc::SIGCHLD, pid);
        let outcome = within(process.ppid, parent.run(&script))?;
        let [host] = *outcome.children() else {
            return Err(SkeletonError::NoParent { pid, parent: process.ppid });
        };
        let leader = Tracee::auto_attached(host);
        match leader.wait()? {
            Stop::Trap => {}
            stop => return Err(pclive_sys::Error::UnexpectedStop { tid: host, stop }.into()),
        }
        let mut child = within(pid, parent.exec_init(leader).and_then(|leader| Parked::new(pid, leader)))?;
        child.inherit_session(parent);
        if process.sid == pid {
            within(pid, child.start_session())?;
        } else if process.sid != child.session() {
            return Err(SkeletonError::Session { pid, sid: process.sid });
        }
        self.processes.insert(pid, child);
        Ok(())
    }

    /// Puts a process into its group: possible only when all members of the session exist.
    fn set_group(&mut self, process: &Process) -> Result<(), SkeletonError> {
        let parked = self.processes.get_mut(&process.pid).expect("reconciled");
        within(process.pid, parked.set_group(process.pgid))
    }

    /// Compares mapped files with those of the source, before anything is mapped.
    fn check_files(&mut self, process: &Process) -> Result<(), SkeletonError> {
        for vma in &process.vmas {
            let Backing::File { path, size, .. } = &vma.backing else { continue };
            if self.checked_files.contains(&(path.clone(), *size)) {
                continue;
            }
            let problem = match vmas::file_size(&self.sandbox.root, path) {
                Ok(found) if found == *size => {
                    self.checked_files.insert((path.clone(), *size));
                    continue;
                }
                Ok(found) => format!("{found} bytes here, {size} at the source"),
                Err(e) => e.to_string(),
            };
            return Err(SkeletonError::MappedFile {
                path: String::from_utf8_lossy(path).into_owned(),
                problem,
            });
        }
        Ok(())
    }
}
