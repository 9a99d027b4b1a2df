//! What a host is, as far as a running program can tell, and whether two hosts are alike enough to move one.
//!
//! A program keeps what it learnt of its host: the library chose functions for the CPU's features, pointers into the
//! vDSO lie in its memory, its extended registers have a size. Where the destination differs in one of these the
//! program would crash after a "successful" move, so they are compared before anything is touched.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// One host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// `uname -r`.
    pub kernel_release: String,
    /// `uname -m`.
    pub machine: String,
    /// Bytes in a base page.
    pub page_size: u64,
    /// CPU features that every CPU of the host has (`flags` in `/proc/cpuinfo`).
    pub cpu_features: BTreeSet<String>,
    /// Extended state components that the kernel enables (`XCR0`).
    pub xstate_components: u64,
    /// Bytes of `NT_X86_XSTATE`.
    pub xstate_size: u32,
    /// Hash of the vDSO's code.
    pub vdso_hash: u64,
}

/// One reason why a container cannot move from one host to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum HostMismatch {
    /// Another instruction set.
    #[error("machine is {source_machine} here, {destination_machine} at the destination")]
    #[allow(missing_docs)]
    Machine { source_machine: String, destination_machine: String },
    /// Another page size.
    #[error("page size is {here} bytes here, {there} at the destination")]
    #[allow(missing_docs)]
    PageSize { here: u64, there: u64 },
    /// A program may have found a system call at its start that is missing there.
    #[error("destination's kernel {there} is older than {here}")]
    #[allow(missing_docs)]
    KernelOlder { here: String, there: String },
    /// CPU features that a program may be using and that the destination lacks.
    #[error("destination's CPU lacks {}", .0.join(" "))]
    CpuFeatures(Vec<String>),
    /// Extended registers of one host do not fit the other.
    #[error("extended register state is {here:?} (components, bytes) here, {there:?} at the destination")]
    #[allow(missing_docs)]
    Xstate { here: (u64, u32), there: (u64, u32) },
    /// Programs hold pointers into the vDSO, whose functions lie elsewhere there.
    #[error("the destination's kernel has another vDSO")]
    Vdso,
}

/// Flags of `/proc/cpuinfo` that concern the kernel, the hypervisor or mitigations: no program can use them.
const NOT_FOR_PROGRAMS: [&str; 48] = [
    "aperfmperf",
    "apic",
    "arch_capabilities",
    "arch_perfmon",
    "arat",
    "constant_tsc",
    "cpuid_fault",
    "de",
    "dtes64",
    "ept",
    "ept_ad",
    "flexpriority",
    "flush_l1d",
    "hypervisor",
    "ibpb",
    "ibrs",
    "ibrs_enhanced",
    "invpcid",
    "mca",
    "mce",
    "md_clear",
    "monitor",
    "mtrr",
    "nonstop_tsc",
    "nopl",
    "nx",
    "pat",
    "pcid",
    "pdpe1gb",
    "pge",
    "pse",
    "pse36",
    "pti",
    "rep_good",
    "smap",
    "smep",
    "ssbd",
    "stibp",
    "svm",
    "tpr_shadow",
    "tsc_adjust",
    "tsc_deadline_timer",
    "tsc_known_freq",
    "tsc_reliable",
    "vme",
    "vmx",
    "vpid",
    "x2apic",
];

/// Why a program running on `source` could not go on at `destination`; empty if it can.
pub fn mismatches(source: &HostFacts, destination: &HostFacts) -> Vec<HostMismatch> {
    let mut found = Vec::new();
    if source.machine != destination.machine {
        found.push(HostMismatch::Machine {
            source_machine: source.machine.clone(),
            destination_machine: destination.machine.clone(),
        });
    }
    if source.page_size != destination.page_size {
        found.push(HostMismatch::PageSize { here: source.page_size, there: destination.page_size });
    }
    if kernel_version(&destination.kernel_release) < kernel_version(&source.kernel_release) {
        found.push(HostMismatch::KernelOlder {
            here: source.kernel_release.clone(),
            there: destination.kernel_release.clone(),
        });
    }
    let missing: Vec<String> = source
        .cpu_features
        .difference(&destination.cpu_features)
        .filter(|flag| !NOT_FOR_PROGRAMS.contains(&flag.as_str()))
        .cloned()
        .collect();
    if !missing.is_empty() {
        found.push(HostMismatch::CpuFeatures(missing));
    }
    let xstate = |facts: &HostFacts| (facts.xstate_components, facts.xstate_size);
    if xstate(source) != xstate(destination) {
        found.push(HostMismatch::Xstate { here: xstate(source), there: xstate(destination) });
    }
    if source.vdso_hash != destination.vdso_hash {
        found.push(HostMismatch::Vdso);
    }
    found
}

/// Major and minor version of a release such as `6.18.3-cloud-amd64`; 0 where there is no number.
fn kernel_version(release: &str) -> (u32, u32) {
    let mut numbers =
        release.split(|c: char| !c.is_ascii_digit()).map(|digits| digits.parse().unwrap_or_default());
    (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> HostFacts {
        HostFacts {
            kernel_release: "6.12.30-cloud-amd64".into(),
            machine: "x86_64".into(),
            page_size: 4096,
            cpu_features: ["sse4_2", "avx2", "hypervisor"].map(String::from).into(),
            xstate_components: 7,
            xstate_size: 832,
            vdso_hash: 42,
        }
    }

    #[test]
    fn what_a_program_could_notice_is_found() {
        type Change = fn(&mut HostFacts);
        let cases: [(Change, Option<HostMismatch>); 9] = [
            (|_| (), None),
            (|d| d.kernel_release = "6.18.0".into(), None),
            (|d| d.cpu_features = ["sse4_2", "avx2", "avx512f"].map(String::from).into(), None),
            (
                |d| d.kernel_release = "6.9.1".into(),
                Some(HostMismatch::KernelOlder { here: "6.12.30-cloud-amd64".into(), there: "6.9.1".into() }),
            ),
            (
                |d| d.cpu_features = ["sse4_2"].map(String::from).into(),
                Some(HostMismatch::CpuFeatures(vec!["avx2".into()])),
            ),
            (|d| d.page_size = 16384, Some(HostMismatch::PageSize { here: 4096, there: 16384 })),
            (
                |d| d.machine = "aarch64".into(),
                Some(HostMismatch::Machine {
                    source_machine: "x86_64".into(),
                    destination_machine: "aarch64".into(),
                }),
            ),
            (|d| d.xstate_size = 2696, Some(HostMismatch::Xstate { here: (7, 832), there: (7, 2696) })),
            (|d| d.vdso_hash = 43, Some(HostMismatch::Vdso)),
        ];
        for (change, expected) in cases {
            let mut destination = host();
            change(&mut destination);
            assert_eq!(mismatches(&host(), &destination), Vec::from_iter(expected));
        }
    }
}
