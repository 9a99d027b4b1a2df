//! One thread's part of the memory: its regions, its stack frames, its children.

use super::Options;
use super::child::Child;
use super::mappings::Mapping;
use super::operations;
use super::region::{Access, Content, Difference, FilePages, Region, SECTORS};
use super::span::Frame;
use crate::workloads::pattern::Rng;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

/// Numbers reserved for the pages of one region, however far it grows.
const NUMBERS_PER_REGION: u64 = 1 << 24;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Memory is not what it must be.
    #[error("{0}")]
    Memory(Difference),
    /// A stack frame is not what it must be.
    #[error("{address:#x} (stack frame): expected the word {expected:#x}, found {found:#x}")]
    #[allow(missing_docs)]
    Stack { address: usize, expected: u64, found: u64 },
    /// A system call failed that must not.
    #[error("{call}: {source}")]
    #[allow(missing_docs)]
    Call { call: &'static str, source: std::io::Error },
    /// A child found a difference.
    #[error("in child {pid}: {differences}")]
    #[allow(missing_docs)]
    Child { pid: i32, differences: String },
    /// A child ended without a word.
    #[error("child {pid} died")]
    #[allow(missing_docs)]
    ChildDied { pid: i32 },
}

impl Failure {
    /// A failed call.
    pub fn call(call: &'static str, source: std::io::Error) -> Self {
        Failure::Call { call, source }
    }
}

impl From<Difference> for Failure {
    fn from(difference: Difference) -> Self {
        Failure::Memory(difference)
    }
}

/// See the module.
#[derive(Debug)]
pub struct Worker {
    pub(super) rng: Rng,
    pub(super) regions: Vec<Region>,
    pub(super) children: Vec<Child>,
    pub(super) file: Arc<FilePages>,
    /// Whether this is the thread that may call `brk(2)`, which is not safe on two threads.
    pub(super) has_heap: bool,
    pub(super) options: Options,
    /// Pages that may be mapped.
    pub(super) budget: usize,
    frames: Vec<(Frame, u64)>,
    next_number: u64,
    version: u32,
    operations: u64,
}

impl Worker {
    /// Number `index`, with three quarters of its memory mapped and partly written.
    ///
    /// # Errors
    /// Those of `mmap(2)`.
    pub fn new(index: usize, options: &Options, file: Arc<FilePages>) -> Result<Self, Failure> {
        let mut worker = Worker {
            rng: Rng::new(options.seed.wrapping_mul(1000).wrapping_add(index as u64)),
            regions: Vec::new(),
            children: Vec::new(),
            file,
            has_heap: index == 0,
            options: options.clone(),
            budget: options.pages() / options.threads,
            frames: Vec::new(),
            next_number: (index as u64) << 48,
            version: 0,
            operations: 0,
        };
        while worker.pages() < worker.budget / 4 * 3 {
            operations::map(&mut worker)?;
        }
        Ok(worker)
    }

    /// Does one random thing.
    ///
    /// # Errors
    /// A difference found on the way, or a failed call.
    pub fn step(&mut self) -> Result<(), Failure> {
        self.operations += 1;
        operations::pick(&mut self.rng)(self)
    }

    /// Things done since the start.
    pub fn operations(&self) -> u64 {
        self.operations
    }

    /// Pages mapped now.
    pub fn pages(&self) -> usize {
        self.regions.iter().map(Region::pages).sum()
    }

    /// A version that no page has had.
    pub fn next_version(&mut self) -> u32 {
        self.version += 1;
        self.version
    }

    /// Numbers for the pages of a new region.
    pub fn next_numbers(&mut self) -> u64 {
        self.next_number += NUMBERS_PER_REGION;
        self.next_number
    }

    /// The mapped file's descriptor.
    pub fn file_descriptor(&self) -> RawFd {
        self.file.file.as_raw_fd()
    }

    /// After `fork(2)`: forgets what the parent alone has.
    pub fn become_child(&mut self) {
        self.children.clear();
        self.has_heap = false;
        self.options.children = 0;
        // Shared memory is not inherited (MADV_DONTFORK), or parent and child would surprise each other.
        self.regions.retain(|region| !matches!(region.kind, super::region::Kind::Shared));
        self.rng = Rng::new(self.rng.draw() ^ u64::from(std::process::id()));
    }

    /// Compares every byte.
    ///
    /// # Errors
    /// The first difference.
    pub fn verify_all(&mut self) -> Result<(), Failure> {
        for region in &mut self.regions {
            region.verify(0..region.pages())?;
        }
        self.frames.iter().try_for_each(|(frame, seed)| verify_frame(frame, *seed))
    }

    /// Compares the protection of every page with what the kernel says.
    ///
    /// # Errors
    /// The first difference.
    pub fn verify_protection(&self, mappings: &[Mapping]) -> Result<(), Failure> {
        Ok(self.regions.iter().try_for_each(|region| region.verify_protection(mappings))?)
    }

    /// Compares a few pages chosen by `rng`.
    ///
    /// # Errors
    /// The first difference.
    pub fn verify_some(&mut self, rng: &mut Rng, runs: usize) -> Result<(), Failure> {
        for _ in 0..runs {
            if let Some((region, pages)) = self.choose(rng, 16) {
                self.regions[region].verify(pages)?;
            }
        }
        Ok(())
    }

    /// A random region and some of its pages, with the same access; `longest` at most.
    pub fn choose(&self, rng: &mut Rng, longest: usize) -> Option<(usize, Range<usize>)> {
        if self.regions.is_empty() {
            return None;
        }
        let region = rng.below(self.regions.len());
        let page = rng.below(self.regions[region].pages());
        let limit = 1 + rng.below(longest);
        Some((region, self.regions[region].run(page, limit)))
    }

    /// Writes a stack frame and remembers it until [`Self::leave_frame`].
    pub fn enter_frame(&mut self, frame: Frame, fill: impl FnOnce(u64)) {
        let seed = self.rng.draw();
        fill(seed);
        self.frames.push((frame, seed));
    }

    /// Compares the newest frame and forgets it.
    ///
    /// # Errors
    /// The first word that differs.
    pub fn leave_frame(&mut self) -> Result<(), Failure> {
        self.frames.pop().map_or(Ok(()), |(frame, seed)| verify_frame(&frame, seed))
    }

    /// Flips a bit of a byte that nobody wrote, to prove that it will be noticed.
    pub fn corrupt(&mut self) {
        let version = self.next_version();
        if let Some(region) = self.regions.iter_mut().find(|region| region.access(0) == Access::Write) {
            (0..SECTORS).for_each(|sector| region.write_sector(0, sector, Content::Version(version)));
            region.span.page_mut(0)[77] ^= 1 << 20;
        }
    }
}

/// The words of the frame that belongs to `seed`.
pub fn frame_words(seed: u64) -> impl Iterator<Item = u64> {
    let mut rng = Rng::new(seed);
    std::iter::repeat_with(move || rng.draw())
}

fn verify_frame(frame: &Frame, seed: u64) -> Result<(), Failure> {
    let page = frame.page();
    match page.iter().zip(frame_words(seed)).position(|(&found, expected)| found != expected) {
        None => Ok(()),
        Some(index) => Err(Failure::Stack {
            address: frame.address() + index * 8,
            expected: frame_words(seed).nth(index).unwrap_or_default(),
            found: page[index],
        }),
    }
}
