//! The other processes of the tree, as the one that checks sees them: asked by a pipe or a signal, answering by a pipe.

use super::probe::{Findings, Probe};
use super::roles::{HOW, SPOIL, adopt};
use crate::workloads::control::Answer;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid};
use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::os::fd::{AsFd, RawFd};
use std::time::{Duration, Instant};

/// Longer than any of them needs.
const PATIENCE_MS: u16 = 10_000;

/// Lines that come from another process.
#[derive(Debug)]
struct Lines(BufReader<File>);

impl Lines {
    fn next(&mut self) -> io::Result<String> {
        if self.0.buffer().is_empty() {
            let mut fds = [PollFd::new(self.0.get_ref().as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::from(PATIENCE_MS))? == 0 {
                return Err(ErrorKind::TimedOut.into());
            }
        }
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    }
}

/// See the module.
#[derive(Debug)]
pub struct Children {
    commands: File,
    reader: Lines,
    sleeper: Lines,
    sleeper_pid: Pid,
    sleeps: u64,
    shell: Lines,
    shell_pid: Pid,
}

/// The descriptors through which the processes of the tree talk.
#[derive(Clone, Copy, Debug, clap::Args)]
#[allow(missing_docs)] // the names say it
pub struct Descriptors {
    pub commands: RawFd,
    pub reader: RawFd,
    pub sleeper: RawFd,
    pub shell: RawFd,
}

impl Children {
    /// Waits until all have started.
    ///
    /// # Errors
    /// When one does not.
    pub fn new(descriptors: Descriptors) -> anyhow::Result<Self> {
        let lines = |fd| Lines(BufReader::new(adopt(fd)));
        let (mut reader, mut sleeper) = (lines(descriptors.reader), lines(descriptors.sleeper));
        reader.next()?;
        Ok(Children {
            commands: adopt(descriptors.commands),
            reader,
            sleeper_pid: Pid::from_raw(sleeper.next()?.parse()?),
            sleeper,
            sleeps: 0,
            shell: lines(descriptors.shell),
            shell_pid: getppid(),
        })
    }

    fn check_sleeper(&mut self, findings: &mut Findings) -> io::Result<()> {
        let start = Instant::now();
        loop {
            kill(self.sleeper_pid, Signal::SIGUSR1)?;
            let Some(sleeps) = take_answer("sleeper", &self.sleeper.next()?, findings)? else {
                return Ok(());
            };
            if sleeps > self.sleeps {
                self.sleeps = sleeps;
                return Ok(());
            }
            if start.elapsed() > Duration::from_millis(PATIENCE_MS.into()) {
                findings.add(format!("sleeper: still in sleep number {}", self.sleeps + 1));
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn check_shell(&mut self, findings: &mut Findings) -> io::Result<()> {
        findings.equal("parent", self.shell_pid, getppid());
        kill(self.shell_pid, Signal::SIGUSR1)?;
        findings.equal("answer of the shell", "trapped".to_owned(), self.shell.next()?);
        Ok(())
    }
}

/// The number in a good answer.
fn take_answer(who: &str, line: &str, findings: &mut Findings) -> io::Result<Option<u64>> {
    match Answer::parse(line)? {
        Answer::Ok(number) => Ok(number.parse().ok()),
        Answer::Differs(list) => {
            list.iter().for_each(|difference| findings.add(format!("{who}: {difference}")));
            Ok(None)
        }
    }
}

impl Probe for Children {
    fn name(&self) -> &'static str {
        "children"
    }

    fn check(&mut self, findings: &mut Findings) {
        let reader = self.commands.write_all(&[HOW]).and_then(|()| self.reader.next());
        if let Some(line) = findings.succeed("ask the reader", reader) {
            let result = take_answer("reader", &line, findings);
            findings.succeed("understand the reader", result);
        }
        let result = self.check_sleeper(findings);
        findings.succeed("ask the sleeper", result);
        let result = self.check_shell(findings);
        findings.succeed("ask the shell", result);
    }

    fn counters(&mut self) -> Vec<(&'static str, u64)> {
        vec![("sleeps", self.sleeps)]
    }

    fn spoil(&mut self) {
        // A failure would show as a check that succeeds.
        let _ = self.commands.write_all(&[SPOIL]);
    }
}
