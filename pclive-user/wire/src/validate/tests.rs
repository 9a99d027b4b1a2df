//! One manifest that is good, and everything that makes it bad.

use super::*;
use crate::codec;
use crate::manifest::*;
use crate::units::{PAGE_SIZE, PageRange, Round};
use proptest::prelude::*;

fn vma(first: u64, pages: u64, backing: Backing) -> Vma {
    let range = PageRange { start: VirtAddr(first * PAGE_SIZE), pages };
    Vma { range, prot: 3, flags: VmaFlags::default(), backing }
}

fn thread(tid: i32) -> Thread {
    let state = ThreadState {
        registers: Registers::default(),
        xstate: vec![0; 832],
        blocked: 0,
        pending: vec![vec![0; 128]],
        altstack: AltStack::default(),
        robust_list: (VirtAddr(0), 24),
        clear_child_tid: VirtAddr(0),
        rseq: Some(Rseq { address: VirtAddr(0x7000_0020), size: 32, signature: 0x5305_3053, flags: 0 }),
        comm: b"worker".to_vec(),
        parent_death_signal: 0,
        timer_slack_ns: 50_000,
        credentials: Credentials::default(),
        scheduling: Scheduling::default(),
    };
    Thread { tid: NsPid(tid), state: Some(Box::new(state)) }
}

fn process(pid: i32, ppid: i32, fds: &[(i32, u32)]) -> Process {
    let entry = |&(fd, id): &(i32, u32)| FdEntry { fd, cloexec: false, description: DescriptionId(id) };
    let state = ProcessState {
        cwd: b"/".to_vec(),
        umask: 0o22,
        limits: vec![(1024, 4096); 16],
        dumpable: 1,
        child_subreaper: false,
        personality: 0,
        oom_score_adj: 0,
        actions: vec![SigAction::default(); 64],
        pending: Vec::new(),
        itimers: Default::default(),
        timers: vec![PosixTimer {
            id: 0,
            clock: 1,
            notify: 4,
            signal: 14,
            value: 0,
            thread: NsPid(pid + 1),
            value_ns: 5,
            interval_ns: 0,
        }],
        fds: fds.iter().map(entry).collect(),
    };
    let file = Backing::File { path: b"/bin/x".to_vec(), offset: PAGE_SIZE, shared: false, size: 9000 };
    let shared = Backing::Shared { object: 0, offset: 0, size: 8 * PAGE_SIZE };
    Process {
        pid: NsPid(pid),
        ppid: NsPid(ppid),
        pgid: NsPid(pid),
        sid: NsPid(0),
        exe: b"/bin/x".to_vec(),
        mm: MmBounds { auxv: vec![0; 320], ..Default::default() },
        vmas: vec![vma(16, 2, file), vma(18, 4, Backing::Anonymous), vma(99, 8, shared)],
        threads: vec![thread(pid), thread(pid + 1)],
        fd_size: 64,
        state: Some(Box::new(state)),
    }
}

