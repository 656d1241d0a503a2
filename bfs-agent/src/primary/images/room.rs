//! Whether there is room for a dump. What the program itself writes may be on the same disk: a dump must not be what
//! fills it.

use std::fs;
use std::path::Path;

use super::{ImagesError, other};

/// What stays free, bytes.
const MARGIN: u64 = 16 << 20;

/// Of the memory of a process what has to be written, bytes (proc(5)): its own, and what it shares with others, which is
/// written once. Pages of files are not.
fn memory(status: &str) -> (u64, u64) {
    let bytes = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        kib.unwrap_or(0) << 10
    };
    (bytes("RssAnon:") + bytes("VmSwap:"), bytes("RssShmem:"))
}

/// What a dump of these processes may have, bytes.
pub(super) fn memory_of(processes: &[u32]) -> u64 {
    let status = |process: &u32| fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let memory: Vec<_> = processes.iter().map(|process| memory(&status(process))).collect();
    let shared = memory.iter().map(|(_, shared)| *shared).max().unwrap_or(0);
    shared + memory.iter().map(|(own, _)| *own).sum::<u64>()
}

/// Looks whether so many bytes fit where images are written, with something left.
///
/// # Errors
/// [`ImagesError::Room`].
pub(super) fn check(folder: &Path, bytes: u64) -> Result<(), ImagesError> {
    let needed = MARGIN + bytes;
    let shown = folder.display().to_string();
    let disk = rustix::fs::statvfs(folder).map_err(|e| other(shown.clone())(e.into()))?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if free < needed { Err(ImagesError::Room(shown, needed >> 20, free >> 20)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_what_is_there_and_what_is_swapped() {
        let status = "VmRSS:\t 99 kB\nRssAnon:\t  2 kB\nRssFile:\t 93 kB\nRssShmem:\t 4 kB\nVmSwap:\t 1 kB\n";
        assert_eq!(memory(status), (3 << 10, 4 << 10));
        assert_eq!(memory("a kernel thread"), (0, 0));
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let dir = tempfile::tempdir().unwrap();
        check(dir.path(), 0).unwrap();
        let gone = dir.path().join("gone");
        assert!(matches!(check(&gone, 0), Err(ImagesError::Other(..))));
    }
}
