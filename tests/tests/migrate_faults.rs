//! A migration that is cut short, at whatever moment: the container lives on one host and never on both, and where it
//! stayed it can be moved as if nothing had been.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use pclive_tests::lab::{BitRate, Lab, run};
use pclive_tests::patience::{PATIENCE, wait_until_none};
use pclive_tests::pclive::{Migrate, Outcome, Serve, exit};
use pclive_tests::workloads::running::Contained;
use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// When a migration is cut short.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// So many milliseconds after its start.
    Start(u64),
    /// So many after the container's link went down: in the blackout.
    LinkDown(u64),
    /// As soon as the destination has recorded the commit.
    Commit,
}

use Moment::{Commit, LinkDown, Start};

/// A process tree on one host, and a destination for it.
struct Case {
    // Dropped before the lab that it uses.
    serve: Serve,
    tree: Contained,
    name: String,
    lab: Lab,
}

impl Case {
    fn new() -> Result<Self> {
        let mut lab = Lab::new(Some(BitRate::GIGABIT))?;
        let tree = Contained::start(&mut lab, "tree", &["tree"])?;
        let serve = Serve::start(&lab, lab.destination())?;
        Ok(Self { name: tree.container.name.clone(), serve, tree, lab })
    }

    /// Starts a migration, and does `fault` at that moment.
    fn cut_short(
        &mut self,
        moment: Moment,
        fault: impl Fn(&Migrate, &mut Serve) -> Result<()>,
    ) -> Result<Outcome> {
        let mut migrate =
            Migrate::start(&self.lab, self.lab.source(), &self.name, self.serve.address(), &[])?;
        if let Err(error) = self.wait_for(moment, &mut migrate) {
            let serve = self.lab.destination().log("serve");
            return Err(error.context(format!("migrate: {}\nserve: {serve}", migrate.output())));
        }
        fault(&migrate, &mut self.serve)?;
        let outcome = migrate.wait()?;
        println!("{moment:?}: {:?}: {}", outcome.code, outcome.output.lines().last().unwrap_or_default());
        Ok(outcome)
    }

    /// Waits for a moment of a migration, as long as it is under way.
    fn wait_for(&self, moment: Moment, migrate: &mut Migrate) -> Result<()> {
        let delay = match moment {
            Start(delay) => delay,
            LinkDown(delay) => {
                let routes = || fs::read_to_string("/proc/thread-self/net/route").unwrap_or_default();
                let netns = self.lab.source().container_netns(&self.name);
                netns.enter(|| poll_during(migrate, || !routes().contains("eth0")))??;
                delay
            }
            Commit => {
                let is_unfinished = || self.lab.destination().is_unfinished(&self.name);
                poll_during(migrate, is_unfinished)?;
                poll_during(migrate, || !is_unfinished())?;
                0
            }
        };
        sleep(Duration::from_millis(delay));
        Ok(())
    }

    /// At which hosts the container lives: source, destination.
    fn lives(&self) -> Result<[bool; 2]> {
        let Self { lab, name, .. } = self;
        Ok([lab.is_alive(lab.source(), name)?, lab.is_alive(lab.destination(), name)?])
    }

    /// Waits until those have acted to whom a killed pclive leaves the rest: its last will here, or the destination.
    fn settle(&self) -> Result<()> {
        let Self { lab, name, .. } = self;
        if poll(|| self.lives().is_ok_and(|lives| lives.contains(&true))).is_err() {
            // Killed behind the end of its will and before the commit: frozen here, and the operator sees it nowhere else.
            ensure!(lab.destination().state(name)?.is_none(), "it lives nowhere");
            lab.thaw(lab.source(), name)?;
        }
        Ok(())
    }

    /// Checks that the container lives where an outcome says, and nowhere else; whether that is the source.
    fn stayed(&mut self, outcome: &Outcome) -> Result<bool> {
        let [source, destination] = self.lives()?;
        let output = &outcome.output;
        ensure!(!(source && destination), "it lives at both: {output}");
        match outcome.code {
            Some(exit::MOVED) => ensure!(destination, "it does not live at the destination: {output}"),
            Some(exit::STAYED) => ensure!(source, "it does not live at the source: {output}"),
            Some(exit::UNKNOWN) => {
                ensure!(!source, "an unknown outcome, and it lives at the source: {output}")
            }
            None => {}
            code => panic!("exit code {code:?}: {output}"),
        }
        // Nothing was touched, or everything came along.
        if source || destination {
            self.tree.check(&self.lab).with_context(|| output.clone())?;
        }
        Ok(source)
    }

    /// Moves it, from the source and to a clean destination.
    fn move_on(&mut self) -> Result<()> {
        let Self { lab, name, tree, serve } = self;
        wait_until_none(|| Ok(Serve::unfinished(lab.destination(), name)))?;
        wait_until_none(|| lab.traces(lab.destination(), name))?;
        tree.migrate(lab, lab.source(), serve, &[])?;
        tree.check(lab)?;
        assert_eq!(lab.traces(lab.source(), name)?, [""; 0]);
        Ok(())
    }
}

/// How often what is waited for is looked for: the blackout has but milliseconds.
const BETWEEN_LOOKS: Duration = Duration::from_micros(50);

fn poll(is_so: impl Fn() -> bool) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    poll_while(|| Ok(Instant::now() < end), is_so)
}

