//! Write faults, from one of two sources.
//!
//! - `handle_mm_fault` (fentry): every write fault of a user mapping, also those that the kernel takes on behalf of
//!   somebody (`get_user_pages` for direct I/O, `process_vm_writev`, ptrace). The faulting memory is known, so a write
//!   from outside the container counts.
//! - the raw tracepoints `page_fault_user` and `page_fault_kernel`: faults of the CPU. They fire before the kernel
//!   looks for the mapping, so an event may stand for a fault that ended in `SIGSEGV`, and they miss what goes
//!   through `get_user_pages`: a scan completes them.
//!
//! A page write-protected through userfaultfd faults once until it is protected again: one event per page and round.

use aya_ebpf::{
    EbpfContext,
    macros::{fentry, raw_tracepoint},
    programs::{FEntryContext, RawTracePointContext},
};

use crate::{
    container, events,
    kernel::{self, Object},
};

/// `FAULT_FLAG_WRITE` of `enum fault_flag`.
const FAULT_FLAG_WRITE: u32 = 1;
/// `X86_PF_WRITE` of `enum x86_pf_error_code`.
const X86_PF_WRITE: u64 = 1 << 1;
/// End of the user half with five page-table levels; kernel addresses are negative.
const USER_END: u64 = 1 << 56;

/// `vm_fault_t handle_mm_fault(struct vm_area_struct *vma, unsigned long address, unsigned int flags, …)`.
#[fentry(function = "handle_mm_fault")]
pub fn handle_mm_fault(ctx: FEntryContext) -> u32 {
    if ctx.arg::<u32>(2) & FAULT_FLAG_WRITE == 0 {
        return 0;
    }
    let Some(owner) = kernel::vma_owner(Object::at(ctx.arg(0))) else { return 0 };
    if !container::has_process(owner) {
        // Moved into the container after the user side had listed its processes.
        if owner != ctx.tgid() || !container::has_current_task() {
            return 0;
        }
        container::add_process(owner);
    }
    events::write(&ctx, ctx.arg(1), owner, ctx.pid());
    0
}

/// `exceptions:page_fault_user(unsigned long address, struct pt_regs *regs, unsigned long error_code)`.
#[raw_tracepoint(tracepoint = "page_fault_user")]
pub fn page_fault_user(ctx: RawTracePointContext) -> i32 {
    page_fault(&ctx);
    0
}

/// The same for code of the kernel, such as `copy_to_user`.
#[raw_tracepoint(tracepoint = "page_fault_kernel")]
pub fn page_fault_kernel(ctx: RawTracePointContext) -> i32 {
    page_fault(&ctx);
    0
}

#[inline(always)]
fn page_fault(ctx: &RawTracePointContext) {
    let address: u64 = ctx.arg(0);
    let error_code: u64 = ctx.arg(2);
    if error_code & X86_PF_WRITE != 0 && address < USER_END && container::has_current_task() {
        events::write(ctx, address, ctx.tgid(), ctx.pid());
    }
}
