//! `cargo xtask setup`: installs what building and testing pclive needs. Does nothing where all is there.

mod ebpf;

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::build::{need_root, show, write_program};

/// What the lab and the suites use.
const PACKAGES: [&str; 12] = [
    "build-essential",
    "ca-certificates",
    "crun",
    "iproute2",
    "kmod",
    "memcached",
    "mount",
    "qemu-system-x86",
    "redis-server",
    "redis-tools",
    "runc",
    "util-linux",
];
/// Debian asks this program before it starts an installed service; 101 forbids it.
const POLICY: &str = "/usr/sbin/policy-rc.d";

/// Installs what is missing, and says so.
///
/// # Errors
/// When not run as root, on another system than Debian, or when a package cannot be installed.
pub fn setup() -> Result<()> {
    need_root()?;
    ensure!(
        is_debian(),
        "this is no Debian: install {}, and a toolchain for eBPF yourself",
        PACKAGES.join(", ")
    );
    install_missing()?;
    println!("everything is installed");
    Ok(())
}

/// What every command that needs the programs and packages does first: the same, but on other systems it trusts that
/// everything is there.
///
/// # Errors
/// When not run as root, or when a package cannot be installed.
pub fn prepare() -> Result<()> {
    need_root()?;
    if is_debian() { install_missing() } else { Ok(()) }
}

fn is_debian() -> bool {
    Path::new("/usr/bin/apt-get").exists()
}

fn install_missing() -> Result<()> {
    let missing: Vec<_> = PACKAGES.into_iter().filter(|package| !is_installed(package)).collect();
    if !missing.is_empty() {
        apt_install(&missing)?;
    }
    ebpf::install_ebpf_toolchain()
}

/// Installs packages; a server's is not started.
fn apt_install(packages: &[&str]) -> Result<()> {
    println!("installing {}", packages.join(" "));
    let _policy = NoServices::declare()?;
    show(apt_get().args(["update", "--quiet=2"]))?;
    show(apt_get().args(["install", "--yes", "--quiet=2", "--no-install-recommends"]).args(packages))
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}

fn is_installed(package: &str) -> bool {
    let query =
        Command::new("dpkg-query").args(["--show", "--showformat=${db:Status-Status}", package]).output();
    query.is_ok_and(|output| output.stdout == b"installed")
}

/// While it exists, installing a server's package does not start the server.
struct NoServices {
    ours: bool,
}

impl NoServices {
    fn declare() -> Result<Self> {
        let ours = !Path::new(POLICY).exists();
        if ours {
            write_program(Path::new(POLICY), "#!/bin/sh\nexit 101\n")?;
        }
        Ok(Self { ours })
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = fs::remove_file(POLICY)
        {
            eprintln!("remove {POLICY}: {error}");
        }
    }
}
