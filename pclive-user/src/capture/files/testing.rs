//! Children that hold descriptors, for the tests of capture and restore.

use super::{CapturedFiles, Look, capture_files};
use crate::capture::env::ContainerEnv;
use crate::capture::process::{capture_layout, capture_stopped};
use crate::capture::threads::StoppedProcess;
use crate::capture::vmas::VmaReader;
use crate::capture::{Access, Obstacle, Obstacles, SourceProcess};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pclive_sys::pidfd::pidfd_open;
use pclive_wire::manifest::{Description, DescriptionKind, Thread};
use pclive_wire::{HostPid, NsPid};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

/// Names that every script has: the raw calls that Python lacks.
const PRELUDE: &str = r#"
import ctypes, fcntl, os, select, signal, socket, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
os.closerange(3, 1024) # what the test's own parents left open
def timerfd(clock, value, interval, flags=0):
    fd = libc.timerfd_create(clock, 0)
    spec = struct.pack("qqqq", int(interval), int(interval % 1 * 1e9), int(value), int(value % 1 * 1e9))
    assert libc.timerfd_settime(fd, flags, spec, None) == 0
    return fd
def at(number, fd):
    os.dup2(fd, number); os.close(fd); return number
def epoll_at(number):
    at(number, libc.epoll_create1(0)); return select.epoll.fromfd(number)
"#;

/// A Python program that is stopped once it has said that it is ready.
pub(crate) struct Holder {
    child: Child,
    /// Its working directory.
    directory: TempDir,
    /// What capture is given: the program, then the children that it forked.
    pub processes: Vec<SourceProcess>,
}

impl Holder {
    /// Runs `script`, which prints the pids of its children in its last line, and stops all of them.
    ///
    /// Its standard error is its own: that of the tests may be a file, which grows while it is captured.
    pub fn run(script: &str) -> Self {
        let mut command = Command::new("python3");
        command.stderr(Stdio::piped());
        Self::spawn(command, script)
    }

    /// As `run`, with another way to start Python.
    pub fn spawn(mut command: Command, script: &str) -> Self {
        let program = format!("{PRELUDE}\n{script}\nsys.stdout.flush()\nsignal.pause()\n");
        let directory = tempfile::tempdir().expect("a temporary directory");
        let mut child = command
            .current_dir(directory.path())
            .args(["-c", &program])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 starts");
        let mut ready = String::new();
        let stdout = child.stdout.as_mut().expect("stdout is a pipe");
        BufReader::new(stdout).read_line(&mut ready).expect("python3 says it is ready");
        if !ready.ends_with('\n') {
            let mut error = String::new();
            child.stderr.as_mut().map(|stderr| stderr.read_to_string(&mut error));
            panic!("the script failed: {error}");
        }
        let children =
            ready.split_whitespace().filter_map(|word| word.parse().ok()).filter(|&pid: &i32| pid > 1);
        let pids: Vec<i32> = std::iter::once(child.id() as i32).chain(children).collect();
        let processes = (1..).zip(&pids).map(|(number, &pid)| source_process(pid, number)).collect();
        for pid in pids {
            kill(Pid::from_raw(pid), Signal::SIGSTOP).expect("the program runs");
        }
        Self { child, directory, processes }
    }

    /// The working directory of the program.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Captures the files; what is refused comes second.
    pub fn capture(&self, access: Access) -> (CapturedFiles, Vec<Obstacle>) {
        self.look(match access {
            Access::Survey => Look::Survey,
            Access::Frozen => Look::Frozen { codicil: None, descriptors: Vec::new() },
        })
    }

    /// Captures the files of the program alone, which says itself what descriptors it has.
    pub fn capture_told(&self) -> (CapturedFiles, Vec<Obstacle>) {
        let [process] = self.processes.as_slice() else { panic!("there are children") };
        kill(Pid::from_raw(process.pid.0), Signal::SIGCONT).expect("the program is there");
        let stopped = StoppedProcess::stop(process).unwrap();
        let threads = vec![Thread { tid: process.ns_pid, state: None }];
        let read = || Ok(VmaReader::new(process.pid).read()?.to_vec());
        let layout = capture_layout(process, NsPid(0), threads, 0, read).unwrap();
        let (_, descriptors) = capture_stopped(layout, &stopped, &[], None).unwrap();
        assert!(descriptors.is_some(), "it has said nothing");
        let found = self.look(Look::Frozen { codicil: None, descriptors: vec![descriptors] });
        stopped.resume().unwrap();
        found
    }

    fn look(&self, look: Look) -> (CapturedFiles, Vec<Obstacle>) {
        let env = ContainerEnv::open(self.processes[0].pid).unwrap();
        let mut obstacles = Obstacles::default();
        let captured = capture_files(&self.processes, &env, look, &mut obstacles).unwrap();
        (captured, obstacles.into_sorted())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        for process in self.processes.iter().rev() {
            kill(Pid::from_raw(process.pid.0), Signal::SIGKILL).ok();
        }
        self.child.wait().ok();
    }
}

fn source_process(pid: i32, number: i32) -> SourceProcess {
    let pid = HostPid(pid);
    let ns_pid = NsPid(number);
    SourceProcess {
        pid,
        ns_pid,
        parent: HostPid(std::process::id() as i32),
        pgid: ns_pid,
        sid: ns_pid,
        pidfd: pidfd_open(pid).unwrap().into(),
    }
}

impl CapturedFiles {
    /// The description behind descriptor `fd` of the `process`-th process.
    pub(crate) fn at(&self, process: usize, fd: i32) -> &Description {
        &self.descriptions[self.id_at(process, fd)]
    }

    /// Its kind.
    pub(crate) fn kind_at(&self, process: usize, fd: i32) -> &DescriptionKind {
        &self.at(process, fd).kind
    }

    /// Its number.
    pub(crate) fn id_at(&self, process: usize, fd: i32) -> usize {
        let entry = self.tables[process].1.iter().find(|entry| entry.fd == fd);
        entry.unwrap_or_else(|| panic!("no fd {fd} in {:?}", self.tables[process])).description.0 as usize
    }
}
