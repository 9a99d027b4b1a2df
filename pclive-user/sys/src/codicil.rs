//! Codicils to a [last will](crate::will): sockets that are changed for a moment, and how they were.
//!
//! To be read, a socket must be changed, and it stays changed if this process is killed before it has changed it back. The
//! executor of the will was forked before anybody knew of that socket. So, before the change, a descriptor of it is sent
//! to the executor over a pair of unix sockets (`SCM_RIGHTS`, unix(7)), with the settings that it had. Nobody wakes up for
//! that: the message waits in its queue until the socket is as it was, and this process itself takes it out again. What
//! the executor finds there when this process has died is what has not been undone.
//!
//! So a codicil needs no revoking: who changes a socket for good, as the source does with its connections after the
//! handoff, says nothing here, and no socket outlives its owner in the queue. It costs two calls, about 3 µs.

use crate::sockopt::set_int;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recv, sendmsg, socketpair,
};
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Most settings of one socket.
pub const MOST_SETTINGS: usize = 4;
/// Bytes of a setting in a message: three `int`s.
const SETTING_SIZE: usize = 12;
/// A control message with one descriptor is 24 bytes long: a header of 16, and an `int`, padded.
const CONTROL_SIZE: usize = 24;
const _: () = assert!(size_of::<libc::cmsghdr>() + 8 == CONTROL_SIZE);

/// A socket option and the value that it is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// `SOL_SOCKET`, `IPPROTO_TCP` …
    pub level: i32,
    /// Number of the option, whose value is an `int`.
    pub name: i32,
    /// Its value.
    pub value: i32,
}

impl Setting {
    /// Sets it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn apply(self, socket: BorrowedFd<'_>) -> nix::Result<()> {
        set_int(socket, self.level, self.name, self.value)
    }

    fn encode(self) -> [u8; SETTING_SIZE] {
        let mut raw = [0; SETTING_SIZE];
        let words = [self.level, self.name, self.value];
        raw.chunks_exact_mut(4).zip(words).for_each(|(four, word)| four.copy_from_slice(&word.to_ne_bytes()));
        raw
    }

    fn decode(raw: &[u8; SETTING_SIZE]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = *raw;
        let [level, name, value] = [[a, b, c, d], [e, f, g, h], [i, j, k, l]].map(i32::from_ne_bytes);
        Self { level, name, value }
    }
}

/// What an executor undoes, besides what the will says.
#[derive(Debug)]
pub struct Codicil {
    sending: OwnedFd,
    /// The executor has it, too.
    queue: OwnedFd,
}

impl Codicil {
    /// One that nobody reads yet: [`crate::will::LastWill::open`] does.
    pub(crate) fn new() -> nix::Result<Self> {
        let kind = SockType::SeqPacket;
        let (sending, queue) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)?;
        Ok(Self { sending, queue })
    }

    /// Another handle to the same.
    pub(crate) fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self { sending: self.sending.try_clone()?, queue: self.queue.try_clone()? })
    }

    pub(crate) fn queue(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }

    /// Makes a `change` to `socket` which that closure itself undoes; if this process dies meanwhile, the executor makes
    /// the `settings` instead. One change at a time.
    ///
    /// # Errors
    /// The kernel's, from sending (then the change was not made) or from taking back.
    pub fn during<T>(
        &mut self,
        socket: BorrowedFd<'_>,
        settings: &[Setting],
        change: impl FnOnce() -> T,
    ) -> nix::Result<T> {
        assert!(settings.len() <= MOST_SETTINGS, "{} settings of one socket", settings.len());
        let bytes: Vec<u8> = settings.iter().copied().flat_map(Setting::encode).collect();
        let passed = [socket.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&passed)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(self.sending.as_raw_fd(), &[IoSlice::new(&bytes)], &rights, flags, None)?;
        let made = change();
        // Without room for control data the kernel closes the descriptor that came with it.
        recv(self.queue.as_raw_fd(), &mut [0; MOST_SETTINGS * SETTING_SIZE], MsgFlags::MSG_DONTWAIT)?;
        Ok(made)
    }
}

/// Undoes everything that is in the queue. What fails does not prevent the rest.
///
/// Makes nothing but system calls: the executor, forked from a process with several threads, may not allocate.
pub(crate) fn undo_all(queue: RawFd) {
    loop {
        let mut bytes = [0u8; MOST_SETTINGS * SETTING_SIZE];
        let Ok((length, socket)) = receive(queue, &mut bytes) else { return };
        let Some(socket) = socket else { continue };
        let (settings, _) = bytes[..length].as_chunks::<SETTING_SIZE>();
        for setting in settings {
            let _ = Setting::decode(setting).apply(socket.as_fd());
        }
    }
}

/// The next message that waits, and the descriptor that came with it. At the end of the queue that is an error.
fn receive(queue: RawFd, bytes: &mut [u8]) -> nix::Result<(usize, Option<OwnedFd>)> {
    #[repr(C, align(8))]
    struct Control([u8; CONTROL_SIZE]);
    let mut control = Control([0; CONTROL_SIZE]);
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: all-zero is a valid value of this plain C structure: no name, no parts, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
    (message.msg_control, message.msg_controllen) = ((&raw mut control).cast(), CONTROL_SIZE);
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the message points to buffers that live on, with their true sizes.
    let received = Errno::result(unsafe { libc::recvmsg(queue, &raw mut message, flags) })? as usize;
    // A peer that has been closed leaves an end of file behind what waits.
    if received == 0 {
        return Err(Errno::EPIPE);
    }
    // SAFETY: the control data has been filled in by the kernel; its first header, if there is one, lies within it and is
    // aligned, and so does the one descriptor for which there is room. Nobody else owns that descriptor.
    let socket = unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message).as_ref();
        let header = header.filter(|h| (h.cmsg_level, h.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS));
        header.map(|header| OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<RawFd>().read_unaligned()))
    };
    Ok((received, socket))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sockopt::get_int;
    use std::os::unix::net::UnixDatagram;

    fn setting(value: i32) -> [Setting; 1] {
        [Setting { level: libc::SOL_SOCKET, name: libc::SO_PRIORITY, value }]
    }

    fn priority(socket: &UnixDatagram) -> i32 {
        get_int(socket.as_fd(), libc::SOL_SOCKET, libc::SO_PRIORITY).unwrap()
    }

    #[test]
    fn what_was_undone_is_not_undone_again() {
        let mut codicil = Codicil::new().unwrap();
        let (socket, peer) = UnixDatagram::pair().unwrap();
        let made = codicil.during(socket.as_fd(), &setting(3), || setting(5)[0].apply(socket.as_fd()));
        made.unwrap().unwrap();
        undo_all(codicil.queue.as_raw_fd());
        assert_eq!(priority(&socket), 5);
        // Nor is it kept open.
        drop(socket);
        assert_eq!(peer.send(b"?").unwrap_err().raw_os_error(), Some(libc::ECONNREFUSED));
    }

    #[test]
    fn what_was_not_undone_is() {
        let mut codicil = Codicil::new().unwrap();
        let (socket, _peer) = UnixDatagram::pair().unwrap();
        let queue = codicil.queue.try_clone().unwrap();
        let midway = || {
            setting(5)[0].apply(socket.as_fd()).unwrap();
            undo_all(queue.as_raw_fd());
            priority(&socket)
        };
        // The executor has taken the message: there is none to take back, but then this process is dead.
        let mut seen = 0;
        let taken_back = codicil.during(socket.as_fd(), &setting(3), || seen = midway());
        assert_eq!((seen, taken_back), (3, Err(Errno::EAGAIN)));
    }
}
