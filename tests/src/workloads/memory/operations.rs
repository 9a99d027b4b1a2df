//! Everything that a thread does to its memory, with how often it does it.

use super::child::Child;
use super::mappings;
use super::region::{Access, Content, Kind, Region, SECTORS};
use super::span::Span;
use super::worker::{Failure, Worker};
use crate::workloads::pattern::Rng;
use nix::errno::Errno;
use nix::libc;
use std::sync::Arc;
use std::time::Duration;

/// One thing to do. Where it makes no sense at the moment, it does nothing.
pub type Operation = fn(&mut Worker) -> Result<(), Failure>;

/// A region with fewer pages goes as a whole, or address spaces would end up as crumbs.
const SMALL: usize = 16;

/// Weights out of their sum.
const OPERATIONS: &[(usize, Operation)] = &[
    (300, write),
    (150, write_sector),
    (40, write_zeros),
    (80, verify),
    (40, map),
    (40, unmap),
    (30, resize),
    (5, relocate),
    (40, discard),
    (15, free_lazily),
    (10, page_out),
    (10, populate),
    (30, protect),
    (50, unprotect),
    (10, guard),
    (2, fork),
    (20, look_after_children),
];

/// Chooses by weight.
pub fn pick(rng: &mut Rng) -> Operation {
    let mut ticket = rng.below(OPERATIONS.iter().map(|(weight, _)| weight).sum());
    for &(weight, operation) in OPERATIONS {
        match ticket.checked_sub(weight) {
            Some(rest) => ticket = rest,
            None => return operation,
        }
    }
    unreachable!("a ticket is below the sum of weights")
}

fn write(worker: &mut Worker) -> Result<(), Failure> {
    let version = worker.next_version();
    let Some((region, pages)) = choose(worker, 32) else { return Ok(()) };
    let region = &mut worker.regions[region];
    match region.access(pages.start) {
        Access::Guard => {}
        Access::Write => region.write(pages, version),
        access @ (Access::Read | Access::None) => {
            tolerate("mprotect", region.protect(pages.clone(), Access::Write))?;
            region.write(pages.clone(), version);
            tolerate("mprotect", region.protect(pages, access))?;
        }
    }
    Ok(())
}

fn write_sector(worker: &mut Worker) -> Result<(), Failure> {
    let content = match worker.rng.chance(20) {
        true => Content::Zeros,
        false => Content::Version(worker.next_version()),
    };
    let sector = worker.rng.below(SECTORS);
    let Some((region, pages)) = choose(worker, 1) else { return Ok(()) };
    if worker.regions[region].access(pages.start) == Access::Write {
        worker.regions[region].write_sector(pages.start, sector, content);
    }
    Ok(())
}

fn write_zeros(worker: &mut Worker) -> Result<(), Failure> {
    let Some((region, pages)) = choose(worker, 16) else { return Ok(()) };
    if worker.regions[region].access(pages.start) == Access::Write {
        for page in pages {
            (0..SECTORS).for_each(|sector| worker.regions[region].write_sector(page, sector, Content::Zeros));
        }
    }
    Ok(())
}

fn verify(worker: &mut Worker) -> Result<(), Failure> {
    let mut rng = worker.rng.clone();
    worker.verify_some(&mut rng, 1)?;
    worker.rng = rng;
    Ok(())
}

/// Adds a region, some of its pages written.
pub fn map(worker: &mut Worker) -> Result<(), Failure> {
    let room = worker.budget.saturating_sub(worker.pages());
    if room == 0 {
        return Ok(());
    }
    let pages = 1 + worker.rng.below(room.min(worker.budget / 8 + 1));
    let Some((span, kind)) = new_memory(worker, pages)? else { return Ok(()) };
    let mut region = Region::new(span, kind, worker.next_numbers());
    let start = worker.rng.below(region.pages());
    let end = start + worker.rng.below(region.pages() - start + 1);
    region.write(start..end, worker.next_version());
    worker.regions.push(region);
    Ok(())
}

fn new_memory(worker: &mut Worker, pages: usize) -> Result<Option<(Span, Kind)>, Failure> {
    Ok(match worker.rng.below(100) {
        0..45 => tolerate("mmap", Span::anonymous(pages, false))?.map(|span| (span, Kind::Anonymous)),
        45..60 => tolerate("mmap", Span::huge(pages))?.map(|span| (span, Kind::Anonymous)),
        60..80 if worker.has_heap => tolerate("brk", Span::heap(pages))?.map(|span| (span, Kind::Heap)),
        60..70 if worker.options.shared => {
            let span = tolerate("mmap", Span::anonymous(pages, true))?;
            span.map(|mut span| span.advise(0..pages, libc::MADV_DONTFORK).map(|()| (span, Kind::Shared)))
                .transpose()
                .map_err(|error| Failure::call("madvise", error))?
        }
        _ => {
            let file = Arc::clone(&worker.file);
            let pages = pages.min(file.count());
            let first = worker.rng.below(file.count() - pages + 1);
            let span = tolerate("mmap", Span::file(&file.file, first, pages))?;
            span.map(|span| (span, Kind::File(file, first)))
        }
    })
}

