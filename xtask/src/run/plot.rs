//! Throughput over time as text.

/// What a column counts, in intervals of 10 ms.
const INTERVALS: usize = 10;
/// Columns before the plot goes on below.
const WIDTH: usize = 100;
/// Lines of a column.
const HEIGHT: usize = 4;
/// A character cell filled from below, by eighths.
const EIGHTHS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Draws answers per 10 ms as columns of 100 ms, with `^` below those of the span.
pub fn draw(throughput_10ms: &[u32], (start_us, end_us): (u64, u64)) -> String {
    let columns: Vec<u32> = throughput_10ms.chunks(INTERVALS).map(|chunk| chunk.iter().sum()).collect();
    let highest = columns.iter().copied().max().unwrap_or_default().max(1);
    let marked = (start_us / 100_000) as usize..=(end_us / 100_000) as usize;
    let mut picture = String::new();
    for (band, columns) in columns.chunks(WIDTH).enumerate() {
        for line in (0..HEIGHT).rev() {
            let label = if line == HEIGHT - 1 { format!("{}", highest * 10) } else { String::new() };
            let cells: String = columns.iter().map(|count| cell(*count, highest, line)).collect();
            picture += &format!("{label:>8} ▕{cells}\n");
        }
        let first = band * WIDTH;
        let marks = (first..first + columns.len()).map(|at| if marked.contains(&at) { '^' } else { ' ' });
        let marks = marks.collect::<String>();
        picture += format!("{:>6} s  {marks}", first / 10).trim_end();
        picture.push('\n');
    }
    picture
}

/// What line `line` (0 is the lowest) shows of a column of that height.
fn cell(count: u32, highest: u32, line: usize) -> char {
    let eighths = (u64::from(count) * (HEIGHT * 8) as u64).div_ceil(u64::from(highest)) as usize;
    EIGHTHS[eighths.saturating_sub(line * 8).min(8)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_high_as_their_counts() {
        let mut intervals = vec![10; 20];
        intervals.extend([0; 10]);
        intervals.extend([5; 10]);
        let picture = draw(&intervals, (100_000, 200_000));
        let lines: Vec<_> = picture.lines().collect();
        assert_eq!(
            lines,
            ["    1000 ▕██  ", "         ▕██  ", "         ▕██ █", "         ▕██ █", "     0 s   ^^"]
        );
    }

    #[test]
    fn a_long_plot_goes_on_below() {
        let picture = draw(&vec![1; 2_500], (0, 0));
        assert_eq!(picture.lines().count(), 3 * (HEIGHT + 1));
        assert!(picture.contains("    20 s"));
        assert!(draw(&[], (0, 0)).is_empty());
    }
}
