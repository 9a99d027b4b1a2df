//! A mapping together with what every byte of it must be: the shadow.
//!
//! The shadow is kept per [sector](SECTORS): a number from which, with the page's own number, all of its bytes follow.
//! Numbers stay with the page when `mremap(2)` moves it, so a page that turns up in the wrong place is noticed as well
//! as one that holds an older version of itself.

use super::mappings::Mapping;
use super::span::{PAGE, Page, Span, WORDS};
use crate::workloads::pattern::mix;
use nix::libc;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Parts of a page that are written separately.
pub const SECTORS: usize = 4;
const SECTOR_WORDS: usize = WORDS / SECTORS;
/// An odd number that tells the words of a sector apart.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Never written since it was mapped or dropped: zeros, or the file's bytes.
    Backing,
    /// Zeros that were written.
    Zeros,
    /// The pattern of this version.
    Version(u32),
    /// The pattern of this version, until the kernel makes zeros of it (`MADV_FREE`).
    Freed(u32),
}

/// What may be done with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names say it
pub enum Access {
    Write,
    Read,
    None,
    /// `MADV_GUARD_INSTALL` (Linux 6.13): not accessible, although the mapping is.
    Guard,
}

impl Access {
    /// The `PROT_*` bits of the mapping.
    pub fn prot(self) -> i32 {
        match self {
            Access::Write | Access::Guard => libc::PROT_READ | libc::PROT_WRITE,
            Access::Read => libc::PROT_READ,
            Access::None => libc::PROT_NONE,
        }
    }
}

/// How a region came to be, which decides what can be done with it.
#[derive(Clone, Debug)]
#[allow(missing_docs)] // the names say it
pub enum Kind {
    Anonymous,
    Heap,
    Shared,
    /// A private mapping that starts at this page of the file.
    File(Arc<FilePages>, usize),
}

/// A file that is mapped privately, and a copy of its contents to compare with.
#[derive(Debug)]
pub struct FilePages {
    /// Open for reading.
    pub file: File,
    pages: Vec<Page>,
}

impl FilePages {
    /// Reads up to `limit` whole pages.
    ///
    /// # Errors
    /// Those of `pread(2)`.
    pub fn read(file: File, limit: usize) -> std::io::Result<Self> {
        let whole = (file.metadata()?.len() as usize / PAGE).min(limit);
        let mut pages = Vec::with_capacity(whole);
        for index in 0..whole {
            let mut bytes = [0; PAGE];
            file.read_exact_at(&mut bytes, (index * PAGE) as u64)?;
            pages.push(std::array::from_fn(|word| {
                u64::from_le_bytes(std::array::from_fn(|byte| bytes[word * 8 + byte]))
            }));
        }
        Ok(FilePages { file, pages })
    }

    /// How many whole pages it has.
    pub fn count(&self) -> usize {
        self.pages.len()
    }
}

/// Memory and its shadow.
#[derive(Debug)]
pub struct Region {
    /// The memory.
    pub span: Span,
    /// What it is.
    pub kind: Kind,
    /// Page numbers: `first`, `first + 1` …; no two pages of a process ever have the same.
    first: u64,
    contents: Vec<[Content; SECTORS]>,
    access: Vec<Access>,
}

/// The first byte that is not what it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    address: usize,
    expected: String,
    found: String,
    what: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} ({}): expected {}, found {}", self.address, self.what, self.expected, self.found)
    }
}

impl Region {
    /// A region of fresh memory whose pages are numbered from `first`.
    pub fn new(span: Span, kind: Kind, first: u64) -> Self {
        let pages = span.pages();
        Region {
            span,
            kind,
            first,
            contents: vec![[Content::Backing; SECTORS]; pages],
            access: vec![Access::Write; pages],
        }
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.access.len()
    }

    /// The pages from `page` on with the same access, `limit` at most.
    pub fn run(&self, page: usize, limit: usize) -> Range<usize> {
        let length =
            self.access[page..].iter().take(limit).take_while(|&&access| access == self.access[page]).count();
        page..page + length
    }

