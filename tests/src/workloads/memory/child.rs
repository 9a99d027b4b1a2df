//! Forked children: each has a copy of its parent thread's regions, checks it, goes on changing it, and ends.

use super::process::{Side, close_all_except, leave, split};
use super::worker::{Failure, Worker};
use crate::workloads::control::Answer;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Longer than any child needs to compare its memory, also with the machine under load.
const PATIENCE: Duration = Duration::from_secs(60);

/// A child that has not said its last word.
#[derive(Debug)]
pub struct Child {
    pid: i32,
    stream: BufReader<UnixStream>,
    said_last_word: bool,
}

/// What a child says.
#[derive(Clone, Copy, Debug)]
struct Word {
    /// Pages compared.
    pages: u64,
    /// Nothing follows.
    last: bool,
}

impl Child {
    /// Forks one that lives for `lifetime`.
    ///
    /// # Errors
    /// Those of `socketpair(2)` and `fork(2)`.
    pub fn start(worker: &mut Worker, lifetime: Duration) -> Result<Self, Failure> {
        let (ours, theirs) = UnixStream::pair().map_err(|error| Failure::call("socketpair", error))?;
        match split().map_err(|error| Failure::call("fork", error.into()))? {
            Side::Parent(pid) => Ok(Child { pid, stream: BufReader::new(ours), said_last_word: false }),
            Side::Child => {
                drop(ours);
                leave(live(worker, theirs, Instant::now() + lifetime).is_err().into())
            }
        }
    }

    /// Tells it to compare its memory; the answer is taken by [`Self::finish_check`].
    pub fn begin_check(&mut self) {
        // A child that has just ended cannot hear it, and has answered already.
        let _ = self.stream.get_mut().write_all(b"?");
    }

    /// The child's answer to [`Self::begin_check`], or its last word if that came first: pages compared. None if it
    /// has ended before.
    ///
    /// # Errors
    /// What differs in the child, or that it died.
    pub fn finish_check(&mut self) -> Result<u64, Failure> {
        if self.said_last_word { Ok(0) } else { self.hear().map(|word| word.pages) }
    }

    /// Whether the child has ended, and well.
    ///
    /// # Errors
    /// What differed in the child, or that it died.
    pub fn has_ended(&mut self) -> Result<bool, Failure> {
        let mut fds = [PollFd::new(self.stream.get_ref().as_fd(), PollFlags::POLLIN)];
        let readable =
            poll(&mut fds, PollTimeout::ZERO).map_err(|error| Failure::call("poll", error.into()))? > 0;
        if readable && !self.said_last_word {
            self.hear()?;
        }
        Ok(self.said_last_word)
    }

    fn hear(&mut self) -> Result<Word, Failure> {
        let mut line = String::new();
        let broken = |error| Failure::call("read from a child", error);
        self.stream.get_ref().set_read_timeout(Some(PATIENCE)).map_err(broken)?;
        match self.stream.read_line(&mut line) {
            Ok(0) => return Err(Failure::ChildDied { pid: self.pid }),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                return Err(Failure::ChildDied { pid: self.pid });
            }
            result => result.map_err(broken)?,
        };
        let word = match Answer::parse(line.trim_end()).map_err(broken)? {
            Answer::Ok(counters) => Word::parse(&counters),
            Answer::Differs(list) => {
                return Err(Failure::Child { pid: self.pid, differences: list.join(", ") });
            }
        };
        self.said_last_word |= word.last;
        Ok(word)
    }
}

impl Word {
    fn parse(counters: &str) -> Self {
        let mut words = counters.split(' ');
        let pages = words.next().and_then(|word| word.parse().ok()).unwrap_or_default();
        Word { pages, last: words.next() == Some("last") }
    }
}

/// What the child does with its life.
fn live(worker: &mut Worker, mut parent: UnixStream, end: Instant) -> std::io::Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    worker.become_child();
    close_all_except(&mut [parent.as_raw_fd(), worker.file_descriptor()]);
    parent.set_nonblocking(true)?;
    let mut result = worker.verify_all();
    while result.is_ok() && Instant::now() < end {
        match parent.read(&mut [0]) {
            Ok(0) => return Ok(()),
            Ok(_) => {
                result = worker.verify_all();
                say(worker, &result, "", &mut parent)?;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => result = worker.step(),
            Err(error) => return Err(error),
        }
    }
    let result = result.and_then(|()| worker.verify_all());
    say(worker, &result, " last", &mut parent)
}

fn say(
    worker: &Worker,
    result: &Result<(), Failure>,
    last: &str,
    to: &mut UnixStream,
) -> std::io::Result<()> {
    let differences = result.as_ref().err().map(ToString::to_string).into_iter().collect();
    let answer = Answer::new(differences, || format!("{}{last}", worker.pages()));
    to.set_nonblocking(false)?;
    to.write_all(format!("{}\n", answer.to_line()).as_bytes())?;
    to.set_nonblocking(true)
}
