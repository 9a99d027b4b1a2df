//! The control stream as the engine's thread sees it: send a message, wait for one.
//!
//! The socket does not block; reading and writing try first and `poll` only when there is nothing to do. What can end a
//! wait is: a message, the time limit of the step, a [`Cancellation`], and TCP giving up on the peer. The last needs no
//! messages of ours: keep-alive probes run while nothing is sent, `TCP_USER_TIMEOUT` (tcp(7)) limits how long something
//! sent may stay unacknowledged, so a dead host or a cut link ends a wait after [`PEER_SILENCE`] whatever its own limit.
//!
//! A cancellation ends only the waiting for messages, so a side that stops can still tell the other. A side that is told
//! something before the connection ends can still read it: after an error of [`ControlChannel::send`],
//! [`ControlChannel::try_recv`] may have the peer's last words, and [`ControlChannel::finish`] sees to it that ours arrive.

use super::cancel::Cancellation;
use super::error::{Error, Result, socket};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use pclive_wire::codec::{self, CodecError, HEADER_LEN};
use pclive_wire::control::{
    Accepted, DestinationMessage, Message, Open, Proposal, SessionToken, SourceMessage,
};
use pclive_wire::limits::{MAX_CONTROL_PAYLOAD, MAX_OPEN_PAYLOAD};
use std::io::{ErrorKind, Read, Write};
use std::marker::PhantomData;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// How long a peer may be silent at the TCP level before it is taken for dead.
pub const PEER_SILENCE: Duration = Duration::from_secs(5);
/// How long connecting, and each of the first messages, may take.
pub const OPENING: Duration = Duration::from_secs(10);
/// How long the peer may take to accept a message that is being sent.
const SENDING: Duration = Duration::from_secs(30);
/// Bytes read at a time; an inbox that grew beyond it is given back once it is empty.
const READ_CHUNK: usize = 64 << 10;

/// The source's end.
pub type SourceChannel = ControlChannel<SourceMessage, DestinationMessage>;
/// The destination's end.
pub type DestinationChannel = ControlChannel<DestinationMessage, SourceMessage>;

/// One end of a control stream, which sends `Out` and receives `In`.
#[derive(Debug)]
pub struct ControlChannel<Out, In> {
    stream: TcpStream,
    peer: SocketAddr,
    /// What ends waiting for messages.
    cancellations: Vec<Cancellation>,
    /// Received and not yet decoded.
    inbox: Vec<u8>,
    messages: PhantomData<fn(Out) -> In>,
}

impl<Out: Message, In: Message> ControlChannel<Out, In> {
    /// Takes over a connection on which the first message has been exchanged.
    pub(super) fn new(stream: TcpStream, peer: SocketAddr, cancellation: Cancellation) -> Result<Self> {
        configure(&stream, peer, PEER_SILENCE)?;
        stream.set_nonblocking(true).map_err(socket("configure the connection to", peer))?;
        let cancellations = vec![cancellation];
        Ok(Self { stream, peer, cancellations, inbox: Vec::new(), messages: PhantomData })
    }

    /// The other end.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Has this end waiting for messages, too, with [`Error::Cancelled`].
    pub fn cancelled_by(&mut self, cancellation: Cancellation) {
        self.cancellations.push(cancellation);
    }

    /// Lets nothing interrupt [`ControlChannel::recv`] from now on: for the time behind the point of no return, and for
    /// hearing the peer out after a cancellation.
    pub fn shield(&mut self) {
        self.cancellations.clear();
    }

    /// Sends a message; returns when the kernel has all of it.
    pub fn send(&mut self, message: &Out) -> Result {
        self.send_frame(message, MAX_CONTROL_PAYLOAD)
    }

    fn send_frame<M: serde::Serialize>(&mut self, message: &M, limit: usize) -> Result {
        let peer = self.peer;
        let frame = codec::encode(message, limit).map_err(|source| Error::Unsendable { peer, source })?;
        let deadline = Instant::now() + SENDING;
        let mut rest = &frame[..];
        while !rest.is_empty() {
            match self.stream.write(rest) {
                Ok(sent) => rest = &rest[sent..],
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    if !self.wait(PollFlags::POLLOUT, deadline, &[])? {
                        return Err(Error::TimedOut { what: "progress in sending", peer, limit: SENDING });
                    }
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(socket("send to", peer)(e)),
            }
        }
        Ok(())
    }

