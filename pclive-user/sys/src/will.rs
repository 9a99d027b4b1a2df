//! A last will: what is to be written where if this process dies before it can do so itself.
//!
//! `SIGKILL` leaves no time to undo anything. What the kernel undoes by itself (ptrace, userfaultfd, eBPF, locks) needs
//! nothing; the rest is written down here *before* it is done. A child process, forked while all is well, holds the
//! descriptors that are needed and waits on a pipe whose other end only this process has. When the kernel closes that end,
//! because the [`LastWill`] is dropped or the process has died, the child carries out whatever the will then says.
//!
//! The will itself is a memory file that both processes have. A word at its start says how long the text is, and is
//! written last: a will that was only half written when the process died says nothing. Drawing one up costs three writes
//! to memory and no scheduling, so it may be done where time is short. What is changed and changed back within
//! microseconds on sockets that nobody knew of when the child was forked is in a [`Codicil`], and undone first.
//!
//! The child takes no signal but `SIGKILL`, and has a session of its own, so that a signal to the process group or from
//! the terminal does not reach it. Whoever kills it too (the end of a whole cgroup does) prevents the will from being
//! carried out.

use crate::codicil::{Codicil, undo_all};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::mpsc;
use std::thread::JoinHandle;

/// The name of the child, as `ps` shows it.
const NAME: &std::ffi::CStr = c"pclive-will";
/// Bytes before the text: its length.
const LENGTH_SIZE: usize = 8;
/// Bytes before the contents of an instruction: the descriptor and their length.
const HEADER_SIZE: usize = 8;

/// One write, to a descriptor that was given to [`LastWill::open`].
#[derive(Clone, Debug)]
pub struct Instruction<'fd> {
    /// Where to.
    pub fd: BorrowedFd<'fd>,
    /// What: one call of `write(2)`, so a datagram if `fd` is a socket.
    pub bytes: Vec<u8>,
}

/// What is done when this value is dropped or the process dies. Nothing, until it is told.
#[derive(Debug)]
pub struct LastWill {
    text: File,
    codicil: Codicil,
    /// Open as long as this process lives; closed before the child is waited for.
    alive: Option<OwnedFd>,
    waiting: Option<JoinHandle<()>>,
}

impl LastWill {
    /// Starts the process that will carry it out, with a duplicate of each of `fds`, which must be open until then.
    pub fn open(fds: &[BorrowedFd<'_>]) -> io::Result<Self> {
        let text = File::from(memfd_create(c"last-will", MFdFlags::MFD_CLOEXEC)?);
        text.write_all_at(&[0; LENGTH_SIZE], 0)?;
        let (dead, alive) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        let codicil = Codicil::new()?;
        let own =
            Papers { text: text.as_raw_fd(), codicil: codicil.queue().as_raw_fd(), dead: dead.as_raw_fd() };
        let mut kept: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        kept.extend([own.text, own.codicil, own.dead]);
        kept.sort_unstable();
        let (tell, told) = mpsc::sync_channel(1);
        // The child belongs to a thread of its own, which waits for it: so it is nobody else's business, neither of those
        // who wait for just any child of theirs, nor as a zombie.
        let waiting = std::thread::Builder::new().name("last-will".into()).spawn(move || {
            let child = fork_executor(&kept, own);
            drop(dead);
            let _ = tell.send(child.map(drop));
            if let Ok(child) = child {
                wait(child);
            }
        })?;
        let will = Self { text, codicil, alive: Some(alive), waiting: Some(waiting) };
        told.recv().map_err(io::Error::other)??;
        Ok(will)
    }

    /// A codicil to it, valid as long as the will is not dropped.
    pub fn codicil(&self) -> io::Result<Codicil> {
        self.codicil.try_clone()
    }

    /// Writes the will; an earlier one is void.
    pub fn write(&mut self, instructions: &[Instruction<'_>]) -> io::Result<()> {
        self.revoke()?;
        let mut text = Vec::new();
        for Instruction { fd, bytes } in instructions {
            text.extend(fd.as_raw_fd().to_ne_bytes());
            text.extend((bytes.len() as u32).to_ne_bytes());
            text.extend(bytes);
        }
        self.text.write_all_at(&text, LENGTH_SIZE as u64)?;
        self.text.write_all_at(&(text.len() as u64).to_ne_bytes(), 0)
    }

    /// Nothing is to be done any more.
    pub fn revoke(&mut self) -> io::Result<()> {
        self.text.write_all_at(&[0; LENGTH_SIZE], 0)
    }
}

impl Drop for LastWill {
    fn drop(&mut self) {
        drop(self.alive.take());
        if let Some(waiting) = self.waiting.take() {
            let _ = waiting.join();
        }
    }
}

/// What the executor reads.
#[derive(Clone, Copy)]
struct Papers {
    text: RawFd,
    codicil: RawFd,
    /// At its end when the testator has died.
    dead: RawFd,
}

/// Forks the process that carries the will out. It inherits every signal blocked.
fn fork_executor(kept: &[RawFd], papers: Papers) -> nix::Result<libc::pid_t> {
    let mut before = SigSet::empty();
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before))?;
    // SAFETY: the child of a process with several threads may only call what is async-signal-safe: `execute` makes nothing
    // but plain system calls, allocates nothing and does not return.
    let forked = unsafe { libc::fork() };
    if forked == 0 {
        execute(kept, papers);
    }
    let forked = Errno::result(forked);
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
    forked
}

