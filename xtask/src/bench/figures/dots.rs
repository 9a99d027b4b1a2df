//! A line for each mover: its runs as dots, their range and their median.

use anyhow::Result;
use plotters::style::text_anchor::HPos;
use plotters::style::{Color, RGBAColor};

use super::canvas::{Canvas, GRID, INK, Lettering, PENCIL};
use super::page::{MARGIN, Mark, WIDTH, label_width};
use super::scale::{Scale, number};
use crate::bench::statistics::Summary;

const VALUES: i32 = 190;
const ROW: i32 = 28;
const HEADING: i32 = 38;
const AXIS: i32 = 56;
/// About how many numbers an axis has.
const TICKS: u32 = 7;
/// The colour of marks.
const MARK_COLOUR: RGBAColor = RGBAColor(190, 20, 40, 1.0);

/// The picture.
#[derive(Debug, Clone)]
pub struct Dots {
    /// What is measured, with its unit.
    pub axis: String,
    /// What the marks are.
    pub mark: String,
    /// Settings, each with its movers.
    pub groups: Vec<(String, Vec<Row>)>,
}

/// A mover.
#[derive(Debug, Clone)]
pub struct Row {
    /// Its name.
    pub label: String,
    /// Its runs.
    pub values: Vec<f64>,
    /// What is said of them at its end.
    pub text: String,
    /// What is to be reached, or compared with.
    pub mark: Option<f64>,
    /// Its colour.
    pub colour: RGBAColor,
}

/// Median and range as they stand at the end of a row.
pub fn in_words(Summary { median, lowest, highest, .. }: Summary) -> String {
    format!("{} ({}–{})", number(median), number(lowest), number(highest))
}

impl Dots {
    /// The legend that belongs to it.
    pub fn legend(&self) -> Vec<(Mark, String)> {
        let mut legend = vec![
            (Mark::Dot(INK.to_rgba(), 6), "median".to_owned()),
            (Mark::Dot(INK.mix(0.35), 3), "each run".to_owned()),
            (Mark::Line(INK.mix(0.5)), "lowest to highest".to_owned()),
        ];
        if self.rows().any(|row| row.mark.is_some()) {
            legend.push((Mark::Bar(MARK_COLOUR), self.mark.clone()));
        }
        legend
    }

    /// How high it is.
    pub fn height(&self) -> i32 {
        self.groups.iter().map(|(_, rows)| HEADING + ROW * rows.len() as i32).sum::<i32>() + AXIS
    }

    /// Draws it from line `top` on.
    pub fn draw(&self, canvas: &dyn Canvas, top: i32) -> Result<()> {
        let values = self.rows().flat_map(|row| row.values.iter().copied().chain(row.mark));
        let labels = label_width(self.rows().map(|row| row.label.as_str()));
        let scale = Scale::for_values(values, (MARGIN + labels, WIDTH - MARGIN - VALUES));
        let bottom = top + self.height() - AXIS;
        draw_axis(canvas, &scale, &self.axis, (top + HEADING / 2, bottom))?;
        let mut y = top;
        for (heading, rows) in &self.groups {
            let bold = Lettering { bold: true, ..Lettering::PLAIN };
            // The grid does not go through the heading.
            let width = bold.width(heading);
            canvas.rectangle(
                [(MARGIN, y + 8), (MARGIN + width + 12, y + HEADING - 8)],
                plotters::style::WHITE.to_rgba(),
            )?;
            canvas.text((MARGIN, y + HEADING / 2), heading, bold)?;
            y += HEADING;
            for row in rows {
                row.draw(canvas, &scale, y + ROW / 2)?;
                y += ROW;
            }
        }
        Ok(())
    }

    fn rows(&self) -> impl Iterator<Item = &Row> + Clone {
        self.groups.iter().flat_map(|(_, rows)| rows)
    }
}

impl Row {
    fn draw(&self, canvas: &dyn Canvas, scale: &Scale, y: i32) -> Result<()> {
        canvas.text((MARGIN + 12, y), &self.label, Lettering::PLAIN)?;
        if let Some(mark) = self.mark {
            let x = scale.at(mark);
            canvas.path(vec![(x, y - ROW / 2 + 2), (x, y + ROW / 2 - 2)], MARK_COLOUR, 2)?;
        }
        let Some(summary) = Summary::of(self.values.iter().copied()) else { return Ok(()) };
        let (from, to) = (scale.at(summary.lowest), scale.at(summary.highest));
        canvas.path(vec![(from, y), (to, y)], self.colour.mix(0.5), 3)?;
        for value in &self.values {
            canvas.dot((scale.at(*value), y), 3, self.colour.mix(0.45))?;
        }
        canvas.dot((scale.at(summary.median), y), 6, self.colour)?;
        canvas.text((WIDTH - MARGIN, y), &self.text, Lettering::PLAIN.anchored(HPos::Right))
    }
}

/// Draws grid, numbers and name of a horizontal axis at the lower of two lines.
pub fn draw_axis(canvas: &dyn Canvas, scale: &Scale, name: &str, (top, bottom): (i32, i32)) -> Result<()> {
    let mut free = i32::MIN;
    for tick in scale.ticks(TICKS) {
        let x = scale.at(tick);
        canvas.path(vec![(x, top), (x, bottom)], GRID.to_rgba(), 1)?;
        let (label, lettering) = (number(tick), Lettering::SMALL.anchored(HPos::Center));
        let half = lettering.width(&label) / 2 + 4;
        // A number without room for it is left out; its line tells enough.
        if x - half >= free {
            canvas.text((x, bottom + 14), &label, lettering)?;
            free = x + half;
        }
    }
    let (left, right) = (scale.at(f64::NEG_INFINITY), scale.at(f64::INFINITY));
    canvas.path(vec![(left, bottom), (right, bottom)], PENCIL.to_rgba(), 1)?;
    let name = if scale.logarithmic { format!("{name} (logarithmic)") } else { name.to_owned() };
    let lettering = Lettering::PLAIN.anchored(HPos::Center);
    canvas.text(((left + right) / 2, bottom + 38), &name, lettering)
}
