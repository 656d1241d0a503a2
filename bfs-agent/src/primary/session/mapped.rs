//! Shared writable mappings that were there before the probes, or before this agent.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use bfs_common::abi::InodeId;
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::link::{Link, probes_failed};
use super::work::Work;
use crate::primary::engine::host::HostError;

/// How often the mappings of a process that changes them all the time are looked at.
const LOOKS_MAX: u32 = 20;

impl Work {
    /// Files of the group that a selected process has mapped for writing, or an agent before knew to be.
    ///
    /// # Errors
    /// [`HostError`].
    pub(super) fn find_mapped(&mut self) -> Result<(), HostError> {
        for inode in self.link.probes.mapped().all().map_err(probes_failed)? {
            self.engine.note_mapped(inode, &mut self.link)?;
        }
        for process in self.link.probes.selected_processes().map_err(probes_failed)? {
            self.engine.note_mappings_of(process, &mut self.link)?;
        }
        Ok(())
    }
}

/// The files that a process has mapped, shared, so that they may be written; none when it is gone, `None` when it
/// changes its mappings all the time.
pub(super) fn mapped_by(link: &Link, process: u32) -> Result<Option<Vec<InodeId>>, HostError> {
    for _ in 0..LOOKS_MAX {
        if let Some(files) = look(link, process)? {
            return Ok(Some(files));
        }
    }
    Ok(None)
}

/// `None` when a mapping changed meanwhile.
fn look(link: &Link, process: u32) -> Result<Option<Vec<InodeId>>, HostError> {
    let mut files = Vec::new();
    let Ok(maps) = fs::read(format!("/proc/{process}/maps")) else { return Ok(Some(files)) };
    for address in String::from_utf8_lossy(&maps).lines().filter_map(shared_file) {
        // This leads to the file that is mapped, whatever its name leads to by now.
        let path = format!("/proc/{process}/map_files/{address}");
        let failed = |source: io::Error| HostError::Read { what: format!("the mapping {path}"), source };
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let fd: OwnedFd = match rustix::fs::openat(CWD, &path, flags, Mode::empty()) {
            Ok(fd) => fd,
            // The mapping has gone, or the process.
            Err(Errno::NOENT | Errno::SRCH) => return Ok(None),
            Err(e) => return Err(failed(e.into())),
        };
        let mode = rustix::fs::fstat(&fd).map_err(|e| failed(e.into()))?.st_mode;
        // Rings of io_uring and AIO, among others, are mapped like files.
        if FileType::from_raw_mode(mode) != FileType::RegularFile {
            continue;
        }
        // The line does not tell whether it may be made writable later; this does.
        if link.probes.writable_mappings(fd.as_fd()).map_err(probes_failed)? != Some(0) {
            files.extend(link.reader.inode_of(fd.as_fd()).map_err(failed)?);
        }
    }
    Ok(Some(files))
}

/// The addresses of a line that is a shared mapping of a file
/// (`address perms offset major:minor inode path`, proc_pid_maps(5)), as `map_files` names them.
fn shared_file(line: &str) -> Option<&str> {
    let mut fields = line.split_ascii_whitespace();
    let address = fields.next()?;
    if !fields.next()?.ends_with('s') {
        return None;
    }
    let inode: u64 = fields.nth(2)?.parse().ok()?;
    (inode > 0).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_shared_files_count() {
        let line = "7f0-7f1 rw-s 00000000 fe:00 1234   /data/file";
        assert_eq!(shared_file(line), Some("7f0-7f1"));
        assert_eq!(shared_file("7f0-7f1 r--s 00000000 fe:00 1234 /data/file"), Some("7f0-7f1"));
        assert_eq!(shared_file("7f0-7f1 rw-p 00000000 fe:00 1234 /data/file"), None);
        assert_eq!(shared_file("7f0-7f1 rw-s 00000000 00:00 0"), None);
        assert_eq!(shared_file(""), None);
    }
}
