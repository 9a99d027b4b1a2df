//! Bytes on their way: pipes and unix sockets with unread contents, eventfds.

use super::probe::{Findings, Probe};
use crate::workloads::pattern;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, tee};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, recv};
use nix::unistd::pipe2;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};

/// Larger than the default, so that it must be set again.
const CAPACITY: i32 = 128 << 10;
/// More than fits into one page, and no multiple of it.
pub(super) const UNREAD: usize = 9_999;
/// How far each check moves on.
pub(super) const STEP: usize = 500;
const DATAGRAMS: [usize; 3] = [1, 700, 0];

/// A stream of known bytes of which a part is under way.
#[derive(Debug)]
pub(super) struct Flow {
    seed: u64,
    read: usize,
    written: usize,
}

impl Flow {
    fn between(&self, start: usize, end: usize) -> Vec<u8> {
        pattern::bytes(self.seed, end).split_off(start)
    }

    /// What must be there to be read.
    pub fn unread(&self) -> Vec<u8> {
        self.between(self.read, self.written)
    }

    /// Writes the first bytes.
    pub fn start(seed: u64, writer: &mut impl Write) -> io::Result<Self> {
        let flow = Flow { seed, read: 0, written: UNREAD };
        writer.write_all(&flow.unread())?;
        Ok(flow)
    }

    /// Reads some at the front, writes as many at the end.
    pub fn advance(
        &mut self,
        reader: &mut impl Read,
        writer: &mut impl Write,
        findings: &mut Findings,
    ) -> io::Result<()> {
        let mut found = vec![0; STEP];
        reader.read_exact(&mut found)?;
        findings.that(found == self.between(self.read, self.read + STEP), "wrong bytes were read");
        writer.write_all(&self.between(self.written, self.written + STEP))?;
        self.read += STEP;
        self.written += STEP;
        Ok(())
    }
}

/// See the module.
#[derive(Debug)]
pub struct Queues {
    pipe: (File, File),
    pipe_flow: Flow,
    /// A pipe that nobody can write to any more.
    last_words: File,
    /// Empty, non-blocking.
    empty: (File, File),
    streams: (UnixStream, UnixStream),
    forth: Flow,
    back: Flow,
    datagrams: (UnixDatagram, UnixDatagram),
    counter: EventFd,
    semaphore: EventFd,
    /// For looking into pipes without reading them.
    scratch: (File, File),
}

impl Queues {
    /// Makes and fills them.
    ///
    /// # Errors
    /// Those of the calls that make them.
    pub fn new() -> io::Result<Self> {
        let mut pipe = new_pipe(OFlag::empty())?;
        fcntl(&pipe.0, FcntlArg::F_SETPIPE_SZ(CAPACITY))?;
        let (last_words, mut closed) = new_pipe(OFlag::O_CLOEXEC)?;
        closed.write_all(b"last words")?;
        let mut streams = UnixStream::pair()?;
        let datagrams = UnixDatagram::pair()?;
        for (index, length) in DATAGRAMS.into_iter().enumerate() {
            datagrams.0.send(&pattern::bytes(index as u64, length))?;
        }
        Ok(Queues {
            pipe_flow: Flow::start(21, &mut pipe.1)?,
            pipe,
            last_words,
            empty: new_pipe(OFlag::O_NONBLOCK)?,
            forth: Flow::start(22, &mut streams.0)?,
            back: Flow::start(23, &mut streams.1)?,
            streams,
            datagrams,
            counter: EventFd::from_value_and_flags(7, EfdFlags::EFD_NONBLOCK)?,
            semaphore: EventFd::from_value_and_flags(3, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_SEMAPHORE)?,
            scratch: new_pipe(OFlag::O_CLOEXEC)?,
        })
    }

    fn check_pipes(&mut self, findings: &mut Findings) -> io::Result<()> {
        findings.equal("capacity of the pipe", CAPACITY, fcntl(&self.pipe.0, FcntlArg::F_GETPIPE_SZ)?);
        let unread = peek_pipe(&self.pipe.0, &mut self.scratch)?;
        findings.that(
            unread == self.pipe_flow.unread(),
            format!("{} wrong unread bytes in the pipe", unread.len()),
        );
        if unread.len() >= STEP {
            self.pipe_flow.advance(&mut self.pipe.0, &mut self.pipe.1, findings)?;
        }
        let last = peek_pipe(&self.last_words, &mut self.scratch)?;
        findings.equal(
            "bytes in the pipe without a writer",
            "last words".into(),
            String::from_utf8_lossy(&last),
        );
        let result = self.empty.0.read(&mut [0]).map_err(|error| error.kind());
        findings.equal("reading the empty pipe", Err(ErrorKind::WouldBlock), result);
        self.empty.1.write_all(b"!")?;
        findings.equal("reading what was just written", 1, self.empty.0.read(&mut [0; 9])?);
        Ok(())
    }

    fn check_sockets(&mut self, findings: &mut Findings) -> io::Result<()> {
        let (one, two) = (&self.streams.0, &self.streams.1);
        for (flow, mut to, mut from) in [(&mut self.forth, two, one), (&mut self.back, one, two)] {
            let mut found = vec![0; UNREAD + 1];
            let length = recv(to.as_raw_fd(), &mut found, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT)?;
            findings.that(
                found[..length] == flow.unread(),
                format!("{length} wrong unread bytes in a unix stream"),
            );
            if length >= STEP {
                flow.advance(&mut to, &mut from, findings)?;
            }
        }
        self.datagrams.1.set_nonblocking(true)?;
        for (index, length) in DATAGRAMS.into_iter().enumerate() {
            let mut found = vec![0; 1000];
            let received = self.datagrams.1.recv(&mut found)?;
            findings.that(
                found[..received] == pattern::bytes(index as u64, length),
                format!("wrong datagram {index}"),
            );
            self.datagrams.0.send(&found[..received])?;
        }
        self.datagrams.1.set_nonblocking(false)
    }

    fn check_eventfds(&mut self, findings: &mut Findings) -> io::Result<()> {
        findings.equal("eventfd", 7, self.counter.read()?);
        findings.that(self.counter.read().is_err(), "eventfd has a count after it was read");
        self.counter.write(7)?;
        for _ in 0..3 {
            findings.equal("semaphore eventfd", 1, self.semaphore.read()?);
        }
        findings.that(self.semaphore.read().is_err(), "semaphore eventfd counts more than 3");
        self.semaphore.write(3)?;
        Ok(())
    }
}

fn new_pipe(flags: OFlag) -> io::Result<(File, File)> {
    let (reader, writer): (OwnedFd, OwnedFd) = pipe2(flags)?;
    Ok((reader.into(), writer.into()))
}

/// Everything that is in a pipe; it stays there (`tee(2)`).
fn peek_pipe(pipe: &File, scratch: &mut (File, File)) -> io::Result<Vec<u8>> {
    let length = tee(pipe, &scratch.1, CAPACITY as usize, SpliceFFlags::SPLICE_F_NONBLOCK)?;
    let mut bytes = vec![0; length];
    scratch.0.read_exact(&mut bytes)?;
    Ok(bytes)
}

impl Probe for Queues {
    fn name(&self) -> &'static str {
        "queues"
    }

    fn check(&mut self, findings: &mut Findings) {
        for part in [Self::check_pipes, Self::check_sockets, Self::check_eventfds] {
            let result = part(self, findings);
            findings.succeed("use a queue", result);
        }
    }

    fn spoil(&mut self) {
        // A failure would show as a check that succeeds.
        let _ = self.pipe.0.read(&mut [0]);
    }
}