    /// What may be done with a page.
    pub fn access(&self, page: usize) -> Access {
        self.access[page]
    }

    /// Whether any of the pages has this access.
    pub fn any(&self, pages: Range<usize>, access: Access) -> bool {
        self.access[pages].contains(&access)
    }

    /// Writes new patterns over whole pages.
    pub fn write(&mut self, pages: Range<usize>, version: u32) {
        for page in pages {
            for sector in 0..SECTORS {
                self.write_sector(page, sector, Content::Version(version));
            }
        }
    }

    /// Writes one sector: a pattern or zeros.
    pub fn write_sector(&mut self, page: usize, sector: usize, content: Content) {
        let number = self.first + page as u64;
        let words = &mut self.span.page_mut(page)[sector_words(sector)];
        match content {
            Content::Version(version) => {
                for (index, word) in words.iter_mut().enumerate() {
                    *word = pattern(number, version, sector, index);
                }
            }
            _ => words.fill(0),
        }
        self.contents[page][sector] = content;
    }

    /// Makes `access` true of the pages.
    ///
    /// # Errors
    /// Those of `mprotect(2)`.
    pub fn protect(&mut self, pages: Range<usize>, access: Access) -> std::io::Result<()> {
        self.span.protect(pages.clone(), access.prot())?;
        self.access[pages].fill(access);
        Ok(())
    }

    /// Installs guards, which drop the contents, or removes them.
    ///
    /// # Errors
    /// Those of `madvise(2)`: EINVAL before Linux 6.13.
    pub fn guard(&mut self, pages: Range<usize>, install: bool) -> std::io::Result<()> {
        const MADV_GUARD_INSTALL: i32 = 102;
        const MADV_GUARD_REMOVE: i32 = 103;
        let (advice, access) =
            if install { (MADV_GUARD_INSTALL, Access::Guard) } else { (MADV_GUARD_REMOVE, Access::Write) };
        self.span.advise(pages.clone(), advice)?;
        self.access[pages.clone()].fill(access);
        self.contents[pages].fill([Content::Backing; SECTORS]);
        Ok(())
    }

    /// Drops the contents: `MADV_DONTNEED`, or for shared memory, which would keep them, `MADV_REMOVE`.
    ///
    /// # Errors
    /// Those of `madvise(2)`.
    pub fn discard(&mut self, pages: Range<usize>) -> std::io::Result<()> {
        let shared = matches!(self.kind, Kind::Shared);
        self.span.advise(pages.clone(), if shared { libc::MADV_REMOVE } else { libc::MADV_DONTNEED })?;
        self.contents[pages].fill([Content::Backing; SECTORS]);
        Ok(())
    }

    /// Lets the kernel drop the contents when it wants to (`MADV_FREE`).
    ///
    /// # Errors
    /// Those of `madvise(2)`.
    pub fn free_lazily(&mut self, pages: Range<usize>) -> std::io::Result<()> {
        self.span.advise(pages.clone(), libc::MADV_FREE)?;
        for sector in self.contents[pages].iter_mut().flatten() {
            if let Content::Version(version) = *sector {
                *sector = Content::Freed(version);
            }
        }
        Ok(())
    }

    /// Grows or shrinks; the kernel may move it.
    ///
    /// # Errors
    /// Those of `mremap(2)`; then nothing has changed.
    pub fn resize(&mut self, pages: usize) -> std::io::Result<()> {
        self.span.resize(pages)?;
        self.contents.resize(pages, [Content::Backing; SECTORS]);
        self.access.resize(pages, Access::Write);
        Ok(())
    }

    /// Cuts before page `at`.
    pub fn split(self, at: usize) -> (Self, Self) {
        let Region { span, kind, first, mut contents, mut access } = self;
        let (head, tail) = span.split(at);
        let tail_kind = match &kind {
            Kind::File(file, offset) => Kind::File(Arc::clone(file), offset + at),
            other => other.clone(),
        };
        let (tail_contents, tail_access) = (contents.split_off(at), access.split_off(at));
        (
            Region { span: head, kind, first, contents, access },
            Region {
                span: tail,
                kind: tail_kind,
                first: first + at as u64,
                contents: tail_contents,
                access: tail_access,
            },
        )
    }

