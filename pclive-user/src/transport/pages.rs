//! Page streams: batches of pages from the source to the destination, rounds kept apart by barriers.
//!
//! A batch is built in a [`PageBuffer`]: the caller fills the contents, the sender writes header and runs in front, and
//! one gathering `sendmsg` takes both. Where zero copy pays the kernel reads the buffer until the peer has acknowledged
//! it, so buffers come back by the completions of the error queue. Whether it pays the first few completions say.
//!
//! The receiver reads contents straight into a page-aligned buffer of its pool and hands the buffer out with the batch.
//! When all buffers are handed out it does not read, TCP closes the window and the source waits: memory stays bounded
//! whatever the two sides' speeds are.

use super::buffer::{BufferPool, PageBuffer};
use super::control::{configure, connect_pages};
use super::error::{Error, Result, socket};
use super::pace::Pace;
use super::zerocopy::{InFlight, ZeroCopy};
use memmap2::{Mmap, MmapMut};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pclive_sys::zerocopy;
use pclive_wire::control::SessionToken;
use pclive_wire::page_frame::{
    FrameHeader, HEADER_LEN, MAX_HEAD_LEN, PageFrameError, PageRun, StreamOrder, decode_runs, encode_batch,
};
use pclive_wire::{NsPid, Round};
use std::io::{ErrorKind, IoSlice, Read};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

/// Buffers of one stream, at either end: one being filled, the others on their way.
const BUFFERS: usize = 4;
/// Fewer bytes are copied faster than their pages are pinned (msg_zerocopy.rst: "generally only effective at writes over
/// around 10 KB").
const MIN_ZEROCOPY: usize = 16 << 10;
/// Bytes that the kernel copies in one call, in either direction. Where it is not preemptible (`PREEMPT_NONE`, and in parts
/// `PREEMPT_VOLUNTARY`) nobody else gets the processor before a call is over: a MiB takes some 0.3 ms.
const COPIED_AT_ONCE: usize = 64 << 10;
/// How long the peer may accept nothing. Longer than for the control stream, whose own limit is what notices a dead
/// peer: a destination that is busy reconciling closes the window of its page streams for a while.
const STALL: Duration = Duration::from_secs(60);

/// Ends a page stream from another thread, whatever the thread that uses it waits for.
#[derive(Debug)]
pub struct Hangup(TcpStream);

impl Hangup {
    /// Makes every later and every waiting operation on the stream fail, at both ends.
    pub fn hang_up(&self) {
        // Fails only if the peer was faster.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// What a page stream has carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageStats {
    /// Bytes, with headers.
    pub bytes: u64,
    /// `sendmsg` calls.
    pub sends: u64,
    /// Of these, calls that asked for zero copy.
    pub zerocopy_sends: u64,
    /// Of these, calls whose data the kernel copied after all.
    pub zerocopy_copied: u64,
}

impl std::ops::AddAssign for PageStats {
    fn add_assign(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.sends += other.sends;
        self.zerocopy_sends += other.zerocopy_sends;
        self.zerocopy_copied += other.zerocopy_copied;
    }
}

/// The source's end of a page stream.
#[derive(Debug)]
pub struct PageSender {
    stream: TcpStream,
    peer: SocketAddr,
    pool: BufferPool,
    order: StreamOrder,
    in_flight: InFlight,
    pace: Pace,
    paced: Duration,
    bytes: u64,
    sends: u64,
}

impl PageSender {
    /// Opens stream number `index` of the session that the destination at `address` gave `token` for.
    pub fn connect(address: SocketAddr, token: SessionToken, index: u16, pace: Pace) -> Result<Self> {
        Self::new(connect_pages(address, token, index)?, address, pace)
    }

    pub(super) fn new(stream: TcpStream, peer: SocketAddr, pace: Pace) -> Result<Self> {
        configure(&stream, peer, STALL)?;
        let in_flight = InFlight::new(zerocopy::enable(&stream).is_ok());
        let pool = BufferPool::new(BUFFERS)?;
        Ok(Self {
            stream,
            peer,
            pool,
            order: StreamOrder::default(),
            in_flight,
            pace,
            paced: Duration::ZERO,
            bytes: 0,
            sends: 0,
        })
    }

    /// The same with or without `MSG_ZEROCOPY`, as `wanted`.
    pub fn with_zero_copy(self, wanted: ZeroCopy) -> Self {
        Self { in_flight: self.in_flight.wanting(wanted), ..self }
    }

    /// A handle that ends the stream from another thread.
    pub fn hangup(&self) -> Result<Hangup> {
        self.stream.try_clone().map(Hangup).map_err(socket("clone the connection to", self.peer))
    }

    /// For how long it has waited for its rate limit so far.
    pub fn paced(&self) -> Duration {
        self.paced
    }

    /// Sends as fast as the network can from now on.
    pub fn lift_limit(&self) {
        self.pace.lift();
    }

    /// The round whose pages are being sent.
    pub fn round(&self) -> Round {
        self.order.round()
    }

