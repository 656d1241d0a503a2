//! The end of a world: its processes, pins, cgroups, mounts, and what was said when a test failed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::World;

/// Lines of each log that a failed test prints.
const LOG_LINES: usize = 60;

impl Drop for World {
    fn drop(&mut self) {
        // What is left of the program first: it may be stopped, and its pins keep the probes.
        if let (true, Ok(pid)) = (self.program_runs(), self.program_pid()) {
            kill(pid);
        }
        for child in [&mut self.agent, &mut self.program, &mut self.replayer].into_iter().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
        for cgroup in cgroups_named(&self.group) {
            // Everything in a cgroup that is named after this world was started by it.
            let _ = fs::write(cgroup.join("cgroup.kill"), "1");
            let _ = fs::write(cgroup.join("cgroup.freeze"), "0");
            let _ = crate::watch::until("the cgroup to be empty", std::time::Duration::from_secs(5), || {
                let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
                processes.trim().is_empty().then_some(())
            });
            let _ = fs::remove_dir(&cgroup);
        }
        let _ = fs::remove_dir_all(Path::new("/sys/fs/bpf/bfs").join(&self.group));
        for mount in &self.mounts {
            let _ = Command::new("umount").arg("-l").arg(mount).status();
        }
        if std::thread::panicking() {
            self.print_logs();
        }
        if std::env::var_os("BFS_KEEP").is_some()
            && let Some(directory) = self.directory.take()
        {
            eprintln!("kept: {}", directory.keep().display());
        }
    }
}

impl World {
    /// Prints the end of each log.
    pub fn print_logs(&self) {
        let Ok(entries) = fs::read_dir(&self.logs) else { return };
        for path in entries.flatten().map(|entry| entry.path()) {
            let text = String::from_utf8_lossy(&fs::read(&path).unwrap_or_default()).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            eprintln!("--- {} (the last of {} lines)", path.display(), lines.len());
            for line in &lines[lines.len().saturating_sub(LOG_LINES)..] {
                eprintln!("{line}");
            }
        }
    }
}

fn kill(pid: i32) {
    // SAFETY: a system call without pointers; the number is of a process that this world started.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

/// Cgroups below the v2 mount whose name holds the group's name, innermost first.
fn cgroups_named(group: &str) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let root = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let path = words.next()?;
        (words.next()? == "cgroup2").then(|| PathBuf::from(path))
    });
    let mut found = Vec::new();
    if let Some(root) = root {
        collect(&root, group, 3, &mut found);
    }
    found
}

fn collect(directory: &Path, group: &str, depth: usize, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        if depth > 0 {
            collect(&entry.path(), group, depth - 1, found);
        }
        if entry.file_name().to_string_lossy().contains(group) {
            found.push(entry.path());
        }
    }
}