/// Unmaps a region, or a hole in it. Heap goes back if it is the last of the heap.
fn unmap(worker: &mut Worker) -> Result<(), Failure> {
    if worker.pages() < worker.budget / 2 {
        return Ok(());
    }
    let Some((index, _)) = choose(worker, 1) else { return Ok(()) };
    let region = worker.regions.swap_remove(index);
    if matches!(region.kind, Kind::Heap) {
        return give_back_heap(worker, region);
    }
    let whole = region.pages() < SMALL;
    let end =
        if whole || worker.rng.chance(50) { region.pages() } else { 1 + worker.rng.below(region.pages()) };
    let start = if whole || worker.rng.chance(50) { 0 } else { worker.rng.below(end) };
    let (rest, tail) = region.split(end);
    let (head, hole) = rest.split(start);
    hole.span.unmap().map_err(|error| Failure::call("munmap", error))?;
    worker.regions.extend([head, tail].into_iter().filter(|region| region.pages() > 0));
    Ok(())
}

fn give_back_heap(worker: &mut Worker, region: Region) -> Result<(), Failure> {
    let mut region = region;
    let address = region.span.address();
    let is_higher = |other: &Region| matches!(other.kind, Kind::Heap) && other.span.address() > address;
    // malloc grows the heap next from where this ends: it must find the pages before usable, so only the last one goes.
    if worker.has_heap && !worker.regions.iter().any(is_higher) && make_uniform(&mut region)? {
        match region.span.shrink_heap() {
            Ok(()) => return Ok(()),
            Err(span) => region.span = span,
        }
    }
    worker.regions.push(region);
    Ok(())
}

/// `mremap(2)` to another size.
fn resize(worker: &mut Worker) -> Result<(), Failure> {
    let room = worker.budget.saturating_sub(worker.pages());
    let Some((index, _)) = choose(worker, 1) else { return Ok(()) };
    let old = worker.regions[index].pages();
    let new = match worker.regions[index].kind {
        Kind::Anonymous => 1 + worker.rng.below(old + room.min(old)),
        Kind::File(..) | Kind::Shared => 1 + worker.rng.below(old),
        Kind::Heap => return Ok(()),
    };
    if make_uniform(&mut worker.regions[index])? {
        tolerate("mremap", worker.regions[index].resize(new))?;
    }
    Ok(())
}

/// `mremap(2)` to another address.
fn relocate(worker: &mut Worker) -> Result<(), Failure> {
    let Some((index, _)) = choose(worker, 1) else { return Ok(()) };
    let region = &mut worker.regions[index];
    if !matches!(region.kind, Kind::Heap) && make_uniform(region)? && is_one_mapping(region)? {
        tolerate("mremap", region.span.relocate())?;
    }
    Ok(())
}

/// Whether the kernel has merged the region's mappings. Those that differ in something that nobody here has set, such as
/// a userfaultfd, stay apart.
fn is_one_mapping(region: &Region) -> Result<bool, Failure> {
    let maps = std::fs::read_to_string("/proc/self/maps");
    let mappings = mappings::parse(&maps.map_err(|error| Failure::call("read /proc/self/maps", error))?);
    let (start, end) = (region.span.address(), region.span.end());
    Ok(mappings.iter().any(|mapping| mapping.range.start <= start && end <= mapping.range.end))
}

/// Makes a region writable throughout, as `mremap(2)` takes only one mapping. Guards stay, as they move along, but then
/// the answer is no: a region with guards is left where it is.
fn make_uniform(region: &mut Region) -> Result<bool, Failure> {
    let all = 0..region.pages();
    if region.any(all.clone(), Access::Guard) {
        return Ok(false);
    }
    Ok(tolerate("mprotect", region.protect(all, Access::Write))?.is_some())
}

fn discard(worker: &mut Worker) -> Result<(), Failure> {
    let Some((region, pages)) = choose(worker, 64) else { return Ok(()) };
    let region = &mut worker.regions[region];
    if region.access(pages.start) != Access::Guard {
        tolerate("madvise", region.discard(pages))?;
    }
    Ok(())
}

fn free_lazily(worker: &mut Worker) -> Result<(), Failure> {
    let Some((region, pages)) = choose(worker, 16) else { return Ok(()) };
    let region = &mut worker.regions[region];
    if matches!(region.kind, Kind::Anonymous | Kind::Heap) && region.access(pages.start) == Access::Write {
        tolerate("madvise", region.free_lazily(pages))?;
    }
    Ok(())
}

