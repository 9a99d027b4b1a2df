//! Selections of the matrix.

use super::matrix::{Group, Mode, Mover, Setting, Tracker, Workload};

/// The sizes of the full matrix in MiB; those too large for the machine are listed as such.
const SIZES_MIB: [u64; 7] = [128, 256, 512, 1024, 2048, 4096, 8192];
/// Its links in Mbit/s.
const RATES_MBIT: [u64; 3] = [1_000, 10_000, 0];
/// The first rounds that delayed restoration is shown with.
const RESTORE_FROM: [u32; 2] = [2, 4];
/// The data set of the README's figures.
const BASE_MIB: u64 = 1024;
/// Their link.
const BASE_MBIT: u64 = 1_000;
/// What the write-heavy load of the README's figures writes to.
const HOT_MIB: u64 = 10;

/// A look at everything in less than five minutes.
pub fn quick() -> Vec<Group> {
    let setting = |workload| Setting::new(workload, 128, BASE_MBIT);
    vec![
        Group { setting: setting(Workload::Redis90), movers: Mode::ALL.map(Mover::mode).to_vec() },
        Group { setting: setting(Workload::Redis10).hot(HOT_MIB), movers: vec![Mover::mode(Mode::PcliveG)] },
        Group { setting: setting(Workload::Memcached), movers: vec![Mover::mode(Mode::PcliveG)] },
    ]
}

/// The figures of the README, each of which has a goal.
pub fn goals() -> Vec<Group> {
    let setting = |workload, mib| Setting::new(workload, mib, BASE_MBIT);
    vec![
        Group { setting: setting(Workload::Redis90, BASE_MIB), movers: Mode::ALL.map(Mover::mode).to_vec() },
        Group {
            setting: setting(Workload::Redis10, BASE_MIB).hot(HOT_MIB),
            movers: [Mode::PcliveG, Mode::Pclive].map(Mover::mode).to_vec(),
        },
        Group { setting: setting(Workload::Redis90, 128), movers: vec![Mover::mode(Mode::PcliveG)] },
    ]
}

/// Every value of every axis. Not each with each, which would take days: one axis after the other leaves the setting of the
/// README's figures, and in that every mover is measured, with every load.
pub fn full() -> Vec<Group> {
    let apart = |mib, rate| Group {
        setting: Setting::new(Workload::Redis90, mib, rate),
        movers: Mode::ALL.map(Mover::mode).to_vec(),
    };
    let loads = Workload::ALL.map(|workload| Setting::new(workload, BASE_MIB, BASE_MBIT)).into_iter();
    let write_heavy = Setting::new(Workload::Redis10, BASE_MIB, BASE_MBIT).hot(HOT_MIB);
    let loads = loads.chain([write_heavy]).map(|setting| Group { setting, movers: every_mover() });
    let sizes = SIZES_MIB.into_iter().filter(|mib| *mib != BASE_MIB).map(|mib| apart(mib, BASE_MBIT));
    let rates = RATES_MBIT.into_iter().filter(|rate| *rate != BASE_MBIT).map(|rate| apart(BASE_MIB, rate));
    loads.chain(rates).chain(sizes).collect()
}

/// Each mode, then the default mode with each tracker and each first round.
fn every_mover() -> Vec<Mover> {
    let mode = Mode::PcliveG;
    let modes = Mode::ALL.map(Mover::mode).into_iter();
    let trackers = Tracker::TIERS.map(|tracker| Mover::pclive(mode, tracker, 0));
    let delayed = RESTORE_FROM.map(|restore_from| Mover::pclive(mode, Tracker::Auto, restore_from));
    modes.chain(trackers).chain(delayed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_preset_has_a_cell_twice() {
        for preset in [quick(), goals(), full()] {
            for (number, group) in preset.iter().enumerate() {
                assert!(preset[..number].iter().all(|other| other.setting != group.setting), "{group:?}");
                for (number, mover) in group.movers.iter().enumerate() {
                    assert!(!group.movers[..number].contains(mover), "{group:?}");
                }
            }
        }
    }

    #[test]
    fn the_full_preset_has_every_value() {
        let full = full();
        assert!(
            Workload::ALL.iter().all(|workload| full.iter().any(|group| group.setting.workload == *workload))
        );
        assert!(SIZES_MIB.iter().all(|mib| full.iter().any(|group| group.setting.data_mib == *mib)));
        assert!(RATES_MBIT.iter().all(|rate| full.iter().any(|group| group.setting.rate_mbit == *rate)));
    }
}
