//! A kernel of Debian's, fetched beside this machine's own packages.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::build::{output, show};

/// It has drivers for virtual machines only, and is a third as large as the others.
const META_PACKAGE: &str = "linux-image-cloud-amd64";
const IMAGE: &str = "linux-image-";
/// Debian's keys.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

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
        let modules = dir.join("lib/modules");
        let entry = fs::read_dir(&modules).with_context(|| format!("list {}", modules.display()))?.next();
        let release = entry.context("there are no modules")??.file_name().to_string_lossy().into_owned();
        let places = [dir.join(format!("boot/vmlinuz-{release}")), modules.join(&release).join("vmlinuz")];
        let image = places.into_iter().find(|path| path.exists());
        let image = image.with_context(|| format!("there is no kernel in it: remove {}", dir.display()))?;
        Ok(Self { image, release })
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
    let depends = |package: &str| -> Result<Vec<String>> {
        let text = output(apt("apt-cache").args(["depends", "--important", package]))?;
        let names = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
        Ok(names.map(str::to_owned).collect())
    };
    let image = depends(META_PACKAGE)?.into_iter().find(|name| name.starts_with(IMAGE));
    let image = image.with_context(|| format!("{debian} has no {META_PACKAGE}"))?;
    let release = &image[IMAGE.len()..];
    // Newer ones have their modules, and the kernel itself, in packages of their own.
    let parts = depends(&image)?.into_iter().filter(|name| name.ends_with(release));
    show(apt("apt-get").arg("download").arg(&image).args(parts))?;
    for file in fs::read_dir(dir)?.flatten().map(|entry| entry.path()) {
        if file.extension().is_some_and(|extension| extension == "deb") {
            show(Command::new("dpkg-deb").arg("--extract").arg(file).arg(dir.join("kernel")))?;
        }
    }
    if !dir.join("kernel/lib").exists() {
        // Newer packages know no /lib but the one in /usr.
        std::os::unix::fs::symlink("usr/lib", dir.join("kernel/lib")).context("link the modules")?;
    }
    show(Command::new("depmod").arg("--basedir").arg(dir.join("kernel")).arg(release))
}

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
