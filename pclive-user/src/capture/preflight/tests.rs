//! Surveys real processes in namespaces of their own.

use super::survey;
use crate::capture::env::ContainerEnv;
use crate::capture::tree::read_tree;
use crate::capture::{Obstacle, Obstacles};
use pclive_wire::HostPid;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// Something like a container: a process in its own pid, network, mount and IPC namespaces, leader of a session.
struct Contained {
    unshare: Child,
    init: HostPid,
}

impl Contained {
    /// Runs `script` with Python as PID 1, until it prints a line.
    fn run(script: &str) -> Self {
        let prelude = "import ctypes, os, signal, sys, threading, time\nlibc = ctypes.CDLL(None)\nos.setsid()\n\
                       os.closerange(3, 1024)\nopen('/proc/sys/kernel/ns_last_pid', 'w').write('1')\n";
        let program = format!("{prelude}{script}\nprint('ready', flush=True)\nsignal.pause()\n");
        let mut unshare = Command::new("unshare")
            .args(["--pid", "--net", "--mount", "--ipc", "--fork", "--kill-child", "--mount-proc"])
            .args(["python3", "-c", &program])
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare starts");
        let mut line = String::new();
        BufReader::new(unshare.stdout.as_mut().expect("a pipe")).read_line(&mut line).expect("a line");
        assert_eq!(line, "ready\n");
        let init = children(unshare.id() as i32)[0];
        Self { unshare, init }
    }

    /// Every process, or those of which `keep` says so.
    fn survey(&self, keep: impl Fn(HostPid) -> bool) -> Vec<Obstacle> {
        let mut pids = vec![self.init];
        let mut next = 0;
        while next < pids.len() {
            pids.extend(children(pids[next].0));
            next += 1;
        }
        pids.retain(|&pid| keep(pid));
        let processes = read_tree(&pids).unwrap();
        let mut obstacles = Obstacles::default();
        survey(&processes, &ContainerEnv::open(self.init).unwrap(), &mut obstacles).unwrap();
        obstacles.into_sorted()
    }
}

impl Drop for Contained {
    fn drop(&mut self) {
        // --kill-child takes PID 1, and the kernel then everything in its pid namespace.
        self.unshare.kill().ok();
        self.unshare.wait().ok();
    }
}

/// A cgroup with one process, which is back in the root when this value is dropped.
struct Elsewhere {
    root: PathBuf,
    cgroup: PathBuf,
    process: HostPid,
}

impl Elsewhere {
    fn put(process: HostPid) -> Self {
        let mounts = procfs::process::Process::myself().unwrap().mountinfo().unwrap();
        let mut points = mounts.into_iter().filter(|mount| mount.fs_type == "cgroup2");
        let root = points.next().expect("cgroup v2 is mounted").mount_point;
        let cgroup = root.join(format!("elsewhere-{process}"));
        std::fs::create_dir(&cgroup).unwrap();
        let elsewhere = Self { root, cgroup, process };
        std::fs::write(elsewhere.cgroup.join("cgroup.procs"), process.to_string()).unwrap();
        elsewhere
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        std::fs::write(self.root.join("cgroup.procs"), self.process.to_string()).ok();
        std::fs::remove_dir(&self.cgroup).ok();
    }
}

fn children(pid: i32) -> Vec<HostPid> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_whitespace().map(|pid| HostPid(pid.parse().unwrap())).collect()
}

/// Checks that exactly the `wanted` obstacles were found: pid in the container, object, part of the reason.
fn check(found: &[Obstacle], wanted: &[(i32, &str, &str)]) {
    for &(pid, object, reason) in wanted {
        let named =
            |o: &&Obstacle| o.pid.0 == pid && o.object.starts_with(object) && o.reason.contains(reason);
        assert!(found.iter().find(named).is_some(), "{pid} {object} ({reason}) is not in {found:#?}");
    }
    assert_eq!(found.len(), wanted.len(), "{found:#?}");
}

#[test]
fn an_ordinary_tree_has_no_obstacle() {
    let container = Contained::run(
        "if os.fork() == 0: signal.pause()\nif os.fork() == 0: os.setsid(); signal.pause()\n\
         threading.Thread(target=signal.pause, daemon=True).start()\ntime.sleep(0.1)",
    );
    check(&container.survey(|_| true), &[]);
}

