//! The way out: two ring buffers and a count of what did not fit.

use aya_ebpf::{
    EbpfContext,
    bindings::BPF_RB_NO_WAKEUP,
    btf_maps::{PerCpuArray, RingBuf},
    helpers::bpf_ktime_get_ns,
    macros::btf_map,
};
use aya_log_ebpf::warn;
use pclive_abi::{Event, Kind, Ring};

// The user side overrides both sizes when it loads the programs.
#[btf_map]
static WRITES: RingBuf<Event, { 8 << 20 }> = RingBuf::new();
#[btf_map]
static CHANGES: RingBuf<Event, { 1 << 20 }> = RingBuf::new();

/// Events that found their ring full, by [`Ring`].
#[btf_map]
static LOST: PerCpuArray<u64, 2> = PerCpuArray::new();

/// Reports a write fault at the page that holds `address`.
#[inline(always)]
pub fn write<C: EbpfContext>(ctx: &C, address: u64, tgid: u32, tid: u32) {
    match WRITES.reserve(0) {
        Some(mut entry) => {
            entry.write(event(Kind::Write, address, tgid, tid));
            entry.submit(NO_WAKEUP);
        }
        None => count_lost(ctx, Ring::Writes),
    }
}

/// Reports a change of an address space or of a process's life.
#[inline(always)]
pub fn change<C: EbpfContext>(ctx: &C, kind: Kind, address: u64, tgid: u32, extra: u32) {
    match CHANGES.reserve(0) {
        Some(mut entry) => {
            entry.write(event(kind, address, tgid, extra));
            entry.submit(NO_WAKEUP);
        }
        None => count_lost(ctx, Ring::Changes),
    }
}

// The user side drains on its own clock: waking it for each event would cost more than the event.
const NO_WAKEUP: u64 = BPF_RB_NO_WAKEUP as u64;

#[inline(always)]
fn event(kind: Kind, address: u64, tgid: u32, extra: u32) -> Event {
    // SAFETY: the helper takes no arguments and only reads the clock.
    Event::new(kind, address, unsafe { bpf_ktime_get_ns() }, tgid, extra)
}

#[inline(always)]
fn count_lost<C: EbpfContext>(ctx: &C, ring: Ring) {
    let Some(lost) = LOST.get_ptr_mut(ring as u32) else { return };
    // SAFETY: the slot is this CPU's own. A program that interrupts this one on the same CPU (an NMI) is not ours.
    let before = unsafe { *lost };
    unsafe { *lost = before + 1 };
    if before == 0 {
        warn!(ctx, "ring {} is full; from now on its events are counted only", ring as u32);
    }
}
