//! `pclive check`: what this host offers, and what is lost where it does not.
//!
//! Everything that can be tried is tried, on pclive itself: a version number says little about a kernel's
//! configuration, and nothing about what a sandbox around pclive forbids.

mod probes;

use anyhow::Result;
use probes::{PROBES, Probe};
use serde::Serialize;
use std::{
    io::{IsTerminal, Write},
    process::ExitCode,
};

/// What this host offers for migrations, each line with what is lost without it.
///
/// Exit code 1 if something is missing that every migration needs.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// One line of the answer.
#[derive(Debug, Serialize)]
struct Finding {
    name: &'static str,
    available: bool,
    /// Whether every migration needs it.
    required: bool,
    /// What was found, or why not.
    detail: String,
    /// What is lost without it.
    without: &'static str,
}

impl Finding {
    fn of(probe: &Probe) -> Self {
        let (available, detail) = match (probe.run)() {
            Ok(detail) => (true, detail),
            Err(reason) => (false, format!("{reason:#}")),
        };
        Self { name: probe.name, available, required: probe.required, detail, without: probe.without }
    }

    fn is_fatal(&self) -> bool {
        self.required && !self.available
    }
}

/// Looks at the host and prints what it found.
pub fn run(args: CheckArgs) -> Result<ExitCode> {
    let findings: Vec<Finding> = PROBES.iter().map(Finding::of).collect();
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &findings)?;
        writeln!(out)?;
    } else {
        let colour = out.is_terminal();
        print(&mut out, &findings, colour)?;
    }
    Ok(ExitCode::from(u8::from(findings.iter().any(Finding::is_fatal))))
}

fn print(out: &mut impl Write, findings: &[Finding], colour: bool) -> std::io::Result<()> {
    let width = findings.iter().map(|finding| finding.name.len()).max().unwrap_or(0);
    for finding in findings {
        let (word, code) = match (finding.available, finding.required) {
            (true, _) => ("yes", 32),
            (false, true) => ("NO", 31),
            (false, false) => ("no", 33),
        };
        let mark = if colour { format!("\x1b[{code}m{word:3}\x1b[0m") } else { format!("{word:3}") };
        writeln!(out, "{mark}  {:width$}  {}", finding.name, finding.detail)?;
        if !finding.available {
            writeln!(out, "     {:width$}  without it: {}", "", finding.without)?;
        }
    }
    let missing = findings.iter().filter(|finding| finding.is_fatal()).count();
    match missing {
        0 => writeln!(out, "\nContainers can be migrated from and to this host."),
        _ => writeln!(out, "\n{missing} thing(s) are missing that every migration needs."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(available: bool, required: bool) -> Finding {
        Finding { name: "thing", available, required, detail: "detail".into(), without: "less" }
    }

    #[test]
    fn what_is_missing_is_printed_with_what_is_lost() {
        let mut out = Vec::new();
        print(&mut out, &[finding(true, true), finding(false, false), finding(false, true)], false).unwrap();
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(
            lines,
            [
                "yes  thing  detail",
                "no   thing  detail",
                "            without it: less",
                "NO   thing  detail",
                "            without it: less",
                "",
                "1 thing(s) are missing that every migration needs.",
            ]
        );
    }

    #[test]
    fn only_what_is_required_and_missing_is_fatal() {
        assert!(finding(false, true).is_fatal());
        assert!(!finding(true, true).is_fatal() && !finding(false, false).is_fatal());
    }

    #[test]
    fn this_host_answers_every_question() {
        let findings: Vec<_> = PROBES.iter().map(Finding::of).collect();
        assert!(findings.iter().all(|finding| !finding.detail.is_empty()), "{findings:#?}");
        assert!(findings.iter().all(|finding| !finding.is_fatal()), "{findings:#?}");
    }
}
