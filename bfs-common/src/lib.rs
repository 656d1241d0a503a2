//! What the probes, the agent and the replayer share.
//!
//! [`abi`] is the kernel/user ABI: plain `repr(C)` structs, no allocator, also compiled for the
//! BPF target. The modules behind the feature `formats` hold the records of the stream
//! ([`record`]), how records are laid out in bytes ([`codec`]), the frames of the connection
//! ([`wire`], [`refusal`]) and what they ask about older checkpoints ([`past`]). There is no I/O in this crate.
#![cfg_attr(not(any(test, feature = "formats")), no_std)]

pub mod abi;
#[cfg(feature = "formats")]
pub mod codec;
#[cfg(feature = "formats")]
pub mod past;
#[cfg(feature = "formats")]
pub mod record;
#[cfg(feature = "formats")]
pub mod refusal;
#[cfg(feature = "formats")]
pub mod wire;
