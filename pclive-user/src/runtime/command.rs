//! Running a runtime's command: bounded in time, with its error messages collected.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawnp};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use pclive_sys::pidfd::pidfd_open;
use pclive_wire::HostPid;
use std::ffi::{CString, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// A runtime's command, hooks included, that takes longer than this hangs.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// More of a command's output than this is not read.
const MAX_OUTPUT: u64 = 1 << 20;

/// Variables by which a service manager talks to pclive, and which a runtime would pass on to the container.
const SERVICE_VARIABLES: [&str; 4] = ["NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"];

/// Why a command of the runtime brought no result.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It cannot be run.
    #[error("cannot run {command} ({call})")]
    Spawn {
        /// The command line.
        command: String,
        /// What was being done.
        call: &'static str,
        /// Cause.
        source: Errno,
    },
    /// It failed.
    #[error("{command} failed ({status}): {messages}")]
    Failed {
        /// The command line.
        command: String,
        /// How it ended.
        status: String,
        /// The runtime's own messages.
        messages: String,
    },
    /// It took too long and was killed.
    #[error("{command} did not end within {} s: {messages}", TIME_LIMIT.as_secs())]
    TimedOut {
        /// The command line.
        command: String,
        /// The runtime's own messages.
        messages: String,
    },
}

/// Descriptors that a command hands on to the container.
#[derive(Clone, Copy, Debug)]
pub(super) struct HandedOn<'a> {
    /// Standard input, output and error.
    pub stdio: [BorrowedFd<'a>; 3],
    /// What becomes descriptor 3.
    pub third: BorrowedFd<'a>,
}

/// Runs `program` with `arguments` and returns its standard output, which is empty if that goes to a container.
///
/// The runtime's messages are collected through its log option, because its standard error may be the container's.
pub(super) fn run(
    program: &Path,
    arguments: &[OsString],
    handed_on: Option<HandedOn<'_>>,
) -> Result<Vec<u8>, CommandError> {
    let command = describe(program, arguments);
    let failed = |call| {
        let command = command.clone();
        move |source| CommandError::Spawn { command, call, source }
    };
    let files = Files::new().map_err(failed("memfd_create"))?;
    let null = File::open("/dev/null").map_err(|error| failed("open /dev/null")(errno_of(&error)))?;
    let sources = match &handed_on {
        Some(handed_on) => {
            let [input, output, error] = handed_on.stdio;
            vec![input, output, error, handed_on.third]
        }
        None => vec![null.as_fd(), files.output.as_fd(), files.error.as_fd()],
    };
    let log = format!("/proc/{}/fd/{}", std::process::id(), files.log.as_raw_fd());
    let line: Vec<OsString> = [program.as_os_str(), "--log".as_ref(), log.as_ref()]
        .into_iter()
        .chain(["--log-format".as_ref(), "json".as_ref()])
        .map(OsString::from)
        .chain(arguments.iter().cloned())
        .collect();
    let pid = spawn(program, line, &sources).map_err(failed("posix_spawn"))?;
    match wait(pid).map_err(failed("wait for it"))? {
        Some(WaitStatus::Exited(_, 0)) => Ok(read(&files.output)),
        Some(status) => {
            Err(CommandError::Failed { command, status: describe_status(status), messages: files.messages() })
        }
        None => Err(CommandError::TimedOut { command, messages: files.messages() }),
    }
}

/// A command line for people.
pub(super) fn describe(program: &Path, arguments: &[OsString]) -> String {
    let words = arguments.iter().map(|word| word.to_string_lossy());
    [program.to_string_lossy()].into_iter().chain(words).collect::<Vec<_>>().join(" ")
}

/// Where a command's output goes: memfds, which no amount of output can block and which need no reader meanwhile.
struct Files {
    log: File,
    output: File,
    error: File,
}

