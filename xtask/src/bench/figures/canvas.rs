//! A surface to draw on: the same drawing becomes an SVG and a PNG.
//!
//! The PNG's font is in this program: a fresh machine has none, and pictures look the same everywhere. plotters would
//! draw its glyphs without their side bearings, so they are drawn here. The SVG only names the family; whoever shows it
//! takes a sans-serif font of theirs.

use ab_glyph::{Font, FontRef, Glyph, PxScale, ScaleFont};
use anyhow::{Context, Result};
use plotters::backend::{BitMapBackend, DrawingBackend, SVGBackend};
use plotters::coord::Shift;
use plotters::drawing::{DrawingArea, IntoDrawingArea};
use plotters::element::{Circle, PathElement, Rectangle};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color, FontDesc, FontFamily, FontStyle, RGBAColor, RGBColor, TextStyle, WHITE};

/// Pixels from the left and from the top.
pub type Point = (i32, i32);

/// Pixels of a PNG for each of the picture's: screens are finer than text is large.
const ZOOM: i32 = 2;
/// What plotters calls the size of a font.
const PLOTTERS_SIZE_PER_EM: f64 = 1.24;

/// The text's colour.
pub const INK: RGBColor = RGBColor(34, 34, 34);
/// That of text and lines of less importance.
pub const PENCIL: RGBColor = RGBColor(110, 110, 110);
/// That of lines in the background.
pub const GRID: RGBColor = RGBColor(225, 225, 225);

/// How text looks and where it lies to its point: vertically it is centred there.
#[derive(Clone, Copy)]
pub struct Lettering {
    /// The size of an em in pixels.
    pub size: u32,
    /// Whether it is bold.
    pub bold: bool,
    /// Its colour.
    pub colour: RGBColor,
    /// Which end of it is at its point.
    pub anchor: HPos,
}

impl Lettering {
    /// Plain text to the right of its point.
    pub const PLAIN: Self = Self { size: 14, bold: false, colour: INK, anchor: HPos::Left };
    /// Small print.
    pub const SMALL: Self = Self { size: 12, colour: PENCIL, ..Self::PLAIN };

    /// The same with another end at its point.
    pub const fn anchored(self, anchor: HPos) -> Self {
        Self { anchor, ..self }
    }

    fn font(self) -> FontRef<'static> {
        let font = if self.bold { dejavu::sans::bold() } else { dejavu::sans::regular() };
        FontRef::try_from_slice(font).expect("the crate has sound fonts")
    }

    /// The text's glyphs on a line that starts at 0, and where it ends.
    fn glyphs(self, text: &str, zoom: i32) -> (Vec<Glyph>, f32) {
        let font = self.font();
        let em = (self.size as i32 * zoom) as f32;
        // A scale is the height of a line, and a size that of an em.
        let scale = em * font.height_unscaled() / font.units_per_em().unwrap_or(font.height_unscaled());
        let scaled = font.as_scaled(PxScale::from(scale));
        let (mut glyphs, mut x, mut last) = (Vec::new(), 0.0, None);
        for character in text.chars() {
            let id = font.glyph_id(character);
            x += last.map_or(0.0, |last| scaled.kern(last, id));
            glyphs.push(id.with_scale_and_position(scale, (x, 0.0)));
            x += scaled.h_advance(id);
            last = Some(id);
        }
        (glyphs, x)
    }

    /// How wide a text is in pixels.
    pub fn width(self, text: &str) -> i32 {
        self.glyphs(text, 1).1.ceil() as i32
    }
}

/// What can be drawn.
pub trait Canvas {
    /// A filled rectangle between two corners.
    fn rectangle(&self, corners: [Point; 2], fill: RGBAColor) -> Result<()>;
    /// A line through some points.
    fn path(&self, points: Vec<Point>, colour: RGBAColor, width: u32) -> Result<()>;
    /// A filled circle.
    fn dot(&self, centre: Point, radius: i32, fill: RGBAColor) -> Result<()>;
    /// A line of text.
    fn text(&self, at: Point, text: &str, lettering: Lettering) -> Result<()>;
}

/// A surface of text and shapes.
struct Vector<'a>(DrawingArea<SVGBackend<'a>, Shift>);

impl Canvas for Vector<'_> {
    fn rectangle(&self, corners: [Point; 2], fill: RGBAColor) -> Result<()> {
        Ok(self.0.draw(&Rectangle::new(corners, fill.filled()))?)
    }

    fn path(&self, points: Vec<Point>, colour: RGBAColor, width: u32) -> Result<()> {
        Ok(self.0.draw(&PathElement::new(points, colour.stroke_width(width)))?)
    }

    fn dot(&self, centre: Point, radius: i32, fill: RGBAColor) -> Result<()> {
        Ok(self.0.draw(&Circle::new(centre, radius, fill.filled()))?)
    }

    fn text(&self, at: Point, text: &str, lettering: Lettering) -> Result<()> {
        let style = if lettering.bold { FontStyle::Bold } else { FontStyle::Normal };
        let size = f64::from(lettering.size) * PLOTTERS_SIZE_PER_EM;
        let style = TextStyle::from(FontDesc::new(FontFamily::SansSerif, size, style))
            .color(&lettering.colour)
            .pos(Pos::new(lettering.anchor, VPos::Center));
        Ok(self.0.draw_text(text, &style, at)?)
    }
}

