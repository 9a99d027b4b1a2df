//! The socket options that travel: one table for capture and restore.
//!
//! Capture reads every option of the table that applies to the socket. Restore sets those whose value differs from a
//! new socket's, and nothing that the table does not have: values come from a peer, and some options take pointers.

use nix::errno::Errno;
use pclive_sys::sockopt;
use pclive_wire::manifest::{OptionValue, SocketOption};
use std::os::fd::BorrowedFd;

/// When restore sets an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// Before the socket is bound or connected.
    Birth,
    /// When it is bound and connected, and before it listens.
    Connected,
    /// After it has left repair mode and sent what waits: the option would delay or change that.
    Live,
    /// By code of its own: buffer sizes, which a full queue may not fit into.
    Apart,
}

/// The sockets that have an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Family {
    /// A unix-domain socket.
    Unix,
    /// A TCP socket for IPv4.
    Tcp4,
    /// A TCP socket for IPv6, which has the IPv4 options too.
    Tcp6,
}

impl Family {
    /// That of a TCP socket.
    pub(super) fn tcp(ipv6: bool) -> Self {
        if ipv6 { Self::Tcp6 } else { Self::Tcp4 }
    }
}

/// An option that travels.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) level: i32,
    pub(crate) name: i32,
    /// Its name, for messages.
    pub(crate) label: &'static str,
    /// Lengths that its value may have.
    length: std::ops::RangeInclusive<usize>,
    pub(crate) when: When,
}

const INT: std::ops::RangeInclusive<usize> = 4..=4;
/// Longest value in the table.
const LONGEST: usize = OptionValue::LONGEST;

macro_rules! table {
    ($($when:ident $level:ident $label:ident = $name:expr, $length:expr;)*) => {
        &[$(Known {
            level: libc::$level,
            name: $name,
            label: stringify!($label),
            length: $length,
            when: When::$when,
        }),*]
    };
}

/// Numbers that the libc crate lacks, from `asm-generic/socket.h`, `linux/in.h`, `linux/in6.h` and `linux/tcp.h`.
mod number {
    pub(super) const IP_LOCAL_PORT_RANGE: i32 = 51;
    pub(super) const IPV6_AUTOFLOWLABEL: i32 = 70;
    pub(super) const TCP_TX_DELAY: i32 = 37;
    pub(super) const TCP_RTO_MAX_MS: i32 = 44;
    pub(super) const TCP_RTO_MIN_US: i32 = 45;
    pub(super) const TCP_DELACK_MAX_US: i32 = 46;
}

pub(crate) const SO_BUF_LOCK: i32 = 72;

/// In the order in which they are set: `IP_TOS` changes the priority, limits of keep-alive come before it starts.
const SOCKET: &[Known] = table! {
    Apart     SOL_SOCKET SO_SNDBUF      = libc::SO_SNDBUF, INT;
    Apart     SOL_SOCKET SO_RCVBUF      = libc::SO_RCVBUF, INT;
    Apart     SOL_SOCKET SO_BUF_LOCK    = SO_BUF_LOCK, INT;
    Connected SOL_SOCKET SO_LINGER      = libc::SO_LINGER, 8..=8;
    Connected SOL_SOCKET SO_RCVTIMEO    = libc::SO_RCVTIMEO, 16..=16;
    Connected SOL_SOCKET SO_SNDTIMEO    = libc::SO_SNDTIMEO, 16..=16;
    Connected SOL_SOCKET SO_RCVLOWAT    = libc::SO_RCVLOWAT, INT;
    Connected SOL_SOCKET SO_BROADCAST   = libc::SO_BROADCAST, INT;
    Connected SOL_SOCKET SO_OOBINLINE   = libc::SO_OOBINLINE, INT;
    Connected SOL_SOCKET SO_TIMESTAMP   = libc::SO_TIMESTAMP, INT;
    Connected SOL_SOCKET SO_TIMESTAMPNS = libc::SO_TIMESTAMPNS, INT;
    Connected SOL_SOCKET SO_MARK        = libc::SO_MARK, INT;
    Live      SOL_SOCKET SO_REUSEADDR   = libc::SO_REUSEADDR, INT;
    Live      SOL_SOCKET SO_PEEK_OFF    = libc::SO_PEEK_OFF, INT;
};

const UNIX: &[Known] = table! {
    Connected SOL_SOCKET SO_PASSCRED = libc::SO_PASSCRED, INT;
    Connected SOL_SOCKET SO_PASSSEC  = libc::SO_PASSSEC, INT;
};

