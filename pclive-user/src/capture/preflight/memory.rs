//! Mappings that cannot be moved, with names for the reasons.

use super::{PreflightError, read};
use crate::capture::vmas::VmaReader;
use crate::capture::{Obstacles, SourceProcess};
use pclive_wire::VirtAddr;
use std::collections::{BTreeSet, HashMap};

/// Mappings that belong to an object in the kernel: how their name starts, what they are, what helps.
const OBJECTS: [(&str, &str, &str); 4] = [
    (
        "/[aio]",
        "the ring of an AIO context (io_setup), which lives in the kernel",
        "have the program use threads or plain reads and writes",
    ),
    (
        "anon_inode:[io_uring]",
        "the rings of an io_uring, which live in the kernel",
        "have the program use epoll or threads",
    ),
    ("anon_inode:[perf_event]", "the buffer of a perf event", "stop profiling"),
    ("anon_inode:bpf-map", "a mapped BPF map", "run the BPF tool outside the container"),
];

/// Flags of a mapping that pclive cannot restore: the code in smaps' `VmFlags` (proc_pid_smaps(5)), what it means, what helps.
const FLAGS: [(&str, &str, &str); 4] = [
    (
        "um",
        "the program handles page faults there itself (userfaultfd)",
        "turn that feature of the program off",
    ),
    ("uw", "the program tracks writes there itself (userfaultfd)", "turn that feature of the program off"),
    (
        "ui",
        "the program handles minor page faults there itself (userfaultfd)",
        "turn that feature of the program off",
    ),
    (
        "ss",
        "a shadow stack, which is not moved yet",
        "run the program with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off",
    ),
];

/// Adds the mappings of a process that cannot be moved.
pub(super) fn survey(process: &SourceProcess, obstacles: &mut Obstacles) -> Result<(), PreflightError> {
    let smaps = read(process.pid, "smaps")?;
    let names: HashMap<u64, &str> = smaps.lines().filter_map(parse_header).collect();
    for (range, reason) in VmaReader::new(process.pid).survey(&smaps)? {
        let name = names.get(&range.start.0).copied().unwrap_or_default();
        let known = OBJECTS.iter().find(|(start, ..)| name.starts_with(start));
        let (reason, remedy) = match known {
            Some((_, reason, remedy)) => ((*reason).to_owned(), *remedy),
            None if name.is_empty() => (reason.to_owned(), "turn off the feature that uses it"),
            None => (format!("{reason} ({name})"), "turn off the feature that uses it"),
        };
        obstacles.add(process.ns_pid, format!("mapping {range}"), reason, remedy);
    }
    for (start, flag) in parse_attributes(&smaps) {
        let (reason, remedy) = match flag {
            Attribute::Flag(at) => (FLAGS[at].1, FLAGS[at].2),
            Attribute::ProtectionKey => (
                "memory with a protection key (pkey_mprotect), which is not moved yet",
                "turn off that feature of the program",
            ),
        };
        obstacles.add(process.ns_pid, format!("mapping {start}"), reason, remedy);
    }
    Ok(())
}

/// Something about a mapping that stands in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Attribute {
    /// An index into [`FLAGS`].
    Flag(usize),
    ProtectionKey,
}

/// The attributes that stand in the way, with the start of the first mapping that has each.
fn parse_attributes(smaps: &str) -> Vec<(VirtAddr, Attribute)> {
    let mut start = 0;
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for line in smaps.lines() {
        if let Some((address, _)) = parse_header(line) {
            start = address;
            continue;
        }
        let attributes: Vec<Attribute> = if let Some(codes) = line.strip_prefix("VmFlags:") {
            let at = |code| FLAGS.iter().position(|(flag, ..)| *flag == code);
            codes.split_whitespace().filter_map(at).map(Attribute::Flag).collect()
        } else if line.strip_prefix("ProtectionKey:").is_some_and(|key| key.trim() != "0") {
            vec![Attribute::ProtectionKey]
        } else {
            continue;
        };
        found
            .extend(attributes.into_iter().filter(|&new| seen.insert(new)).map(|new| (VirtAddr(start), new)));
    }
    found
}

/// Start address and name from the first line of a mapping.
fn parse_header(line: &str) -> Option<(u64, &str)> {
    let (range, rest) = line.split_once(' ')?;
    let (start, _) = range.split_once('-')?;
    let start = u64::from_str_radix(start, 16).ok()?;
    // perms, offset, device, inode, name
    let name = rest.splitn(5, ' ').nth(4).unwrap_or_default().trim_start();
    Some((start, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0000002000 rw-s 00000000 00:12 55                         /[aio] (deleted)
Size:                  8 kB
ProtectionKey:         0
VmFlags: rd wr sh mr mw me ms de sd
7f0000400000-7f0000500000 rw-p 00000000 00:00 0
Size:               1024 kB
VmFlags: rd wr mr mw me ac um uw sd
ProtectionKey:         3
7f0000500000-7f0000600000 rw-p 00000000 00:00 0
VmFlags: rd wr mr mw me ac uw sd ss
";

    #[test]
    fn names_and_attributes_of_mappings() {
        let names: Vec<_> = SMAPS.lines().filter_map(parse_header).collect();
        assert_eq!(names, [(0x7f0000000000, "/[aio] (deleted)"), (0x7f0000400000, ""), (0x7f0000500000, "")]);
        let (first, second) = (VirtAddr(0x7f0000400000), VirtAddr(0x7f0000500000));
        let found = [
            (first, Attribute::Flag(0)),
            (first, Attribute::Flag(1)),
            (first, Attribute::ProtectionKey),
            (second, Attribute::Flag(3)),
        ];
        assert_eq!(parse_attributes(SMAPS), found);
    }
}
