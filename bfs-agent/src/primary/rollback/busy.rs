//! Who uses what would be changed: open for writing, mapped for writing, or in any way; and what would be moved or
//! removed: as working directory or root. (A directory that stays where it is may be somebody's
//! working directory: who types `--path .` works there.)

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bfs_common::abi::InodeId;

use crate::primary::reader::kernel_dev;

/// Lines shown.
const LINES_MAX: usize = 100;

/// What counts as use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// That it may be written.
    Writing,
    /// That it is open or mapped.
    Any,
}

/// One line for each use of one of these inodes, of which some are `moved` or removed; at most
/// [`LINES_MAX`]. Of processes that end meanwhile nothing is said.
#[must_use]
pub fn users(
    changed: impl Iterator<Item = InodeId>,
    moved: impl Iterator<Item = InodeId>,
    which: Use,
) -> Vec<String> {
    let moved: HashSet<(u32, u64)> = moved.map(|i| (i.dev, i.ino)).collect();
    let inodes: HashSet<(u32, u64)> = changed.map(|i| (i.dev, i.ino)).chain(moved.iter().copied()).collect();
    let is_of = |path: &Path, set: &HashSet<(u32, u64)>| {
        fs::metadata(path).is_ok_and(|m| set.contains(&(kernel_dev(m.dev()), m.ino())))
    };
    let own = std::process::id();
    let mut lines = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        if pid == own || lines.len() >= LINES_MAX {
            continue;
        }
        let at = entry.path();
        let name = fs::read_to_string(at.join("comm")).unwrap_or_default();
        let mut say = |how: &str, what: &Path| {
            let file = fs::read_link(what).unwrap_or_default();
            lines.push(format!("process {pid} ({}) {how} {}", name.trim(), file.display()));
        };
        for (link, how) in [("cwd", "works in"), ("root", "has as its root")] {
            if is_of(&at.join(link), &moved) {
                say(how, &at.join(link));
            }
        }
        for fd in fs::read_dir(at.join("fd")).into_iter().flatten().flatten() {
            if !is_of(&fd.path(), &inodes) {
                continue;
            }
            if is_for_writing(&at, &fd.file_name()) {
                say("has open for writing", &fd.path());
            } else if which == Use::Any {
                say("has open", &fd.path());
            }
        }
        let maps = fs::read(at.join("maps")).unwrap_or_default();
        for (address, writable) in String::from_utf8_lossy(&maps).lines().filter_map(mapping) {
            if !writable && which == Use::Writing {
                continue;
            }
            // This leads to the file that is mapped, whatever its name leads to by now.
            let file = at.join("map_files").join(address);
            if is_of(&file, &inodes) {
                say(if writable { "has mapped for writing" } else { "has mapped" }, &file);
            }
        }
    }
    lines
}

/// The addresses of a line of a mapping (`address perms ...`, proc_pid_maps(5)) as `map_files` names them, and whether
/// what is stored there comes to the file.
fn mapping(line: &str) -> Option<(&str, bool)> {
    let (address, rest) = line.split_once(' ')?;
    let permissions = rest.get(..4)?;
    Some((address, permissions.contains('w') && permissions.ends_with('s')))
}

/// Whether a descriptor of a process is open for writing. The access mode stands in the flags, in octal (proc_pid_fdinfo(5)).
pub(in crate::primary) fn is_for_writing(process: &Path, fd: &std::ffi::OsStr) -> bool {
    let text = fs::read_to_string(process.join("fdinfo").join(fd)).unwrap_or_default();
    let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|f| i32::from_str_radix(f.trim(), 8).ok()).unwrap_or(0);
    flags & libc::O_PATH == 0 && flags & libc::O_ACCMODE != libc::O_RDONLY
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn only_shared_writable_mappings_write() {
        let of = |permissions| format!("7f0-7f1 {permissions} 00000000 fe:00 1234   /data/file");
        assert_eq!(mapping(&of("rw-s")), Some(("7f0-7f1", true)));
        assert_eq!(mapping(&of("rw-p")), Some(("7f0-7f1", false)));
        assert_eq!(mapping(&of("r--s")), Some(("7f0-7f1", false)));
        assert_eq!(mapping(""), None);
    }

    #[test]
    fn a_writer_and_who_works_there_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        let inode = |path: &Path| {
            let meta = fs::metadata(path).unwrap();
            InodeId { dev: kernel_dev(meta.dev()), ino: meta.ino(), generation: 0 }
        };
        let (of_file, of_dir) = (|| [inode(&file)].into_iter(), || [inode(dir.path())].into_iter());
        assert_eq!(users(of_file(), of_dir(), Use::Any), Vec::<String>::new());
        // It says that it is there when both are open.
        let mut child = Command::new("/bin/sh")
            .args(["-c", "exec 3<file 4>>file; echo; read -r _"])
            .current_dir(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut byte = [0];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut byte).unwrap();
        let lines = users(of_file(), of_dir(), Use::Writing);
        let stays = users(of_file().chain(of_dir()), [].into_iter(), Use::Writing);
        let any = users(of_file(), [].into_iter(), Use::Any);
        drop(child.stdin.take());
        child.wait().unwrap();
        let pid = child.id();
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert_eq!(stays, lines[1..], "a directory that stays may be worked in");
        assert_eq!(any.len(), 2, "{any:?}");
        assert!(any.iter().any(|line| line.contains("has open ")), "{any:?}");
        assert!(lines[0].contains(&format!("process {pid}")) && lines[0].contains("works in"), "{lines:?}");
        assert!(lines[1].contains("has open for writing"), "{lines:?}");
    }
}
