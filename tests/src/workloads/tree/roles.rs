//! The two children that do nothing but wait: one in a pipe read, one in a timed sleep. Each checks itself when asked.

use super::identity::IdentityProbe;
use super::probe::{Findings, Probe};
use super::signals;
use crate::workloads::control::Answer;
use nix::errno::Errno;
use nix::libc;
use nix::sys::prctl::{set_dumpable, set_no_new_privs, set_pdeathsig};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Pid, Uid, geteuid, getppid, setgroups, setpgid, setresgid, setresuid, setsid};
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{FromRawFd, RawFd};
use std::time::{Duration, Instant};

/// Asks the reader how it is.
pub const HOW: u8 = b'?';
/// Tells the reader to change, so that its next check fails.
pub const SPOIL: u8 = b'!';
/// `nobody` and `nogroup`, as Debian numbers them.
const NOBODY: u32 = 65534;
/// Long enough that a move falls into one, short enough to wait for.
const SLEEP: Duration = Duration::from_millis(400);

/// Takes over a descriptor that was inherited under this number.
pub fn adopt(fd: RawFd) -> File {
    // SAFETY: the number was given on the command line by the parent, which passes the descriptor for this.
    unsafe { File::from_raw_fd(fd) }
}

/// Blocks in a pipe read, as `nobody`, in a session of its own.
///
/// # Errors
/// What keeps it from becoming that.
pub fn reader(commands: RawFd, replies: RawFd) -> anyhow::Result<()> {
    let (mut commands, mut replies) = (adopt(commands), adopt(replies));
    setsid()?;
    umask(Mode::from_bits_truncate(0o27));
    std::env::set_current_dir("/usr")?;
    lower(Resource::RLIMIT_NOFILE, 200)?;
    if geteuid().is_root() {
        become_nobody()?;
    }
    set_no_new_privs()?;
    set_pdeathsig(Signal::SIGTERM)?;
    set_dumpable(true)?;
    let mut identity = IdentityProbe::new()?;
    writeln!(replies, "{}", std::process::id())?;
    let mut complaints = Vec::new();
    let mut reads = 0;
    loop {
        let mut byte = [0];
        match commands.read(&mut byte) {
            Ok(0) => return Ok(()),
            Ok(_) if byte[0] == SPOIL => identity.spoil(),
            Ok(_) => {
                reads += 1;
                answer(&mut replies, &mut identity, std::mem::take(&mut complaints), reads)?;
            }
            Err(error) => complaints.push(format!("read of the pipe: {error}")),
        }
    }
}

fn lower(resource: Resource, limit: u64) -> nix::Result<()> {
    let (soft, hard) = getrlimit(resource)?;
    setrlimit(resource, soft.min(limit), hard)
}

/// Gives up everything but one capability.
fn become_nobody() -> anyhow::Result<()> {
    const CAP_NET_BIND_SERVICE: u32 = 10;
    const CAP_NET_RAW: libc::c_ulong = 13;
    const VERSION_3: u32 = 0x2008_0522;
    let call = |option, argument: libc::c_ulong, second: libc::c_ulong| {
        // SAFETY: these options take numbers.
        Errno::result(unsafe { libc::prctl(option, argument, second, 0, 0) })
    };
    call(libc::PR_CAPBSET_DROP, CAP_NET_RAW, 0)?;
    call(libc::PR_SET_KEEPCAPS, 1, 0)?;
    let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    setgroups(&[group, Gid::from_raw(4)])?;
    setresgid(group, group, group)?;
    setresuid(user, user, user)?;
    let bit = 1u32 << CAP_NET_BIND_SERVICE;
    let header = [VERSION_3, 0];
    // Effective, permitted, inheritable, each for the low and the high word.
    let data = [bit, bit, bit, 0, 0, 0];
    // SAFETY: capset reads a header of two and data of six words.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) })?;
    call(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as libc::c_ulong, CAP_NET_BIND_SERVICE.into())?;
    Ok(())
}

/// Sleeps, again and again, each time at least as long as it wanted; SIGUSR1 asks it how it is.
///
/// # Errors
/// What keeps it from starting.
pub fn sleeper(replies: RawFd) -> anyhow::Result<()> {
    let mut replies = adopt(replies);
    setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
    // SAFETY: raises the own nice value, which anyone may.
    Errno::result(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 5) })?;
    set_pdeathsig(Signal::SIGTERM)?;
    std::env::set_current_dir("/")?;
    signals::follow(libc::SIGUSR1, 0)?;
    let mut identity = IdentityProbe::new()?;
    writeln!(replies, "{}", std::process::id())?;
    let parent = getppid();
    let mut complaints = Vec::new();
    let (mut sleeps, mut answered) = (0, 0);
    while getppid() == parent {
        let end = Instant::now() + SLEEP;
        let mut interrupted = 0;
        loop {
            // A signal that came outside of a sleep interrupts none, and is seen here.
            let asked = signals::count(libc::SIGUSR1);
            if asked > answered {
                answered = asked;
                answer(&mut replies, &mut identity, std::mem::take(&mut complaints), sleeps)?;
            }
            match sleep(end.saturating_duration_since(Instant::now())) {
                Ok(()) => break,
                Err(Errno::EINTR) if signals::count(libc::SIGUSR1) > answered => interrupted += 1,
                Err(error) => complaints.push(format!("nanosleep without a signal: {error}")),
            }
        }
        let missing = end.saturating_duration_since(Instant::now());
        if missing > Duration::ZERO {
            complaints.push(format!(
                "a sleep of {SLEEP:?}, {interrupted} times interrupted, was {missing:?} too short"
            ));
        }
        sleeps += 1;
    }
    Ok(())
}

fn sleep(time: Duration) -> nix::Result<()> {
    let time = libc::timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() };
    // SAFETY: reads the timespec.
    Errno::result(unsafe { libc::nanosleep(&time, std::ptr::null_mut()) }).map(drop)
}

fn answer(
    replies: &mut File,
    identity: &mut IdentityProbe,
    complaints: Vec<String>,
    count: u64,
) -> io::Result<()> {
    let mut findings = Findings::default();
    findings.about(identity.name());
    identity.check(&mut findings);
    let list = complaints.into_iter().chain(findings.into_list()).collect();
    let line = Answer::new(list, || count.to_string()).to_line();
    match replies.write_all(format!("{line}\n").as_bytes()) {
        // Nobody wants to know any more.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        result => result,
    }
}
