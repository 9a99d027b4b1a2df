//! A process tree with one of every kind of kernel object is moved, in every mode, and finds itself unchanged.

use anyhow::{Context, Result, ensure};
use pclive_tests::identity::{differences, identities};
use pclive_tests::lab::{BitRate, Host, Lab};
use pclive_tests::pclive::Serve;
use pclive_tests::workloads::running::Contained;

/// Moves the tree once with these options of `pclive migrate`, and looks at it from inside and outside.
fn move_tree(options: &[&str], mode: &str) -> Result<()> {
    let mut lab = Lab::new(Some(BitRate::GIGABIT))?;
    let mut tree = Contained::start(&mut lab, "tree", &["tree"])?;
    let name = tree.container.name.clone();
    tree.check(&lab)?;
    let before = identities(lab.source().container_pid(&name)?)?;
    let serve = Serve::start(&lab, lab.destination())?;
    let report = tree.migrate(&lab, lab.source(), &serve, options)?;
    println!("{options:?}: blackout {} us, restore {} us", report.blackout_us, report.restore_us);
    println!("{}", tree.check(&lab).with_context(|| format!("moved with {options:?}"))?);
    let after = identities(lab.destination().container_pid(&name)?)?;
    assert_eq!(differences(&before, &after), Vec::<String>::new());
    assert_eq!(lab.traces(lab.source(), &name)?, Vec::<String>::new());
    assert_eq!((report.mode.as_str(), report.container.as_str()), (mode, "tree"));
    assert!(!report.rounds.is_empty(), "{report:?}");
    own(lab.destination(), &name)
}

/// The destination's runtime has the container as any other: it runs commands in it, kills it and deletes it.
fn own(host: &Host, name: &str) -> Result<()> {
    assert_eq!(host.exec(name, &["cat", "/proc/1/comm"])?, "sh\n");
    pclive_tests::lab::run(&mut host.runc(["kill", name, "TERM"]))?;
    let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
    // PID 1 has a trap for it: so the signal reached it.
    while host.state(name)?.is_some_and(|state| state.status != "stopped") {
        ensure!(std::time::Instant::now() < end, "{name} does not stop");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    pclive_tests::lab::run(&mut host.runc(["delete", name]))?;
    assert_eq!(host.list()?.len(), 0);
    Ok(())
}

#[test]
fn tree_moves_in_one_shot() -> Result<()> {
    move_tree(&["--mode", "one-shot"], "one-shot")
}

#[test]
fn tree_moves_round_by_round() -> Result<()> {
    move_tree(&["--mode", "pclive"], "pclive")
}

#[test]
fn tree_moves_page_by_page() -> Result<()> {
    move_tree(&[], "pclive-g")
}

#[test]
fn tree_moves_with_delayed_restoration() -> Result<()> {
    move_tree(&["--restore-from", "2"], "pclive-g")
}

#[test]
fn tree_moves_by_scans_alone() -> Result<()> {
    move_tree(&["--tracker", "scan"], "pclive-g")
}

/// What was rebuilt can be captured again: there and back, twice.
#[test]
fn tree_moves_there_and_back() -> Result<()> {
    let mut lab = Lab::new(Some(BitRate::GIGABIT))?;
    let mut tree = Contained::start(&mut lab, "tree", &["tree"])?;
    let [there, back] = [lab.destination(), lab.source()].map(|host| Serve::start(&lab, host));
    let (there, back) = (there?, back?);
    for round in 0..2 {
        tree.migrate(&lab, lab.source(), &there, &[])?;
        tree.check(&lab).with_context(|| format!("there, {round}"))?;
        tree.migrate(&lab, lab.destination(), &back, &[])?;
        tree.check(&lab).with_context(|| format!("back, {round}"))?;
    }
    Ok(())
}
