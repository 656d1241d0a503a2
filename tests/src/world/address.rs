//! Where the replayer is, and how agents get there.

use super::{Transport, World};

impl World {
    /// What `--listen` is given.
    pub(super) fn listens(&self) -> String {
        match self.transport {
            Transport::Unix => format!("unix:{}", self.address),
            Transport::Tcp => format!("tcp://{}", self.address),
        }
    }

    /// What `--backup` is given.
    #[must_use]
    pub fn destination(&self) -> String {
        self.through.as_ref().map_or_else(|| self.listens(), |address| format!("tcp://{address}"))
    }

    /// Socket path or HOST:PORT of the replayer.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Agents come by this HOST:PORT, which leads to the replayer.
    pub fn through(&mut self, address: String) {
        self.through = Some(address);
    }
}
