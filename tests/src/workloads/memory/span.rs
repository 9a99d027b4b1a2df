//! A range of pages that has one owner: the only unsafe code of the memory workload.
//!
//! A [`Span`] is the sole handle to its pages. Nothing else in the process knows their address, so what a span does to
//! them can invalidate no reference except one borrowed from the span itself, which the borrow checker sees. An access
//! to a page that is protected ends the process by SIGSEGV, as it must.

use nix::libc;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes in a page.
pub const PAGE: usize = 4096;
/// Words in a page.
pub const WORDS: usize = PAGE / 8;
/// Bytes in a transparent huge page.
const HUGE: usize = 2 << 20;

/// One page as words.
pub type Page = [u64; WORDS];

/// Page-aligned memory that belongs to the holder of this value. Dropping it leaks the memory; see [`Span::unmap`].
#[derive(Debug)]
pub struct Span {
    address: usize,
    pages: usize,
}

impl Span {
    /// `mmap(2)`, at an address of the kernel's choice, of anonymous memory or of a file from some page on.
    ///
    /// # Errors
    /// Those of `mmap(2)`.
    pub fn map(pages: usize, prot: i32, flags: i32, file: Option<(&File, usize)>) -> io::Result<Self> {
        let (fd, offset) = file.map_or((-1, 0), |(file, first)| (file.as_raw_fd(), (first * PAGE) as i64));
        // Wherever the kernel would, and never over something else.
        let flags = flags & !(libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE);
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), pages * PAGE, prot, flags, fd, offset) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Span { address: address as usize, pages })
    }

    /// New anonymous memory, readable and writable.
    ///
    /// # Errors
    /// Those of `mmap(2)`.
    pub fn anonymous(pages: usize, shared: bool) -> io::Result<Self> {
        let share = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        Self::map(pages, libc::PROT_READ | libc::PROT_WRITE, share | libc::MAP_ANONYMOUS, None)
    }

    /// New anonymous memory that starts where a huge page may start, advised to use huge pages.
    ///
    /// # Errors
    /// Those of `mmap(2)`.
    pub fn huge(pages: usize) -> io::Result<Self> {
        let whole = Self::anonymous(pages + HUGE / PAGE, false)?;
        let before = (whole.address.next_multiple_of(HUGE) - whole.address) / PAGE;
        let (head, rest) = whole.split(before);
        let (mut span, tail) = rest.split(pages);
        head.unmap()?;
        tail.unmap()?;
        // Fails where the kernel has no transparent huge pages; the memory is good without.
        let _ = span.advise(0..pages, libc::MADV_HUGEPAGE);
        Ok(span)
    }

    /// A private, writable mapping of `file` from page `first` on.
    ///
    /// # Errors
    /// Those of `mmap(2)`.
    pub fn file(file: &File, first: usize, pages: usize) -> io::Result<Self> {
        Self::map(pages, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE, Some((file, first)))
    }

    /// Grows the heap by `brk(2)` and takes the new pages.
    ///
    /// # Errors
    /// Those of `brk(2)`.
    pub fn heap(pages: usize) -> io::Result<Self> {
        // SAFETY: asks where the heap ends.
        let end = unsafe { libc::sbrk(0) } as usize;
        let bytes = end.next_multiple_of(PAGE) - end + pages * PAGE;
        // SAFETY: growing the heap hands out memory that nobody had; malloc copes with somebody else's sbrk.
        let old = unsafe { libc::sbrk(bytes as isize) };
        if old as isize == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok(Span { address: (old as usize).next_multiple_of(PAGE), pages })
    }

    /// Shrinks the heap by these pages, if they are its end.
    ///
    /// # Errors
    /// Gives the span back when somebody has grown the heap since.
    pub fn shrink_heap(self) -> Result<(), Self> {
        // SAFETY: asks where the heap ends.
        if unsafe { libc::sbrk(0) } as usize != self.end() {
            return Err(self);
        }
        // SAFETY: the pages are the heap's last and this span, which is consumed, owned them.
        unsafe { libc::sbrk(-((self.pages * PAGE) as isize)) };
        Ok(())
    }

    /// First address.
    pub fn address(&self) -> usize {
        self.address
    }

    /// First address after the span.
    pub fn end(&self) -> usize {
        self.address + self.pages * PAGE
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Cuts before page `at`.
    pub fn split(self, at: usize) -> (Self, Self) {
        assert!(at <= self.pages);
        let tail = Span { address: self.address + at * PAGE, pages: self.pages - at };
        (Span { address: self.address, pages: at }, tail)
    }

    /// `munmap(2)`.
    ///
    /// # Errors
    /// Those of `munmap(2)`.
    pub fn unmap(self) -> io::Result<()> {
        if self.pages == 0 {
            return Ok(());
        }
        // SAFETY: the span owned these pages and is consumed.
        check(unsafe { libc::munmap(self.address as *mut _, self.pages * PAGE) })
    }

    /// Grows or shrinks by `mremap(2)`; the kernel may move the pages.
    ///
    /// # Errors
    /// Those of `mremap(2)`; then nothing has changed.
    pub fn resize(&mut self, pages: usize) -> io::Result<()> {
        self.remap(pages, libc::MREMAP_MAYMOVE, 0)
    }

    /// Moves the pages elsewhere, over a mapping that was made for the purpose. They must be in one mapping: the kernel
    /// moves several one by one (Linux 6.17), and stops in the middle at one that it cannot move.
    ///
    /// # Errors
    /// Those of `mmap(2)` and `mremap(2)`; then nothing has changed.
    pub fn relocate(&mut self) -> io::Result<()> {
        let target = Self::map(self.pages, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)?;
        // The target is replaced; or, if that fails, leaked: whether the kernel had unmapped it by then is not known, and
        // another thread may have mapped something there since.
        self.remap(self.pages, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, target.address)
    }

    fn remap(&mut self, pages: usize, flags: i32, target: usize) -> io::Result<()> {
        // SAFETY: the span owns the old pages and `&mut` excludes references into them; a fixed target is owned by the
        // caller.
        let new =
            unsafe { libc::mremap(self.address as *mut _, self.pages * PAGE, pages * PAGE, flags, target) };
        if new == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        (self.address, self.pages) = (new as usize, pages);
        Ok(())
    }

    /// `mprotect(2)` of some pages with `PROT_*` bits.
    ///
    /// # Errors
    /// Those of `mprotect(2)`.
    pub fn protect(&mut self, pages: Range<usize>, prot: i32) -> io::Result<()> {
        let (address, bytes) = self.bytes(&pages);
        // SAFETY: the span owns the pages and `&mut` excludes references into them.
        check(unsafe { libc::mprotect(address as *mut _, bytes, prot) })
    }

    /// `madvise(2)` of some pages. Advice that drops contents is fine: pages are read as zeros or the file again.
    ///
    /// # Errors
    /// Those of `madvise(2)`.
    pub fn advise(&mut self, pages: Range<usize>, advice: i32) -> io::Result<()> {
        let (address, bytes) = self.bytes(&pages);
        // SAFETY: the span owns the pages and `&mut` excludes references into them.
        check(unsafe { libc::madvise(address as *mut _, bytes, advice) })
    }

    /// `mlock(2)`.
    ///
    /// # Errors
    /// Those of `mlock(2)`.
    pub fn lock(&self) -> io::Result<()> {
        // SAFETY: the span owns the pages; locking changes no contents.
        check(unsafe { libc::mlock(self.address as *const _, self.pages * PAGE) })
    }

    /// The contents of a page, which must be readable.
    pub fn page(&self, page: usize) -> &Page {
        let (address, _) = self.bytes(&(page..page + 1));
        // SAFETY: the span owns the page, it is aligned, and any bits are good words.
        unsafe { &*(address as *const Page) }
    }

    /// The contents of a page, which must be writable.
    pub fn page_mut(&mut self, page: usize) -> &mut Page {
        let (address, _) = self.bytes(&(page..page + 1));
        // SAFETY: as in `page`, and `&mut self` makes this the only reference.
        unsafe { &mut *(address as *mut Page) }
    }

    /// Whether a page can be read at all, found out without a signal.
    pub fn is_readable(&self, page: usize) -> bool {
        let (address, _) = self.bytes(&(page..page + 1));
        let mut byte = 0u8;
        let to = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let from = libc::iovec { iov_base: address as *mut _, iov_len: 1 };
        // SAFETY: one byte is written to `byte`; the kernel checks the address read from.
        unsafe { libc::process_vm_readv(libc::getpid(), &to, 1, &from, 1, 0) == 1 }
    }

    fn bytes(&self, pages: &Range<usize>) -> (usize, usize) {
        assert!(pages.start <= pages.end && pages.end <= self.pages, "{pages:?} of {}", self.pages);
        (self.address + pages.start * PAGE, pages.len() * PAGE)
    }
}

