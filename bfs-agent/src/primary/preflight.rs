//! What is checked before anything is started, so that a mistake costs nothing.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use super::failure::{Failure, Kind};
use super::images;
use super::spool::{self, SpoolOptions};
use crate::keys::Folder;
use crate::net::Destination;

/// Where the kernel shows its types.
pub const BTF: &str = "/sys/kernel/btf/vmlinux";
/// Another place to look for them, for tests.
pub const BTF_VARIABLE: &str = "BFS_BTF";

/// Whether this user may capture.
///
/// # Errors
/// [`Kind::NotRoot`].
pub fn check_user() -> Result<(), Failure> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(Failure::new(
        Kind::NotRoot,
        "capturing needs root: loading probes into the kernel is refused to other users",
        "run it with sudo; the command of `run` can become another user again: \
         `bfs-agent run ... -- setpriv --reuid USER --regid GROUP --init-groups CMD`",
    ))
}

/// Whether the kernel describes its types.
///
/// # Errors
/// [`Kind::NoBpf`].
pub fn check_kernel() -> Result<(), Failure> {
    let path = std::env::var_os(BTF_VARIABLE).map_or_else(|| PathBuf::from(BTF), PathBuf::from);
    fs::metadata(&path).map(drop).map_err(|e| {
        Failure::new(
            Kind::NoBpf,
            format!("this kernel has no BTF: {}: {e}", path.display()),
            "use a kernel >= 6.12 built with CONFIG_DEBUG_INFO_BTF=y (those of the distributions are)",
        )
    })
}

/// Inode of the initial PID namespace (`PROC_PID_INIT_INO`, include/linux/proc_ns.h).
const INITIAL_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

/// Whether process numbers here are those that the probes see.
///
/// # Errors
/// [`Kind::NoBpf`].
pub fn check_namespace() -> Result<(), Failure> {
    match rustix::fs::stat("/proc/self/ns/pid") {
        Ok(stat) if stat.st_ino == INITIAL_PID_NAMESPACE => Ok(()),
        _ => Err(Failure::new(
            Kind::NoBpf,
            "this is not the host's PID namespace: the probes see other process numbers than the agent",
            "run the agent on the host, or in a container with the host's PID namespace",
        )),
    }
}

/// The subtrees in their real place: absolute, without symlinks. None may lie in another, nor
/// overlap the store.
///
/// # Errors
/// [`Kind::Path`].
pub fn check_roots(paths: &[PathBuf], backups: &[Destination]) -> Result<Vec<PathBuf>, Failure> {
    let mut roots: Vec<PathBuf> = Vec::new();
    for path in paths {
        let shown = path.display();
        let root = fs::canonicalize(path).map_err(|e| {
            Failure::new(Kind::Path, format!("--path {shown}: {e}"), "give a directory that exists")
        })?;
        if !root.is_dir() {
            let hint = format!("give the directory that it is in: --path {}", parent(&root).display());
            return Err(Failure::new(Kind::Path, format!("--path {shown} is not a directory"), hint));
        }
        if let Some(other) = overlapping(&root, &roots) {
            return Err(Failure::new(
                Kind::Path,
                format!("--path {shown} and --path {} overlap", other.display()),
                "give the outer one only: everything below it belongs to it",
            ));
        }
        roots.push(root);
    }
    for backup in backups {
        check_store(backup, &roots)?;
    }
    Ok(roots)
}

/// Whether a store of this machine lies outside of the subtrees, as far as paths tell.
///
/// # Errors
/// [`Kind::Path`].
pub fn check_store(backup: &Destination, roots: &[PathBuf]) -> Result<(), Failure> {
    let Destination::Dir(store) = backup else { return Ok(()) };
    let store = real_place(store);
    let Some(root) = roots.iter().find(|r| store.starts_with(r) || r.starts_with(&store)) else {
        return Ok(());
    };
    Err(Failure::new(
        Kind::Path,
        format!("--path {} overlaps the store {}", root.display(), store.display()),
        "put the store on another disk, outside of every --path",
    ))
}

