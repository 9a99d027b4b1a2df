//! A migration that is cut short, at whatever moment: the container runs at one host, untouched, and never at both.

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use pclive_tests::lab::{BitRate, Host, Lab};
use pclive_tests::pclive::{Migrate, Outcome, Serve, exit};
use pclive_tests::workloads::running::Contained;
use std::time::Duration;

fn runs_at(host: &Host, name: &str) -> Result<bool> {
    Ok(host.state(name)?.is_some_and(|state| state.status == "running"))
}

/// Moves the tree and cuts that short after a time; says where it is. Whether it got away before is a matter of time.
fn cut_short(fault: impl Fn(&Migrate, &mut Serve) -> Result<()>, after: Duration) -> Result<Option<i32>> {
    let mut lab = Lab::new(Some(BitRate::GIGABIT))?;
    let mut tree = Contained::start(&mut lab, "tree", &["tree"])?;
    let name = tree.container.name.clone();
    let mut serve = Serve::start(&lab, lab.destination())?;
    let migrate = Migrate::start(&lab, lab.source(), &name, serve.address(), &[])?;
    std::thread::sleep(after);
    fault(&migrate, &mut serve)?;
    let Outcome { code, output, .. } = migrate.wait()?;
    println!("after {after:?}: exit code {code:?}: {}", output.lines().last().unwrap_or_default());
    let at = [runs_at(lab.source(), &name)?, runs_at(lab.destination(), &name)?];
    match code {
        Some(exit::MOVED) => assert_eq!(at, [false, true], "{output}"),
        Some(exit::STAYED) => {
            assert!(at[0], "{output}");
            // Nothing was touched, so nothing differs.
            tree.check(&lab)?;
            if serve.is_running()? {
                ensure!(!at[1], "the destination is not clean: {}", lab.destination().log("serve"));
                assert_eq!(lab.traces(lab.destination(), &name)?, Vec::<String>::new());
            }
        }
        Some(exit::UNKNOWN) => ensure!(!(at[0] && at[1]), "it runs at both hosts"),
        other => panic!("exit code {other:?}: {output}"),
    }
    Ok(code)
}

#[test]
fn a_cancelled_migration_leaves_the_container_where_it_was() -> Result<()> {
    let cancel = |migrate: &Migrate, _: &mut Serve| migrate.signal(Signal::SIGINT).or(Ok(()));
    let mut cancelled = 0;
    for after in [20, 150, 300, 450, 600, 800, 1000, 1300] {
        cancelled += u32::from(cut_short(cancel, Duration::from_millis(after))? == Some(exit::STAYED));
    }
    assert!(cancelled > 0, "every migration was faster");
    Ok(())
}

#[test]
fn a_destination_that_dies_leaves_the_container_where_it_was() -> Result<()> {
    let kill = |_: &Migrate, serve: &mut Serve| serve.kill();
    for after in [100, 300, 500, 700, 900, 1200] {
        cut_short(kill, Duration::from_millis(after))?;
    }
    Ok(())
}
