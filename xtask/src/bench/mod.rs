//! `cargo xtask bench`: the experiments that pclive is judged by, on the reader's own machine.
//!
//! It is a task of the sources and not a command of `pclive`, because it needs what only the sources have: the lab, the
//! load generator that checks every answer, and a build of the revision that is judged. Whoever has these can repeat
//! every figure with the command that is printed on it.
//!
//! [`matrix`] names what can be measured, [`presets`], [`ablation`] and [`options`] select from it, [`obstacles`] tells
//! what this machine cannot measure, [`campaign`] measures, and [`table`], [`files`] and [`figures`] show what came out.

mod ablation;
mod campaign;
mod cost;
mod criu;
mod estimate;
mod figures;
mod files;
mod goals;
mod matrix;
mod metrics;
mod movement;
mod obstacles;
mod options;
mod presets;
mod provenance;
mod results;
mod series;
mod statistics;
mod table;
mod usage;

use anyhow::{Result, bail, ensure};
pub use options::Options;

use self::campaign::Campaign;
use self::criu::Criu;
use self::files::Directory;
use self::matrix::{Group, Mover};
use self::obstacles::{Machine, destination_mib};
use self::provenance::Provenance;
use self::results::{Measured, Results};
use crate::build::release_programs;
use crate::interrupt::{self, stop_on_interrupt};
use crate::setup::prepare;

/// Measures what is asked for, prints the tables and writes the files.
///
/// # Errors
/// When nothing could be measured, or it was interrupted. A migration that fails is part of the results.
pub fn bench(options: &Options) -> Result<()> {
    if options.redraw {
        let directory = Directory::new(&options.out)?;
        return show(&directory.load()?, &directory);
    }
    prepare()?;
    let groups = options.groups();
    ensure!(!groups.is_empty(), "no cell has such a name: see --list");
    let programs = release_programs(options.programs.as_deref())?;
    let criu = options.criu.as_deref().map(Criu::at).transpose()?;
    let machine = Machine::here(&programs)?;
    let groups: Vec<_> = groups
        .iter()
        .map(|group| Measured::new(group, |setting, mover| machine.obstacle(setting, mover)))
        .collect();
    if options.list {
        list(options, &groups);
        return Ok(());
    }
    // Before any thread is started: they inherit which signals are blocked.
    stop_on_interrupt()?;
    let directory = Directory::new(&options.out)?;
    let provenance = Provenance::here(options.repeat(), most_memory(&groups))?;
    let mut results = Results { provenance, groups, ablations: options.ablations().to_vec() };
    if options.resume {
        results.go_on_from(directory.load()?)?;
    }
    let campaign = Campaign { programs: &programs, criu, repeat: options.repeat(), margin: options.margin() };
    campaign.carry_out(&mut results, |results| directory.keep(results))?;
    show(&results, &directory)?;
    conclude(&results)
}

/// Shows results in every way. Files come first: whoever reads the text may have left.
fn show(results: &Results, directory: &Directory) -> Result<()> {
    directory.write_tables(results)?;
    let figures = figures::draw(results, directory)?;
    for group in &results.groups {
        print!("{}", table::draw(group));
    }
    if let Some(verdict) = goals::restore_growth(&results.groups) {
        println!("\ngoal: {verdict}");
    }
    for ablation in &results.ablations {
        print!("{}", table::compare(*ablation, results));
    }
    let tables = files::TABLES.map(|(name, _)| name).join(", ");
    println!("\nin {}: results.json, {tables}", directory.path().display());
    println!("and as SVG and PNG: {}", figures.names.join(", "));
    for left_out in figures.left_out {
        println!("left out: {left_out}");
    }
    Ok(())
}

/// Whether anything came out.
fn conclude(results: &Results) -> Result<()> {
    if interrupt::requested() {
        bail!(
            "interrupted: the results are those of the measurements that were complete; with --resume the same command \
             goes on with them"
        );
    }
    let mut cells = results.groups.iter().flat_map(|group| &group.cells);
    ensure!(
        cells.any(|cell| cell.mover != Mover::Control && !cell.runs.is_empty()),
        "nothing could be measured"
    );
    Ok(())
}

/// The most memory that is touched before a measurement.
fn most_memory(groups: &[Measured]) -> u64 {
    let needed = groups.iter().flat_map(|group| {
        let cells = group.cells.iter().filter(|cell| cell.obstacle.is_none());
        cells.map(|cell| destination_mib(&group.setting, &cell.mover))
    });
    needed.max().unwrap_or_default()
}

/// Prints what would be measured.
fn list(options: &Options, groups: &[Measured]) {
    let mut feasible = Vec::new();
    for group in groups {
        println!("{}", group.name);
        let mut movers = Vec::new();
        for cell in group.cells.iter().filter(|cell| cell.mover != Mover::Control) {
            match &cell.obstacle {
                Some(obstacle) => println!("  {}: not here: {obstacle}", cell.name),
                None => {
                    println!("  {}", cell.name);
                    movers.push(cell.mover.clone());
                }
            }
        }
        if !movers.is_empty() {
            feasible.push(Group { setting: group.setting.clone(), movers });
        }
    }
    let minutes = options.estimate(&feasible).as_secs_f64() / 60.0;
    println!(
        "each {} times, with a control in each turn: about {:.0} minutes",
        options.repeat(),
        minutes.ceil()
    );
}
