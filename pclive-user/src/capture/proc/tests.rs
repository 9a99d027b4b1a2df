//! Captured text is parsed, short reads end files, and what is read is what the `procfs` crate reads.

use super::*;
use std::collections::VecDeque;

/// Of a shell in a pid namespace of its own, on Linux 6.18, with some of the lines that nobody needs here.
const STATUS: &str = "\
Name:\tUid: 7\\nGid:\t1
Umask:\t0027
State:\tS (sleeping)
Tgid:\t11037
Pid:\t11037
PPid:\t11036
TracerPid:\t0
Uid:\t1000\t1001\t1002\t1003
Gid:\t7\t8\t9\t4294967294
FDSize:\t64
Groups:\t4 24 27 \nNStgid:\t11037\t1
NSpid:\t11037\t1
NSpgid:\t10991\t0
NSsid:\t3194\t0
Kthread:\t0
VmPeak:\t    2592 kB
SigQ:\t1/96365
SigBlk:\t0000000000000001
SigCgt:\t0000000180014a07
CapInh:\t0000000000000000
CapPrm:\t000001fffeffffff
CapEff:\t000000000000000f
CapBnd:\t000001ffffffffff
CapAmb:\t0000000000000400
NoNewPrivs:\t1
Cpus_allowed_list:\t0-1
nonvoluntary_ctxt_switches:\t0
";

const STAT: &str = "11038 (a) S 1 (b\nc) R 11037 10991 3194 0 -1 4194304 94 0 0 0 0 0 0 0 20 0 1 0 344026 \
2990080 394 18446744073709551615 94700422733824 94700422751753 140726371006624 0 0 0 0 6 0 1 0 0 17 1 0 0 0 0 0 \
94700422765840 94700422767104 94701067640832 140726371014966 140726371014974 140726371014974 140726371016681 0\n";

#[test]
fn status_is_parsed_as_proc_pid_status_shows_it() {
    let status = Status::parse(STATUS).unwrap();
    let nested = |number| Some(NsNumbers { innermost: NsPid(number), nested: true });
    let expected = Status {
        parent: HostPid(11036),
        umask: Some(0o27),
        uids: [1000, 1001, 1002, 1003],
        gids: [7, 8, 9, 4294967294],
        groups: vec![4, 24, 27],
        ns_pid: nested(1),
        ns_pgid: nested(0),
        ns_sid: nested(0),
        inheritable: 0,
        permitted: 0x1fffeffffff,
        effective: 0xf,
        bounding: 0x1ffffffffff,
        ambient: 0x400,
        no_new_privs: true,
        caught: 0x1_8001_4a07,
        fd_size: 64,
    };
    assert_eq!(status, expected);
}

#[test]
fn status_may_lack_what_the_kernel_leaves_out_and_nothing_else() {
    let without = |name: &str| {
        let lines = STATUS.split_inclusive('\n').filter(|line| !line.starts_with(name));
        Status::parse(&lines.collect::<String>())
    };
    assert_eq!(without("Umask").unwrap().umask, None);
    assert_eq!(without("NSpid").unwrap().ns_pid, None);
    assert!(!without("NoNewPrivs").unwrap().no_new_privs);
    for name in ["PPid", "Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "FDSize"] {
        assert_eq!(without(name).unwrap_err(), name);
    }
    let outside = Status::parse(&STATUS.replace("11037\t1\n", "11037\n").replace("4 24 27 ", " ")).unwrap();
    assert_eq!(outside.ns_pid, Some(NsNumbers { innermost: NsPid(11037), nested: false }));
    assert!(outside.groups.is_empty());
    assert_eq!(Status::parse(&STATUS.replace("1001\t", "")).unwrap_err(), "Uid");
    assert_eq!(Status::parse(&STATUS.replace("Umask:\t0027", "Umask:\t0029")).unwrap_err(), "Umask");
}

