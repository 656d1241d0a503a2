//! One courier for each destination: sets of images go to all of them, and nobody waits for another.

use std::io;
use std::path::Path;
use std::sync::Arc;

use bfs_common::record::CheckpointId;

use super::courier::{By, Courier, Shipped};
use crate::primary::ship::{Connect, Limit};

/// A destination of images.
pub struct To {
    /// As given to `--backup`; none of the first destination.
    pub address: Option<String>,
    /// How to reach it.
    pub connect: Connect,
    /// What it is sent at most, with what else goes there.
    pub limit: Option<Arc<Limit>>,
    /// What it knows us by.
    pub by: By,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Couriers {
    all: Vec<(Option<String>, Courier)>,
    /// How many there were.
    begun: u32,
}

impl Couriers {
    /// One more destination of this group.
    ///
    /// # Errors
    /// When there is no thread for it.
    pub fn add(&mut self, to: To, group: &str) -> io::Result<()> {
        let address = to.address.clone();
        self.begun += 1;
        let courier = Courier::start(to, group, self.begun)?;
        self.all.push((address, courier));
        Ok(())
    }

    fn find(&self, address: &str) -> Option<&Courier> {
        let is = |known: &Option<String>| known.as_deref() == Some(address);
        self.all.iter().find(|(known, _)| is(known)).map(|(_, courier)| courier)
    }

    /// It is none any more.
    pub fn remove(&mut self, address: &str) {
        self.all.retain(|(known, _)| known.as_deref() != Some(address));
    }

    /// Nothing more is sent there, or it goes on.
    pub fn pause(&self, address: &str, pause: bool) {
        if let Some(courier) = self.find(address) {
            courier.pause(pause);
        }
    }

    /// These are to be brought to all, as soon as their checkpoint, which was made then, is there.
    pub(super) fn bring(&self, checkpoint: CheckpointId, folder: &Path, made_ns: i64) {
        for (_, courier) in &self.all {
            courier.bring(checkpoint, folder.to_owned(), made_ns);
        }
    }

    /// The sets that are being brought: they have to stay where they are.
    pub(super) fn hands(&self) -> Vec<CheckpointId> {
        let mut hands: Vec<_> = self.all.iter().filter_map(|(_, courier)| courier.hand()).collect();
        hands.sort_unstable();
        hands.dedup();
        hands
    }

    /// What came of it at the first destination.
    #[must_use]
    pub fn first(&self) -> Shipped {
        let first = self.all.iter().find(|(address, _)| address.is_none());
        first.map(|(_, courier)| courier.shipped()).unwrap_or_default()
    }

    /// And at the others.
    #[must_use]
    pub fn further(&self) -> Vec<(String, Shipped)> {
        let further = self.all.iter().filter_map(|(address, courier)| Some((address.clone()?, courier)));
        further.map(|(address, courier)| (address, courier.shipped())).collect()
    }
}
