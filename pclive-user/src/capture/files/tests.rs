//! Captures from real processes.

use super::testing::Holder;
use crate::capture::Access;
use pclive_wire::NsPid;
use pclive_wire::manifest::{DescriptionKind, EpollTarget, TcpState};
use std::fs::File;
use std::process::Command;

#[test]
fn descriptors_share_descriptions_across_dup_and_fork() {
    let holder = Holder::run(
        r#"
at(10, os.open("/etc/passwd", os.O_RDONLY)); os.lseek(10, 7, 0)
os.dup2(10, 11, inheritable=True)
at(12, os.open("/etc/passwd", os.O_RDONLY))
for n in range(20, 40): at(n, os.open("/etc/passwd", os.O_RDONLY))
child = os.fork()
if child == 0:
    os.close(12); os.set_inheritable(11, False); signal.pause()
time.sleep(0.1)
print(child)
"#,
    );
    let (captured, obstacles) = holder.capture(Access::Frozen);
    assert_eq!(obstacles, []);
    assert_eq!(captured.id_at(0, 10), captured.id_at(0, 11));
    assert_eq!(captured.id_at(0, 10), captured.id_at(1, 11));
    assert_ne!(captured.id_at(0, 10), captured.id_at(0, 12));
    for fd in 20..40 {
        assert_eq!(captured.id_at(0, fd), captured.id_at(1, fd));
    }
    // stdin, stdout, stderr; 10 and 12; 20 to 39.
    assert_eq!(captured.descriptions.len(), 25);
    let cloexec =
        |process: usize, fd| captured.tables[process].1.iter().find(|e| e.fd == fd).unwrap().cloexec;
    assert!(!cloexec(0, 11));
    assert!(cloexec(1, 11));
    let size = std::fs::metadata("/etc/passwd").unwrap().len();
    let path = b"/etc/passwd".to_vec();
    assert_eq!(*captured.kind_at(0, 10), DescriptionKind::Regular { path, offset: 7, size });
}

#[test]
fn what_a_process_says_of_its_descriptors_is_what_procfs_says() {
    let holder = Holder::run(
        r#"
import resource, socket
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
tcp = socket.socket(); tcp.setblocking(False)
named = socket.socket(socket.AF_UNIX); named.bind("name")
at(10, os.open("name", os.O_PATH))
at(11, os.open("/etc/passwd", os.O_RDONLY))
for n in range(1100): os.dup2(tcp.fileno(), 100 + n, inheritable=n % 3 == 0)
print("ready")
"#,
    );
    let (read, obstacles) = holder.capture(Access::Frozen);
    let (told, told_obstacles) = holder.capture_told();
    assert_eq!(obstacles.len(), 2, "the name, and the socket that has it: {obstacles:?}");
    assert_eq!(told_obstacles, obstacles);
    assert_eq!(told.tables, read.tables);
    assert_eq!(told.descriptions, read.descriptions);
    let cloexec = told.tables[0].1.iter().filter(|entry| entry.fd >= 100).map(|entry| entry.cloexec);
    assert!(cloexec.eq((0..1100).map(|n| n % 3 != 0)));
}

#[test]
fn streams_of_the_runtime_are_told_from_pipes_of_the_container() {
    let holder = Holder::run(
        r#"
r, w = os.pipe(); at(10, r); at(11, w); os.write(11, b"unread")
r, w = os.pipe(); at(12, r); os.write(w, b"last words"); os.close(w)
r, w = os.pipe(); at(13, w); os.close(r)
os.dup2(1, 14)
at(15, os.open("/proc/self/fd/1", os.O_WRONLY))
at(16, os.open("/proc/self/fd/10", os.O_RDWR))
print("ready")
"#,
    );
    let (captured, obstacles) = holder.capture(Access::Frozen);
    assert_eq!(obstacles, []);
    for (fd, stream) in [(0, 0), (1, 1), (14, 1), (15, 1)] {
        assert_eq!(*captured.kind_at(0, fd), DescriptionKind::Stdio { stream }, "fd {fd}");
    }
    let pipe = |fd| match captured.kind_at(0, fd) {
        DescriptionKind::Pipe { pipe, contents, capacity: 65536 } => (*pipe, contents.as_slice()),
        other => panic!("fd {fd}: {other:?}"),
    };
    let number = pipe(10).0;
    assert_eq!(pipe(10), (number, b"unread".as_slice()));
    assert_eq!(pipe(11), (number, b"".as_slice()));
    assert_eq!(pipe(16), (number, b"".as_slice()));
    assert_eq!(pipe(12).1, b"last words");
    assert_eq!(pipe(13).1, b"");

    let (again, _) = holder.capture(Access::Frozen);
    assert_eq!(again.descriptions, captured.descriptions, "tee left the contents in place");
    let (survey, _) = holder.capture(Access::Survey);
    assert!(matches!(survey.kind_at(0, 10), DescriptionKind::Pipe { contents, .. } if contents.is_empty()));
}

