//! The network links of a container: down while nobody may answer for it, and back as they were.
//!
//! The container's address is on two hosts during a migration. At the source the links go down at the freeze, so that
//! no packet is answered by a host that will not run the container; at the destination they stay down until it runs.
//! A link that goes down loses its routes and IPv6 addresses in the kernel (`fib_disable_ip`, `addrconf_ifdown`), so
//! they are read before, and added again when it comes up. `lo` is left alone: its connections move as they are.
//!
//! Everything here is synchronous and on sockets that were opened in the namespace beforehand: it is called inside the
//! blackout, from any thread.
//!
//! A pclive that is killed while the links are down cannot bring them up again. So before they go down, what brings them
//! back is put into a [`LastWill`], which a process of its own carries out if pclive ends, however it ends. The container
//! must not meet them down: the kernel lets traced threads go on as soon as their tracer is dead, before anybody else has
//! heard of it. So the container is frozen by its cgroup, too, and thawed by the will when all else is done. From
//! [`Links::keep_down`] on, which the source calls just before it commits, they stay down instead: the container may then
//! run at the destination, and a second host must not answer for it. For the same reason the links of the destination go down
//! again if pclive is killed before [`Links::keep_up`], which it calls just before it lets the container go: the container
//! dies with it until then, and goes on at the source.

mod announce;
mod netlink;
mod snapshot;

use netlink::{Monitor, Netlink, Request};
use netlink_packet_core::DecodeError;
use pclive_sys::codicil::Codicil;
use pclive_sys::namespace::{NamespaceError, run_in_netns};
use pclive_sys::packet::PacketSocket;
use pclive_sys::will::{Instruction, LastWill};
use snapshot::{Address, Link, Snapshot, is_settled};
use std::fmt;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long a link that has come up may take to become usable. The kernel notices a changed carrier at most once a
/// second, unless the link's peer has another index than the link, as it nearly always has.
const SETTLE_TIME_LIMIT: Duration = Duration::from_millis(20);

/// How often the kernel is asked, where asking does not bring it about.
const SETTLE_INTERVAL: Duration = Duration::from_micros(100);

/// What went wrong with a container's links.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The container's network is the host's.
    #[error(
        "the container is in pclive's own network namespace: its links are the host's and cannot go down"
    )]
    OwnNamespace,
    /// The network namespace cannot be entered.
    #[error("cannot enter the container's network namespace")]
    Namespace(#[from] NamespaceError),
    /// A file that is needed cannot be used.
    #[error("{call} {}", path.display())]
    File {
        /// What was being done.
        call: &'static str,
        /// The file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// A socket cannot be made in the namespace.
    #[error("make a {kind} socket in the container's network namespace")]
    Socket {
        /// Which.
        kind: &'static str,
        /// Cause.
        source: io::Error,
    },
    /// Talking to the kernel fails.
    #[error("cannot {what} (netlink)")]
    Netlink {
        /// What was being done.
        what: &'static str,
        /// Cause.
        source: io::Error,
    },
    /// The kernel's answer cannot be understood.
    #[error("cannot {what}: unknown answer (netlink)")]
    Decode {
        /// What was being done.
        what: &'static str,
        /// Cause.
        source: DecodeError,
    },
    /// Nobody could bring the links back if pclive were killed.
    #[error("cannot provide for the links' return should pclive be killed")]
    Will(#[source] io::Error),
    /// The container cannot be kept from running while they are down.
    #[error("cannot write 1 to the container's cgroup.freeze")]
    Freeze(#[source] io::Error),
    /// A list changes all the time.
    #[error("cannot {what}: it changes faster than it can be read")]
    Unsettled {
        /// What was being done.
        what: &'static str,
    },
    /// The kernel refuses a change.
    #[error("cannot {what}")]
    Change {
        /// What was being done, to which link, address or route.
        what: String,
        /// Cause.
        source: nix::Error,
    },
    /// A route that cannot be added again by itself.
    #[error(
        "{route} uses a nexthop object, which pclive cannot restore: replace it by a route with a gateway"
    )]
    NexthopObject {
        /// The route.
        route: String,
    },
    /// A frame cannot be sent.
    #[error("cannot announce {address} on link {link}")]
    Announce {
        /// The address.
        address: std::net::IpAddr,
        /// The link.
        link: String,
        /// Cause.
        source: nix::Error,
    },
}

/// The links of one network namespace.
pub struct Links {
    netlink: Netlink,
    monitor: Monitor,
    /// In pclive's own namespace, where the links' peers are.
    host: Netlink,
    packets: PacketSocket,
    /// What there was when it was looked at last: while the links are down, just before they went down.
    snapshot: Snapshot,
    down: bool,
    detection: Vec<DuplicateDetection>,
    /// `cgroup.freeze` of the container: frozen before the links go down, thawed by the will.
    freezer: Option<File>,
    /// Brings the links back if this process cannot.
    will: LastWill,
}

impl fmt::Debug for Links {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Links")
            .field("snapshot", &self.snapshot)
            .field("down", &self.down)
            .finish_non_exhaustive()
    }
}