fn check(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A page-sized variable on some thread's stack, which others look at while its function waits.
#[derive(Debug)]
pub struct Frame(*const [AtomicU64; WORDS]);

// SAFETY: the words are atomic; `Frame::new` demands that they outlive the value.
unsafe impl Send for Frame {}

impl Frame {
    /// # Safety
    /// `words` must live until the frame is dropped.
    pub unsafe fn new(words: &[AtomicU64; WORDS]) -> Self {
        Frame(words)
    }

    /// Where it is.
    pub fn address(&self) -> usize {
        self.0 as usize
    }

    /// What it holds now.
    pub fn page(&self) -> Page {
        // SAFETY: alive, as promised to `new`.
        let words = unsafe { &*self.0 };
        std::array::from_fn(|index| words[index].load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_follow_resize_and_relocation() {
        let mut span = Span::anonymous(3, false).unwrap();
        span.page_mut(2)[7] = 42;
        span.resize(20).unwrap();
        span.relocate().unwrap();
        assert_eq!((span.page(2)[7], span.page(19)[0], span.pages()), (42, 0, 20));
        let (head, tail) = span.split(2);
        assert_eq!(tail.page(0)[7], 42);
        head.unmap().unwrap();
        tail.unmap().unwrap();
    }

    #[test]
    fn protected_pages_are_not_readable() {
        let mut span = Span::huge(2).unwrap();
        span.protect(1..2, libc::PROT_NONE).unwrap();
        assert!(span.is_readable(0) && !span.is_readable(1));
        span.unmap().unwrap();
    }
}
