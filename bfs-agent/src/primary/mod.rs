//! The role of the primary: capture, order, settle, ship.

pub mod capture;
pub mod clock;
pub mod contained;
pub mod control;
pub mod cron;
pub mod engine;
pub mod failure;
pub mod further;
pub mod images;
pub mod mend;
pub mod metrics;
pub mod mount_table;
pub mod policies;
pub mod preflight;
pub mod process;
pub mod reader;
pub mod recover;
pub mod rollback;
pub mod schedule;
pub mod session;
pub mod ship;
pub mod spool;
pub mod stop;
pub mod verify;
