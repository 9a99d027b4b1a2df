//! Newtypes for the quantities that must never be mixed up: addresses, page ranges, process ids and rounds.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes in a base page. pclive supports x86-64 only; larger pages are seen as runs of base pages.
pub const PAGE_SIZE: u64 = 4096;

/// First address above the user half of the address space (4-level paging; `TASK_SIZE_MAX` rounded up).
pub const USER_END: u64 = 1 << 47;

/// A virtual address in some process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct VirtAddr(pub u64);

impl VirtAddr {
    /// The address rounded down to its page.
    pub fn page_floor(self) -> Self {
        Self(self.0 & !(PAGE_SIZE - 1))
    }

    /// The address rounded up to its page.
    pub fn page_ceil(self) -> Self {
        Self(self.0.next_multiple_of(PAGE_SIZE))
    }

    /// Whether the address is a multiple of the page size.
    pub fn is_page_aligned(self) -> bool {
        self.0.is_multiple_of(PAGE_SIZE)
    }

    /// The address `bytes` further up.
    pub fn offset(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

impl fmt::Debug for VirtAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for VirtAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A run of whole pages: page-aligned start, length in pages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageRange {
    /// First address; page-aligned.
    pub start: VirtAddr,
    /// Length in pages.
    pub pages: u64,
}

impl PageRange {
    /// A range from `start` (page-aligned) of `pages` pages.
    pub fn new(start: VirtAddr, pages: u64) -> Self {
        debug_assert!(start.is_page_aligned());
        Self { start, pages }
    }

    /// The range between two page-aligned addresses; empty if `end <= start`.
    pub fn between(start: VirtAddr, end: VirtAddr) -> Self {
        Self::new(start, end.0.saturating_sub(start.0) / PAGE_SIZE)
    }

    /// First address after the range.
    pub fn end(&self) -> VirtAddr {
        VirtAddr(self.start.0 + self.bytes())
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE
    }

    /// Whether the range has no pages.
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// Whether `other` lies inside this range.
    pub fn contains(&self, other: &PageRange) -> bool {
        self.start <= other.start && other.end() <= self.end()
    }

    /// The pages that both ranges have, if any.
    pub fn intersection(&self, other: &PageRange) -> Option<PageRange> {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        (start < end).then(|| PageRange::between(start, end))
    }

    /// Whether the range, taken from a peer, is aligned, not empty, and inside the user address space.
    pub fn is_valid_user_range(&self) -> bool {
        self.start.is_page_aligned()
            && self.pages > 0
            && self.pages <= USER_END / PAGE_SIZE
            && self.start.0 <= USER_END - self.bytes()
    }
}

impl fmt::Debug for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.start, self.end())
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(/// A process or thread id as the host's pid namespace (pclive's own) sees it.
    HostPid(i32));
id!(/// A process or thread id as the container's pid namespace sees it; the same on both hosts.
    NsPid(i32));
id!(/// One pass over a dirty set; round 0 sends every populated page.
    Round(u32));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_from_a_peer_is_checked_for_alignment_emptiness_and_overflow() {
        let range = |start, pages| PageRange { start: VirtAddr(start), pages };
        assert!(range(0x1000, 1).is_valid_user_range());
        assert!(range(USER_END - PAGE_SIZE, 1).is_valid_user_range());
        for (start, pages) in [(0x1001, 1), (0x1000, 0), (USER_END, 1), (0x1000, u64::MAX), (!0xfff, 2)] {
            assert!(!range(start, pages).is_valid_user_range(), "{start:#x}+{pages}");
        }
    }

    #[test]
    fn intersection_is_the_overlap() {
        let range = |a: u64, b: u64| PageRange::between(VirtAddr(a << 12), VirtAddr(b << 12));
        assert_eq!(range(1, 5).intersection(&range(3, 9)), Some(range(3, 5)));
        assert_eq!(range(1, 3).intersection(&range(3, 9)), None);
        assert!(range(1, 9).contains(&range(3, 9)));
        assert!(!range(1, 8).contains(&range(3, 9)));
    }
}
