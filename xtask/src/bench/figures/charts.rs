//! Which figures there are, and what is in them.

use plotters::style::{Color, RGBAColor};

use super::canvas::PENCIL;
use super::comparisons;
use super::dots::{Dots, Row, in_words};
use super::page::{Mark, Page, colour};
use super::scale::number;
use super::stacks::{Stack, Stacks};
use super::timelines::{Panel, Timelines};
use super::{Figure, LeftOut, Picture};
use crate::bench::goals::goals;
use crate::bench::matrix::Mover;
use crate::bench::metrics::{self, Metric};
use crate::bench::movement::{Movement, Part};
use crate::bench::provenance::Provenance;
use crate::bench::results::{Cell, Measured, Results, Run};
use crate::bench::series::{self, Curve};
use crate::bench::statistics::Summary;

/// How the first kind of figure is read.
const DOTS: &str =
    "Each line is a way to move the container; the number at its end is the median with the range.";
/// How a split is read.
const STACKS: &str = "Each bar is the whole time of the median run; the numbers in it are milliseconds, the one at its \
                      end is the median of all runs with the range.";

/// How a course of events is read.
const OVER_TIME: &str = "Each panel is a way to move the container, in its run with the median downtime. The mover is \
                         everything that works for the migration; the container's own processes are counted apart.";
/// What is added where nothing moves.
const TRACKED: &str = " Of \"track only\", the shaded time is that of tracking.";

/// Everything that can be drawn of `results`, or why it cannot.
pub fn figures(results: &Results) -> Vec<Result<Figure, LeftOut>> {
    let mut figures = vec![
        dots(
            results,
            "downtime",
            "Downtime: the longest time in which clients got no answer",
            "longest gap between two answers on any connection, ms",
            &[("", metrics::GAP)],
        ),
        stacks(results, "downtime-split", "What the downtime consists of", metrics::BLACKOUT, |movement| {
            &movement.blackout
        }),
        dots(
            results,
            "restore",
            "Restore time: from the last byte of state received to the container running",
            "ms",
            &[("", metrics::RESTORE)],
        ),
        stacks(results, "restore-split", "What the restore time consists of", metrics::RESTORE, |movement| {
            &movement.restore
        }),
        dots(
            results,
            "throughput-in-rounds",
            "Throughput during the rounds, compared with that before the migration",
            "% of the answers per second before",
            &[("", metrics::THROUGHPUT)],
        ),
        dots(
            results,
            "cpu-time",
            "CPU time of moving a container, at both ends",
            "CPU seconds of all processes that work for the migration",
            &[(", source", metrics::SOURCE_CPU), (", destination", metrics::DESTINATION_CPU)],
        ),
    ];
    figures.extend(results.ablations.iter().flat_map(|ablation| comparisons::figures(results, *ablation)));
    for group in &results.groups {
        figures.extend(over_time(results, group));
    }
    figures
}

/// Medians and ranges of metrics; `suffix` tells them apart in the same mover.
fn dots(
    results: &Results,
    name: &str,
    title: &str,
    axis: &str,
    of: &[(&str, Metric)],
) -> Result<Figure, LeftOut> {
    let mut groups = Vec::new();
    for group in &results.groups {
        let mut rows = Vec::new();
        for (number, cell) in group.cells.iter().enumerate() {
            for (suffix, metric) in of {
                let values: Vec<_> = cell.runs.iter().filter_map(metric.of).collect();
                let goals = goals(&group.setting, &cell.mover);
                let goal = goals.iter().find(|goal| goal.metric.key == metric.key);
                let mark = goal.map(|goal| goal.limit.value());
                if let Some(summary) = Summary::of(values.iter().copied()) {
                    let (label, text) = (format!("{}{suffix}", cell.name), in_words(summary));
                    rows.push(Row { label, values, text, mark, colour: mover_colour(&cell.mover, number) });
                }
            }
        }
        if !rows.is_empty() {
            groups.push((group.name.clone(), rows));
        }
    }
    let dots = Dots { axis: axis.to_owned(), mark: "goal".to_owned(), groups };
    let page = page(results, title, DOTS, dots.legend());
    if dots.groups.is_empty() {
        return Err(LeftOut::new(name, of[0].1.title));
    }
    Ok(Figure { name: name.into(), page, picture: Picture::Dots(dots) })
}

/// What the median run of each mover consists of.
fn stacks(
    results: &Results,
    name: &str,
    title: &str,
    whole: Metric,
    parts: fn(&Movement) -> &Vec<Part>,
) -> Result<Figure, LeftOut> {
    let stack = |cell: &Cell| {
        let whole_ms = whole.summary(cell)?;
        let run = median_run(cell, whole.of)?;
        let parts = parts(run.movement.as_ref()?).clone();
        (!parts.is_empty()).then(|| Stack { label: cell.name.clone(), parts, whole_ms })
    };
    let groups = results
        .groups
        .iter()
        .map(|group| (group.name.clone(), group.cells.iter().filter_map(stack).collect::<Vec<_>>()));
    let stacks = Stacks { groups: groups.filter(|(_, stacks)| !stacks.is_empty()).collect() };
    let page = page(results, title, STACKS, stacks.legend());
    if stacks.groups.is_empty() {
        return Err(LeftOut::new(name, whole.title));
    }
    Ok(Figure { name: name.into(), page, picture: Picture::Stacks(stacks) })
}

