//! Mappings of a parked process: the script that turns one layout into the next.

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{SFlag, fstat};
use pclive_sys::script::{Arg, Expect, Script};
use pclive_wire::layout::{Step, steps};
use pclive_wire::manifest::{Backing, Vma, VmaFlags};
use pclive_wire::{PageRange, VirtAddr};
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Advice that sets and clears a flag.
const ADVICE: [(u16, i32, i32); 8] = [
    (VmaFlags::DONTFORK, libc::MADV_DONTFORK, libc::MADV_DOFORK),
    (VmaFlags::WIPEONFORK, libc::MADV_WIPEONFORK, libc::MADV_KEEPONFORK),
    (VmaFlags::DONTDUMP, libc::MADV_DONTDUMP, libc::MADV_DODUMP),
    (VmaFlags::HUGEPAGE, libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE),
    (VmaFlags::NOHUGEPAGE, libc::MADV_NOHUGEPAGE, libc::MADV_HUGEPAGE),
    (VmaFlags::MERGEABLE, libc::MADV_MERGEABLE, libc::MADV_UNMERGEABLE),
    (VmaFlags::SEQUENTIAL, libc::MADV_SEQUENTIAL, libc::MADV_NORMAL),
    (VmaFlags::RANDOM, libc::MADV_RANDOM, libc::MADV_NORMAL),
];

/// Appends the calls that turn layout `from` into `to`; returns the ranges that they map anew.
pub fn remap(script: &mut Script, from: &[Vma], to: &[Vma]) -> Vec<PageRange> {
    let mut mapped = Vec::new();
    let steps = steps(from, to);
    // First make room: what is mapped later may lie where something goes away.
    for step in &steps {
        if let Step::Unmap(range) = step {
            unmap(script, *range);
        }
    }
    for step in steps {
        match step {
            Step::Unmap(_) => {}
            Step::Map(range, vma) => {
                map(script, range, vma);
                advise(script, range, VmaFlags::default(), vma.flags);
                mapped.push(range);
            }
            Step::Change { range, to, was } => {
                let args: [Arg; 3] = [range.start.into(), range.bytes().into(), u64::from(to.prot).into()];
                script.call(format!("mprotect {range}"), libc::SYS_mprotect, args);
                advise(script, range, was, to.flags);
            }
        }
    }
    mapped
}

/// Appends a `munmap`.
pub fn unmap(script: &mut Script, range: PageRange) {
    script.call(format!("munmap {range}"), libc::SYS_munmap, [range.start.into(), range.bytes().into()]);
}

/// Appends the calls that drop pages which are no longer there at the source, locked ones too (Linux 5.18).
pub fn drop_pages(script: &mut Script, ranges: &[PageRange]) {
    for range in ranges {
        advice(script, *range, libc::MADV_DONTNEED_LOCKED);
    }
}

fn map(script: &mut Script, range: PageRange, vma: &Vma) {
    let label = format!("mmap {range}");
    let at = Expect::Exactly(range.start.0);
    let (start, len): (Arg, Arg) = (range.start.into(), range.bytes().into());
    let prot: Arg = u64::from(vma.prot).into();
    match &vma.backing {
        Backing::Anonymous => {
            let mut flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            if vma.flags.has(VmaFlags::GROWSDOWN) {
                flags |= libc::MAP_GROWSDOWN;
            }
            if vma.flags.has(VmaFlags::NORESERVE) {
                flags |= libc::MAP_NORESERVE;
            }
            let args = [start, len, prot, flags.into(), (-1).into(), 0.into()];
            script.call_expecting(label, libc::SYS_mmap, args, at);
        }
        Backing::File { path, offset, shared, .. } => {
            let name = script.string(path);
            let flags = libc::MAP_FIXED | if *shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
            let open = format!("open {}", String::from_utf8_lossy(path));
            let how = libc::O_RDONLY | libc::O_CLOEXEC;
            let args: [Arg; 3] = [libc::AT_FDCWD.into(), name.into(), how.into()];
            let fd = script.call(open, libc::SYS_openat, args);
            let offset = offset + (range.start.0 - vma.range.start.0);
            let args = [start, len, prot, flags.into(), fd.into(), offset.into()];
            script.call_expecting(label, libc::SYS_mmap, args, at);
            script.call("close", libc::SYS_close, [fd.into()]);
        }
        Backing::Shared { .. } | Backing::Special(_) => {
            unreachable!("refused by preflight, or moved and never mapped")
        }
    }
}

