//! Workloads that run: on this machine as they are, or in a container of the lab.

use super::control::{Answer, Client};
use crate::Programs;
use crate::lab::{Container, Host, Lab, Payload};
use crate::pclive::{Migrate, MigrationReport, Outcome, Serve, exit};
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Where a workload in a container listens.
const PORT: u16 = 7000;
/// How long a check may take: far longer than on a machine that does nothing else.
const PATIENCE: Duration = Duration::from_secs(90);
/// How long a workload may take to start.
const START: Duration = Duration::from_secs(20);

/// A workload outside of any container; dropping it kills it.
#[derive(Debug)]
pub struct Native {
    child: Child,
    client: Client,
}

impl Native {
    /// Starts `pclive-workload` with these arguments and waits until it listens.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(arguments: &[&str]) -> Result<Self> {
        let mut child = Command::new(Programs::beside_own()?.path("pclive-workload")?)
            .args(arguments)
            .args(["--listen", "127.0.0.1:0"])
            .stdout(Stdio::piped())
            .spawn()
            .context("start pclive-workload")?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("piped above")?).read_line(&mut line)?;
        let address =
            line.trim().strip_prefix("listening on ").with_context(|| format!("it says {line:?}"))?;
        Ok(Native { client: Client::connect(address)?, child })
    }

    /// Asks it.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn ask(&mut self, question: &str) -> Result<Answer> {
        Ok(self.client.ask(question, PATIENCE)?)
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // Its own children have asked the kernel to die with it.
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}

/// A workload in a container, with a connection that stays open wherever the container goes.
#[derive(Debug)]
pub struct Contained {
    /// The container.
    pub container: Container,
    client: Client,
    instance: String,
    checks: u64,
}

impl Contained {
    /// Adds the container to the lab and starts `pclive-workload` with these arguments in it, on the source host.
    ///
    /// # Errors
    /// When it does not start; what it wrote is in the message.
    pub fn start(lab: &mut Lab, name: &str, arguments: &[&str]) -> Result<Self> {
        Self::start_on(lab, name, arguments, Default::default())
    }

    /// The same, bound to these [processors](Payload::processors) at either host.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_on(
        lab: &mut Lab,
        name: &str,
        arguments: &[&str],
        processors: [Vec<usize>; 2],
    ) -> Result<Self> {
        let program = lab.programs().path("pclive-workload")?;
        let payload = Payload { processors, ..Payload::program(program, arguments) };
        let container = lab.add_container(name, &payload)?;
        lab.source().start(name)?;
        let end = Instant::now() + START;
        let mut client = loop {
            match connect(lab, &container)? {
                Ok(client) => break client,
                Err(error) if Instant::now() > end => bail!("{name}: {error}: {}", lab.source().log(name)),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        let Answer::Ok(instance) = client.ask("instance", PATIENCE)? else { bail!("{name} has no instance") };
        Ok(Contained { container, client, instance, checks: 0 })
    }

    /// Moves it from `host` to where `serve` listens. It must run there afterwards.
    ///
    /// # Errors
    /// When it does not: with what both sides said.
    pub fn migrate(
        &self,
        lab: &Lab,
        host: &Host,
        serve: &Serve,
        options: &[&str],
    ) -> Result<MigrationReport> {
        let outcome = Migrate::start(lab, host, &self.container.name, serve.address(), options)?.wait()?;
        match outcome {
            Outcome { code: Some(exit::MOVED), report: Some(report), .. } => Ok(report),
            Outcome { code, output, .. } => {
                let name = &self.container.name;
                let logs = [lab.source(), lab.destination()]
                    .map(|host| (host.state(name), host.log("serve"), host.log(name)))
                    .map(|(state, serve, own)| format!("{state:?}\nserve: {serve}\n{name}: {own}"));
                bail!("exit code {code:?}\nmigrate: {output}\n{}", logs.join("\n"))
            }
        }
    }

    /// Replaces the connection that stays open.
    ///
    /// # Errors
    /// When there is no new one.
    pub fn reconnect(&mut self, lab: &Lab) -> Result<()> {
        self.client = connect(lab, &self.container)??;
        Ok(())
    }

    /// Lets it check itself, over the old connection and a new one, and returns its counters. It must be the program
    /// that was started, and nobody else may have asked it: a copy that runs elsewhere would count less.
    ///
    /// # Errors
    /// What differs.
    pub fn check(&mut self, lab: &Lab) -> Result<String> {
        let mut second = connect(lab, &self.container)??;
        let mut counters = String::new();
        for client in [&mut self.client, &mut second] {
            let answer = client.ask("check", PATIENCE)?;
            self.checks += 1;
            counters = match answer {
                Answer::Ok(counters) => counters,
                Answer::Differs(list) => bail!("check {} differs:\n  {}", self.checks, list.join("\n  ")),
            };
            for expected in [format!("checks={}", self.checks), format!("instance={}", self.instance)] {
                if !counters.split(' ').any(|word| word == expected) {
                    bail!("{expected} expected: {counters}");
                }
            }
        }
        Ok(counters)
    }
}

/// A connection from the lab's client. The inner error is that of the connection.
fn connect(lab: &Lab, container: &Container) -> Result<std::io::Result<Client>> {
    let address = SocketAddr::from((container.address, PORT));
    lab.client().enter(|| Client::connect(address))
}
