//! Open files: offsets shared and not, files without a name, flags, devices.

use super::probe::{Findings, Probe};
use crate::workloads::pattern;
use nix::unistd::dup;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Bytes in the unlinked file at the start; after them a hole follows.
const LENGTH: usize = 10_000;
const HOLE: usize = 20_000;

/// See the module.
#[derive(Debug)]
pub struct Files {
    /// A file with a name, in the middle.
    named: File,
    /// The same open file.
    named_dup: File,
    /// The same file opened again.
    named_again: File,
    named_offset: u64,
    again_offset: u64,
    /// A file whose name is gone, and the same opened again, to append.
    unlinked: File,
    appender: File,
    unlinked_offset: u64,
    unlinked_owner: (u32, u32, u32),
    contents: Vec<u8>,
    zero: File,
    directory: File,
}

impl Files {
    /// Opens all of them; the file without a name is made in `directory`.
    ///
    /// # Errors
    /// Those of `open(2)` and `write(2)`.
    pub fn new(directory: &Path) -> io::Result<Self> {
        let mut named = File::open("/proc/self/exe")?;
        let mut named_again = File::open("/proc/self/exe")?;
        let path = directory.join(format!("pclive-workload-{}", std::process::id()));
        let mut unlinked = File::options().read(true).write(true).create_new(true).mode(0o640).open(&path)?;
        let appender = File::options().append(true).open(&path)?;
        std::fs::remove_file(&path)?;
        let meta = unlinked.metadata()?;
        let mut contents = pattern::bytes(11, LENGTH);
        unlinked.write_all(&contents)?;
        contents.resize(HOLE, 0);
        unlinked.set_len(HOLE as u64)?;
        Ok(Files {
            named_offset: named.seek(SeekFrom::Start(1234))?,
            again_offset: named_again.seek(SeekFrom::Start(77))?,
            unlinked_offset: unlinked.seek(SeekFrom::Start(777))?,
            unlinked_owner: (meta.mode(), meta.uid(), meta.gid()),
            named_dup: dup(&named)?.into(),
            named,
            named_again,
            unlinked,
            appender,
            contents,
            zero: File::open("/dev/zero")?,
            directory: File::open("/usr")?,
        })
    }

    fn check_offsets(&mut self, findings: &mut Findings) -> io::Result<()> {
        findings.equal("offset", self.named_offset, self.named.stream_position()?);
        findings.equal("offset by the duplicate", self.named_offset, self.named_dup.stream_position()?);
        findings.equal(
            "offset of the second opening",
            self.again_offset,
            self.named_again.stream_position()?,
        );
        self.named_offset = self.named_dup.seek(SeekFrom::Current(1))?;
        findings.equal("offset moved by the duplicate", self.named_offset, self.named.stream_position()?);
        findings.equal("second opening, not moved", self.again_offset, self.named_again.stream_position()?);
        let mut direct = [0; 16];
        self.named.read_exact_at(&mut direct, self.named_offset)?;
        let mut sequential = [0; 16];
        self.named.read_exact(&mut sequential)?;
        self.named_offset += 16;
        findings.equal("bytes at the offset", direct, sequential);
        Ok(())
    }

    fn check_unlinked(&mut self, findings: &mut Findings) -> io::Result<()> {
        let meta = self.unlinked.metadata()?;
        findings.equal("links of the unlinked file", 0, meta.nlink());
        findings.equal(
            "mode and owner of the unlinked file",
            self.unlinked_owner,
            (meta.mode(), meta.uid(), meta.gid()),
        );
        let again = self.appender.metadata()?;
        findings.equal("both openings show one inode", (meta.dev(), meta.ino()), (again.dev(), again.ino()));
        findings.equal("size of the unlinked file", self.contents.len() as u64, meta.len());
        let mut found = vec![0; self.contents.len()];
        self.unlinked.read_exact_at(&mut found, 0)?;
        let differs = self.contents.iter().zip(&found).position(|(expected, found)| expected != found);
        findings.equal("first wrong byte of the unlinked file", None, differs);
        findings.equal("offset in the unlinked file", self.unlinked_offset, self.unlinked.stream_position()?);
        // Use both: write in the middle with one, at the end with the other.
        self.unlinked.write_all(b"middle")?;
        self.contents[self.unlinked_offset as usize..][..6].copy_from_slice(b"middle");
        self.unlinked_offset += 6;
        self.appender.write_all(b"end")?;
        self.contents.extend_from_slice(b"end");
        Ok(())
    }

    fn check_others(&mut self, findings: &mut Findings) -> io::Result<()> {
        let mut bytes = [1; 32];
        self.zero.read_exact(&mut bytes)?;
        findings.equal("/dev/zero", [0; 32], bytes);
        let listed = std::fs::read_dir(format!("/proc/self/fd/{}", self.directory.as_raw_fd()))?.count();
        findings.that(listed > 0, "the open directory is empty");
        Ok(())
    }
}

impl Probe for Files {
    fn name(&self) -> &'static str {
        "files"
    }

    fn check(&mut self, findings: &mut Findings) {
        for part in [Self::check_offsets, Self::check_unlinked, Self::check_others] {
            let result = part(self, findings);
            findings.succeed("use a file", result);
        }
    }

    fn spoil(&mut self) {
        // A failure would show as a check that succeeds.
        let _ = self.unlinked.write_all_at(b"x", 9000);
    }
}
