//! The two command lines.

pub mod agent;
pub mod replayer;
