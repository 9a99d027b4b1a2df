//! Processes of the container that appear, change their program, and go.

use aya_ebpf::{EbpfContext, macros::raw_tracepoint, programs::RawTracePointContext};
use aya_log_ebpf::debug;
use pclive_abi::Kind;

use crate::{
    container, events,
    kernel::{self, Object},
};

/// `sched:sched_process_fork(struct task_struct *parent, struct task_struct *child)`.
#[raw_tracepoint(tracepoint = "sched_process_fork")]
pub fn sched_process_fork(ctx: RawTracePointContext) -> i32 {
    let child = Object::at(ctx.arg(1));
    // New threads share memory and fate with their process.
    if container::has_current_task()
        && kernel::task_is_leader(child)
        && let Some(child) = kernel::task_tgid(child)
    {
        container::add_process(child);
        debug!(&ctx, "process {} forked {}", ctx.tgid(), child);
        events::change(&ctx, Kind::Forked, 0, ctx.tgid(), child);
    }
    0
}

/// `sched:sched_process_exec(struct task_struct *p, pid_t old_pid, struct linux_binprm *bprm)`.
#[raw_tracepoint(tracepoint = "sched_process_exec")]
pub fn sched_process_exec(ctx: RawTracePointContext) -> i32 {
    if container::has_current_task() {
        // A process that was moved into the container before (as by `runc exec`) shows up here for the first time.
        container::add_process(ctx.tgid());
        debug!(&ctx, "process {} executes another program", ctx.tgid());
        events::change(&ctx, Kind::Execed, 0, ctx.tgid(), 0);
    }
    0
}

/// `sched:sched_process_exit(struct task_struct *p, …)`; fires for each thread.
#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub fn sched_process_exit(ctx: RawTracePointContext) -> i32 {
    if kernel::task_was_last(Object::at(ctx.arg(0))) && container::has_current_task() {
        container::remove_process(ctx.tgid());
        debug!(&ctx, "process {} exits", ctx.tgid());
        events::change(&ctx, Kind::Exited, 0, ctx.tgid(), 0);
    }
    0
}
