//! Sockets whose options somebody sets.

use aya_ebpf::{
    btf_maps::SkStorage,
    macros::{btf_map, cgroup_sockopt},
    programs::SockoptContext,
};

/// Sockets on which nobody has set an option since the user side put an entry at them.
#[btf_map]
static OPTIONS_UNCHANGED: SkStorage<u8> = SkStorage::new();

/// `setsockopt(2)` on a socket that was made in the container's cgroup, whoever calls it.
#[cgroup_sockopt(setsockopt)]
pub fn setsockopt(ctx: SockoptContext) -> i32 {
    const GO_ON: i32 = 1;
    // SAFETY: the context is the kernel's, and its socket is alive while the program runs.
    let _ = unsafe { OPTIONS_UNCHANGED.delete((*ctx.sockopt).__bindgen_anon_1.sk) };
    GO_ON
}
