//! Shared writable mappings of processes that were there before the probes: `/proc/PID/maps`.

use super::work::Work;
use crate::primary::reader::kernel_dev;

impl Work {
    /// Files of the group that a selected process has mapped for writing are read at each
    /// checkpoint: stores into them leave no record.
    pub(super) fn suspect_mapped(&mut self) {
        for process in self.link.probes.selected_processes().unwrap_or_default() {
            for (dev, ino) in mapped_by(process) {
                self.engine.note_mapped(dev, ino);
            }
        }
    }
}

/// The files that a process has mapped, shared and writable; none when it is gone.
pub(super) fn mapped_by(process: u32) -> Vec<(u32, u64)> {
    let maps = std::fs::read(format!("/proc/{process}/maps")).unwrap_or_default();
    String::from_utf8_lossy(&maps).lines().filter_map(shared_writable).collect()
}

/// Device and inode of a line that is a shared writable mapping of a file
/// (`address perms offset major:minor inode path`, proc_pid_maps(5)).
fn shared_writable(line: &str) -> Option<(u32, u64)> {
    let mut fields = line.split_ascii_whitespace();
    let permissions = fields.nth(1)?;
    if !permissions.ends_with('s') || !permissions.contains('w') {
        return None;
    }
    let (major, minor) = fields.nth(1)?.split_once(':')?;
    let major = u32::from_str_radix(major, 16).ok()?;
    let minor = u32::from_str_radix(minor, 16).ok()?;
    let ino = fields.next()?.parse().ok().filter(|ino| *ino > 0)?;
    Some((kernel_dev(rustix::fs::makedev(major, minor)), ino))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_shared_writable_files_count() {
        let line = "7f0-7f1 rw-s 00000000 fe:00 1234   /data/file";
        assert_eq!(shared_writable(line), Some((0xfe << 20, 1234)));
        assert_eq!(shared_writable("7f0-7f1 rw-p 00000000 fe:00 1234 /data/file"), None);
        assert_eq!(shared_writable("7f0-7f1 r--s 00000000 fe:00 1234 /data/file"), None);
        assert_eq!(shared_writable("7f0-7f1 rw-s 00000000 00:00 0"), None);
        assert_eq!(shared_writable(""), None);
    }
}
