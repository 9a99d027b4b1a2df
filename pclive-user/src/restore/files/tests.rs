//! Captures from a real process, makes the same again, and compares.

use super::{FileError, OpenedFiles, open_files};
use crate::capture::Access;
use crate::capture::files::CapturedFiles;
use crate::capture::files::testing::Holder;
use crate::restore::Sandbox;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::Mode;
use pclive_wire::HostPid;
use pclive_wire::manifest::{Description, DescriptionId, DescriptionKind, EpollTarget};
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

fn sandbox(root: &Path) -> Sandbox {
    let null = || OwnedFd::from(File::options().read(true).write(true).open("/dev/null").unwrap());
    Sandbox {
        init: HostPid(std::process::id() as i32),
        root: open(root, OFlag::O_PATH | OFlag::O_DIRECTORY, Mode::empty()).unwrap(),
        netns: File::open("/proc/self/ns/net").unwrap().into(),
        stdio: [null(), null(), null()],
    }
}

/// Captures from `holder` and opens all of it here.
fn round_trip(holder: &Holder) -> (CapturedFiles, OpenedFiles) {
    let (captured, obstacles) = holder.capture(Access::Frozen);
    assert_eq!(obstacles, []);
    let opened = open_files(&captured.descriptions, &sandbox(Path::new("/"))).unwrap();
    (captured, opened)
}

/// What was made of descriptor `fd` of the program.
fn restored<'a>(captured: &CapturedFiles, opened: &'a OpenedFiles, fd: i32) -> BorrowedFd<'a> {
    opened.get(DescriptionId(captured.id_at(0, fd) as u32)).unwrap()
}

/// The same, as a file of our own.
fn file(captured: &CapturedFiles, opened: &OpenedFiles, fd: i32) -> File {
    restored(captured, opened, fd).try_clone_to_owned().unwrap().into()
}

fn flags(file: &File) -> OFlag {
    OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL).unwrap())
}

fn fails(result: Result<OpenedFiles, FileError>) -> String {
    result.unwrap_err().to_string()
}

fn open_one(kind: DescriptionKind, flags: i32, root: &Path) -> Result<OpenedFiles, FileError> {
    open_files(&[Description { flags: flags as u32, owner: (0, 0, 0), kind }], &sandbox(root))
}

#[test]
fn files_with_and_without_a_name() {
    let holder = Holder::run(
        r#"
path = os.getcwd() + "/named"
at(10, os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)); os.write(10, b"0123456789")
at(11, os.open(path, os.O_RDONLY)); os.lseek(11, 4, 0)
at(12, os.open("/dev/urandom", os.O_RDONLY))
at(13, os.open("/etc", os.O_RDONLY | os.O_DIRECTORY))
ghost = os.getcwd() + "/ghost"
at(14, os.open(ghost, os.O_WRONLY | os.O_CREAT, 0o640)); os.write(14, b"nobody knows"); os.fchown(14, 1234, 4321)
at(15, os.open(ghost, os.O_RDONLY)); os.lseek(15, 7, 0); os.unlink(ghost)
at(16, os.open(os.getcwd(), os.O_RDWR | os.O_TMPFILE, 0o600)); os.write(16, b"never had a name")
print("ready")
"#,
    );
    let (captured, opened) = round_trip(&holder);
    let file = |fd| file(&captured, &opened, fd);
    assert!(flags(&file(10)).contains(OFlag::O_RDWR | OFlag::O_APPEND));
    assert_eq!(file(10).stream_position().unwrap(), 10);
    let rest = |fd| {
        let mut text = String::new();
        file(fd).read_to_string(&mut text).unwrap();
        text
    };
    assert_eq!(rest(11), "456789");
    file(12).read_exact(&mut [0; 16]).unwrap();
    assert!(file(13).metadata().unwrap().is_dir());
    assert_eq!(rest(15), "knows");
    assert_eq!(file(14).stream_position().unwrap(), 12);
    file(14).write_all(b" it").unwrap();
    assert_eq!(rest(15), " it", "both are open on one file");
    let of = |fd| nix::sys::stat::fstat(file(fd)).unwrap();
    let ghost = of(15);
    assert_eq!((ghost.st_uid, ghost.st_gid, ghost.st_mode & 0o7777, ghost.st_nlink), (1234, 4321, 0o640, 0));
    assert_eq!(of(14).st_ino, ghost.st_ino);
    file(16).rewind().unwrap();
    assert_eq!(rest(16), "never had a name");
    let left: Vec<_> =
        std::fs::read_dir(holder.directory()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["named"], "nothing is left behind");
}

