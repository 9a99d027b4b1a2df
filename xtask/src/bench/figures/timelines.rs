//! Something over time: a panel for each mover, all with the same axes.

use anyhow::Result;
use plotters::style::text_anchor::HPos;
use plotters::style::{Color, RGBAColor};

use super::canvas::{Canvas, GRID, Lettering, PENCIL};
use super::dots::draw_axis;
use super::page::{MARGIN, Mark, WIDTH, colour};
use super::scale::{Scale, number};

const LABELS: i32 = 70;
const HEADING: i32 = 30;
const PANEL: i32 = 130;
const AXIS: i32 = 56;
/// How much of their colour the other runs have.
const FAINT: f64 = 0.4;
/// About how many numbers a panel has at its side.
const TICKS: u32 = 4;
/// The migration.
const MIGRATION: RGBAColor = RGBAColor(225, 235, 245, 1.0);
/// The time in which the container runs nowhere; lines are seen through it.
const BLACKOUT: RGBAColor = RGBAColor(190, 20, 40, 0.35);

/// The picture.
#[derive(Debug, Clone)]
pub struct Timelines {
    /// What goes up, with its unit.
    pub unit: String,
    /// What each panel's lines are called.
    pub series: Vec<String>,
    /// Movers.
    pub panels: Vec<Panel>,
}

/// A mover.
#[derive(Debug, Clone)]
pub struct Panel {
    /// Its name.
    pub label: String,
    /// A curve for each series.
    pub curves: Vec<Vec<(f64, f64)>>,
    /// The same of other runs.
    pub others: Vec<Vec<Vec<(f64, f64)>>>,
    /// When the migration ended, in seconds since its start.
    pub end_s: f64,
    /// When the container ran nowhere.
    pub blackout_s: Option<(f64, f64)>,
}

impl Timelines {
    /// The legend that belongs to it.
    pub fn legend(&self) -> Vec<(Mark, String)> {
        let series = self.series.iter().enumerate();
        let mut legend: Vec<_> =
            series.map(|(number, name)| (Mark::Line(colour(number)), name.clone())).collect();
        if self.panels.iter().any(|panel| !panel.others.is_empty()) {
            legend.push((Mark::Line(PENCIL.mix(FAINT)), "the same in other runs".to_owned()));
        }
        legend.push((Mark::Area(MIGRATION), "migration".to_owned()));
        legend.push((Mark::Area(BLACKOUT), "blackout".to_owned()));
        legend
    }

    /// How high it is.
    pub fn height(&self) -> i32 {
        self.panels.len() as i32 * (HEADING + PANEL) + AXIS
    }

    /// Draws it from line `top` on.
    pub fn draw(&self, canvas: &dyn Canvas, top: i32) -> Result<()> {
        let points = || {
            self.panels
                .iter()
                .flat_map(|panel| panel.curves.iter().chain(panel.others.iter().flatten()).flatten())
        };
        let first = points().map(|point| point.0).fold(0.0, f64::min);
        let last = points().map(|point| point.0).fold(0.0, f64::max);
        let highest = points().map(|point| point.1).fold(0.0, f64::max);
        let across = Scale::linear(first, last, (MARGIN + LABELS, WIDTH - MARGIN));
        let mut y = top;
        for panel in &self.panels {
            let bold = Lettering { bold: true, ..Lettering::PLAIN };
            canvas.text((MARGIN, y + HEADING / 2), &panel.label, bold)?;
            y += HEADING;
            let up = Scale::linear(0.0, highest * 1.05, (y + PANEL - 8, y));
            panel.draw(canvas, &across, &up, (y, y + PANEL - 8))?;
            y += PANEL;
        }
        canvas.text(
            (WIDTH - MARGIN, top + HEADING / 2),
            &self.unit,
            Lettering::PLAIN.anchored(HPos::Right),
        )?;
        draw_axis(canvas, &across, "seconds since the start of the migration", (y - 8, y - 8))
    }
}

impl Panel {
    fn draw(&self, canvas: &dyn Canvas, across: &Scale, up: &Scale, (top, bottom): (i32, i32)) -> Result<()> {
        canvas.rectangle([(across.at(0.0), top), (across.at(self.end_s), bottom)], MIGRATION)?;
        if let Some((from, to)) = self.blackout_s {
            let left = across.at(from);
            // Even the shortest one is seen.
            canvas.rectangle([(left, top), (across.at(to).max(left + 2), bottom)], BLACKOUT)?;
        }
        for tick in up.ticks(TICKS) {
            let y = up.at(tick);
            let ends = [across.at(f64::NEG_INFINITY), across.at(f64::INFINITY)];
            canvas.path(ends.map(|x| (x, y)).to_vec(), GRID.to_rgba(), 1)?;
            let lettering = Lettering::SMALL.anchored(HPos::Right);
            canvas.text((MARGIN + LABELS - 8, y), &number(tick), lettering)?;
        }
        let place =
            |curve: &[(f64, f64)]| curve.iter().map(|(x, y)| (across.at(*x), up.at(*y))).collect::<Vec<_>>();
        for curves in &self.others {
            for (number, curve) in curves.iter().enumerate() {
                canvas.path(place(curve), colour(number).mix(FAINT), 1)?;
            }
        }
        for (number, curve) in self.curves.iter().enumerate() {
            canvas.path(place(curve), colour(number), 2)?;
        }
        Ok(())
    }
}
