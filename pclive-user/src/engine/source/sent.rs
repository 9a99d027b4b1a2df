//! What the destination has, as far as the source needs to know it: to send only what differs.

use crate::track::digests::{Digests, random_seed};
use pclive_wire::NsPid;
use pclive_wire::layout::mapped_anew;
use pclive_wire::manifest::{Process, Vma};
use std::collections::HashMap;

/// Everything that has been sent on one connection.
#[derive(Debug)]
pub struct Sent {
    seed: u64,
    processes: HashMap<NsPid, AddressSpace>,
}

#[derive(Debug)]
struct AddressSpace {
    layout: Vec<Vma>,
    digests: Digests,
}

impl Sent {
    /// Nothing yet.
    pub fn nothing() -> Result<Self, getrandom::Error> {
        Ok(Self { seed: random_seed()?, processes: HashMap::new() })
    }

    /// Notes that the destination makes its skeleton equal to these processes: it ends the others, and loses the pages of
    /// what it maps anew.
    pub fn reconciled(&mut self, processes: &[Process]) {
        let mut before = std::mem::take(&mut self.processes);
        for process in processes {
            let mut space = before
                .remove(&process.pid)
                .unwrap_or_else(|| AddressSpace { layout: Vec::new(), digests: Digests::new(self.seed) });
            for range in mapped_anew(&space.layout, &process.vmas) {
                space.digests.forget(range);
            }
            space.layout.clone_from(&process.vmas);
            self.processes.insert(process.pid, space);
        }
    }

    /// What it has of one process, which was among the last [`Sent::reconciled`].
    pub fn digests(&mut self, pid: NsPid) -> Option<&mut Digests> {
        self.processes.get_mut(&pid).map(|space| &mut space.digests)
    }
}