#[test]
fn stat_is_parsed_whatever_the_name_is() {
    let expected = Stat {
        state: 'R',
        flags: 4194304,
        start_code: 94700422733824,
        end_code: 94700422751753,
        start_stack: 140726371006624,
        start_data: 94700422765840,
        end_data: 94700422767104,
        start_brk: 94701067640832,
        arg_start: 140726371014966,
        arg_end: 140726371014974,
        env_start: 140726371014974,
        env_end: 140726371016681,
    };
    assert_eq!(Stat::parse(STAT).unwrap(), expected);
    assert_eq!(Stat::parse("1 (a").unwrap_err(), "comm");
    assert_eq!(Stat::parse("1 (a) ").unwrap_err(), "state");
    assert_eq!(Stat::parse("1 (a) R 1 2").unwrap_err(), "flags");
}

#[test]
fn it_is_what_the_procfs_crate_reads() {
    let own = procfs::process::Process::myself().unwrap();
    let pid = HostPid(own.pid);
    let (theirs, ours) = (own.status().unwrap(), Status::of_process(pid).unwrap());
    assert_eq!(ours.uids, [theirs.ruid, theirs.euid, theirs.suid, theirs.fuid]);
    assert_eq!((&ours.groups, ours.umask, ours.parent.0), (&theirs.groups, theirs.umask, theirs.ppid));
    assert_eq!(
        (ours.permitted, Some(ours.bounding), Some(ours.ambient)),
        (theirs.capprm, theirs.capbnd, theirs.capamb)
    );
    assert_eq!(ours.ns_pid.unwrap().innermost.0, *theirs.nspid.unwrap().last().unwrap());
    let (theirs, ours) = (own.stat().unwrap(), Stat::of(pid).unwrap());
    assert_eq!((ours.start_code, ours.start_stack), (theirs.startcode, theirs.startstack));
    assert_eq!((Some(ours.start_brk), Some(ours.env_end)), (theirs.start_brk, theirs.env_end));
    assert_eq!(link(&format!("{pid}/exe")).unwrap(), own.exe().unwrap().into_os_string().into_vec());
}

#[test]
fn threads_and_children_are_listed() {
    let pid = HostPid(std::process::id() as i32);
    let (ended, wait) = std::sync::mpsc::channel::<()>();
    let (tell, told) = std::sync::mpsc::channel();
    let parent = std::thread::spawn(move || {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        tell.send((nix::unistd::gettid(), child.id())).unwrap();
        wait.recv().unwrap_err();
        child.kill().and_then(|()| child.wait()).unwrap();
    });
    let (tid, child) = told.recv().unwrap();
    let threads = threads(pid).unwrap();
    assert_eq!(threads[0], pid);
    assert!(threads[1..].is_sorted() && threads.contains(&HostPid(tid.as_raw())));
    assert_eq!(children(pid, HostPid(tid.as_raw())).unwrap(), [HostPid(child as i32)]);
    drop(ended);
    parent.join().unwrap();
}

#[test]
fn who_has_ended_is_gone() {
    let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let pid = HostPid(child.id() as i32);
    let mut opened = File::open(format!("/proc/{pid}/status")).unwrap();
    child.kill().and_then(|()| child.wait()).unwrap();
    let source = read_records(&mut opened).unwrap_err();
    assert_eq!(source.raw_os_error(), Some(libc::ESRCH));
    assert!(ProcError::Read { path: PathBuf::new(), source }.is_gone());
    assert!(Status::of_process(pid).unwrap_err().is_gone());
    assert!(threads(pid).unwrap_err().is_gone());
    assert!(!read("self/mem").unwrap_err().is_gone());
    assert!(!ProcError::Parse { path: PathBuf::new(), field: "Uid" }.is_gone());
}

/// A file that gives out these many bytes by each read.
struct Pieces(VecDeque<usize>);

impl Read for Pieces {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        assert!(room.len() >= ROOM, "a read is not cut short by the room for it");
        let length = self.0.pop_front().expect("no read after the end");
        room[..length].fill(b'x');
        Ok(length)
    }
}

#[test]
fn a_file_ends_with_a_short_read() {
    for pieces in [&[1400][..], &[0], &[ROOM, 0], &[3000, 0], &[4090, 4085, 17], &[SHORT, SHORT - 1]] {
        let mut file = Pieces(pieces.iter().copied().collect());
        let bytes = read_records(&mut file).unwrap();
        assert!(bytes.iter().all(|&byte| byte == b'x'));
        assert_eq!((bytes.len(), file.0.len()), (pieces.iter().sum(), 0), "{pieces:?}");
    }
}
