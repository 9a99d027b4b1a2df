//! The toolchain for the eBPF programs: what `pclive-user/build.rs` looks for.
//!
//! A compiler that comes with the sources of `core`, either rustup's nightly with `rust-src`, used where it is there
//! already, or Debian's `rustc-web` with `rust-web-src`; and bpf-linker, built against the LLVM of that compiler,
//! because LLVM reads the bitcode of its own and older versions only.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result};

use super::apt_install;
use crate::build::show;

/// Debian's compiler. Not `rustc`, which may be rustup's stable.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// Installs what is missing for building the eBPF programs; does nothing on a machine that has it all.
pub fn install_ebpf_toolchain() -> Result<()> {
    let version = match compiler_version() {
        Some(version) => version,
        None => {
            apt_install(&["rustc-web", "rust-web-src"])?;
            compiler_version()
                .with_context(|| format!("{DEBIAN_RUSTC} has no sources of core after its installation"))?
        }
    };
    if has_linker() {
        return Ok(());
    }
    let llvm = llvm_major(&version).with_context(|| format!("no LLVM version in {version:?}"))?;
    let prefix = format!("/usr/lib/llvm-{llvm}");
    if !Path::new(&prefix).join("include/llvm-c/Core.h").is_file() {
        apt_install(&[&format!("llvm-{llvm}-dev")])?;
    }
    let mut cargo = Command::new("cargo");
    cargo
        .args(["install", "bpf-linker", "--locked", "--no-default-features", "--features"])
        .arg(format!("llvm-{llvm}"))
        .env("LLVM_PREFIX", prefix)
        // `cargo xtask` runs in the workspace's settings; the linker has its own target directory.
        .env_remove("CARGO_TARGET_DIR");
    println!("building bpf-linker");
    show(&mut cargo)
}

/// `rustc -vV` of the compiler that the build script will choose, if there is one.
fn compiler_version() -> Option<String> {
    let nightly = || {
        let mut rustc = Command::new("rustup");
        rustc.args(["run", "nightly", "rustc"]);
        rustc
    };
    [nightly as fn() -> Command, || Command::new(DEBIAN_RUSTC)].into_iter().find_map(|rustc| {
        let sysroot = output_of(rustc().args(["--print", "sysroot"]))?;
        let sources = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml");
        if sources.is_file() { output_of(rustc().arg("-vV")) } else { None }
    })
}

/// The major version in the line `LLVM version: 22.1.8`.
fn llvm_major(version: &str) -> Option<u32> {
    let llvm = version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    llvm.split('.').next()?.parse().ok()
}

/// Whether bpf-linker is where the build script looks: in `PATH` or where `cargo install` puts it.
fn has_linker() -> bool {
    let cargo_home = env::var_os("CARGO_HOME").map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).chain(cargo_home).any(|directory| directory.join("bpf-linker").is_file())
}

fn output_of(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_of_llvm_is_read_from_rustc() {
        assert_eq!(
            llvm_major("rustc 1.96.0 (built from a source tarball)\nhost: x\nLLVM version: 22.1.8\n"),
            Some(22)
        );
        assert_eq!(llvm_major("rustc 1.96.0\nhost: x\n"), None);
    }
}
