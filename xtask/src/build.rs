//! Running cargo on this workspace.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail, ensure};
use pclive_tests::Programs;

/// A cargo command in the workspace.
pub fn cargo<const N: usize>(args: [&str; N]) -> Command {
    // Cargo tells which one it is; a plain `cargo` is right for someone who runs the program by hand.
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(workspace());
    command
}

/// Runs a command whose output is the user's to see.
///
/// # Errors
/// When it cannot be started or fails.
pub fn show(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("start {command:?}"))?;
    succeeded(command, status)
}

/// Makes an error of the end of a command that failed.
///
/// # Errors
/// When it failed.
pub fn succeeded(command: &Command, status: ExitStatus) -> Result<()> {
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}

/// Builds the programs that the suites run: `cargo test` builds a package's programs for its own tests only.
///
/// # Errors
/// When they do not build.
pub fn build_programs() -> Result<()> {
    show(&mut cargo(["build", "--workspace", "--bins", "--exclude", "xtask"]))
}

/// Writes a program that the kernel can start.
///
/// # Errors
/// When the file cannot be written.
pub fn write_program(path: &Path, text: &str) -> Result<()> {
    let failed = || format!("write {}", path.display());
    fs::write(path, text).with_context(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).with_context(failed)
}

/// What a command prints; its errors are the user's to see.
///
/// # Errors
/// When it cannot be started or fails.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.stderr(Stdio::inherit()).output().with_context(|| format!("start {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The programs for measurements: those in `dir`, or else the workspace's, which are built.
///
/// # Errors
/// When they do not build.
pub fn release_programs(dir: Option<&Path>) -> Result<Programs> {
    if let Some(dir) = dir {
        return Ok(Programs::in_dir(dir));
    }
    show(&mut cargo(["build", "--quiet", "--release", "--workspace", "--bins", "--exclude", "xtask"]))?;
    let own = std::env::current_exe().context("find the running program")?;
    let target = own.ancestors().nth(2).context("cargo puts programs into a profile's directory")?;
    Ok(Programs::in_dir(target.join("release")))
}

/// Refuses to go on without root: namespaces, containers and eBPF need it.
///
/// # Errors
/// When not run as root.
pub fn need_root() -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "this makes namespaces, containers and eBPF programs: run it as root"
    );
    Ok(())
}

/// Where the workspace is.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is in the workspace")
}
