//! What a bench makes outside of a world (`bfs_tests::world` cleans up after itself also when it is killed): its
//! name has the number of the process, so that a later run can remove what a killed one left.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use tempfile::TempDir;

/// Begin of the names; the number of the process follows.
const PREFIX: &str = "bfs-bench-of-";
/// Where ip(8) has named network namespaces.
const NAMESPACES: &str = "/run/netns";

/// A name for something of this process.
pub fn name() -> String {
    format!("{PREFIX}{}", std::process::id())
}

/// A folder for what several runs read, gone when dropped.
///
/// # Errors
/// When it cannot be made.
pub fn folder() -> Result<TempDir> {
    Ok(tempfile::Builder::new().prefix(&format!("{}-", name())).tempdir()?)
}

/// Removes a named network namespace; that there is none is no error.
pub fn remove_namespace(name: &str) {
    let _ = Command::new("ip").args(["netns", "del", name]).output();
}

/// Removes what runs left that are no more.
pub fn sweep() {
    for name in names(&std::env::temp_dir()) {
        // What cannot be removed is in nobody's way.
        let _ = fs::remove_dir_all(std::env::temp_dir().join(name));
    }
    for name in names(Path::new(NAMESPACES)) {
        remove_namespace(&name);
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).filter(|n| is_left(n)).collect()
}

/// Whether this is the name of something whose process is gone.
fn is_left(name: &str) -> bool {
    let Some(rest) = name.strip_prefix(PREFIX) else { return false };
    let pid = rest.split('-').next().and_then(|pid| pid.parse::<u32>().ok());
    pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_dead_process_left_is_removed() {
        let own = folder().unwrap();
        assert!(!is_left(&own.path().file_name().unwrap().to_string_lossy()));
        // Above the highest number that the kernel gives.
        assert!(is_left(&format!("{PREFIX}4194305-x")) && is_left(&format!("{PREFIX}4194305")));
        for other in ["bfs-bench-x", "bfs-test-4194305-0", "bfs-bench-of-", "lo"] {
            assert!(!is_left(other), "{other}");
        }
    }
}
