//! OCI bundles at the destination: container names from the wire, and the bundle that belongs to a name.

use nix::fcntl::{Flock, FlockArg};
use serde_json::{Value, json};
use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// Longest container name: a name is a directory's name too (`NAME_MAX`), and runtimes add suffixes to it.
const MAX_ID: usize = 128;

/// Annotation that a sandbox has until the migration is committed.
pub(super) const UNFINISHED: &str = "io.pclive.unfinished";

/// A container's name, which a runtime accepts and which is safe as a file name and as a command-line argument.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContainerId(String);

/// Why a string is no container name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is no container name: {reason}")]
pub struct InvalidContainerId {
    /// The string, shortened.
    pub name: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl ContainerId {
    /// Checks a name from the command line or from the wire.
    ///
    /// Letters, digits, `_`, `+`, `-` and `.` are what runc allows; a leading `-` would be read as an option.
    pub fn new(name: &str) -> Result<Self, InvalidContainerId> {
        let refuse = |reason| Err(InvalidContainerId { name: name.chars().take(MAX_ID).collect(), reason });
        if name.is_empty() {
            return refuse("it is empty");
        }
        if name.len() > MAX_ID {
            return refuse("it is longer than 128 bytes");
        }
        if name == "." || name == ".." {
            return refuse("it is a path");
        }
        if name.starts_with('-') {
            return refuse("it starts with a dash");
        }
        if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte)) {
            return refuse("only ASCII letters, digits and the characters _ + - . are allowed");
        }
        Ok(Self(name.to_owned()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a bundle cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The bundle or a part of it is missing or cannot be read.
    #[error("cannot {call} {}: prepare the bundle (config.json and rootfs) there", path.display())]
    Unreadable {
        /// What was being done.
        call: &'static str,
        /// The directory or file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Another migration uses the bundle.
    #[error("bundle {} is in use: a container is being moved into it already", path.display())]
    Busy {
        /// The bundle.
        path: PathBuf,
    },
    /// config.json is no JSON.
    #[error("{} is not valid JSON", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Cause.
        source: serde_json::Error,
    },
    /// config.json lacks something, or asks for what pclive cannot rebuild a container in.
    #[error("{}: {problem}", path.display())]
    Unsuitable {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: &'static str,
    },
}

/// The bundle `DIR/N` of container `N`, reserved for one migration as long as this value lives.
#[derive(Debug)]
pub struct Bundle {
    id: ContainerId,
    path: PathBuf,
    config: Value,
    /// `flock(2)` on the directory: nothing appears on disk, and a killed pclive leaves no stale lock.
    _lock: Flock<File>,
}

impl Bundle {
    /// Opens and checks `bundles/id`.
    pub fn open(bundles: &Path, id: &ContainerId) -> Result<Self, BundleError> {
        let wanted = bundles.join(id.as_str());
        let path = wanted.canonicalize().map_err(unreadable("find bundle", &wanted))?;
        let directory = File::open(&path).map_err(unreadable("open", &path))?;
        let lock =
            Flock::lock(directory, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
                nix::Error::EWOULDBLOCK => BundleError::Busy { path: path.clone() },
                errno => unreadable("lock", &path)(errno.into()),
            })?;

        let file = path.join("config.json");
        let text = std::fs::read(&file).map_err(unreadable("read", &file))?;
        let config: Value = serde_json::from_slice(&text)
            .map_err(|source| BundleError::Json { path: file.clone(), source })?;
        if let Some(problem) = unsuitable(&config) {
            return Err(BundleError::Unsuitable { path: file, problem });
        }
        let rootfs = path.join(config["root"]["path"].as_str().unwrap_or_default());
        std::fs::read_dir(&rootfs).map_err(unreadable("open root file system", &rootfs))?;
        Ok(Self { id: id.clone(), path, config, _lock: lock })
    }

    /// The container's name.
    pub fn id(&self) -> &ContainerId {
        &self.id
    }

    /// The bundle's directory, absolute.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// config.json.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Where config.json is.
    pub(super) fn config_path(&self) -> PathBuf {
        self.path.join("config.json")
    }

    /// config.json with pclive's init, given as descriptor 3, in place of the container's program.
    ///
    /// Namespaces, mounts, devices, cgroup and hooks stay; what confines or prepares the program itself goes, because
    /// the sandbox's init needs every privilege until it gives its processes those of the source.
    pub(super) fn sandbox_config(&self) -> Vec<u8> {
        let mut config = self.config.clone();
        let own = &self.config["process"];
        let all = own_capabilities();
        let mut process = json!({
            "terminal": false,
            "user": { "uid": 0, "gid": 0 },
            "args": ["/proc/self/fd/3"],
            "env": ["PATH=/"],
            "cwd": "/",
            "capabilities": {
                "bounding": all, "effective": all, "permitted": all, "inheritable": all, "ambient": all,
            },
            "noNewPrivileges": false,
        });
        // Not the program's: the first is the container's standing on the host, the second is for `exec`.
        for kept in ["oomScoreAdj", "execCPUAffinity"] {
            if let Some(value) = own.get(kept) {
                process[kept] = value.clone();
            }
        }
        config["process"] = process;
        if let Some(linux) = config["linux"].as_object_mut() {
            linux.remove("seccomp");
        }
        match config["annotations"].as_object_mut() {
            Some(annotations) => _ = annotations.insert(UNFINISHED.into(), json!("true")),
            None => config["annotations"] = json!({ UNFINISHED: "true" }),
        }
        config.to_string().into_bytes()
    }
}

/// The first thing about a configuration that pclive cannot work with.
fn unsuitable(config: &Value) -> Option<&'static str> {
    let namespaces = config["linux"]["namespaces"].as_array().map(Vec::as_slice).unwrap_or_default();
    let namespace = |kind: &str| namespaces.iter().find(|namespace| namespace["type"] == kind);
    let is_new = |kind| {
        namespace(kind).is_some_and(|namespace| namespace["path"].as_str().unwrap_or_default().is_empty())
    };
    if !config["annotations"][UNFINISHED].is_null() {
        Some("the annotation io.pclive.unfinished is pclive's own: a container with it would be removed")
    } else if !config["root"]["path"].is_string() {
        Some("root.path is missing: it must lead to the container's root file system")
    } else if !config["process"].is_object() {
        Some("process is missing: `exec` needs it later")
    } else if !is_new("pid") {
        Some("no new pid namespace: processes keep their ids, so add {\"type\": \"pid\"} to linux.namespaces")
    } else if !is_new("mount") {
        Some("no new mount namespace: add {\"type\": \"mount\"} to linux.namespaces")
    } else if namespace("network").is_none() {
        Some(
            "no network namespace: a container on the host's network cannot be moved; add one to linux.namespaces",
        )
    } else {
        None
    }
}

