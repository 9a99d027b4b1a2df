//! Medians and ranges.

use serde::Serialize;

/// A figure over all measurements of a case; zeros if there was none.
#[derive(Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// What it is, with its unit.
    pub name: &'static str,
    /// Half of the measurements are lower.
    pub median: f64,
    /// The lowest.
    pub lowest: f64,
    /// The highest.
    pub highest: f64,
}

impl Summary {
    /// Sums up `values`.
    pub fn of(name: &'static str, values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let (Some(&lowest), Some(&highest)) = (values.first(), values.last()) else {
            return Self { name, ..Self::default() };
        };
        let middle = values.len() / 2;
        let median =
            if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
        Self { name, median, lowest, highest }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        let summary = Summary::of("ms", [3.0, 1.0, 8.0].into_iter());
        assert_eq!(summary, Summary { name: "ms", median: 3.0, lowest: 1.0, highest: 8.0 });
        assert!((Summary::of("ms", [1.0, 2.0].into_iter()).median - 1.5).abs() < f64::EPSILON);
        assert!(Summary::of("ms", std::iter::empty()).median.abs() < f64::EPSILON);
    }
}
