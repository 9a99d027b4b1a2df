//! Handing open files to a parked process, at their final numbers.
//!
//! The process empties its descriptor table, apart from one end of a socketpair, and then receives the files with
//! `SCM_RIGHTS`. The kernel gives the lowest free number to each, so sending one for every number from 0 up, with a filler
//! where the source has none, puts each file where it belongs without a `dup`; the fillers are closed again.

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use pclive_sys::script::{Arg, CallRef, DataRef, Script};
use pclive_wire::NsPid;
use pclive_wire::manifest::{DescriptionId, EpollTarget, FdEntry};
use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

/// Most descriptors in one message (`SCM_MAX_FD`).
const BATCH: usize = 253;
/// The limit of open files, as an argument of a call.
const OPEN_FILES: u64 = libc::RLIMIT_NOFILE as u64;

/// The highest number that the process uses; -1 for none.
fn highest(table: &[FdEntry]) -> i32 {
    table.iter().map(|entry| entry.fd).max().unwrap_or(-1)
}

/// First of two numbers above the whole table: for the socket, and for something else.
pub fn spare_fds(table: &[FdEntry]) -> (i32, i32) {
    let first = highest(table).max(2) + 1;
    (first, first + 1)
}

/// The script that asks for the limit of open files, and where the answer will be: the soft limit, the hard one.
pub fn limit_script() -> (Script, DataRef) {
    let mut script = Script::new();
    let limit = script.room(16);
    let args: [Arg; 4] = [0.into(), OPEN_FILES.into(), 0.into(), limit.into()];
    script.call("prlimit64", libc::SYS_prlimit64, args);
    (script, limit)
}

/// The script that lifts the soft limit of open files to the hard one, and has the table hold `size` descriptors, as far as
/// that allows. A table never shrinks.
pub fn room_script(hard: u64, size: u32) -> Script {
    let allowed = hard.min(size.into());
    let mut script = Script::new();
    let lifted = script.data(&[hard, hard].map(u64::to_ne_bytes).concat());
    let args: [Arg; 4] = [0.into(), OPEN_FILES.into(), lifted.into(), 0.into()];
    script.call("prlimit64", libc::SYS_prlimit64, args);
    let some = script.call("eventfd2", libc::SYS_eventfd2, [0.into(), 0.into()]);
    let args: [Arg; 3] = [some.into(), libc::F_DUPFD.into(), allowed.saturating_sub(1).into()];
    let last = script.call("fcntl(F_DUPFD)", libc::SYS_fcntl, args);
    for fd in [last, some] {
        script.call("close", libc::SYS_close, [fd.into()]);
    }
    script
}

/// The script that makes the socketpair: returns it with the place where both ends' numbers will be.
pub fn socketpair_script() -> (Script, DataRef) {
    let mut script = Script::new();
    let pair = script.room(8);
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    script.call(
        "socketpair",
        libc::SYS_socketpair,
        [libc::AF_UNIX.into(), kind.into(), 0.into(), pair.into()],
    );
    (script, pair)
}

/// Queues the files of `table` on the engine's end of the socketpair, in batches.
pub fn send<'fd>(
    socket: BorrowedFd<'_>,
    table: &[FdEntry],
    file: impl Fn(&FdEntry) -> BorrowedFd<'fd>,
    filler: BorrowedFd<'_>,
) -> nix::Result<()> {
    let mut numbered: Vec<RawFd> = vec![filler.as_raw_fd(); (highest(table) + 1) as usize];
    for entry in table {
        numbered[entry.fd as usize] = file(entry).as_raw_fd();
    }
    for batch in numbered.chunks(BATCH) {
        let rights = [ControlMessage::ScmRights(batch)];
        sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(b"f")], &rights, MsgFlags::empty(), None)?;
    }
    Ok(())
}

/// The script that empties the table and receives the files. `keep` is the process's end of the socketpair, `socket_at`
/// where it is kept meanwhile.
pub fn receive_script(table: &[FdEntry], keep: i32, socket_at: i32) -> Script {
    let mut script = Script::new();
    if keep != socket_at {
        script.call("dup3", libc::SYS_dup3, [keep.into(), socket_at.into(), libc::O_CLOEXEC.into()]);
    }
    close_range(&mut script, 0, (socket_at - 1) as u32);
    close_range(&mut script, (socket_at + 1) as u32, u32::MAX);
    let total = (highest(table) + 1) as usize;
    for batch in 0..total.div_ceil(BATCH) {
        receive_batch(&mut script, socket_at, BATCH.min(total - batch * BATCH));
    }
    // Files that cannot be installed are left out without an error (`scm_detach_fds` in net/core/scm.c): a security module
    // refuses them, or memory is short. They come lowest number first, so that the last one is missing then.
    if let Some(last) = total.checked_sub(1) {
        let args: [Arg; 2] = [(last as u64).into(), libc::F_GETFD.into()];
        script.call(format!("fcntl(F_GETFD) of {last}, the last file received"), libc::SYS_fcntl, args);
    }
    close_range(&mut script, socket_at as u32, socket_at as u32);
    let mut wanted = vec![None; total];
    for entry in table {
        wanted[entry.fd as usize] = Some(entry.cloexec);
    }
    for (fd, entry) in wanted.into_iter().enumerate() {
        match entry {
            None => close_range(&mut script, fd as u32, fd as u32),
            Some(true) => {
                let args: [Arg; 3] = [(fd as u64).into(), libc::F_SETFD.into(), libc::FD_CLOEXEC.into()];
                script.call(format!("fcntl(F_SETFD) of {fd}"), libc::SYS_fcntl, args);
            }
            Some(false) => {}
        }
    }
    script
}

