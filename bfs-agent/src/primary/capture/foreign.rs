//! What others than the selected tasks change: the maps `FOREIGN`, `STRANGERS` and `ROOTS`.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use aya::{Btf, Ebpf};
use bfs_common::abi::{InodeId, ROOTS_MAX, STRANGERS_MAX, Stranger};

use super::btf::KernelTypes;
use super::probes::{ask, link_name, refused, tracepoint};
use super::{CaptureError, sys};

/// The probes. A kernel may lack them: all or none are there.
pub(super) const PROGRAMS: [&str; 3] = ["inode_set_ctime_to_ts", "ctime_ns_xchg", "ctime_xchg_skip"];

/// Attached to nothing, run by the agent with a descriptor of its own.
pub(super) const WRITERS: &str = "writers";
/// The same.
pub(super) const CONCERNS: &str = "concerns";

/// Loads the probes; whether the kernel has what they need.
pub(super) fn load(ebpf: &mut Ebpf, types: &KernelTypes, btf: &Btf) -> bool {
    PROGRAMS.iter().all(|name| {
        types.trace_arguments(name).is_some()
            && tracepoint(ebpf, name)
                .and_then(|probe| probe.load(name, btf).map_err(|error| refused(name, &error)))
                .inspect_err(|error| tracing::info!("what others change is not seen: {error}"))
                .is_ok()
    })
}

/// See the module.
pub struct Foreign {
    meta: OwnedFd,
    waiting: OwnedFd,
    strangers: OwnedFd,
    roots: OwnedFd,
    writers: OwnedFd,
    concerns: OwnedFd,
    is_seen: bool,
}

fn failed(what: &str) -> impl FnOnce(io::Error) -> CaptureError {
    move |source| CaptureError::Kernel { what: what.to_owned(), source }
}

impl Foreign {
    /// What is pinned in a directory.
    pub(super) fn open(pin_dir: &Path) -> Result<Self, CaptureError> {
        let open = |name: &str| {
            let path = pin_dir.join(name);
            sys::open_pin(&path).map_err(failed(&format!("cannot open the pin {}", path.display())))
        };
        Ok(Self {
            meta: open("META")?,
            waiting: open("FOREIGN")?,
            strangers: open("STRANGERS")?,
            roots: open("ROOTS")?,
            writers: open(WRITERS)?,
            concerns: open(CONCERNS)?,
            is_seen: PROGRAMS.iter().all(|name| pin_dir.join(link_name(name)).exists()),
        })
    }

    /// Whether the kernel tells what others change.
    #[must_use]
    pub fn is_seen(&self) -> bool {
        self.is_seen
    }

    /// What this process changes is not what others change.
    pub fn set_agent(&self) -> Result<(), CaptureError> {
        sys::read_meta(self.meta.as_fd())
            .and_then(|mut meta| {
                meta[3] = u64::from(std::process::id());
                sys::update(self.meta.as_fd(), &0u32, &meta, 0)
            })
            .map_err(failed("cannot tell the probes who the agent is"))
    }

    /// The record of an object was taken out of the ring: what changes from now on gets a new one.
    pub fn taken(&self, object: InodeId) -> Result<(), CaptureError> {
        sys::delete(self.waiting.as_fd(), &object)
            .map(drop)
            .map_err(failed("cannot note that a change by others was seen"))
    }

    /// Below which directories changes count.
    pub fn set_roots(&self, roots: &[InodeId]) -> Result<(), CaptureError> {
        set_roots(self.roots.as_fd(), roots)
    }

    /// The processes that changed something, by thread group; 0 stands for those that found no room.
    pub fn strangers(&self) -> Result<Vec<(u32, Stranger)>, CaptureError> {
        sys::entries(self.strangers.as_fd(), STRANGERS_MAX, false)
            .map_err(failed("cannot read who changed something"))
    }

    /// Whether an open file has a name below one of the directories, or may have one.
    pub fn concerns(&self, file: BorrowedFd<'_>) -> Result<bool, CaptureError> {
        ask(&self.concerns, file).map(|answer| answer != 0).map_err(failed("cannot ask where a file is"))
    }

    /// How many open files may write to an open file; `None` where the kernel does not tell.
    pub fn writers(&self, file: BorrowedFd<'_>) -> Result<Option<u32>, CaptureError> {
        let answer = ask(&self.writers, file).map_err(failed("cannot ask who may write"))?;
        Ok(u32::try_from(answer).ok().and_then(|answer| answer.checked_sub(1)))
    }
}

/// The same, before the probes run.
pub(super) fn tell_roots(pin_dir: &Path, roots: &[InodeId]) -> Result<(), CaptureError> {
    let map = sys::open_pin(&pin_dir.join("ROOTS")).map_err(failed("cannot open ROOTS"))?;
    set_roots(map.as_fd(), roots)
}

/// Below which directories changes count. More than the probes tell apart, or none, are all of their file systems.
fn set_roots(map: BorrowedFd<'_>, roots: &[InodeId]) -> Result<(), CaptureError> {
    let mut numbers = [0u64; ROOTS_MAX];
    if roots.len() > ROOTS_MAX || roots.is_empty() {
        numbers[0] = u64::MAX;
    } else {
        for (number, root) in numbers.iter_mut().zip(roots) {
            *number = root.ino;
        }
    }
    sys::update(map, &0u32, &numbers, 0).map_err(failed("cannot tell the probes the directories"))
}
