//! Generations that leave a store and come into one, in the form of [`crate::transfer`].

mod receive;
mod send;

use bfs_common::record::CheckpointId;

use super::index::GenerationRow;
use crate::transfer::Moment;

pub(in crate::backup) use receive::{Busy, Incoming, Receiver, Whole, finish_all, follows};
pub(in crate::backup) use send::send;

/// A generation of a store, as both sides know it.
pub(in crate::backup) fn moment_of(checkpoint: CheckpointId, row: &GenerationRow) -> Moment {
    Moment { checkpoint, label: row.label.clone(), roots: row.roots.clone() }
}

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod tests;