fn good() -> Manifest {
    let describe = |kind| Description { flags: 2, owner: (0, 0, 0), kind };
    let target = |process, fd| EpollTarget { process: NsPid(process), fd, events: 1, data: 7 };
    let pipe =
        |contents: &[u8]| DescriptionKind::Pipe { pipe: 0, capacity: 65536, contents: contents.to_vec() };
    let unix = |id, peer| {
        let socket_type = 1;
        let (address, queue, options) = (Vec::new(), vec![b"hi".to_vec()], Vec::new());
        UnixSocket { id, socket_type, address, peer, backlog: None, queue, shutdown: 0, owner: 0, options }
    };
    let connection = TcpConnection {
        remote: "10.0.0.9:4242".parse().unwrap(),
        fin_received: false,
        fin_sent: false,
        read_shutdown: false,
        receive_sequence: 1,
        send_sequence: 2,
        receive_queue: b"GET".to_vec(),
        send_queue: b"OK".to_vec(),
        unsent: 1,
        window: [0; 5],
        mss: 1448,
        advertised_mss: 1460,
        path_mtu: 1500,
        congestion_window: 10,
        window_scale: Some((7, 7)),
        sack: true,
        timestamp: Some(5),
    };
    let tcp = TcpSocket {
        ipv6: false,
        local: Some("10.0.0.1:6379".parse().unwrap()),
        state: TcpState::Connected(Box::new(connection)),
        owner: 0,
        options: vec![SocketOption { level: 1, name: 2, value: OptionValue::new(&[1, 0, 0, 0]).unwrap() }],
    };
    Manifest {
        round: Round(4),
        keep_awake: true,
        last: true,
        nice: 0,
        processes: vec![process(1, 0, &[(0, 0), (3, 2), (4, 3), (5, 1)]), process(7, 1, &[(0, 0), (3, 4)])],
        descriptions: vec![
            describe(pipe(b"unread")),
            describe(DescriptionKind::Epoll { targets: vec![target(1, 3), target(1, 4)] }),
            describe(DescriptionKind::Unix(Box::new(unix(1, UnixPeer::Socket(2))))),
            describe(DescriptionKind::Unix(Box::new(unix(2, UnixPeer::Socket(1))))),
            describe(DescriptionKind::Tcp(Box::new(tcp))),
        ],
    }
}

fn thread_state(m: &mut Manifest) -> &mut ThreadState {
    m.processes[1].threads[1].state.as_mut().unwrap()
}

fn state(m: &mut Manifest) -> &mut ProcessState {
    m.processes[1].state.as_mut().unwrap()
}

fn tcp(m: &mut Manifest) -> &mut TcpSocket {
    match &mut m.descriptions[4].kind {
        DescriptionKind::Tcp(socket) => socket,
        other => panic!("{other:?}"),
    }
}

fn connection(m: &mut Manifest) -> &mut TcpConnection {
    match &mut tcp(m).state {
        TcpState::Connected(connection) => connection,
        other => panic!("{other:?}"),
    }
}

fn epoll_targets(m: &mut Manifest) -> &mut Vec<EpollTarget> {
    match &mut m.descriptions[1].kind {
        DescriptionKind::Epoll { targets } => targets,
        other => panic!("{other:?}"),
    }
}

type Case = (fn(&mut Manifest), Fault);

#[track_caller]
fn assert_faults(cases: &[Case]) {
    for (number, (spoil, fault)) in cases.iter().enumerate() {
        let mut manifest = good();
        spoil(&mut manifest);
        assert_eq!(manifest.validate().map_err(|e| e.fault), Err(*fault), "case {number}");
    }
}

#[test]
fn the_good_manifest_passes_and_survives_the_codec() {
    let manifest = good();
    assert_eq!(manifest.validate(), Ok(()));
    let frame = codec::encode(&manifest, 1 << 20).unwrap();
    assert_eq!(codec::decode::<Manifest>(&frame[codec::HEADER_LEN..]).unwrap(), manifest);
}

#[test]
fn the_process_tree_is_checked() {
    assert_faults(&[
        (|m| m.processes.clear(), Fault::Count(Item::Processes)),
        (|m| m.processes.swap(0, 1), Fault::Leader),
        (|m| m.processes[0].ppid = NsPid(7), Fault::Leader),
        (|m| m.processes[1].ppid = NsPid(0), Fault::Dangling(Item::Parent)),
        (|m| m.processes[1].ppid = NsPid(9), Fault::Dangling(Item::Parent)),
        (|m| m.processes[1].ppid = NsPid(7), Fault::Dangling(Item::Parent)),
        (|m| m.processes[1].threads.swap(0, 1), Fault::Leader),
        (|m| m.processes[1].threads.clear(), Fault::Leader),
        (|m| m.processes[1].threads[1].tid = NsPid(1), Fault::Duplicate(Item::Id)),
        (|m| m.processes[1].threads[1].tid = NsPid(0), Fault::Range(Item::Id)),
        (|m| m.processes[1].threads[1].tid = NsPid(i32::MAX), Fault::Range(Item::Id)),
        (|m| m.processes[1].sid = NsPid(-1), Fault::Range(Item::Id)),
        (|m| m.processes[1].state = None, Fault::StateMissing),
        (|m| m.processes[1].threads[1].state = None, Fault::StateMissing),
    ]);
    let mut unfinished = good();
    unfinished.last = false;
    unfinished.processes[1].state = None;
    unfinished.processes[1].threads[1].state = None;
    unfinished.descriptions.clear();
    unfinished.processes[0].state = None;
    assert_eq!(unfinished.validate(), Ok(()));
}

