//! The role of the backup host: receive, log, confirm, apply.
