//! The directory that results go to: raw JSON, and CSV for whoever draws pictures of their own.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::metrics;
use super::results::{Cell, Measured, Results, Run};

/// Everything that was measured.
const RESULTS: &str = "results.json";
/// How wide an interval of the throughput is.
const INTERVAL_MS: usize = 10;

/// Where results go.
pub struct Directory(PathBuf);

impl Directory {
    /// The directory, which is made if need be.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(path: &Path) -> Result<Self> {
        fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self(path.to_owned()))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Results that were kept in it.
    ///
    /// # Errors
    /// When there are none, or of another version.
    pub fn load(&self) -> Result<Results> {
        let file = self.0.join(RESULTS);
        let json = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
        serde_json::from_slice(&json).with_context(|| format!("understand {}", file.display()))
    }

    /// Keeps all of `results` as JSON, in one piece even if this process is killed meanwhile.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn keep(&self, results: &Results) -> Result<()> {
        let new = self.0.join(".results.json");
        fs::write(&new, serde_json::to_vec(results)?).with_context(|| format!("write {}", new.display()))?;
        fs::rename(&new, self.0.join(RESULTS)).context("put the new results in place of the old ones")
    }

    /// Writes [`TABLES`].
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write_tables(&self, results: &Results) -> Result<()> {
        TABLES.iter().try_for_each(|(name, table)| self.write(name, table(results).as_bytes()))
    }

    /// Writes a file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, name: &str, contents: &[u8]) -> Result<()> {
        let file = self.0.join(name);
        fs::write(&file, contents).with_context(|| format!("write {}", file.display()))
    }
}

/// Draws a table.
type Table = fn(&Results) -> String;

/// Tables: a run each, with its metrics; answers over time; CPU time and memory over time; rounds; what was compared.
pub const TABLES: [(&str, Table); 5] = [
    ("runs.csv", runs),
    ("throughput.csv", throughput),
    ("usage.csv", usage),
    ("rounds.csv", rounds),
    ("comparisons.csv", comparisons),
];

/// What is in front of each line: which run it is of.
const KEY: &str = "setting,mover,turn";

fn key(group: &Measured, cell: &Cell, run: &Run) -> String {
    format!("\"{}\",\"{}\",{}", group.name, cell.name, run.turn)
}

fn each(results: &Results) -> impl Iterator<Item = (&Measured, &Cell, &Run)> {
    let cells = results.groups.iter().flat_map(|group| group.cells.iter().map(move |cell| (group, cell)));
    cells.flat_map(|(group, cell)| cell.runs.iter().map(move |run| (group, cell, run)))
}

fn runs(results: &Results) -> String {
    let keys = metrics::ALL.map(|metric| metric.key).join(",");
    let mut table = format!("{KEY},{keys}\n");
    for (group, cell, run) in each(results) {
        let values =
            metrics::ALL.map(|metric| (metric.of)(run).map_or_else(String::new, |value| value.to_string()));
        table += &format!("{},{}\n", key(group, cell, run), values.join(","));
    }
    table
}

fn throughput(results: &Results) -> String {
    let mut table = format!("{KEY},load_ms,answers\n");
    for (group, cell, run) in each(results) {
        let key = key(group, cell, run);
        for (number, answers) in run.load.throughput_10ms.iter().enumerate() {
            table += &format!("{key},{},{answers}\n", number * INTERVAL_MS);
        }
    }
    table
}

fn usage(results: &Results) -> String {
    let ends = ["source_mover", "source_container", "destination_mover", "destination_container"];
    let columns = ends.map(|end| format!("{end}_cpu_us,{end}_rss_bytes")).join(",");
    let mut table = format!("{KEY},load_ms,{columns}\n");
    for (group, cell, run) in each(results) {
        let key = key(group, cell, run);
        for sample in &run.usage {
            let uses = [
                sample.source.mover,
                sample.source.container,
                sample.destination.mover,
                sample.destination.container,
            ];
            let uses = uses.map(|of| format!("{},{}", of.cpu_us, of.rss_bytes)).join(",");
            // Sampling starts a moment after the load.
            let at_ms = sample.at_us.saturating_sub(run.load.started_us) / 1000;
            table += &format!("{key},{at_ms},{uses}\n");
        }
    }
    table
}

/// The rounds of migrations by pclive, and those of tracking only.
fn rounds(results: &Results) -> String {
    let mut table = format!("{KEY},round,dirty_pages,duration_us\n");
    for (group, cell, run) in each(results) {
        let key = key(group, cell, run);
        let moved = run.movement.iter().filter_map(|movement| movement.report.get("rounds")?.as_array());
        let number =
            |round: &serde_json::Value, name: &str| round.get(name).and_then(serde_json::Value::as_u64);
        let moved = moved
            .flatten()
            .filter_map(|round| Some((number(round, "dirty_pages")?, number(round, "duration_us")?)));
        let tracked = run.tracking.iter().flat_map(|tracking| &tracking.intervals);
        let tracked = tracked.map(|interval| (interval.dirty_pages, interval.round_us));
        for (number, (dirty_pages, us)) in moved.chain(tracked).enumerate() {
            table += &format!("{key},{number},{dirty_pages},{us}\n");
        }
    }
    table
}

/// The differences that ablations are about.
fn comparisons(results: &Results) -> String {
    let side =
        |name: &str| ["median", "lowest", "highest", "runs"].map(|part| format!("{name}_{part}")).join(",");
    let mut table =
        format!("ablation,setting,without,with,metric,{},{},percent,doubt\n", side("without"), side("with"));
    for ablation in &results.ablations {
        for comparison in ablation.comparisons(results) {
            let (setting, without, with) =
                (&comparison.group.name, &comparison.without.name, &comparison.with.name);
            for difference in &comparison.differences {
                let numbers = [difference.without, difference.with]
                    .map(|side| format!("{},{},{},{}", side.median, side.lowest, side.highest, side.count));
                let percent = difference.percent().map_or_else(String::new, |percent| percent.to_string());
                table += &format!(
                    "{ablation},\"{setting}\",\"{without}\",\"{with}\",{},{},{percent},{}\n",
                    difference.metric.key,
                    numbers.join(","),
                    difference.doubt().unwrap_or_default()
                );
            }
        }
    }
    table
}
