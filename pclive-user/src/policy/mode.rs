//! The modes: one engine, of which each mode asks something else.
//!
//! | mode | the source freezes | the destination applies pages |
//! | --- | --- | --- |
//! | `one-shot` | before the first round | when everything has arrived |
//! | `pclive` | when [`super::convergence`] says so | when a round is complete |
//! | `pclive-g` | likewise | as they arrive |
//!
//! With `--restore-from N` the destination keeps the rounds before N, and applies them before or with round N, or with the
//! last one if that comes first.

use pclive_wire::Round;
use pclive_wire::control::ApplyMode;
use std::fmt;
use std::str::FromStr;

/// A way of migrating.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Freeze, move everything, restore at the end: the baseline.
    OneShot,
    /// PCLive: the destination applies a round once it is complete.
    Pclive,
    /// PCLiveG: pages are applied as they arrive.
    #[default]
    PcliveG,
}

impl Mode {
    /// Every mode.
    pub const ALL: [Self; 3] = [Self::OneShot, Self::Pclive, Self::PcliveG];

    /// The name, on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::OneShot => "one-shot",
            Self::Pclive => "pclive",
            Self::PcliveG => "pclive-g",
        }
    }

    /// Whether the container is frozen before the first round.
    pub fn freezes_first(self) -> bool {
        self == Self::OneShot
    }

    /// What the mode asks of the destination.
    pub fn apply_mode(self) -> ApplyMode {
        match self {
            Self::OneShot => ApplyMode::AtFreeze,
            Self::Pclive => ApplyMode::AtRoundEnd,
            Self::PcliveG => ApplyMode::OnArrival,
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// There is no mode of that name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no mode {0:?}; there are one-shot, pclive and pclive-g")]
pub struct UnknownMode(String);

impl FromStr for Mode {
    type Err = UnknownMode;

    fn from_str(name: &str) -> Result<Self, UnknownMode> {
        Self::ALL.into_iter().find(|mode| mode.name() == name).ok_or_else(|| UnknownMode(name.into()))
    }
}

/// Whether the destination applies pages of `round` as they arrive; else they join its backlog.
pub fn applies_on_arrival(apply: ApplyMode, restore_from: Round, round: Round) -> bool {
    apply == ApplyMode::OnArrival && round >= restore_from
}

/// Whether the destination applies its backlog, oldest pages first, now that all of `ended` has arrived. `last` says that
/// no pages will follow.
pub fn backlog_is_due(apply: ApplyMode, restore_from: Round, ended: Round, last: bool) -> bool {
    match apply {
        ApplyMode::AtFreeze => last,
        // Pages of the next round may be applied, so everything older has to be there before.
        ApplyMode::OnArrival => last || ended.0 + 1 >= restore_from.0,
        ApplyMode::AtRoundEnd => last || ended >= restore_from,
    }
}

/// How many rounds have ended when the backlog is applied before the freeze; 0 if it is not.
pub fn rounds_held(apply: ApplyMode, restore_from: Round) -> u32 {
    match apply {
        ApplyMode::AtFreeze => 0,
        ApplyMode::OnArrival => restore_from.0,
        ApplyMode::AtRoundEnd => restore_from.0.saturating_add(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for mode in Mode::ALL {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        assert!("fast".parse::<Mode>().is_err());
    }

    /// Each round: `A` its pages are applied as they arrive, `-` they wait, `b` they wait and the backlog is applied at its
    /// end.
    #[test]
    fn what_becomes_of_the_pages_of_each_round() {
        // Rounds 0, 1, 2 and 3, of which 3 is the last.
        for (mode, restore_from, expected) in [
            (Mode::PcliveG, 0, "AAAA"),
            (Mode::PcliveG, 1, "bAAA"),
            (Mode::PcliveG, 2, "-bAA"),
            (Mode::PcliveG, 9, "---b"),
            (Mode::Pclive, 0, "bbbb"),
            (Mode::Pclive, 2, "--bb"),
            (Mode::Pclive, 9, "---b"),
            (Mode::OneShot, 0, "---b"),
            (Mode::OneShot, 2, "---b"),
        ] {
            let (apply, restore_from) = (mode.apply_mode(), Round(restore_from));
            let fate = |round: u32| {
                let on_arrival = applies_on_arrival(apply, restore_from, Round(round));
                match (on_arrival, backlog_is_due(apply, restore_from, Round(round), round == 3)) {
                    (false, false) => '-',
                    (false, true) => 'b',
                    (true, false) => '!',
                    (true, true) => 'A',
                }
            };
            assert_eq!((0..4).map(fate).collect::<String>(), expected, "{mode} from {restore_from}");
        }
    }

    #[test]
    fn held_rounds_end_with_the_one_at_whose_end_the_backlog_is_due() {
        for mode in [Mode::Pclive, Mode::PcliveG] {
            for restore_from in (1..9).map(Round) {
                let (apply, held) = (mode.apply_mode(), rounds_held(mode.apply_mode(), restore_from));
                let is_due = |ended: u32| backlog_is_due(apply, restore_from, Round(ended), false);
                assert!(
                    (0..held - 1).all(|ended| !is_due(ended)) && is_due(held - 1),
                    "{mode} from {restore_from}"
                );
            }
        }
        assert_eq!(rounds_held(ApplyMode::AtFreeze, Round(3)), 0);
    }

    #[test]
    fn nothing_waits_when_newer_pages_are_applied() {
        for mode in Mode::ALL {
            for (restore_from, round) in (0..9).flat_map(|n| (1..9).map(move |r| (Round(n), r))) {
                let apply = mode.apply_mode();
                let older_done = backlog_is_due(apply, restore_from, Round(round - 1), false);
                let newer = applies_on_arrival(apply, restore_from, Round(round));
                assert!(older_done || !newer, "{mode} from {restore_from} in round {round}");
            }
        }
    }
}
