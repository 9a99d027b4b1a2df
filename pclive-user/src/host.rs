//! What this host is, for comparing it with the other one.

use pclive_wire::PAGE_SIZE;
use pclive_wire::facts::HostFacts;
use procfs::Current;
use procfs::process::{MMapPath, Process};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Why this host could not be described.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A file under /proc could not be read.
    #[error("read {0}")]
    Proc(&'static str, #[source] procfs::ProcError),
    /// `uname(2)` failed.
    #[error("uname")]
    Uname(#[source] nix::errno::Errno),
    /// The vDSO could not be read.
    #[error("read the vDSO")]
    Vdso(#[source] std::io::Error),
    /// There is no vDSO (`vdso=0` on the kernel's command line).
    #[error("this host has no vDSO")]
    NoVdso,
    /// Whether all memory can be accessed could not be found out.
    #[error("try to write to protected memory")]
    Memory(#[source] pclive_sys::Error),
    /// Memory that processes have protected from themselves would be lost.
    #[error(
        "this kernel gives pclive no access to memory that a process has protected from itself: boot it with \
         proc_mem.force_override=always"
    )]
    ProtectedMemory,
}

/// Describes this host; an error if it cannot take part in a migration.
pub fn facts() -> Result<HostFacts, HostError> {
    accesses_all_memory()?;
    let uname = nix::sys::utsname::uname().map_err(HostError::Uname)?;
    let cpus = procfs::CpuInfo::current().map_err(|e| HostError::Proc("/proc/cpuinfo", e))?;
    let xstate = pclive_sys::cpu::extended_state();
    Ok(HostFacts {
        kernel_release: uname.release().to_string_lossy().into_owned(),
        machine: uname.machine().to_string_lossy().into_owned(),
        page_size: PAGE_SIZE,
        cpu_features: common_features(&cpus),
        xstate_components: xstate.components,
        xstate_size: xstate.size,
        vdso_hash: vdso_hash()?,
    })
}

/// An error unless pclive can read and write all memory of containers, whatever its protection.
pub fn accesses_all_memory() -> Result<(), HostError> {
    match pclive_sys::mem::ignores_protection().map_err(HostError::Memory)? {
        true => Ok(()),
        false => Err(HostError::ProtectedMemory),
    }
}

/// Whether the capability with this number (capabilities(7)) is in the effective set of this process.
pub fn has_capability(number: u32) -> Result<bool, HostError> {
    let status = Process::myself()
        .and_then(|process| process.status())
        .map_err(|e| HostError::Proc("/proc/self/status", e))?;
    Ok(status.capeff >> number & 1 == 1)
}

/// The features that all processors have: a thread may run on any of them.
fn common_features(cpus: &procfs::CpuInfo) -> BTreeSet<String> {
    let of_cpu = |number| {
        let flags = cpus.flags(number).unwrap_or_default();
        flags.into_iter().map(String::from).collect::<BTreeSet<_>>()
    };
    (0..cpus.num_cores()).map(of_cpu).reduce(|common, next| &common & &next).unwrap_or_default()
}

/// A hash of the vDSO as the kernel has patched it for this machine's processor.
fn vdso_hash() -> Result<u64, HostError> {
    let maps = Process::myself()
        .and_then(|process| process.maps())
        .map_err(|e| HostError::Proc("/proc/self/maps", e))?;
    let vdso = maps.iter().find(|map| map.pathname == MMapPath::Vdso).ok_or(HostError::NoVdso)?;
    let (start, end) = vdso.address;
    let mut code = vec![0; (end - start) as usize];
    let memory = File::open("/proc/self/mem").map_err(HostError::Vdso)?;
    memory.read_exact_at(&mut code, start).map_err(HostError::Vdso)?;
    Ok(fnv1a(&code))
}

/// FNV-1a: the same on every host and in every release, which the standard library's hashes do not promise.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use pclive_wire::facts::mismatches;

    #[test]
    fn a_host_fits_itself() {
        let facts = facts().unwrap();
        assert!(facts.cpu_features.contains("sse2"));
        assert!(facts.kernel_release.starts_with(|c: char| c.is_ascii_digit()));
        assert_ne!(facts.vdso_hash, fnv1a(&[]));
        assert_eq!(mismatches(&facts, &super::facts().unwrap()), []);
    }
}