#[test]
fn a_file_on_a_mount_of_the_host_is_a_stream_only_as_a_standard_descriptor() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new("unshare");
    command.args(["-m", "python3"]).stderr(File::create(log.path()).unwrap());
    let holder =
        Holder::spawn(command, "os.dup2(2, 5)\nat(6, os.open('/proc/self/fd/2', os.O_RDWR))\nprint('ready')");
    let (captured, obstacles) = holder.capture(Access::Frozen);
    assert_eq!(*captured.kind_at(0, 2), DescriptionKind::Stdio { stream: 2 });
    assert_eq!(captured.id_at(0, 2), captured.id_at(0, 5));
    let [obstacle] = obstacles.as_slice() else { panic!("{obstacles:?}") };
    assert_eq!(obstacle.object, "fd 6");
}

#[test]
fn anonymous_files_and_their_state() {
    let holder = Holder::run(
        r#"
at(10, os.eventfd(41, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)); os.eventfd_write(10, 1)
at(11, timerfd(1, 1000.5, 7.25))
at(12, timerfd(1, 0.001, 1000)); time.sleep(0.05)
at(13, timerfd(7, 0, 0))
at(14, libc.signalfd(-1, struct.pack("Q", 1 << 9) + bytes(120), 0))
print("ready")
"#,
    );
    let (captured, obstacles) = holder.capture(Access::Frozen);
    assert_eq!(obstacles, []);
    assert_eq!(*captured.kind_at(0, 10), DescriptionKind::Eventfd { count: 42, semaphore: true });
    assert_eq!(captured.at(0, 10).flags & libc::O_NONBLOCK as u32, libc::O_NONBLOCK as u32);
    let timer = |fd| match *captured.kind_at(0, fd) {
        DescriptionKind::Timerfd { clock, ticks, value_ns, interval_ns } => {
            (clock, ticks, value_ns / 1_000_000_000, interval_ns)
        }
        ref other => panic!("{other:?}"),
    };
    assert_eq!(timer(11), (libc::CLOCK_MONOTONIC, 0, 1000, 7_250_000_000));
    // Expired unread: the next expiry is known all the same.
    assert_eq!(timer(12), (libc::CLOCK_MONOTONIC, 1, 999, 1_000_000_000_000));
    assert_eq!(timer(13), (libc::CLOCK_BOOTTIME, 0, 0, 0));
    assert_eq!(*captured.kind_at(0, 14), DescriptionKind::Signalfd { mask: 1 << 9 });
}

#[test]
fn an_interest_list_names_a_process_that_can_add_each_entry() {
    let holder = Holder::run(
        r#"
epoll = epoll_at(10)
at(11, os.eventfd(0)); at(12, os.eventfd(0))
epoll.register(11, select.EPOLLIN | select.EPOLLET)
child = os.fork()
if child == 0:
    # Only the child has this number; it is the parent's list all the same.
    at(20, os.eventfd(0)); epoll.register(20, select.EPOLLOUT); os.close(11); signal.pause()
time.sleep(0.1)
print(child)
"#,
    );
    let (captured, obstacles) = holder.capture(Access::Frozen);
    assert_eq!(obstacles, []);
    let DescriptionKind::Epoll { targets } = captured.kind_at(0, 10) else { panic!() };
    let target = |process, fd, events: i32| EpollTarget {
        process: NsPid(process),
        fd,
        events: (events | libc::EPOLLERR | libc::EPOLLHUP) as u32,
        data: fd as u64,
    };
    let mut targets = targets.clone();
    targets.sort_by_key(|target| target.fd);
    let data = |target: &EpollTarget| EpollTarget { data: target.fd as u64, ..*target };
    let targets: Vec<_> = targets.iter().map(data).collect();
    assert_eq!(targets, [target(1, 11, libc::EPOLLIN | libc::EPOLLET), target(2, 20, libc::EPOLLOUT)]);
}

