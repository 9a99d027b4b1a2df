//! Pipes: which ends the container has, and the bytes in between.
//!
//! Contents are copied with `tee(2)`, which leaves them where they are: should the migration fail, nobody notices.

use super::error::{FileError, Refusal};
use super::identity::Found;
use super::stdio;
use crate::capture::Access;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, tee};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{pipe2, read};
use pclive_wire::manifest::DescriptionKind;
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

/// What `/proc/PID/fd/FD` of a pipe starts with.
pub(super) const LINK: &[u8] = b"pipe:[";

/// The pipes of the container.
pub(super) struct Pipes {
    access: Access,
    /// By link, which has the inode number.
    pipes: HashMap<Vec<u8>, Pipe>,
    scratch: Option<Scratch>,
}

#[derive(Default)]
struct Pipe {
    number: u32,
    reader: bool,
    writer: bool,
    /// Standard stream that one of the descriptions serves as.
    stream: Option<u8>,
    contents_taken: bool,
}

/// A pipe of our own to copy contents into.
struct Scratch {
    read: OwnedFd,
    write: OwnedFd,
    capacity: i32,
}

impl Pipes {
    pub fn new(found: &[Found], access: Access) -> Self {
        let mut pipes: HashMap<Vec<u8>, Pipe> = HashMap::new();
        for found in found.iter().filter(|found| found.open.link.starts_with(LINK)) {
            let number = pipes.len() as u32;
            let pipe =
                pipes.entry(found.open.link.clone()).or_insert_with(|| Pipe { number, ..Pipe::default() });
            match found.access_mode() {
                libc::O_RDONLY => pipe.reader = true,
                libc::O_WRONLY => pipe.writer = true,
                _ => {}
            }
            pipe.stream = pipe.stream.or(found.stream());
        }
        Self { access, pipes, scratch: None }
    }

    pub fn capture(&mut self, found: &Found, duplicate: &OwnedFd) -> Result<DescriptionKind, Refusal> {
        let slot = found.slot();
        let Some(pipe) = self.pipes.get_mut(&found.open.link) else {
            return Err(FileError::FdInfo { object: slot.to_string(), field: "pipe:" }.into());
        };
        // A description open for both directions is no end of its own: it holds its own peer.
        if pipe.reader != pipe.writer && !peer_closed(duplicate).map_err(FileError::call("poll", &slot))? {
            let stream = found.stream().or(pipe.stream);
            return stdio::capture("a pipe whose other end is outside the container", stream);
        }
        if found.flags() & libc::O_DIRECT as u32 != 0 {
            return Err(Refusal::unsupported(
                "a pipe in packet mode (O_DIRECT), whose packet boundaries are not moved",
                "use a socket pair of type SOCK_SEQPACKET",
            ));
        }
        let capacity = fcntl(duplicate, FcntlArg::F_GETPIPE_SZ)
            .map_err(FileError::call("fcntl(F_GETPIPE_SZ)", &slot))?;
        let readable = found.access_mode() != libc::O_WRONLY;
        let mut contents = Vec::new();
        if self.access == Access::Frozen && readable && !pipe.contents_taken {
            pipe.contents_taken = true;
            let scratch = Scratch::at_least(&mut self.scratch, capacity)
                .map_err(FileError::call("make a scratch pipe", &slot))?;
            contents = scratch.copy(duplicate).map_err(FileError::call("tee", &slot))?;
        }
        Ok(DescriptionKind::Pipe { pipe: pipe.number, capacity: capacity as u32, contents })
    }
}

/// Whether nobody at all, in the container or outside, has the other end (`pipe_poll` in fs/pipe.c).
fn peer_closed(end: &OwnedFd) -> nix::Result<bool> {
    let mut polled = [PollFd::new(end.as_fd(), PollFlags::empty())];
    poll(&mut polled, PollTimeout::ZERO)?;
    Ok(polled[0].revents().is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR)))
}

impl Scratch {
    /// A scratch pipe with as many slots as a pipe of `capacity` bytes, so that all of its buffers fit.
    fn at_least(kept: &mut Option<Self>, capacity: i32) -> nix::Result<&mut Self> {
        if kept.as_ref().is_none_or(|scratch| scratch.capacity < capacity) {
            let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
            let mut size = fcntl(&write, FcntlArg::F_GETPIPE_SZ)?;
            if size < capacity {
                size = fcntl(&write, FcntlArg::F_SETPIPE_SZ(capacity))?;
            }
            *kept = Some(Self { read, write, capacity: size });
        }
        kept.as_mut().ok_or(Errno::EINVAL)
    }

    /// The bytes in a pipe, which stay there.
    fn copy(&mut self, from: &OwnedFd) -> nix::Result<Vec<u8>> {
        let length = match tee(from, &self.write, self.capacity as usize, SpliceFFlags::SPLICE_F_NONBLOCK) {
            Ok(length) => length,
            Err(Errno::EAGAIN) => 0,
            Err(errno) => return Err(errno),
        };
        let mut contents = vec![0; length];
        let mut filled = 0;
        while filled < length {
            match read(&self.read, &mut contents[filled..])? {
                0 => return Err(Errno::EPIPE),
                count => filled += count,
            }
        }
        Ok(contents)
    }
}
