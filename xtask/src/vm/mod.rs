//! `cargo xtask vm`: pclive on another kernel than this machine's.
//!
//! A virtual machine is booted with a kernel of Debian's and this machine's files, which it cannot change. So all that was
//! built and installed here is there, too, and what this machine's kernel has not or forbids can be tested: fentry on a
//! host that is locked down, say, or the oldest kernel that pclive promises to work on. It is emulated, and ten times
//! slower: nothing that is measured there means anything.

mod kernel;
mod machine;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::Deserialize;

use crate::build::{build_programs, cargo, output, workspace};
use crate::setup::prepare;
use kernel::Kernel;
use machine::Machine;

/// Boot another kernel with this machine's files, and run tests on it
#[derive(Args)]
pub struct Options {
    /// The release of Debian whose kernel it is. It is kept in target/vm; remove that for a newer one
    #[arg(long, default_value = "bookworm-backports")]
    debian: String,
    /// Memory in MiB
    #[arg(long, default_value_t = 6144)]
    memory: u64,
    /// How long it may take, in minutes
    #[arg(long, default_value_t = 30)]
    patience: u64,
    /// Further parameters of the kernel, such as `proc_mem.force_override=always`, which newer kernels of Debian need
    #[arg(long, default_value = "")]
    append: String,
    /// What to run instead of the tests, such as `target/debug/pclive check`
    #[arg(last = true)]
    command: Vec<String>,
}

/// The suites that depend on the kernel most, and what is passed to them.
const SUITES: [(&str, &str); 6] = [
    ("pclive_sys", ""),
    ("pclive", ""),
    ("tiers", ""),
    ("migrate_tree", "tree_moves_there_and_back"),
    ("migrate_processes", "processes_that_come_and_go"),
    ("migrate_memory", "every_byte_survives_while_rounds_converge"),
];

/// Boots the kernel and runs the tests.
///
/// # Errors
/// When it does not boot, or a test fails.
pub fn vm(options: &Options) -> Result<()> {
    prepare()?;
    let dir = workspace().join("target/vm").join(&options.debian);
    std::fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
    let kernel = Kernel::of_release(&options.debian, &dir.join("kernel"))?;
    let commands = if options.command.is_empty() { tests()? } else { options.command.join(" ") };
    println!("booting Linux {}", kernel.release);
    let patience = Duration::from_secs(options.patience * 60);
    let machine =
        Machine { kernel: &kernel, dir: &dir, memory_mib: options.memory, append: &options.append, patience };
    let status = machine.run(&format!("cd {}\n{commands}\n", workspace().display()))?;
    ensure!(status == 0, "on Linux {} it ended with status {status}", kernel.release);
    Ok(())
}

/// Commands that run the suites one after the other, and fail if one does.
fn tests() -> Result<String> {
    build_programs()?;
    let messages = output(&mut cargo(["test", "--workspace", "--no-run", "--message-format=json"]))?;
    let built: Vec<Built> = messages.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let mut commands = String::from("export RUST_BACKTRACE=0 PCLIVE_MOVES=2\nfailed=0\n");
    for (name, filter) in SUITES {
        let suite = built.iter().find(|built| built.is_suite(name));
        let suite = suite.with_context(|| format!("cargo did not build {name}"))?;
        let dir = suite.manifest_path.parent().unwrap_or(Path::new("/"));
        let (dir, program) = (dir.display(), suite.executable.display());
        // One by one: the machine is slow, and some tests expect an answer in time.
        commands += &format!(
            "echo; echo '{name} {filter}'; (cd '{dir}' && '{program}' --test-threads 1 {filter}) || failed=1\n"
        );
    }
    Ok(commands + "exit $failed")
}

/// A program that cargo has built (`cargo build --message-format=json`).
#[derive(Deserialize)]
struct Built {
    manifest_path: PathBuf,
    executable: PathBuf,
    target: Target,
    profile: Profile,
}

impl Built {
    /// Whether it has the tests of the library, or of the file in `tests/`, of that name.
    fn is_suite(&self, name: &str) -> bool {
        let of_program = self.target.kind.iter().any(|kind| kind == "bin");
        self.target.name == name && self.profile.test && !of_program
    }
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}
