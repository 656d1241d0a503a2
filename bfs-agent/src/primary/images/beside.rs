//! Processes that were not begun by this agent, and live among all others: who of a cgroup can be dumped, and who is in the
//! way when they are to be made again.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};

use super::outside::descriptors;
use crate::primary::clock::timespec;
use crate::primary::process::{lives, tasks_of_cgroup};

/// A process, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Who(u32, String);

impl Who {
    /// The process of this number.
    pub(super) fn of(pid: u32) -> Self {
        let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
        Self(pid, String::from_utf8_lossy(&name).trim().to_owned())
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.0, self.1)
    }
}

/// Why processes among others cannot be dumped, or cannot be made again.
#[derive(Debug, thiserror::Error)]
pub enum Conflict {
    /// There is nothing to dump.
    #[error("nobody is in the cgroup any more")]
    Nobody,
    /// CRIU dumps trees.
    #[error("{0} and {1} have no common ancestor in the cgroup: CRIU dumps one tree of processes")]
    Roots(Who, Who),
    /// It would be dumped with its parent, and stay where it is as well.
    #[error("{0} is a child of a process in the cgroup, and is not in it")]
    Child(Who),
    /// Restored, it would be in the one that is followed.
    #[error("{0} is in a cgroup below the one that is followed, where it would not be again")]
    Below(Who),
    /// It would be made again in this agent's.
    #[error("{0} is in another {1} namespace than this agent")]
    Namespace(Who, &'static str),
    /// Who has the other end would not have the one that is made again.
    #[error("{0} has {1} open, whose other end somebody else has: restored, it would lead to nobody")]
    Pipe(Who, String),
    /// Whoever comes into it stands at once.
    #[error("the cgroup is frozen, by somebody else")]
    Frozen,
    /// There is no place for them.
    #[error("their cgroup is gone: whoever manages it has removed it")]
    Gone,
    /// Whoever manages them has started them anew, say.
    #[error("{0} has come into the cgroup meanwhile: whoever starts processes there has to wait")]
    Came(Who),
    /// A number that is needed is somebody else's.
    #[error("number {0} is needed, and {1}")]
    Taken(i32, String),
    /// What `/proc` said.
    #[error("{0}: {1}")]
    Read(String, io::Error),
}

/// Namespaces that have to be the agent's.
const NAMESPACES: [&str; 6] = ["pid", "mnt", "net", "ipc", "uts", "user"];

fn read(path: &str) -> Result<String, Conflict> {
    fs::read_to_string(path).map_err(|e| Conflict::Read(path.to_owned(), e))
}

/// The processes of a cgroup, which stand, the root of their tree first.
///
/// # Errors
/// [`Conflict`]: they cannot be dumped, or would not be what they were.
pub(super) fn tree(cgroup: &Path) -> Result<(i32, Vec<u32>), Conflict> {
    let all: BTreeSet<u32> = tasks_of_cgroup(cgroup).into_iter().map(|task| task.1).collect();
    let here = read(&cgroup.join("cgroup.procs").display().to_string())?;
    let here: BTreeSet<u32> = here.lines().filter_map(|pid| pid.parse().ok()).collect();
    if let Some(below) = all.difference(&here).next() {
        return Err(Conflict::Below(Who::of(*below)));
    }
    let mut root = None;
    for pid in &all {
        for kind in NAMESPACES {
            let of = |whose: &str| {
                let path = format!("/proc/{whose}/ns/{kind}");
                fs::read_link(&path).map_err(|e| Conflict::Read(path, e))
            };
            if of(&pid.to_string())? != of("self")? {
                return Err(Conflict::Namespace(Who::of(*pid), namespace(kind)));
            }
        }
        let status = read(&format!("/proc/{pid}/status"))?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok());
        if parent.is_none_or(|parent| !all.contains(&parent))
            && let Some(other) = root.replace(*pid)
        {
            return Err(Conflict::Roots(Who::of(other), Who::of(*pid)));
        }
        // What nobody has waited for is in no cgroup, and is dumped with its parent.
        if let Some(child) = children(*pid)?.into_iter().find(|child| !all.contains(child) && lives(*child)) {
            return Err(Conflict::Child(Who::of(child)));
        }
    }
    let root = root.and_then(|root| i32::try_from(root).ok()).ok_or(Conflict::Nobody)?;
    open_pipes(&all)?;
    Ok((root, all.into_iter().collect()))
}