fn unreadable(call: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BundleError {
    let path = path.to_path_buf();
    move |source| BundleError::Unreadable { call, path, source }
}

/// `capabilities(7)` by number.
const CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// Names of the capabilities that pclive itself has. A host may withhold some even from root, and asking a runtime for
/// those would fail.
fn own_capabilities() -> Vec<&'static str> {
    let permitted = procfs::process::Process::myself()
        .and_then(|own| own.status())
        .map(|status| status.capprm & status.capbnd.unwrap_or(u64::MAX))
        .unwrap_or(0);
    let has = |number: &usize| permitted >> number & 1 == 1;
    (0..CAPABILITIES.len()).filter(has).map(|number| CAPABILITIES[number]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn minimal() -> Value {
        json!({
            "process": {
                "args": ["redis-server"], "cwd": "/data", "user": { "uid": 7 }, "oomScoreAdj": 100,
                "capabilities": { "bounding": [] }, "rlimits": [{}], "apparmorProfile": "p", "noNewPrivileges": true,
            },
            "root": { "path": "rootfs" },
            "linux": {
                "namespaces": [{ "type": "pid" }, { "type": "mount" }, { "type": "network", "path": "/run/netns/x" }],
                "seccomp": { "defaultAction": "SCMP_ACT_ERRNO" },
                "cgroupsPath": "/a/b",
            },
        })
    }

    fn bundle_with(config: &Value) -> (tempfile::TempDir, Result<Bundle, BundleError>) {
        let bundles = tempfile::tempdir().unwrap();
        let path = bundles.path().join("n");
        std::fs::create_dir_all(path.join("rootfs")).unwrap();
        std::fs::write(path.join("config.json"), config.to_string()).unwrap();
        let bundle = Bundle::open(bundles.path(), &ContainerId::new("n").unwrap());
        (bundles, bundle)
    }

    #[test]
    fn names_that_are_paths_options_or_too_long_are_refused() {
        for good in ["a", "redis-1", "A_b+c.d", "...", &"x".repeat(128)] {
            assert_eq!(ContainerId::new(good).unwrap().as_str(), good);
        }
        for bad in
            ["", ".", "..", "../x", "a/b", "/", "a\0b", "-f", "--root", "a b", "é", "a\n", &"x".repeat(129)]
        {
            ContainerId::new(bad).unwrap_err();
        }
    }

    #[test]
    fn a_missing_part_of_the_bundle_is_named() {
        let bundles = tempfile::tempdir().unwrap();
        let id = ContainerId::new("n").unwrap();
        let open = || Bundle::open(bundles.path(), &id).unwrap_err().to_string();
        let path = bundles.path().join("n");
        assert!(open().starts_with(&format!("cannot find bundle {}", path.display())));
        std::fs::create_dir(&path).unwrap();
        assert!(open().contains("config.json"));
        std::fs::write(path.join("config.json"), "{").unwrap();
        assert!(open().contains("not valid JSON"));
        std::fs::write(path.join("config.json"), minimal().to_string()).unwrap();
        assert!(open().contains("rootfs"));
        std::fs::create_dir(path.join("rootfs")).unwrap();
        Bundle::open(bundles.path(), &id).unwrap();
    }

    #[test]
    fn a_bundle_serves_one_migration_at_a_time() {
        let (bundles, bundle) = bundle_with(&minimal());
        let again = || Bundle::open(bundles.path(), &ContainerId::new("n").unwrap());
        assert!(matches!(again().unwrap_err(), BundleError::Busy { .. }));
        drop(bundle);
        again().unwrap();
    }

    #[test]
    fn a_bundle_that_would_make_every_container_a_leftover_is_refused() {
        let mut config = minimal();
        config["annotations"] = json!({ "org.example": "kept", UNFINISHED: "false" });
        let error = bundle_with(&config).1.unwrap_err();
        assert!(error.to_string().contains(UNFINISHED), "{error}");
    }

    #[test]
    fn a_configuration_without_its_own_namespaces_is_refused() {
        for (kind, path) in
            [("pid", None), ("pid", Some("/proc/1/ns/pid")), ("mount", None), ("network", None)]
        {
            let mut config = minimal();
            let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
            match path {
                None => namespaces.retain(|namespace| namespace["type"] != kind),
                Some(path) => namespaces[0]["path"] = path.into(),
            }
            let error = bundle_with(&config).1.unwrap_err();
            assert!(
                matches!(error, BundleError::Unsuitable { .. }) && error.to_string().contains(kind),
                "{error}"
            );
        }
    }

    #[test]
    fn the_sandbox_is_the_bundle_without_what_confines_its_program() {
        let config: Value =
            serde_json::from_slice(&bundle_with(&minimal()).1.unwrap().sandbox_config()).unwrap();
        let mut expected = minimal();
        expected["linux"].as_object_mut().unwrap().remove("seccomp");
        assert_eq!((&config["root"], &config["linux"]), (&expected["root"], &expected["linux"]));
        assert_eq!(config["annotations"], json!({ "io.pclive.unfinished": "true" }));
        let process = config["process"].as_object().unwrap();
        assert_eq!(process["args"], json!(["/proc/self/fd/3"]));
        assert_eq!(process["oomScoreAdj"], 100);
        assert_eq!(process["user"], json!({ "uid": 0, "gid": 0 }));
        assert!(!process.contains_key("rlimits") && !process.contains_key("apparmorProfile"));
        let bounding = process["capabilities"]["bounding"].as_array().unwrap();
        assert!(bounding.contains(&"CAP_SYS_ADMIN".into()), "the tests run as root");
    }
}
