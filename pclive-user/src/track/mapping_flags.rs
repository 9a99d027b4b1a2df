//! Asks the kernel for the flags of single mappings, by an eBPF program.
//!
//! `vm_flags` are no interface: their bits may be others on another kernel. So only those are used that mappings of pclive's own
//! have, and only if what they say of these is what `smaps` says. A mapping with any other bit is one whose flags nobody can tell.

use crate::capture::vmas::{FlagSource, range};
use aya::maps::{Array, MapData};
use aya::programs::raw_trace_point::RawTracePointLink;
use memmap2::{Advice, MmapMut, MmapOptions, MmapRaw};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use pclive_abi::{FLAG_QUESTION_WORDS, FlagQuestion};
use pclive_sys::mem::{lock_on_fault, wipe_on_fork};
use pclive_sys::uffd::{Features, Mode, Uffd};
use pclive_wire::{HostPid, PAGE_SIZE, PageRange, VirtAddr};
use procfs::process::{MMapPath, MemoryMap, Process, VmFlags};
use std::fs::File;
use std::{fmt, io};

/// Bits of `vm_flags` (include/linux/mm.h), by what `smaps` calls them. It has no name for pages that are locked when they are
/// touched; such mappings are locked, too.
const BITS: [(u64, VmFlags); 25] = [
    (1, VmFlags::RD),
    (1 << 1, VmFlags::WR),
    (1 << 2, VmFlags::EX),
    (1 << 4, VmFlags::MR),
    (1 << 5, VmFlags::MW),
    (1 << 6, VmFlags::ME),
    (1 << 7, VmFlags::MS),
    (1 << 8, VmFlags::GD),
    (1 << 10, VmFlags::PF),
    (1 << 12, VmFlags::UW),
    (1 << 13, VmFlags::LO),
    (1 << 14, VmFlags::IO),
    (1 << 15, VmFlags::SR),
    (1 << 16, VmFlags::RR),
    (1 << 17, VmFlags::DC),
    (1 << 18, VmFlags::DE),
    (1 << 19, VmFlags::empty()),
    (1 << 20, VmFlags::AC),
    (1 << 21, VmFlags::NR),
    (1 << 25, VmFlags::WF),
    (1 << 26, VmFlags::DD),
    (1 << 27, VmFlags::SD),
    (1 << 29, VmFlags::HG),
    (1 << 30, VmFlags::NH),
    (1 << 31, VmFlags::MG),
];

/// Mappings that can be asked for at once.
const MOST: usize = FLAG_QUESTION_WORDS - 1;

/// The eBPF program `sched_process_wait`, attached, and where it is asked.
pub struct MappingFlags {
    question: Array<MapData, FlagQuestion>,
    /// The bits that have been seen to mean what they are taken for.
    tried: u64,
    _attached: RawTracePointLink,
}

impl MappingFlags {
    /// `None` if what the attached program says of mappings of our own is not what `smaps` says. It is tried again, for another
    /// thread of ours that waits for a child just then would answer, too, and take answers for addresses.
    pub(super) fn new(question: Array<MapData, FlagQuestion>, attached: RawTracePointLink) -> Option<Self> {
        const TRIALS: usize = 3;
        let mut flags = Self { question, tried: 0, _attached: attached };
        flags.tried = (0..TRIALS).find_map(|_| flags.try_on_our_own())?;
        Some(flags)
    }

    /// The bits of our own mappings, if they are as `smaps` says.
    fn try_on_our_own(&mut self) -> Option<u64> {
        let failed = |error: &io::Error| tracing::debug!(%error, "no mappings to try flags with");
        let samples = Samples::new().inspect_err(failed).ok()?;
        let said = samples.by_smaps().inspect_err(failed).ok()?;
        let (at, said): (Vec<VirtAddr>, Vec<VmFlags>) = said.into_iter().unzip();
        let us = Pid::this();
        self.pose(HostPid(us.as_raw()), &at);
        // Nobody is a child of its own.
        let _ = waitpid(us, Some(WaitPidFlag::WNOHANG));
        let found = self.answer(at.len());
        let named: Vec<VmFlags> = found.iter().filter_map(|&bits| named(bits)).collect();
        if named != said {
            tracing::debug!(?at, ?said, ?found, "eBPF and smaps do not agree on flags of mappings");
            return None;
        }
        Some(found.into_iter().fold(0, |all, bits| all | bits))
    }

    /// The raw answer for each of `mappings`; nothing if nobody has answered.
    fn answer(&self, mappings: usize) -> Vec<u64> {
        match self.question.get(&0, 0) {
            Ok(answer) if answer[0] == 0 => answer[1..].iter().take(mappings).copied().collect(),
            _ => Vec::new(),
        }
    }
}