impl Files {
    fn new() -> nix::Result<Self> {
        let file = |name| memfd_create(name, MFdFlags::MFD_CLOEXEC).map(File::from);
        Ok(Self {
            log: file(c"runtime-log")?,
            output: file(c"runtime-output")?,
            error: file(c"runtime-error")?,
        })
    }

    /// The messages in the log, or else what the command wrote to its standard error.
    fn messages(&self) -> String {
        match log_messages(&read(&self.log)) {
            messages if messages.is_empty() => String::from_utf8_lossy(&read(&self.error)).trim().to_owned(),
            messages => messages,
        }
    }
}

/// The `msg` fields of warnings and errors in a JSON log.
fn log_messages(log: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Entry {
        level: String,
        msg: String,
    }
    let entries =
        log.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice::<Entry>(line).ok());
    let worth = entries.filter(|entry| entry.level != "info" && entry.level != "debug");
    worth.map(|entry| entry.msg.trim().to_owned()).collect::<Vec<_>>().join("; ")
}

fn read(file: &File) -> Vec<u8> {
    let length = file.metadata().map(|metadata| metadata.len().min(MAX_OUTPUT)).unwrap_or(0);
    let mut bytes = vec![0; length as usize];
    // A memfd is read whole or, if its writer truncated it just now, not at all.
    file.read_exact_at(&mut bytes, 0).map(|()| bytes).unwrap_or_default()
}

/// Starts `program` with `sources` as its descriptors 0, 1, 2, ….
///
/// `posix_spawn(3)` and not `std::process::Command`, which cannot place a descriptor without `unsafe`.
fn spawn(program: &Path, line: Vec<OsString>, sources: &[BorrowedFd<'_>]) -> nix::Result<Pid> {
    // Duplicates are above 2, so none is overwritten before its turn; 3 comes last and may be its own source.
    let duplicates: Vec<OwnedFd> = sources
        .iter()
        .map(|source| source.try_clone_to_owned().map_err(|error| errno_of(&error)))
        .collect::<nix::Result<_>>()?;
    let mut actions = PosixSpawnFileActions::init()?;
    for (target, source) in duplicates.iter().enumerate() {
        actions.add_dup2(source.as_raw_fd(), target as i32)?;
    }
    // Rust programs ignore SIGPIPE, and a runtime would pass that on to the container.
    let mut attributes = PosixSpawnAttr::init()?;
    attributes.set_flags(PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF | PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK)?;
    attributes.set_sigdefault(&SigSet::from(Signal::SIGPIPE))?;
    attributes.set_sigmask(&SigSet::empty())?;

    let c_string = |bytes| CString::new(bytes).map_err(|_| Errno::EINVAL);
    let line = line.into_iter().map(|word| c_string(word.into_vec())).collect::<nix::Result<Vec<_>>>()?;
    let environment = std::env::vars_os()
        .filter(|(name, _)| !SERVICE_VARIABLES.iter().any(|service| name == service))
        .map(|(name, value)| c_string([name.as_bytes(), b"=", value.as_bytes()].concat()))
        .collect::<nix::Result<Vec<_>>>()?;
    let program = c_string(program.as_os_str().as_bytes().to_vec())?;
    posix_spawnp(&program, &actions, &attributes, &line, &environment)
}

/// Waits until the child has exited; `None` if it had to be killed after [`TIME_LIMIT`].
fn wait(pid: Pid) -> nix::Result<Option<WaitStatus>> {
    // The child is not reaped yet, so the pid is surely its own.
    let handle = pidfd_open(HostPid(pid.as_raw()))?;
    let deadline = Instant::now() + TIME_LIMIT;
    let exited = wait_readable(handle.as_fd(), deadline)?;
    if !exited {
        kill(pid, Signal::SIGKILL)?;
    }
    loop {
        match waitpid(pid, None) {
            Err(Errno::EINTR) => continue,
            status => return Ok(Some(status?).filter(|_| exited)),
        }
    }
}

/// Polls `fd` until it is readable; whether that happened before the deadline.
pub(super) fn wait_readable(fd: BorrowedFd<'_>, deadline: Instant) -> nix::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up: a wait that ends a moment early would spin through the last millisecond.
        let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Ok(0) if Instant::now() >= deadline => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => continue,
            result => return result.map(|_| true),
        }
    }
}