/// The life of the child.
fn execute(kept: &[RawFd], Papers { text, codicil, dead }: Papers) -> ! {
    // SAFETY: these calls take integers, and pointers to constants or to values on this stack with their true sizes. The
    // descriptors are this process's copies; whatever is closed or exits here does so in this process only.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, NAME.as_ptr());
        libc::setsid();
        close_all_but(kept);
        let mut byte = 0u8;
        // The other end is never written to: this returns 0 when it is closed, or fails when it is interrupted.
        while libc::read(dead, (&raw mut byte).cast(), 1) < 0 && *libc::__errno_location() == libc::EINTR {}
        undo_all(codicil);
        let mut length = 0u64;
        if libc::pread(text, (&raw mut length).cast(), LENGTH_SIZE, 0) == LENGTH_SIZE as isize && length > 0 {
            carry_out(text, length as usize);
        }
        libc::_exit(0)
    }
}

/// Closes every descriptor that is not in `kept`, which is sorted: a lock or a connection must not outlive its owner here.
///
/// # Safety
/// Nobody in this process may own a descriptor that is closed.
unsafe fn close_all_but(kept: &[RawFd]) {
    let mut first = 0;
    for &fd in kept {
        if fd > first {
            // SAFETY: close_range takes three integers; the caller vouches for the descriptors.
            unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0) };
        }
        first = fd + 1;
    }
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
}

/// Makes the writes of the will's text, which is `length` bytes long. A write that fails does not prevent the others.
///
/// # Safety
/// To be called in the child only, with a text that nobody changes any more.
unsafe fn carry_out(text: RawFd, length: usize) {
    let size = LENGTH_SIZE + length;
    // SAFETY: a fresh private mapping of a file that is at least that long.
    let mapped =
        unsafe { libc::mmap(std::ptr::null_mut(), size, libc::PROT_READ, libc::MAP_PRIVATE, text, 0) };
    if mapped == libc::MAP_FAILED {
        return;
    }
    // SAFETY: the mapping is `size` bytes long, readable, and never unmapped.
    let mut rest = unsafe { std::slice::from_raw_parts(mapped.cast::<u8>().add(LENGTH_SIZE), length) };
    while let Some((header, after)) = rest.split_first_chunk::<HEADER_SIZE>() {
        let [f0, f1, f2, f3, l0, l1, l2, l3] = *header;
        let (fd, len) = (i32::from_ne_bytes([f0, f1, f2, f3]), u32::from_ne_bytes([l0, l1, l2, l3]) as usize);
        let Some((bytes, next)) = after.split_at_checked(len) else { return };
        // SAFETY: `bytes` is a live slice of that length.
        unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
        rest = next;
    }
}