/// What the process adds to its epoll sets.
#[derive(Debug)]
pub struct Watches {
    /// Epoll descriptor and target. Those that are disarmed come first.
    targets: Vec<(i32, EpollTarget)>,
}

/// `EP_PRIVATE_BITS` of `fs/eventpoll.c`: all that is left of the events of a target whose `EPOLLONESHOT` has fired.
const PRIVATE_BITS: i32 = libc::EPOLLWAKEUP | libc::EPOLLONESHOT | libc::EPOLLET | libc::EPOLLEXCLUSIVE;

fn is_disarmed(target: &EpollTarget) -> bool {
    target.events & libc::EPOLLONESHOT as u32 != 0 && target.events & !PRIVATE_BITS as u32 == 0
}

impl Watches {
    /// What is keyed by the descriptor numbers of process `pid`, whose table this is.
    pub fn of(pid: NsPid, table: &[FdEntry], sets: &[(DescriptionId, Vec<EpollTarget>)]) -> Self {
        let mut targets = Vec::new();
        for (set, watched) in sets {
            let Some(epoll) = table.iter().find(|entry| entry.description == *set) else { continue };
            targets.extend(
                watched.iter().filter(|target| target.process == pid).map(|target| (epoll.fd, *target)),
            );
        }
        targets.sort_by_key(|(_, target)| !is_disarmed(target));
        Self { targets }
    }

    /// Appends the calls that let each disarmed target fire: the kernel always adds `EPOLLERR` and `EPOLLHUP` to what is
    /// asked for, and only firing takes them away again. Returns the calls that tell which of them did. The sets must be
    /// empty before, so that nothing else can fire.
    pub fn disarm(&self, script: &mut Script) -> Vec<CallRef> {
        let disarmed = self.targets.iter().take_while(|(_, target)| is_disarmed(target));
        let event = script.room(EPOLL_EVENT_SIZE);
        let fire = |&(epoll, target): &(i32, EpollTarget)| {
            let events = target.events | (libc::EPOLLIN | libc::EPOLLOUT) as u32;
            control(script, epoll, libc::EPOLL_CTL_ADD, EpollTarget { events, ..target });
            let args: [Arg; 4] = [epoll.into(), event.into(), 1.into(), 0.into()];
            script.call("epoll_wait", libc::SYS_epoll_wait, args)
        };
        disarmed.map(fire).collect()
    }

    /// Appends the calls for all other targets, and for disarmed ones that had nothing to fire for.
    pub fn add(&self, script: &mut Script, fired: &[bool]) {
        for (place, &(epoll, target)) in self.targets.iter().enumerate() {
            match fired.get(place) {
                Some(true) => {}
                Some(false) => control(script, epoll, libc::EPOLL_CTL_MOD, target),
                None => control(script, epoll, libc::EPOLL_CTL_ADD, target),
            }
        }
    }
}

/// `struct epoll_event` is packed on x86-64.
const EPOLL_EVENT_SIZE: usize = 12;

fn control(script: &mut Script, epoll: i32, how: i32, target: EpollTarget) {
    let event = script.data(&[&target.events.to_ne_bytes()[..], &target.data.to_ne_bytes()[..]].concat());
    let args: [Arg; 4] = [epoll.into(), how.into(), target.fd.into(), event.into()];
    script.call(format!("epoll_ctl({epoll}, {how}, {})", target.fd), libc::SYS_epoll_ctl, args);
}

fn receive_batch(script: &mut Script, socket: i32, count: usize) {
    let byte = script.room(1);
    let iov = script.data(&[0u64.to_ne_bytes(), 1u64.to_ne_bytes()].concat());
    script.pointer(iov, 0, byte);
    let control_len = 16 + count * 4; // CMSG_LEN
    let control = script.room(control_len.next_multiple_of(8));
    let mut header = [0u8; 56]; // struct msghdr
    header[24..32].copy_from_slice(&1u64.to_ne_bytes());
    header[40..48].copy_from_slice(&(control_len.next_multiple_of(8) as u64).to_ne_bytes());
    let header = script.data(&header);
    script.pointer(header, 16, iov);
    script.pointer(header, 32, control);
    let args: [Arg; 3] = [socket.into(), header.into(), 0.into()];
    script.call_expecting("recvmsg", libc::SYS_recvmsg, args, pclive_sys::script::Expect::Exactly(1));
}

fn close_range(script: &mut Script, first: u32, last: u32) {
    if first <= last {
        let args: [Arg; 3] = [u64::from(first).into(), u64::from(last).into(), 0.into()];
        script.call("close_range", libc::SYS_close_range, args);
    }
}
