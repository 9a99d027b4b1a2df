//! `timerfd_create(2)`.
//!
//! Remaining time comes from `timerfd_gettime(2)`, because fdinfo shows 0 for a periodic timer that expired unread. That
//! call also counts the periods that passed since, so ticks are read from fdinfo after it, and as long as no other has
//! passed meanwhile. The timers of a container that stands still go on.

use super::error::{FileError, Refusal};
use super::fdinfo::FdInfo;
use super::identity::Found;
use pclive_sys::timerfd::{self, TimerSpec};
use pclive_wire::manifest::DescriptionKind;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// `TFD_TIMER_CANCEL_ON_SET` among the settime flags.
const CANCEL_ON_SET: u32 = 1 << 1;

/// How long the kernel may take to note that a timer has expired: usually 10 µs, but on a virtual machine one interrupt in
/// a hundred is later than 200 µs. A timer that is disarmed is waited for in vain; those are common that expire once, and
/// hardly ever have an interval.
const EXPIRY_ONCE: Duration = Duration::from_micros(500);
const EXPIRY_PERIODIC: Duration = Duration::from_millis(5);
/// Fewer say nothing if this thread loses the processor between them.
const LEAST_READINGS: u32 = 20;

/// What is left of a timer, and its unread expirations.
type Reading = (TimerSpec, u64);

pub(super) fn capture(found: &Found, duplicate: &OwnedFd) -> Result<DescriptionKind, Refusal> {
    let slot = found.slot();
    let path = format!("/proc/self/fdinfo/{}", duplicate.as_raw_fd());
    let missing = |field| FileError::FdInfo { object: slot.to_string(), field };
    let fdinfo = || -> Result<FdInfo, Refusal> {
        let text =
            std::fs::read_to_string(&path).map_err(|error| FileError::Proc { path: path.clone(), error })?;
        Ok(FdInfo::parse(text, &slot)?)
    };
    let info = fdinfo()?;
    let flags = info.field("settime flags:").and_then(|value| u32::from_str_radix(value, 8).ok());
    if flags.ok_or_else(|| missing("settime flags"))? & CANCEL_ON_SET != 0 {
        return Err(Refusal::unsupported(
            "a timer that watches the system clock being set (TFD_TIMER_CANCEL_ON_SET), which differs between hosts",
            "close it before the migration",
        ));
    }
    let clock =
        info.field("clockid:").and_then(|value| value.parse().ok()).ok_or_else(|| missing("clockid"))?;
    let left = || timerfd::get(duplicate.as_fd()).map_err(FileError::call("timerfd_gettime", &slot));
    let (spec, ticks) = read_settled(|| {
        loop {
            let before = left()?;
            let ticks = fdinfo()?.field("ticks:").and_then(|value| value.parse().ok());
            let spec = left()?;
            // Otherwise a period has passed, which the ticks may lack. (One that is shorter than this may pass unnoticed.)
            if spec.value_ns <= before.value_ns {
                return Ok::<Reading, Refusal>((spec, ticks.ok_or_else(|| missing("ticks"))?));
            }
        }
    })?;
    Ok(DescriptionKind::Timerfd { clock, ticks, value_ns: spec.value_ns, interval_ns: spec.interval_ns })
}

/// Reads until it is clear that a timer to whose expiry no time is left is disarmed. Between its expiry and the interrupt in
/// which the kernel notes it, a timer that is armed shows the same (`timerfd_get_remaining` in fs/timerfd.c).
fn read_settled<E>(mut read: impl FnMut() -> Result<Reading, E>) -> Result<Reading, E> {
    let start = Instant::now();
    let mut readings = 0;
    loop {
        let (spec, ticks) = read()?;
        readings += 1;
        let most = if spec.interval_ns > 0 { EXPIRY_PERIODIC } else { EXPIRY_ONCE };
        let is_noted = spec.value_ns > 0 || (spec.interval_ns == 0 && ticks > 0);
        if is_noted || (readings >= LEAST_READINGS && start.elapsed() > most) {
            return Ok((spec, ticks));
        }
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    /// What a timer is taken for that shows these readings, and the last of them from then on.
    fn settled(readings: &[(u64, u64, u64)]) -> (u64, u64) {
        let mut readings = readings.iter();
        let mut last = None;
        let read = || {
            last = readings.next().or(last);
            let &(value_ns, interval_ns, ticks) = last.expect("one reading");
            Ok::<_, Infallible>((TimerSpec { value_ns, interval_ns }, ticks))
        };
        let Ok((spec, ticks)) = read_settled(read);
        (spec.value_ns, ticks)
    }

    #[test]
    fn a_timer_that_expires_just_now_is_not_taken_for_one_that_is_disarmed() {
        assert_eq!(settled(&[(0, 40, 0), (0, 40, 0), (39, 40, 1)]), (39, 1));
        assert_eq!(settled(&[(0, 0, 0), (0, 0, 1)]), (0, 1));
        assert_eq!(settled(&[(0, 0, 0)]), (0, 0), "disarmed");
        assert_eq!(settled(&[(0, 40, 0)]), (0, 0), "disarmed, with an interval");
        assert_eq!(settled(&[(7, 0, 0), (6, 0, 0)]), (7, 0));
    }

    #[test]
    fn an_armed_periodic_timer_hardly_ever_has_no_time_left() {
        let timer = timerfd::create(libc::CLOCK_MONOTONIC).unwrap();
        timerfd::set(timer.as_fd(), TimerSpec { value_ns: 50_000, interval_ns: 50_000 }).unwrap();
        let is_disarmed = |_: &i32| {
            let (spec, _) = read_settled(|| timerfd::get(timer.as_fd()).map(|spec| (spec, 0))).unwrap();
            spec.value_ns == 0
        };
        // A processor that its hypervisor stops notes nothing. Of single readings more than a hundred say so.
        let taken_for_disarmed = (0..50_000).filter(is_disarmed).count();
        assert!(taken_for_disarmed < 5, "{taken_for_disarmed} times");
    }
}
