//! End to end: real probes, real daemons, real programs.
//!
//! Nothing here uses a crate of the project, so what the tests believe cannot be wrong in the same
//! way as what they test. [`oracle`] compares trees, [`copy`] makes exact ones, [`world`] is one
//! replayer, one agent and one program with everything that belongs to them, [`leash`] ends all of
//! it, [`programs`] are the programs that are replicated, each with a check of what it left,
//! [`watch`] waits for conditions, [`exercise`] is what is done with every program, [`rows`] are the ways to
//! change a file, one by one, [`faults`] makes system calls of a daemon fail,
//! [`network`] what is between the two, [`hosts`] two machines on one, [`stores`] what stores say and give back,
//! [`processes`] programs that are dumped and restored.

pub mod bad_disk;
pub mod copy;
pub mod exercise;
pub mod faults;
pub mod hosts;
pub mod leash;
pub mod ledger;
pub mod network;
pub mod oracle;
pub mod processes;
pub mod programs;
pub mod random;
pub mod rows;
pub mod stores;
pub mod watch;
pub mod world;
