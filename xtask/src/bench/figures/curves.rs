//! A curve for each mover: how a number grows with the data set.

use anyhow::Result;
use plotters::style::text_anchor::HPos;
use plotters::style::{Color, RGBAColor};

use super::canvas::{Canvas, GRID, INK, Lettering};
use super::dots::draw_axis;
use super::page::{MARGIN, Mark, WIDTH};
use super::scale::{Scale, number};
use crate::bench::statistics::Summary;

const LABELS: i32 = 70;
const HEADING: i32 = 30;
const HEIGHT: i32 = 320;
const AXIS: i32 = 56;
/// About how many numbers the vertical axis has.
const TICKS: u32 = 7;
/// How far curves are apart that have a point at the same place, so that one does not hide the other.
const ASIDE: i32 = 5;

/// The picture.
#[derive(Debug, Clone)]
pub struct Curves {
    /// What goes to the right, with its unit.
    pub across: String,
    /// What goes up, with its unit.
    pub up: String,
    /// Movers.
    pub curves: Vec<Curve>,
}

/// A mover.
#[derive(Debug, Clone)]
pub struct Curve {
    /// Its name.
    pub label: String,
    /// Its points, from the left to the right.
    pub points: Vec<(f64, Summary)>,
    /// Its colour.
    pub colour: RGBAColor,
}

impl Curves {
    /// The legend that belongs to it.
    pub fn legend(&self) -> Vec<(Mark, String)> {
        let curves = self.curves.iter().map(|curve| (Mark::Line(curve.colour), curve.label.clone()));
        let kinds = [
            (Mark::Dot(INK.to_rgba(), 5), "median".to_owned()),
            (Mark::Bar(INK.mix(0.5)), "lowest to highest".to_owned()),
        ];
        curves.chain(kinds).collect()
    }

    /// How high it is.
    pub fn height(&self) -> i32 {
        HEADING + HEIGHT + AXIS
    }

    /// Draws it from line `top` on.
    pub fn draw(&self, canvas: &dyn Canvas, top: i32) -> Result<()> {
        let points = || self.curves.iter().flat_map(|curve| &curve.points);
        let (left, right) = (MARGIN + LABELS, WIDTH - MARGIN);
        let (ceiling, floor) = (top + HEADING, top + HEADING + HEIGHT);
        let across = Scale::for_values(points().map(|point| point.0), (left + ASIDE, right - ASIDE));
        let highest = points().map(|point| point.1.highest).fold(0.0, f64::max);
        // What is within the noise may be less than nothing.
        let lowest = points().map(|point| point.1.lowest).fold(0.0, f64::min);
        let up = Scale::linear(lowest * 1.05, highest * 1.05, (floor, ceiling));
        canvas.text((MARGIN, top + HEADING / 2), &self.up, Lettering::PLAIN)?;
        draw_axis(canvas, &across, &self.across, (ceiling, floor))?;
        for tick in up.ticks(TICKS) {
            let y = up.at(tick);
            canvas.path(vec![(left, y), (right, y)], GRID.to_rgba(), 1)?;
            canvas.text((left - 8, y), &number(tick), Lettering::SMALL.anchored(HPos::Right))?;
        }
        let middle = self.curves.len() as i32 - 1;
        for (number, curve) in self.curves.iter().enumerate() {
            curve.draw(canvas, (&across, &up), (2 * number as i32 - middle) * ASIDE / 2)?;
        }
        Ok(())
    }
}

impl Curve {
    fn draw(&self, canvas: &dyn Canvas, (across, up): (&Scale, &Scale), aside: i32) -> Result<()> {
        let x = |value| across.at(value) + aside;
        let medians = self.points.iter().map(|(value, of)| (x(*value), up.at(of.median)));
        canvas.path(medians.clone().collect(), self.colour, 2)?;
        for (value, of) in &self.points {
            let ends = [of.lowest, of.highest].map(|end| (x(*value), up.at(end)));
            canvas.path(ends.to_vec(), self.colour.mix(0.5), 3)?;
        }
        medians.into_iter().try_for_each(|at| canvas.dot(at, 5, self.colour))
    }
}
