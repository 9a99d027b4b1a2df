//! Asks the kernel for the flags of single mappings, by an eBPF program.
//!
//! `vm_flags` are no interface: their bits may be others on another kernel. So the answers are used only if what they say of
//! mappings of pclive's own is what `smaps` says of these, and a bit that none of them has leaves a question unanswered.

use crate::capture::vmas::{FlagSource, range};
use aya::maps::{Array, MapData};
use memmap2::{Advice, MmapMut, MmapOptions};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use pclive_abi::{FLAG_QUESTION_WORDS, FlagQuestion};
use pclive_sys::uffd::{Features, Mode, Uffd};
use pclive_wire::{HostPid, PAGE_SIZE, PageRange, VirtAddr};
use procfs::process::{MMapPath, MemoryMap, Process, VmFlags};
use std::fmt;

/// The bits of `vm_flags` (include/linux/mm.h) that [`Samples`] have, by what `smaps` calls them.
const BITS: [(u64, VmFlags); 22] = [
    (1, VmFlags::RD),
    (1 << 1, VmFlags::WR),
    (1 << 2, VmFlags::EX),
    (1 << 4, VmFlags::MR),
    (1 << 5, VmFlags::MW),
    (1 << 6, VmFlags::ME),
    (1 << 8, VmFlags::GD),
    (1 << 10, VmFlags::PF),
    (1 << 12, VmFlags::UW),
    (1 << 13, VmFlags::LO),
    (1 << 14, VmFlags::IO),
    (1 << 15, VmFlags::SR),
    (1 << 16, VmFlags::RR),
    (1 << 17, VmFlags::DC),
    (1 << 18, VmFlags::DE),
    (1 << 20, VmFlags::AC),
    (1 << 21, VmFlags::NR),
    (1 << 26, VmFlags::DD),
    (1 << 27, VmFlags::SD),
    (1 << 29, VmFlags::HG),
    (1 << 30, VmFlags::NH),
    (1 << 31, VmFlags::MG),
];

/// The eBPF program `sched_process_wait`, attached, and where it is asked.
pub struct MappingFlags {
    question: Array<MapData, FlagQuestion>,
}

impl MappingFlags {
    /// `None` if what the attached program says of mappings of our own is not what `smaps` says.
    pub(super) fn tried(question: Array<MapData, FlagQuestion>) -> Option<Self> {
        let mut flags = Self { question };
        flags.knows_our_own().then_some(flags)
    }

    fn knows_our_own(&mut self) -> bool {
        let Some(samples) = Samples::new() else { return false };
        let Some(said) = samples.by_smaps() else { return false };
        let (at, said): (Vec<VirtAddr>, Vec<VmFlags>) = said.into_iter().unzip();
        let us = Pid::this();
        // Nobody is a child of its own.
        let mut wait = || {
            let _ = waitpid(us, Some(WaitPidFlag::WNOHANG));
        };
        let found = self.flags(HostPid(us.as_raw()), &at, &mut wait);
        let agree = found.iter().flatten().eq(&said);
        if !agree {
            tracing::debug!(?at, ?said, ?found, "eBPF and smaps do not agree on flags of mappings");
        }
        agree
    }
}

impl FlagSource for MappingFlags {
    fn flags(&mut self, pid: HostPid, mappings: &[VirtAddr], wait: &mut dyn FnMut()) -> Vec<Option<VmFlags>> {
        let mappings = &mappings[..mappings.len().min(FLAG_QUESTION_WORDS - 1)];
        let mut question: FlagQuestion = [0; FLAG_QUESTION_WORDS];
        question[0] = u64::from(pid.0 as u32) | (mappings.len() as u64) << 32;
        question[1..].iter_mut().zip(mappings).for_each(|(place, mapping)| *place = mapping.0);
        let asked = self.question.set(0, question, 0);
        wait();
        match asked.and_then(|()| self.question.get(&0, 0)) {
            Ok(answer) if answer[0] == 0 => {
                answer[1..=mappings.len()].iter().map(|&bits| named(bits)).collect()
            }
            _ => Vec::new(),
        }
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
    /// Keeps its mapping protected.
    _uffd: Uffd,
}

impl Samples {
    fn new() -> Option<Self> {
        const ADVICE: [Advice; 7] = [
            Advice::DontFork,
            Advice::DontDump,
            Advice::HugePage,
            Advice::NoHugePage,
            Advice::Mergeable,
            Advice::Sequential,
            Advice::Random,
        ];
        let plain = || MmapMut::map_anon(PAGE_SIZE as usize).ok();
        let unreserved = MmapOptions::new().len(PAGE_SIZE as usize).no_reserve_swap().map_anon().ok()?;
        let (locked, protected) = (plain()?, plain()?);
        locked.lock().ok()?;
        let uffd = Uffd::of_self(Features::TRACKING).ok()?;
        uffd.register(PageRange::new(start(&protected), 1), Mode::WriteProtect).ok()?;
        let mut made = vec![plain()?, unreserved, locked, protected];
        for advice in ADVICE {
            let sample = plain()?;
            // What a kernel does not have it sets nowhere.
            if sample.advise(advice).is_ok() {
                made.push(sample);
            }
        }
        Some(Self { made, _uffd: uffd })
    }

    /// An address in each, and in those of our mappings that are there from the beginning, and what `smaps` says of them.
    fn by_smaps(&self) -> Option<Vec<(VirtAddr, VmFlags)>> {
        let smaps = Process::myself().ok()?.smaps().ok()?;
        let with_flags = |mapping: &MemoryMap, at| (at, mapping.extension.vm_flags);
        let lasting = smaps.iter().filter_map(|mapping| match &mapping.pathname {
            MMapPath::Vdso | MMapPath::Vvar => Some(with_flags(mapping, range(mapping).start)),
            MMapPath::Path(file) if file.is_absolute() => Some(with_flags(mapping, range(mapping).start)),
            // Its beginning moves.
            MMapPath::Stack => Some(with_flags(mapping, VirtAddr(mapping.address.1 - PAGE_SIZE))),
            _ => None,
        });
        let made = self.made.iter().map(|sample| {
            let page = PageRange::new(start(sample), 1);
            let mapping = smaps.iter().find(|mapping| range(mapping).contains(&page))?;
            Some(with_flags(mapping, page.start))
        });
        made.chain(lasting.map(Some)).collect()
    }
}

fn start(sample: &MmapMut) -> VirtAddr {
    VirtAddr(sample.as_ptr() as u64)
}
