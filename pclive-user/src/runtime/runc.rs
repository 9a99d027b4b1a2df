//! runc.
//!
//! runc keeps the configuration that a container was created with in its own form, `ROOT/ID/state.json`. `runc exec`
//! takes what it can from the bundle's config.json (arguments, environment, user, capabilities, limits,
//! noNewPrivileges, AppArmor profile) and the rest from that record: `getProcess` in exec.go, `newInitConfig` in
//! libcontainer/container_linux.go. A sandbox was created without confinement, and a process that `exec` adds must not
//! inherit that: so the record is corrected to what it would be had the container been created from its bundle.
//!
//! Annotations are in that record too, as labels, and `runc state` shows them. So the mark of an unfinished sandbox comes
//! into being and goes together with what it marks, also when the host is restarted. The record without the mark waits
//! beside it; to finish the sandbox is to exchange the two. That happens in the blackout: to replace the one by the other
//! would take ten times as long, because ext4 gives back what the replaced file had (0.4 ms instead of 0.03 ms in the
//! phase `finish sandbox` of `cargo xtask run --size 64`).

use super::bundle::UNFINISHED;
use super::oci::CommandLine;
use super::sandbox::{self, SandboxProcess};
use super::{AnswerError, Bundle, ContainerId, ContainerState, Room, Runtime, RuntimeError};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::sys::signal::Signal;
use serde_json::{Map, Value, json};
use std::io::Write;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

/// runc with the directory that it keeps its containers' state in.
#[derive(Clone, Debug)]
pub struct Runc(CommandLine);

impl Runc {
    /// runc at `program` (a path, or a name that is looked up in `PATH`), with its `--root`.
    pub fn new(program: &Path, root: Option<PathBuf>) -> Self {
        let root = root.unwrap_or_else(|| "/run/runc".into());
        Self(CommandLine { program: program.to_path_buf(), root })
    }

    fn record(&self, id: &ContainerId) -> PathBuf {
        self.0.directory_of(id).join("state.json")
    }

    /// The record as it will be when the sandbox is finished, and then the one that it was. runc takes no notice of it, and
    /// deletes it with the rest.
    fn other_record(&self, id: &ContainerId) -> PathBuf {
        self.0.directory_of(id).join("pclive-other-state.json")
    }

    /// Replaces the record of the sandbox's configuration by that of the bundle's, and prepares the one without the mark.
    fn correct_record(&self, bundle: &Bundle) -> Result<(), RuntimeError> {
        let path = self.record(bundle.id());
        let text = std::fs::read(&path).map_err(record_error("read", &path))?;
        let mut record: Value = serde_json::from_slice(&text).map_err(|source| RuntimeError::Answer {
            command: path.display().to_string(),
            source: AnswerError::Json(source),
        })?;
        correct(&mut record["config"], bundle.config())
            .map_err(|problem| RuntimeError::Seccomp { bundle: bundle.path().to_path_buf(), problem })?;
        replace(&path, &record)?;
        if let Some(labels) = record["config"]["labels"].as_array_mut() {
            labels.retain(|label| !label.as_str().is_some_and(is_mark));
        }
        replace(&self.other_record(bundle.id()), &record)
    }
}

/// Whether a label in runc's record is the annotation of an unfinished sandbox.
fn is_mark(label: &str) -> bool {
    label.strip_prefix(UNFINISHED).is_some_and(|rest| rest.starts_with('='))
}

/// Writes a record such that nobody ever sees a part of it, as runc itself does; a temporary file has the mode 0600 that
/// runc gives it.
fn replace(path: &Path, record: &Value) -> Result<(), RuntimeError> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let mut file =
        tempfile::NamedTempFile::new_in(directory).map_err(record_error("make a file beside", path))?;
    file.write_all(record.to_string().as_bytes()).map_err(record_error("write a new version of", path))?;
    file.persist(path).map_err(|error| record_error("replace", path)(error.error))?;
    Ok(())
}

