//! A child process, this test binary again, works in a cgroup of its own, and every step of it must be seen.

use super::*;
use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

/// Pages in the child's buffer.
const PAGES: u64 = 3000;

/// An empty cgroup in the v2 hierarchy.
struct TestCgroup(PathBuf);

impl TestCgroup {
    fn new() -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        let root =
            mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|line| line[2] == "cgroup2");
        let name =
            format!("pclive-observer-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let path = Path::new(root.expect("a cgroup2 mount")[1]).join(name);
        std::fs::create_dir_all(path.join("inner")).unwrap();
        Self(path)
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(self.0.join("inner"));
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// The child: does what it is told through its standard input, a line each, and answers each with a line.
struct Worker {
    child: Child,
    answers: BufReader<std::process::ChildStderr>,
}

impl Worker {
    /// A worker in `cgroup`.
    fn start(cgroup: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "track::observer::tests::worker",
                "--ignored",
                "--nocapture",
                "--test-threads=1",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        std::fs::write(cgroup.join("cgroup.procs"), child.id().to_string()).unwrap();
        let answers = BufReader::new(child.stderr.take().unwrap());
        let mut worker = Self { child, answers };
        worker.tell("hello");
        worker
    }

    fn pid(&self) -> HostPid {
        HostPid(self.child.id() as i32)
    }

    /// Has the worker do something; returns the number it answers.
    fn tell(&mut self, command: &str) -> u64 {
        writeln!(self.child.stdin.as_ref().unwrap(), "{command}").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        answer.trim().parse().unwrap_or_else(|_| panic!("worker answered {answer:?} to {command:?}"))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "not a test: the worker of the other tests"]
fn worker() {
    // A huge page would take many pages with one fault.
    nix::sys::prctl::set_thp_disable(true).unwrap();
    let bytes = (PAGES * PAGE_SIZE) as usize;
    let mut buffer = memmap2::MmapMut::map_anon(bytes).unwrap();
    for line in std::io::stdin().lines() {
        let answer = match line.unwrap().as_str() {
            "hello" => std::process::id() as u64,
            "write" => {
                buffer.iter_mut().step_by(PAGE_SIZE as usize).for_each(|byte| *byte = 1);
                buffer.as_ptr() as u64
            }
            "remap" => {
                let start = buffer.as_ptr() as u64;
                buffer = memmap2::MmapMut::map_anon(bytes).unwrap();
                start
            }
            "protect" => {
                let mapping = memmap2::MmapMut::map_anon(bytes).unwrap().make_read_only().unwrap();
                mapping.as_ptr() as u64
            }
            "fork" => {
                let mut child = Command::new("/bin/true").spawn().unwrap();
                child.wait().unwrap();
                u64::from(child.id())
            }
            other => panic!("{other}"),
        };
        eprintln!("{answer}");
    }
}

fn drain(observer: &mut WriteObserver) -> Drained {
    observer.drain().unwrap()
}

fn buffer_at(start: u64) -> PageRange {
    PageRange::new(VirtAddr(start), PAGES)
}

/// Different pages of the buffer that were written.
fn written(drained: &Drained, pid: HostPid, buffer: &PageRange) -> u64 {
    let inside =
        |write: &&PageWrite| write.pid == pid && buffer.start <= write.page && write.page < buffer.end();
    let pages: std::collections::BTreeSet<_> = drained.writes.iter().filter(inside).map(|w| w.page).collect();
    pages.len() as u64
}

#[test]
fn every_first_write_is_seen_also_from_a_cgroup_below() {
    for inner in [false, true] {
        let cgroup = TestCgroup::new();
        let mut worker = Worker::start(&if inner { cgroup.0.join("inner") } else { cgroup.0.clone() });
        let mut observer = WriteObserver::attach(&cgroup.0, FaultSource::Tracepoint).unwrap();
        let buffer = buffer_at(worker.tell("write"));
        let drained = drain(&mut observer);
        assert_eq!(written(&drained, worker.pid(), &buffer), PAGES);
        assert_eq!(drained.lost, Lost::default());
        assert!(drained.writes.is_sorted_by_key(|write| write.time));
        // Nothing of it is seen twice, and pages that are mapped and not protected raise no more faults.
        worker.tell("write");
        assert_eq!(written(&drain(&mut observer), worker.pid(), &buffer), 0);
    }
}

#[test]
fn processes_outside_of_the_container_are_not_seen() {
    let (cgroup, other) = (TestCgroup::new(), TestCgroup::new());
    let mut outsider = Worker::start(&other.0);
    let mut observer = WriteObserver::attach(&cgroup.0, FaultSource::Tracepoint).unwrap();
    outsider.tell("write");
    outsider.tell("fork");
    assert_eq!(drain(&mut observer), Drained::default());
}

#[test]
fn an_overflow_is_counted() {
    let cgroup = TestCgroup::new();
    let mut worker = Worker::start(&cgroup.0);
    let sizes = RingSizes { writes: PAGE_SIZE as u32, changes: PAGE_SIZE as u32 };
    let mut observer = WriteObserver::attach_with(&cgroup.0, FaultSource::Tracepoint, sizes).unwrap();
    let buffer = buffer_at(worker.tell("write"));
    let drained = drain(&mut observer);
    assert!(drained.lost.writes > 0 && drained.lost.changes == 0, "{:?}", drained.lost);
    // A page of ring has room for 128 events of 32 bytes, less the one byte that tells full from empty.
    assert!(drained.writes.len() <= 128);
    assert!(drained.writes.len() as u64 + drained.lost.writes >= PAGES);
    assert!(written(&drained, worker.pid(), &buffer) < PAGES);
    // The count is of the time since the last drain, and there is room again.
    worker.tell("remap");
    assert_eq!(drain(&mut observer).lost, Lost::default());
    for _ in 0..200 {
        worker.tell("remap");
    }
    assert!(drain(&mut observer).lost.changes > 0);
}

#[test]
fn changes_of_the_address_space_are_seen() {
    let cgroup = TestCgroup::new();
    let mut worker = Worker::start(&cgroup.0);
    let mut observer = WriteObserver::attach(&cgroup.0, FaultSource::Tracepoint).unwrap();
    let old = buffer_at(worker.tell("remap"));
    let new = buffer_at(worker.tell("write"));
    let kinds = |drained: &Drained| drained.changes.iter().map(|change| change.what).collect::<Vec<_>>();
    let seen = kinds(&drain(&mut observer));
    assert!(seen.contains(&ChangeKind::Mapped(new)) && seen.contains(&ChangeKind::Unmapped(old)), "{seen:?}");

    let protected = buffer_at(worker.tell("protect"));
    let seen = kinds(&drain(&mut observer));
    assert!(seen.contains(&ChangeKind::Protected(protected)), "{seen:?}");
}

#[test]
fn processes_that_come_change_and_go_are_seen() {
    let cgroup = TestCgroup::new();
    let mut worker = Worker::start(&cgroup.0);
    let mut observer = WriteObserver::attach(&cgroup.0, FaultSource::Tracepoint).unwrap();
    let child = HostPid(worker.tell("fork") as i32);
    let drained = drain(&mut observer);
    let of = |pid| move |change: &&Change| change.pid == pid;
    assert!(
        drained
            .changes
            .iter()
            .any(|change| change.pid == worker.pid() && change.what == ChangeKind::Forked(child))
    );
    let life: Vec<_> = drained
        .changes
        .iter()
        .filter(of(child))
        .map(|change| change.what)
        .filter(|what| matches!(what, ChangeKind::Execed | ChangeKind::Exited))
        .collect();
    assert_eq!(life, [ChangeKind::Execed, ChangeKind::Exited]);
}

#[test]
fn a_source_that_probes_well_attaches_and_one_that_does_not_says_why() {
    let cgroup = TestCgroup::new();
    for source in [FaultSource::Tracepoint, FaultSource::Fentry] {
        let attached = WriteObserver::attach(&cgroup.0, source).map(drop);
        match (WriteObserver::probe(source), attached) {
            (Ok(()), Ok(())) => {}
            (Err(probe), Err(attach)) => {
                assert_eq!(probe.to_string(), attach.to_string());
                assert!(matches!(probe, ObserveError::Program { program: FAULT_FUNCTION, .. }), "{probe:?}");
            }
            (probe, attach) => panic!("{probe:?}, but {attach:?}"),
        }
    }
}
