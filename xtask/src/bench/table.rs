//! Results as text: a table for each setting, its movers beside each other.

use super::ablation::{Ablation, Difference};
use super::goals::verdicts;
use super::metrics;
use super::results::{Cell, Measured, Results};
use super::statistics::Summary;

/// The widest name of a metric.
const NAME: usize = 27;
/// The narrowest column.
const COLUMN: usize = 24;
/// Others that take more of a CPU than this are worth a word.
const DISTURBED_PERCENT: f64 = 20.0;
/// Columns beside each other.
const COLUMNS: usize = 4;

/// What was measured in a setting.
pub fn draw(group: &Measured) -> String {
    let mut text = format!("\n{}: median (lowest to highest)\n", group.name);
    let measured: Vec<_> = group.cells.iter().filter(|cell| !cell.runs.is_empty()).collect();
    for cells in measured.chunks(COLUMNS) {
        text += &table(cells);
    }
    for cell in &group.cells {
        for verdict in verdicts(&group.setting, cell) {
            text += &format!("  goal: {verdict}\n");
        }
    }
    for cell in &group.cells {
        text += &disturbances(cell);
        if let Some(obstacle) = &cell.obstacle {
            text += &format!("  not measured: {}: {obstacle}\n", cell.name);
        }
        for failure in &cell.failures {
            text += &format!("  FAILED: {}: {failure}\n", cell.name);
        }
    }
    text
}

/// What an ablation found: its differences, one after the other.
pub fn compare(ablation: Ablation, results: &Results) -> String {
    let mut text = format!("\nablation {ablation}: {}\n", ablation.question());
    let comparisons = ablation.comparisons(results);
    if comparisons.is_empty() {
        text += "  nothing was measured that could be compared\n";
    }
    for comparison in &comparisons {
        text += &format!("  {comparison}\n");
        for difference in &comparison.differences {
            text += &line(difference);
        }
    }
    for remark in ablation.remarks(results) {
        text += &format!("  {remark}\n");
    }
    text
}

fn line(difference: &Difference) -> String {
    let percent = difference.percent().map_or_else(String::new, |percent| format!("{percent:.0} %"));
    let doubt = difference.doubt().map_or_else(String::new, |doubt| format!("  {doubt}"));
    let [without, with] = [difference.without, difference.with].map(in_short);
    let title = difference.metric.title.trim();
    format!("    {title:NAME$}{without:>COLUMN$}{with:>COLUMN$}{percent:>8}{doubt}\n")
}

/// The runs in which the machine had other things to do.
fn disturbances(cell: &Cell) -> String {
    let mut text = String::new();
    for run in &cell.runs {
        if let Some(percent) = (metrics::OTHERS.of)(run).filter(|percent| *percent > DISTURBED_PERCENT) {
            let (name, turn) = (&cell.name, run.turn);
            text += &format!("  disturbed: {name}, turn {turn}: others took {percent:.0} % of a CPU\n");
        }
    }
    text
}

fn table(cells: &[&Cell]) -> String {
    let names = cells.iter().map(|cell| cell.name.chars().count() + 2);
    let column = names.max().unwrap_or_default().max(COLUMN);
    let mut text = format!("  {:NAME$}", "");
    for cell in cells {
        text += &format!("{:>column$}", cell.name);
    }
    text.push('\n');
    for metric in metrics::ALL {
        let summaries: Vec<_> = cells.iter().map(|cell| metric.summary(cell)).collect();
        if summaries.iter().all(Option::is_none) {
            continue;
        }
        text += &format!("  {:NAME$}", metric.title);
        for summary in summaries {
            text += &format!("{:>column$}", summary.map_or_else(|| "–".into(), in_short));
        }
        text.push('\n');
    }
    let runs = cells.iter().map(|cell| format!("{:>column$}", cell.runs.len())).collect::<String>();
    text + &format!("  {:NAME$}{runs}\n", "runs")
}

/// Median and range with about three digits.
fn in_short(Summary { median, lowest, highest, .. }: Summary) -> String {
    let decimals = if highest >= 1000.0 {
        0
    } else if highest >= 10.0 {
        1
    } else {
        2
    };
    format!("{median:.decimals$} ({lowest:.decimals$}–{highest:.decimals$})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_as_many_digits_as_mean_something() {
        let summary = |median, lowest, highest| Summary { median, lowest, highest, count: 3 };
        assert_eq!(in_short(summary(81.26, 70.0, 196.3)), "81.3 (70.0–196.3)");
        assert_eq!(in_short(summary(31_234.4, 999.0, 40_000.0)), "31234 (999–40000)");
        assert_eq!(in_short(summary(1.5, 1.25, 2.0)), "1.50 (1.25–2.00)");
    }
}
