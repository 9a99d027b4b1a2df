//! `timerfd_create(2)`: a timer goes on with the time that it had left when the container was frozen.

use super::error::FileError;
use pclive_sys::timerfd::{TimerSpec, create, set, set_ticks};
use std::os::fd::{AsFd, OwnedFd};

pub(super) fn open(clock: i32, spec: TimerSpec, ticks: u64) -> Result<OwnedFd, FileError> {
    let timer = create(clock).map_err(FileError::call("timerfd_create", format_args!("clock {clock}")))?;
    if spec.value_ns > 0 {
        set(timer.as_fd(), spec).map_err(FileError::call("timerfd_settime", "timer"))?;
    }
    // After arming, which forgets them.
    if ticks > 0 {
        set_ticks(timer.as_fd(), ticks).map_err(FileError::call("ioctl(TFD_IOC_SET_TICKS)", "timer"))?;
    }
    Ok(timer)
}
