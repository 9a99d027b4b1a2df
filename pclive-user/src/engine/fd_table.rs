//! Room in pclive's own descriptor table, made ahead of the blackout.
//!
//! In the blackout both hosts open a descriptor for each socket and file of the container. A table that several threads
//! share grows only after an RCU grace period (`expand_fdtable` in fs/file.c), for which they wait up to 20 ms: beyond 64
//! descriptors, and then beyond each power of two. So it grows while the container still runs. For the tables of the
//! container's own processes see [`Parked`](crate::restore::parked).

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::eventfd::EventFd;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::close;
use pclive_wire::limits::MAX_FD_ROOM;
use pclive_wire::manifest::Process;

/// What pclive has open for itself, at most.
const OWN: u64 = 256;

/// Makes room for as many descriptors as the tables of these processes hold, and lifts the soft limit to the hard one. Without
/// room the blackout is longer, so a failure is no error.
pub fn make_room(processes: &[Process]) {
    let theirs: u64 = processes.iter().map(|process| u64::from(process.fd_size)).sum();
    if let Err(errno) = grow(theirs.min(MAX_FD_ROOM.into()) + OWN) {
        tracing::debug!("the descriptor table has to grow in the blackout: {errno}");
    }
}

/// Has the table hold `size` descriptors, as far as the hard limit allows.
fn grow(size: u64) -> nix::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    // The table never shrinks.
    let last = i32::try_from(size.min(hard).saturating_sub(1)).map_err(|_| Errno::EMFILE)?;
    close(fcntl(EventFd::new()?, FcntlArg::F_DUPFD_CLOEXEC(last))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::proc::Status;
    use pclive_wire::HostPid;

    #[test]
    fn the_table_has_room_for_what_it_does_not_hold_yet() {
        grow(3000).unwrap();
        let status = Status::of_process(HostPid(std::process::id() as i32)).unwrap();
        assert!(status.fd_size >= 3000, "{}", status.fd_size);
    }
}
