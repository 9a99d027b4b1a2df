//! Builds the eBPF programs into `OUT_DIR/pclive-ebpf`, from where `track::ebpf` embeds them.
//!
//! They need `core` built from source, so a compiler whose library sources are there: rustup's nightly with
//! `rust-src`, as is usual with aya, or else Debian's `rustc-web` with `rust-web-src`. The settings of the build are
//! those of `pclive-ebpf/.cargo/config.toml`. `aya-build` knows rustup's toolchains only.

use std::{
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

/// Seen from this package's directory, where cargo runs build scripts.
const EBPF_CRATE: &str = "../pclive-ebpf";
const REMEDY: &str = "run `cargo xtask setup`";

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            println!("cargo::error=cannot build pclive's eBPF programs: {reason}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets no OUT_DIR")?);
    for input in ["src", "abi/src", "abi/Cargo.toml", "Cargo.toml", "Cargo.lock", ".cargo/config.toml"] {
        println!("cargo::rerun-if-changed={EBPF_CRATE}/{input}");
    }

    let mut cargo = Toolchain::find()?.cargo();
    let mut path = env::var_os("PATH").unwrap_or_default();
    path.push(":");
    path.push(directory_of_linker()?);
    let output = cargo
        .args(["build", "--release", "--locked", "--quiet", "-Zunstable-options", "--artifact-dir"])
        .arg(&out_dir)
        .arg("--target-dir")
        .arg(shared_target_dir(&out_dir))
        .env("PATH", path)
        .current_dir(EBPF_CRATE)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("running {cargo:?}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    for line in String::from_utf8_lossy(&output.stderr).lines() {
        println!("cargo::warning={line}");
    }
    Err(format!("{cargo:?}: {}; is bpf-linker's LLVM as new as the compiler's?", output.status))
}

/// A directory that the build scripts of all profiles share, so that `core` is built once:
/// `OUT_DIR` is `TARGET/PROFILE/build/pclive-HASH/out`.
fn shared_target_dir(out_dir: &Path) -> PathBuf {
    out_dir.ancestors().nth(4).unwrap_or(out_dir).join("ebpf")
}

/// What an outer `cargo clippy`, `cargo doc` or a caller's settings for the host would wrongly pass on.
const INHERITED: [&str; 9] = [
    "CARGO_BUILD_TARGET",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_INCREMENTAL",
    "RUSTC",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_WRAPPER",
    "RUSTDOC",
    "RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
];

enum Toolchain {
    /// rustup's nightly.
    Nightly,
    /// A stable compiler, told to accept `-Z build-std`, run by the cargo that runs this script.
    Debian(PathBuf),
}

impl Toolchain {
    fn find() -> Result<Self, String> {
        let debian = PathBuf::from("/usr/bin/rustc");
        if has_library_sources(Command::new("rustup").args(["run", "nightly", "rustc"])) {
            Ok(Self::Nightly)
        } else if has_library_sources(&mut Command::new(&debian)) {
            Ok(Self::Debian(debian))
        } else {
            Err(format!(
                "neither rustup's nightly nor {} comes with the sources of Rust's core library; {REMEDY}",
                debian.display()
            ))
        }
    }

    fn cargo(&self) -> Command {
        let mut cargo = Command::new(match self {
            Self::Nightly => OsStr::new("rustup"),
            Self::Debian(_) => OsStr::new(env!("CARGO")),
        });
        for inherited in INHERITED {
            cargo.env_remove(inherited);
        }
        match self {
            Self::Nightly => cargo.args(["run", "nightly", "cargo"]),
            Self::Debian(rustc) => cargo.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1"),
        };
        cargo
    }
}

fn has_library_sources(rustc: &mut Command) -> bool {
    let Ok(output) = rustc.args(["--print", "sysroot"]).stderr(Stdio::null()).output() else { return false };
    let sysroot = String::from_utf8_lossy(&output.stdout);
    output.status.success()
        && Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml").is_file()
}

/// Where bpf-linker is: in `PATH`, or where `cargo install` puts it.
fn directory_of_linker() -> Result<PathBuf, String> {
    let cargo_home = env::var_os("CARGO_HOME").map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(cargo_home)
        .find(|directory| directory.join("bpf-linker").is_file())
        .ok_or_else(|| format!("bpf-linker is not installed; {REMEDY}"))
}
