//! What `pclive track` says: as text while it runs, as JSON at the end.

use super::{
    audit::Comparison,
    session::{Audit, Interval, WORKING_SET_INTERVALS},
};
use crate::track::{Heat, Tier};
use pclive_wire::{HostPid, PAGE_SIZE, PageSet};
use serde::Serialize;
use std::{
    io::{self, Write},
    time::Duration,
};

/// Ranges in the report, at most.
const HOTTEST: usize = 10;
/// Ranges of each kind of disagreement in the report, at most.
const EXAMPLES: usize = 8;

/// The whole answer.
#[derive(Debug, Serialize)]
pub struct TrackReport {
    container: String,
    tracker: Tier,
    interval_ms: u64,
    /// For how long processes were stopped to attach to them, together.
    attach_stop_us: u64,
    pub intervals: Vec<IntervalReport>,
    /// Pages written in the last intervals.
    working_set_pages: u64,
    working_set_bytes: u64,
    hottest: Vec<HotReport>,
}

/// One interval.
#[derive(Debug, Serialize)]
pub struct IntervalReport {
    start_us: u64,
    duration_us: u64,
    /// Of finding the pages at its end.
    round_us: u64,
    dirty_pages: u64,
    dirty_bytes: u64,
    working_set_pages: u64,
    lost_write_events: u64,
    lost_change_events: u64,
    processes: Vec<ProcessReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    audit: Option<AuditReport>,
}

#[derive(Debug, Serialize)]
struct ProcessReport {
    pid: HostPid,
    container_pid: i32,
    dirty_pages: u64,
    dirty_bytes: u64,
    write_events: u64,
    change_events: u64,
}

/// eBPF against scan.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
enum AuditReport {
    Compared(ComparedPages),
    LeftOut(&'static str),
}

/// Numbers of pages, and some of those that only one of the two saw.
#[derive(Debug, Default, Serialize)]
struct ComparedPages {
    both: u64,
    only_ebpf: u64,
    only_scan: u64,
    not_compared: u64,
    only_ebpf_ranges: Vec<String>,
    only_scan_ranges: Vec<String>,
}

#[derive(Debug, Serialize)]
struct HotReport {
    pid: HostPid,
    range: String,
    pages: u64,
    written_pages: u64,
    writes: u64,
}

impl IntervalReport {
    /// Sums up an interval that began at `start`.
    pub fn of(interval: &Interval, start: Duration, duration: Duration) -> Self {
        let processes: Vec<_> = interval
            .processes
            .iter()
            .map(|process| ProcessReport {
                pid: process.pid,
                container_pid: process.ns_pid.0,
                dirty_pages: process.written.pages(),
                dirty_bytes: process.written.pages() * PAGE_SIZE,
                write_events: process.events,
                change_events: process.changes,
            })
            .collect();
        let dirty_pages = processes.iter().map(|process| process.dirty_pages).sum();
        Self {
            start_us: start.as_micros() as u64,
            duration_us: duration.as_micros() as u64,
            round_us: interval.round.as_micros() as u64,
            dirty_pages,
            dirty_bytes: dirty_pages * PAGE_SIZE,
            working_set_pages: interval.working_set,
            lost_write_events: interval.lost.writes,
            lost_change_events: interval.lost.changes,
            processes,
            audit: interval.audit.as_ref().map(AuditReport::of),
        }
    }

    /// A line for each process that wrote.
    pub fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let end = (self.start_us + self.duration_us) as f64 / 1e6;
        let seconds = self.duration_us as f64 / 1e6;
        let mut printed = 0;
        for process in self.processes.iter().filter(|process| process.dirty_pages > 0) {
            let bytes = mib(process.dirty_bytes);
            writeln!(
                out,
                "{end:7.1} s {:>8} {:>6} {:>9} {bytes:>9.1} {:>9.1} {:>9}",
                process.pid.0,
                process.container_pid,
                process.dirty_pages,
                bytes / seconds,
                process.write_events
            )?;
            printed += 1;
        }
        if printed != 1 {
            let bytes = mib(self.dirty_bytes);
            writeln!(
                out,
                "{end:7.1} s {:>8} {:>6} {:>9} {bytes:>9.1} {:>9.1}",
                "all",
                "",
                self.dirty_pages,
                bytes / seconds
            )?;
        }
        if self.lost_write_events + self.lost_change_events > 0 {
            writeln!(
                out,
                "          {} write events and {} change events were lost",
                self.lost_write_events, self.lost_change_events
            )?;
        }
        match &self.audit {
            Some(AuditReport::Compared(pages)) => pages.print(out),
            Some(AuditReport::LeftOut(reason)) => writeln!(out, "          audit left out: {reason}"),
            None => Ok(()),
        }
    }
}

