//! Which tasks are in a cgroup (v2): its files, and `/proc`.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::primary::stop::freezer::mount_point;

/// The live threads of a cgroup and of all below it, each with its process.
#[must_use]
pub fn tasks_of_cgroup(directory: &Path) -> Vec<(u32, u32)> {
    let mut found = Vec::new();
    let mut todo = vec![directory.to_owned()];
    while let Some(directory) = todo.pop() {
        let threads = fs::read_to_string(directory.join("cgroup.threads")).unwrap_or_default();
        let tids = threads.lines().filter_map(|line| line.parse().ok());
        found.extend(tids.filter_map(|tid| Some((tid, process_of(tid)?))));
        let below = fs::read_dir(&directory).into_iter().flatten().flatten();
        todo.extend(below.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
    }
    found
}

/// The process of a thread; `None` when the thread has ended.
fn process_of(tid: u32) -> Option<u32> {
    let status = fs::read(format!("/proc/{tid}/status")).ok()?;
    let status = String::from_utf8_lossy(&status);
    let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
    let alive = !field("State:")?.starts_with(['Z', 'X']);
    field("Tgid:")?.parse().ok().filter(|_| alive)
}

/// Whether a thread is in a cgroup or in one below it; `None` when it has ended.
#[must_use]
pub fn in_cgroup(tid: u32, directory: &Path) -> Option<bool> {
    process_of(tid)?;
    is_of_cgroup(tid, directory)
}

/// The same of one that may have ended, as long as nobody has waited for it; `None` when there is none.
#[must_use]
pub fn is_of_cgroup(tid: u32, directory: &Path) -> Option<bool> {
    let text = fs::read_to_string(format!("/proc/{tid}/cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let mount = mount_point().ok()?;
    let Ok(wanted) = fs::metadata(directory) else { return Some(false) };
    let is = |at: &Path| fs::metadata(at).is_ok_and(|m| (m.dev(), m.ino()) == (wanted.dev(), wanted.ino()));
    Some(mount.join(path).ancestors().any(is))
}
