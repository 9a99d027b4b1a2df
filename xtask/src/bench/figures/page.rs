//! What every figure has: a title, what it shows, a legend, and where it comes from.

use anyhow::Result;
use plotters::style::text_anchor::HPos;
use plotters::style::{Color, RGBAColor, RGBColor};

use super::canvas::{Canvas, INK, Lettering};

/// The width of every figure.
pub const WIDTH: i32 = 1200;
/// What is free at the sides.
pub const MARGIN: i32 = 24;
/// Colours of series. The first ones can be told apart also by those who see colours differently (Okabe and Ito).
pub const COLOURS: [RGBColor; 14] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(120, 94, 40),
    RGBColor(120, 120, 120),
    RGBColor(90, 60, 150),
    RGBColor(200, 190, 60),
    RGBColor(160, 20, 80),
    RGBColor(40, 60, 60),
    RGBColor(110, 150, 40),
    RGBColor(240, 150, 140),
];

/// Lines of the small print and of what is shown.
const LINE: i32 = 18;
const TITLE: i32 = 40;
const LEGEND: i32 = 30;
const KEY: i32 = 18;

/// A figure without its picture.
#[derive(Debug, Clone)]
pub struct Page {
    /// What the figure is of.
    pub title: String,
    /// How to read it.
    pub reading: String,
    /// Names of what is drawn, each with its mark.
    pub legend: Vec<(Mark, String)>,
    /// Where it comes from.
    pub origin: Vec<String>,
}

/// How something is drawn.
#[derive(Debug, Clone, Copy)]
pub enum Mark {
    /// An area.
    Area(RGBAColor),
    /// A line.
    Line(RGBAColor),
    /// A dot of that radius.
    Dot(RGBAColor, i32),
    /// A line across.
    Bar(RGBAColor),
}

impl Page {
    /// How high the figure is around a picture of that height.
    pub fn height(&self, picture: i32) -> i32 {
        self.head() + picture + self.origin_lines().len() as i32 * LINE + 2 * MARGIN
    }

    /// Draws everything but the picture. Returns the first line of pixels that the picture may use.
    pub fn draw(&self, canvas: &dyn Canvas, picture: i32) -> Result<i32> {
        let title = Lettering { size: 22, bold: true, colour: INK, anchor: HPos::Left };
        canvas.text((MARGIN, MARGIN + 8), &self.title, title)?;
        let mut y = MARGIN + TITLE;
        for line in self.reading_lines() {
            canvas.text((MARGIN, y), &line, Lettering::PLAIN)?;
            y += LINE;
        }
        self.draw_legend(canvas, y + 8)?;
        let top = self.head();
        let mut y = top + picture + MARGIN;
        for line in self.origin_lines() {
            canvas.text((MARGIN, y), &line, Lettering::SMALL)?;
            y += LINE;
        }
        Ok(top)
    }

    fn head(&self) -> i32 {
        let legend = self.legend_lines().len() as i32 * LEGEND;
        MARGIN + TITLE + self.reading_lines().len() as i32 * LINE + legend
    }

    fn reading_lines(&self) -> Vec<String> {
        wrap(&self.reading, Lettering::PLAIN)
    }

    fn origin_lines(&self) -> Vec<String> {
        self.origin.iter().flat_map(|line| wrap(line, Lettering::SMALL)).collect()
    }

    /// The legend, as many entries in each line as there is room for, with the left end of each.
    fn legend_lines(&self) -> Vec<Vec<(i32, &(Mark, String))>> {
        let mut lines: Vec<Vec<_>> = Vec::new();
        let mut x = WIDTH;
        for entry in &self.legend {
            let width = KEY + 8 + Lettering::PLAIN.width(&entry.1) + 24;
            if x + width > WIDTH - MARGIN {
                lines.push(Vec::new());
                x = MARGIN;
            }
            lines.last_mut().expect("one was pushed first").push((x, entry));
            x += width;
        }
        lines
    }

    fn draw_legend(&self, canvas: &dyn Canvas, top: i32) -> Result<()> {
        for (number, line) in self.legend_lines().into_iter().enumerate() {
            let y = top + number as i32 * LEGEND;
            for (x, (mark, name)) in line {
                let (left, right, middle) = (x, x + KEY, x + KEY / 2);
                match *mark {
                    Mark::Area(colour) => canvas.rectangle([(left, y - 7), (right, y + 7)], colour)?,
                    Mark::Line(colour) => canvas.path(vec![(left, y), (right, y)], colour, 2)?,
                    Mark::Dot(colour, radius) => canvas.dot((middle, y), radius, colour)?,
                    Mark::Bar(colour) => canvas.path(vec![(middle, y - 9), (middle, y + 9)], colour, 2)?,
                }
                canvas.text((right + 8, y), name, Lettering::PLAIN)?;
            }
        }
        Ok(())
    }
}

/// How wide the column of these names is.
pub fn label_width<'a>(labels: impl Iterator<Item = &'a str>) -> i32 {
    const NARROWEST: i32 = 220;
    labels.map(|label| Lettering::PLAIN.width(label) + 40).fold(NARROWEST, i32::max)
}

/// The colour of series number `number`.
pub fn colour(number: usize) -> RGBAColor {
    COLOURS[number % COLOURS.len()].to_rgba()
}

/// Breaks a text into lines that fit the page.
fn wrap(text: &str, lettering: Lettering) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if lettering.width(&format!("{line} {word}")) <= WIDTH - 2 * MARGIN => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_text_is_broken_between_words() {
        let text = "word ".repeat(100);
        let lines = wrap(text.trim(), Lettering::PLAIN);
        assert!(lines.len() > 1);
        assert_eq!(lines.join(" "), text.trim());
        assert!(lines.iter().all(|line| Lettering::PLAIN.width(line) <= WIDTH - 2 * MARGIN));
    }
}
