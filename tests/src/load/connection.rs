//! One connection: what was asked on it, and the bytes under way.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};

use super::keyspace::{Key, Version};
use super::protocol::{self, Answer};
use super::spec::Service;

/// What one `read` takes at most.
const READ_BYTES: usize = 64 * 1024;

/// A request that was sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    pub key: Key,
    pub kind: RequestKind,
    /// When it was sent, or should have been (µs, monotonic).
    pub due_us: u64,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum RequestKind {
    /// A read, which may return nothing older than `floor`.
    Get { floor: Version },
    /// A write.
    Set { version: Version },
}

#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    /// As long as what has been read at most so far, of which the first `received` bytes are not understood yet.
    input: Vec<u8>,
    received: usize,
    output: Vec<u8>,
    written: usize,
    /// Whether the epoll set also waits for the socket to take bytes.
    pub waits_to_write: bool,
    pending: VecDeque<Request>,
}

impl Connection {
    pub(super) fn open(server: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(server)?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            input: Vec::new(),
            received: 0,
            output: Vec::with_capacity(READ_BYTES),
            written: 0,
            waits_to_write: false,
            pending: VecDeque::new(),
        })
    }

    /// Requests that have no answer yet.
    pub(super) fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Queues a request whose bytes `append` adds to the output.
    pub(super) fn push(&mut self, request: Request, append: impl FnOnce(&mut Vec<u8>)) {
        append(&mut self.output);
        self.pending.push_back(request);
    }

    /// Whether bytes wait to be written.
    pub(super) fn has_output(&self) -> bool {
        self.written < self.output.len()
    }

    /// Writes as much as the socket takes.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while self.has_output() {
            match self.stream.write(&self.output[self.written..]) {
                Ok(bytes) => self.written += bytes,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.output.clear();
        self.written = 0;
        Ok(())
    }

    /// Reads once and calls `answered` for each request whose answer is complete.
    pub(super) fn receive(
        &mut self,
        service: Service,
        mut answered: impl FnMut(Request, Answer<'_>),
    ) -> io::Result<()> {
        // Cleared once, not for each answer: that would be most of what the program does.
        self.input.resize(self.input.len().max(self.received + READ_BYTES), 0);
        match self.stream.read(&mut self.input[self.received..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(bytes) => self.received += bytes,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
        let mut parsed = 0;
        while let Some((answer, len)) = protocol::parse(service, &self.input[parsed..self.received]) {
            let request = self.pending.pop_front();
            let request =
                request.ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "an answer to nothing"))?;
            answered(request, answer);
            parsed += len;
        }
        self.input.copy_within(parsed..self.received, 0);
        self.received -= parsed;
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
