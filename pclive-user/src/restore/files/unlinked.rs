//! Files without a name: made anew in the directory that the lost name was in, so that they are on the same file system.

use super::error::FileError;
use super::flags;
use super::named::{lookup, show};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, Uid, UnlinkatFlags, Whence, fchown, lseek, unlinkat, write};
use pclive_wire::manifest::{Description, DescriptionKind};
use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};

/// The inodes of unlinked files, made when first needed.
pub(super) struct Unlinked<'a> {
    root: &'a OwnedFd,
    contents: HashMap<u32, &'a [u8]>,
    made: HashMap<u32, OwnedFd>,
}

/// What an unlinked file is, apart from its contents.
pub(super) struct Attributes<'a> {
    pub inode: u32,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub directory: &'a [u8],
}

impl<'a> Unlinked<'a> {
    pub fn new(descriptions: &'a [Description], root: &'a OwnedFd) -> Self {
        let contents = descriptions.iter().filter_map(|description| match &description.kind {
            DescriptionKind::Unlinked { inode, contents, .. } if !contents.is_empty() => {
                Some((*inode, contents.as_slice()))
            }
            _ => None,
        });
        Self { root, contents: contents.collect(), made: HashMap::new() }
    }

    /// A description of the file, at `offset`.
    pub fn open(&mut self, file: &Attributes<'_>, flags: u32, offset: u64) -> Result<OwnedFd, FileError> {
        if !self.made.contains_key(&file.inode) {
            let made = make(self.root, file, self.contents.get(&file.inode).copied().unwrap_or_default())?;
            self.made.insert(file.inode, made);
        }
        let object = || format!("unlinked file in {}", show(file.directory));
        let opened = flags::reopen(self.made[&file.inode].as_raw_fd(), flags)
            .map_err(FileError::call("open", object()))?;
        lseek(&opened, offset as i64, Whence::SeekSet).map_err(FileError::call("lseek", object()))?;
        Ok(opened)
    }
}

/// Makes the inode: contents first, then owner and mode, which a change of owner would reset.
fn make(root: &OwnedFd, file: &Attributes<'_>, contents: &[u8]) -> Result<OwnedFd, FileError> {
    let object = || format!("unlinked file in {}", show(file.directory));
    let directory = lookup(root, file.directory, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
    let made = nameless(&directory).map_err(FileError::call("open(O_TMPFILE)", object()))?;
    let mut rest = contents;
    while !rest.is_empty() {
        let count = write(&made, rest).map_err(FileError::call("write", object()))?;
        rest = &rest[count..];
    }
    fchown(&made, Some(Uid::from_raw(file.uid)), Some(Gid::from_raw(file.gid)))
        .map_err(FileError::call("fchown", object()))?;
    let mode = Mode::from_bits_truncate(file.mode & 0o7777);
    fchmod(&made, mode).map_err(FileError::call("fchmod", object()))?;
    Ok(made)
}

/// A new empty file without a name; where the file system has no `O_TMPFILE`, its name is removed at once.
fn nameless(directory: &OwnedFd) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    match openat(directory, ".", flags | OFlag::O_TMPFILE, mode) {
        Err(Errno::EOPNOTSUPP | Errno::EISDIR) => {}
        done => return done,
    }
    let name = format!(".pclive-{}-{:x}", std::process::id(), directory.as_raw_fd());
    let made = openat(directory, name.as_str(), flags | OFlag::O_CREAT | OFlag::O_EXCL, mode)?;
    unlinkat(directory, name.as_str(), UnlinkatFlags::NoRemoveDir)?;
    Ok(made)
}
