//! A child process, this test binary again, works in a cgroup of its own, and every step of it must be seen.

use super::*;
use crate::{
    capture::{
        SourceProcess,
        process::{call_wait, capture_layout, capture_stopped},
        sockets::OptionWatch,
        threads::StoppedProcess,
        vmas::{FlagSource, VmaReader, find_vdso, range},
    },
    track::{
        Tier,
        attach::TrackedProcess,
        programs::{FAULT_FUNCTION, FaultSource, ProgramLoader, RingSizes, Watch},
    },
};
use pclive_sys::{
    mem::{ProcessMemory, wipe_on_fork},
    pidfd::{pidfd_getfd, pidfd_open},
};
use pclive_wire::manifest::{Thread, Vma, VmaFlags};
use pclive_wire::{NsPid, PAGE_SIZE};
use procfs::process::MMapPath;
use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
    process::{Child, ChildStderr, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

/// Pages in the child's buffer.
const PAGES: u64 = 3000;

/// A cgroup in the v2 hierarchy, with another one below it.
struct TestCgroup {
    path: PathBuf,
}

impl TestCgroup {
    fn new() -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let root = mounts.find(|fields| fields[2] == "cgroup2").expect("a cgroup2 mount")[1];
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = Path::new(root).join(format!("pclive-observer-{}-{number}", std::process::id()));
        std::fs::create_dir_all(path.join("below")).unwrap();
        Self { path }
    }

    fn observe(&self, source: FaultSource, sizes: RingSizes) -> Result<WriteObserver> {
        let anchor = Worker::start(&self.path);
        let programs = ProgramLoader::new()?.load(source, Watch::Everything, sizes)?;
        WriteObserver::attach(programs, &Cgroup::of(anchor.pid()).unwrap())
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(self.path.join("below"));
        let _ = std::fs::remove_dir(&self.path);
    }
}

/// The sources that this kernel has.
fn sources() -> Vec<FaultSource> {
    let usable = [Tier::Tracepoint, Tier::Fentry].into_iter().filter(|tier| tier.probe().is_ok());
    let usable: Vec<_> = usable.filter_map(Tier::fault_source).collect();
    assert!(usable.contains(&FaultSource::Tracepoint));
    usable
}

/// The child: does what it is told through its standard input, a line each, and answers each with a line.
struct Worker {
    child: Child,
    answers: BufReader<ChildStderr>,
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
    let (mut listener, mut apart) = (None, None);
    for line in std::io::stdin().lines() {
        let answer = match line.unwrap().as_str() {
            "hello" => std::process::id() as u64,
            "where" => buffer.as_ptr() as u64,
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
            // A mapping that is not a part of another one.
            "keep apart" => {
                let mapping = memmap2::MmapMut::map_anon(bytes).unwrap();
                mapping.advise(memmap2::Advice::Random).unwrap();
                apart.insert(mapping).as_ptr() as u64
            }
            "advise" => {
                let mapping = apart.as_ref().unwrap();
                mapping.advise(memmap2::Advice::DontDump).unwrap();
                wipe_on_fork(mapping).unwrap();
                0
            }
            "fork" => {
                let mut child = Command::new("/bin/true").spawn().unwrap();
                child.wait().unwrap();
                u64::from(child.id())
            }
            "listen" => {
                let socket = listener.insert(TcpListener::bind("127.0.0.1:0").unwrap());
                socket.as_raw_fd() as u64
            }
            "set an option" => {
                listener.as_ref().unwrap().set_ttl(17).unwrap();
                0
            }
            other => panic!("{other}"),
        };
        eprintln!("{answer}");
    }
}

fn buffer_at(start: u64) -> PageRange {
    PageRange::new(VirtAddr(start), PAGES)
}

fn is_in(buffer: &PageRange, write: &PageWrite) -> bool {
    buffer.start <= write.page && write.page < buffer.end()
}

/// Different pages of the buffer that were written.
fn written(drained: &Drained, pid: HostPid, buffer: &PageRange) -> u64 {
    let inside = drained.writes.iter().filter(|write| write.pid == pid && is_in(buffer, write));
    inside.map(|write| write.page).collect::<BTreeSet<_>>().len() as u64
}

