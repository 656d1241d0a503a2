//! The BPF file system, where the probes are pinned.

use std::{fs, io, path::Path};

use super::CaptureError;

/// Where it is mounted.
pub(super) const BPF_FS: &str = "/sys/fs/bpf";
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

pub(super) fn no_bpf_fs(path: &Path, source: io::Error) -> CaptureError {
    CaptureError::NoBpfFs { path: path.to_owned(), source }
}

/// Mounts the BPF file system where it is missing.
pub(super) fn mount_bpf_fs() -> Result<(), CaptureError> {
    let path = Path::new(BPF_FS);
    let failed = |errno: rustix::io::Errno| no_bpf_fs(path, errno.into());
    let is_mounted = || rustix::fs::statfs(path).map(|stat| stat.f_type == BPF_FS_MAGIC);
    if is_mounted().map_err(failed)? {
        return Ok(());
    }
    // Two agents that start together must not mount one over the other.
    let dir = fs::File::open(path).map_err(|source| no_bpf_fs(path, source))?;
    rustix::fs::flock(&dir, rustix::fs::FlockOperation::LockExclusive).map_err(failed)?;
    if is_mounted().map_err(failed)? {
        return Ok(());
    }
    rustix::mount::mount("bpf", path, "bpf", rustix::mount::MountFlags::empty(), None).map_err(failed)
}