impl AuditReport {
    fn of(audit: &Audit) -> Self {
        match audit {
            Audit::Compared(comparisons) => Self::Compared(ComparedPages::of(comparisons)),
            Audit::TreeChanged => Self::LeftOut("the process tree changed"),
            Audit::EventsLost => Self::LeftOut("events were lost"),
        }
    }
}

impl ComparedPages {
    fn of(comparisons: &[(HostPid, Comparison)]) -> Self {
        let mut report = Self::default();
        for (pid, comparison) in comparisons {
            report.both += comparison.both.pages();
            report.only_ebpf += comparison.only_ebpf.pages();
            report.only_scan += comparison.only_scan.pages();
            report.not_compared += comparison.not_compared;
            add_examples(&mut report.only_ebpf_ranges, *pid, &comparison.only_ebpf);
            add_examples(&mut report.only_scan_ranges, *pid, &comparison.only_scan);
        }
        report
    }

    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(
            out,
            "          audit: {} pages seen by both, {} by eBPF only, {} by PAGEMAP_SCAN only, {} in mappings that \
             changed",
            self.both, self.only_ebpf, self.only_scan, self.not_compared
        )?;
        for (who, ranges) in [("eBPF", &self.only_ebpf_ranges), ("PAGEMAP_SCAN", &self.only_scan_ranges)] {
            if !ranges.is_empty() {
                writeln!(out, "          only {who}: {}", ranges.join(", "))?;
            }
        }
        Ok(())
    }
}

fn add_examples(examples: &mut Vec<String>, pid: HostPid, pages: &PageSet) {
    let room = EXAMPLES - examples.len();
    examples.extend(pages.ranges().iter().take(room).map(|range| format!("{pid}:{range}")));
}

impl TrackReport {
    /// A report without intervals yet.
    pub fn new(container: String, tracker: Tier, interval: Duration, attach_stop: Duration) -> Self {
        Self {
            container,
            tracker,
            interval_ms: interval.as_millis() as u64,
            attach_stop_us: attach_stop.as_micros() as u64,
            intervals: Vec::new(),
            working_set_pages: 0,
            working_set_bytes: 0,
            hottest: Vec::new(),
        }
    }

    /// Adds what is known at the end.
    pub fn conclude(&mut self, heat: &Heat) {
        self.working_set_pages = self.intervals.last().map_or(0, |interval| interval.working_set_pages);
        self.working_set_bytes = self.working_set_pages * PAGE_SIZE;
        let hottest = heat.hottest(HOTTEST).into_iter().map(|(pid, hot)| HotReport {
            pid,
            range: hot.range.to_string(),
            pages: hot.range.pages,
            written_pages: hot.written_pages,
            writes: hot.writes,
        });
        self.hottest = hottest.collect();
    }

    /// The heading of the intervals' lines.
    pub fn print_header(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(
            out,
            "{}: tracker {}, processes stopped for {:.1} ms to attach",
            self.container,
            self.tracker,
            self.attach_stop_us as f64 / 1e3
        )?;
        writeln!(out, "     time      pid inside     pages       MiB     MiB/s    events")
    }

    /// Working set and hottest ranges.
    pub fn print_conclusion(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(
            out,
            "working set (pages written in the last {WORKING_SET_INTERVALS} intervals): {} pages, {:.1} MiB",
            self.working_set_pages,
            mib(self.working_set_bytes)
        )?;
        if !self.hottest.is_empty() {
            writeln!(out, "hottest ranges:\n      pid     pages   writes/page  range")?;
        }
        for hot in &self.hottest {
            let density = hot.writes as f64 / hot.pages as f64;
            writeln!(out, "{:>9} {:>9} {density:>13.1}  {}", hot.pid.0, hot.pages, hot.range)?;
        }
        Ok(())
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
