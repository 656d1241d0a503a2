//! What an agent has for further destinations: the real records of the last checkpoints, and what it knows of each.

use std::path::Path;

use bfs_common::record::{CheckpointId, Sequence};
use bfs_common::wire::GenerationLine;

use super::stream::Stream;
use crate::primary::further::{Steps, View};
use crate::primary::ship::Batch;

/// See the module.
pub struct Couriers {
    steps: Steps,
    view: Option<View>,
    /// The newest checkpoint of each that there is a connection to.
    known: Vec<Option<Option<GenerationLine>>>,
}

impl Couriers {
    /// Of an agent that begins to tell what happens.
    pub fn new(folder: &Path, bytes_max: u64, stream: &Stream, count: usize) -> Self {
        let steps = Steps::new(folder, bytes_max, stream.roots()).expect("a file without a name");
        Self { steps, view: None, known: vec![None; count] }
    }

    /// More of the stream. Now and then the keeper cannot follow.
    pub fn take(&mut self, batch: &Batch, first_applied: CheckpointId) {
        if batch.first.0.is_multiple_of(29) || !self.steps.take(batch).expect("memory") {
            return;
        }
        let number = |known: &Option<Option<GenerationLine>>| {
            known.iter().flatten().next().map_or(CheckpointId(0), |line| line.checkpoint)
        };
        let needed = self.known.iter().map(number).chain([first_applied]).min();
        self.steps.trim(needed.unwrap_or(CheckpointId(0)));
        self.view = Some(self.steps.view());
    }

    /// What may go out.
    pub fn sealed(&self, sealed: Sequence) -> Option<View> {
        Some(self.view.clone()?.sealed(sealed))
    }

    /// The newest checkpoint of a destination, which is asked where there is no connection yet.
    pub fn newest(
        &mut self,
        of: usize,
        ask: impl FnOnce() -> Option<GenerationLine>,
    ) -> Option<GenerationLine> {
        self.known[of].get_or_insert_with(ask).clone()
    }

    /// It said that it has this one.
    pub fn has(&mut self, of: usize, newest: GenerationLine) {
        self.known[of] = Some(Some(newest));
    }

    /// The connection to it is gone.
    pub fn hang_up(&mut self, of: usize) {
        self.known[of] = None;
    }
}
