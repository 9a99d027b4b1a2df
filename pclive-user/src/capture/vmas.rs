//! Mappings: `/proc/PID/maps` and the flags of `smaps`.
//!
//! `smaps` walks the page tables of everything it prints, which takes milliseconds for each GiB. So it is read only when
//! the text of `maps` has changed since. In the blackout that is too long: where there is a [`FlagSource`], it is asked for the
//! flags of those mappings alone whose lines have changed. Later, when the process makes calls anyway, it is asked for all:
//! advice for the whole of a mapping leaves its line as it was.

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
    /// Poses a question for the mappings at these addresses of process `pid`, which stands still. One of its threads answers it
    /// by calling `wait4(2)`.
    fn pose(&mut self, pid: HostPid, mappings: &[VirtAddr]);

    /// The answers to the last question, for so many mappings; none for those whose flags cannot be told.
    fn answers(&mut self, mappings: usize) -> Vec<Option<VmFlags>>;
}

/// The mappings of one process, read again only when they changed.
#[derive(Debug)]
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
        let maps = read_file(&self.path("maps"))?;
        if maps != self.text {
            let smaps = read_file(&self.path("smaps"))?;
            let all = self.parse(&smaps)?;
            self.keep(maps, all)?;
        }
        Ok(&self.vmas)
    }

    /// The same of a stopped process without reading `smaps`, if `ask` can tell the flags of those mappings whose lines in `maps`
    /// have changed. It is given where the vDSO is.
    pub fn read_asking<E: From<VmaError>>(
        &mut self,
        ask: impl FnOnce(PageRange, &[VirtAddr]) -> Result<Vec<Option<VmFlags>>, E>,
    ) -> Result<&[Vma], E> {
        let maps = read_file(&self.path("maps"))?;
        if maps != self.text {
            match self.changed(&maps, ask)? {
                Some(all) => self.keep(maps, all)?,
                None => return Ok(self.read()?),
            }
        }
        Ok(&self.vmas)
    }

    fn keep(&mut self, maps: Vec<u8>, all: Mappings) -> Result<(), VmaError> {
        if let Some(&(range, reason)) = all.unsupported.first() {
            return Err(VmaError::Unsupported { pid: self.pid, range, reason });
        }
        self.vmas = without_overlaps(all.known.values().flatten().cloned().collect());
        self.text = if all.complete && all.maps == maps { maps } else { Vec::new() };
        self.known = all.known;
        Ok(())
    }

    /// What `maps` says, with what is known of its lines, and the flags that `ask` tells of the others.
    fn changed<E: From<VmaError>>(
        &self,
        maps: &[u8],
        ask: impl FnOnce(PageRange, &[VirtAddr]) -> Result<Vec<Option<VmFlags>>, E>,
    ) -> Result<Option<Mappings>, E> {
        let mappings = self.mappings("maps", maps)?;
        let vdso = mappings.iter().find(|map| map.pathname == MMapPath::Vdso).map(range);
        let mut all = Mappings { maps: maps.to_vec(), ..Mappings::default() };
        let mut changed = Vec::new();
        for (map, line) in mappings.into_iter().zip(lines(maps)) {
            match self.known.get_key_value(line) {
                Some((line, known)) => all.known.extend([(line.clone(), known.clone())]),
                // It is not among the process's mappings, so its flags cannot be told, and need not be.
                None if map.pathname == MMapPath::Vsyscall => self.add(map, line, &mut all),
                None => changed.push((map, line)),
            }
        }
        if changed.is_empty() {
            return Ok(Some(all));
        }
        let Some(vdso) = vdso else { return Ok(None) };
        let starts: Vec<VirtAddr> = changed.iter().map(|(map, _)| range(map).start).collect();
        let flags: Vec<VmFlags> = ask(vdso, &starts)?.into_iter().flatten().collect();
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

    fn parse(&self, smaps: &[u8]) -> Result<Mappings, VmaError> {
        let maps = maps_lines(smaps);
        let mut all = Mappings::default();
        for (map, line) in self.mappings("smaps", smaps)?.into_iter().zip(lines(&maps)) {
            self.add(map, line, &mut all);
        }
        all.maps = maps;
        Ok(all)
    }

    fn mappings(&self, file: &str, text: &[u8]) -> Result<MemoryMaps, VmaError> {
        MemoryMaps::from_read(text).map_err(|source| VmaError::Parse { path: self.path(file), source })
    }

    fn add(&self, map: MemoryMap, line: &[u8], all: &mut Mappings) {
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

/// All mappings of a process.
struct Mappings {
    /// Their lines in `maps`.
    maps: Vec<u8>,
    known: Known,
    unsupported: Vec<UnsupportedVma>,
    /// No mapping was gone before it could be looked at.
    complete: bool,
}

impl Default for Mappings {
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

/// Those of a mapping's `flags` that programs can change while it stands, and the others as they `were`: were those different
/// behind the last layout, the destination would map anew, and lose the pages.
pub fn changed_flags(were: VmaFlags, flags: VmFlags) -> VmaFlags {
    VmaFlags(were.0 & VmaFlags::FIXED | vma_flags(flags).0 & !VmaFlags::FIXED)
}

fn vma_flags(flags: VmFlags) -> VmaFlags {
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
    use std::process::{Child, Command};

    /// A process that does nothing.
    struct Sleeper(Child);

    impl Sleeper {
        fn start() -> Self {
            let sleeper = Self(Command::new("sleep").arg("1000").spawn().unwrap());
            // Not before it sleeps are its mappings what they will be (proc_pid_syscall(5)).
            let sleeps = format!("{} ", nix::libc::SYS_clock_nanosleep);
            while !read_file(&path(sleeper.pid(), "syscall")).unwrap().starts_with(sleeps.as_bytes()) {
                std::thread::yield_now();
            }
            sleeper
        }

        fn pid(&self) -> HostPid {
            HostPid(self.0.id() as i32)
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn smaps_has_the_lines_of_maps() {
        let smaps = b"55d0-55d4 r--p 00000000 fe:00 12 /bin/cat\nSize: 16 kB\nVmFlags: rd mr\nff60-ff61 --xp 0 00:00 0\n";
        let maps: &[u8] = b"55d0-55d4 r--p 00000000 fe:00 12 /bin/cat\nff60-ff61 --xp 0 00:00 0\n";
        assert_eq!(maps_lines(smaps), maps);
    }

    #[test]
    fn only_mappings_that_have_changed_are_asked_for() {
        let sleeper = Sleeper::start();
        let mut reader = VmaReader::new(sleeper.pid());
        reader.read().unwrap();
        // As if its line in `maps` were another one.
        let changed =
            reader.vmas.iter().find(|vma| vma.flags == VmaFlags(VmaFlags::GROWSDOWN)).unwrap().clone();
        let before = reader.vmas.clone();
        reader.known.retain(|_, vma| vma.as_ref() != Some(&changed));

        for (told, expected) in [(Some(VmFlags::DD), VmaFlags::DONTDUMP), (None, VmaFlags::GROWSDOWN)] {
            reader.text.clear();
            let mut asked = Vec::new();
            let vmas = reader.read_asking(|_vdso, mappings| {
                asked = mappings.to_vec();
                Ok::<_, VmaError>(vec![told; mappings.len()])
            });
            let expected = Vma { flags: VmaFlags(expected), ..changed.clone() };
            let expected: Vec<Vma> = before
                .iter()
                .map(|vma| if *vma == changed { expected.clone() } else { vma.clone() })
                .collect();
            assert_eq!((vmas.unwrap(), asked), (&expected[..], vec![changed.range.start]), "{told:?}");
            reader.known.retain(|_, vma| vma.as_ref().is_none_or(|vma| vma.range != changed.range));
        }

        reader.text.clear();
        reader.read().unwrap();
        reader.text.clear();
        let vmas = reader.read_asking(|_, _| -> Result<_, VmaError> { unreachable!("nothing has changed") });
        assert_eq!(vmas.unwrap(), before);
    }

    #[test]
    fn mappings_of_every_kind_are_understood() {
        let sleeper = Sleeper::start();
        let mut reader = VmaReader::new(sleeper.pid());
        let vmas = reader.read().unwrap();
        assert!(vmas.windows(2).all(|pair| pair[0].range.end() <= pair[1].range.start));
        let has = |backing: Backing| vmas.iter().any(|vma| vma.backing == backing);
        assert!(has(Backing::Special(SpecialMapping::Vdso)) && has(Backing::Special(SpecialMapping::Vvar)));
        assert!(vmas.iter().any(|vma| vma.flags.has(VmaFlags::GROWSDOWN)), "the stack");
        let exe = std::fs::read_link(path(sleeper.pid(), "exe")).unwrap().into_os_string().into_vec();
        let code = vmas.iter().find(|vma| matches!(&vma.backing, Backing::File { path, .. } if *path == exe));
        assert!(code.is_some());
    }
}
