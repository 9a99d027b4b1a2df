//! Whose events are reported.

use aya_ebpf::{
    btf_maps::{CgroupArray, HashMap},
    macros::btf_map,
};

/// The container's cgroup v2 directory, alone.
///
/// A cgroup array instead of an id compared with `bpf_get_current_ancestor_cgroup_id`: it needs no level, which a
/// process in a cgroup namespace cannot know.
#[btf_map]
static CONTAINER: CgroupArray<1> = CgroupArray::new();

/// The container's processes: put here by the user side when it attaches, then kept up to date by `processes`.
#[btf_map]
static PROCESSES: HashMap<u32, u8, 32768> = HashMap::new();

/// Whether the current task belongs to the container.
#[inline(always)]
pub fn has_current_task() -> bool {
    CONTAINER.current_task_under_cgroup(0) == Ok(true)
}

/// Whether the container has the process `tgid`, whose memory somebody, maybe from outside, is writing.
#[inline(always)]
pub fn has_process(tgid: u32) -> bool {
    PROCESSES.get_ptr(tgid).is_some()
}

/// Remembers a process of the container. When the map is full, writes into this process that other processes make
/// are seen by the final scan only.
#[inline(always)]
pub fn add_process(tgid: u32) {
    let _ = PROCESSES.insert(tgid, 0, 0);
}

/// Forgets a process.
#[inline(always)]
pub fn remove_process(tgid: u32) {
    let _ = PROCESSES.remove(tgid);
}
