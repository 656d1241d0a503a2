//! The agent of the primary and the replayer of the backup, as a library.
//!
//! The two roles, [`primary`] and [`backup`], know each other only through the records of
//! `bfs-common`. What both need stands beside them: [`net`] (addresses, frames, authentication),
//! [`keys`] (who a host is, and whom it trusts), [`log`] (records in segments, durable), [`tree`] (files and attributes), [`generation`] (reading checkpoints
//! that are kept), [`transfer`] (one of them as a stream of bytes), [`mount`] (one of them as a file system) and [`service`] (the service manager). [`cli`] holds the two command lines; the binaries
//! are thin. [`nearest`] finds the word that was meant. [`policy`] says what is done with single files. [`alert`] tells somebody. [`durable`] is what makes things survive a power cut, [`mutant`] nothing but tests.

pub mod alert;
pub mod backup;
pub mod cli;
pub mod durable;
pub mod generation;
pub mod keys;
pub mod lock;
pub mod log;
mod metrics;
pub mod mount;
pub mod mutant;
pub mod nearest;
pub mod net;
pub mod policy;
pub mod primary;
pub mod service;
#[cfg(test)]
mod simulation;
pub mod transfer;
pub mod tree;
