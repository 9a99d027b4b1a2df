//! `signalfd(2)`: everything is in fdinfo.

use super::error::{FileError, Refusal};
use super::identity::Found;
use pclive_wire::manifest::DescriptionKind;

pub(super) fn capture(found: &Found) -> Result<DescriptionKind, Refusal> {
    let mask = found
        .open
        .info
        .field("sigmask:")
        .and_then(|value| u64::from_str_radix(value, 16).ok())
        .ok_or_else(|| FileError::FdInfo { object: found.slot().to_string(), field: "sigmask" })?;
    Ok(DescriptionKind::Signalfd { mask })
}