#[test]
fn mappings_are_checked() {
    assert_faults(&[
        (|m| m.processes[1].vmas.swap(0, 1), Fault::Order),
        (|m| m.processes[1].vmas[0].range.pages = 3, Fault::Order),
        (|m| m.processes[1].vmas[0].range.pages = 0, Fault::Range(Item::Addresses)),
        (|m| m.processes[1].vmas[2].range.pages = u64::MAX, Fault::Range(Item::Addresses)),
        (|m| m.processes[1].vmas[0].range.start.0 += 1, Fault::Range(Item::Addresses)),
        (|m| m.processes[1].vmas[0].prot = 8, Fault::Range(Item::Protection)),
        (|m| m.processes[1].vmas[0].flags = VmaFlags(1 << 15), Fault::Range(Item::MappingFlags)),
        (
            |m| {
                let shared = Backing::Shared { object: 0, offset: 0, size: 1 };
                m.processes[1].vmas[2].backing = shared;
            },
            Fault::SharedSize,
        ),
        (
            |m| {
                let (offset, size) = (!0xfff, 1);
                let file = Backing::File { path: b"/x".to_vec(), offset, shared: false, size };
                m.processes[1].vmas[2].backing = file;
            },
            Fault::Range(Item::FileOffset),
        ),
        (|m| m.processes[1].exe = b"bin".to_vec(), Fault::Path(Item::Executable)),
        (|m| m.processes[1].exe = b"/b\0".to_vec(), Fault::Path(Item::Executable)),
        (|m| m.processes[1].exe = vec![b'/'; 4096], Fault::Path(Item::Executable)),
        (|m| m.processes[1].mm.auxv = vec![0; 24], Fault::Size(Item::AuxiliaryVector)),
        (|m| m.processes[1].mm.auxv = vec![0; 2048], Fault::Size(Item::AuxiliaryVector)),
        (|m| m.processes[1].mm.brk = VirtAddr(u64::MAX), Fault::Range(Item::Addresses)),
        (|m| m.processes[1].mm.start_brk = VirtAddr(4096), Fault::Range(Item::Addresses)),
    ]);
}

