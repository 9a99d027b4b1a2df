//! Flags of mappings, for who asks: `smaps` tells them, too, but walks the page tables of everything above.
//!
//! A program at a raw tracepoint can look up mappings of the current process only: no other task has a type there (`bpf_find_vma`
//! and `bpf_loop`, Linux 5.17). So the process itself has to come by: the user side puts its question into a map and has the
//! process call `wait4(2)`, which few do, so that nobody else is slowed down.

use aya_ebpf::{
    EbpfContext,
    btf_maps::Array,
    helpers::generated::{bpf_find_vma, bpf_get_current_task_btf, bpf_loop},
    macros::{btf_map, raw_tracepoint},
    programs::RawTracePointContext,
};
use core::ffi::c_void;
use pclive_abi::{FLAG_QUESTION_WORDS, FlagQuestion};

use crate::kernel::{self, Object};

/// The question, one at a time.
#[btf_map]
static FLAG_QUESTION: Array<FlagQuestion, 1> = Array::new();

/// `sched:sched_process_wait(struct pid *pid)`.
#[raw_tracepoint(tracepoint = "sched_process_wait")]
pub fn sched_process_wait(ctx: RawTracePointContext) -> i32 {
    if let Some(asked) = read(0).filter(|asked| *asked as u32 == ctx.tgid()) {
        let next: unsafe extern "C" fn(u32, *mut c_void) -> i64 = answer;
        // SAFETY: the callback has the signature that the helper wants, and has returned when the helper does.
        unsafe { bpf_loop((asked >> 32) as u32, next as *mut c_void, core::ptr::null_mut(), 0) };
        write(0, 0);
    }
    0
}

/// `bpf_loop`'s callback, since the verifier looks at each turn of a loop by itself: answers for the `index`th mapping.
unsafe extern "C" fn answer(index: u32, _ctx: *mut c_void) -> i64 {
    let place = index as usize + 1;
    if let Some(address) = read(place) {
        write(place, flags_at(address));
    }
    0
}

/// 0 if there is no mapping, or another thread has the process's mappings locked.
fn flags_at(address: u64) -> u64 {
    let mut flags = 0_u64;
    let found: unsafe extern "C" fn(u64, u64, *mut u64) -> i64 = take_flags;
    let flags_at = (&raw mut flags).cast();
    // SAFETY: the callback has the signature that the helper wants, is called at most once, and has returned when the helper does:
    // so `flags` outlives it, and nobody else uses it meanwhile.
    unsafe { bpf_find_vma(bpf_get_current_task_btf(), address, found as *mut c_void, flags_at, 0) };
    flags
}

/// `bpf_find_vma`'s callback: `(struct task_struct *task, struct vm_area_struct *vma, void *ctx)`.
unsafe extern "C" fn take_flags(_task: u64, vma: u64, flags: *mut u64) -> i64 {
    if let Some(found) = kernel::vma_flags(Object::at(vma)) {
        // SAFETY: the caller's variable, see there.
        unsafe { *flags = found };
    }
    0
}

/// Where a word of the question is: no reference, as the user side writes it, too.
#[inline(always)]
fn word(place: usize) -> Option<*mut u64> {
    let words = FLAG_QUESTION.get_ptr_mut(0)?.cast::<u64>();
    // SAFETY: within the element.
    (place < FLAG_QUESTION_WORDS).then(|| unsafe { words.add(place) })
}

#[inline(always)]
fn read(place: usize) -> Option<u64> {
    // SAFETY: the map's memory stays, and a word is read as a whole.
    word(place).map(|word| unsafe { word.read_volatile() })
}

#[inline(always)]
fn write(place: usize, value: u64) {
    if let Some(word) = word(place) {
        // SAFETY: as above. Who else writes it meanwhile spoils an answer, nothing else.
        unsafe { word.write_volatile(value) };
    }
}
