//! Where cargo puts the programs of this workspace.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// A directory with this workspace's programs: `pclive`, `load` and the workloads.
#[derive(Debug, Clone)]
pub struct Programs {
    dir: PathBuf,
}

impl Programs {
    /// The programs in `dir`.
    pub fn in_dir(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// Those that cargo builds beside the program or test that is running.
    ///
    /// # Errors
    /// When the kernel does not tell where that is.
    pub fn beside_own() -> Result<Self> {
        let own = std::env::current_exe().context("find the running program")?;
        let dir = own.ancestors().skip(1).find(|dir| !dir.ends_with("deps"));
        Ok(Self::in_dir(dir.context("the running program is in no directory")?))
    }

    /// The program `name`.
    ///
    /// # Errors
    /// When it was not built.
    pub fn path(&self, name: &str) -> Result<PathBuf> {
        let path = self.dir.join(name);
        if !path.exists() {
            bail!("{} is not there: build it, or run the tests by `cargo xtask test`", path.display());
        }
        Ok(path)
    }
}