    /// What has been sent so far.
    pub fn stats(&self) -> PageStats {
        PageStats {
            bytes: self.bytes,
            sends: self.sends,
            zerocopy_sends: self.in_flight.sends(),
            zerocopy_copied: self.in_flight.copied(),
        }
    }

    /// A buffer to fill; waits until the kernel is done with one. The caller holds no more than one at a time.
    pub fn buffer(&mut self) -> Result<PageBuffer> {
        self.reap()?;
        loop {
            if let Some(buffer) = self.pool.try_take() {
                return Ok(buffer);
            }
            if !self.in_flight.any_busy() {
                // All of them are with callers, who will drop them.
                return Ok(self.pool.take());
            }
            self.wait_for_completion()?;
        }
    }

    /// Sends `runs` of pages of `process` in the current round. The blocks of the runs stand at the beginning of
    /// `buffer`'s contents, in the order of the runs. Returns when the kernel has taken everything.
    pub fn send(&mut self, process: NsPid, runs: &[PageRun], mut buffer: PageBuffer) -> Result {
        let (head, _) = buffer.split_mut();
        // The room for the head has this size, so the conversion cannot fail.
        let Some(head) = head.first_chunk_mut::<MAX_HEAD_LEN>() else { return Ok(()) };
        let (header, head_len) =
            encode_batch(process, self.order.round(), runs, head).map_err(self.malformed())?;
        let contents_len = header.contents_len();
        self.paced += self.pace.wait((head_len + contents_len) as u64);
        let first = self.in_flight.sends();
        let mut parts =
            [IoSlice::new(&buffer.head()[..head_len]), IoSlice::new(&buffer.contents()[..contents_len])];
        let result = self.send_all(&mut parts, contents_len >= MIN_ZEROCOPY);
        // Kept even if sending failed half-way: the kernel may still read the first half.
        self.in_flight.keep(buffer, first);
        result
    }

    /// Ends the current round on this stream, and begins the next.
    pub fn barrier(&mut self) -> Result {
        let header = FrameHeader::Barrier(self.order.round());
        self.send_all(&mut [IoSlice::new(&header.encode())], false)?;
        self.order.take(&header).map_err(self.malformed())
    }

    /// Waits until the peer's TCP has everything and no buffer is in use: for the end of the last round.
    pub fn flush(&mut self) -> Result {
        self.reap()?;
        while self.in_flight.any_busy() {
            self.wait_for_completion()?;
        }
        Ok(())
    }

    fn malformed(&self) -> impl FnOnce(PageFrameError) -> Error + use<> {
        let peer = self.peer;
        move |source| Error::PageFrame { peer, source }
    }

    fn send_all(&mut self, mut parts: &mut [IoSlice<'_>], large: bool) -> Result {
        let mut left: usize = parts.iter().map(|part| part.len()).sum();
        let mut zero_copy = large && self.in_flight.wanted();
        while left > 0 {
            let at_once = if zero_copy { left } else { COPIED_AT_ONCE };
            match zerocopy::send(&self.stream, &first_bytes(parts, at_once), zero_copy) {
                Ok(sent) => {
                    self.sends += 1;
                    self.bytes += sent as u64;
                    if zero_copy {
                        self.in_flight.sent();
                    }
                    left -= sent;
                    IoSlice::advance_slices(&mut parts, sent);
                }
                Err(Errno::EINTR) => {}
                // More pages are pinned than the socket or the process may have: this one goes by copying.
                Err(Errno::ENOBUFS) if zero_copy => zero_copy = false,
                Err(errno) => return Err(socket("send pages to", self.peer)(errno)),
            }
        }
        Ok(())
    }

    /// Takes the completions that are there.
    fn reap(&mut self) -> Result {
        while self.in_flight.any_busy() {
            let next = zerocopy::next_completion(&self.stream);
            match next.map_err(socket("read completions of the connection to", self.peer))? {
                Some(completion) => self.in_flight.complete(completion),
                None => break,
            }
        }
        Ok(())
    }

    fn wait_for_completion(&mut self) -> Result {
        // POLLERR, which the error queue raises, need not be asked for. A connection that broke raises POLLHUP too.
        let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::empty())];
        let limit = PollTimeout::try_from(STALL).unwrap_or(PollTimeout::MAX);
        let ready = match poll(&mut fds, limit) {
            Err(Errno::EINTR) => return Ok(()),
            result => result.map_err(socket("poll the connection to", self.peer))?,
        };
        if ready == 0 {
            return Err(Error::TimedOut { what: "acknowledgement of pages", peer: self.peer, limit: STALL });
        }
        let hung_up = fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP));
        self.reap()?;
        match self.stream.take_error().map_err(socket("query the connection to", self.peer))? {
            Some(error) => Err(socket("send pages to", self.peer)(error)),
            None if hung_up => Err(Error::Closed(self.peer)),
            None => Ok(()),
        }
    }
}

