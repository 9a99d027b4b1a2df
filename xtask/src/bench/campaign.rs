//! Measuring: the movers of a setting take turns, so that whatever the machine does meanwhile happens to all of them.
//!
//! The last of each turn is the control: the same load for as long as the migrations take, without one. What its
//! throughput and its longest gap do is the noise that every other number has to be read against.
//!
//! Who comes after whom matters: what one has left free the next one gets. So as much memory as the migration will take is
//! touched before ([`crate::warm`]), and every other turn goes backwards.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pclive_tests::Programs;
use pclive_tests::scene::{MIGRATE, MIGRATED, Scene};

use super::criu::{Criu, Images};
use super::estimate::{Progress, expected};
use super::matrix::{Mover, Setting};
use super::movement::Movement;
use super::obstacles::destination_mib;
use super::results::{Cell, Measured, Results, Run};
use super::statistics::Summary;
use super::usage::Sampler;
use crate::experiment::{migrate, migration_span_us};
use crate::interrupt;
use crate::warm::WarmMemory;

/// A mover that fails so often without having succeeded is given up.
const PATIENCE: usize = 2;
/// How long the control lasts if nothing else was measured in its setting.
const CONTROL: Duration = Duration::from_secs(5);
/// How often a wait looks for an interrupt.
const GLANCE: Duration = Duration::from_millis(200);

/// How a campaign is carried out.
pub struct Campaign<'a> {
    /// The programs that are measured.
    pub programs: &'a Programs,
    /// The peer that is measured too.
    pub criu: Option<Criu>,
    /// Turns.
    pub repeat: usize,
    /// How long the load runs before and after each migration.
    pub margin: Duration,
}

impl Campaign<'_> {
    /// Measures everything that is feasible and not among the results yet, and hands them to `keep` after each measurement.
    ///
    /// # Errors
    /// Those of `keep`. A migration that fails is part of the results; an interrupt just ends it early.
    pub fn carry_out(&self, results: &mut Results, keep: impl Fn(&Results) -> Result<()>) -> Result<()> {
        let feasible = results.groups.iter().filter(|group| group.is_feasible());
        let mut progress = Progress::new(feasible.flat_map(|group| self.durations(group)).collect());
        for number in 0..results.groups.len() {
            if !results.groups[number].is_feasible() {
                continue;
            }
            for turn in 1..=self.repeat {
                for cell in order(turn, results.groups[number].cells.len()) {
                    if interrupt::requested() {
                        return Ok(());
                    }
                    let group = &mut results.groups[number];
                    if group.cells[cell].is_due(turn) {
                        progress.next(&group.name, &group.cells[cell].name, turn);
                        self.measure_cell(group, cell, turn);
                        keep(results)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// How long each measurement of a group that is due takes.
    fn durations(&self, group: &Measured) -> Vec<Duration> {
        let due = |turn| {
            let cells = order(turn, group.cells.len()).map(|cell| &group.cells[cell]);
            let due = cells.filter(move |cell| cell.is_due(turn));
            due.map(|cell| expected(&group.setting, &cell.mover, self.margin))
        };
        (1..=self.repeat).flat_map(due).collect()
    }

    fn measure_cell(&self, group: &mut Measured, number: usize, turn: usize) {
        let usual = usual_duration(group);
        let cell = &mut group.cells[number];
        if cell.is_given_up() {
            return;
        }
        match self.measure(&group.setting, &cell.mover, turn, usual) {
            Ok(run) => cell.runs.push(run),
            // What an interrupt tears down is no failure of the mover.
            Err(_) if interrupt::requested() => {}
            Err(error) => {
                eprintln!("  failed: {error:#}");
                cell.failures.push(format!("{error:#}"));
            }
        }
    }

    fn measure(&self, setting: &Setting, mover: &Mover, turn: usize, usual: Duration) -> Result<Run> {
        let warm = WarmMemory::touch(destination_mib(setting, mover) << 20)?;
        let mut scene = Scene::set(self.programs.clone(), &setting.load(), setting.network())?;
        let images = if *mover == Mover::Criu { Some(Images::new()?) } else { None };
        let kept = images.as_ref().map(Images::destination);
        let sampler = Sampler::start(scene.lab(), scene.container(), kept)?;
        pause(self.margin)?;
        let _offer = warm.offer()?;
        let options = mover.options();
        let (mut movement, mut tracking) = (None, None);
        match mover {
            Mover::Pclive { .. } => movement = Some(Movement::of(&migrate(&mut scene, &options)?)),
            Mover::Criu => {
                let (criu, images) = self.criu.as_ref().zip(images.as_ref()).context("no CRIU was given")?;
                movement = Some(criu.migrate(&mut scene, images, setting.shared)?);
            }
            Mover::Track { .. } => {
                let options: Vec<_> = options.iter().map(String::as_str).collect();
                tracking = Some(scene.track(&options)?);
            }
            Mover::Control => {
                scene.load().mark(MIGRATE)?;
                pause(usual)?;
                scene.load().mark(MIGRATED)?;
            }
        }
        pause(self.margin)?;
        let usage = sampler.stop();
        let (load, ..) = scene.stop_load()?;
        Ok(Run { turn, movement, tracking, load, usage })
    }
}

impl Cell {
    fn is_given_up(&self) -> bool {
        self.runs.is_empty() && self.failures.len() >= PATIENCE
    }
}

/// In what order the cells of a group are measured: every second turn goes backwards.
fn order(turn: usize, cells: usize) -> impl Iterator<Item = usize> {
    (0..cells).map(move |place| if turn % 2 == 1 { place } else { cells - 1 - place })
}

/// How long what is compared with the control takes in this setting.
fn usual_duration(group: &Measured) -> Duration {
    let others = group.cells.iter().filter(|cell| cell.mover != Mover::Control);
    let spans = others.flat_map(|cell| &cell.runs).map(|run| migration_span_us(&run.load));
    let seconds = Summary::of(spans.map(|(start_us, end_us)| end_us.saturating_sub(start_us) as f64 / 1e6));
    seconds.map_or(CONTROL, |seconds| Duration::from_secs_f64(seconds.median))
}

/// Waits, unless there is an interrupt.
fn pause(duration: Duration) -> Result<()> {
    let end = Instant::now() + duration;
    loop {
        if interrupt::requested() {
            bail!("interrupted");
        }
        match end.checked_duration_since(Instant::now()) {
            Some(rest) if !rest.is_zero() => sleep(rest.min(GLANCE)),
            _ => return Ok(()),
        }
    }
}