#[test]
fn what_cannot_be_moved_is_named() {
    let holder = Holder::run(
        r#"
path = os.getcwd() + "/x"
at(10, libc.inotify_init())
at(11, os.pidfd_open(os.getpid()))
at(12, os.memfd_create("x"))
at(13, os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY))
os.mkfifo(path); at(14, os.open(path, os.O_RDWR)); os.unlink(path)
at(15, os.open("/etc", os.O_PATH))
at(16, os.open("/etc/passwd", os.O_RDONLY)); fcntl.flock(16, fcntl.LOCK_SH)
at(18, os.open(path, os.O_RDWR | os.O_CREAT)); os.link(path, path + "y"); os.unlink(path)
epoll = epoll_at(19)
at(20, os.eventfd(0)); os.dup2(20, 21); epoll.register(20); os.close(20)
at(22, os.open("/proc/self/ns/net", os.O_RDONLY))
r, w = os.pipe(); at(23, r); at(24, w); fcntl.fcntl(23, fcntl.F_SETOWN, os.getpid())
at(25, timerfd(0, 2e9, 0, 3))
at(26, os.open("/proc/self/oom_score_adj", os.O_RDWR))
for n in 27, 28: at(n, os.open(".", os.O_RDWR | os.O_TMPFILE)); os.ftruncate(n, 12 << 20)
print("ready")
"#,
    );
    let (_, obstacles) = holder.capture(Access::Survey);
    let found: Vec<(&str, &str)> = obstacles.iter().map(|o| (o.object.as_str(), o.reason.as_str())).collect();
    for (fd, part) in [
        (10, "inotify"),
        (11, "pidfd"),
        (12, "memfd"),
        (13, "terminal"),
        (14, "FIFO"),
        (15, "O_PATH"),
        (16, "lock"),
        (18, "no longer found"),
        (19, "added as fd 20"),
        (22, "net namespace"),
        (23, "F_SETOWN"),
        (25, "CANCEL_ON_SET"),
        (26, "belongs to the kernel"),
        (28, "12582912 bytes"),
    ] {
        let named =
            found.iter().any(|(object, reason)| *object == format!("fd {fd}") && reason.contains(part));
        assert!(named, "fd {fd} ({part}) is not in {found:#?}");
    }
    assert_eq!(found.len(), 14, "{found:#?}");
}

#[test]
fn sockets_are_captured_and_refused_by_their_own_module() {
    let holder = Holder::run(
        r#"
a, b = socket.socketpair(); at(10, a.detach()); at(11, b.detach()); os.write(10, b"hello")
s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen(17); at(12, s.detach())
at(13, socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach())
epoll = epoll_at(14); epoll.register(12, select.EPOLLIN)
print("ready")
"#,
    );
    let (captured, obstacles) = holder.capture(Access::Frozen);
    let [obstacle] = obstacles.as_slice() else { panic!("{obstacles:?}") };
    assert_eq!(obstacle.object, "fd 13");
    assert!(obstacle.reason.contains("UDP"), "{obstacle:?}");
    let DescriptionKind::Unix(b) = captured.kind_at(0, 11) else { panic!() };
    assert_eq!(b.queue.concat(), b"hello");
    let DescriptionKind::Tcp(listener) = captured.kind_at(0, 12) else { panic!() };
    assert_eq!(listener.state, TcpState::Listen { backlog: 17 });
    let DescriptionKind::Epoll { targets } = captured.kind_at(0, 14) else { panic!() };
    assert_eq!(targets[0].fd, 12);
}
