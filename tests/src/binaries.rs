//! Where cargo puts the programs of this workspace.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// The program `name`, as cargo built it beside the one that is running.
///
/// # Errors
/// When it was not built.
pub fn binary(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("find the running program")?;
    let mut dir = own.parent().expect("a program is in a directory");
    if dir.ends_with("deps") {
        dir = dir.parent().expect("deps is in a directory");
    }
    let path = dir.join(name);
    if !path.exists() {
        bail!("{} is not there: build it, or run the tests by `cargo xtask test`", path.display());
    }
    Ok(path)
}