fn advise(script: &mut Script, range: PageRange, was: VmaFlags, wanted: VmaFlags) {
    for given in advice_between(was, wanted) {
        advice(script, range, given);
    }
    let lock = match (was.has(VmaFlags::LOCKED), wanted.has(VmaFlags::LOCKED)) {
        (false, true) => libc::SYS_mlock2,
        (true, false) => libc::SYS_munlock,
        _ => return,
    };
    // On fault: absent pages must stay absent until theirs arrive.
    let args: [Arg; 3] = [range.start.into(), range.bytes().into(), u64::from(libc::MLOCK_ONFAULT).into()];
    script.call(format!("mlock or munlock {range}"), lock, args);
}

/// First what clears flags: it may clear others, too.
fn advice_between(was: VmaFlags, wanted: VmaFlags) -> impl Iterator<Item = i32> {
    let cleared = ADVICE.into_iter().filter(move |&(flag, ..)| was.has(flag) && !wanted.has(flag));
    let set = ADVICE.into_iter().filter(move |&(flag, ..)| !was.has(flag) && wanted.has(flag));
    cleared.map(|(_, _, clear)| clear).chain(set.map(|(_, set, _)| set))
}

fn advice(script: &mut Script, range: PageRange, advice: i32) {
    let args: [Arg; 3] = [range.start.into(), range.bytes().into(), advice.into()];
    script.call(format!("madvise({advice}) {range}"), libc::SYS_madvise, args);
}

/// The new layout's first `upto` VMAs, and above them what is left of the old layout: a step on the way.
pub fn splice(new: &[Vma], upto: usize, old: &[Vma]) -> Vec<Vma> {
    if upto >= new.len() {
        return new.to_vec();
    }
    let border = new[upto].range.start;
    let above = old.iter().filter_map(|vma| above(vma, border));
    new[..upto].iter().cloned().chain(above).collect()
}

/// The part of a VMA above `border`.
fn above(vma: &Vma, border: VirtAddr) -> Option<Vma> {
    let mut part = vma.clone();
    let cut = border.0.saturating_sub(vma.range.start.0);
    if let Backing::File { offset, .. } = &mut part.backing {
        *offset += cut;
    }
    part.range = PageRange::between(vma.range.start.offset(cut), vma.range.end().max(border));
    (border < vma.range.end()).then_some(part)
}

/// Size of a regular file of the container whose root directory is `root`.
pub fn file_size(root: &OwnedFd, path: &[u8]) -> nix::Result<u64> {
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT);
    let fd = openat2(root, Path::new(OsStr::from_bytes(path)), how)?;
    let stat = fstat(&fd)?;
    match SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT {
        SFlag::S_IFREG => Ok(stat.st_size as u64),
        _ => Err(nix::Error::EINVAL),
    }
}

/// Appends the calls that move the vDSO and its data pages from where exec put them to where the source has them. They
/// go by way of `scratch` (room for all of them), because the two places may overlap crosswise.
pub fn move_specials(script: &mut Script, moves: &[(PageRange, VirtAddr)], scratch: VirtAddr) {
    let mut parked = Vec::with_capacity(moves.len());
    let mut at = scratch;
    for &(from, to) in moves {
        mremap(script, from, at);
        parked.push((PageRange::new(at, from.pages), to));
        at = at.offset(from.bytes());
    }
    for (from, to) in parked {
        mremap(script, from, to);
    }
}

fn mremap(script: &mut Script, from: PageRange, to: VirtAddr) {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let args: [Arg; 5] =
        [from.start.into(), from.bytes().into(), from.bytes().into(), flags.into(), to.into()];
    script.call_expecting(format!("mremap {from} to {to}"), libc::SYS_mremap, args, Expect::Exactly(to.0));
}

#[cfg(test)]
mod tests {
    use super::*;
    use pclive_wire::PAGE_SIZE;

