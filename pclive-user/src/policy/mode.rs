//! The modes: one engine, of which each mode asks something else.
//!
//! | mode | the source freezes | the destination applies pages |
//! | --- | --- | --- |
//! | `one-shot` | before the first round | when everything has arrived |
//! | `pclive` | when [`super::convergence`] says so | when a round is complete |
//! | `pclive-g` | likewise | as they arrive |
//!
//! With `--restore-from N` the destination keeps the rounds before N, and applies them when round N begins, or when the
//! last round does.

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

/// What the destination does with a batch of pages that has just arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Disposition {
    /// Apply it at once; whatever is still kept has to be applied before.
    Apply,
    /// Keep it until all of its round is there, then apply all that is kept, oldest first.
    UntilRoundEnd,
    /// Keep it beyond its round.
    Keep,
}

/// What to do with the pages of `round`, which is the `last` one or not. Known once the round's manifest is.
pub fn disposition(apply: ApplyMode, restore_from: Round, round: Round, last: bool) -> Disposition {
    match apply {
        // Everything that has not been applied has to be now.
        ApplyMode::OnArrival if last => Disposition::Apply,
        ApplyMode::AtRoundEnd | ApplyMode::AtFreeze if last => Disposition::UntilRoundEnd,
        _ if round < restore_from => Disposition::Keep,
        ApplyMode::OnArrival => Disposition::Apply,
        ApplyMode::AtRoundEnd => Disposition::UntilRoundEnd,
        ApplyMode::AtFreeze => Disposition::Keep,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Disposition::{Apply, Keep, UntilRoundEnd};

    #[test]
    fn names_are_read_as_they_are_written() {
        for mode in Mode::ALL {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        assert!("fast".parse::<Mode>().is_err());
    }

    #[test]
    fn what_becomes_of_the_pages_of_each_round() {
        // Rounds 0, 1, 2 and 3, of which 3 is the last.
        for (mode, restore_from, expected) in [
            (Mode::PcliveG, 0, [Apply, Apply, Apply, Apply]),
            (Mode::PcliveG, 2, [Keep, Keep, Apply, Apply]),
            (Mode::PcliveG, 9, [Keep, Keep, Keep, Apply]),
            (Mode::Pclive, 0, [UntilRoundEnd, UntilRoundEnd, UntilRoundEnd, UntilRoundEnd]),
            (Mode::Pclive, 1, [Keep, UntilRoundEnd, UntilRoundEnd, UntilRoundEnd]),
            (Mode::Pclive, 9, [Keep, Keep, Keep, UntilRoundEnd]),
            (Mode::OneShot, 0, [Keep, Keep, Keep, UntilRoundEnd]),
            (Mode::OneShot, 2, [Keep, Keep, Keep, UntilRoundEnd]),
        ] {
            let rounds = [0, 1, 2, 3];
            let got = rounds.map(|r| disposition(mode.apply_mode(), Round(restore_from), Round(r), r == 3));
            assert_eq!(got, expected, "{mode} from {restore_from}");
        }
    }
}
