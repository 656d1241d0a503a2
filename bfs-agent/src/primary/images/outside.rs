//! What the processes have open that is not theirs alone: the standard streams, and whatever else the command was
//! started with. It is not dumped; whoever restores the processes gives it to them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use bfs_common::record::CheckpointId;
use serde::{Deserialize, Serialize};

use crate::primary::contained::STANDARD;

/// Major number of terminals: `UNIX98_PTY_SLAVE_MAJOR` up to 143 and `TTY_MAJOR` (`include/uapi/linux/major.h`).
const TERMINALS: [std::ops::RangeInclusive<u32>; 2] = [136..=143, 4..=5];

/// CRIU's names of open files that come from outside, each with the descriptor under which a restore finds it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outside {
    files: BTreeMap<String, RawFd>,
    /// Whose state it is.
    #[serde(default)]
    pub of: Origin,
    /// What they had open outside of the replicated directories.
    #[serde(default)]
    pub open: Vec<OpenOutside>,
}

/// Whose state a set of images is: enough to restore it elsewhere.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Of which checkpoint.
    pub checkpoint: CheckpointId,
    /// The command's number in its namespace.
    pub root: i32,
    /// Directories that stood elsewhere: where, and where the processes saw them.
    pub binds: Vec<(PathBuf, PathBuf)>,
}

/// CRIU's name of the open file of a descriptor (criu(8), `--external` and `--inherit-fd`), and whether it stands on a
/// mount. `None` for what it has no name for.
fn name_of(process: u32, fd: RawFd) -> io::Result<Option<(String, Option<u32>)>> {
    let link = format!("/proc/{process}/fd/{fd}");
    let target = fs::read_link(&link)?;
    let target = target.to_string_lossy();
    if target.starts_with("pipe:[") {
        return Ok(Some((target.into_owned(), None)));
    }
    if !target.starts_with('/') {
        return Ok(None);
    }
    let stat = fs::metadata(&link)?;
    let info = fs::read_to_string(format!("/proc/{process}/fdinfo/{fd}"))?;
    let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse::<u32>().ok());
    let Some(mount) = mount else { return Ok(None) };
    let terminal = stat.file_type().is_char_device()
        && TERMINALS.iter().any(|majors| majors.contains(&libc::major(stat.rdev())));
    let name = if terminal {
        format!("tty[{:x}:{:x}]", stat.rdev(), stat.dev())
    } else {
        format!("file[{mount:x}:{:x}]", stat.ino())
    };
    Ok(Some((name, Some(mount))))
}

pub(super) fn descriptors(process: u32) -> io::Result<Vec<RawFd>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
        found.extend(entry?.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok()));
    }
    Ok(found)
}

/// The mounts of a process's namespace.
fn mounts(process: u32) -> io::Result<BTreeSet<u32>> {
    let text = fs::read_to_string(format!("/proc/{process}/mountinfo"))?;
    Ok(text.lines().filter_map(|line| line.split(' ').next()?.parse().ok()).collect())
}

/// An open file that is neither in the replicated directories nor the processes' alone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct OpenOutside {
    /// What it is: a path, or a socket.
    pub what: String,
    /// What becomes of it when the processes are restored.
    pub at_restore: String,
}

impl std::fmt::Display for OpenOutside {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.what, self.at_restore)
    }
}

/// Open files that are told of, at most.
const TOLD_MAX: usize = 256;

/// What becomes of an open file at a restore, if there is anything to tell: `target` is what its link in `/proc` says.
fn told(target: &str, given: bool, inside: &[PathBuf]) -> Option<&'static str> {
    let path = Path::new(target);
    if given {
        return Some("it is given to them again as it is then: what was written to it is not taken back");
    }
    if target.starts_with("socket:") {
        return Some(
            "it comes back only with both its ends; to anybody else the dump, or the restore, fails",
        );
    }
    let own = !path.is_absolute() || target.ends_with(" (deleted)");
    if own || inside.iter().any(|inside| path.starts_with(inside)) {
        return None;
    }
    if path.starts_with("/dev") || path.starts_with("/proc") || path.starts_with("/sys") {
        return Some("it is opened again");
    }
    Some(
        "it is opened again by its path: what it has is not brought back, and with another size the restore fails",
    )
}