fn describe_status(status: WaitStatus) -> String {
    match status {
        WaitStatus::Exited(_, code) => format!("exit status {code}"),
        WaitStatus::Signaled(_, signal, _) => format!("killed by {signal}"),
        other => format!("{other:?}"),
    }
}

fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::process::{Command, Stdio};

    fn words(line: &[&str]) -> Vec<OsString> {
        line.iter().map(OsString::from).collect()
    }

    /// A stand-in for a runtime: a script that ignores the log options, `$4` on are its own arguments.
    ///
    /// Another process writes it: a descriptor of this one might just be inherited by what another test starts, and a file
    /// that somebody may write to is not executed (`ETXTBSY`).
    fn script(text: &str) -> tempfile::TempPath {
        let write = |path: &Path| {
            let mut install = Command::new("install");
            let mut child =
                install.args(["-m", "755", "/proc/self/fd/0"]).arg(path).stdin(Stdio::piped()).spawn()?;
            let mut stdin = child.stdin.take().expect("piped above");
            stdin.write_all(format!("#!/bin/sh\n{text}\n").as_bytes())?;
            drop(stdin);
            assert!(child.wait()?.success());
            Ok(())
        };
        tempfile::Builder::new().make(write).unwrap().into_temp_path()
    }

    #[test]
    fn output_and_failure_come_back() {
        assert_eq!(run(&script("echo $5 $LISTEN_FDS"), &words(&["hello"]), None).unwrap(), b"hello\n");
        let program = script("echo spoken >&2; exit 3");
        let error = run(&program, &words(&["state", "x"]), None).unwrap_err().to_string();
        assert_eq!(error, format!("{} state x failed (exit status 3): spoken", program.display()));
        let program = script(r#"echo '{"level":"error","msg":"logged"}' >> $2; echo spoken >&2; kill -9 $$"#);
        let error = run(&program, &[], None).unwrap_err().to_string();
        assert!(error.ends_with("(killed by SIGKILL): logged"), "{error}");
        let error = run(Path::new("/nonexistent/runc"), &[], None).unwrap_err();
        assert!(matches!(error, CommandError::Spawn { source: Errno::ENOENT, .. }), "{error:?}");
    }

    #[test]
    fn descriptors_arrive_in_their_places_and_sigpipe_is_not_ignored() {
        let pipe = || std::io::pipe().unwrap();
        let ((mut output, output_end), (mut error, error_end), (mut third, third_end)) =
            (pipe(), pipe(), pipe());
        let input = File::open("/dev/null").unwrap();
        let program = script("echo out; echo err >&2; echo third >&3; kill -PIPE $$; echo pipes ignored");
        let stdio = [input.as_fd(), output_end.as_fd(), error_end.as_fd()];
        let failure = run(&program, &[], Some(HandedOn { stdio, third: third_end.as_fd() })).unwrap_err();
        assert!(failure.to_string().contains("killed by SIGPIPE"), "{failure}");
        drop((output_end, error_end, third_end));
        let mut texts = [String::new(), String::new(), String::new()];
        output.read_to_string(&mut texts[0]).unwrap();
        error.read_to_string(&mut texts[1]).unwrap();
        third.read_to_string(&mut texts[2]).unwrap();
        assert_eq!(texts, ["out\n", "err\n", "third\n"]);
    }

    #[test]
    fn waiting_ends_at_the_deadline() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let deadline = Instant::now() + Duration::from_millis(20);
        assert!(!wait_readable(reader.as_fd(), deadline).unwrap());
        assert!(Instant::now() >= deadline);
    }
}
