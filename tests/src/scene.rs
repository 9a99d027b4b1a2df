//! A container under load at the source and a destination that waits for it: what most migrations here start from.

use std::net::SocketAddr;

use anyhow::Result;

use crate::lab::{BitRate, Container, DedicatedProcessors, Lab, Payload};
use crate::load::{LoadProcess, LoadReport, LoadSpec, Service};
use crate::pclive::{Migrate, Outcome, Serve, TrackReport, track};
use crate::programs::Programs;

/// The mark in the load's report when the migration starts.
pub const MIGRATE: &str = "migrate";
/// The mark when it has ended.
pub const MIGRATED: &str = "migrated";

/// The stage is set and the load runs.
#[derive(Debug)]
pub struct Scene {
    // Dropped in this order: whoever uses the lab ends before it.
    load: LoadProcess,
    serve: Serve,
    container: Container,
    lab: Lab,
    network: Network,
    _processors: DedicatedProcessors,
}

/// Which way migrations go, and how fast the hosts' links are there; `None` is as fast as the machine can.
#[derive(Debug, Clone, Copy)]
pub enum Network {
    /// By way of the switch, on the links that the clients use as well.
    Shared(Option<BitRate>),
    /// By a link of their own between the hosts. The clients' way is not shaped.
    Separate(Option<BitRate>),
}

impl Scene {
    /// Starts the server on processors of its own and `pclive serve`, writes the data set, shapes the hosts' links and
    /// starts the load.
    ///
    /// # Errors
    /// When any of them cannot be started.
    pub fn set(programs: Programs, load: &LoadSpec, network: Network) -> Result<Self> {
        let processors = DedicatedProcessors::take()?;
        let mut lab = Lab::with_programs(programs, None)?;
        let container = lab.add_container(
            "service",
            &Payload {
                processors: [processors.numbers(), processors.numbers()].map(<[_]>::to_vec),
                ..payload(load)
            },
        )?;
        lab.source().start(&container.name)?;
        let server = SocketAddr::from((container.address, load.service.port()));
        // The data set is written before the links are shaped: that would only take longer.
        let mut load = LoadProcess::fill(&lab, server, load)?;
        match network {
            Network::Shared(rate) => lab.shape(rate)?,
            Network::Separate(rate) => lab.shape_interlink(rate)?,
        }
        let serve = Serve::start(&lab, lab.destination())?;
        load.start()?;
        Ok(Self { load, serve, container, lab, network, _processors: processors })
    }

    /// Migrates the container with these options and marks start and end in the load's report.
    ///
    /// # Errors
    /// When `pclive migrate` cannot be started. However it ends is in the outcome.
    pub fn migrate(&mut self, options: &[&str]) -> Result<Outcome> {
        self.load.mark(MIGRATE)?;
        let outcome = self.start_migration(options)?.wait()?;
        self.load.mark(MIGRATED)?;
        Ok(outcome)
    }

    /// Follows what the container writes, with these options of `pclive track`, and marks start and end as those of a
    /// migration.
    ///
    /// # Errors
    /// When it fails.
    pub fn track(&mut self, options: &[&str]) -> Result<TrackReport> {
        self.load.mark(MIGRATE)?;
        let report = track(&self.lab, self.lab.source(), &self.container.name, options)?;
        self.load.mark(MIGRATED)?;
        Ok(report)
    }

    /// Starts the migration and does not wait for its end, nor mark anything.
    ///
    /// # Errors
    /// When `pclive migrate` cannot be started.
    pub fn start_migration(&self, options: &[&str]) -> Result<Migrate> {
        let to = match self.network {
            Network::Shared(_) => self.serve.address(),
            Network::Separate(_) => self.serve.interlink_address(),
        };
        Migrate::start(&self.lab, self.lab.source(), &self.container.name, to, options)
    }

    /// Kills `pclive serve`, as a crash of it would.
    ///
    /// # Errors
    /// When it is gone already.
    pub fn kill_serve(&mut self) -> Result<()> {
        self.serve.kill()
    }

    /// Starts `pclive serve` again.
    ///
    /// # Errors
    /// When it does not start.
    pub fn restart_serve(&mut self) -> Result<()> {
        self.serve = Serve::start(&self.lab, self.lab.destination())?;
        Ok(())
    }

    /// Stops the load and reads the data set back over links that are not shaped any more.
    ///
    /// # Errors
    /// When the load program failed.
    pub fn stop_load(self) -> Result<(LoadReport, Lab, Serve)> {
        self.lab.shape(None)?;
        Ok((self.load.stop()?, self.lab, self.serve))
    }

    /// The lab.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The container.
    pub fn container(&self) -> &Container {
        &self.container
    }

    /// The load.
    pub fn load(&mut self) -> &mut LoadProcess {
        &mut self.load
    }

    /// The destination's `pclive serve`.
    pub fn serve(&mut self) -> &mut Serve {
        &mut self.serve
    }
}

/// The server for a load.
fn payload(load: &LoadSpec) -> Payload {
    match load.service {
        Service::Redis => Payload::redis(),
        // Its items need more than their values, and it must not evict any.
        Service::Memcached => Payload::memcached(64 + (load.data_bytes >> 20) as u32 * 2),
    }
}