impl Links {
    /// Opens what is needed in the network namespace `netns`; changes nothing.
    ///
    /// `freezer` is the container's `cgroup.freeze`, if there is a container that may go on here: it is frozen when the links
    /// go down, and thawed after their return if pclive is killed. Otherwise thawing it is the caller's business.
    ///
    /// # Errors
    /// [`LinkError::OwnNamespace`] if `netns` is the one that pclive itself is in.
    pub fn open(netns: BorrowedFd<'_>, freezer: Option<File>) -> Result<Self, LinkError> {
        if is_own(netns)? {
            return Err(LinkError::OwnNamespace);
        }
        let host = Netlink::open().map_err(socket_error("netlink"))?;
        let (netlink, monitor, packets, snapshot, detection) = run_in_netns(netns, || {
            let mut netlink = Netlink::open().map_err(socket_error("netlink"))?;
            let monitor = Monitor::open().map_err(socket_error("netlink"))?;
            let packets =
                PacketSocket::for_sending().map_err(|errno| socket_error("packet")(errno.into()))?;
            let snapshot = Snapshot::take(&mut netlink)?;
            let names = snapshot.links.iter().map(|link| link.name.as_str());
            let settings = ["all"].into_iter().chain(names).filter_map(DuplicateDetection::open);
            let detection: Vec<_> = settings.collect::<Result<_, _>>()?;
            Ok::<_, LinkError>((netlink, monitor, packets, snapshot, detection))
        })??;
        let mut touched = vec![netlink.as_fd()];
        touched.extend(detection.iter().map(|setting| setting.file.as_fd()));
        touched.extend(freezer.as_ref().map(File::as_fd));
        let will = LastWill::open(&touched).map_err(LinkError::Will)?;
        Ok(Self { netlink, monitor, host, packets, snapshot, down: false, detection, freezer, will })
    }

    /// Takes every link except `lo` down and remembers what that destroys. Idempotent.
    pub fn take_down(&mut self) -> Result<(), LinkError> {
        if self.down {
            return Ok(());
        }
        if self.monitor.has_changed() {
            self.snapshot = Snapshot::take(&mut self.netlink)?;
        }
        self.write_will()?;
        if let Some(freezer) = &self.freezer {
            freezer.write_all_at(b"1", 0).map_err(LinkError::Freeze)?;
        }
        let up = self.snapshot.links.iter().filter(|link| link.up);
        let requests: Vec<Request> = up.map(|link| link.set(false)).collect();
        // Also after an error: some links may be down.
        self.down = true;
        self.netlink.apply(&requests)?;
        // Detection is decided on when a link comes up; it must be off by then.
        self.detection.iter_mut().try_for_each(DuplicateDetection::suspend)
    }

    /// For what is changed in the container's sockets while the links are down.
    pub fn codicil(&self) -> Result<Codicil, LinkError> {
        self.will.codicil().map_err(LinkError::Will)
    }