/// Waits until the child has exited.
fn wait(child: libc::pid_t) {
    loop {
        // SAFETY: no result is asked for.
        let waited = unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
        if waited != -1 || Errno::last() != Errno::EINTR {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codicil::Setting;
    use crate::sockopt::get_int;
    use std::io::{Read, pipe};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    /// What a will of these words has said once `end` has ended it.
    fn heard(words: &[&str], end: impl FnOnce(LastWill)) -> String {
        let (mut ear, mouth) = pipe().unwrap();
        let mut will = LastWill::open(&[mouth.as_fd()]).unwrap();
        let say = |word: &&str| Instruction { fd: mouth.as_fd(), bytes: word.as_bytes().to_vec() };
        will.write(&words.iter().map(say).collect::<Vec<_>>()).unwrap();
        end(will);
        drop(mouth);
        let mut heard = String::new();
        ear.read_to_string(&mut heard).unwrap();
        heard
    }

    #[test]
    fn a_will_is_carried_out_in_order_unless_it_was_revoked() {
        assert_eq!(heard(&["one ", "two"], drop), "one two");
        assert_eq!(heard(&["one"], |mut will| will.revoke().unwrap()), "");
        assert_eq!(heard(&["something long"], |mut will| will.write(&[]).unwrap()), "");
    }

    #[test]
    fn it_is_carried_out_when_the_process_is_killed() {
        let (mut ear, mouth) = pipe().unwrap();
        // SAFETY: the child only makes system calls, except that `LastWill::open` allocates and starts a thread: nothing
        // else runs in this process that could hold a lock of the allocator for longer than glibc's fork waits for it.
        let testator = unsafe { libc::fork() };
        if testator == 0 {
            let mut will = LastWill::open(&[mouth.as_fd()]).unwrap();
            will.write(&[Instruction { fd: mouth.as_fd(), bytes: b"farewell".to_vec() }]).unwrap();
            // SAFETY: it sends a signal to itself.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        }
        drop(mouth);
        wait(testator);
        let mut heard = String::new();
        ear.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "farewell");
    }

    #[test]
    fn a_change_in_the_midst_of_which_it_is_killed_is_undone_before_the_will_says_more() {
        let (mut ear, mouth) = pipe().unwrap();
        let (socket, _peer) = UnixDatagram::pair().unwrap();
        let priority = |value| Setting { level: libc::SOL_SOCKET, name: libc::SO_PRIORITY, value };
        // SAFETY: as above.
        let testator = unsafe { libc::fork() };
        if testator == 0 {
            let mut will = LastWill::open(&[mouth.as_fd()]).unwrap();
            will.write(&[Instruction { fd: mouth.as_fd(), bytes: b"farewell".to_vec() }]).unwrap();
            let mut codicil = will.codicil().unwrap();
            let change = || {
                priority(5).apply(socket.as_fd()).unwrap();
                // SAFETY: it sends a signal to itself.
                unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
            };
            codicil.during(socket.as_fd(), &[priority(3)], change).unwrap();
        }
        drop(mouth);
        wait(testator);
        ear.read_exact(&mut [0; 8]).unwrap();
        assert_eq!(get_int(socket.as_fd(), libc::SOL_SOCKET, libc::SO_PRIORITY), Ok(3));
    }

    #[test]
    fn the_executor_keeps_no_other_descriptor_and_takes_no_signal() {
        let (mut ear, mouth) = pipe().unwrap();
        let (_, kept) = pipe().unwrap();
        let will = LastWill::open(&[kept.as_fd()]).unwrap();
        drop(mouth);
        // Nobody has the writing end any more, although the executor was forked while it was open.
        assert_eq!(ear.read(&mut [0]).unwrap(), 0);
        let own = std::process::id();
        let children: String = std::fs::read_dir(format!("/proc/{own}/task"))
            .unwrap()
            // Threads and children of other tests come and go.
            .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("children")).ok())
            .collect();
        let pipe = std::fs::read_link(format!("/proc/{own}/fd/{}", kept.as_raw_fd())).unwrap();
        let has_it = |child: &str| {
            let mut fds = std::fs::read_dir(format!("/proc/{child}/fd")).into_iter().flatten().flatten();
            fds.any(|fd| std::fs::read_link(fd.path()).is_ok_and(|file| file == pipe))
        };
        let is_executor = |child: &&str| {
            let comm = std::fs::read_to_string(format!("/proc/{child}/comm"));
            comm.is_ok_and(|comm| comm == "pclive-will\n") && has_it(child)
        };
        let executor = children.split_whitespace().find(is_executor).expect("it is a child of this process");
        let status = std::fs::read_to_string(format!("/proc/{executor}/status")).unwrap();
        let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:\t")).unwrap();
        let blocked = u64::from_str_radix(blocked, 16).unwrap();
        for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM, libc::SIGCHLD, libc::SIGUSR1] {
            assert_ne!(blocked & 1 << (signal - 1), 0, "signal {signal}");
        }
        drop(will);
        assert!(!std::path::Path::new(&format!("/proc/{executor}")).exists());
    }
}