/// What `processes` have open outside of the directories `inside`.
///
/// # Errors
/// What `/proc` said.
pub fn open_outside(
    outside: &Outside,
    processes: &[u32],
    inside: &[PathBuf],
) -> io::Result<Vec<OpenOutside>> {
    let mut found = BTreeSet::new();
    for process in processes {
        for fd in descriptors(*process)? {
            let target = fs::read_link(format!("/proc/{process}/fd/{fd}"))?;
            let what = target.to_string_lossy().into_owned();
            let name = name_of(*process, fd)?;
            let given = name.is_some_and(|(name, _)| outside.files.contains_key(&name));
            if let Some(at_restore) = told(&what, given, inside)
                && found.len() < TOLD_MAX
            {
                found.insert(OpenOutside { what, at_restore: at_restore.into() });
            }
        }
    }
    Ok(found.into_iter().collect())
}

impl Outside {
    /// What of the open files of `processes`, which stand, comes from outside. `first` is the first process of their
    /// namespace, which has open what the command was started with.
    ///
    /// # Errors
    /// What `/proc` said.
    pub fn of(first: u32, processes: &[u32]) -> io::Result<Self> {
        let theirs = mounts(first)?;
        let mut given = BTreeMap::new();
        for fd in descriptors(first)? {
            if let Ok(Some((name, _))) = name_of(first, fd) {
                given.entry(name).or_insert(if fd < 3 { STANDARD + fd } else { fd });
            }
        }
        let mut files = BTreeMap::new();
        for process in processes {
            for fd in descriptors(*process)? {
                let Some((name, mount)) = name_of(*process, fd)? else { continue };
                // Files and terminals are from outside if their mount is; of pipes those are that were given.
                let outside = mount.is_none_or(|mount| !theirs.contains(&mount));
                if outside && let Some(fd) = given.get(&name) {
                    files.insert(name, *fd);
                }
            }
        }
        Ok(Self { files, of: Origin::default(), open: Vec::new() })
    }

    /// What a dump is told of. Pipes it finds out by itself.
    pub fn external(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str).filter(|name| !name.starts_with("pipe:"))
    }

    /// What a restore is given, by descriptor.
    pub fn inherited(&self) -> impl Iterator<Item = (&str, RawFd)> {
        self.files.iter().map(|(name, fd)| (name.as_str(), *fd))
    }

    /// Reads what [`Outside::write`] wrote.
    ///
    /// # Errors
    /// What the file system said, or that it is no such file.
    pub fn read(file: &Path) -> io::Result<Self> {
        serde_json::from_slice(&fs::read(file)?).map_err(io::Error::other)
    }

    /// Keeps it beside the images.
    ///
    /// # Errors
    /// What the file system said.
    pub fn write(&self, file: &Path) -> io::Result<()> {
        fs::write(file, serde_json::to_vec(self).map_err(io::Error::other)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_told_what_becomes_of_what_is_not_theirs() {
        let inside = [PathBuf::from("/srv/data")];
        let told = |target, given| told(target, given, &inside).unwrap_or_default();
        assert_eq!(told("/srv/data/log", false), "");
        assert_eq!(told("/srv/data/log (deleted)", false), "");
        assert_eq!(told("pipe:[7]", false), "");
        assert_eq!(told("anon_inode:[eventpoll]", false), "");
        assert!(told("/srv/database", false).contains("by its path"));
        assert!(told("/var/log/x", true).contains("given to them again"));
        assert!(told("pipe:[7]", true).contains("given to them again"));
        assert!(told("socket:[9]", false).contains("both its ends"));
        assert_eq!(told("/dev/null", false), "it is opened again");
    }

    #[test]
    fn only_what_is_from_other_mounts_is_from_outside() {
        let mut other = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let outside = Outside::of(other.id(), &[other.id()]);
        other.kill().unwrap();
        other.wait().unwrap();
        let outside = outside.unwrap();
        assert!(outside.external().all(|name| !name.starts_with("file[")), "{outside:?}");
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("outside");
        outside.write(&at).unwrap();
        assert_eq!(Outside::read(&at).unwrap(), outside);
    }
}
