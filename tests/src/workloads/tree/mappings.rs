//! Mappings with every attribute that the kernel keeps, with contents where they have any.

use super::probe::{Findings, Probe};
use crate::workloads::memory::span::Span;
use nix::libc;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;

/// Pages of each mapping: enough to be mapped in part.
const PAGES: usize = 3;
/// Codes of `VmFlags` (proc_pid_smaps(5)) that must stay, and those of a userfaultfd, which must not appear.
const FLAGS: [&str; 17] =
    ["rd", "wr", "ex", "sh", "gd", "lo", "nr", "dc", "wf", "dd", "hg", "nh", "mg", "sr", "rr", "um", "uw"];
/// `mov eax, 0x12345678; ret`
const CODE: [u8; 6] = [0xb8, 0x78, 0x56, 0x34, 0x12, 0xc3];
const CODE_RESULT: u32 = 0x1234_5678;

/// A mapping and what is known of it.
#[derive(Debug)]
struct Remembered {
    name: &'static str,
    span: Span,
    flags: BTreeSet<String>,
    /// The first word of each page, unless pages cannot be read.
    words: Vec<u64>,
}

/// See the module.
#[derive(Debug)]
pub struct Mappings {
    list: Vec<Remembered>,
    code: Span,
}

impl Mappings {
    /// Makes all that this kernel knows.
    ///
    /// # Errors
    /// Those of `mmap(2)`.
    pub fn new() -> io::Result<Self> {
        let mut mappings = Mappings { list: Vec::new(), code: code()? };
        for (name, advice) in [
            ("MADV_DONTFORK", libc::MADV_DONTFORK),
            ("MADV_WIPEONFORK", libc::MADV_WIPEONFORK),
            ("MADV_DONTDUMP", libc::MADV_DONTDUMP),
            ("MADV_HUGEPAGE", libc::MADV_HUGEPAGE),
            ("MADV_NOHUGEPAGE", libc::MADV_NOHUGEPAGE),
            ("MADV_MERGEABLE", libc::MADV_MERGEABLE),
            ("MADV_SEQUENTIAL", libc::MADV_SEQUENTIAL),
            ("MADV_RANDOM", libc::MADV_RANDOM),
        ] {
            let mut span = Span::anonymous(PAGES, false)?;
            // Fails where the kernel was built without; then there is nothing to keep.
            if span.advise(0..PAGES, advice).is_ok() {
                mappings.add(name, span, true)?;
            }
        }
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let (read, write) = (libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE);
        mappings.add("MAP_NORESERVE", Span::map(PAGES, write, private | libc::MAP_NORESERVE, None)?, true)?;
        mappings.add("MAP_GROWSDOWN", Span::map(PAGES, write, private | libc::MAP_GROWSDOWN, None)?, true)?;
        mappings.add("PROT_NONE", Span::map(PAGES, libc::PROT_NONE, private, None)?, false)?;
        let file = File::open("/proc/self/exe")?;
        mappings.add("a file", Span::map(PAGES, read, libc::MAP_PRIVATE, Some((&file, 2)))?, false)?;
        mappings.add("a shared file", Span::map(PAGES, read, libc::MAP_SHARED, Some((&file, 1)))?, false)?;
        let locked = Span::anonymous(PAGES, false)?;
        // Fails if the limit is 0.
        if locked.lock().is_ok() {
            mappings.add("mlock", locked, true)?;
        }
        Ok(mappings)
    }

    /// Remembers it, with something written to its second page.
    fn add(&mut self, name: &'static str, mut span: Span, write: bool) -> io::Result<()> {
        if write {
            span.page_mut(1)[0] = 0x1111 * (self.list.len() as u64 + 1);
        }
        let (flags, words) = (flags(&span)?, words(&span));
        self.list.push(Remembered { name, span, flags, words });
        Ok(())
    }
}

fn words(span: &Span) -> Vec<u64> {
    (0..PAGES).map(|page| if span.is_readable(page) { span.page(page)[0] } else { 0 }).collect()
}

/// The attributes of the mapping that starts where the span does, or holds its start.
fn flags(span: &Span) -> io::Result<BTreeSet<String>> {
    let smaps = fs::read_to_string("/proc/self/smaps")?;
    Ok(parse_flags(&smaps, span.address()))
}

/// Those of [`FLAGS`] that the mapping with this address has.
fn parse_flags(smaps: &str, address: usize) -> BTreeSet<String> {
    let holds = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
        Some((start..end).contains(&address))
    };
    let mut lines = smaps.lines().skip_while(|line| holds(line) != Some(true));
    let codes = lines.find_map(|line| line.strip_prefix("VmFlags:")).unwrap_or_default();
    codes.split_whitespace().filter(|code| FLAGS.contains(code)).map(str::to_owned).collect()
}

/// Anonymous memory that can be executed, with code in it.
fn code() -> io::Result<Span> {
    let mut span = Span::anonymous(1, false)?;
    let mut word = [0; 8];
    word[..CODE.len()].copy_from_slice(&CODE);
    span.page_mut(0)[0] = u64::from_le_bytes(word);
    span.protect(0..1, libc::PROT_READ | libc::PROT_EXEC)?;
    Ok(span)
}

impl Probe for Mappings {
    fn name(&self) -> &'static str {
        "mappings"
    }

    fn check(&mut self, findings: &mut Findings) {
        for mapping in &self.list {
            if let Some(flags) = findings.succeed("read smaps", flags(&mapping.span)) {
                findings.equal(format!("attributes of {}", mapping.name), &mapping.flags, &flags);
            }
            findings.equal(format!("contents of {}", mapping.name), &mapping.words, &words(&mapping.span));
        }
        // SAFETY: the code is `CODE`, which follows the C calling convention.
        let function: extern "C" fn() -> u32 = unsafe { std::mem::transmute(self.code.address()) };
        if self.code.is_readable(0) && self.code.page(0)[0].to_le_bytes()[..CODE.len()] == CODE {
            findings.equal("result of the code", CODE_RESULT, function());
        } else {
            findings.add("the code is gone");
        }
    }

    fn spoil(&mut self) {
        // A failure would show as a check that succeeds.
        let _ = self.list[0].span.advise(0..PAGES, libc::MADV_DOFORK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_those_of_the_mapping_asked_for() {
        let smaps = "1000-3000 rw-p 0 00:00 0\nSize: 8 kB\nVmFlags: rd wr mr sd hg\n\
                     3000-4000 r--p 0 00:00 0\nVmFlags: rd mr\n";
        let found = |address| parse_flags(smaps, address).into_iter().collect::<Vec<_>>().join(" ");
        assert_eq!(
            (found(0x2fff), found(0x3000), found(0x5000)),
            ("hg rd wr".into(), "rd".into(), "".into())
        );
    }
}
