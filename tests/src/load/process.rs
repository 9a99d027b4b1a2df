//! The load program, started in the lab's client namespace.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use anyhow::{Context, Result, bail};

use super::report::LoadReport;
use super::spec::LoadSpec;
use crate::lab::Lab;

/// A load program that has filled the server. It is killed when dropped.
#[derive(Debug)]
pub struct LoadProcess {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl LoadProcess {
    /// Starts the program in the lab's client namespace and waits until all data is written.
    ///
    /// # Errors
    /// When it cannot be started or cannot reach the server.
    pub fn fill(lab: &Lab, server: SocketAddr, spec: &LoadSpec) -> Result<Self> {
        let mut child = lab
            .client()
            .command(lab.programs().path("load")?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start the load program")?;
        let input = child.stdin.take().expect("piped above");
        let output = BufReader::new(child.stdout.take().expect("piped above"));
        let mut load = Self { child, input, output };
        load.tell(&serde_json::to_string(&(server, spec))?)?;
        match load.line()?.as_str() {
            "filled" => Ok(load),
            other => bail!("the load program said {other:?} instead of `filled`"),
        }
    }

    /// Starts the load.
    ///
    /// # Errors
    /// When the program is gone.
    pub fn start(&mut self) -> Result<()> {
        self.tell("start")
    }

    /// Names this moment in the report.
    ///
    /// # Errors
    /// When the program is gone.
    pub fn mark(&mut self, name: &str) -> Result<()> {
        self.tell(&format!("mark {name}"))
    }

    /// Stops the load, waits until the data is read back and returns the report.
    ///
    /// # Errors
    /// When the program is gone or failed.
    pub fn stop(mut self) -> Result<LoadReport> {
        self.tell("stop")?;
        let report = self.line()?;
        serde_json::from_str(&report).with_context(|| format!("the load's report: {report:?}"))
    }

    fn tell(&mut self, line: &str) -> Result<()> {
        writeln!(self.input, "{line}").context("the load program is gone")
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line).context("read from the load program")?;
        Ok(line.trim_end().to_owned())
    }
}

impl Drop for LoadProcess {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