    /// From here on the links stay down, also if pclive is killed: until [`Links::restore`] or [`Links::bring_up`].
    pub fn keep_down(&mut self) -> Result<(), LinkError> {
        self.will.revoke().map_err(LinkError::Will)
    }

    /// Says in the will how [`Links::restore`] is done, and what becomes of the rest that is changed while links are down.
    fn write_will(&mut self) -> Result<(), LinkError> {
        let requests = self.raising(&self.snapshot.links.iter().filter(|link| link.up).collect::<Vec<_>>());
        let datagrams = self.netlink.datagrams(&requests);
        let links = datagrams.into_iter().map(|bytes| Instruction { fd: self.netlink.as_fd(), bytes });
        let settings = self.detection.iter().map(DuplicateDetection::resumption);
        let thaw = self.freezer.iter().map(|file| Instruction { fd: file.as_fd(), bytes: b"0".to_vec() });
        let instructions: Vec<_> = links.chain(settings).chain(thaw).collect();
        self.will.write(&instructions).map_err(LinkError::Will)
    }

    /// Sets every link up, also those that were found down, with every address and route that was there, and returns
    /// when they can be used: what the destination does when the container runs. Announce the addresses next. They go down
    /// again if this is dropped, or pclive killed, before [`Links::keep_up`].
    pub fn bring_up(&mut self) -> Result<(), LinkError> {
        if !self.down {
            return Ok(());
        }
        let lowering: Vec<Request> = self.snapshot.links.iter().map(|link| link.set(false)).collect();
        let datagrams = self.netlink.datagrams(&lowering);
        let down = datagrams.into_iter().map(|bytes| Instruction { fd: self.netlink.as_fd(), bytes });
        self.will.write(&down.collect::<Vec<_>>()).map_err(LinkError::Will)?;
        self.raise(|_| true)
    }

    /// From here on the links stay up, also if pclive is killed.
    pub fn keep_up(&mut self) -> Result<(), LinkError> {
        self.will.revoke().map_err(LinkError::Will)
    }

    /// Brings back what was found: what the source does when the container stays, and the destination when it does not
    /// come.
    pub fn restore(&mut self) -> Result<(), LinkError> {
        if !self.down {
            return Ok(());
        }
        self.raise(|was_up| was_up)?;
        self.will.revoke().map_err(LinkError::Will)
    }

    fn raise(&mut self, is_raised: impl Fn(bool) -> bool) -> Result<(), LinkError> {
        let raised: Vec<_> = self.snapshot.links.iter().filter(|link| is_raised(link.up)).collect();
        let requests = self.raising(&raised);
        let indices: Vec<_> = raised.iter().map(|link| (link.index, link.peer)).collect();
        self.netlink.apply(&requests)?;
        self.down = false;
        self.settle(&indices)
    }

    /// What sets these links up, with all that they had.
    fn raising(&self, raised: &[&Link]) -> Vec<Request> {
        let is_raised = |index| raised.iter().any(|link| link.index == index);
        let renewals = || {
            let addresses = self.snapshot.addresses.iter().filter(|address| is_raised(address.link));
            addresses.filter_map(|address| address.renew.as_ref())
        };
        // An address that is still there when its link comes up would be checked for duplicates.
        let removed = renewals().map(|renewal| renewal.remove.clone());
        let up = raised.iter().map(|link| link.set(true));
        let added = renewals().map(|renewal| renewal.add.clone());
        let routes = self.snapshot.routes.iter().cloned();
        removed.chain(up).chain(added).chain(routes).collect()
    }

