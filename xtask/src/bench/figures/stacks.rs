//! A bar for each mover: what a time consists of.

use anyhow::Result;
use plotters::style::WHITE;
use plotters::style::text_anchor::HPos;

use super::canvas::{Canvas, Lettering, Point};
use super::page::{MARGIN, Mark, WIDTH, colour, label_width};
use super::scale::number;
use crate::bench::movement::Part;
use crate::bench::statistics::Summary;

const VALUES: i32 = 230;
const ROW: i32 = 34;
const HEADING: i32 = 38;

/// The picture.
#[derive(Debug, Clone)]
pub struct Stacks {
    /// Settings, each with its movers.
    pub groups: Vec<(String, Vec<Stack>)>,
}

/// A mover.
#[derive(Debug, Clone)]
pub struct Stack {
    /// Its name.
    pub label: String,
    /// The parts of its median run.
    pub parts: Vec<Part>,
    /// The whole time of all runs, in ms.
    pub whole_ms: Summary,
}

impl Stacks {
    /// The legend that belongs to it.
    pub fn legend(&self) -> Vec<(Mark, String)> {
        let names = self.names().into_iter().enumerate();
        names.map(|(number, name)| (Mark::Area(colour(number)), name.to_owned())).collect()
    }

    /// How high it is.
    pub fn height(&self) -> i32 {
        self.groups.iter().map(|(_, stacks)| HEADING + ROW * stacks.len() as i32).sum()
    }

    /// Draws it from line `top` on.
    pub fn draw(&self, canvas: &dyn Canvas, top: i32) -> Result<()> {
        let names = self.names();
        let labels = self.groups.iter().flat_map(|(_, stacks)| stacks).map(|stack| stack.label.as_str());
        let left = MARGIN + label_width(labels);
        let mut y = top;
        for (heading, stacks) in &self.groups {
            let bold = Lettering { bold: true, ..Lettering::PLAIN };
            canvas.text((MARGIN, y + HEADING / 2), heading, bold)?;
            y += HEADING;
            for stack in stacks {
                stack.draw(canvas, &names, (left, y + ROW / 2))?;
                y += ROW;
            }
        }
        Ok(())
    }

    /// Every part's name, in the order in which they come.
    fn names(&self) -> Vec<&str> {
        let mut names = Vec::new();
        let stacks = self.groups.iter().flat_map(|(_, stacks)| stacks);
        for part in stacks.flat_map(|stack| &stack.parts) {
            if !names.contains(&part.name.as_str()) {
                names.push(&part.name);
            }
        }
        names
    }
}

impl Stack {
    fn draw(&self, canvas: &dyn Canvas, names: &[&str], (left, y): Point) -> Result<()> {
        canvas.text((MARGIN + 12, y), &self.label, Lettering::PLAIN)?;
        let all_us = self.parts.iter().map(|part| part.us).sum::<u64>().max(1);
        let right = WIDTH - MARGIN - VALUES;
        let at = |us: u64| left + (i64::from(right - left) * us as i64 / all_us as i64) as i32;
        let mut until_us = 0;
        for part in &self.parts {
            let (from, to) = (at(until_us), at(until_us + part.us));
            until_us += part.us;
            let series = names.iter().position(|name| *name == part.name).unwrap_or_default();
            canvas.rectangle([(from, y - 11), (to, y + 11)], colour(series))?;
            let text = number(part.us as f64 / 1e3);
            let inside = Lettering { colour: WHITE, bold: true, ..Lettering::SMALL };
            if inside.width(&text) + 8 < to - from {
                canvas.text(((from + to) / 2, y), &text, inside.anchored(HPos::Center))?;
            }
        }
        let Summary { median, lowest, highest, .. } = self.whole_ms;
        let whole = format!("{} ms ({}–{})", number(median), number(lowest), number(highest));
        canvas.text((WIDTH - MARGIN, y), &whole, Lettering::PLAIN.anchored(HPos::Right))
    }
}
