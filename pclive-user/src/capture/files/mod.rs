//! Open files: descriptor tables and the open file descriptions behind them.
//!
//! ```text
//! /proc/PID/fd, fdinfo ──▶ table ──▶ identity (kcmp) ──▶ one Found per description ──▶ its kind's file ──▶ Description
//!                                                                └─▶ holders ──▶ tables of FdEntry
//! ```
//!
//! A description is asked through a duplicate of one of its descriptors (`pidfd_getfd(2)`), which is closed again then:
//! only those of TCP connections are kept, because they are to be silenced when the source's copy goes.
//!
//! The same code surveys the running container. There a descriptor may be closed, or its number used again, between any
//! two calls; what fails for a descriptor that changed meanwhile is left out.

mod epoll;
mod error;
mod eventfd;
mod fdinfo;
mod identity;
mod named;
mod pipe;
mod signalfd;
mod socket;
mod stdio;
mod table;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod timerfd;
mod unlinked;
mod unsupported;

pub use error::FileError;
pub(crate) use named::is_stateless;
pub use socket::read_options_ahead;
pub use unlinked::MAX_UNLINKED_BYTES;

use crate::capture::descriptors::Descriptor;
use crate::capture::env::ContainerEnv;
use crate::capture::sockets::SocketCapture;
use crate::capture::{Access, Obstacles, SourceProcess};
use error::Refusal;
use identity::{Found, Index};
use pclive_sys::codicil::Codicil;
use pclive_sys::owner::owner;
use pclive_wire::NsPid;
use pclive_wire::manifest::{Description, DescriptionId, DescriptionKind, FdEntry};
use std::os::fd::{AsFd, OwnedFd};
use table::TableReader;

/// The open files of a container.
#[derive(Debug)]
pub struct CapturedFiles {
    /// Open file descriptions; [`FdEntry::description`] is an index into it.
    pub descriptions: Vec<Description>,
    /// The descriptor table of each process, sorted by number.
    pub tables: Vec<(NsPid, Vec<FdEntry>)>,
    /// The source's connections, to be silenced once the destination runs the container.
    pub sockets: SocketCapture,
    /// What is in the way now and will go away by itself when the container runs on for some milliseconds.
    pub transient: Vec<String>,
}

/// How files are looked at.
#[derive(Debug)]
pub enum Look {
    /// The container runs: [`Access::Survey`].
    Survey,
    /// The container stands still: [`Access::Frozen`].
    Frozen {
        /// See [`SocketCapture::begin`].
        codicil: Option<Codicil>,
        /// What each process, in their order, has said of its descriptors, if it has.
        descriptors: Vec<Option<Vec<Descriptor>>>,
    },
}

/// Reads the descriptor tables of `processes` and every open file description that they name.
///
/// What cannot be moved is added to `obstacles` or to [`CapturedFiles::transient`]; the result is complete if neither
/// got anything.
///
/// # Errors
/// The kernel refused a call that should have worked.
pub fn capture_files(
    processes: &[SourceProcess],
    env: &ContainerEnv,
    look: Look,
    obstacles: &mut Obstacles,
) -> Result<CapturedFiles, FileError> {
    let (access, codicil, descriptors) = match look {
        Look::Survey => (Access::Survey, None, Vec::new()),
        Look::Frozen { codicil, descriptors } => (Access::Frozen, codicil, descriptors),
    };
    let mut reader = TableReader::new(access);
    let mut open = Vec::new();
    for (index, process) in processes.iter().enumerate() {
        let known = descriptors.get(index).and_then(Option::as_deref);
        open.extend(reader.read(index, process, known)?);
    }
    let found = identity::group(open, access)?;
    let mut describer = Describer::new(processes, env, access, codicil, &found)?;
    let mut refused = Refused { obstacles, transient: Vec::new() };
    let mut descriptions = Vec::new();
    let mut ids = vec![None; found.len()];
    for (place, found) in found.iter().enumerate() {
        match describer.describe(found) {
            Ok(description) => {
                ids[place] = Some(DescriptionId(descriptions.len() as u32));
                descriptions.push(description);
            }
            Err(_) if access == Access::Survey && changed(found) => {}
            Err(refusal) => refused.add(found, refusal)?,
        }
    }
    for (inode, error) in describer.sockets.finish(&mut descriptions, access) {
        match found.iter().find(|found| socket::inode(&found.open.link) == Some(inode)) {
            Some(found) => refused.add(found, Refusal::socket(error, &found.slot()))?,
            None => refused.transient.push(error.to_string()),
        }
    }
    let sockets = describer.sockets;
    let transient = refused.transient;
    Ok(CapturedFiles { descriptions, tables: tables(processes, &found, &ids), sockets, transient })
}

