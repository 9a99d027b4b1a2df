//! Mappings: `/proc/PID/maps` and the flags of `smaps`.
//!
//! `smaps` walks the page tables of everything it prints, which takes milliseconds for each GiB. So it is read only when
//! the text of `maps` has changed since. In the blackout that is too long: there the kernel is asked for the flags of those
//! mappings alone that are new or have changed, where a [`FlagSource`] can ask it.

use pclive_wire::manifest::{Backing, SpecialMapping, Vma, VmaFlags};
use pclive_wire::{HostPid, PageRange, VirtAddr};
use procfs::FromRead;
use procfs::process::{MMPermissions, MMapPath, MemoryMap, MemoryMaps, VmFlags};
use std::collections::HashMap;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Why mappings could not be read.
#[derive(Debug, thiserror::Error)]
pub enum VmaError {
    /// A file under `/proc` could not be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file under `/proc` says something unknown.
    #[error("cannot understand {path}")]
    Parse {
        /// Which.
        path: PathBuf,
        /// Why.
        source: procfs::ProcError,
    },
    /// A mapping of a kind that cannot be moved.
    #[error("mapping {range} of {pid}: {reason}")]
    Unsupported {
        /// Whose.
        pid: HostPid,
        /// Where.
        range: PageRange,
        /// What it is.
        reason: &'static str,
    },
}

