//! Sending without copying: `MSG_ZEROCOPY` (Linux 4.14) and the completions that the error queue brings.
//!
//! See `Documentation/networking/msg_zerocopy.rst`. Every successful zero-copy send on a socket has a number, counted
//! from 0 and wrapping at 2³². The kernel reads the buffers until it reports the number as complete, which for TCP means
//! acknowledged; a buffer written before that sends the new bytes (nothing worse: the kernel keeps the pages alive).

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd};

/// Zero-copy sends that the kernel is done with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Number of the first send.
    pub first: u32,
    /// Number of the last one, this included; smaller than `first` where the count wrapped.
    pub last: u32,
    /// The kernel copied after all, as it does on loopback and between network namespaces.
    pub copied: bool,
}

/// Allows zero-copy sends on `socket` (`SO_ZEROCOPY`).
pub fn enable(socket: &impl AsFd) -> nix::Result<()> {
    let on: libc::c_int = 1;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the option's value is `on`, which is alive and as long as the length says; the kernel only reads it.
    let result = unsafe {
        libc::setsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_ZEROCOPY,
            std::ptr::from_ref(&on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    Errno::result(result).map(drop)
}

/// Sends some of `parts`, without copying if `zerocopy`; returns the number of bytes taken.
pub fn send(socket: &impl AsFd, parts: &[IoSlice<'_>], zerocopy: bool) -> nix::Result<usize> {
    let zerocopy = if zerocopy { MsgFlags::from_bits_retain(libc::MSG_ZEROCOPY) } else { MsgFlags::empty() };
    let fd = socket.as_fd().as_raw_fd();
    sendmsg::<()>(fd, parts, &[], MsgFlags::MSG_NOSIGNAL | zerocopy, None)
}

/// The next completion that is waiting, if one is. `poll(2)` says `POLLERR` while there is one.
pub fn next_completion(socket: &impl AsFd) -> nix::Result<Option<Completion>> {
    loop {
        let mut buffer = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
        let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
        let fd = socket.as_fd().as_raw_fd();
        let message = match recvmsg::<()>(fd, &mut [], Some(&mut buffer), flags) {
            Ok(message) => message,
            Err(Errno::EAGAIN) => return Ok(None),
            Err(errno) => return Err(errno),
        };
        // Anything else in the error queue (an ICMP message) is not about zero copy.
        if let Some(completion) = message.cmsgs()?.find_map(completion_of) {
            return Ok(Some(completion));
        }
    }
}

fn completion_of(message: ControlMessageOwned) -> Option<Completion> {
    let (ControlMessageOwned::Ipv4RecvErr(error, _) | ControlMessageOwned::Ipv6RecvErr(error, _)) = message
    else {
        return None;
    };
    (error.ee_origin == SO_EE_ORIGIN_ZEROCOPY).then_some(Completion {
        first: error.ee_info,
        last: error.ee_data,
        copied: error.ee_code & SO_EE_CODE_ZEROCOPY_COPIED != 0,
    })
}

// `linux/errqueue.h`; libc does not have them.
const SO_EE_ORIGIN_ZEROCOPY: u8 = 5;
const SO_EE_CODE_ZEROCOPY_COPIED: u8 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    #[test]
    fn loopback_sends_complete_and_say_that_they_were_copied() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let mut receiver = listener.accept().unwrap().0;
            enable(&sender).unwrap();
            assert_eq!(next_completion(&sender), Ok(None));

            let page = vec![7u8; 4096];
            let parts = [IoSlice::new(b"head"), IoSlice::new(&page)];
            assert_eq!(send(&sender, &parts, true), Ok(4100));
            let mut received = vec![0; 4100];
            receiver.read_exact(&mut received).unwrap();
            assert_eq!(&received[4..], page);

            let completion = (0..1000).find_map(|_| {
                std::thread::sleep(Duration::from_millis(1));
                next_completion(&sender).unwrap()
            });
            assert_eq!(completion, Some(Completion { first: 0, last: 0, copied: true }));
        }
    }
}
