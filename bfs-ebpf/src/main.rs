//! The probes of bfs.
#![no_std]
#![no_main]
