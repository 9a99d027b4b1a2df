//! Which parts of a written page have really changed.
//!
//! Write tracking knows pages. A server that sets a counter or links an object in a list makes 4096 bytes dirty for the
//! sake of a few, and over a network the bytes are what counts. So the source remembers a digest of each sixteenth of every
//! page that it has sent, and of a page that was written again it sends the blocks whose digests differ. A copy of the
//! page would tell the changes more finely, but would take as much memory as the container; digests take 1/32 of it, more
//! where pages lie alone: they are kept for 64 neighbours at a time.
//!
//! # How sure is that?
//!
//! The digest is XXH64, whose 64 bits depend on every bit of a block and of a seed that is drawn anew for each migration. A
//! change is missed with a probability of about 2⁻⁶⁴, if the container does not look for collisions: with a million blocks
//! compared in each of a hundred rounds, once in 10¹¹ migrations, far less often than memory and network err. It is no
//! cryptographic hash. A program that did find collisions could deceive nobody but itself, about its own memory.
//!
//! # What the digests describe
//!
//! The contents that the destination has once it has applied everything sent so far, which is why one value belongs to one
//! connection and must be told ([`Digests::forget`]) of every page that the destination loses: because its mapping is made
//! anew, because it is reported absent, or because it was sent as zero, which may leave no page at all.

use pclive_wire::page_frame::{BLOCK_LEN, BLOCKS_PER_PAGE, BlockMask};
use pclive_wire::{PAGE_SIZE, PageRange, VirtAddr};
use std::collections::BTreeMap;
use xxhash_rust::xxh64::xxh64;

/// Pages whose digests are kept together.
const GROUP_PAGES: u64 = 64;

/// Draws the seed of one migration.
///
/// # Errors
/// When the kernel has no random numbers.
pub fn random_seed() -> Result<u64, getrandom::Error> {
    getrandom::u64()
}

/// What the destination has of one address space.
#[derive(Debug)]
pub struct Digests {
    seed: u64,
    /// By the number of the group.
    groups: BTreeMap<u64, Group>,
}

/// The pages of a group that are known, one bit each, and the digests of all of them.
#[derive(Debug)]
struct Group {
    known: u64,
    digests: Box<[[u64; BLOCKS_PER_PAGE]; GROUP_PAGES as usize]>,
}

const _: () = assert!(GROUP_PAGES == u64::BITS as u64);

impl Digests {
    /// Nothing is known.
    pub fn new(seed: u64) -> Self {
        Self { seed, groups: BTreeMap::new() }
    }

    /// Notes that `contents` is being sent as the page at `page`. Returns the blocks that the destination does not have
    /// yet: all of them if it does not have the page, `None` if it has them all.
    pub fn update(&mut self, page: VirtAddr, contents: &[u8]) -> Option<BlockMask> {
        let number = page.0 / PAGE_SIZE;
        let new_group = || Group { known: 0, digests: Box::new([[0; _]; _]) };
        let group = self.groups.entry(number / GROUP_PAGES).or_insert_with(new_group);
        let index = number % GROUP_PAGES;
        let digests = &mut group.digests[index as usize];
        let mut changed = 0;
        for (at, block) in contents.chunks_exact(BLOCK_LEN).enumerate() {
            let digest = xxh64(block, self.seed);
            if std::mem::replace(&mut digests[at], digest) != digest {
                changed |= 1 << at;
            }
        }
        let was_known = group.known & 1 << index != 0;
        group.known |= 1 << index;
        if was_known { BlockMask::new(changed) } else { Some(BlockMask::ALL) }
    }

    /// The destination does not have these pages any more.
    pub fn forget(&mut self, range: PageRange) {
        let (first, end) = (range.start.0 / PAGE_SIZE, range.end().0 / PAGE_SIZE);
        let groups = first / GROUP_PAGES..end.div_ceil(GROUP_PAGES);
        let mut empty = Vec::new();
        for (&number, group) in self.groups.range_mut(groups) {
            let start = number * GROUP_PAGES;
            for page in first.max(start)..end.min(start + GROUP_PAGES) {
                group.known &= !(1 << (page - start));
            }
            if group.known == 0 {
                empty.push(number);
            }
        }
        for number in empty {
            self.groups.remove(&number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: VirtAddr = VirtAddr(0x7000 * PAGE_SIZE);

    fn digests() -> Digests {
        Digests::new(random_seed().unwrap())
    }

    #[test]
    fn only_what_has_changed_is_sent_again() {
        let mut digests = digests();
        let mut page = vec![7; PAGE_SIZE as usize];
        assert_eq!(digests.update(PAGE, &page), Some(BlockMask::ALL));
        assert_eq!(digests.update(PAGE, &page), None);
        page[0] = 1;
        page[3 * BLOCK_LEN - 1] = 1;
        page[15 * BLOCK_LEN] = 1;
        assert_eq!(digests.update(PAGE, &page), BlockMask::new(0b1000_0000_0000_0101));
        assert_eq!(digests.update(PAGE, &page), None);
        assert_eq!(digests.update(PAGE.offset(PAGE_SIZE), &page), Some(BlockMask::ALL));
    }

    #[test]
    fn forgotten_pages_are_sent_whole() {
        let mut digests = digests();
        let page = vec![7; PAGE_SIZE as usize];
        let at = |number: u64| PAGE.offset(number * PAGE_SIZE);
        for number in 0..300 {
            digests.update(at(number), &page);
        }
        digests.forget(PageRange::new(at(10), 200));
        for number in 0..300 {
            let expected = (10..210).contains(&number).then_some(BlockMask::ALL);
            assert_eq!(digests.update(at(number), &page), expected, "page {number}");
        }
        digests.forget(PageRange::new(at(0), 300));
        assert!(digests.groups.is_empty());
        digests.forget(PageRange::new(VirtAddr(0), 1 << 35));
    }
}