    /// Compares every byte of the pages; pages without access get it for the moment.
    ///
    /// # Errors
    /// The first byte that differs.
    pub fn verify(&mut self, pages: Range<usize>) -> Result<(), Difference> {
        let mut page = pages.start;
        while page < pages.end {
            let run = self.run(page, pages.end - page);
            page = run.end;
            match self.access(run.start) {
                Access::Guard => self.verify_guards(run)?,
                Access::None => {
                    self.lift_protection(&run, libc::PROT_READ)?;
                    let result = self.verify_readable(run.clone());
                    self.lift_protection(&run, libc::PROT_NONE)?;
                    result?;
                }
                Access::Read | Access::Write => self.verify_readable(run)?,
            }
        }
        Ok(())
    }

    fn lift_protection(&mut self, pages: &Range<usize>, prot: i32) -> Result<(), Difference> {
        self.span
            .protect(pages.clone(), prot)
            .map_err(|error| self.difference(pages.start, 0, "mprotect to succeed".into(), error.to_string()))
    }

    fn verify_guards(&self, mut pages: Range<usize>) -> Result<(), Difference> {
        match pages.find(|&page| self.span.is_readable(page)) {
            Some(page) => Err(self.difference(page, 0, "a guard".into(), "a readable page".into())),
            None => Ok(()),
        }
    }

    fn verify_readable(&self, pages: Range<usize>) -> Result<(), Difference> {
        for page in pages {
            let found = self.span.page(page);
            for sector in 0..SECTORS {
                let content = self.contents[page][sector];
                let freed = matches!(content, Content::Freed(_))
                    && found[sector_words(sector)].iter().all(|&w| w == 0);
                if !freed {
                    self.verify_sector(page, sector, content, &found[sector_words(sector)])?;
                }
            }
        }
        Ok(())
    }

    fn verify_sector(
        &self,
        page: usize,
        sector: usize,
        content: Content,
        found: &[u64],
    ) -> Result<(), Difference> {
        let number = self.first + page as u64;
        let wrong = match content {
            Content::Zeros => found.iter().position(|&word| word != 0).map(|index| (index, 0)),
            Content::Backing => {
                let backing = self.backing(page);
                (0..SECTOR_WORDS)
                    .map(|index| (index, backing.map_or(0, |page| page[sector * SECTOR_WORDS + index])))
                    .find(|&(index, word)| found[index] != word)
            }
            Content::Version(version) | Content::Freed(version) => (0..SECTOR_WORDS)
                .map(|index| (index, pattern(number, version, sector, index)))
                .find(|&(index, word)| found[index] != word),
        };
        let Some((index, expected)) = wrong else { return Ok(()) };
        let byte = ((found[index] ^ expected).trailing_zeros() / 8) as usize;
        let offset = (sector * SECTOR_WORDS + index) * 8 + byte;
        let [expected, found] =
            [expected, found[index]].map(|word| format!("{:#04x}", word.to_le_bytes()[byte]));
        Err(self.difference(page, offset, expected, found))
    }

    /// The page of the file below a private mapping.
    fn backing(&self, page: usize) -> Option<&Page> {
        match &self.kind {
            Kind::File(file, offset) => Some(&file.pages[offset + page]),
            _ => None,
        }
    }

    fn difference(&self, page: usize, offset: usize, expected: String, found: String) -> Difference {
        let kind = match &self.kind {
            Kind::File(_, offset) => format!("file page {}", offset + page),
            kind => format!("{kind:?}").to_lowercase(),
        };
        Difference {
            address: self.span.address() + page * PAGE + offset,
            expected,
            found,
            what: format!(
                "{kind}, page {page} of {}, {:?}, {:?}",
                self.pages(),
                self.access[page],
                self.contents[page][offset / (PAGE / SECTORS)]
            ),
        }
    }

