//! Reading kernel objects at offsets that the user side looked up in the running kernel's BTF.

use aya_ebpf::{Global, helpers::bpf_probe_read_kernel};

/// Where a member lies in its structure; filled in by the user side at load.
pub type Offset = Global<u64>;

#[unsafe(no_mangle)]
static TASK_PID: Offset = Offset::new(0);
#[unsafe(no_mangle)]
static TASK_TGID: Offset = Offset::new(0);
#[unsafe(no_mangle)]
static TASK_SIGNAL: Offset = Offset::new(0);
#[unsafe(no_mangle)]
static SIGNAL_LIVE: Offset = Offset::new(0);
#[unsafe(no_mangle)]
static VMA_MM: Offset = Offset::new(0);
#[unsafe(no_mangle)]
static VMA_FLAGS: Offset = Offset::new(0);
#[unsafe(no_mangle)]
static MM_OWNER: Offset = Offset::new(0);

/// A kernel pointer that came as a program's argument or out of another object.
#[derive(Clone, Copy)]
pub struct Object(u64);

impl Object {
    /// The object at `address`.
    #[inline(always)]
    pub fn at(address: u64) -> Self {
        Self(address)
    }

    /// The value `offset` bytes into the object; `None` if that is no readable memory.
    #[inline(always)]
    pub fn read<T>(self, offset: u64) -> Option<T> {
        // SAFETY: the helper checks the address itself and fails instead of faulting.
        unsafe { bpf_probe_read_kernel((self.0 + offset) as *const T) }.ok()
    }

    #[inline(always)]
    fn follow(self, offset: u64) -> Option<Self> {
        self.read::<u64>(offset).filter(|address| *address != 0).map(Self)
    }
}

/// `task->tgid`.
#[inline(always)]
pub fn task_tgid(task: Object) -> Option<u32> {
    task.read(TASK_TGID.load())
}

/// Whether `task` is its process's first thread.
#[inline(always)]
pub fn task_is_leader(task: Object) -> bool {
    task.read::<u32>(TASK_PID.load()) == task_tgid(task)
}

/// Whether `task`, in its exit, was its process's last thread (`task->signal->live` is counted down before).
#[inline(always)]
pub fn task_was_last(task: Object) -> bool {
    let live = task.follow(TASK_SIGNAL.load()).and_then(|signal| signal.read::<i32>(SIGNAL_LIVE.load()));
    live == Some(0)
}

/// The process that owns the memory of `vma`: `vma->vm_mm->owner->tgid`.
#[inline(always)]
pub fn vma_owner(vma: Object) -> Option<u32> {
    task_tgid(vma.follow(VMA_MM.load())?.follow(MM_OWNER.load())?)
}

/// `vma->vm_flags`.
#[inline(always)]
pub fn vma_flags(vma: Object) -> Option<u64> {
    vma.read(VMA_FLAGS.load())
}