impl FlagSource for MappingFlags {
    fn pose(&mut self, pid: HostPid, mappings: &[VirtAddr]) {
        let mut question: FlagQuestion = [0; FLAG_QUESTION_WORDS];
        question[0] = u64::from(pid.0 as u32) | (mappings.len().min(MOST) as u64) << 32;
        question[1..].iter_mut().zip(mappings).for_each(|(place, mapping)| *place = mapping.0);
        if let Err(error) = self.question.set(0, question, 0) {
            tracing::debug!(%error, "cannot ask for flags of mappings");
        }
    }

    fn answers(&mut self, mappings: usize) -> Vec<Option<VmFlags>> {
        let tried = |bits: &u64| bits & !self.tried == 0;
        let mut answers: Vec<_> =
            self.answer(mappings).into_iter().map(|bits| Some(bits).filter(tried).and_then(named)).collect();
        answers.resize(mappings, None);
        answers
    }
}

impl fmt::Debug for MappingFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MappingFlags")
    }
}

/// The names of the flags; `None` if one has none here, or the mapping was not found.
fn named(bits: u64) -> Option<VmFlags> {
    let known = BITS.into_iter().filter(|(bit, _)| bits & bit != 0);
    let (known, names) =
        known.fold((0, VmFlags::empty()), |(known, names), (bit, name)| (known | bit, names | name));
    (bits != 0 && bits == known).then_some(names)
}

/// Mappings of our own, one with each flag that a process can set without harm.
struct Samples {
    made: Vec<MmapMut>,
    shared: MmapRaw,
    /// Keeps its mapping protected.
    _uffd: Uffd,
}

impl Samples {
    fn new() -> io::Result<Self> {
        const ADVICE: [Advice; 7] = [
            Advice::DontFork,
            Advice::DontDump,
            Advice::HugePage,
            Advice::NoHugePage,
            Advice::Mergeable,
            Advice::Sequential,
            Advice::Random,
        ];
        let plain = || MmapMut::map_anon(PAGE_SIZE as usize);
        let unreserved = MmapOptions::new().len(PAGE_SIZE as usize).no_reserve_swap().map_anon()?;
        let (locked, locked_on_fault, wiped, protected) = (plain()?, plain()?, plain()?, plain()?);
        locked.lock()?;
        lock_on_fault(&locked_on_fault)?;
        wipe_on_fork(&wiped)?;
        let uffd = Uffd::of_self(Features::TRACKING).map_err(io::Error::other)?;
        let protect = uffd.register(PageRange::new(start(&protected), 1), Mode::WriteProtect);
        protect.map_err(io::Error::other)?;
        let mut made = vec![plain()?, unreserved, locked, locked_on_fault, wiped, protected];
        for advice in ADVICE {
            let sample = plain()?;
            // Some kernels do not have all.
            if sample.advise(advice).is_ok() {
                made.push(sample);
            }
        }
        let program = File::open("/proc/self/exe")?;
        let shared = MmapOptions::new().len(PAGE_SIZE as usize).map_raw_read_only(&program)?;
        Ok(Self { made, shared, _uffd: uffd })
    }

    /// An address in each, and in those of our mappings that are there from the beginning, and what `smaps` says of them.
    fn by_smaps(&self) -> io::Result<Vec<(VirtAddr, VmFlags)>> {
        let smaps = Process::myself().and_then(|us| us.smaps()).map_err(io::Error::other)?;
        let with_flags = |mapping: &MemoryMap, at| (at, mapping.extension.vm_flags);
        let lasting = smaps.iter().filter_map(|mapping| match &mapping.pathname {
            MMapPath::Vdso | MMapPath::Vvar => Some(with_flags(mapping, range(mapping).start)),
            MMapPath::Path(file) if file.is_absolute() => Some(with_flags(mapping, range(mapping).start)),
            // Its beginning moves.
            MMapPath::Stack => Some(with_flags(mapping, VirtAddr(mapping.address.1 - PAGE_SIZE))),
            _ => None,
        });
        let shared = VirtAddr(self.shared.as_ptr() as u64);
        let made = self.made.iter().map(start).chain([shared]).map(|at| {
            let mapping = smaps.iter().find(|mapping| range(mapping).contains(&PageRange::new(at, 1)));
            mapping.map(|mapping| with_flags(mapping, at)).ok_or(io::Error::other("a mapping is missing"))
        });
        made.chain(lasting.map(Ok)).collect()
    }
}

fn start(sample: &MmapMut) -> VirtAddr {
    VirtAddr(sample.as_ptr() as u64)
}
