//! Axes: where a value is, and which values are named.

/// A line with this many decades is logarithmic: on a plain one the small values could not be told apart.
const DECADES: f64 = 1.3;

/// Maps values to pixels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scale {
    lowest: f64,
    highest: f64,
    /// Whether equal distances are equal ratios.
    pub logarithmic: bool,
    /// The pixels of the lowest and the highest value.
    pixels: (i32, i32),
}

impl Scale {
    /// From 0, or logarithmic if the values demand it. Values that are not positive are 0.
    pub fn for_values(values: impl Iterator<Item = f64> + Clone, pixels: (i32, i32)) -> Self {
        let highest = values.clone().fold(0.0, f64::max);
        let least = values.filter(|value| *value > 0.0).fold(f64::INFINITY, f64::min);
        if least.is_finite() && (highest / least).log10() > DECADES {
            let lowest = least / 1.5;
            return Self { lowest, highest: highest * 1.2, logarithmic: true, pixels };
        }
        Self::linear(0.0, if highest > 0.0 { highest * 1.05 } else { 1.0 }, pixels)
    }

    /// A plain one.
    pub fn linear(lowest: f64, highest: f64, pixels: (i32, i32)) -> Self {
        Self { lowest, highest: highest.max(lowest + f64::EPSILON), logarithmic: false, pixels }
    }

    /// The pixel of a value; values outside are at its ends.
    pub fn at(&self, value: f64) -> i32 {
        let part = if self.logarithmic {
            (value.max(self.lowest) / self.lowest).ln() / (self.highest / self.lowest).ln()
        } else {
            (value - self.lowest) / (self.highest - self.lowest)
        };
        let (from, to) = self.pixels;
        from + (f64::from(to - from) * part.clamp(0.0, 1.0)).round() as i32
    }

    /// The values to be named: about `count` on a plain line.
    pub fn ticks(&self, count: u32) -> Vec<f64> {
        let ticks = if self.logarithmic { self.logarithmic_ticks() } else { self.linear_ticks(count) };
        ticks.into_iter().filter(|tick| (self.lowest..=self.highest).contains(tick)).collect()
    }

    fn linear_ticks(&self, count: u32) -> Vec<f64> {
        let rough = (self.highest - self.lowest) / f64::from(count);
        let decade = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * decade);
        let step = step.into_iter().find(|step| *step >= rough).unwrap_or(rough);
        let first = (self.lowest / step).ceil() as i64;
        let last = (self.highest / step).floor() as i64;
        (first..=last).map(|number| number as f64 * step).collect()
    }

    fn logarithmic_ticks(&self) -> Vec<f64> {
        const FEW_DECADES: f64 = 4.0;
        let (first, last) = (self.lowest.log10(), self.highest.log10());
        let steps: &[f64] = if last - first > FEW_DECADES { &[1.0] } else { &[1.0, 2.0, 5.0] };
        let decades = first.floor() as i32..=last.ceil() as i32;
        decades.flat_map(|decade| steps.iter().map(move |step| step * 10_f64.powi(decade))).collect()
    }
}

/// A number with the digits that a reader needs.
pub fn number(value: f64) -> String {
    let magnitude = value.abs();
    let decimals = match magnitude {
        _ if magnitude < 1e-9 => 0,
        _ if magnitude < 1.0 => 2,
        _ if magnitude < 100.0 => 1,
        _ => 0,
    };
    let text = format!("{value:.decimals$}");
    if decimals > 0 { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        let scale = Scale::linear(0.0, 163.0, (0, 100));
        assert_eq!(scale.ticks(7), [0.0, 50.0, 100.0, 150.0]);
        assert_eq!((scale.at(0.0), scale.at(81.5), scale.at(163.0), scale.at(999.0)), (0, 50, 100, 100));
        assert_eq!(Scale::linear(-2.0, 3.1, (0, 1)).ticks(7), [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]);
    }

    #[test]
    fn values_of_several_decades_share_a_line() {
        let scale = Scale::for_values([30.0, 12_000.0].into_iter(), (0, 1000));
        assert!(scale.logarithmic);
        assert_eq!(scale.ticks(7), [20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0]);
        assert!(scale.at(30.0) > 0 && scale.at(12_000.0) < 1000 && scale.at(0.0) == 0);
        assert!(!Scale::for_values([30.0, 90.0, 0.0].into_iter(), (0, 1)).logarithmic);
        assert_eq!(Scale::for_values(std::iter::empty(), (0, 1)).ticks(7).first(), Some(&0.0));
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(
            [0.0, 0.5, 0.25, 2.0, 7.25, 81.26, 12_345.6].map(number),
            ["0", "0.5", "0.25", "2", "7.2", "81.3", "12346"]
        );
    }
}
