//! Pipes, with what is in them.
//!
//! All descriptions of a pipe are made together, since the first of each end *is* that end. An end that nobody had is
//! closed again, so that readers see the end of the stream and writers a broken pipe, as at the source.

use super::error::FileError;
use super::flags;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{pipe2, write};
use pclive_wire::manifest::{Description, DescriptionKind};
use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};

/// One end of a pipe among the descriptions.
struct Member {
    /// Place of the description.
    place: usize,
    flags: u32,
}

/// A pipe, from all of its descriptions.
#[derive(Default)]
struct Pipe<'a> {
    capacity: u32,
    contents: &'a [u8],
    members: Vec<Member>,
}

/// Makes every pipe among `descriptions`, and puts each end into its place in `opened`.
pub(super) fn open_all(
    descriptions: &[Description],
    opened: &mut [Option<OwnedFd>],
) -> Result<(), FileError> {
    let mut pipes: HashMap<u32, Pipe<'_>> = HashMap::new();
    for (place, description) in descriptions.iter().enumerate() {
        let DescriptionKind::Pipe { pipe, capacity, contents } = &description.kind else { continue };
        let pipe = pipes.entry(*pipe).or_default();
        pipe.capacity = *capacity;
        if !contents.is_empty() {
            pipe.contents = contents;
        }
        pipe.members.push(Member { place, flags: description.flags });
    }
    for (number, pipe) in pipes {
        open(number, &pipe, opened)?;
    }
    Ok(())
}

fn open(number: u32, pipe: &Pipe<'_>, opened: &mut [Option<OwnedFd>]) -> Result<(), FileError> {
    let object = || format!("pipe {number}");
    let (read, write) = make(pipe, number)?;
    // Stays open until the function returns: in one of the variables, or in its place.
    let any_end = read.as_raw_fd();
    let (mut read, mut write) = (Some(read), Some(write));
    for member in &pipe.members {
        let end = match member.flags as i32 & libc::O_ACCMODE {
            libc::O_RDONLY => read.take(),
            libc::O_WRONLY => write.take(),
            _ => None,
        };
        opened[member.place] = Some(match end {
            Some(end) => {
                flags::set_nonblocking(&end, member.flags)
                    .map_err(FileError::call("fcntl(F_SETFL)", object()))?;
                end
            }
            None => flags::reopen(any_end, member.flags).map_err(FileError::call("open", object()))?,
        });
    }
    Ok(())
}

/// A pipe with the right capacity and contents; both ends do not block yet.
fn make(pipe: &Pipe<'_>, number: u32) -> Result<(OwnedFd, OwnedFd), FileError> {
    let object = || format!("pipe {number}");
    let (read, end) =
        pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(FileError::call("pipe2", object()))?;
    let capacity = i32::try_from(pipe.capacity).map_err(|_| FileError::Call {
        call: "fcntl(F_SETPIPE_SZ)",
        object: object(),
        errno: Errno::EINVAL,
    })?;
    let now =
        fcntl(&end, FcntlArg::F_GETPIPE_SZ).map_err(FileError::call("fcntl(F_GETPIPE_SZ)", object()))?;
    if now != capacity {
        fcntl(&end, FcntlArg::F_SETPIPE_SZ(capacity))
            .map_err(FileError::call("fcntl(F_SETPIPE_SZ)", object()))?;
    }
    if !pipe.contents.is_empty() {
        let length = pipe.contents.len();
        let written = write(&end, pipe.contents).map_err(FileError::call("write", object()))?;
        if written < length {
            return Err(FileError::PipeFull { pipe: number, length, written });
        }
    }
    Ok((read, end))
}
