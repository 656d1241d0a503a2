//! The role of the primary: capture, order, settle, ship.

pub mod capture;
pub mod control;
pub mod engine;
pub mod process;
pub mod reader;
pub mod session;
pub mod ship;
pub mod stop;
