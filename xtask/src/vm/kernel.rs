//! A kernel of Debian's, fetched beside this machine's own packages.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::build::{output, show};

/// It has drivers for virtual machines only, and is a third as large as the others.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// A kernel that was unpacked.
pub struct Kernel {
    /// What to boot.
    pub image: PathBuf,
    /// Which it is, as `uname -r` tells.
    pub release: String,
}

impl Kernel {
    /// The kernel of a release of Debian (`bookworm-backports`), unpacked into `dir`; or the one that is there already.
    ///
    /// # Errors
    /// When it cannot be fetched.
    pub fn of_release(debian: &str, dir: &Path) -> Result<Self> {
        if !dir.exists() {
            // Complete, or not there.
            let parent = dir.parent().context("the directory has a parent")?;
            let new = tempfile::tempdir_in(parent).context("make a directory for the kernel")?;
            fetch(debian, new.path())?;
            fs::rename(new.path().join("kernel"), dir).with_context(|| format!("make {}", dir.display()))?;
        }
        let boot = dir.join("boot");
        for entry in fs::read_dir(&boot).with_context(|| format!("list {}", boot.display()))? {
            let image = entry?.path();
            let name = image.file_name().and_then(|name| name.to_str());
            if let Some(release) = name.and_then(|name| name.strip_prefix("vmlinuz-")) {
                return Ok(Self { release: release.to_owned(), image });
            }
        }
        bail!("there is no kernel in {}: remove {}", boot.display(), dir.display())
    }
}

/// Unpacks the kernel into `dir/kernel`.
fn fetch(debian: &str, dir: &Path) -> Result<()> {
    println!("fetching the kernel of {debian}");
    let sources = dir.join("sources.list");
    let line = format!("deb [signed-by={KEYRING}] {} {debian} main\n", repository()?);
    fs::write(&sources, line).with_context(|| format!("write {}", sources.display()))?;
    for needed in ["lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(dir.join(needed)).with_context(|| format!("make {needed}"))?;
    }
    let apt = |program: &str| {
        let mut command = Command::new(program);
        let here = |option: &str, path: &str| format!("--option={option}={}", dir.join(path).display());
        command.current_dir(dir).args([
            here("Dir::Etc::SourceList", "sources.list"),
            here("Dir::State::Lists", "lists"),
            here("Dir::Cache", "cache"),
        ]);
        let others =
            ["Dir::Etc::SourceParts=/dev/null", "APT::Sandbox::User=root", "Acquire::Languages=none"];
        command.args(others.map(|option| format!("--option={option}"))).arg("--quiet=2");
        command
    };
    show(apt("apt-get").arg("update"))?;
    let depends = output(apt("apt-cache").args(["depends", "--important", META_PACKAGE]))?;
    let package = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
    let package = package.with_context(|| format!("{debian} has no {META_PACKAGE}"))?;
    show(apt("apt-get").args(["download", package]))?;
    let file = fs::read_dir(dir)?.flatten().map(|entry| entry.path());
    let file = file.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "deb"));
    let file = file.with_context(|| format!("apt-get did not download {package}"))?;
    show(Command::new("dpkg-deb").arg("--extract").arg(file).arg(dir.join("kernel")))?;
    let release = package.strip_prefix("linux-image-").context("a kernel is a linux-image")?;
    show(Command::new("depmod").arg("--basedir").arg(dir.join("kernel")).arg(release))
}

/// Debian's keys.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Where this machine has its Debian packages from.
fn repository() -> Result<String> {
    let targets = output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(LABEL) $(REPO_URI)",
        "Created-By: Packages",
    ]))?;
    let debian = targets.lines().find_map(|line| line.strip_prefix("Debian "));
    Ok(debian.context("apt-get knows no repository of Debian: run `apt-get update`")?.to_owned())
}