/// Whether the replayer of a destination is known, before anything is started.
///
/// # Errors
/// [`Kind::Usage`].
pub fn check_paired(folder: &Folder, backup: &Destination) -> Result<(), Failure> {
    let Destination::Tcp(_) = backup else { return Ok(()) };
    let peers = folder.peers()?;
    if !peers.replayer_keys(&backup.to_string()).is_empty() {
        return Ok(());
    }
    let mut known: Vec<&str> = peers.replayers.iter().map(|replayer| replayer.address.as_str()).collect();
    known.dedup();
    let known = if known.is_empty() {
        String::new()
    } else {
        format!(" (it is with {}: an address has to be written as it was then)", known.join(", "))
    };
    Err(Failure::new(
        Kind::Usage,
        format!("--backup {backup}: this host is not paired with that replayer{known}"),
        format!("bfs-replayer pair --store STORE, there; then here: bfs-agent pair {backup} TOKEN"),
    ))
}

/// Whether the spool lies outside of the subtrees, as far as paths tell.
///
/// # Errors
/// [`Kind::Path`].
pub fn check_spool(spool: &SpoolOptions, group: &str, roots: &[PathBuf]) -> Result<(), Failure> {
    if spool.bytes_max == 0 {
        return Ok(());
    }
    match overlapping(&real_place(&spool::folder(spool, group)), roots) {
        Some(root) => Err(spool_inside(spool, root)),
        None => Ok(()),
    }
}

/// The images of processes are not in what is replicated.
///
/// # Errors
/// [`Kind::Path`].
pub fn check_images(directory: &Path, group: &str, roots: &[PathBuf]) -> Result<(), Failure> {
    let folder = images::folder(directory, group);
    overlapping(&real_place(&folder), roots).map_or(Ok(()), |root| {
        Err(Failure::new(
            Kind::Path,
            format!("--path {} overlaps the process images in {}", root.display(), folder.display()),
            "give another folder with --process-dir DIR, outside of every --path",
        ))
    })
}

/// The refusal of a spool in what is replicated.
#[must_use]
pub fn spool_inside(spool: &SpoolOptions, root: &Path) -> Failure {
    Failure::new(
        Kind::Path,
        format!("--path {} overlaps the spool in {}", root.display(), spool.directory.display()),
        "give another folder with --spool DIR, outside of every --path, or none with --spool-size 0",
    )
}

/// The one of the subtrees that a further one lies in, or the other way round.
#[must_use]
pub fn overlapping<'a>(root: &Path, roots: &'a [PathBuf]) -> Option<&'a PathBuf> {
    roots.iter().find(|r| root.starts_with(r) || r.starts_with(root))
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}

/// Where a path that need not exist yet will be: the part that exists without symlinks, the rest
/// as it is.
fn real_place(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut rest: Vec<OsString> = Vec::new();
    let mut known: &Path = &absolute;
    loop {
        if let Ok(real) = fs::canonicalize(known) {
            return rest.iter().rev().fold(real, |place, part| place.join(part));
        }
        let (Some(name), Some(up)) = (known.file_name(), known.parent()) else { return absolute };
        rest.push(name.to_owned());
        known = up;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(paths: &[&Path], backup: &str) -> Result<Vec<PathBuf>, Kind> {
        let paths: Vec<PathBuf> = paths.iter().map(|p| p.to_path_buf()).collect();
        check_roots(&paths, &[backup.parse().unwrap()]).map_err(|f| {
            assert!(!f.message.is_empty() && !f.hint.is_empty());
            f.kind
        })
    }

    #[test]
    fn roots_are_checked() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        fs::create_dir_all(a.join("in")).unwrap();
        fs::create_dir(&b).unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        std::os::unix::fs::symlink(&a, dir.path().join("link")).unwrap();
        let real = |p: &Path| fs::canonicalize(p).unwrap();

        assert_eq!(kind(&[&dir.path().join("link"), &b], "unix:/x"), Ok(vec![real(&a), real(&b)]));
        assert_eq!(kind(&[&dir.path().join("none")], "unix:/x"), Err(Kind::Path));
        assert_eq!(kind(&[&dir.path().join("file")], "unix:/x"), Err(Kind::Path));
        assert_eq!(kind(&[&a.join("in"), &dir.path().join("link")], "unix:/x"), Err(Kind::Path));
        assert_eq!(
            kind(&[&a], &format!("dir:{}/new/store", dir.path().join("link").display())),
            Err(Kind::Path)
        );
        assert_eq!(kind(&[&a], &format!("dir:{}", dir.path().display())), Err(Kind::Path));
        assert_eq!(kind(&[&a], &format!("dir:{}/ab", dir.path().display())), Ok(vec![real(&a)]));
    }
}