#[test]
fn states_are_checked() {
    assert_faults(&[
        (|m| thread_state(m).xstate.truncate(500), Fault::Size(Item::ExtendedState)),
        (|m| thread_state(m).xstate = vec![0; 1 << 17], Fault::Size(Item::ExtendedState)),
        (|m| thread_state(m).pending[0].push(0), Fault::Size(Item::SignalInfo)),
        (|m| thread_state(m).comm = vec![b'x'; 16], Fault::Size(Item::Name)),
        (|m| thread_state(m).comm = b"a\0b".to_vec(), Fault::Size(Item::Name)),
        (|m| thread_state(m).parent_death_signal = 65, Fault::Range(Item::SignalNumber)),
        (|m| thread_state(m).altstack.sp = VirtAddr(u64::MAX), Fault::Range(Item::Addresses)),
        (|m| thread_state(m).rseq.as_mut().unwrap().address.0 += 8, Fault::Range(Item::Rseq)),
        (|m| thread_state(m).credentials.groups = vec![0; 65537], Fault::Count(Item::Groups)),
        (|m| state(m).cwd = Vec::new(), Fault::Path(Item::WorkingDirectory)),
        (|m| state(m).umask = 0o1000, Fault::Range(Item::Umask)),
        (|m| state(m).dumpable = 3, Fault::Range(Item::Dumpable)),
        (|m| state(m).oom_score_adj = -1001, Fault::Range(Item::OomScoreAdjustment)),
        (|m| state(m).limits.truncate(15), Fault::Count(Item::Limits)),
        (|m| state(m).actions.push(SigAction::default()), Fault::Count(Item::Actions)),
        (|m| state(m).timers[0].thread = NsPid(1), Fault::Dangling(Item::Threads)),
        (|m| state(m).timers[0].signal = -1, Fault::Range(Item::SignalNumber)),
        (|m| state(m).timers.extend_from_within(..), Fault::Duplicate(Item::Timer)),
        (|m| state(m).fds[0].fd = -1, Fault::Range(Item::Descriptors)),
        (|m| state(m).fds[0].fd = 3, Fault::Duplicate(Item::Descriptors)),
        (|m| state(m).fds[0].description.0 = 5, Fault::Dangling(Item::Descriptions)),
    ]);
}

#[test]
fn descriptions_are_checked() {
    assert_faults(&[
        (|m| epoll_targets(m)[0].fd = 9, Fault::Dangling(Item::EpollTarget)),
        (|m| epoll_targets(m)[0].fd = 5, Fault::Dangling(Item::EpollTarget)),
        (|m| epoll_targets(m)[0].process = NsPid(7), Fault::Dangling(Item::EpollTarget)),
        (|m| epoll_targets(m)[0].fd = 4, Fault::Duplicate(Item::EpollTarget)),
        (|m| m.descriptions.push(m.descriptions[0].clone()), Fault::Duplicate(Item::Contents)),
        (|m| m.descriptions.push(m.descriptions[2].clone()), Fault::Duplicate(Item::SocketPeer)),
        (|m| m.descriptions[0].kind = DescriptionKind::Stdio { stream: 3 }, Fault::Range(Item::Stream)),
        (
            |m| {
                let (pipe, capacity, contents) = (0, 4, b"unread".to_vec());
                m.descriptions[0].kind = DescriptionKind::Pipe { pipe, capacity, contents };
            },
            Fault::Range(Item::Capacity),
        ),
        (
            |m| {
                let (path, offset, size) = (b"/x".to_vec(), u64::MAX, 0);
                m.descriptions[0].kind = DescriptionKind::Regular { path, offset, size };
            },
            Fault::Range(Item::FileOffset),
        ),
        (|m| tcp(m).ipv6 = true, Fault::Family),
        (|m| tcp(m).local = None, Fault::Family),
        (|m| connection(m).remote = "[::1]:1".parse().unwrap(), Fault::Family),
        (|m| connection(m).unsent = 3, Fault::Range(Item::Unsent)),
        (|m| connection(m).mss = 0, Fault::Range(Item::SegmentSize)),
        (|m| connection(m).window_scale = Some((7, 15)), Fault::Range(Item::WindowScale)),
    ]);
}

#[test]
fn an_error_says_where_and_what() {
    let mut manifest = good();
    manifest.processes[1].vmas[1].prot = 9;
    let error = manifest.validate().unwrap_err();
    assert_eq!(error.to_string(), "mapping 0x12000 of process 7: protection is out of range");
}

proptest! {
    /// Damaged manifests either do not decode, do not validate, or are harmless: never a panic.
    #[test]
    fn damaged_manifests_never_panic(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = codec::encode(&good(), 1 << 20).unwrap().split_off(codec::HEADER_LEN);
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(manifest) = codec::decode::<Manifest>(&bytes) {
            let _ = manifest.validate();
        }
    }
}