/// Where refusals go.
struct Refused<'a> {
    obstacles: &'a mut Obstacles,
    transient: Vec<String>,
}

impl Refused<'_> {
    fn add(&mut self, found: &Found, refusal: Refusal) -> Result<(), FileError> {
        let slot = found.slot();
        match refusal {
            Refusal::Unsupported { reason, remedy } => {
                self.obstacles.add(slot.ns_pid, format!("fd {}", slot.fd), reason, remedy);
            }
            Refusal::Transient(reason) => self.transient.push(format!("{slot}: {reason}")),
            Refusal::Failed(error) => return Err(error),
        }
        Ok(())
    }
}

/// Whether the descriptor has been closed, or opened on something else, since its table was read.
fn changed(found: &Found) -> bool {
    table::link_of(found.slot()).is_none_or(|link| link != found.open.link)
}

/// Descriptor tables, from the holders of each description that has an id.
fn tables(
    processes: &[SourceProcess],
    found: &[Found],
    ids: &[Option<DescriptionId>],
) -> Vec<(NsPid, Vec<FdEntry>)> {
    let mut tables: Vec<_> = processes.iter().map(|process| (process.ns_pid, Vec::new())).collect();
    for (found, id) in found.iter().zip(ids) {
        let Some(description) = *id else { continue };
        for holder in &found.holders {
            let entry = FdEntry { fd: holder.slot.fd, cloexec: holder.cloexec, description };
            tables[holder.slot.process].1.push(entry);
        }
    }
    for (_, table) in &mut tables {
        table.sort_unstable_by_key(|entry| entry.fd);
    }
    tables
}

/// Finds out what descriptions are, remembering what concerns several of them.
struct Describer<'a> {
    processes: &'a [SourceProcess],
    env: &'a ContainerEnv,
    access: Access,
    found: &'a [Found],
    index: Index,
    pipes: pipe::Pipes,
    unlinked: unlinked::Unlinked,
    sockets: SocketCapture,
    socket_device: Option<u64>,
}

impl<'a> Describer<'a> {
    fn new(
        processes: &'a [SourceProcess],
        env: &'a ContainerEnv,
        access: Access,
        codicil: Option<Codicil>,
        found: &'a [Found],
    ) -> Result<Self, FileError> {
        let sockets = SocketCapture::begin(env.sockets.clone(), codicil)
            .map_err(|error| FileError::Socket { object: "all sockets".into(), error })?;
        Ok(Self {
            processes,
            env,
            access,
            found,
            index: identity::index(found),
            pipes: pipe::Pipes::new(found, access),
            unlinked: unlinked::Unlinked::new(access),
            sockets,
            socket_device: socket::device(found)?,
        })
    }

    fn describe(&mut self, found: &Found) -> Result<Description, Refusal> {
        if found.flags() & libc::O_PATH as u32 != 0 {
            return Err(Refusal::unsupported(
                "a path handle (O_PATH), which is not moved yet",
                "close it before the migration",
            ));
        }
        if found.open.info.locked {
            return Err(Refusal::unsupported(
                "a file with a lock or lease on it, which is not moved yet",
                "release the lock before the migration",
            ));
        }
        let duplicate = found.duplicate(self.processes)?;
        let owner = owner(duplicate.as_fd()).map_err(FileError::call("fcntl(F_GETOWN_EX)", &found.slot()))?;
        if owner != Default::default() {
            return Err(Refusal::unsupported(
                "a descriptor that sends signals when it is ready (F_SETOWN, F_SETSIG), which is not moved yet",
                "configure the program to use epoll",
            ));
        }
        let kind = self.kind(found, duplicate)?;
        Ok(Description { flags: found.flags(), owner: (0, 0, 0), kind })
    }

    fn kind(&mut self, found: &Found, duplicate: OwnedFd) -> Result<DescriptionKind, Refusal> {
        let link = found.open.link.as_slice();
        if link.starts_with(b"/") {
            return named::capture(found, &duplicate, self.env, &mut self.unlinked);
        }
        if link.starts_with(pipe::LINK) {
            return self.pipes.capture(found, &duplicate);
        }
        if let Some(inode) = socket::inode(link) {
            return self
                .sockets
                .capture(duplicate.as_fd(), inode, self.access)
                .map_err(|error| Refusal::socket(error, &found.slot()));
        }
        let link = String::from_utf8_lossy(link);
        let Some(name) = link.strip_prefix("anon_inode:") else { return Err(unsupported::other(&link)) };
        match name.trim_matches(['[', ']']) {
            "eventfd" => eventfd::capture(found),
            "eventpoll" => epoll::capture(found, self.found, &self.index, self.socket_device),
            "timerfd" => timerfd::capture(found, &duplicate),
            "signalfd" => signalfd::capture(found),
            name => Err(unsupported::anonymous(name)),
        }
    }
}
