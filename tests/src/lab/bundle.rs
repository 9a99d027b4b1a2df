//! OCI bundles of unmodified Debian programs.
//!
//! A root file system has the program, the libraries that `ldd` names for it, a shell with a few tools, and the files
//! in `/etc` that name users. It is made once for each host, as two hosts' owners would: same contents, same times.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::command::run;

/// What every root file system has besides its program.
const TOOLS: [&str; 8] = ["sh", "cat", "id", "kill", "ls", "mkfifo", "sleep", "true"];
/// Directories that programs expect.
const DIRECTORIES: [&str; 10] =
    ["dev", "etc", "proc", "root", "run", "sys", "usr/bin", "usr/lib", "usr/lib64", "usr/sbin"];
/// The links of a merged `/usr`.
const LINKS: [(&str, &str); 4] =
    [("bin", "usr/bin"), ("lib", "usr/lib"), ("lib64", "usr/lib64"), ("sbin", "usr/sbin")];
/// What Docker grants by default.
const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// A program to be run in a container.
#[derive(Debug, Clone)]
pub struct Payload {
    /// Files of this machine, each to be at the same path in the container, with the libraries it needs.
    pub programs: Vec<PathBuf>,
    /// The command line.
    pub args: Vec<String>,
    /// Additions to the environment, as `NAME=value`.
    pub env: Vec<String>,
    /// User and group the process starts with. Only root gets capabilities.
    pub user: (u32, u32),
    /// The processors that it may use at the source and at the destination; none in particular if empty.
    pub processors: [Vec<usize>; 2],
}

impl Payload {
    /// Any program with its arguments; it runs as root.
    pub fn program(path: impl Into<PathBuf>, args: &[&str]) -> Self {
        let path = path.into();
        let args = std::iter::once(path.display().to_string()).chain(args.iter().map(ToString::to_string));
        Self {
            args: args.collect(),
            programs: vec![path],
            env: Vec::new(),
            user: (0, 0),
            processors: Default::default(),
        }
    }

    /// Redis at port 6379, all in memory.
    pub fn redis() -> Self {
        let args = ["--save", "", "--appendonly", "no", "--protected-mode", "no", "--bind", "0.0.0.0"];
        Self::program("/usr/bin/redis-server", &args)
    }

    /// memcached at port 11211 with four worker threads and up to `megabytes` of items; it becomes `nobody`.
    pub fn memcached(megabytes: u32) -> Self {
        let size = megabytes.to_string();
        Self::program("/usr/bin/memcached", &["-u", "nobody", "-t", "4", "-m", &size, "-l", "0.0.0.0"])
    }
}

/// What a host says about the container it is to have.
pub(super) struct Placement<'a> {
    pub name: &'a str,
    pub netns: PathBuf,
    pub cgroup: String,
    pub processors: &'a [usize],
}

/// Makes the bundle in the new directory `bundle`.
pub(super) fn make(bundle: &Path, payload: &Payload, placement: &Placement) -> Result<()> {
    let rootfs = bundle.join("rootfs");
    make_rootfs(&rootfs, payload).with_context(|| format!("make {}", rootfs.display()))?;
    run(Command::new("runc").arg("spec").arg("--bundle").arg(bundle))?;
    let file = bundle.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&file)?)?;
    configure(&mut config, payload, placement);
    fs::write(&file, serde_json::to_vec_pretty(&config)?)?;
    Ok(())
}

fn make_rootfs(rootfs: &Path, payload: &Payload) -> Result<()> {
    for directory in DIRECTORIES {
        fs::create_dir_all(rootfs.join(directory))?;
    }
    for (link, target) in LINKS {
        symlink(target, rootfs.join(link))?;
    }
    let tmp = rootfs.join("tmp");
    fs::create_dir(&tmp)?;
    fs::set_permissions(&tmp, fs::Permissions::from_mode(0o1777))?;
    for file in ["/etc/passwd", "/etc/group", "/etc/nsswitch.conf"] {
        copy(Path::new(file), rootfs)?;
    }
    let tools = TOOLS.iter().map(|tool| Path::new("/usr/bin").join(tool));
    for program in tools.chain(payload.programs.iter().cloned()) {
        copy(&program, rootfs)?;
        for library in libraries(&program)? {
            copy(&library, rootfs)?;
        }
    }
    Ok(())
}

/// Copies a file to the same place below `rootfs`, with its mode and times; a link becomes the file it names.
fn copy(file: &Path, rootfs: &Path) -> Result<()> {
    let below = file.components().filter(|part| matches!(part, Component::Normal(_))).collect::<PathBuf>();
    let copy = rootfs.join(below);
    if copy.exists() {
        return Ok(());
    }
    fs::create_dir_all(copy.parent().expect("a file is in a directory"))?;
    fs::copy(file, &copy).with_context(|| format!("copy {} to {}", file.display(), copy.display()))?;
    let modified = fs::metadata(file)?.modified()?;
    fs::File::options().append(true).open(&copy)?.set_modified(modified)?;
    Ok(())
}

/// The libraries and the loader that a program needs; none for a static one.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("start ldd")?;
    Ok(parse_ldd(&String::from_utf8_lossy(&output.stdout)))
}

/// Every absolute path in what `ldd` prints: `name => /path (address)` and `/loader (address)`.
fn parse_ldd(text: &str) -> Vec<PathBuf> {
    let paths = text.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    paths.map(PathBuf::from).collect()
}

/// Turns what `runc spec` wrote into the container's configuration.
fn configure(config: &mut Value, payload: &Payload, placement: &Placement) {
    let process = &mut config["process"];
    process["terminal"] = json!(false);
    process["user"] = json!({ "uid": payload.user.0, "gid": payload.user.1 });
    process["args"] = json!(payload.args);
    let env = process["env"].as_array_mut().expect("runc spec sets PATH");
    env.extend(payload.env.iter().map(|variable| json!(variable)));
    let granted: &[&str] = if payload.user.0 == 0 { &CAPABILITIES } else { &[] };
    process["capabilities"] = json!({
        "bounding": CAPABILITIES, "effective": granted, "permitted": granted, "inheritable": [], "ambient": []
    });
    // The container has the limits of whoever starts it: not every host lets its runtime change them.
    process.as_object_mut().expect("runc spec writes an object").remove("rlimits");
    config["root"]["readonly"] = json!(false);
    config["hostname"] = json!(placement.name);
    let linux = &mut config["linux"];
    linux["cgroupsPath"] = json!(placement.cgroup);
    if !placement.processors.is_empty() {
        let numbers: Vec<String> = placement.processors.iter().map(ToString::to_string).collect();
        linux["resources"]["cpu"] = json!({ "cpus": numbers.join(",") });
    }
    for namespace in linux["namespaces"].as_array_mut().expect("runc spec lists namespaces") {
        if namespace["type"] == "network" {
            namespace["path"] = json!(placement.netns);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_names_libraries_and_loader() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd2d5f2000)\n\
                    \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f1c1a000000)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f1c1a3d7000)\n";
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(parse_ldd(text), expected.map(PathBuf::from));
        assert!(parse_ldd("\tnot a dynamic executable\n").is_empty());
    }
}