fn page_out(worker: &mut Worker) -> Result<(), Failure> {
    advise(worker, libc::MADV_PAGEOUT)
}

fn populate(worker: &mut Worker) -> Result<(), Failure> {
    advise(worker, libc::MADV_POPULATE_READ)
}

/// Advice that changes no contents.
fn advise(worker: &mut Worker, advice: i32) -> Result<(), Failure> {
    let Some((region, pages)) = choose(worker, 64) else { return Ok(()) };
    let region = &mut worker.regions[region];
    if matches!(region.access(pages.start), Access::Write | Access::Read) {
        tolerate("madvise", region.span.advise(pages, advice))?;
    }
    Ok(())
}

fn protect(worker: &mut Worker) -> Result<(), Failure> {
    let access = if worker.rng.chance(50) { Access::Read } else { Access::None };
    let Some((region, pages)) = choose(worker, 64) else { return Ok(()) };
    let region = &mut worker.regions[region];
    if region.access(pages.start) != Access::Guard {
        tolerate("mprotect", region.protect(pages, access))?;
    }
    Ok(())
}

fn unprotect(worker: &mut Worker) -> Result<(), Failure> {
    let Some((index, _)) = choose(worker, 1) else { return Ok(()) };
    make_uniform(&mut worker.regions[index]).map(|_| ())
}

fn guard(worker: &mut Worker) -> Result<(), Failure> {
    if !worker.options.guard {
        return Ok(());
    }
    let Some((region, pages)) = choose(worker, 8) else { return Ok(()) };
    let region = &mut worker.regions[region];
    let install = match region.access(pages.start) {
        Access::Guard => false,
        Access::Write if matches!(region.kind, Kind::Anonymous) => true,
        _ => return Ok(()),
    };
    region.guard(pages, install).map_err(|error| Failure::call("madvise(MADV_GUARD_INSTALL)", error))
}

fn fork(worker: &mut Worker) -> Result<(), Failure> {
    if worker.children.len() < worker.options.children {
        let lifetime = Duration::from_millis(20 + worker.rng.below(2000) as u64);
        let child = Child::start(worker, lifetime)?;
        worker.children.push(child);
    }
    Ok(())
}

fn look_after_children(worker: &mut Worker) -> Result<(), Failure> {
    let mut living = Vec::new();
    for mut child in std::mem::take(&mut worker.children) {
        if !child.has_ended()? {
            living.push(child);
        }
    }
    worker.children = living;
    Ok(())
}

fn choose(worker: &mut Worker, longest: usize) -> Option<(usize, std::ops::Range<usize>)> {
    let mut rng = worker.rng.clone();
    let chosen = worker.choose(&mut rng, longest);
    worker.rng = rng;
    chosen
}

/// Makes nothing of errors that the machine's state may cause at any time: no memory, too many mappings, or mappings
/// that the kernel could not merge (`mremap(2)`: EFAULT).
fn tolerate<T>(call: &'static str, result: std::io::Result<T>) -> Result<Option<T>, Failure> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) => match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOMEM | Errno::EFAULT | Errno::EAGAIN) => Ok(None),
            _ => Err(Failure::call(call, error)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::Options;
    use super::super::region::FilePages;
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn worker(arguments: &[&str]) -> Worker {
        let line = std::iter::once("memory").chain(arguments.iter().copied());
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        let pages = Arc::new(FilePages::read(file, 512).unwrap());
        // Not number 0: that would take the test harness's heap.
        Worker::new(1, &Line::parse_from(line).options, pages).unwrap()
    }

    #[test]
    fn thousands_of_operations_leave_memory_as_expected() {
        for arguments in
            [&["--mib", "16", "--threads", "1", "--seed", "3"][..], &["--mib", "8", "--shared", "--guard"]]
        {
            let mut worker = worker(arguments);
            for round in 0..20 {
                (0..500).for_each(|_| worker.step().unwrap());
                worker.verify_all().unwrap_or_else(|failure| panic!("round {round}: {failure}"));
                worker
                    .verify_protection(&mappings::parse(&std::fs::read_to_string("/proc/self/maps").unwrap()))
                    .unwrap();
            }
            assert!(worker.pages() > worker.budget / 3, "{} of {}", worker.pages(), worker.budget);
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_pages() {
        let pages = |seed| {
            let mut worker = worker(&["--mib", "8", "--threads", "1", "--children", "0", "--seed", seed]);
            (0..2000)
                .map(|_| {
                    worker.step().unwrap();
                    worker.pages()
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(pages("5"), pages("5"));
        assert_ne!(pages("5"), pages("6"));
    }

    #[test]
    fn corruption_is_found() {
        let mut worker = worker(&["--mib", "4"]);
        worker.corrupt();
        assert!(matches!(worker.verify_all(), Err(Failure::Memory(_))));
    }
}
