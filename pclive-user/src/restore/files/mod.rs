//! Open files: makes every open file description of the manifest, in pclive's own process.
//!
//! What is made here is handed to the parked processes over a socket (`SCM_RIGHTS`), which keeps descriptions shared the
//! way they were. Two things cannot be done from here: descriptor numbers, and epoll entries, which are keyed by the
//! number in the process that adds them ([`OpenedFiles::epoll_targets`]).
//!
//! Everything in a description was said by the source. Paths are resolved inside the container, and nothing that exists
//! is changed.

mod error;
mod eventfd;
mod flags;
mod named;
mod pipe;
mod stdio;
#[cfg(test)]
mod tests;
mod timerfd;
mod unlinked;

pub use error::FileError;

use crate::restore::Sandbox;
use crate::restore::sockets::{RestoreError, RestoredSockets};
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use pclive_sys::signalfd::signalfd;
use pclive_sys::timerfd::TimerSpec;
use pclive_wire::manifest::{Description, DescriptionId, DescriptionKind, EpollTarget};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The descriptions of a container, open in this process.
#[derive(Debug)]
pub struct OpenedFiles {
    /// One descriptor for each description that is not a socket, in the manifest's order; all close-on-exec.
    files: Vec<Option<OwnedFd>>,
    /// The others.
    sockets: RestoredSockets,
    /// For each epoll description what has to be added to it, by the process named in the target.
    pub epoll_targets: Vec<(DescriptionId, Vec<EpollTarget>)>,
}

impl OpenedFiles {
    /// What was made of a description; `None` if the manifest has no such description.
    pub fn get(&self, id: DescriptionId) -> Option<BorrowedFd<'_>> {
        let file = self.files.get(id.0 as usize)?.as_ref();
        file.map(AsFd::as_fd).or_else(|| self.sockets.get(id))
    }

    /// Lets the connections run: see [`RestoredSockets::go_live`].
    pub fn go_live(self) -> Vec<RestoreError> {
        self.sockets.go_live()
    }
}

/// Makes every description of the manifest.
///
/// # Errors
/// The first description that cannot be made: a file that is missing or differs at the destination, or a call that failed.
/// Nothing is left behind.
pub fn open_files(descriptions: &[Description], sandbox: &Sandbox) -> Result<OpenedFiles, FileError> {
    let mut files: Vec<Option<OwnedFd>> = descriptions.iter().map(|_| None).collect();
    let mut epoll_targets = Vec::new();
    pipe::open_all(descriptions, &mut files)?;
    let sockets = RestoredSockets::restore(descriptions, sandbox.netns.as_fd())?;
    let mut unlinked = unlinked::Unlinked::new(descriptions, &sandbox.root);
    for (place, description) in descriptions.iter().enumerate() {
        match sockets.get(DescriptionId(place as u32)) {
            Some(socket) => flags::set(socket, description.flags)?,
            None if files[place].is_none() => files[place] = Some(open(description, sandbox, &mut unlinked)?),
            None => {}
        }
        if let DescriptionKind::Epoll { targets } = &description.kind {
            epoll_targets.push((DescriptionId(place as u32), targets.clone()));
        }
    }
    Ok(OpenedFiles { files, sockets, epoll_targets })
}

/// Makes one description.
fn open(
    description: &Description,
    sandbox: &Sandbox,
    unlinked: &mut unlinked::Unlinked<'_>,
) -> Result<OwnedFd, FileError> {
    let (root, flags) = (&sandbox.root, description.flags);
    match &description.kind {
        DescriptionKind::Stdio { stream } => stdio::open(*stream, flags, &sandbox.stdio),
        DescriptionKind::Regular { path, offset, size } => named::regular(root, path, flags, *offset, *size),
        DescriptionKind::Directory { path, offset } => named::directory(root, path, flags, *offset),
        DescriptionKind::Device { path, rdev } => named::device(root, path, flags, *rdev),
        DescriptionKind::Unlinked { inode, offset, mode, uid, gid, directory, .. } => {
            let file = unlinked::Attributes { inode: *inode, mode: *mode, uid: *uid, gid: *gid, directory };
            unlinked.open(&file, flags, *offset)
        }
        DescriptionKind::Eventfd { count, semaphore } => anonymous(flags, eventfd::open(*count, *semaphore)),
        DescriptionKind::Epoll { .. } => anonymous(flags, epoll()),
        DescriptionKind::Timerfd { clock, ticks, value_ns, interval_ns } => {
            let spec = TimerSpec { value_ns: *value_ns, interval_ns: *interval_ns };
            anonymous(flags, timerfd::open(*clock, spec, *ticks))
        }
        DescriptionKind::Signalfd { mask } => {
            anonymous(flags, signalfd(*mask).map_err(FileError::call("signalfd4", "signalfd")))
        }
        DescriptionKind::Pipe { pipe, .. } => Err(FileError::NotHere { what: format!("pipe {pipe}") }),
        DescriptionKind::Unix(_) | DescriptionKind::Tcp(_) => {
            Err(FileError::NotHere { what: "socket".into() })
        }
    }
}

/// Gives a new description without a file its status flags.
fn anonymous(flags: u32, made: Result<OwnedFd, FileError>) -> Result<OwnedFd, FileError> {
    let made = made?;
    flags::set(made.as_fd(), flags)?;
    Ok(made)
}

/// An empty epoll set.
fn epoll() -> Result<OwnedFd, FileError> {
    let epoll =
        Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(FileError::call("epoll_create1", "epoll set"))?;
    Ok(epoll.0)
}