/// A surface of pixels, [`ZOOM`] for each of the picture's.
struct Raster<'a>(DrawingArea<BitMapBackend<'a>, Shift>);

impl Canvas for Raster<'_> {
    fn rectangle(&self, corners: [Point; 2], fill: RGBAColor) -> Result<()> {
        Ok(self.0.draw(&Rectangle::new(corners.map(zoom), fill.filled()))?)
    }

    fn path(&self, points: Vec<Point>, colour: RGBAColor, width: u32) -> Result<()> {
        let points: Vec<_> = points.into_iter().map(zoom).collect();
        Ok(self.0.draw(&PathElement::new(points, colour.stroke_width(width * ZOOM as u32)))?)
    }

    fn dot(&self, centre: Point, radius: i32, fill: RGBAColor) -> Result<()> {
        Ok(self.0.draw(&Circle::new(zoom(centre), radius * ZOOM, fill.filled()))?)
    }

    fn text(&self, at: Point, text: &str, lettering: Lettering) -> Result<()> {
        let (glyphs, width) = lettering.glyphs(text, ZOOM);
        let (x, y) = zoom(at);
        let left = match lettering.anchor {
            HPos::Left => x,
            HPos::Center => x - width as i32 / 2,
            HPos::Right => x - width as i32,
        };
        let base = y + lettering.size as i32 * ZOOM * 2 / 5;
        let font = lettering.font();
        for outline in glyphs.into_iter().filter_map(|glyph| font.outline_glyph(glyph)) {
            let bounds = outline.px_bounds();
            let corner = (left + bounds.min.x as i32, base + bounds.min.y as i32);
            let mut result = Ok(());
            outline.draw(|x, y, coverage| {
                if result.is_ok() && coverage > 0.0 {
                    let at = (corner.0 + x as i32, corner.1 + y as i32);
                    result = self.0.draw_pixel(at, &lettering.colour.mix(f64::from(coverage).min(1.0)));
                }
            });
            result?;
        }
        Ok(())
    }
}

fn zoom((x, y): Point) -> Point {
    (x * ZOOM, y * ZOOM)
}

/// Draws a picture of that many pixels as SVG.
///
/// # Errors
/// Those of `draw`.
pub fn svg(size: (u32, u32), draw: impl FnOnce(&dyn Canvas) -> Result<()>) -> Result<String> {
    let mut text = String::new();
    let surface = Vector(blank(SVGBackend::with_string(&mut text, size))?);
    draw(&surface)?;
    surface.0.present().context("finish an SVG")?;
    drop(surface);
    Ok(text)
}

/// Draws a picture of that many pixels as PNG, with [`ZOOM`] pixels for each.
///
/// # Errors
/// Those of `draw`.
pub fn png((width, height): (u32, u32), draw: impl FnOnce(&dyn Canvas) -> Result<()>) -> Result<Vec<u8>> {
    const BYTES_PER_PIXEL: u32 = 3;
    let (width, height) = (width * ZOOM as u32, height * ZOOM as u32);
    let mut pixels = vec![0; (width * height * BYTES_PER_PIXEL) as usize];
    let surface = Raster(blank(BitMapBackend::with_buffer(&mut pixels, (width, height)))?);
    draw(&surface)?;
    surface.0.present().context("finish a PNG")?;
    drop(surface);
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, width, height);
    encoder.set_color(png::ColorType::Rgb);
    let mut writer = encoder.write_header().context("encode PNG")?;
    writer.write_image_data(&pixels).context("encode PNG")?;
    writer.finish().context("encode PNG")?;
    Ok(file)
}

fn blank<B: DrawingBackend>(backend: B) -> Result<DrawingArea<B, Shift>>
where
    B::ErrorType: 'static,
{
    let area = backend.into_drawing_area();
    area.fill(&WHITE)?;
    Ok(area)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_files_show_the_same() {
        let draw = |canvas: &dyn Canvas| {
            canvas.rectangle([(10, 10), (20, 20)], INK.to_rgba())?;
            canvas.text((30, 15), "12 ms", Lettering::PLAIN)
        };
        let svg = svg((100, 40), draw).expect("an SVG");
        assert!(svg.contains("12 ms") && svg.trim_end().ends_with("</svg>"));
        let png = png((100, 40), draw).expect("a PNG");
        let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().expect("a header");
        let mut pixels = vec![0; reader.output_buffer_size().expect("a size")];
        reader.next_frame(&mut pixels).expect("an image");
        let row = 100 * ZOOM as usize * 3;
        assert_eq!(pixels[30 * row + 30 * 3], INK.0, "the rectangle, of twice the size");
        assert!(
            pixels.chunks(3).skip(100 * 10).any(|pixel| pixel[0] < 100),
            "text is drawn without a font file"
        );
    }

    #[test]
    fn bold_text_is_wider() {
        let bold = Lettering { bold: true, ..Lettering::PLAIN };
        assert!(bold.width("downtime") > Lettering::PLAIN.width("downtime"));
        assert!(Lettering::PLAIN.width("") == 0);
    }
}
