//! Whatever fails before the commit, the container runs on at the source as if nothing had been, the destination is
//! clean, and the next migration works.

use std::fs::{self, File};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use pclive_tests::Programs;
use pclive_tests::identity::{Identities, differences, identities};
use pclive_tests::lab::{BitRate, injected};
use pclive_tests::load::{LoadSpec, Pace, Service};
use pclive_tests::patience::wait_until_none;
use pclive_tests::pclive::{Migrate, Outcome, Serve, exit};
use pclive_tests::scene::{Network, Scene};

use crate::moved::MIB;

/// Slow enough that whatever is to fail does so while the first round is on its way.
const SLOW: BitRate = BitRate(200_000_000);
/// When it fails.
const MIDWAY: Duration = Duration::from_millis(1500);

/// A Redis that answers a moderate load and takes several seconds to move.
struct Case {
    scene: Scene,
    before: Identities,
}

impl Case {
    fn new() -> Result<Self> {
        let load = LoadSpec { pace: Pace::PerSecond(500.0), ..LoadSpec::new(Service::Redis, 128 * MIB) };
        let scene = Scene::set(Programs::beside_own()?, &load, Network::Shared(Some(SLOW)))?;
        let before = identities(scene.lab().source().container_pid(&scene.container().name)?)?;
        Ok(Self { scene, before })
    }

    /// Starts a migration and returns while it is midway.
    fn midway(&self) -> Result<Migrate> {
        let migrate = self.scene.start_migration(&[])?;
        sleep(MIDWAY);
        Ok(migrate)
    }

    /// Starts a migration and returns in the middle of the blackout, which takes seconds if nothing is sent before.
    fn in_the_blackout(&self) -> Result<Migrate> {
        let migrate = self.scene.start_migration(&["--mode", "one-shot"])?;
        sleep(MIDWAY);
        assert!(!self.links_are_up()?, "the links are down in the blackout");
        Ok(migrate)
    }

    /// Whether the container can be reached at the source.
    fn links_are_up(&self) -> Result<bool> {
        let netns = self.scene.lab().source().container_netns(&self.scene.container().name);
        let flags = netns.enter(|| fs::read_to_string("/proc/thread-self/net/route"))??;
        Ok(flags.contains("eth0"))
    }

    /// Checks both hosts after `outcome`, then moves the container all the same.
    fn assert_untouched_and_movable(self, outcome: &Outcome) -> Result<()> {
        let (lab, name) = (self.scene.lab(), &self.scene.container().name);
        // Only when the destination has said how it ended may the next migration begin.
        wait_until_none(|| Ok(Serve::unfinished(lab.destination(), name)))?;
        wait_until_none(|| lab.traces(lab.destination(), name)).with_context(|| outcome.output.clone())?;
        self.assert_movable(outcome)
    }

    /// Checks the source after `outcome`, then moves the container all the same.
    fn assert_movable(mut self, outcome: &Outcome) -> Result<()> {
        let name = self.scene.container().name.clone();
        let (lab, output) = (self.scene.lab(), &outcome.output);
        let init = lab.source().container_pid(&name)?;
        assert_eq!(differences(&self.before, &identities(init)?), [""; 0], "{output}");
        assert_eq!(injected(init)?, [""; 0], "{output}");
        lab.shape(None)?;
        let moved = self.scene.migrate(&[])?;
        assert_eq!(moved.code, Some(exit::MOVED), "{}", moved.output);
        let (load, ..) = self.scene.stop_load()?;
        assert_eq!(load.complaint(), None, "{output}");
        Ok(())
    }
}

#[test]
fn a_missing_bundle() -> Result<()> {
    let case = Case::new()?;
    let bundle = case.scene.lab().destination().bundles().join(&case.scene.container().name);
    let hidden = bundle.with_extension("hidden");
    fs::rename(&bundle, &hidden)?;
    let outcome = case.scene.start_migration(&[])?.wait()?;
    assert_eq!(outcome.code, Some(exit::STAYED), "{}", outcome.output);
    assert!(outcome.output.contains(&case.scene.container().name), "it is named: {}", outcome.output);
    fs::rename(&hidden, &bundle)?;
    case.assert_untouched_and_movable(&outcome)
}