const TCP: &[Known] = table! {
    Birth     SOL_SOCKET  SO_REUSEPORT             = libc::SO_REUSEPORT, INT;
    Birth     IPPROTO_IP  IP_TRANSPARENT           = libc::IP_TRANSPARENT, INT;
    Live      IPPROTO_IP  IP_FREEBIND              = libc::IP_FREEBIND, INT;
    Live      IPPROTO_IP  IP_BIND_ADDRESS_NO_PORT  = libc::IP_BIND_ADDRESS_NO_PORT, INT;
    Connected IPPROTO_IP  IP_LOCAL_PORT_RANGE      = number::IP_LOCAL_PORT_RANGE, INT;
    Connected IPPROTO_IP  IP_TTL                   = libc::IP_TTL, INT;
    Connected IPPROTO_IP  IP_MINTTL                = libc::IP_MINTTL, INT;
    Connected IPPROTO_IP  IP_MTU_DISCOVER          = libc::IP_MTU_DISCOVER, INT;
    Connected IPPROTO_IP  IP_RECVERR               = libc::IP_RECVERR, INT;
    Connected IPPROTO_IP  IP_TOS                   = libc::IP_TOS, INT;
    Connected SOL_SOCKET  SO_PRIORITY              = libc::SO_PRIORITY, INT;
    Connected SOL_SOCKET  SO_DONTROUTE             = libc::SO_DONTROUTE, INT;
    Connected SOL_SOCKET  SO_BINDTODEVICE          = libc::SO_BINDTODEVICE, 0..=LONGEST;
    Connected SOL_SOCKET  SO_MAX_PACING_RATE       = libc::SO_MAX_PACING_RATE, 8..=8;
    Connected SOL_SOCKET  SO_BUSY_POLL             = libc::SO_BUSY_POLL, INT;
    Connected SOL_SOCKET  SO_ZEROCOPY              = libc::SO_ZEROCOPY, INT;
    Connected IPPROTO_TCP TCP_KEEPIDLE             = libc::TCP_KEEPIDLE, INT;
    Connected IPPROTO_TCP TCP_KEEPINTVL            = libc::TCP_KEEPINTVL, INT;
    Connected IPPROTO_TCP TCP_KEEPCNT              = libc::TCP_KEEPCNT, INT;
    Connected SOL_SOCKET  SO_KEEPALIVE             = libc::SO_KEEPALIVE, INT;
    Connected IPPROTO_TCP TCP_SYNCNT               = libc::TCP_SYNCNT, INT;
    Connected IPPROTO_TCP TCP_LINGER2              = libc::TCP_LINGER2, INT;
    Connected IPPROTO_TCP TCP_DEFER_ACCEPT         = libc::TCP_DEFER_ACCEPT, INT;
    Connected IPPROTO_TCP TCP_USER_TIMEOUT         = libc::TCP_USER_TIMEOUT, INT;
    Connected IPPROTO_TCP TCP_NOTSENT_LOWAT        = libc::TCP_NOTSENT_LOWAT, INT;
    Connected IPPROTO_TCP TCP_THIN_LINEAR_TIMEOUTS = libc::TCP_THIN_LINEAR_TIMEOUTS, INT;
    Connected IPPROTO_TCP TCP_THIN_DUPACK          = libc::TCP_THIN_DUPACK, INT;
    Connected IPPROTO_TCP TCP_SAVE_SYN             = libc::TCP_SAVE_SYN, INT;
    Connected IPPROTO_TCP TCP_INQ                  = libc::TCP_INQ, INT;
    Connected IPPROTO_TCP TCP_TX_DELAY             = number::TCP_TX_DELAY, INT;
    Connected IPPROTO_TCP TCP_RTO_MAX_MS           = number::TCP_RTO_MAX_MS, INT;
    Connected IPPROTO_TCP TCP_RTO_MIN_US           = number::TCP_RTO_MIN_US, INT;
    Connected IPPROTO_TCP TCP_DELACK_MAX_US        = number::TCP_DELACK_MAX_US, INT;
    Connected IPPROTO_TCP TCP_NODELAY              = libc::TCP_NODELAY, INT;
    Birth     IPPROTO_TCP TCP_CONGESTION           = libc::TCP_CONGESTION, 1..=LONGEST;
    Live      IPPROTO_TCP TCP_WINDOW_CLAMP         = libc::TCP_WINDOW_CLAMP, INT;
    Live      IPPROTO_TCP TCP_CORK                 = libc::TCP_CORK, INT;
};

/// On a connection `TCP_MAXSEG` and `TCP_FASTOPEN` show something else.
const UNCONNECTED: &[Known] = table! {
    Birth     IPPROTO_TCP TCP_MAXSEG             = libc::TCP_MAXSEG, INT;
    Connected IPPROTO_TCP TCP_FASTOPEN           = libc::TCP_FASTOPEN, INT;
    Connected IPPROTO_TCP TCP_FASTOPEN_CONNECT   = libc::TCP_FASTOPEN_CONNECT, INT;
    Connected IPPROTO_TCP TCP_FASTOPEN_NO_COOKIE = libc::TCP_FASTOPEN_NO_COOKIE, INT;
};

