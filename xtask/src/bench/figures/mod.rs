//! Pictures of results, one for each chart of the PCLive paper, as SVG and PNG.
//!
//! Each is legible on its own: what is shown, in which unit, how often measured, and by which command on which machine.

mod canvas;
mod charts;
mod dots;
mod page;
mod scale;
mod stacks;
mod timelines;

use anyhow::Result;

use self::canvas::Canvas;
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
    Dots(Dots),
    Stacks(Stacks),
    Timelines(Timelines),
}

/// Draws everything that there are measurements for. Returns the figures' names.
///
/// # Errors
/// When a file cannot be written.
pub fn draw(results: &Results, directory: &Directory) -> Result<Vec<String>> {
    let figures = charts::figures(results);
    for figure in &figures {
        let size = (WIDTH as u32, figure.page.height(figure.picture.height()) as u32);
        let svg = canvas::svg(size, |canvas| figure.draw(canvas))?;
        directory.write(&format!("{}.svg", figure.name), svg.as_bytes())?;
        let png = canvas::png(size, |canvas| figure.draw(canvas))?;
        directory.write(&format!("{}.png", figure.name), &png)?;
    }
    Ok(figures.into_iter().map(|figure| figure.name).collect())
}

impl Figure {
    fn draw(&self, canvas: &dyn Canvas) -> Result<()> {
        let top = self.page.draw(canvas, self.picture.height())?;
        match &self.picture {
            Picture::Dots(dots) => dots.draw(canvas, top),
            Picture::Stacks(stacks) => stacks.draw(canvas, top),
            Picture::Timelines(timelines) => timelines.draw(canvas, top),
        }
    }
}

impl Picture {
    fn height(&self) -> i32 {
        match self {
            Self::Dots(dots) => dots.height(),
            Self::Stacks(stacks) => stacks.height(),
            Self::Timelines(timelines) => timelines.height(),
        }
    }
}