#[test]
fn a_killed_serve() -> Result<()> {
    let mut case = Case::new()?;
    let migrate = case.midway()?;
    case.scene.kill_serve()?;
    let outcome = migrate.wait()?;
    assert_eq!(outcome.code, Some(exit::STAYED), "{}", outcome.output);
    case.scene.restart_serve()?;
    // It clears away what the other one left before it listens.
    let (lab, name) = (case.scene.lab(), &case.scene.container().name);
    assert_eq!(lab.traces(lab.destination(), name)?, [""; 0]);
    case.assert_untouched_and_movable(&outcome)
}

#[test]
fn a_serve_killed_in_the_blackout() -> Result<()> {
    let mut case = Case::new()?;
    let migrate = case.in_the_blackout()?;
    // Somebody else uses the bundle while the next one starts: so that one finds the leftover only when it is asked.
    let bundle = case.scene.lab().destination().bundles().join(&case.scene.container().name);
    case.scene.kill_serve()?;
    let used =
        Flock::lock(File::open(bundle)?, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)?;
    let outcome = migrate.wait()?;
    assert_eq!(outcome.code, Some(exit::STAYED), "{}", outcome.output);
    case.scene.restart_serve()?;
    let (lab, name) = (case.scene.lab(), &case.scene.container().name);
    assert_ne!(lab.traces(lab.destination(), name)?, [""; 0], "there is a leftover");
    drop(used);
    case.assert_movable(&outcome)
}

#[test]
fn a_killed_migrate() -> Result<()> {
    let case = Case::new()?;
    let migrate = case.midway()?;
    migrate.signal(Signal::SIGKILL)?;
    let outcome = migrate.wait()?;
    assert_eq!(outcome.code, None, "{}", outcome.output);
    case.assert_untouched_and_movable(&outcome)
}

#[test]
fn a_migrate_killed_in_the_blackout() -> Result<()> {
    let case = Case::new()?;
    let migrate = case.in_the_blackout()?;
    migrate.signal(Signal::SIGKILL)?;
    let outcome = migrate.wait()?;
    assert_eq!(outcome.code, None, "{}", outcome.output);
    wait_until_none(|| Ok(if case.links_are_up()? { vec![] } else { vec!["links that are down"] }))?;
    case.assert_untouched_and_movable(&outcome)
}

#[test]
fn a_migrate_interrupted_in_the_blackout() -> Result<()> {
    let case = Case::new()?;
    let migrate = case.in_the_blackout()?;
    migrate.signal(Signal::SIGINT)?;
    let outcome = migrate.wait()?;
    assert_eq!(outcome.code, Some(exit::STAYED), "{}", outcome.output);
    assert!(case.links_are_up()?, "they are up before pclive ends");
    case.assert_untouched_and_movable(&outcome)
}

#[test]
fn an_interrupted_migrate() -> Result<()> {
    let case = Case::new()?;
    let migrate = case.midway()?;
    migrate.signal(Signal::SIGINT)?;
    let outcome = migrate.wait()?;
    assert_eq!(outcome.code, Some(exit::STAYED), "{}", outcome.output);
    case.assert_untouched_and_movable(&outcome)
}

#[test]
fn a_cut_link() -> Result<()> {
    let case = Case::new()?;
    let migrate = case.midway()?;
    case.scene.lab().cut_destination(true)?;
    let outcome = migrate.wait()?;
    assert_eq!(outcome.code, Some(exit::STAYED), "{}", outcome.output);
    case.scene.lab().cut_destination(false)?;
    case.assert_untouched_and_movable(&outcome)
}

#[test]
fn nobody_listens() -> Result<()> {
    let mut case = Case::new()?;
    case.scene.kill_serve()?;
    let outcome = case.scene.start_migration(&[])?.wait()?;
    assert_eq!(outcome.code, Some(exit::STAYED), "{}", outcome.output);
    case.scene.restart_serve()?;
    case.assert_untouched_and_movable(&outcome)
}