    /// Compares what the kernel says about the mappings, from [`parse`](super::mappings::parse), with what it must be.
    ///
    /// # Errors
    /// The first page whose protection is not what it must be.
    pub fn verify_protection(&self, mappings: &[Mapping]) -> Result<(), Difference> {
        let mut page = 0;
        while page < self.pages() {
            let address = self.span.address() + page * PAGE;
            let index = mappings.partition_point(|mapping| mapping.range.end <= address);
            let found = mappings.get(index).filter(|mapping| mapping.range.contains(&address));
            let prot = found.map(|mapping| mapping.prot);
            if prot != Some(self.access[page].prot()) {
                return Err(self.difference(
                    page,
                    0,
                    format!("protection {:?}", self.access[page].prot()),
                    prot.map_or("no mapping".into(), |prot| format!("protection {prot:?}")),
                ));
            }
            let covered = found.map_or(1, |mapping| (mapping.range.end - address) / PAGE);
            page = self.run(page, covered).end;
        }
        Ok(())
    }
}

fn sector_words(sector: usize) -> Range<usize> {
    sector * SECTOR_WORDS..(sector + 1) * SECTOR_WORDS
}

fn pattern(page: u64, version: u32, sector: usize, index: usize) -> u64 {
    let key = mix(mix(page) ^ (u64::from(version) << 8 | sector as u64));
    key.wrapping_add(STEP.wrapping_mul(index as u64 + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(pages: usize) -> Region {
        Region::new(Span::anonymous(pages, false).unwrap(), Kind::Anonymous, 100)
    }

    #[test]
    fn every_kind_of_content_verifies() {
        let mut region = region(8);
        region.write(0..6, 1);
        region.write_sector(1, 2, Content::Zeros);
        region.discard(2..3).unwrap();
        region.free_lazily(3..4).unwrap();
        region.protect(4..5, Access::None).unwrap();
        region.protect(5..6, Access::Read).unwrap();
        region.verify(0..8).unwrap();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        region.verify_protection(&super::super::mappings::parse(&maps)).unwrap();
        region.access[5] = Access::Write;
        let difference =
            region.verify_protection(&super::super::mappings::parse(&maps)).unwrap_err().to_string();
        assert!(difference.ends_with("expected protection 3, found protection 1"), "{difference}");
        region.access[5] = Access::Read;
        let (mut head, mut tail) = region.split(3);
        tail.verify(0..5).unwrap();
        head.resize(9).unwrap();
        head.verify(0..9).unwrap();
    }

    #[test]
    fn one_wrong_byte_is_found_and_named() {
        let mut region = region(3);
        region.write(0..3, 5);
        region.span.page_mut(1)[300] ^= 0xff << 16;
        let difference = region.verify(0..3).unwrap_err();
        assert_eq!(difference.address, region.span.address() + PAGE + 300 * 8 + 2);
        assert!(difference.to_string().contains("page 1 of 3, Write, Version(5)"), "{difference}");
    }

    #[test]
    fn an_older_version_and_a_misplaced_page_are_found() {
        let mut region = region(2);
        region.write(0..2, 1);
        let old = *region.span.page(0);
        region.write(0..1, 2);
        *region.span.page_mut(0) = old;
        assert!(region.verify(0..2).is_err());
        region.write(0..1, 1);
        region.verify(0..2).unwrap();
        *region.span.page_mut(1) = old;
        assert!(region.verify(0..2).is_err());
    }

    #[test]
    fn file_pages_show_the_file_until_written_and_after_dropping() {
        let file = File::open("/proc/self/exe").unwrap();
        let pages = Arc::new(FilePages::read(file, 16).unwrap());
        let span = Span::file(&pages.file, 3, 4).unwrap();
        let mut region = Region::new(span, Kind::File(pages, 3), 0);
        region.write_sector(1, 1, Content::Version(9));
        region.verify(0..4).unwrap();
        region.discard(1..2).unwrap();
        region.verify(0..4).unwrap();
        region.span.page_mut(2)[0] ^= 1;
        assert!(region.verify(0..4).is_err());
    }
}
