//! Figures of ablations: what differs with and without a part of pclive, and how tracking grows with memory.

use super::canvas::PENCIL as GREY;
use super::charts::{mover_colour, page};
use super::curves::{Curve, Curves};
use super::dots::{Dots, Row, in_words};
use super::page::{Mark, colour};
use super::{Figure, LeftOut, Picture};
use crate::bench::ablation::{Ablation, Comparison, Difference};
use crate::bench::matrix::Mover;
use crate::bench::metrics::{self, Metric};
use crate::bench::results::Results;
use crate::bench::statistics::Summary;
use plotters::style::Color;

/// The figures of an ablation, or why they cannot be drawn.
pub fn figures(results: &Results, ablation: Ablation) -> Vec<Result<Figure, LeftOut>> {
    let mut figures = vec![differences(results, ablation)];
    if ablation == Ablation::Tracking {
        figures.push(by_size(
            results,
            "tracking-rounds",
            "How long finding the written pages takes as memory grows",
            "ms for one round, with protecting the pages again and taking in what eBPF saw",
            metrics::ROUND,
        ));
        figures.push(by_size(
            results,
            "tracking-cost",
            "What tracking costs the server for each page that it writes",
            "µs of the server's CPU time beyond what it takes without tracking, for each page written",
            metrics::PAGE_COST,
        ));
    }
    figures
}

/// Each number that an ablation may change, in percent of what it is without the part.
fn differences(results: &Results, ablation: Ablation) -> Result<Figure, LeftOut> {
    let mut comparisons = ablation.comparisons(results);
    // That the control differs is what a figure of its own shows.
    comparisons.retain(|comparison| comparison.without.mover != Mover::Control);
    let groups = comparisons.iter().map(|comparison| (comparison.to_string(), rows(comparison)));
    let groups: Vec<_> = groups.filter(|(_, rows)| !rows.is_empty()).collect();
    let name = format!("ablation-{ablation}");
    if groups.is_empty() {
        return Err(LeftOut::new(&name, "anything with and without it"));
    }
    let reading = "Of each number two lines, without and with; at their ends are the medians with the ranges in the \
                   number's own unit.";
    let reading =
        std::iter::once(reading.to_owned()).chain(ablation.remarks(results)).collect::<Vec<_>>().join(" ");
    let dots =
        Dots { axis: "% of the median without".into(), mark: "the median without, 100 %".into(), groups };
    let sides = [(GREY.to_rgba(), "without"), (colour(0), "with")];
    let sides = sides.map(|(colour, name)| (Mark::Area(colour), name.to_owned()));
    let legend = sides.into_iter().chain(dots.legend()).collect();
    let page = page(results, ablation.question(), &reading, legend);
    Ok(Figure { name, page, picture: Picture::Dots(dots) })
}

fn rows(comparison: &Comparison) -> Vec<Row> {
    let mut rows = Vec::new();
    for Difference { metric, without, with } in &comparison.differences {
        if without.median <= 0.0 {
            continue;
        }
        let title = metric.title.trim().to_owned();
        let sides = [
            (title, comparison.without, without, GREY.to_rgba()),
            (String::new(), comparison.with, with, colour(0)),
        ];
        rows.extend(sides.map(|(label, cell, summary, colour)| {
            let values = cell.runs.iter().filter_map(metric.of);
            let values = values.map(|value| 100.0 * value / without.median).collect();
            Row { label, values, text: in_words(*summary), mark: Some(100.0), colour }
        }));
    }
    rows
}

/// A number of each way to track, by the size of the data set.
fn by_size(results: &Results, name: &str, title: &str, up: &str, metric: Metric) -> Result<Figure, LeftOut> {
    let mut curves: Vec<Curve> = Vec::new();
    for group in &results.groups {
        for (number, cell) in group.cells.iter().enumerate() {
            let Some(summary) = metric.summary(cell) else { continue };
            let point: (f64, Summary) = (group.setting.data_mib as f64, summary);
            match curves.iter_mut().find(|curve| curve.label == cell.name) {
                Some(curve) => curve.points.push(point),
                None => curves.push(Curve {
                    label: cell.name.clone(),
                    points: vec![point],
                    colour: mover_colour(&cell.mover, number),
                }),
            }
        }
    }
    if curves.is_empty() {
        return Err(LeftOut::new(name, metric.title));
    }
    let curves = Curves { across: "data set, MiB".into(), up: up.to_owned(), curves };
    let reading = "Each curve is a way to track the writes of a container that stays where it is: Redis at full load, \
                   nine writes to a read.";
    let page = page(results, title, reading, curves.legend());
    Ok(Figure { name: name.into(), page, picture: Picture::Curves(curves) })
}