const IPV6: &[Known] = table! {
    Birth     IPPROTO_IPV6 IPV6_V6ONLY         = libc::IPV6_V6ONLY, INT;
    Connected IPPROTO_IPV6 IPV6_UNICAST_HOPS   = libc::IPV6_UNICAST_HOPS, INT;
    Connected IPPROTO_IPV6 IPV6_MTU_DISCOVER   = libc::IPV6_MTU_DISCOVER, INT;
    Connected IPPROTO_IPV6 IPV6_RECVERR        = libc::IPV6_RECVERR, INT;
    Connected IPPROTO_IPV6 IPV6_TCLASS         = libc::IPV6_TCLASS, INT;
    Connected IPPROTO_IPV6 IPV6_AUTOFLOWLABEL  = number::IPV6_AUTOFLOWLABEL, INT;
};

/// The options of a kind of socket. Those of a connection come first among those of a socket that is not connected.
pub(crate) fn table(family: Family, connected: bool) -> impl Iterator<Item = &'static Known> {
    let unconnected = if connected { &[] } else { UNCONNECTED };
    let lists: [&[Known]; 4] = match family {
        Family::Unix => [SOCKET, UNIX, &[], &[]],
        Family::Tcp4 => [SOCKET, TCP, unconnected, &[]],
        Family::Tcp6 => [SOCKET, TCP, IPV6, unconnected],
    };
    lists.into_iter().flatten()
}

impl Known {
    /// The option's value, or `None` where the kernel or the protocol does not have the option.
    pub(crate) fn get(&self, socket: BorrowedFd<'_>) -> nix::Result<Option<OptionValue>> {
        let mut buffer = [0; LONGEST];
        match sockopt::get(socket, self.level, self.name, &mut buffer) {
            Ok(len) => Ok(OptionValue::new(&buffer[..len])),
            Err(Errno::ENOPROTOOPT | Errno::EOPNOTSUPP | Errno::EINVAL) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// Whether the kernel itself changes the option of a TCP socket: buffers and windows grow with the traffic, a read moves the
    /// place to peek at, the type of service shows whether ECN is in use.
    pub(super) fn changes_by_itself(&self) -> bool {
        const CHANGING: [(i32, i32); 6] = [
            (libc::SOL_SOCKET, libc::SO_SNDBUF),
            (libc::SOL_SOCKET, libc::SO_RCVBUF),
            (libc::SOL_SOCKET, libc::SO_PEEK_OFF),
            (libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP),
            (libc::IPPROTO_IP, libc::IP_TOS),
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
        ];
        CHANGING.contains(&(self.level, self.name))
    }

    /// Whether a peer's value has a length that the option can have.
    pub(crate) fn takes(&self, value: &[u8]) -> bool {
        self.length.contains(&value.len())
    }
}

/// Reads the options of a socket that are `wanted`.
pub(super) fn read(
    socket: BorrowedFd<'_>,
    family: Family,
    connected: bool,
    wanted: impl Fn(&Known) -> bool,
) -> Result<Vec<SocketOption>, (&'static str, Errno)> {
    let mut options = Vec::with_capacity(64);
    for known in table(family, connected).filter(|known| wanted(known)) {
        if let Some(value) = known.get(socket).map_err(|errno| (known.label, errno))? {
            options.push(SocketOption { level: known.level, name: known.name, value });
        }
    }
    Ok(options)
}

/// The value of an option that is a C `int`, if the list has it.
pub(crate) fn find_int(options: &[SocketOption], level: i32, name: i32) -> Option<i32> {
    let option = options.iter().find(|option| (option.level, option.name) == (level, name))?;
    (*option.value).try_into().ok().map(i32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn every_value_read_is_one_that_restore_takes() {
        let tcp4 = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp6 = std::net::TcpListener::bind("[::1]:0").unwrap();
        let unix = std::os::unix::net::UnixDatagram::unbound().unwrap();
        let sockets =
            [(Family::Tcp4, tcp4.as_fd()), (Family::Tcp6, tcp6.as_fd()), (Family::Unix, unix.as_fd())];
        for (family, socket) in sockets {
            let mut read = 0;
            for known in table(family, false) {
                let Some(value) = known.get(socket).unwrap() else { continue };
                assert!(known.takes(&value), "{} has {} bytes", known.label, value.len());
                read += 1;
            }
            assert!(read > 10);
        }
    }

    #[test]
    fn no_option_is_listed_twice() {
        for family in [Family::Unix, Family::Tcp4, Family::Tcp6] {
            let mut seen = std::collections::HashSet::new();
            assert!(table(family, false).all(|known| seen.insert((known.level, known.name))));
            // Restore learns of all what a new socket has, and compares by the place in the table.
            let both = table(family, true).zip(table(family, false));
            assert!(both.into_iter().all(|(connected, any)| std::ptr::eq(connected, any)));
        }
    }
}
