//! `timerfd_create(2)`.
//!
//! Remaining time comes from `timerfd_gettime(2)`, because fdinfo shows 0 for a periodic timer that expired unread. That
//! call also counts the periods that passed since, so ticks are read from fdinfo after it.

use super::error::{FileError, Refusal};
use super::fdinfo::FdInfo;
use super::identity::Found;
use pclive_sys::timerfd;
use pclive_wire::manifest::DescriptionKind;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// `TFD_TIMER_CANCEL_ON_SET` among the settime flags.
const CANCEL_ON_SET: u32 = 1 << 1;

pub(super) fn capture(found: &Found, duplicate: &OwnedFd) -> Result<DescriptionKind, Refusal> {
    let slot = found.slot();
    let spec = timerfd::get(duplicate.as_fd()).map_err(FileError::call("timerfd_gettime", &slot))?;
    let path = format!("/proc/self/fdinfo/{}", duplicate.as_raw_fd());
    let text = std::fs::read_to_string(&path).map_err(|error| FileError::Proc { path, error })?;
    let info = FdInfo::parse(text, &slot)?;
    let missing = |field| FileError::FdInfo { object: slot.to_string(), field };
    let field = |name: &str| info.field(name);
    let flags = field("settime flags:").and_then(|value| u32::from_str_radix(value, 8).ok());
    if flags.ok_or_else(|| missing("settime flags"))? & CANCEL_ON_SET != 0 {
        return Err(Refusal::unsupported(
            "a timer that watches the system clock being set (TFD_TIMER_CANCEL_ON_SET), which differs between hosts",
            "close it before the migration",
        ));
    }
    Ok(DescriptionKind::Timerfd {
        clock: field("clockid:").and_then(|value| value.parse().ok()).ok_or_else(|| missing("clockid"))?,
        ticks: field("ticks:").and_then(|value| value.parse().ok()).ok_or_else(|| missing("ticks"))?,
        value_ns: spec.value_ns,
        interval_ns: spec.interval_ns,
    })
}
