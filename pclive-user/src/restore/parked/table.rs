//! The descriptor table of a parked process: made large ahead of the blackout, and filled in it.

use super::{Parked, ParkedError, call};
use crate::restore::descriptors;
use crate::restore::files::OpenedFiles;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use pclive_sys::pidfd::pidfd_getfd;
use pclive_sys::script::Script;
use pclive_wire::limits::MAX_FD_ROOM;
use pclive_wire::manifest::{FdEntry, ProcessState};
use std::os::fd::AsFd;

impl Parked {
    /// Makes room for as many descriptors as the source's process has, and lifts the soft limit for them: it becomes that of
    /// the source only in the end, which the program may have raised there.
    ///
    /// A table that threads share grows only after an RCU grace period (`expand_fdtable` in fs/file.c), of up to 20 ms: so it
    /// grows before there are any, or at least before the blackout.
    pub fn make_room_for_descriptors(&mut self, fd_size: u32) -> Result<(), ParkedError> {
        if self.fd_limit.is_some() && fd_size <= self.fd_size {
            return Ok(());
        }
        let (script, limit) = descriptors::limit_script();
        let outcome = self.run(&script)?;
        let hard = outcome.data(limit).last_chunk().map_or(0, |hard| u64::from_ne_bytes(*hard));
        self.run(&descriptors::room_script(hard, fd_size.min(MAX_FD_ROOM)))?;
        (self.fd_size, self.fd_limit) = (fd_size, Some(hard));
        Ok(())
    }

    /// Gives it the open files of the source's process, at their numbers, and their places in its epoll sets.
    pub(super) fn install_descriptors(
        &self,
        state: &ProcessState,
        files: &OpenedFiles,
    ) -> Result<(), ParkedError> {
        let (above, spare) = descriptors::spare_fds(&state.fds);
        if let Some(limit) = self.fd_limit.filter(|limit| u64::from(spare.unsigned_abs()) >= *limit) {
            return Err(ParkedError::OpenFiles { fd: above - 1, limit });
        }
        let (script, pair) = descriptors::socketpair_script();
        let outcome = self.run(&script)?;
        let end = |i: usize| {
            let raw = &outcome.data(pair)[i * 4..i * 4 + 4];
            i32::from_ne_bytes(raw.try_into().expect("4 bytes"))
        };
        let ours = pidfd_getfd(self.pidfd.as_fd(), end(0)).map_err(call("pidfd_getfd"))?;
        let (filler, _) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)
            .map_err(call("socketpair"))?;
        let file = |entry: &FdEntry| files.get(entry.description).unwrap_or(filler.as_fd());
        descriptors::send(ours.as_fd(), &state.fds, file, filler.as_fd()).map_err(call("sendmsg"))?;
        let socket_at = above.max(end(1) + 1);
        let mut script = descriptors::receive_script(&state.fds, end(1), socket_at);
        let watches = descriptors::Watches::of(self.pid, &state.fds, &files.epoll_targets);
        let disarmed = watches.disarm(&mut script);
        let outcome = self.run(&script)?;
        let fired: Vec<bool> = disarmed.into_iter().map(|call| outcome.result(call) == 1).collect();
        let mut script = Script::new();
        watches.add(&mut script, &fired);
        self.run(&script)?;
        Ok(())
    }
}