/// A process as tracking wants it: it is no container's.
fn source_process(pid: HostPid) -> SourceProcess {
    let number = NsPid(pid.0);
    let pidfd = pidfd_open(pid).unwrap().into();
    SourceProcess { pid, ns_pid: number, parent: HostPid(0), pgid: number, sid: number, pidfd }
}

#[test]
fn every_first_write_is_seen_also_from_a_cgroup_below() {
    for (source, place) in sources().into_iter().flat_map(|source| [(source, "."), (source, "below")]) {
        let cgroup = TestCgroup::new();
        let mut worker = Worker::start(&cgroup.path.join(place));
        let mut observer = cgroup.observe(source, RingSizes::default()).unwrap();
        let buffer = buffer_at(worker.tell("write"));
        let drained = observer.drain().unwrap();
        assert_eq!(written(&drained, worker.pid(), &buffer), PAGES, "{source:?}");
        assert_eq!(drained.lost, Lost::default());
        assert!(drained.writes.is_sorted_by_key(|write| write.time));
        // Nothing of it is seen twice, and pages that are mapped and not protected raise no more faults.
        worker.tell("write");
        assert_eq!(written(&observer.drain().unwrap(), worker.pid(), &buffer), 0);
    }
}

#[test]
fn every_write_to_a_protected_page_is_seen_once_until_it_is_protected_again() {
    for source in sources() {
        let cgroup = TestCgroup::new();
        let mut worker = Worker::start(&cgroup.path);
        let buffer = buffer_at(worker.tell("write"));
        let mut observer = cgroup.observe(source, RingSizes::default()).unwrap();
        let process = source_process(worker.pid());
        let mut vmas = VmaReader::new(process.pid);
        let layout = vmas.read().unwrap();
        let mut tracked = TrackedProcess::attach(&process).unwrap();
        let mut protect = || {
            let mut walk = tracked.begin_round(layout).unwrap();
            tracked.next_pages(&mut walk, u64::MAX).unwrap()
        };
        protect();
        for _ in 0..3 {
            observer.drain().unwrap();
            worker.tell("write");
            worker.tell("write");
            let drained = observer.drain().unwrap();
            let events = drained.writes.iter().filter(|write| is_in(&buffer, write)).count() as u64;
            assert_eq!((events, written(&drained, process.pid, &buffer)), (PAGES, PAGES), "{source:?}");
            assert_eq!(protect().intersection(&[buffer].into_iter().collect()).pages(), PAGES);
        }
    }
}

#[test]
fn writes_made_from_outside_raise_events_where_the_memory_is_known() {
    for source in sources() {
        let cgroup = TestCgroup::new();
        let mut worker = Worker::start(&cgroup.path);
        let buffer = buffer_at(worker.tell("where"));
        let mut observer = cgroup.observe(source, RingSizes::default()).unwrap();
        let bytes = vec![1; buffer.bytes() as usize];
        ProcessMemory::open(worker.pid()).unwrap().write(buffer.start, &bytes).unwrap();
        let seen = written(&observer.drain().unwrap(), worker.pid(), &buffer);
        // The writer is not of the container, and no CPU faulted in the container's memory.
        let expected = match source {
            FaultSource::Fentry => PAGES,
            FaultSource::Tracepoint => 0,
        };
        assert_eq!(seen, expected, "{source:?}");
    }
}

#[test]
fn processes_outside_of_the_container_are_not_seen() {
    for source in sources() {
        let (cgroup, other) = (TestCgroup::new(), TestCgroup::new());
        let mut outsider = Worker::start(&other.path);
        let mut observer = cgroup.observe(source, RingSizes::default()).unwrap();
        observer.drain().unwrap();
        outsider.tell("write");
        outsider.tell("fork");
        assert_eq!(observer.drain().unwrap(), Drained::default());
    }
}