#[test]
fn what_belongs_to_no_process_is_found() {
    let container = Contained::run(
        "libc.shmget(0x77, 4096, 0o1600)\nlibc.semget(0x78, 1, 0o1600)\nassert libc.mount(b'mqueue', b'/mnt', b'mqueue', 0, None) == 0\n\
         assert libc.mq_open(b'/jobs', os.O_CREAT | os.O_RDWR, 0o600, None) >= 0\n\
         if os.fork() == 0: os._exit(0)\nos.waitid(os.P_PID, 2, os.WEXITED | os.WNOWAIT)\n\
         if os.fork() == 0: signal.pause()\nif os.fork() == 0: signal.pause()",
    );
    // Of these three the zombie is in no cgroup, process 3 in another one, and process 4 as if made while the cgroup was
    // read.
    let _elsewhere = Elsewhere::put(children(container.init.0)[1]);
    let found = container.survey(|pid| pid == container.init);
    check(
        &found,
        &[
            (1, "System V shared memory", "key 119"),
            (1, "System V semaphore", "key 120"),
            (1, "message queue jobs", ""),
            (2, "process", "zombie"),
            (3, "cgroup", "not in its cgroup"),
        ],
    );
}

#[test]
fn what_a_process_did_to_itself_is_found() {
    let container = Contained::run(
        r#"
def child(act):
    if os.fork() == 0:
        act(); signal.pause()
def lost_directory():
    os.mkdir("/tmp/pclive-lost"); os.chdir("/tmp/pclive-lost"); os.rmdir("/tmp/pclive-lost")
def orphaned_group():
    os.setpgid(0, 0)
    if os.fork() > 0: os._exit(0)
def lone_thread():
    def body():
        libc.unshare(0x200 | 0x400); signal.pause() # CLONE_FS, CLONE_FILES
    threading.Thread(target=body, daemon=True).start()
def filtered():
    libc.prctl(38, 1, 0, 0, 0)
    allow = ctypes.create_string_buffer((0x6).to_bytes(2, "little") + bytes(2) + (0x7fff0000).to_bytes(4, "little"))
    program = (1).to_bytes(8, "little") + ctypes.addressof(allow).to_bytes(8, "little")
    assert libc.prctl(22, 2, ctypes.create_string_buffer(program), 0, 0) == 0
child(lambda: os.chroot("/usr"))
child(lost_directory)
child(lambda: libc.unshare(0x40000000)) # CLONE_NEWNET
child(lambda: libc.unshare(0x20000000)) # CLONE_NEWPID
child(filtered)
child(lambda: libc.ptrace(0, 0, 0, 0)) # PTRACE_TRACEME
child(lambda: os.kill(os.getpid(), signal.SIGSTOP))
child(lambda: libc.syscall(206, 4, ctypes.byref(ctypes.c_ulong(0)))) # io_setup
if libc.syscall(56, 0x400 | signal.SIGCHLD, 0, 0, 0, 0) == 0: signal.pause() # clone with CLONE_FILES
child(orphaned_group)
os.waitpid(11, 0); time.sleep(0.2)
child(lambda: os._exit(0)); os.waitid(os.P_PID, 13, os.WEXITED | os.WNOWAIT)
child(lone_thread); time.sleep(0.2) # last, since threads take numbers too
"#,
    );
    let found = container.survey(|_| true);
    check(
        &found,
        &[
            (2, "root directory", "/usr"),
            (3, "working directory", "/tmp/pclive-lost"),
            (4, "namespace net", "nested"),
            (5, "namespace pid_for_children", "children"),
            (6, "seccomp", "filter"),
            (7, "tracer", "ptrace"),
            (8, "process", "stopped"),
            (9, "mapping", "AIO"),
            (10, "descriptor table", "CLONE_FILES"),
            (12, "process group", "(11) has ended"),
            (13, "process", "zombie"),
            (14, "thread", "descriptor table"),
            (14, "thread", "working directory"),
        ],
    );
}

#[test]
fn a_process_of_the_host_is_no_container() {
    let namespaces: Vec<_> = {
        let mut obstacles = Obstacles::default();
        let container = Contained::run("");
        let mut processes = read_tree(&[container.init]).unwrap();
        processes[0].pid = HostPid(std::process::id() as i32);
        super::namespaces::survey_container(&processes[0], &mut obstacles).unwrap();
        obstacles.into_sorted().into_iter().map(|obstacle| obstacle.object).collect()
    };
    assert_eq!(namespaces, ["namespace ipc", "namespace mnt", "namespace net", "namespace pid"]);
}