/// A mapping that cannot be moved, and why.
pub type UnsupportedVma = (PageRange, &'static str);

/// Asks the kernel for the flags of single mappings.
pub trait FlagSource: std::fmt::Debug + Send {
    /// The flags of the mappings at these addresses of process `pid`, which stands still, if they can be told. `wait` has a
    /// thread of it call `wait4(2)`.
    fn flags(&mut self, pid: HostPid, mappings: &[VirtAddr], wait: &mut dyn FnMut()) -> Vec<Option<VmFlags>>;
}

/// The mappings of one process, read again only when they changed.
#[derive(Clone, Debug)]
pub struct VmaReader {
    pid: HostPid,
    text: Vec<u8>,
    vmas: Vec<Vma>,
    known: Known,
}

/// What lines of `maps` stand for; nothing for mappings that the kernel puts into every process alike.
type Known = HashMap<Vec<u8>, Option<Vma>>;

impl VmaReader {
    /// A reader that has read nothing yet.
    pub fn new(pid: HostPid) -> Self {
        Self { pid, text: Vec::new(), vmas: Vec::new(), known: Known::new() }
    }

    /// The mappings now, sorted. The first one that cannot be moved is an error.
    ///
    /// Of a running process they may be a mixture of several moments, because the kernel gives them out piece by piece;
    /// then they are read again the next time. Of a stopped process they are exact.
    pub fn read(&mut self) -> Result<&[Vma], VmaError> {
        self.read_asking(|_vdso, _mappings| Vec::new())
    }

    /// The same of a stopped process, whose mappings `ask` tells the flags of, if it can, so that `smaps` need not be read. It is
    /// given where the vDSO is.
    pub fn read_asking(
        &mut self,
        ask: impl FnOnce(PageRange, &[VirtAddr]) -> Vec<Option<VmFlags>>,
    ) -> Result<&[Vma], VmaError> {
        let maps = read_file(&self.path("maps"))?;
        if maps != self.text {
            let all = match self.changed(&maps, ask)? {
                Some(all) => all,
                None => self.parse(&read_file(&self.path("smaps"))?)?,
            };
            if let Some(&(range, reason)) = all.unsupported.first() {
                return Err(VmaError::Unsupported { pid: self.pid, range, reason });
            }
            self.vmas = without_overlaps(all.known.values().flatten().cloned().collect());
            self.text = if all.complete && all.maps == maps { maps } else { Vec::new() };
            self.known = all.known;
        }
        Ok(&self.vmas)
    }

    /// What `maps` says, with what is known of its lines, and the flags that `ask` tells of the others.
    fn changed(
        &self,
        maps: &[u8],
        ask: impl FnOnce(PageRange, &[VirtAddr]) -> Vec<Option<VmFlags>>,
    ) -> Result<Option<Smaps>, VmaError> {
        let mappings = self.mappings("maps", maps)?;
        let vdso = mappings.iter().find(|map| map.pathname == MMapPath::Vdso).map(range);
        let mut all = Smaps { maps: maps.to_vec(), ..Smaps::default() };
        let mut changed = Vec::new();
        for (map, line) in mappings.into_iter().zip(lines(maps)) {
            match self.known.get_key_value(line) {
                Some((line, known)) => all.known.extend([(line.clone(), known.clone())]),
                None => changed.push((map, line)),
            }
        }
        // Without anything known there is nothing to be gained.
        let Some(vdso) = vdso.filter(|_| !all.known.is_empty()) else { return Ok(None) };
        let starts: Vec<VirtAddr> = changed.iter().map(|(map, _)| range(map).start).collect();
        let flags: Vec<VmFlags> = ask(vdso, &starts).into_iter().flatten().collect();
        if flags.len() < changed.len() {
            return Ok(None);
        }
        for ((mut map, line), flags) in changed.into_iter().zip(flags) {
            map.extension.vm_flags = flags;
            self.add(map, line, &mut all);
        }
        Ok(Some(all))
    }

    /// Every mapping that cannot be moved, by the text of `smaps`, for preflight.
    pub fn survey(&self, smaps: &str) -> Result<Vec<UnsupportedVma>, VmaError> {
        self.parse(smaps.as_bytes()).map(|all| all.unsupported)
    }

    fn path(&self, name: &str) -> PathBuf {
        path(self.pid, name)
    }

    fn parse(&self, smaps: &[u8]) -> Result<Smaps, VmaError> {
        let maps = maps_lines(smaps);
        let mut all = Smaps::default();
        for (map, line) in self.mappings("smaps", smaps)?.into_iter().zip(lines(&maps)) {
            self.add(map, line, &mut all);
        }
        all.maps = maps;
        Ok(all)
    }

    fn mappings(&self, file: &str, text: &[u8]) -> Result<MemoryMaps, VmaError> {
        MemoryMaps::from_read(text).map_err(|source| VmaError::Parse { path: self.path(file), source })
    }

    fn add(&self, map: MemoryMap, line: &[u8], all: &mut Smaps) {
        let range = range(&map);
        let is_file = matches!(map.pathname, MMapPath::Path(_));
        match self.convert(map, range) {
            Ok(None) if is_file => all.complete = false,
            Ok(vma) => all.known.extend([(line.to_vec(), vma)]),
            Err(reason) => all.unsupported.push((range, reason)),
        }
    }

    /// One mapping; none for those the kernel puts into every process alike.
    fn convert(&self, map: MemoryMap, range: PageRange) -> Result<Option<Vma>, &'static str> {
        let flags = map.extension.vm_flags;
        let shared = map.perms.contains(MMPermissions::SHARED);
        let Some(backing) = self.backing(&map, range, shared)? else { return Ok(None) };
        if flags.intersects(VmFlags::IO | VmFlags::PF) && !matches!(backing, Backing::Special(_)) {
            return Err("device memory");
        }
        if flags.contains(VmFlags::HT) {
            return Err("huge pages of hugetlbfs");
        }
        let prot = [(MMPermissions::READ, 1), (MMPermissions::WRITE, 2), (MMPermissions::EXECUTE, 4)]
            .into_iter()
            .filter(|&(permission, _)| map.perms.contains(permission))
            .fold(0, |prot, (_, bit)| prot | bit);
        Ok(Some(Vma { range, prot, flags: vma_flags(flags), backing }))
    }

    fn backing(
        &self,
        map: &MemoryMap,
        range: PageRange,
        shared: bool,
    ) -> Result<Option<Backing>, &'static str> {
        if let Some(special) = special_mapping(&map.pathname) {
            return Ok(Some(Backing::Special(special)));
        }
        match &map.pathname {
            MMapPath::Vsyscall => Ok(None),
            MMapPath::Path(path) => self.file_backing(path, map, range, shared),
            MMapPath::Vsys(_) => Err("System V shared memory"),
            _ if shared => Err("shared anonymous memory"),
            MMapPath::Anonymous | MMapPath::Heap | MMapPath::Stack | MMapPath::TStack(_) => {
                Ok(Some(Backing::Anonymous))
            }
            MMapPath::Other(name) if name.starts_with("[anon:") || name.starts_with("anon:") => {
                Ok(Some(Backing::Anonymous))
            }
            _ => Err("a mapping that only the kernel can make"),
        }
    }

    fn file_backing(
        &self,
        path: &Path,
        map: &MemoryMap,
        range: PageRange,
        shared: bool,
    ) -> Result<Option<Backing>, &'static str> {
        let name = path.as_os_str().as_bytes();
        if name.starts_with(b"/dev/zero") || name.starts_with(b"/memfd:") || name.starts_with(b"/dev/shm/") {
            return Err("shared memory (memfd, /dev/shm or MAP_SHARED of /dev/zero)");
        }
        if name.ends_with(b" (deleted)") {
            return Err("a mapped file that was deleted");
        }
        if shared && map.extension.vm_flags.contains(VmFlags::MW) {
            return Err("a writable shared mapping of a file");
        }
        // The mapped file itself, whatever the path names by now.
        let mapped = self.path(&format!("map_files/{:x}-{:x}", range.start.0, range.end().0));
        let metadata = match std::fs::metadata(mapped) {
            Ok(metadata) => metadata,
            // Unmapped since the list was read, or only a part of it.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(_) => return Err("a mapped file that cannot be looked at"),
        };
        if !metadata.is_file() {
            return Err("a mapping of something that is not a regular file");
        }
        let path = path.as_os_str().to_owned().into_vec();
        Ok(Some(Backing::File { path, offset: map.offset, shared, size: metadata.len() }))
    }
}

