//! eBPF programs that watch one container: its write faults, its address-space changes, its processes, its sockets; and one
//! that is asked for the flags of its mappings.
//!
//! The container is a cgroup v2 directory with everything below it, put into a map by the user side before it
//! attaches anything. Every program reports through `events`; what does not fit is counted there, never forgotten.
//! The user side attaches one of the two fault sources (`faults`) and the programs of `addrspace` and `processes`.
#![no_std]
#![no_main]

mod addrspace;
mod container;
mod events;
mod faults;
mod kernel;
mod mappings;
mod processes;
mod sockets;

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // The verifier accepts no program that can get here.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