fn record_error(call: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> RuntimeError {
    let path = path.to_path_buf();
    move |source| RuntimeError::Record { call, path, source }
}

impl Runtime for Runc {
    fn state(&self, id: &ContainerId) -> Result<ContainerState, RuntimeError> {
        self.0.state(id)
    }

    fn create_sandbox(
        &self,
        bundle: &Bundle,
        init: BorrowedFd<'_>,
        stdio: [BorrowedFd<'_>; 3],
    ) -> Result<SandboxProcess, RuntimeError> {
        sandbox::create(&self.0, bundle, init, stdio, || self.correct_record(bundle))
    }

    fn finish_sandbox(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        let (path, other) = (self.record(id), self.other_record(id));
        let exchanged = renameat2(AT_FDCWD, &other, AT_FDCWD, &path, RenameFlags::RENAME_EXCHANGE);
        match exchanged {
            // Not every file system can.
            Err(nix::Error::EINVAL) => std::fs::rename(other, &path),
            exchanged => exchanged.map_err(Into::into),
        }
        .map_err(record_error("replace", &path))
    }

    fn make_room(&self, bundle: &Bundle) -> Result<Room, RuntimeError> {
        self.0.make_room(bundle)
    }

    fn kill(&self, id: &ContainerId, signal: Signal) -> Result<(), RuntimeError> {
        self.0.kill(id, signal)
    }

    fn delete(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        self.0.delete(id)
    }
}

/// Makes `record`, runc's form of a configuration, say what the bundle's `config` says about confinement.
fn correct(record: &mut Value, config: &Value) -> Result<(), String> {
    let process = &config["process"];
    record["no_new_privileges"] = json!(process["noNewPrivileges"].as_bool().unwrap_or(false));
    record["umask"] = process["user"]["umask"].clone();
    record["capabilities"] = match process["capabilities"].as_object() {
        None => Value::Null,
        Some(sets) => capability_sets(sets),
    };
    if let Some(label) = process["selinuxLabel"].as_str() {
        record["process_label"] = json!(label);
    }
    record["seccomp"] = match &config["linux"]["seccomp"] {
        Value::Null => Value::Null,
        profile => seccomp(profile)?,
    };
    Ok(())
}

/// `Capabilities` in libcontainer/configs/config.go: as in the specification, but with capitals.
fn capability_sets(sets: &Map<String, Value>) -> Value {
    let names = ["Bounding", "Effective", "Inheritable", "Permitted", "Ambient"];
    names
        .into_iter()
        .map(|name| (name, sets.get(&name.to_lowercase()).cloned().unwrap_or_default()))
        .collect()
}

/// Actions by number minus one: `Action` in libcontainer/configs/config.go, names as in libcontainer/seccomp/config.go.
const ACTIONS: [&str; 9] = [
    "SCMP_ACT_KILL",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_TRAP",
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_LOG",
    "SCMP_ACT_NOTIFY",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_KILL_PROCESS",
];

/// Operators by number minus one: `Operator` there.
const OPERATORS: [&str; 7] = [
    "SCMP_CMP_EQ",
    "SCMP_CMP_NE",
    "SCMP_CMP_GT",
    "SCMP_CMP_GE",
    "SCMP_CMP_LT",
    "SCMP_CMP_LE",
    "SCMP_CMP_MASKED_EQ",
];

/// A seccomp profile of the specification in runc's form: `SetupSeccomp` in libcontainer/specconv/spec_linux.go.
fn seccomp(profile: &Value) -> Result<Value, String> {
    let mut calls = Vec::new();
    for rule in list(&profile["syscalls"]) {
        let action = number(&ACTIONS, &rule["action"], "action")?;
        let conditions = list(&rule["args"]).iter().map(condition).collect::<Result<Vec<_>, _>>()?;
        calls.extend(list(&rule["names"]).iter().map(|name| {
            json!({ "name": name, "action": action, "errnoRet": rule["errnoRet"], "args": conditions })
        }));
    }
    let architectures =
        list(&profile["architectures"]).iter().map(architecture).collect::<Result<Vec<_>, _>>()?;
    Ok(json!({
        "default_action": number(&ACTIONS, &profile["defaultAction"], "action")?,
        "default_errno_ret": profile["defaultErrnoRet"],
        // null and not an empty list when the profile names none: an empty list would mean none at all.
        "architectures": Some(architectures).filter(|architectures| !architectures.is_empty()),
        // runc's default since 1.2; older versions do not read the field.
        "flags": match &profile["flags"] {
            Value::Null => json!(["SECCOMP_FILTER_FLAG_SPEC_ALLOW"]),
            flags => flags.clone(),
        },
        "syscalls": calls,
        "listener_path": profile["listenerPath"].as_str().unwrap_or_default(),
        "listener_metadata": profile["listenerMetadata"].as_str().unwrap_or_default(),
    }))
}

fn condition(argument: &Value) -> Result<Value, String> {
    Ok(json!({
        "index": argument["index"],
        "value": argument["value"],
        "value_two": argument["valueTwo"].as_u64().unwrap_or(0),
        "op": number(&OPERATORS, &argument["op"], "operator")?,
    }))
}

/// `SCMP_ARCH_X` as libseccomp's own name for X.
fn architecture(name: &Value) -> Result<String, String> {
    match name.as_str().and_then(|name| name.strip_prefix("SCMP_ARCH_")) {
        Some("X86_64") => Ok("amd64".into()),
        Some("AARCH64") => Ok("arm64".into()),
        Some("LOONGARCH64") => Ok("loong64".into()),
        Some(other) => Ok(other.to_lowercase()),
        None => Err(format!("names an unknown architecture, {name}")),
    }
}

fn number(names: &[&str], name: &Value, what: &str) -> Result<usize, String> {
    let position = names.iter().position(|known| name == known);
    position.map(|index| index + 1).ok_or_else(|| format!("names an unknown {what}, {name}"))
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}