/// Where the vDSO of a process is: `maps` alone, so the process may stand still meanwhile.
pub fn find_vdso(pid: HostPid) -> Result<Option<PageRange>, VmaError> {
    let path = path(pid, "maps");
    let text = read_file(&path)?;
    let maps = MemoryMaps::from_read(text.as_slice()).map_err(|source| VmaError::Parse { path, source })?;
    let vdso = maps.into_iter().find(|map| map.pathname == MMapPath::Vdso);
    Ok(vdso.as_ref().map(range))
}

/// Where a mapping is.
pub fn range(map: &MemoryMap) -> PageRange {
    PageRange::between(VirtAddr(map.address.0), VirtAddr(map.address.1))
}

fn path(pid: HostPid, name: &str) -> PathBuf {
    format!("/proc/{pid}/{name}").into()
}

/// What `smaps` says.
struct Smaps {
    /// The lines that it shares with `maps`.
    maps: Vec<u8>,
    known: Known,
    unsupported: Vec<UnsupportedVma>,
    /// No mapping was gone before it could be looked at.
    complete: bool,
}

impl Default for Smaps {
    fn default() -> Self {
        Self { maps: Vec::new(), known: Known::new(), unsupported: Vec::new(), complete: true }
    }
}

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split_inclusive(|&byte| byte == b'\n')
}

/// The lines of `smaps` that are also those of `maps`: they begin with an address, the others with a capital letter.
fn maps_lines(smaps: &[u8]) -> Vec<u8> {
    lines(smaps).filter(|line| !line[0].is_ascii_uppercase()).flatten().copied().collect()
}

/// Sorted mappings. One that grew while the list was read may be in it twice.
fn without_overlaps(mut vmas: Vec<Vma>) -> Vec<Vma> {
    vmas.sort_by_key(|vma| (vma.range.start, vma.range.pages));
    let mut end = VirtAddr(0);
    vmas.retain(|vma| {
        let follows = vma.range.start >= end;
        end = if follows { vma.range.end() } else { end };
        follows
    });
    vmas
}

/// Which of the kernel's special mappings a name means.
pub fn special_mapping(name: &MMapPath) -> Option<SpecialMapping> {
    match name {
        MMapPath::Vdso => Some(SpecialMapping::Vdso),
        MMapPath::Vvar => Some(SpecialMapping::Vvar),
        MMapPath::Other(name) if name.trim_matches(['[', ']']) == "vvar_vclock" => {
            Some(SpecialMapping::VvarVclock)
        }
        _ => None,
    }
}

/// Those of a mapping's `flags` that programs can change while it stands, and the others as they `were`.
pub fn changed_flags(were: VmaFlags, flags: VmFlags) -> VmaFlags {
    VmaFlags(were.0 & VmaFlags::FIXED | vma_flags(flags).0 & !VmaFlags::FIXED)
}