    fn vma(first: u64, end: u64, prot: u8) -> Vma {
        let range = PageRange::between(VirtAddr(first * PAGE_SIZE), VirtAddr(end * PAGE_SIZE));
        let (offset, shared, size) = (first * PAGE_SIZE, false, 1 << 30);
        let backing = Backing::File { path: b"/file".to_vec(), offset, shared, size };
        Vma { range, prot, flags: VmaFlags::default(), backing }
    }

    /// What the kernel makes of flags when advice is given (`madvise_vma_behavior` in mm/madvise.c).
    fn advised(flags: u16, advice: i32) -> u16 {
        let (set, cleared) = match advice {
            libc::MADV_NORMAL => (0, VmaFlags::SEQUENTIAL | VmaFlags::RANDOM),
            libc::MADV_SEQUENTIAL => (VmaFlags::SEQUENTIAL, VmaFlags::RANDOM),
            libc::MADV_RANDOM => (VmaFlags::RANDOM, VmaFlags::SEQUENTIAL),
            libc::MADV_DONTFORK => (VmaFlags::DONTFORK, 0),
            libc::MADV_DOFORK => (0, VmaFlags::DONTFORK),
            libc::MADV_WIPEONFORK => (VmaFlags::WIPEONFORK, 0),
            libc::MADV_KEEPONFORK => (0, VmaFlags::WIPEONFORK),
            libc::MADV_DONTDUMP => (VmaFlags::DONTDUMP, 0),
            libc::MADV_DODUMP => (0, VmaFlags::DONTDUMP),
            libc::MADV_HUGEPAGE => (VmaFlags::HUGEPAGE, VmaFlags::NOHUGEPAGE),
            libc::MADV_NOHUGEPAGE => (VmaFlags::NOHUGEPAGE, VmaFlags::HUGEPAGE),
            libc::MADV_MERGEABLE => (VmaFlags::MERGEABLE, 0),
            libc::MADV_UNMERGEABLE => (0, VmaFlags::MERGEABLE),
            other => panic!("advice {other}"),
        };
        flags & !cleared | set
    }

    #[test]
    fn advice_leads_from_any_flags_to_any_others() {
        let pages = [0, VmaFlags::HUGEPAGE, VmaFlags::NOHUGEPAGE];
        let order = [0, VmaFlags::SEQUENTIAL, VmaFlags::RANDOM];
        let rest = [0, VmaFlags::DONTFORK | VmaFlags::MERGEABLE, VmaFlags::WIPEONFORK | VmaFlags::DONTDUMP];
        let all: Vec<u16> = pages
            .into_iter()
            .flat_map(|pages| order.map(|order| pages | order))
            .flat_map(|flags| rest.map(|rest| flags | rest))
            .collect();
        // Neither huge pages nor none: no advice leads back to that.
        let is_possible = |was: u16, wanted: u16| {
            let pages = VmaFlags::HUGEPAGE | VmaFlags::NOHUGEPAGE;
            was & pages == 0 || wanted & pages != 0
        };
        for (was, wanted) in all.iter().flat_map(|&was| all.iter().map(move |&wanted| (was, wanted))) {
            if is_possible(was, wanted) {
                let advice = advice_between(VmaFlags(was), VmaFlags(wanted));
                assert_eq!(advice.fold(was, advised), wanted, "from {was:#x}");
            }
        }
    }

    /// A mapping that the border runs through keeps its pages on both sides of it.
    #[test]
    fn a_layout_is_reached_in_parts_as_in_one() {
        let old = [vma(10, 30, 3), vma(40, 50, 3)];
        let new = [vma(10, 15, 1), vma(15, 22, 3), vma(22, 30, 1), vma(44, 50, 3), vma(60, 70, 3)];
        let direct = remap(&mut Script::new(), &old, &new);
        for step in 1..=new.len() {
            let (mut standing, mut mapped) = (old.to_vec(), Vec::new());
            for upto in (step..new.len() + step).step_by(step) {
                let part = splice(&new, upto, &old);
                mapped.extend(remap(&mut Script::new(), &standing, &part));
                standing = part;
            }
            assert_eq!((standing, mapped), (new.to_vec(), direct.clone()), "{step} at a time");
        }
    }
}