#[test]
fn pipes_have_their_ends_contents_and_capacity() {
    let holder = Holder::run(
        r#"
r, w = os.pipe(); at(10, r); at(11, w); fcntl.fcntl(10, 1031, 262144)
os.write(11, bytes(range(256)) * 1024); os.set_blocking(10, False)
r, w = os.pipe(); at(12, r); os.write(w, b"last words"); os.close(w)
r, w = os.pipe(); at(13, w); os.close(r)
at(14, os.open("/proc/self/fd/10", os.O_RDONLY))
print("ready")
"#,
    );
    let (captured, opened) = round_trip(&holder);
    let file = |fd| file(&captured, &opened, fd);
    assert_eq!(fcntl(file(11), FcntlArg::F_GETPIPE_SZ).unwrap(), 262144);
    assert!(flags(&file(10)).contains(OFlag::O_NONBLOCK));
    for fd in [11, 14] {
        assert!(!flags(&file(fd)).contains(OFlag::O_NONBLOCK), "fd {fd} is a description of its own");
    }
    let mut contents = vec![0; 262144];
    file(10).read_exact(&mut contents).unwrap();
    assert!(contents.iter().enumerate().all(|(at, byte)| *byte == at as u8));
    assert_eq!(file(10).read(&mut contents).unwrap_err().kind(), ErrorKind::WouldBlock);
    file(11).write_all(b"more").unwrap();
    let mut more = [0; 4];
    file(14).read_exact(&mut more).unwrap();
    assert_eq!(&more, b"more");

    let mut words = String::new();
    file(12).read_to_string(&mut words).unwrap();
    assert_eq!(words, "last words", "and then the end of the stream");
    assert_eq!(file(13).write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[test]
fn anonymous_files_have_their_state() {
    let holder = Holder::run(
        r#"
at(10, os.eventfd(3, os.EFD_SEMAPHORE | os.EFD_NONBLOCK))
at(11, os.eventfd(0)); os.eventfd_write(11, 1 << 40)
at(12, timerfd(1, 1000, 7))
at(13, timerfd(1, 0.001, 0)); time.sleep(0.05)
at(14, libc.signalfd(-1, struct.pack("Q", 1 << 9) + bytes(120), 0))
epoll = epoll_at(15); epoll.register(10, select.EPOLLIN)
print("ready")
"#,
    );
    let (captured, opened) = round_trip(&holder);
    let number = |fd| {
        let mut bytes = [0; 8];
        file(&captured, &opened, fd).read_exact(&mut bytes).map(|()| u64::from_ne_bytes(bytes))
    };
    assert_eq!([number(10).unwrap(), number(10).unwrap(), number(10).unwrap()], [1, 1, 1]);
    assert_eq!(number(10).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(number(11).unwrap(), 1 << 40);
    assert_eq!(number(13).unwrap(), 1, "the unread expiry");
    let info = |fd| {
        let fd = restored(&captured, &opened, fd).as_raw_fd();
        std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap()
    };
    assert!(
        info(12).contains("it_value: (999, ") && info(12).contains("it_interval: (7, 0)"),
        "{}",
        info(12)
    );
    assert!(info(14).contains("sigmask:\t0000000000000200"));
    let [(id, targets)] = opened.epoll_targets.as_slice() else { panic!("{:?}", opened.epoll_targets) };
    assert_eq!(id.0 as usize, captured.id_at(0, 15));
    let [EpollTarget { fd: 10, .. }] = targets.as_slice() else { panic!("{targets:?}") };
}

#[test]
fn a_path_from_the_source_stays_inside_and_changes_nothing() {
    let root = tempfile::tempdir().unwrap();
    let inside = root.path();
    std::fs::write(inside.join("data"), "twelve bytes").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", inside.join("link")).unwrap();
    std::os::unix::fs::symlink("../../../../data", inside.join("up")).unwrap();
    nix::unistd::mkfifo(&inside.join("fifo"), Mode::S_IRUSR).unwrap();
    let regular = |path: &str, size| DescriptionKind::Regular { path: path.into(), offset: 0, size };
    let hostile = libc::O_RDWR | libc::O_TRUNC | libc::O_CREAT | libc::O_EXCL;

    assert!(open_one(regular("/up", 12), hostile, inside).is_ok());
    assert_eq!(std::fs::read(inside.join("data")).unwrap(), b"twelve bytes");
    let error = fails(open_one(regular("/link", 0), libc::O_RDONLY, inside));
    assert_eq!(error, "openat2 for /link");
    fails(open_one(regular("/new", 0), hostile, inside));
    assert!(!inside.join("new").exists());
    fails(open_one(regular("/../../etc/passwd", 0), libc::O_RDONLY, inside));
    let error = fails(open_one(regular("/data", 13), libc::O_RDONLY, inside));
    assert_eq!(error, "/data has 12 bytes here and 13 at the source");
    let error = fails(open_one(regular("/fifo", 0), libc::O_RDONLY, inside));
    assert_eq!(error, "/fifo is not the regular file that it is at the source");
}

#[test]
fn what_only_the_host_may_touch_is_refused() {
    let root = Path::new("/");
    let memory = DescriptionKind::Device { path: b"/dev/mem".to_vec(), rdev: libc::makedev(1, 1) };
    fails(open_one(memory, libc::O_RDWR, root));
    let lying = DescriptionKind::Device { path: b"/dev/null".to_vec(), rdev: libc::makedev(1, 5) };
    fails(open_one(lying, libc::O_RDWR, root));
    let trigger =
        DescriptionKind::Regular { path: b"/proc/sys/kernel/core_pattern".to_vec(), offset: 0, size: 0 };
    let error = fails(open_one(trigger, libc::O_WRONLY, root));
    assert!(error.contains("belongs to the kernel"), "{error}");
    fails(open_one(DescriptionKind::Stdio { stream: 3 }, 0, root));
    fails(open_one(DescriptionKind::Eventfd { count: u64::MAX, semaphore: false }, 0, root));
    let overfull = DescriptionKind::Pipe { pipe: 0, capacity: 4096, contents: vec![0; 8192] };
    assert_eq!(fails(open_one(overfull, libc::O_RDONLY, root)), "pipe 0 takes 4096 of 8192 bytes");
    fails(open_one(DescriptionKind::Timerfd { clock: 99, ticks: 0, value_ns: 0, interval_ns: 0 }, 0, root));
}
