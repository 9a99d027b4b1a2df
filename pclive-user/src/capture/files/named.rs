//! Files that were opened by a path: regular files, directories, devices.
//!
//! A path from procfs is only taken when it still leads to the same inode in the container's root: the name may have been
//! unlinked, replaced or covered by a mount since.

use super::error::{FileError, Refusal};
use super::identity::Found;
use super::unlinked::Unlinked;
use super::{stdio, unsupported};
use crate::capture::env::ContainerEnv;
use nix::sys::stat::{FileStat, SFlag, fstat};
use pclive_wire::manifest::DescriptionKind;
use std::os::fd::OwnedFd;

/// What the kernel appends to the path of a file that lost the name it was opened by (`d_path`).
pub(super) const DELETED: &[u8] = b" (deleted)";

/// Character devices whose descriptions keep no state: null, zero, full, random, urandom.
const STATELESS: [(u64, u64); 5] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9)];

pub(super) fn capture(
    found: &Found,
    duplicate: &OwnedFd,
    env: &ContainerEnv,
    unlinked: &mut Unlinked,
) -> Result<DescriptionKind, Refusal> {
    let stat = fstat(duplicate).map_err(FileError::call("fstat", &found.slot()))?;
    let path = found.open.link.as_slice();
    if !env.has_mount(found.open.info.mount) {
        return outside(found, &stat);
    }
    let type_ = file_type(&stat);
    if type_ == SFlag::S_IFREG && stat.st_nlink == 0 {
        return unlinked.capture(found, &stat, env);
    }
    match type_ {
        SFlag::S_IFREG | SFlag::S_IFDIR => {}
        SFlag::S_IFCHR if is_stateless(stat.st_rdev) => {}
        _ => return Err(unsupported::by_type(type_, stat.st_rdev)),
    }
    if !env.leads_to(path, &stat).map_err(FileError::call("fstatat", &found.slot()))? {
        return Err(Refusal::unsupported(
            format!("{} is open but no longer found by that name", String::from_utf8_lossy(path)),
            "close it, or restore its name, before the migration",
        ));
    }
    if found.access_mode() != libc::O_RDONLY
        && type_ == SFlag::S_IFREG
        && env.is_kernel_mount(found.open.info.mount)
    {
        return Err(Refusal::unsupported(
            format!("{} belongs to the kernel and is open for writing", String::from_utf8_lossy(path)),
            "have the program close it after use",
        ));
    }
    let (path, offset) = (path.to_vec(), found.open.info.pos);
    Ok(match type_ {
        SFlag::S_IFREG => DescriptionKind::Regular { path, offset, size: stat.st_size as u64 },
        SFlag::S_IFDIR => DescriptionKind::Directory { path, offset },
        _ => DescriptionKind::Device { path, rdev: stat.st_rdev },
    })
}

/// A file on a mount that the container does not see.
fn outside(found: &Found, stat: &FileStat) -> Result<DescriptionKind, Refusal> {
    let path = String::from_utf8_lossy(&found.open.link);
    if path.starts_with("/memfd:") && stat.st_nlink == 0 {
        return Err(unsupported::memfd());
    }
    match file_type(stat) {
        SFlag::S_IFREG | SFlag::S_IFCHR | SFlag::S_IFIFO => {
            stdio::capture(&format!("{path} of the host"), found.stream())
        }
        _ => stdio::capture(&format!("{path} of the host"), None),
    }
}

/// The type bits of a mode.
pub(super) fn file_type(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & libc::S_IFMT)
}

/// Whether a device number is that of a character device without state.
pub(crate) fn is_stateless(rdev: u64) -> bool {
    STATELESS.contains(&(nix::sys::stat::major(rdev), nix::sys::stat::minor(rdev)))
}