    /// The next message, which must come within `limit`.
    pub fn recv(&mut self, limit: Duration) -> Result<In> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(message) = self.try_recv()? {
                return Ok(message);
            }
            if !self.wait(PollFlags::POLLIN, deadline, &self.cancellations)? {
                return Err(Error::TimedOut { what: "message", peer: self.peer, limit });
            }
        }
    }

    /// The next message, if one is there.
    pub fn try_recv(&mut self) -> Result<Option<In>> {
        loop {
            if let Some(message) = self.take_message()? {
                return Ok(Some(message));
            }
            if !self.read_some()? {
                return Ok(None);
            }
        }
    }

    /// An error if the peer has ended the connection; what it sent before waits to be received.
    pub fn check(&mut self) -> Result {
        self.read_some().map(drop)
    }

    /// Ends the conversation after the last message, and waits for the peer to close, at most for `limit`. Just to close
    /// would be unsafe: if something from the peer is unread then, TCP resets the connection, and the reset may overtake
    /// our last message.
    pub fn finish(mut self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut open = self.stream.shutdown(Shutdown::Write).is_ok();
        while open {
            open = match self.read_some() {
                Ok(true) => true,
                Ok(false) => self.wait(PollFlags::POLLIN, deadline, &[]).unwrap_or(false),
                Err(_) => false,
            };
            self.inbox.clear();
        }
    }

    /// Takes a complete frame out of the inbox, and checks it.
    fn take_message(&mut self) -> Result<Option<In>> {
        let peer = self.peer;
        let malformed = |source: CodecError| Error::Frame { peer, source };
        let Some((header, rest)) = self.inbox.split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let length = codec::payload_length(header, MAX_CONTROL_PAYLOAD).map_err(malformed)?;
        let Some(payload) = rest.get(..length) else { return Ok(None) };
        let message: In = codec::decode(payload).map_err(malformed)?;
        message.validate().map_err(|source| Error::Manifest { peer, source })?;
        self.inbox.drain(..HEADER_LEN + length);
        if self.inbox.is_empty() && self.inbox.capacity() > READ_CHUNK {
            self.inbox = Vec::new();
        }
        Ok(Some(message))
    }

    /// Reads what is there; says whether anything was.
    fn read_some(&mut self) -> Result<bool> {
        let before = self.inbox.len();
        self.inbox.resize(before + READ_CHUNK, 0);
        let result = loop {
            match self.stream.read(&mut self.inbox[before..]) {
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                result => break result,
            }
        };
        self.inbox.truncate(before + result.as_ref().copied().unwrap_or(0));
        match result {
            Ok(0) => Err(Error::Closed(self.peer)),
            Ok(_) => Ok(true),
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(e) => Err(socket("receive from", self.peer)(e)),
        }
    }

    /// Waits until the socket is ready; `false` at the deadline.
    fn wait(&self, events: PollFlags, deadline: Instant, cancellations: &[Cancellation]) -> Result<bool> {
        let mut fds = vec![PollFd::new(self.stream.as_fd(), events)];
        fds.extend(cancellations.iter().map(Cancellation::poll_fd));
        loop {
            cancellations.iter().try_for_each(Cancellation::check)?;
            let left = deadline.saturating_duration_since(Instant::now());
            // Rounded up: a wait must not become a loop of zero milliseconds.
            let timeout = PollTimeout::try_from(left.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX);
            match poll(&mut fds, timeout) {
                Ok(0) if left.is_zero() => return Ok(false),
                Ok(_) if fds[0].any() == Some(true) => return Ok(true),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(socket("poll the connection to", self.peer)(errno)),
            }
        }
    }
}

impl SourceChannel {
    /// Proposes a migration to the destination that listens at `address`, and waits for its answer.
    pub fn connect(
        address: SocketAddr,
        proposal: Proposal,
        cancellation: Cancellation,
    ) -> Result<(Self, Accepted)> {
        let stream = connect(address)?;
        let mut channel = Self::new(stream, address, cancellation)?;
        channel.send_frame(&Open::Control(Box::new(proposal)), MAX_OPEN_PAYLOAD)?;
        match channel.recv(OPENING)? {
            DestinationMessage::Accepted(accepted) => Ok((channel, accepted)),
            DestinationMessage::Rejected(source) => Err(Error::Refused { peer: address, source }),
            other => Err(Error::Unexpected { peer: address, message: format!("{other:?}") }),
        }
    }
}

/// Connects page stream `index` of the session that `token` stands for.
pub(super) fn connect_pages(address: SocketAddr, token: SessionToken, index: u16) -> Result<TcpStream> {
    let mut stream = connect(address)?;
    let open = codec::encode(&Open::Pages { token, index }, MAX_OPEN_PAYLOAD)
        .map_err(|source| Error::Unsendable { peer: address, source })?;
    stream.write_all(&open).map_err(socket("send to", address))?;
    Ok(stream)
}

fn connect(address: SocketAddr) -> Result<TcpStream> {
    TcpStream::connect_timeout(&address, OPENING).map_err(socket("connect to", address))
}

/// Small messages at once; a peer that does not answer at the TCP level for `silence` is dead.
pub(super) fn configure(stream: &TcpStream, peer: SocketAddr, silence: Duration) -> Result {
    const PROBE_INTERVAL_S: u32 = 2;
    let set = || -> nix::Result<()> {
        setsockopt(stream, sockopt::TcpNoDelay, &true)?;
        setsockopt(stream, sockopt::KeepAlive, &true)?;
        setsockopt(stream, sockopt::TcpKeepIdle, &PROBE_INTERVAL_S)?;
        setsockopt(stream, sockopt::TcpKeepInterval, &PROBE_INTERVAL_S)?;
        setsockopt(stream, sockopt::TcpUserTimeout, &(silence.as_millis() as u32))
    };
    set().map_err(socket("configure the connection to", peer))
}
