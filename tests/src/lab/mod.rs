//! Two hosts and a client on one machine.
//!
//! A [`Lab`] is a switch, two [`Host`]s and a client, each a network namespace; see [`net`] for the wires. A container
//! added to it has a bundle and a network namespace on *both* hosts, with the same address and MAC, so it can run on
//! either. The host's side of a lab is real: `runc` with a state directory per host, cgroups, veth links, the machine's
//! kernel. What the two hosts share is that kernel, its CPUs and its memory.
//!
//! # Nothing stays behind
//! All that belongs to a lab carries its unique id: namespaces by name, cgroups by path, files in one directory. A lab
//! is taken down when it is dropped, thus also when a test panics. A lab whose owner was killed is found by its lock
//! file, which the kernel unlocked when the owner died, and taken down the same way by the next lab that starts.

mod bundle;
mod cgroup;
mod command;
mod host;
pub mod net;
mod netns;
mod processors;
mod swap;
mod teardown;
mod traces;

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};

pub use bundle::Payload;
pub use command::run;
pub use host::{ContainerState, Host};
pub use net::BitRate;
pub use netns::Netns;
pub use processors::{DedicatedProcessors, own_processors};
pub use teardown::remove_own_labs;
pub use traces::injected;

use crate::Programs;

/// Labs made by this process so far.
static LABS: AtomicU32 = AtomicU32::new(0);
/// The last byte of the first container's address.
const FIRST_CONTAINER: u8 = 101;
/// The directories of the hosts below the lab's.
const HOSTS: [&str; 2] = ["source", "destination"];

/// Two hosts and a client behind a switch.
#[derive(Debug)]
pub struct Lab {
    id: String,
    dir: PathBuf,
    programs: Programs,
    switch: Netns,
    client: Netns,
    source: Host,
    destination: Host,
    containers: u8,
    /// Held for as long as the lab exists, so that others know it is not a leftover.
    _owner: File,
}

/// A container of the lab, wherever it runs.
#[derive(Debug, Clone)]
pub struct Container {
    /// Its name for the runtime, on both hosts.
    pub name: String,
    /// Its address, on both hosts.
    pub address: Ipv4Addr,
}

impl Lab {
    /// Makes a lab with the programs that were built beside the running one: see [`Self::with_programs`].
    ///
    /// # Errors
    /// As [`Self::with_programs`].
    pub fn new(rate: Option<BitRate>) -> Result<Self> {
        Self::with_programs(Programs::beside_own()?, rate)
    }

    /// Makes a lab whose hosts have these programs and links shaped to `rate`, or not shaped at all.
    ///
    /// # Errors
    /// When not run as root, or a namespace or link cannot be made. What was made until then is removed.
    pub fn with_programs(programs: Programs, rate: Option<BitRate>) -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("the lab makes network namespaces and containers: run it as root");
        }
        // Labs start one at a time: making the first namespace of a machine is not atomic, nor is the sweep.
        let _turn = teardown::lock_labs()?;
        teardown::sweep()?;
        let id = format!("{}-{}", std::process::id(), LABS.fetch_add(1, Ordering::Relaxed));
        let dir = teardown::lab_dir(&id);
        let owner = teardown::claim(&dir)?;
        Self::build(id.clone(), dir, owner, programs, rate).inspect_err(|_| {
            // The error that is returned says what went wrong first; a second failure is the next sweep's.
            let _ = teardown::remove(&id);
        })
    }

    fn build(
        id: String,
        dir: PathBuf,
        owner: File,
        programs: Programs,
        rate: Option<BitRate>,
    ) -> Result<Self> {
        let netns = |role: &str| Netns::create(format!("{}{role}", teardown::netns_prefix(&id)));
        let switch = netns("switch")?;
        net::make_switch(&switch)?;
        let client = netns("client")?;
        net::connect_client(&switch, &client, net::address(9))?;
        let host = |number: u8, role: &str| -> Result<Host> {
            let host = netns(role)?;
            let address = net::address(number);
            net::connect_host(&switch, &host, &port(number), address)?;
            Host::new(role.to_owned(), host, [address, net::interlink_address(number)], dir.join(role))
        };
        let source = host(1, HOSTS[0])?;
        let destination = host(2, HOSTS[1])?;
        net::connect_hosts(source.netns(), destination.netns())?;
        let lab =
            Self { id, dir, programs, switch, client, source, destination, containers: 0, _owner: owner };
        lab.shape(rate)?;
        Ok(lab)
    }

    /// Where containers start.
    pub fn source(&self) -> &Host {
        &self.source
    }

    /// Where they go.
    pub fn destination(&self) -> &Host {
        &self.destination
    }

    /// The client's network.
    pub fn client(&self) -> &Netns {
        &self.client
    }

    /// The programs that run on its hosts.
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// A directory for files of this lab.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Shapes the links of both hosts to the switch to `rate`, or lets them run as fast as the machine can.
    ///
    /// # Errors
    /// When `tc` fails.
    pub fn shape(&self, rate: Option<BitRate>) -> Result<()> {
        net::shape_uplink(&self.switch, self.source.netns(), &port(1), rate)?;
        net::shape_uplink(&self.switch, self.destination.netns(), &port(2), rate)
    }

    /// The same for the link that joins the hosts, which clients do not use.
    ///
    /// # Errors
    /// When `tc` fails.
    pub fn shape_interlink(&self, rate: Option<BitRate>) -> Result<()> {
        [&self.source, &self.destination]
            .into_iter()
            .try_for_each(|host| net::shape(host.netns(), "interlink", rate))
    }

    /// Cuts the destination's link, or mends it. Neither host notices: it is the far end that goes down.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn cut_destination(&self, cut: bool) -> Result<()> {
        let master = if cut { "nomaster" } else { "master br0" };
        self.switch.ip(&format!("link set {} {master}", port(2)))?;
        if cut {
            return Ok(());
        }
        // A host that has asked for the other one in vain would go on taking it for gone for up to a second.
        [&self.source, &self.destination].into_iter().try_for_each(|host| host.netns().ip("neigh flush all"))
    }

    /// Adds a container: a bundle and a network on both hosts. It does not run yet: see [`Host::start`].
    ///
    /// # Errors
    /// When a bundle or a link cannot be made.
    pub fn add_container(&mut self, name: &str, payload: &Payload) -> Result<Container> {
        let number = FIRST_CONTAINER + self.containers;
        let address = net::address(number);
        self.containers += 1;
        for (host, processors) in [&self.source, &self.destination].into_iter().zip(&payload.processors) {
            let netns = Netns::create(host::container_netns_name(host.netns(), name))?;
            net::attach_container(host.netns(), &netns, number, address)?;
            let placement = bundle::Placement {
                name,
                netns: netns.path(),
                cgroup: self.cgroup_path(host, name),
                processors,
            };
            let bundle = host.bundles().join(name);
            fs::create_dir(&bundle).with_context(|| format!("create {}", bundle.display()))?;
            bundle::make(&bundle, payload, &placement)?;
        }
        Ok(Container { name: name.to_owned(), address })
    }

    /// The cgroup of a container on a host, below the root of each hierarchy.
    fn cgroup_path(&self, host: &Host, container: &str) -> String {
        format!("{}/{}/{container}", cgroup::lab_path(&self.id), host.role())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = teardown::remove(&self.id) {
            eprintln!("lab {}: {error:#}; the next lab tries again", self.id);
        }
    }
}

/// The switch's port for host `number`.
fn port(number: u8) -> String {
    format!("port{number}")
}
