//! Medians and ranges.

use serde::Serialize;

/// A number over all measurements of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// Half of the measurements are lower.
    pub median: f64,
    /// The lowest.
    pub lowest: f64,
    /// The highest.
    pub highest: f64,
    /// How many there are.
    pub count: usize,
}

impl Summary {
    /// Sums up `values`; `None` if there is none.
    pub fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let (lowest, highest) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median =
            if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
        Some(Self { median, lowest, highest, count: values.len() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        let summary = Summary::of([3.0, 1.0, 8.0].into_iter());
        assert_eq!(summary, Some(Summary { median: 3.0, lowest: 1.0, highest: 8.0, count: 3 }));
        let even = Summary::of([1.0, 2.0].into_iter()).expect("two values");
        assert!((even.median - 1.5).abs() < f64::EPSILON);
        assert_eq!(Summary::of(std::iter::empty()), None);
    }
}