/// Throughput, CPU use and memory over time in a setting.
fn over_time(results: &Results, group: &Measured) -> [Result<Figure, LeftOut>; 3] {
    let figure = |name: &str, title: &str, unit: &str, series: &[&str], of: fn(&Run) -> Vec<Curve>| {
        let panels: Vec<_> = group.cells.iter().filter_map(|cell| panel(cell, of)).collect();
        let series = series.iter().map(ToString::to_string).collect();
        let timelines = Timelines { unit: unit.to_owned(), series, panels };
        let title = format!("{title}: {}", group.name);
        let tracked = group.cells.iter().any(|cell| cell.runs.iter().any(|run| run.tracking.is_some()));
        let reading = format!("{OVER_TIME}{}", if tracked { TRACKED } else { "" });
        let page = page(results, &title, &reading, timelines.legend());
        let name = format!("{name}-{}", slug(&group.name));
        if timelines.panels.is_empty() {
            return Err(LeftOut::new(&name, unit));
        }
        Ok(Figure { name, page, picture: Picture::Timelines(timelines) })
    };
    let ends = ["source, mover", "source, container", "destination, mover", "destination, container"];
    [
        figure(
            "throughput",
            "Client throughput",
            "thousand answers per second",
            &["answers"],
            series::throughput,
        ),
        figure("cpu", "CPU use at both ends", "% of one CPU, in means of 0.25 s", &ends, series::cpu),
        figure("memory", "Memory use at both ends", "MiB resident", &ends, series::memory),
    ]
}

/// A mover over time. The control is a panel as well: that is what nothing looks like.
fn panel(cell: &Cell, of: fn(&Run) -> Vec<Curve>) -> Option<Panel> {
    let shown = [metrics::GAP, metrics::BLACKOUT].iter().find_map(|metric| median_run(cell, metric.of));
    let shown = shown.or(cell.runs.first())?;
    let others = cell.runs.iter().filter(|run| run.turn != shown.turn).map(of).collect();
    let curves = of(shown);
    if curves.iter().all(Vec::is_empty) {
        return None;
    }
    let count = cell.runs.len();
    let label = match (metrics::GAP.of)(shown) {
        Some(gap) => format!("{} (median run of {count}: {} ms without an answer)", cell.name, number(gap)),
        None => format!("{} (median run of {count})", cell.name),
    };
    let end_s = series::migration_s(shown);
    Some(Panel { label, curves, others, end_s, blackout_s: series::blackout_s(shown) })
}

/// The run whose number is nearest to the median.
fn median_run(cell: &Cell, of: fn(&Run) -> Option<f64>) -> Option<&Run> {
    let median = Summary::of(cell.runs.iter().filter_map(of))?.median;
    let away = |run: &&Run| of(run).map_or(f64::INFINITY, |value| (value - median).abs());
    cell.runs.iter().min_by(|left, right| away(left).total_cmp(&away(right)))
}

pub fn mover_colour(mover: &Mover, number: usize) -> RGBAColor {
    if *mover == Mover::Control { PENCIL.to_rgba() } else { colour(number) }
}

pub fn page(results: &Results, title: &str, reading: &str, legend: Vec<(Mark, String)>) -> Page {
    Page { title: title.to_owned(), reading: reading.to_owned(), legend, origin: origin(results) }
}

/// Where the figures come from.
fn origin(results: &Results) -> Vec<String> {
    let cells = results.groups.iter().flat_map(|group| &group.cells);
    let mut trackers: Vec<_> = cells.clone().filter_map(Cell::tracker).collect();
    trackers.sort_unstable();
    trackers.dedup();
    let counts = cells.map(|cell| cell.runs.len()).filter(|count| *count > 0);
    let runs = match (counts.clone().min(), counts.max()) {
        (Some(fewest), Some(most)) if fewest != most => format!("{fewest} to {most} runs"),
        (_, Some(1)) => "1 run".to_owned(),
        (_, most) => format!("{} runs", most.unwrap_or_default()),
    };
    let Provenance { command, revision, kernel, cpu, cpus, memory_mib, warmed_up_mib, .. } =
        &results.provenance;
    let touched = match warmed_up_mib {
        0 => String::new(),
        mib => format!(", up to {mib} MiB of it touched before each run"),
    };
    vec![
        format!(
            "{command}: {runs} of each line, in turns, at revision {revision}; tracker {}",
            trackers.join(", ")
        ),
        format!(
            "{kernel} on {cpu}, {cpus} CPUs for both hosts, client, server and load together, {:.0} GiB of \
             memory{touched}",
            *memory_mib as f64 / 1024.0
        ),
    ]
}

/// A name for files.
fn slug(name: &str) -> String {
    let mut slug = String::new();
    for byte in name.chars() {
        match byte {
            _ if byte.is_ascii_alphanumeric() => slug.push(byte.to_ascii_lowercase()),
            _ if !slug.is_empty() && !slug.ends_with('-') => slug.push('-'),
            _ => {}
        }
    }
    slug.trim_end_matches('-').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_have_plain_names() {
        assert_eq!(
            slug("Redis 90:10, 1 GiB (10 MiB hot), 1 Gbit/s"),
            "redis-90-10-1-gib-10-mib-hot-1-gbit-s"
        );
    }
}