    /// Waits until what is sent through the given links, and their peers on the host, gets through.
    ///
    /// When a veth comes up, both ends get their carrier at once, but a work queue (net/core/link_watch.c) makes their
    /// queues and the port of the host's bridge usable. What is sent before is lost, and TCP repeats it 200 ms or, for
    /// a new connection, a second later.
    fn settle(&mut self, links: &[(u32, Option<u32>)]) -> Result<(), LinkError> {
        let deadline = Instant::now() + SETTLE_TIME_LIMIT;
        loop {
            let mut settled = true;
            for &(index, peer) in links {
                settled &= is_settled(&mut self.netlink, index)?;
                // If the peer is in a third namespace, this looks at some other link or none: no harm.
                settled &= peer.map_or(Ok(true), |peer| is_settled(&mut self.host, peer))?;
            }
            if settled || Instant::now() > deadline {
                return Ok(());
            }
            std::thread::sleep(SETTLE_INTERVAL);
        }
    }

    /// Tells the neighbours on every Ethernet link that the addresses are here, by gratuitous ARP and unsolicited
    /// neighbour advertisements.
    pub fn announce(&self) -> Result<(), LinkError> {
        let mut result = Ok(());
        for Address { link: index, address, .. } in &self.snapshot.addresses {
            let Some(link) = self.snapshot.links.iter().find(|link| link.index == *index) else { continue };
            let Some(mac) = link.mac else { continue };
            for frame in announce::frames(*address, mac) {
                if let Err(source) = self.packets.send(link.index, &frame) {
                    let error = LinkError::Announce { address: *address, link: link.name.clone(), source };
                    result = result.and(Err(error));
                }
            }
        }
        result
    }
}

/// IPv6 duplicate address detection of one link, or of all: `net.ipv6.conf.LINK.accept_dad`
/// (Documentation/networking/ip-sysctl.rst).
///
/// The addresses that pclive adds are exempt each by itself. A link's link-local address is made by the kernel as soon
/// as it comes up, and would be tentative for a second: off for the links of this namespace as long as this lives.
struct DuplicateDetection {
    /// Stays bound to the namespace in which it was opened.
    file: File,
    path: PathBuf,
    found: Vec<u8>,
    suspended: bool,
}

impl DuplicateDetection {
    /// `None` where there is no IPv6.
    fn open(link: &str) -> Option<Result<Self, LinkError>> {
        let path = PathBuf::from(format!("/proc/sys/net/ipv6/conf/{link}/accept_dad"));
        let file = File::options().read(true).write(true).open(&path).ok()?;
        let mut found = [0; 16];
        Some(match file.read_at(&mut found, 0) {
            Ok(length) => Ok(Self { file, path, found: found[..length].to_vec(), suspended: false }),
            Err(source) => Err(LinkError::File { call: "read", path, source }),
        })
    }

    fn suspend(&mut self) -> Result<(), LinkError> {
        let failed = |source| LinkError::File { call: "write", path: self.path.clone(), source };
        self.file.write_all_at(b"0", 0).map_err(failed)?;
        self.suspended = true;
        Ok(())
    }

    /// What somebody else would have to do in place of dropping this.
    fn resumption(&self) -> Instruction<'_> {
        // Nothing has moved the file's position, which is where this will be written, from its start.
        Instruction { fd: self.file.as_fd(), bytes: self.found.clone() }
    }
}

impl Drop for DuplicateDetection {
    fn drop(&mut self) {
        if self.suspended {
            // Gone if the link or its namespace is.
            let _ = self.file.write_all_at(&self.found, 0);
        }
    }
}

/// Whether `netns` is the namespace that this process is in.
fn is_own(netns: BorrowedFd<'_>) -> Result<bool, LinkError> {
    let path = PathBuf::from("/proc/self/ns/net");
    let own = std::fs::metadata(&path);
    let other = netns.try_clone_to_owned().and_then(|netns| File::from(netns).metadata());
    let identity = |file: Metadata| (file.dev(), file.ino());
    match (own, other) {
        (Ok(own), Ok(other)) => Ok(identity(own) == identity(other)),
        (Err(source), _) | (_, Err(source)) => Err(LinkError::File { call: "examine", path, source }),
    }
}

fn socket_error(kind: &'static str) -> impl FnOnce(io::Error) -> LinkError {
    move |source| LinkError::Socket { kind, source }
}

#[cfg(test)]
mod tests;