/// What a kind of namespaces is called.
fn namespace(kind: &'static str) -> &'static str {
    match kind {
        "pid" => "PID",
        "mnt" => "mount",
        "net" => "network",
        "ipc" => "IPC",
        "uts" => "UTS",
        kind => kind,
    }
}

fn children(pid: u32) -> Result<Vec<u32>, Conflict> {
    let tasks = format!("/proc/{pid}/task");
    let mut found = Vec::new();
    for task in fs::read_dir(&tasks).map_err(|e| Conflict::Read(tasks, e))?.flatten() {
        let text = read(&task.path().join("children").display().to_string())?;
        found.extend(text.split_whitespace().filter_map(|child| child.parse::<u32>().ok()));
    }
    Ok(found)
}

/// Looks for pipes of which these processes have one kind of end, and others the other one.
fn open_pipes(processes: &BTreeSet<u32>) -> Result<(), Conflict> {
    let failed = |e: io::Error| Conflict::Read("what is open in /proc".into(), e);
    // By name: who has which kind of end open where.
    let mut pipes: BTreeMap<String, [Option<(u32, String)>; 2]> = BTreeMap::new();
    for pid in processes {
        for fd in descriptors(*pid).map_err(failed)? {
            let link = format!("/proc/{pid}/fd/{fd}");
            let target = fs::read_link(&link).map_err(failed)?;
            let Some(name) = target.to_str().filter(|target| target.starts_with("pipe:")) else { continue };
            let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).map_err(failed)?;
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
            let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok()).unwrap_or(0);
            let ends = pipes.entry(name.to_owned()).or_default();
            let mode = flags & libc::O_ACCMODE;
            for (end, has) in [mode != libc::O_WRONLY, mode != libc::O_RDONLY].into_iter().enumerate() {
                if has {
                    ends[end].get_or_insert_with(|| (*pid, link.clone()));
                }
            }
        }
    }
    for (name, ends) in pipes {
        let ((pid, link), reads) = match ends {
            [Some(end), None] => (end, true),
            [None, Some(end)] => (end, false),
            _ => continue,
        };
        if has_partner(&link, reads).map_err(failed)? {
            return Err(Conflict::Pipe(Who::of(pid), name));
        }
    }
    Ok(())
}

/// Whether anybody has the other end of a pipe open: an end that was just opened tells that it is alone (pipe(7), poll(2)).
fn has_partner(link: &str, reads: bool) -> io::Result<bool> {
    let mut options = OpenOptions::new();
    let end = options.read(reads).write(!reads).custom_flags(libc::O_NONBLOCK).open(link)?;
    let mut fds = [PollFd::new(&end, PollFlags::empty())];
    poll(&mut fds, Some(&timespec(Duration::ZERO)))?;
    Ok(!fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR))
}

/// Whether processes can be made in a cgroup.
///
/// # Errors
/// [`Conflict::Gone`], [`Conflict::Frozen`].
pub(super) fn takes(cgroup: &Path) -> Result<(), Conflict> {
    match fs::read_to_string(cgroup.join("cgroup.events")) {
        Err(_) => Err(Conflict::Gone),
        Ok(events) if events.contains("frozen 1") => Err(Conflict::Frozen),
        Ok(_) => Ok(()),
    }
}

/// Whether nobody is in a cgroup but this process of ours.
///
/// # Errors
/// [`Conflict::Came`].
pub(super) fn is_empty_but(cgroup: &Path, tool: i32) -> Result<(), Conflict> {
    let other = tasks_of_cgroup(cgroup).into_iter().find(|task| i32::try_from(task.1) != Ok(tool));
    other.map_or(Ok(()), |task| Err(Conflict::Came(Who::of(task.1))))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_pipe_is_half_as_long_as_somebody_else_has_the_other_end() {
        let mut command = Command::new("cat");
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        let mut cat = command.spawn().unwrap();
        let both = BTreeSet::from([cat.id(), std::process::id()]);
        let alone = BTreeSet::from([cat.id()]);
        // Between fork and exec it has what we have.
        let name = || fs::read_to_string(format!("/proc/{}/comm", cat.id())).unwrap();
        while name() != "cat\n" {
            std::thread::yield_now();
        }
        let link = format!("/proc/{}/fd/0", cat.id());
        assert!(has_partner(&link, true).unwrap());
        let said = open_pipes(&alone).unwrap_err().to_string();
        assert!(said.contains("(cat)") && said.contains("pipe:["), "{said}");
        let said = open_pipes(&both).map_err(|e| e.to_string());
        assert!(!said.is_err_and(|said| said.contains("(cat)")));
        cat.kill().unwrap();
        cat.wait().unwrap();
    }

    #[test]
    fn an_end_that_nobody_is_at_the_other_side_of_is_alone() {
        let (reader, writer) = std::io::pipe().unwrap();
        use std::os::fd::AsRawFd;
        let link = |fd: i32| format!("/proc/self/fd/{fd}");
        assert!(has_partner(&link(reader.as_raw_fd()), true).unwrap());
        assert!(has_partner(&link(writer.as_raw_fd()), false).unwrap());
        let at = link(reader.as_raw_fd());
        drop(writer);
        assert!(!has_partner(&at, true).unwrap());
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        assert!(!has_partner(&link(writer.as_raw_fd()), false).unwrap());
    }
}
