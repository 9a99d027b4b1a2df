//! Every way to track writes that this kernel has, with the programs that users run. `cargo xtask vm` runs it where there
//! are ways that a locked down host refuses.

use anyhow::{Context, Result, ensure};
use pclive_tests::lab::{BitRate, Lab, run};
use pclive_tests::pclive::{Serve, TrackInterval, track};
use pclive_tests::workloads::running::Contained;
use serde::Deserialize;

/// A line of `pclive check --json`.
#[derive(Deserialize)]
struct Offer {
    name: String,
    available: bool,
}

/// The tiers that `pclive check` names, and the one that each host has.
fn tiers(lab: &Lab) -> Result<Vec<String>> {
    let mut check = lab.source().command(lab.programs().path("pclive")?);
    let offers: Vec<Offer> = serde_json::from_str(&run(check.args(["check", "--json"]))?)?;
    let trackers = offers.into_iter().filter(|offer| offer.available);
    let trackers = trackers.filter_map(|offer| offer.name.strip_prefix("tracker ").map(str::to_owned));
    Ok(trackers.chain(["scan".to_owned()]).collect())
}

/// A process that writes, maps and unmaps memory all the time, slowly enough that rounds converge.
fn memory(lab: &mut Lab) -> Result<Contained> {
    let options = ["--mib", "32", "--threads", "2", "--children", "0", "--rate", "500", "--seed", "21"];
    Contained::start(lab, "memory", &["memory"].into_iter().chain(options).collect::<Vec<_>>())
}

#[test]
fn a_container_is_followed_by_each() -> Result<()> {
    let mut lab = Lab::new(None)?;
    let mut memory = memory(&mut lab)?;
    for tier in tiers(&lab)? {
        let mut options = vec!["--tracker", &tier, "--seconds", "3", "--interval", "300"];
        let audited = tier != "scan";
        if audited {
            options.push("--audit");
        }
        let report = track(&lab, lab.source(), "memory", &options).with_context(|| tier.clone())?;
        assert_eq!(report.tracker, tier);
        ensure!(report.intervals.iter().all(|interval| interval.dirty_pages > 0), "{report:?}");
        let seen =
            |interval: &TrackInterval| interval.more.get("audit")?.get("compared")?.get("both")?.as_u64();
        let seen: u64 = report.intervals.iter().filter_map(seen).sum();
        assert_eq!(seen > 0, audited, "what eBPF has seen and a scan confirms: {report:?}");
        memory.check(&lab).context(tier)?;
    }
    Ok(())
}

#[test]
fn memory_moves_by_each() -> Result<()> {
    let mut lab = Lab::new(Some(BitRate::GIGABIT))?;
    let mut memory = memory(&mut lab)?;
    let (there, back) = (Serve::start(&lab, lab.destination())?, Serve::start(&lab, lab.source())?);
    for tier in tiers(&lab)? {
        for (from, to) in [(lab.source(), &there), (lab.destination(), &back)] {
            let report =
                memory.migrate(&lab, from, to, &["--tracker", &tier]).with_context(|| tier.clone())?;
            assert_eq!(report.tracker, tier);
            memory.check(&lab).with_context(|| format!("moved by {tier}"))?;
        }
    }
    Ok(())
}