#[test]
fn an_overflow_is_counted() {
    let cgroup = TestCgroup::new();
    let mut worker = Worker::start(&cgroup.path);
    let sizes = RingSizes { writes: PAGE_SIZE as u32, changes: PAGE_SIZE as u32 };
    let mut observer = cgroup.observe(FaultSource::Tracepoint, sizes).unwrap();
    observer.drain().unwrap();
    let buffer = buffer_at(worker.tell("write"));
    let drained = observer.drain().unwrap();
    assert!(drained.lost.writes > 0 && drained.lost.changes == 0, "{:?}", drained.lost);
    // A page of ring has room for 128 events of 32 bytes.
    assert!(drained.writes.len() <= 128);
    assert!(drained.writes.len() as u64 + drained.lost.writes >= PAGES);
    assert!(written(&drained, worker.pid(), &buffer) < PAGES);
    // The count is of the time since the last drain, and there is room again.
    worker.tell("remap");
    assert_eq!(observer.drain().unwrap().lost, Lost::default());
    for _ in 0..200 {
        worker.tell("remap");
    }
    assert!(observer.drain().unwrap().lost.changes > 0);
}

#[test]
fn changes_of_the_address_space_are_seen() {
    let cgroup = TestCgroup::new();
    let mut worker = Worker::start(&cgroup.path);
    let mut observer = cgroup.observe(FaultSource::Tracepoint, RingSizes::default()).unwrap();
    let old = buffer_at(worker.tell("remap"));
    let new = buffer_at(worker.tell("write"));
    let pid = worker.pid();
    let mut seen = || {
        let changes = observer.drain().unwrap().changes;
        changes.into_iter().filter(|c| c.pid == pid).map(|c| c.what).collect::<Vec<_>>()
    };
    let remap = seen();
    assert!(remap.contains(&ChangeKind::Mapped(new)), "{remap:?}");
    assert!(remap.contains(&ChangeKind::Unmapped(old)), "{remap:?}");
    let protected = buffer_at(worker.tell("protect"));
    let protect = seen();
    assert!(protect.contains(&ChangeKind::Protected(protected)), "{protect:?}");
}

#[test]
fn processes_that_come_change_and_go_are_seen() {
    let cgroup = TestCgroup::new();
    let mut worker = Worker::start(&cgroup.path);
    let mut observer = cgroup.observe(FaultSource::Tracepoint, RingSizes::default()).unwrap();
    let child = HostPid(worker.tell("fork") as i32);
    let changes = observer.drain().unwrap().changes;
    let of = |pid| move |change: &&Change| change.pid == pid;
    assert!(
        changes.iter().filter(of(worker.pid())).any(|c| c.what == ChangeKind::Forked(child)),
        "{changes:?}"
    );
    let life: Vec<_> = changes.iter().filter(of(child)).map(|change| change.what).collect();
    assert!(life.contains(&ChangeKind::Execed), "{life:?}");
    assert_eq!(life.last(), Some(&ChangeKind::Exited));
}

#[test]
fn options_that_are_set_on_a_socket_of_the_container_are_noticed() {
    let cgroup = TestCgroup::new();
    let mut worker = Worker::start(&cgroup.path);
    let fd = worker.tell("listen") as i32;
    let mut observer = cgroup.observe(FaultSource::Tracepoint, RingSizes::default()).unwrap();
    let mut options = observer.take_option_watch().expect("the kernel accepts the program");
    let process = source_process(worker.pid());
    let socket = pidfd_getfd(process.pidfd.as_fd(), fd).unwrap();
    assert!(!options.is_unchanged(socket.as_fd()));
    options.watch(socket.as_fd());
    assert!(options.is_unchanged(socket.as_fd()));
    worker.tell("set an option");
    assert!(!options.is_unchanged(socket.as_fd()));
    options.watch(socket.as_fd());
    assert!(options.is_unchanged(socket.as_fd()));

    let foreign = TcpListener::bind("127.0.0.1:0").unwrap();
    options.watch(foreign.as_fd());
    assert!(!options.is_unchanged(foreign.as_fd()), "nobody would notice");
}

