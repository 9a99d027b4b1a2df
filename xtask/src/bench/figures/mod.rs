//! Pictures of results, one for each chart of the PCLive paper, as SVG and PNG.
//!
//! Each is legible on its own: what is shown, in which unit, how often measured, and by which command on which machine.

mod canvas;
mod charts;
mod comparisons;
mod curves;
mod dots;
mod page;
mod scale;
mod stacks;
mod timelines;

use std::fmt;

use anyhow::Result;

use self::canvas::Canvas;
use self::curves::Curves;
use self::dots::Dots;
use self::page::{Page, WIDTH};
use self::stacks::Stacks;
use self::timelines::Timelines;
use super::files::Directory;
use super::results::Results;

/// A picture and what is around it.
struct Figure {
    /// Its files' name.
    name: String,
    page: Page,
    picture: Picture,
}

enum Picture {
    Curves(Curves),
    Dots(Dots),
    Stacks(Stacks),
    Timelines(Timelines),
}

/// A figure that there is nothing for.
pub struct LeftOut {
    name: String,
    missing: String,
}

impl LeftOut {
    fn new(name: &str, missing: &str) -> Self {
        Self { name: name.to_owned(), missing: missing.trim().to_owned() }
    }
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: no measurement has a number for \"{}\"", self.name, self.missing)
    }
}

/// What became of the figures.
pub struct Drawn {
    /// The names of those that are there.
    pub names: Vec<String>,
    /// The others.
    pub left_out: Vec<LeftOut>,
}

/// Draws everything that there are measurements for.
///
/// # Errors
/// When a file cannot be written.
pub fn draw(results: &Results, directory: &Directory) -> Result<Drawn> {
    let mut drawn = Drawn { names: Vec::new(), left_out: Vec::new() };
    for figure in charts::figures(results) {
        let figure = match figure {
            Ok(figure) => figure,
            Err(left_out) => {
                drawn.left_out.push(left_out);
                continue;
            }
        };
        let size = (WIDTH as u32, figure.page.height(figure.picture.height()) as u32);
        let svg = canvas::svg(size, |canvas| figure.draw(canvas))?;
        directory.write(&format!("{}.svg", figure.name), svg.as_bytes())?;
        let png = canvas::png(size, |canvas| figure.draw(canvas))?;
        directory.write(&format!("{}.png", figure.name), &png)?;
        drawn.names.push(figure.name);
    }
    Ok(drawn)
}

impl Figure {
    fn draw(&self, canvas: &dyn Canvas) -> Result<()> {
        let top = self.page.draw(canvas, self.picture.height())?;
        match &self.picture {
            Picture::Curves(curves) => curves.draw(canvas, top),
            Picture::Dots(dots) => dots.draw(canvas, top),
            Picture::Stacks(stacks) => stacks.draw(canvas, top),
            Picture::Timelines(timelines) => timelines.draw(canvas, top),
        }
    }
}

impl Picture {
    fn height(&self) -> i32 {
        match self {
            Self::Curves(curves) => curves.height(),
            Self::Dots(dots) => dots.height(),
            Self::Stacks(stacks) => stacks.height(),
            Self::Timelines(timelines) => timelines.height(),
        }
    }
}