/// The beginning of `parts`: at most `len` bytes.
fn first_bytes<'a>(parts: &'a [IoSlice<'_>], mut len: usize) -> Vec<IoSlice<'a>> {
    let mut first = Vec::with_capacity(parts.len());
    for part in parts {
        let (taken, _) = part.split_at(part.len().min(len));
        len -= taken.len();
        first.push(IoSlice::new(taken));
    }
    first
}

/// What a page stream brings.
#[derive(Debug)]
pub enum PageEvent {
    /// Pages.
    Batch(Batch),
    /// This stream has brought everything of the round.
    Barrier(Round),
}

/// Pages of one process, checked: runs ascend, and there are contents for each of them that needs some.
#[derive(Debug)]
pub struct Batch {
    /// Whose pages.
    pub process: NsPid,
    /// Of which round.
    pub round: Round,
    runs: Vec<PageRun>,
    contents: Contents,
}

#[derive(Debug)]
enum Contents {
    /// In a buffer of the stream's pool, in its first so many bytes.
    Pooled(PageBuffer, usize),
    /// In memory of its own; `None` for no contents, which cannot be mapped.
    Kept(Option<Mmap>),
}

impl Batch {
    /// The runs.
    pub fn runs(&self) -> &[PageRun] {
        &self.runs
    }

    /// Contents of all runs.
    pub fn contents(&self) -> &[u8] {
        match &self.contents {
            Contents::Pooled(buffer, len) => &buffer.contents()[..*len],
            Contents::Kept(map) => map.as_deref().unwrap_or_default(),
        }
    }

    /// Each run with its contents.
    pub fn pieces(&self) -> impl Iterator<Item = (PageRun, &[u8])> {
        let mut rest = self.contents();
        self.runs.iter().map(move |&run| {
            let (contents, after) = rest.split_at(run.contents_len());
            rest = after;
            (run, contents)
        })
    }

    /// The same batch in memory of its own: for keeping it, since the stream goes on only while it has buffers.
    pub fn keep(mut self) -> Result<Self> {
        if let Contents::Pooled(_, len) = self.contents {
            let mut map = None;
            if len > 0 {
                let failed = |source| Error::Local("map memory to keep a batch of pages", source);
                let mut copy = MmapMut::map_anon(len).map_err(failed)?;
                copy.copy_from_slice(self.contents());
                map = Some(copy.make_read_only().map_err(failed)?);
            }
            self.contents = Contents::Kept(map);
        }
        Ok(self)
    }
}

/// The destination's end of a page stream.
#[derive(Debug)]
pub struct PageReceiver {
    stream: TcpStream,
    peer: SocketAddr,
    pool: BufferPool,
    order: StreamOrder,
}

impl PageReceiver {
    pub(super) fn new(stream: TcpStream, peer: SocketAddr) -> Result<Self> {
        configure(&stream, peer, STALL)?;
        Ok(Self { stream, peer, pool: BufferPool::new(BUFFERS)?, order: StreamOrder::default() })
    }

    /// A handle that ends the stream from another thread.
    pub fn hangup(&self) -> Result<Hangup> {
        self.stream.try_clone().map(Hangup).map_err(socket("clone the connection to", self.peer))
    }

    /// The next batch or barrier; waits for it, and for a buffer while all of them are in batches that are still held.
    pub fn recv(&mut self) -> Result<PageEvent> {
        let mut header = [0; HEADER_LEN];
        self.read(&mut header)?;
        let peer = self.peer;
        let malformed = |source| Error::PageFrame { peer, source };
        let header = FrameHeader::decode(&header).map_err(malformed)?;
        self.order.take(&header).map_err(malformed)?;
        let batch = match header {
            FrameHeader::Barrier(round) => return Ok(PageEvent::Barrier(round)),
            FrameHeader::Batch(batch) => batch,
        };
        let mut buffer = self.pool.take();
        let (head, contents) = buffer.split_mut();
        let head = &mut head[..batch.runs_len()];
        self.read(head)?;
        let runs = decode_runs(&batch, head).map_err(malformed)?;
        self.read(&mut contents[..batch.contents_len()])?;
        let contents = Contents::Pooled(buffer, batch.contents_len());
        Ok(PageEvent::Batch(Batch { process: batch.process, round: batch.round, runs, contents }))
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result {
        let received = bytes.chunks_mut(COPIED_AT_ONCE).try_for_each(|part| self.stream.read_exact(part));
        received.map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => Error::Closed(self.peer),
            _ => socket("receive pages from", self.peer)(error),
        })
    }
}

#[cfg(test)]
impl Batch {
    /// Whole pages from `start` on, not from any stream.
    pub(crate) fn of_pages(process: NsPid, round: Round, start: pclive_wire::VirtAddr, pages: &[u8]) -> Self {
        let range = pclive_wire::PageRange::new(start, pages.len() as u64 / pclive_wire::PAGE_SIZE);
        let runs = vec![PageRun { range, kind: pclive_wire::page_frame::RunKind::Raw }];
        let mut map = MmapMut::map_anon(pages.len()).unwrap();
        map.copy_from_slice(pages);
        Self { process, round, runs, contents: Contents::Kept(Some(map.make_read_only().unwrap())) }
    }
}

#[cfg(test)]
mod tests;