/// What of a mapping's flags the destination is told.
pub fn vma_flags(flags: VmFlags) -> VmaFlags {
    const TABLE: [(VmFlags, u16); 11] = [
        (VmFlags::GD, VmaFlags::GROWSDOWN),
        (VmFlags::NR, VmaFlags::NORESERVE),
        (VmFlags::LO, VmaFlags::LOCKED),
        (VmFlags::DC, VmaFlags::DONTFORK),
        (VmFlags::WF, VmaFlags::WIPEONFORK),
        (VmFlags::DD, VmaFlags::DONTDUMP),
        (VmFlags::HG, VmaFlags::HUGEPAGE),
        (VmFlags::NH, VmaFlags::NOHUGEPAGE),
        (VmFlags::MG, VmaFlags::MERGEABLE),
        (VmFlags::SR, VmaFlags::SEQUENTIAL),
        (VmFlags::RR, VmaFlags::RANDOM),
    ];
    let set = TABLE.into_iter().filter(|&(kernel, _)| flags.contains(kernel));
    VmaFlags(set.fold(0, |bits, (_, bit)| bits | bit))
}

fn read_file(path: &Path) -> Result<Vec<u8>, VmaError> {
    std::fs::read(path).map_err(|source| VmaError::Read { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use memmap2::{Advice, MmapMut};
    use pclive_wire::PAGE_SIZE;

    #[test]
    fn smaps_has_the_lines_of_maps() {
        let smaps = b"55d0-55d4 r--p 00000000 fe:00 12 /bin/cat\nSize: 16 kB\nVmFlags: rd mr\nff60-ff61 --xp 0 00:00 0\n";
        let maps: &[u8] = b"55d0-55d4 r--p 00000000 fe:00 12 /bin/cat\nff60-ff61 --xp 0 00:00 0\n";
        assert_eq!(maps_lines(smaps), maps);
    }

    #[test]
    fn only_mappings_that_have_changed_are_asked_for() {
        let us = HostPid(std::process::id() as i32);
        let mut reader = VmaReader::new(us);
        // Other tests change mappings meanwhile.
        while reader.text.is_empty() {
            reader.read().unwrap();
        }
        let known = reader.vmas.len();
        // Which does not become a part of one that was there.
        let mapping = MmapMut::map_anon(PAGE_SIZE as usize).unwrap();
        mapping.advise(Advice::Random).unwrap();
        let new = VirtAddr(mapping.as_ptr() as u64);
        let flags_of = |vmas: &[Vma]| vmas.iter().find(|vma| vma.range.start == new).map(|vma| vma.flags);

        let (mut asked, mut beside) = (Vec::new(), reader.clone());
        let told = |_vdso, mappings: &[VirtAddr]| {
            asked = mappings.to_vec();
            vec![Some(VmFlags::DD); mappings.len()]
        };
        let flags = flags_of(reader.read_asking(told).unwrap());
        assert_eq!(flags, Some(VmaFlags(VmaFlags::DONTDUMP)), "as it was told");
        assert!(asked.contains(&new) && asked.len() < known / 2, "{} of {known} mappings", asked.len());
        let flags = flags_of(beside.read().unwrap());
        assert_eq!(flags, Some(VmaFlags(VmaFlags::RANDOM)), "as smaps has it, where nobody tells");
    }

    #[test]
    fn the_own_mappings_are_understood() {
        let mut reader = VmaReader::new(HostPid(std::process::id() as i32));
        let vmas = reader.read().unwrap();
        assert!(vmas.windows(2).all(|pair| pair[0].range.end() <= pair[1].range.start));
        let has = |backing: Backing| vmas.iter().any(|vma| vma.backing == backing);
        assert!(has(Backing::Special(SpecialMapping::Vdso)) && has(Backing::Special(SpecialMapping::Vvar)));
        assert!(vmas.iter().any(|vma| vma.flags.has(VmaFlags::GROWSDOWN)), "the stack");
        let exe = std::env::current_exe().unwrap().into_os_string().into_vec();
        let code = vmas.iter().find(|vma| matches!(&vma.backing, Backing::File { path, .. } if *path == exe));
        assert!(code.is_some());
    }
}
