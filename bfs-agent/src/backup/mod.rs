//! The role of the backup host: receive, log, confirm, apply.

pub mod access;
pub mod apply;
pub mod check;
pub mod connection;
pub mod damage;
pub mod digests;
mod door;
pub mod elsewhere;
pub mod error;
mod follow;
pub mod gate;
pub mod generations;
pub mod group;
pub mod history;
pub mod images;
pub mod index;
pub mod kinds;
pub mod look;
pub mod merge;
pub mod metrics;
mod newest;
pub mod past;
pub mod pieces;
pub mod places;
pub mod plan;
pub mod process;
pub mod read;
pub mod retention;
pub mod room;
pub mod serve;
mod step;
pub mod store;
pub mod sums;
pub mod target;
pub mod transfer;
pub mod watching;

pub use error::BackupError;
pub use serve::{Replayer, ReplayerHandle, ServeOptions, store_keys};

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod exhaustive_tests;
#[cfg(test)]
mod follow_tests;
#[cfg(test)]
mod foreign_tests;
#[cfg(test)]
mod merge_tests;
#[cfg(test)]
pub(crate) mod model;
