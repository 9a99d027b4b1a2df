//! A host of the lab: a network namespace, a directory of bundles and a runtime's state of its own.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::unistd::Pid;
use serde::Deserialize;

use super::command::run;
use super::netns::Netns;

/// One of the two hosts.
#[derive(Debug)]
pub struct Host {
    role: String,
    netns: Netns,
    addresses: [Ipv4Addr; 2],
    dir: PathBuf,
}

/// What the runtime tells about a container.
#[derive(Debug, Clone, Deserialize)]
pub struct ContainerState {
    /// The container's name.
    pub id: String,
    /// Its first process as the machine knows it, 0 if it has none.
    pub pid: i32,
    /// `created`, `running`, `paused` or `stopped`.
    pub status: String,
}

impl Host {
    pub(super) fn new(role: String, netns: Netns, addresses: [Ipv4Addr; 2], dir: PathBuf) -> Result<Self> {
        let host = Self { role, netns, addresses, dir };
        for dir in [host.bundles(), host.runtime_root(), host.logs()] {
            fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        }
        Ok(host)
    }

    /// What it is called in the lab: `source` or `destination`, whichever way containers go.
    pub fn role(&self) -> &str {
        &self.role
    }

    /// Its address in the lab's network.
    pub fn address(&self) -> Ipv4Addr {
        self.addresses[0]
    }

    /// Its address on the link that joins the hosts.
    pub fn interlink_address(&self) -> Ipv4Addr {
        self.addresses[1]
    }

    /// Its network.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The directory that has a bundle for each container: what `pclive serve --bundles` takes.
    pub fn bundles(&self) -> PathBuf {
        self.dir.join("bundles")
    }

    /// The runtime's state directory: what `--root` takes.
    pub fn runtime_root(&self) -> PathBuf {
        runtime_root(&self.dir)
    }

    /// Where the output of what runs on this host goes.
    pub fn logs(&self) -> PathBuf {
        self.dir.join("logs")
    }

    /// Everything that `name` has written so far: a container's or `pclive`'s output on this host.
    pub fn log(&self, name: &str) -> String {
        fs::read(self.logs().join(name))
            .map(|text| String::from_utf8_lossy(&text).into_owned())
            .unwrap_or_default()
    }

    /// A command that runs `program` on this host.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        self.netns.command(program)
    }

    /// A `runc` command with this host's state.
    pub fn runc<const N: usize>(&self, args: [&str; N]) -> Command {
        runc(&self.dir, args)
    }

    /// Starts the container in the background, with its link up and its output in its log.
    ///
    /// # Errors
    /// When the runtime refuses; the message has what it said.
    pub fn start(&self, name: &str) -> Result<()> {
        self.container_netns(name).ip("link set eth0 up")?;
        let log = fs::File::create(self.logs().join(name))?;
        let runtime_log = self.logs().join(format!("{name}.runc"));
        let bundle = self.bundles().join(name);
        // A file, not a pipe: the container would hold the pipe's other end open for as long as it runs.
        let status = Command::new("runc")
            .arg("--root")
            .arg(self.runtime_root())
            .arg("--log")
            .arg(&runtime_log)
            .args(["run", "--detach", "--bundle"])
            .arg(bundle)
            .arg(name)
            .stdin(std::process::Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .status()
            .context("start runc")?;
        if !status.success() {
            let said = fs::read_to_string(&runtime_log).unwrap_or_default();
            bail!("runc run {name}: {status}: {} {}", said.trim(), self.log(name).trim());
        }
        Ok(())
    }

    /// What the runtime has: every container of this host.
    ///
    /// # Errors
    /// When the runtime fails.
    pub fn list(&self) -> Result<Vec<ContainerState>> {
        list(&self.dir)
    }

    /// The container's state, if the runtime knows it.
    ///
    /// # Errors
    /// When the runtime fails.
    pub fn state(&self, name: &str) -> Result<Option<ContainerState>> {
        Ok(self.list()?.into_iter().find(|state| state.id == name))
    }

    /// Whether the runtime's record of a container bears the mark of what `pclive` has not finished.
    pub fn is_unfinished(&self, name: &str) -> bool {
        let record = fs::read_to_string(self.runtime_root().join(name).join("state.json"));
        record.is_ok_and(|record| record.contains("io.pclive.unfinished"))
    }

    /// The first process of a container that is running.
    ///
    /// # Errors
    /// When it is not.
    pub fn container_pid(&self, name: &str) -> Result<Pid> {
        match self.state(name)? {
            Some(state) if state.status == "running" => Ok(Pid::from_raw(state.pid)),
            other => bail!("container {name} is not running: {other:?}"),
        }
    }

    /// Runs a command inside the container and returns what it printed.
    ///
    /// # Errors
    /// When it cannot be run or fails.
    pub fn exec(&self, name: &str, args: &[&str]) -> Result<String> {
        run(self.runc(["exec", name]).args(args))
    }

    /// The network of a container on this host.
    pub fn container_netns(&self, name: &str) -> Netns {
        Netns::named(container_netns_name(&self.netns, name))
    }
}

/// How a container's network namespace on a host is called.
pub(super) fn container_netns_name(host: &Netns, name: &str) -> String {
    format!("{}-{name}", host.name())
}

fn runtime_root(dir: &Path) -> PathBuf {
    dir.join("runc")
}

fn runc<const N: usize>(dir: &Path, args: [&str; N]) -> Command {
    let mut command = Command::new("runc");
    command.arg("--root").arg(runtime_root(dir)).args(args);
    command
}

fn list(dir: &Path) -> Result<Vec<ContainerState>> {
    /// runc reads the names first and then looks at each: it fails if a container is removed meanwhile.
    const ATTEMPTS: u32 = 20;
    let list = || run(&mut runc(dir, ["list", "--format", "json"]));
    let is_removed = |json: &Result<String>| {
        json.as_ref().is_err_and(|error| format!("{error:#}").contains("no such file or directory"))
    };
    let json = (1..ATTEMPTS).map(|_| list()).find(|json| !is_removed(json)).unwrap_or_else(list)?;
    // Without a container runc prints `null`.
    Ok(serde_json::from_str::<Option<_>>(&json)?.unwrap_or_default())
}

/// Kills and deletes every container of the host whose directory is `dir`.
pub(super) fn delete_containers(dir: &Path) -> Result<()> {
    if !runtime_root(dir).exists() {
        return Ok(());
    }
    for container in list(dir)? {
        run(&mut runc(dir, ["delete", "--force", &container.id]))?;
    }
    Ok(())
}