/// As [`poll`], but as long as a migration goes on: on a busy machine its rounds take their time.
fn poll_during(migrate: &mut Migrate, is_so: impl Fn() -> bool) -> Result<()> {
    poll_while(|| Ok(!migrate.has_ended()?), is_so)
}

fn poll_while(mut it_may_happen: impl FnMut() -> Result<bool>, is_so: impl Fn() -> bool) -> Result<()> {
    loop {
        let is_last = !it_may_happen()?;
        if is_so() {
            return Ok(());
        }
        ensure!(!is_last, "what was waited for did not happen");
        sleep(BETWEEN_LOOKS);
    }
}

#[test]
fn a_cancelled_migration_leaves_the_container_where_it_was() -> Result<()> {
    let cancel = |migrate: &Migrate, _: &mut Serve| {
        poll(|| migrate.is_prepared_for(Signal::SIGINT))?;
        migrate.signal(Signal::SIGINT).or(Ok(()))
    };
    let mut stayed = 0;
    for moment in [10, 30, 50, 70, 90, 110].map(Start).into_iter().chain([0, 2, 5].map(LinkDown)) {
        let mut case = Case::new()?;
        let outcome = case.cut_short(moment, cancel)?;
        if case.stayed(&outcome)? {
            assert_eq!(outcome.code, Some(exit::STAYED), "{}", outcome.output);
            stayed += 1;
            // The destination is clean before the source says so.
            assert_eq!(case.lab.traces(case.lab.destination(), &case.name)?, [""; 0]);
            case.move_on()?;
        }
    }
    assert!(stayed > 0, "every migration was faster");
    Ok(())
}

#[test]
fn a_killed_migration_leaves_the_container_where_it_was() -> Result<()> {
    let kill = |migrate: &Migrate, _: &mut Serve| migrate.signal(Signal::SIGKILL).or(Ok(()));
    let mut stayed = 0;
    let early = [5, 15, 20, 25, 30, 40, 50].map(Start);
    let late = [0, 1, 2, 3, 5, 8, 15].map(LinkDown);
    for moment in early.into_iter().chain(late) {
        let mut case = Case::new()?;
        let outcome = case.cut_short(moment, kill)?;
        case.settle()?;
        if case.stayed(&outcome)? {
            stayed += 1;
            case.move_on()?;
        }
    }
    assert!(stayed > 5, "of 14 migrations {stayed} were killed in time");
    Ok(())
}

#[test]
fn a_destination_that_dies_leaves_the_container_where_it_was() -> Result<()> {
    let kill = |_: &Migrate, serve: &mut Serve| serve.kill();
    let mut stayed = 0;
    let early = [5, 20, 35, 50, 65, 80, 100].map(Start);
    let late = [0, 1, 2, 3, 5, 8, 15].map(LinkDown);
    for moment in early.into_iter().chain(late) {
        let mut case = Case::new()?;
        let outcome = case.cut_short(moment, kill)?;
        if case.stayed(&outcome)? {
            stayed += 1;
            case.serve = Serve::start(&case.lab, case.lab.destination())?;
            case.move_on()?;
        }
    }
    assert!(stayed > 5, "of 14 destinations {stayed} were killed in time");
    Ok(())
}

#[test]
fn a_destination_that_dies_behind_the_commit_leaves_the_decision_to_the_operator() -> Result<()> {
    // It runs a few milliseconds after the commit: often enough it is killed before.
    for _attempt in 0..8 {
        let mut case = Case::new()?;
        let outcome = case.cut_short(Commit, |_, serve| serve.kill())?;
        assert!(!case.stayed(&outcome)?);
        if outcome.code == Some(exit::UNKNOWN) && decide(&mut case)? {
            return Ok(());
        }
    }
    panic!("every destination was faster");
}

/// Finds out where a container is that may be at either host, as an operator would, and has it go on there. Whether that
/// is the source.
fn decide(case: &mut Case) -> Result<bool> {
    // Dead or alive, what is at the destination is not removed by a later pclive, and the frozen copy is not moved.
    let found = case.lab.destination().state(&case.name)?.context("it is there")?;
    case.serve = Serve::start(&case.lab, case.lab.destination())?;
    let again =
        Migrate::start(&case.lab, case.lab.source(), &case.name, case.serve.address(), &[])?.wait()?;
    assert_eq!(again.code, Some(exit::OBSTACLES), "{}", again.output);
    let Case { lab, name, tree, .. } = case;
    let still = lab.destination().state(name)?.context("it is still there")?;
    assert_eq!((found.pid, &found.status), (still.pid, &still.status));

    let at_destination = still.status == "running";
    if at_destination {
        run(&mut lab.source().runc(["delete", "--force", name]))?;
        assert_eq!(lab.traces(lab.source(), name)?, [""; 0]);
    } else {
        run(&mut lab.destination().runc(["delete", name]))?;
        lab.thaw(lab.source(), name)?;
    }
    // Killed after its sockets were alive and before its processes were: the kernel has closed the connections there.
    if !at_destination && let Err(error) = tree.check(lab) {
        error.downcast::<std::io::Error>()?;
        tree.reconnect(lab)?;
    }
    tree.check(lab).with_context(|| format!("at the destination: {at_destination}"))?;
    if !at_destination {
        case.move_on()?;
    }
    Ok(!at_destination)
}
