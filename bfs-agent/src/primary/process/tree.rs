//! Which threads and descendants a process has, and whether they live: `/proc`, read once each.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use super::ProcessError;

/// A thread of a selected process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Task {
    /// Its process.
    pub tgid: u32,
    /// The thread.
    pub tid: u32,
    /// Start of the *process* in clock ticks since boot (`/proc/PID/stat` field 22): tells it
    /// from a later one with the same number.
    pub start_ticks: u64,
}

/// All threads of a process and of all its descendants, processes in ascending order, as far as
/// `/proc` shows them at the moment. Who attaches selects them and asks again until nobody new
/// appears: children born meanwhile inherit the selection or are found then.
///
/// # Errors
/// [`ProcessError::NoProcess`], or when `/proc` cannot be read.
pub fn tree_of(pid: u32) -> Result<Vec<Task>, ProcessError> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    let mut starts = BTreeMap::new();
    for entry in fs::read_dir("/proc").map_err(|e| ProcessError::system("read /proc", e))?.flatten() {
        let Some(process) = number(&entry.file_name()) else { continue };
        // A process can end between the listing and the reading.
        let Some(stat) = stat_of(process) else { continue };
        children.entry(stat.parent).or_default().push(process);
        starts.insert(process, stat.start_ticks);
    }
    if !starts.contains_key(&pid) {
        return Err(ProcessError::NoProcess(pid));
    }
    let mut found = BTreeSet::new();
    let mut next = vec![pid];
    while let Some(process) = next.pop() {
        if found.insert(process) {
            next.extend(children.get(&process).into_iter().flatten());
        }
    }
    Ok(found
        .into_iter()
        .flat_map(|tgid| threads_of(tgid).into_iter().map(move |tid| (tgid, tid)))
        .map(|(tgid, tid)| Task { tgid, tid, start_ticks: starts[&tgid] })
        .collect())
}

/// The threads of one process; empty when it is gone.
#[must_use]
pub fn threads_of(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let mut tids: Vec<u32> =
        tasks.into_iter().flatten().flatten().filter_map(|t| number(&t.file_name())).collect();
    tids.sort_unstable();
    tids
}

/// When a process started, in clock ticks since boot; `None` when it is gone.
#[must_use]
pub fn start_of(pid: u32) -> Option<u64> {
    stat_of(pid).map(|s| s.start_ticks)
}

/// Whether a thread is gone or about to go: it makes no call any more. A thread that ended stays in `/proc` until it is
/// waited for.
#[must_use]
pub fn has_ended(tgid: u32, tid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{tgid}/task/{tid}/stat")).ok();
    stat.and_then(|stat| parse_stat(&stat)).is_none_or(|stat| stat.flags & PF_EXITING != 0)
}

/// Whether one of these processes (thread group, start) still has a thread that runs.
#[must_use]
pub fn any_alive(processes: impl IntoIterator<Item = (u32, u64)>) -> bool {
    processes.into_iter().any(|(pid, start)| stat_of(pid).is_some_and(|s| s.start_ticks == start && s.runs()))
}

/// Whether a process runs: it is there, and is not only not waited for yet.
#[must_use]
pub fn lives(pid: u32) -> bool {
    stat_of(pid).is_some_and(|s| s.runs())
}

/// Whether a process of this process group runs.
pub(super) fn group_lives(group: u32) -> bool {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut processes = entries.filter_map(|entry| stat_of(number(&entry.file_name())?));
    processes.any(|s| s.group == group && s.runs())
}

/// Every process, with its process group and its session.
#[must_use]
pub fn groups() -> Vec<(u32, u32, u32)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes = entries.filter_map(|entry| number(&entry.file_name()));
    processes.filter_map(|pid| stat_of(pid).map(|s| (pid, s.group, s.session))).collect()
}

/// Set at the beginning of the end of a thread, before the probe at its end runs (`do_exit()` in kernel/exit.c;
/// include/linux/sched.h).
const PF_EXITING: u64 = 4;

struct Stat {
    state: char,
    parent: u32,
    group: u32,
    session: u32,
    flags: u64,
    threads: u64,
    start_ticks: u64,
}

impl Stat {
    /// A process whose first thread has ended is a zombie with other threads alive: it ends at the end of its group.
    fn runs(&self) -> bool {
        !matches!(self.state, 'Z' | 'X') || self.threads > 1
    }
}

fn stat_of(pid: u32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The name in parentheses can hold anything, so fields count from the last closing one.
fn parse_stat(stat: &str) -> Option<Stat> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    Some(Stat {
        state: fields.first()?.chars().next()?,
        parent: fields.get(1)?.parse().ok()?,
        group: fields.get(2)?.parse().ok()?,
        session: fields.get(3)?.parse().ok()?,
        flags: fields.get(6)?.parse().ok()?,
        threads: fields.get(17)?.parse().ok()?,
        start_ticks: fields.get(19)?.parse().ok()?,
    })
}

fn number(name: &std::ffi::OsStr) -> Option<u32> {
    name.to_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_processes_do_not_confuse() {
        let stat = "7 (a) R 1) S 5 7 7 0 -1 4194560 1 0 0 0 1 1 0 0 20 0 3 0 99 1 1";
        let stat = parse_stat(stat).unwrap();
        assert_eq!((stat.state, stat.parent, stat.threads, stat.start_ticks), ('S', 5, 3, 99));
        assert_eq!((stat.group, stat.flags), (7, 4_194_560));
    }
    #[test]
    fn who_is_not_waited_for_has_ended() {
        let me = std::process::id();
        assert!(!has_ended(me, me));
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        assert!(!has_ended(child.id(), child.id()));
        child.kill().unwrap();
        let ended = (0..5_000).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(1));
            has_ended(child.id(), child.id())
        });
        assert!(ended && !threads_of(child.id()).is_empty(), "it is a zombie");
        child.wait().unwrap();
        assert!(has_ended(child.id(), child.id()));
    }
}
