//! Containers of the real runc for tests.

use super::{Bundle, ContainerId, Runc, Runtime, RuntimeError, SandboxProcess};
use nix::sys::memfd::{MFdFlags, memfd_create};
use pclive_wire::HostPid;
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A bundle, and a runc with a root directory of its own. The container is deleted at the end.
pub struct Lab {
    directory: tempfile::TempDir,
    pub runtime: Runc,
    pub id: ContainerId,
    pub stdio: [OwnedFd; 3],
}

impl Lab {
    /// A bundle whose root file system shows the host's /usr.
    pub fn new(name: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        // The cgroup is named after the container, and is the same for every root directory.
        let id = ContainerId::new(&format!("runtime-{name}-{}", std::process::id())).unwrap();
        let null = || OwnedFd::from(File::options().read(true).write(true).open("/dev/null").unwrap());
        let runtime = Runc::new(Path::new("runc"), Some(directory.path().join("root")));
        let lab = Self { runtime, id, stdio: [null(), null(), null()], directory };
        let rootfs = lab.bundle_path().join("rootfs");
        for name in ["usr", "proc", "tmp"] {
            std::fs::create_dir_all(rootfs.join(name)).unwrap();
        }
        for name in ["bin", "lib", "lib64"] {
            symlink(format!("usr/{name}"), rootfs.join(name)).unwrap();
        }
        std::fs::write(lab.bundle_path().join("config.json"), configuration().to_string()).unwrap();
        lab
    }

    pub fn bundle_path(&self) -> PathBuf {
        self.directory.path().join("bundles").join(self.id.as_str())
    }

    pub fn edit_config(&self, edit: impl Fn(&mut Value)) {
        let path = self.bundle_path().join("config.json");
        let mut config = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        edit(&mut config);
        std::fs::write(path, config.to_string()).unwrap();
    }

    pub fn bundle(&self) -> Bundle {
        Bundle::open(&self.directory.path().join("bundles"), &self.id).unwrap()
    }

    pub fn runtime_root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    pub fn create(&self, init: &File) -> Result<SandboxProcess, RuntimeError> {
        self.runtime.create_sandbox(&self.bundle(), init.as_fd(), self.stdio.each_ref().map(AsFd::as_fd))
    }

    /// Creates, and does not start, the container with the bundle as it is.
    pub fn create_unmodified(&self) {
        let null = || std::process::Stdio::null();
        let status = Command::new("runc")
            .arg("--root")
            .arg(self.runtime_root())
            .args(["create", self.id.as_str(), "--bundle"])
            .arg(self.bundle_path())
            .stdin(null())
            .stdout(null())
            .stderr(null())
            .status();
        assert!(status.unwrap().success());
    }

    /// The configuration in runc's record of the container, without members that say nothing.
    pub fn recorded_configuration(&self) -> Value {
        let path = self.runtime_root().join(self.id.as_str()).join("state.json");
        let mut record: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let mut configuration = record["config"].take();
        drop_empty(&mut configuration);
        configuration
    }

    /// Standard output of `runc exec`.
    pub fn exec(&self, line: &[&str]) -> String {
        let output = Command::new("runc")
            .arg("--root")
            .arg(self.runtime_root())
            .args(["exec", self.id.as_str()])
            .args(line)
            .output()
            .unwrap();
        print!("{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = self.runtime.delete(&self.id) {
            eprintln!("{error}");
        }
    }
}

fn drop_empty(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.values_mut().for_each(drop_empty);
            // Optional for runc, and here in one of its versions only: the default flag is explicit since 1.2.
            members.retain(|name, value| {
                name != "flags" && !matches!(value, Value::Null | Value::Bool(false)) && *value != json!("")
            });
        }
        Value::Array(elements) => elements.iter_mut().for_each(drop_empty),
        _ => (),
    }
}

fn configuration() -> Value {
    let namespaces = ["pid", "mount", "network", "ipc", "uts"].map(|kind| json!({ "type": kind }));
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "args": ["/usr/bin/true"], "cwd": "/", "env": ["PATH=/usr/bin"], "user": { "uid": 0, "gid": 0 },
        },
        "root": { "path": "rootfs" },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"] },
        ],
        "linux": { "namespaces": namespaces },
    })
}

/// Machine code of `pause()`: push 34; pop rax; syscall.
pub const PAUSE: &[u8] = b"\x6a\x22\x58\x0f\x05";

/// Machine code of `exit(0)`: push 60; pop rax; xor edi, edi; syscall.
pub const EXIT: &[u8] = b"\x6a\x3c\x58\x31\xff\x0f\x05";

/// A static program that runs the given machine code again and again.
pub fn init_that(code: &[u8]) -> File {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    // ELF64 header: executable, x86-64, entry behind the headers, one program header.
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend([2u16, 62].map(u16::to_le_bytes).concat());
    elf.extend(1u32.to_le_bytes());
    elf.extend([BASE + HEADERS, 64, 0].map(u64::to_le_bytes).concat());
    elf.extend(0u32.to_le_bytes());
    elf.extend([64u16, 56, 1, 0, 0, 0].map(u16::to_le_bytes).concat());
    // PT_LOAD, readable and executable: the whole file.
    elf.extend([1u32, 5].map(u32::to_le_bytes).concat());
    elf.extend([0, BASE, BASE, 4096, 4096, 4096].map(u64::to_le_bytes).concat());
    elf.extend(code);
    // jmp back to the first instruction
    elf.extend([0xeb, -(code.len() as i8 + 2) as u8]);
    elf.resize(4096, 0);
    let mut file = File::from(memfd_create(c"init", MFdFlags::MFD_CLOEXEC).unwrap());
    file.write_all(&elf).unwrap();
    file
}

/// A field of `/proc/PID/status`.
pub fn status_field(pid: HostPid, field: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let value = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(":\t"));
    value.unwrap().to_owned()
}
