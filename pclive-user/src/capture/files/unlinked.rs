//! Regular files without a name: nobody at the destination could find them, so their contents travel.

use super::error::{FileError, Refusal};
use super::identity::Found;
use super::named::DELETED;
use crate::capture::Access;
use crate::capture::env::ContainerEnv;
use nix::fcntl::AtFlags;
use nix::sys::stat::{FileStat, fstatat};
use pclive_wire::manifest::DescriptionKind;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;

/// Contents travel in the manifest, within the blackout: what exceeds this in total is refused.
pub const MAX_UNLINKED_BYTES: u64 = 16 << 20;

/// The unlinked inodes seen so far.
pub(super) struct Unlinked {
    access: Access,
    /// Number of each inode, by device and inode number.
    numbers: HashMap<(u64, u64), u32>,
    /// Bytes of all of them.
    total: u64,
}

impl Unlinked {
    pub fn new(access: Access) -> Self {
        Self { access, numbers: HashMap::new(), total: 0 }
    }

    pub fn capture(
        &mut self,
        found: &Found,
        stat: &FileStat,
        env: &ContainerEnv,
    ) -> Result<DescriptionKind, Refusal> {
        let next = self.numbers.len() as u32;
        let inode = *self.numbers.entry((stat.st_dev, stat.st_ino)).or_insert(next);
        if inode == next {
            self.total = self.total.saturating_add(stat.st_size as u64);
        }
        if self.total > MAX_UNLINKED_BYTES {
            return Err(Refusal::unsupported(
                format!(
                    "an unlinked file of {} bytes; at most {MAX_UNLINKED_BYTES} are moved in all such files",
                    stat.st_size
                ),
                "have the program close or truncate its temporary files",
            ));
        }
        let contents = match self.access {
            Access::Frozen if inode == next => read_contents(found)?,
            _ => Vec::new(),
        };
        Ok(DescriptionKind::Unlinked {
            inode,
            offset: found.open.info.pos,
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            directory: directory(found, env)?,
            contents,
        })
    }
}

/// The directory that the lost name was in.
fn directory(found: &Found, env: &ContainerEnv) -> Result<Vec<u8>, Refusal> {
    let path = found.open.link.strip_suffix(DELETED).unwrap_or(&found.open.link);
    let end = path.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
    let directory = &path[..end];
    let relative = directory.strip_prefix(b"/").unwrap_or(b".");
    match fstatat(&env.root, OsStr::from_bytes(relative), AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(_) if directory.is_empty() => Ok(b"/".to_vec()),
        Ok(_) => Ok(directory.to_vec()),
        Err(_) => Err(Refusal::unsupported(
            format!("an unlinked file whose directory {} is gone too", String::from_utf8_lossy(directory)),
            "close it before the migration",
        )),
    }
}

/// Reads the file through a description of our own: theirs may be write-only, and its offset must stay.
fn read_contents(found: &Found) -> Result<Vec<u8>, FileError> {
    let slot = found.slot();
    let path = format!("/proc/{}/fd/{}", slot.pid, slot.fd);
    let mut contents = Vec::new();
    File::open(&path)
        .and_then(|file| file.take(MAX_UNLINKED_BYTES).read_to_end(&mut contents))
        .map_err(|error| FileError::Proc { path, error })?;
    Ok(contents)
}
