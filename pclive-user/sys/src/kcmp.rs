//! Whether two processes share a kernel object: `kcmp(2)`.
//!
//! The answers are an order relation over kernel addresses (obfuscated, but stable until reboot), so n objects are told
//! apart with n·log n calls instead of n².

use nix::errno::Errno;
use pclive_wire::HostPid;
use std::cmp::Ordering;
use std::os::fd::RawFd;

// `enum kcmp_type` of linux/kcmp.h.
const KCMP_FILE: i32 = 0;
const KCMP_EPOLL_TFD: i32 = 7;

/// What two tasks may share as a whole (`enum kcmp_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Shared {
    /// Address space (`CLONE_VM`).
    Vm = 1,
    /// Descriptor table (`CLONE_FILES`).
    Files = 2,
    /// Root, working directory and umask (`CLONE_FS`).
    Fs = 3,
    /// Signal handlers (`CLONE_SIGHAND`).
    Sighand = 4,
    /// I/O context (`CLONE_IO`).
    Io = 5,
    /// System V semaphore undo list (`CLONE_SYSVSEM`).
    SysvSem = 6,
}

/// An entry of an epoll interest list (`struct kcmp_epoll_slot`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct EpollSlot {
    /// The epoll descriptor.
    pub epoll: u32,
    /// Number under which the target was added.
    pub target: u32,
    /// Which of the entries with that number, in the order of `/proc/PID/fdinfo`.
    pub nth: u32,
}

const _: () = assert!(size_of::<EpollSlot>() == 12);

/// Orders the open file descriptions behind two descriptors; `Equal` means they are one.
///
/// # Errors
/// `EBADF` if one of the descriptors is not open, `ESRCH`, `EPERM` (needs `PTRACE_MODE_READ_REALCREDS`).
pub fn compare_files(a: (HostPid, RawFd), b: (HostPid, RawFd)) -> nix::Result<Ordering> {
    // SAFETY: KCMP_FILE takes integers only.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, a.0.0, b.0.0, KCMP_FILE, a.1, b.1) };
    decode(order)
}

/// Orders an object that two tasks may share; `Equal` means they share it. Tasks may be threads.
///
/// # Errors
/// `ESRCH`, `EPERM`.
pub fn compare_tasks(a: HostPid, b: HostPid, what: Shared) -> nix::Result<Ordering> {
    // SAFETY: these types take integers only.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, a.0, b.0, what as i32, 0, 0) };
    decode(order)
}

/// Whether descriptor `file` of a process is what the entry `slot` of an epoll set of the process `epoll` watches
/// (Linux 4.13).
///
/// # Errors
/// `ENOENT` if there is no such entry, `EBADF` if a descriptor is not open, `EINVAL` if it is no epoll set.
pub fn is_epoll_target(file: (HostPid, RawFd), epoll: HostPid, slot: &EpollSlot) -> nix::Result<bool> {
    // SAFETY: `slot` is a live `struct kcmp_epoll_slot` (layout asserted above), which the kernel only reads.
    let order = unsafe {
        libc::syscall(libc::SYS_kcmp, file.0.0, epoll.0, KCMP_EPOLL_TFD, file.1, std::ptr::from_ref(slot))
    };
    decode(order).map(Ordering::is_eq)
}

/// Binary search with a comparison that can fail, in a slice that it sorts: where the wanted element is, or where it
/// belongs. `compare` orders an element against the wanted one.
///
/// # Errors
/// The first that `compare` returns.
pub fn search<T, E>(
    sorted: &[T],
    mut compare: impl FnMut(&T) -> Result<Ordering, E>,
) -> Result<Result<usize, usize>, E> {
    let (mut low, mut high) = (0, sorted.len());
    while low < high {
        let middle = low.midpoint(high);
        match compare(&sorted[middle])? {
            Ordering::Equal => return Ok(Ok(middle)),
            Ordering::Less => low = middle + 1,
            Ordering::Greater => high = middle,
        }
    }
    Ok(Err(low))
}

/// Reads the return value: 0 equal, 1 less, 2 greater, 3 different without order (which the kernel never gives for
/// pointers).
fn decode(returned: libc::c_long) -> nix::Result<Ordering> {
    match Errno::result(returned)? {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        _ => Err(Errno::ENOTSUP),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
    use nix::sys::eventfd::EventFd;
    use std::fs::File;
    use std::os::fd::AsRawFd;

    fn me() -> HostPid {
        HostPid(std::process::id() as i32)
    }

    #[test]
    fn a_dup_is_equal_and_another_open_is_ordered() {
        let file = File::open("/proc/self/exe").unwrap();
        let dup = file.try_clone().unwrap();
        let other = File::open("/proc/self/exe").unwrap();
        let order = |a: &File, b: &File| compare_files((me(), a.as_raw_fd()), (me(), b.as_raw_fd())).unwrap();
        assert_eq!(order(&file, &dup), Ordering::Equal);
        assert_ne!(order(&file, &other), Ordering::Equal);
        assert_eq!(order(&file, &other), order(&other, &file).reverse());
        assert_eq!(compare_files((me(), 1 << 20), (me(), 0)).unwrap_err(), Errno::EBADF);
    }

    #[test]
    fn a_search_finds_the_element_or_its_place_or_fails() {
        let sorted = [1, 3, 5, 7];
        let find = |wanted: i32| search(&sorted, |element| Ok::<_, ()>(element.cmp(&wanted)));
        assert_eq!(find(5), Ok(Ok(2)));
        assert_eq!([find(0), find(4), find(8)], [Ok(Err(0)), Ok(Err(2)), Ok(Err(4))]);
        assert_eq!(search(&sorted, |_| Err("gone")), Err("gone"));
        assert_eq!(search(&[] as &[i32], |_| Err("never asked")), Ok(Err(0)));
    }

    #[test]
    fn a_child_has_its_own_mm_and_a_thread_has_not() {
        let mut child = std::process::Command::new("sleep").arg("10").spawn().unwrap();
        let pid = HostPid(child.id() as i32);
        assert_ne!(compare_tasks(me(), pid, Shared::Vm).unwrap(), Ordering::Equal);
        let thread = HostPid(nix::unistd::gettid().as_raw());
        assert_eq!(compare_tasks(me(), thread, Shared::Vm).unwrap(), Ordering::Equal);
        assert_eq!(compare_tasks(me(), thread, Shared::Files).unwrap(), Ordering::Equal);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn an_epoll_entry_knows_its_file() {
        let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
        let (watched, other) = (EventFd::new().unwrap(), EventFd::new().unwrap());
        epoll.add(&watched, EpollEvent::new(EpollFlags::EPOLLIN, 1)).unwrap();
        let number = |fd: &EventFd| std::os::fd::AsFd::as_fd(fd).as_raw_fd();
        let slot =
            |nth| EpollSlot { epoll: epoll.0.as_raw_fd() as u32, target: number(&watched) as u32, nth };
        assert!(is_epoll_target((me(), number(&watched)), me(), &slot(0)).unwrap());
        assert!(!is_epoll_target((me(), number(&other)), me(), &slot(0)).unwrap());
        assert_eq!(is_epoll_target((me(), number(&other)), me(), &slot(1)).unwrap_err(), Errno::ENOENT);
    }
}
