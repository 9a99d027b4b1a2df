//! Waiting for what happens by itself.

use anyhow::{Result, ensure};
use std::fmt::Debug;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long that may take: far longer than on a machine that does nothing else.
pub const PATIENCE: Duration = Duration::from_secs(60);
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// Looks again and again until `look` finds nothing any more.
///
/// # Errors
/// When there is still something after [`PATIENCE`], and those of `look`.
pub fn wait_until_none<T: Debug>(look: impl Fn() -> Result<Vec<T>>) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let found = look()?;
        if found.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < end, "after {PATIENCE:?} there is still {found:?}");
        sleep(BETWEEN_LOOKS);
    }
}