#[test]
fn a_source_that_probes_well_attaches_and_one_that_does_not_says_why() {
    let cgroup = TestCgroup::new();
    for tier in [Tier::Tracepoint, Tier::Fentry] {
        let source = tier.fault_source().expect("these tiers have one");
        let attached = cgroup.observe(source, RingSizes::default()).map(drop);
        match (tier.probe(), attached) {
            (Ok(()), Ok(())) => {}
            (Err(probe), Err(attach)) => {
                assert_eq!(probe.to_string(), attach.to_string());
                assert!(matches!(probe, ObserveError::Program { program: FAULT_FUNCTION, .. }), "{probe:?}");
            }
            (probe, attach) => panic!("{probe:?}, but {attach:?}"),
        }
    }
}

#[test]
fn flags_of_mappings_are_told_as_smaps_says_them() {
    for source in sources() {
        let cgroup = TestCgroup::new();
        let worker = Worker::start(&cgroup.path);
        let mut observer = cgroup.observe(source, RingSizes::default()).unwrap();
        let mut flags = observer.take_mapping_flags().expect("this kernel's flags are those known here");
        let pid = worker.pid();
        let vdso = find_vdso(pid).unwrap().unwrap();
        let stopped = StoppedProcess::stop(&source_process(pid)).unwrap();

        let smaps = procfs::process::Process::new(pid.0).unwrap().smaps().unwrap();
        let said: Vec<_> = smaps.iter().filter(|map| map.pathname != MMapPath::Vsyscall).collect();
        let at: Vec<VirtAddr> = said.iter().map(|map| range(map).start).collect();
        let mut ask = |at: &[VirtAddr]| {
            flags.pose(pid, at);
            call_wait(&stopped, vdso).unwrap();
            flags.answers(at.len())
        };
        let (told, nowhere) = (ask(&at), ask(&[VirtAddr(0)]));
        flags.pose(pid, &at);
        let nobody = flags.answers(at.len());
        stopped.resume().unwrap();

        assert_eq!(told.len(), said.len());
        for (map, told) in said.into_iter().zip(told) {
            let said = map.extension.vm_flags;
            assert_eq!(told.unwrap(), said, "{source:?} {map:?}");
        }
        assert_eq!(nowhere, [None], "there is no mapping");
        assert_eq!(nobody, vec![None; at.len()], "nobody came by");
    }
}

#[test]
fn flags_that_have_changed_without_a_trace_in_maps_are_captured() {
    let cgroup = TestCgroup::new();
    let mut worker = Worker::start(&cgroup.path);
    let mut observer = cgroup.observe(FaultSource::Tracepoint, RingSizes::default()).unwrap();
    let mut flags = observer.take_mapping_flags().unwrap();
    let process = source_process(worker.pid());
    let start = VirtAddr(worker.tell("keep apart"));
    let mut vmas = VmaReader::new(process.pid);
    let stop = || StoppedProcess::stop(&process).unwrap();
    let stopped = stop();
    let before = vmas.read().unwrap().to_vec();
    stopped.resume().unwrap();
    worker.tell("advise");

    let stopped = stop();
    let threads = stopped.threads.iter().map(|thread| Thread { tid: thread.ns_tid, state: None }).collect();
    let layout = capture_layout(&process, NsPid(0), threads, 0, || Ok(vmas.read()?.to_vec())).unwrap();
    let by_maps = layout.vmas.clone();
    let (captured, _) = capture_stopped(layout, &stopped, &[], Some(&mut flags)).unwrap();
    stopped.resume().unwrap();

    let flags_of = |vmas: &[Vma]| vmas.iter().find(|vma| vma.range.start == start).unwrap().flags;
    assert_eq!(flags_of(&before), VmaFlags(VmaFlags::RANDOM));
    assert!(by_maps == before, "maps show it");
    let advised = VmaFlags::RANDOM | VmaFlags::DONTDUMP | VmaFlags::WIPEONFORK;
    assert_eq!(flags_of(&captured.vmas), VmaFlags(advised));
}
