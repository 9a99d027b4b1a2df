//! Timer descriptors in plain nanoseconds: `timerfd_create(2)`, and the pending expirations that only
//! `TFD_IOC_SET_TICKS` can give back.

use nix::errno::Errno;
use nix::libc::{itimerspec, timespec};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Time to the next expiry and interval of a timer, in nanoseconds; a timer with `value_ns` 0 is disarmed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimerSpec {
    /// Nanoseconds to the next expiry.
    pub value_ns: u64,
    /// Nanoseconds from one expiry to the next; 0 for a timer that expires once.
    pub interval_ns: u64,
}

/// Makes a disarmed timer on `clock` (`CLOCK_*`), close-on-exec.
///
/// # Errors
/// `EINVAL` for a clock without timers, `EPERM` for alarm clocks without `CAP_WAKE_ALARM`.
pub fn create(clock: i32) -> nix::Result<OwnedFd> {
    // SAFETY: timerfd_create takes two integers.
    let fd = Errno::result(unsafe { libc::timerfd_create(clock, libc::TFD_CLOEXEC) })?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Reads what is left of a timer. A periodic timer that expired unread is moved on to its next expiry, which `fdinfo`
/// does not do (`timerfd_show` in fs/timerfd.c).
///
/// # Errors
/// `EINVAL` if `timer` is no timer.
pub fn get(timer: BorrowedFd<'_>) -> nix::Result<TimerSpec> {
    let zero = timespec { tv_sec: 0, tv_nsec: 0 };
    let mut spec = itimerspec { it_interval: zero, it_value: zero };
    // SAFETY: `spec` is a live itimerspec for the kernel to fill.
    Errno::result(unsafe { libc::timerfd_gettime(timer.as_raw_fd(), &mut spec) })?;
    Ok(TimerSpec { value_ns: nanoseconds(spec.it_value), interval_ns: nanoseconds(spec.it_interval) })
}

/// Arms a timer to expire after `spec.value_ns`, then every `spec.interval_ns`. Unread expirations are forgotten.
///
/// # Errors
/// `EINVAL` if `timer` is no timer.
pub fn set(timer: BorrowedFd<'_>, spec: TimerSpec) -> nix::Result<()> {
    let spec =
        itimerspec { it_interval: timespec_of(spec.interval_ns), it_value: timespec_of(spec.value_ns) };
    // SAFETY: `spec` is a live itimerspec that the kernel reads; the old value is not asked for.
    Errno::result(unsafe { libc::timerfd_settime(timer.as_raw_fd(), 0, &spec, std::ptr::null_mut()) })?;
    Ok(())
}

mod ioctl {
    nix::ioctl_write_ptr!(tfd_ioc_set_ticks, b'T', 0, u64);
}

/// Gives a timer `ticks` unread expirations (Linux 3.17, `CONFIG_CHECKPOINT_RESTORE`).
///
/// # Errors
/// `EINVAL` for 0 ticks, `ENOTTY` if the kernel lacks it.
pub fn set_ticks(timer: BorrowedFd<'_>, ticks: u64) -> nix::Result<()> {
    // SAFETY: the ioctl reads one u64 behind the pointer; the descriptor is borrowed for the call.
    unsafe { ioctl::tfd_ioc_set_ticks(timer.as_raw_fd(), &ticks) }?;
    Ok(())
}

fn nanoseconds(time: timespec) -> u64 {
    (time.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(time.tv_nsec as u64)
}

fn timespec_of(nanoseconds: u64) -> timespec {
    timespec { tv_sec: (nanoseconds / 1_000_000_000) as i64, tv_nsec: (nanoseconds % 1_000_000_000) as i64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsFd;

    #[test]
    fn time_and_ticks_are_what_was_set() {
        let timer = create(libc::CLOCK_MONOTONIC).unwrap();
        assert_eq!(get(timer.as_fd()).unwrap(), TimerSpec::default());
        let spec = TimerSpec { value_ns: 90_000_000_001, interval_ns: 7_500_000_000 };
        set(timer.as_fd(), spec).unwrap();
        set_ticks(timer.as_fd(), 5).unwrap();
        let now = get(timer.as_fd()).unwrap();
        assert_eq!(now.interval_ns, spec.interval_ns);
        assert!((80_000_000_000..=spec.value_ns).contains(&now.value_ns), "{now:?}");
        let mut ticks = [0; 8];
        File::from(timer).read_exact(&mut ticks).unwrap();
        assert_eq!(u64::from_ne_bytes(ticks), 5);
    }
}
