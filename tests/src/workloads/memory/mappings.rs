//! What the kernel says about the address space.

use nix::libc;
use std::ops::Range;

/// A line of `/proc/self/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Addresses.
    pub range: Range<usize>,
    /// `PROT_*` bits.
    pub prot: i32,
}

/// Parses `/proc/PID/maps`; lines that look otherwise are left out.
pub fn parse(maps: &str) -> Vec<Mapping> {
    let mapping = |line: &str| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let [start, end] = [start, end].map(|number| usize::from_str_radix(number, 16).ok());
        let bits = [(b'r', libc::PROT_READ), (b'w', libc::PROT_WRITE), (b'x', libc::PROT_EXEC)];
        let prot =
            rest.bytes().zip(bits).filter(|(found, (letter, _))| found == letter).map(|(_, (_, bit))| bit);
        Some(Mapping { range: start?..end?, prot: prot.fold(0, |all, bit| all | bit) })
    };
    maps.lines().filter_map(mapping).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_lines_are_parsed() {
        let text = "00400000-00402000 r-xp 00000000 08:01 12 /bin/x\n7f00-8000 rw-p 00000000 00:00 0 [heap]\nnonsense\n";
        let expected = vec![
            Mapping { range: 0x40_0000..0x40_2000, prot: 5 },
            Mapping { range: 0x7f00..0x8000, prot: 3 },
        ];
        assert_eq!(parse(text), expected);
    }
}
