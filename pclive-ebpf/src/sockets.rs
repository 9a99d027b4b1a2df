//! Sockets whose options somebody sets.

use aya_ebpf::{
    btf_maps::SkStorage,
    macros::{btf_map, cgroup_sockopt},
    programs::SockoptContext,
};

/// Sockets whose options the user side has read: it puts an entry at each before it reads them.
#[btf_map]
static OPTIONS_READ: SkStorage<u8> = SkStorage::new();

/// `setsockopt(2)` on a socket that was made in the container's cgroup, whoever calls it: what has been read is old.
#[cgroup_sockopt(setsockopt)]
pub fn setsockopt(ctx: SockoptContext) -> i32 {
    const GO_ON: i32 = 1;
    // SAFETY: the context is the kernel's, and its socket is alive while the program runs.
    let _ = unsafe { OPTIONS_READ.delete((*ctx.sockopt).__bindgen_anon_1.sk) };
    GO_ON
}
