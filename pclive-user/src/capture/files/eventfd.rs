//! `eventfd(2)`: everything is in fdinfo.

use super::error::{FileError, Refusal};
use super::identity::Found;
use pclive_wire::manifest::DescriptionKind;

pub(super) fn capture(found: &Found) -> Result<DescriptionKind, Refusal> {
    let info = &found.open.info;
    let count = info
        .field("eventfd-count:")
        .and_then(|value| u64::from_str_radix(value, 16).ok())
        .ok_or_else(|| FileError::FdInfo { object: found.slot().to_string(), field: "eventfd-count" })?;
    // Linux 6.5; nothing else tells a semaphore from a counter.
    let Some(semaphore) = info.field("eventfd-semaphore:") else {
        return Err(Refusal::unsupported(
            "an eventfd, whose kind this kernel does not show",
            "run Linux 6.5 or newer on the source host",
        ));
    };
    Ok(DescriptionKind::Eventfd { count, semaphore: semaphore != "0" })
}
