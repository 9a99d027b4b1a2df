//! The process that the runtime starts in place of the container's: a static ELF file of a few instructions that waits
//! until pclive turns it into the container's.

use nix::sys::memfd::{MFdFlags, memfd_create};
use std::io::Write;
use std::os::fd::OwnedFd;

/// Name that `/proc/PID/exe` shows for the waiting init: `/memfd:pclive-init (deleted)`.
pub const NAME: &str = "pclive-init";

/// Where the file is mapped: the lowest address a process may use (`vm.mmap_min_addr`), so that nothing is in the way.
const LOAD_ADDRESS: u64 = 0x1_0000;
const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;

// loop { pause() }
const CODE: [u8; 9] = [
    0xb8, 0x22, 0x00, 0x00, 0x00, // mov eax, SYS_pause
    0x0f, 0x05, // syscall
    0xeb, 0xf7, // jmp to the start
];
const _: () = assert!(libc::SYS_pause == 0x22);

/// An executable memfd with the init.
pub fn executable() -> nix::Result<OwnedFd> {
    let fd = memfd_create(NAME, MFdFlags::MFD_CLOEXEC)?;
    let mut file = std::fs::File::from(fd);
    file.write_all(&elf()).map_err(|e| nix::Error::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))?;
    Ok(file.into())
}

/// A static executable (elf(5)) with one segment: its headers and the code.
fn elf() -> Vec<u8> {
    let size = (ELF_HEADER + PROGRAM_HEADER + CODE.len()) as u64;
    let entry = LOAD_ADDRESS + (ELF_HEADER + PROGRAM_HEADER) as u64;
    let mut file = Vec::with_capacity(size as usize);
    file.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]); // 64 bits, little endian, System V
    let half = |file: &mut Vec<u8>, values: &[u16]| values.iter().for_each(|v| file.extend(v.to_le_bytes()));
    let word = |file: &mut Vec<u8>, values: &[u32]| values.iter().for_each(|v| file.extend(v.to_le_bytes()));
    let long = |file: &mut Vec<u8>, values: &[u64]| values.iter().for_each(|v| file.extend(v.to_le_bytes()));
    half(&mut file, &[2, 62]); // ET_EXEC, EM_X86_64
    word(&mut file, &[1]); // EV_CURRENT
    long(&mut file, &[entry, ELF_HEADER as u64, 0]); // entry, program headers, no section headers
    word(&mut file, &[0]); // flags
    half(&mut file, &[ELF_HEADER as u16, PROGRAM_HEADER as u16, 1, 0, 0, 0]);
    word(&mut file, &[1, 5]); // PT_LOAD, PF_R | PF_X
    long(&mut file, &[0, LOAD_ADDRESS, LOAD_ADDRESS, size, size, 4096]);
    file.extend(CODE);
    file
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::process::Command;

    #[test]
    fn the_init_starts_and_waits() {
        let fd = executable().unwrap();
        let mut child = Command::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).spawn().unwrap();
        let syscall = format!("/proc/{}/syscall", child.id());
        while !std::fs::read_to_string(&syscall).unwrap().starts_with("34 ") {
            std::thread::yield_now();
        }
        let exe = std::fs::read_link(format!("/proc/{}/exe", child.id())).unwrap();
        assert_eq!(exe.to_str(), Some("/memfd:pclive-init (deleted)"));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
