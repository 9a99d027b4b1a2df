//! What every part of the tree can do: look after its own kernel objects.

use std::fmt::{Debug, Display};

/// One kind of kernel object, remembered and compared.
pub trait Probe {
    /// What it looks after, in a word.
    fn name(&self) -> &'static str;

    /// Compares everything with what was remembered, and uses it once to see that it still works.
    fn check(&mut self, findings: &mut Findings);

    /// Numbers that grow for as long as all is well.
    fn counters(&mut self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// Changes something behind its own back, to prove that the next check notices.
    fn spoil(&mut self);
}

/// What differs, in words.
#[derive(Debug, Default)]
pub struct Findings {
    about: &'static str,
    list: Vec<String>,
}

impl Findings {
    /// Whose findings follow.
    pub fn about(&mut self, probe: &'static str) {
        self.about = probe;
    }

    /// Everything found.
    pub fn into_list(self) -> Vec<String> {
        self.list
    }

    /// Something differs.
    pub fn add(&mut self, what: impl Display) {
        self.list.push(format!("{}: {what}", self.about));
    }

    /// Two values must be equal.
    pub fn equal<T: PartialEq + Debug>(&mut self, what: impl Display, expected: T, found: T) {
        if expected != found {
            self.add(format!("{what}: expected {expected:?}, found {found:?}"));
        }
    }

    /// Something must hold.
    pub fn that(&mut self, holds: bool, otherwise: impl Display) {
        if !holds {
            self.add(otherwise);
        }
    }

    /// A call must succeed.
    pub fn succeed<T, E: Display>(&mut self, call: impl Display, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.add(format!("{call}: {error}"))).ok()
    }
}
