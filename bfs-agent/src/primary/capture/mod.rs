//! The probes: loading, pinning, the ring and the maps.

mod bpf_fs;
pub mod btf;
pub mod foreign;
mod log;
pub mod mapped;
pub mod probes;
pub mod ring;
mod sys;
mod uring;

use std::{io, path::PathBuf};

pub use probes::{LoadOptions, Probes};
pub use ring::{Record, Ring};
pub(crate) use sys::page_size;

/// Why capture cannot begin or go on.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// Loading probes is not allowed.
    #[error("loading the probes needs root (CAP_BPF and CAP_PERFMON): run it with sudo")]
    NotRoot,
    /// The kernel says nothing about its structs.
    #[error("this kernel has no usable BTF at {path} ({reason}): bfs needs a kernel built with CONFIG_DEBUG_INFO_BTF=y", path = path.display())]
    NoBtf {
        /// Where it was looked for.
        path: PathBuf,
        /// What was wrong.
        reason: String,
    },
    /// A subtree lies on btrfs, and where its files say of which subvolume they are is not known.
    #[error(
        "this kernel does not say how a file on btrfs is recognised (/sys/kernel/btf/btrfs): nothing could be captured there"
    )]
    NoBtrfs,
    /// No place to pin maps.
    #[error("the BPF file system cannot be used at {path}: {source}", path = path.display())]
    NoBpfFs {
        /// Where it should be.
        path: PathBuf,
        /// What was wrong.
        source: io::Error,
    },
    /// The kernel refused a probe.
    #[error("the kernel refused the probe {program}: {reason}\n{log}")]
    Load {
        /// The probe.
        program: String,
        /// The error.
        reason: String,
        /// The last lines of the verifier's log.
        log: String,
    },
    /// A kernel struct is not as expected.
    #[error("this kernel has no field {composite}.{field}: please report its version")]
    MissingField {
        /// The struct.
        composite: &'static str,
        /// The member that was looked for.
        field: &'static str,
    },
    /// What is pinned was made by another version.
    #[error("the probes pinned at {path} have interface version {found}, this agent has {expected}: end them with the version that made them, or remove that directory", path = path.display())]
    AbiMismatch {
        /// The directory.
        path: PathBuf,
        /// The version there.
        found: u64,
        /// The version of this program.
        expected: u64,
    },
    /// Something of that name is pinned already.
    #[error("probes are pinned at {path} already: another agent serves this group, or left them to a successor", path = path.display())]
    AlreadyPinned {
        /// The directory.
        path: PathBuf,
    },
    /// Options that cannot be.
    #[error("capture options: {0}")]
    Options(String),
    /// A system call on the probes failed.
    #[error("{what}: {source}")]
    Kernel {
        /// What was tried.
        what: String,
        /// The error.
        source: io::Error,
    },
}
