//! Nothing that a test starts outlives it: not after a panic, and not when the test process itself
//! is killed.
//!
//! Everything that belongs to a test runs in one cgroup (the agent makes the cgroup of `run` below
//! its own, so that one is inside). It is killed as a whole when the leash is dropped. Should the
//! test process die first, a shell that waits for the end of a pipe does the same; and what both
//! missed (a power cut of the shell, so to speak) is killed by the next run.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::watch::until;

/// Begin of the names of our cgroups; the number of the test process and a count follow.
const PREFIX: &str = "bfs-test-";
/// Where agents pin what the kernel is to keep.
const PINS: &str = "/sys/fs/bpf/bfs";

/// Where agents note what they were started with, and listen.
const STATE: &str = "/run/bfs";

/// What the shell does when the test process is gone. $1 cgroup, $2 group or nothing, $3 directory
/// or nothing.
const REAPER: &str = "\
trap '' INT TERM HUP
if read -r _; then exit 0; fi
echo 1 > \"$1/cgroup.kill\"
tries=0
while [ $tries -lt 100 ] && ! grep -q 'populated 0' \"$1/cgroup.events\"; do
    tries=$((tries + 1)); sleep 0.1
done
find \"$1\" -depth -type d -exec rmdir {} \\; 2> /dev/null
[ -z \"$2\" ] || rm -rf \"/sys/fs/bpf/bfs/$2\" /sys/fs/bpf/bfs/\"$2\"-* \
    /run/bfs/*-\"$2\" /run/bfs/*-\"$2\"[.-]*
[ -n \"$3\" ] || exit 0
cut -d' ' -f2 /proc/self/mounts | while read -r at; do
    case \"$at\" in \"$3\"/*) umount -l \"$at\" ;; esac
done
rm -rf \"$3\"
";

/// See the module.
pub struct Leash {
    cgroup: PathBuf,
    /// `cgroup.procs`, open.
    procs: File,
    group: Option<String>,
    reaper: Child,
}

impl Leash {
    /// A leash for what works in `directory`, which is removed should the test process be killed,
    /// and for the agents of `group`.
    ///
    /// # Errors
    /// Without a cgroup2 hierarchy that can be written.
    pub fn new(directory: &Path, group: Option<&str>) -> Result<Self> {
        static SWEPT: Once = Once::new();
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let own = own_cgroup().context("the tests need a cgroup2 mount (and root)")?;
        SWEPT.call_once(|| sweep(&own));
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let cgroup = own.join(format!("{PREFIX}{}-{count}", std::process::id()));
        fs::create_dir(&cgroup).with_context(|| format!("cannot make {}", cgroup.display()))?;
        let procs = File::options().write(true).open(cgroup.join("cgroup.procs"))?;
        let keep = std::env::var_os("BFS_KEEP").is_some();
        let mut reaper = Command::new("/bin/sh");
        reaper.args(["-c", REAPER, "reaper"]).arg(&cgroup);
        reaper.arg(group.unwrap_or(""));
        reaper.arg(if keep { Path::new("") } else { directory });
        reaper.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: setsid is async-signal-safe. Whatever kills the test's session spares the shell.
        unsafe {
            reaper.pre_exec(|| if libc::setsid() < 0 { Err(io::Error::last_os_error()) } else { Ok(()) })
        };
        let reaper = reaper.spawn().context("/bin/sh does not start")?;
        Ok(Self { cgroup, procs, group: group.map(str::to_owned), reaper })
    }

    /// The command will be born in the cgroup, and all its descendants.
    ///
    /// # Errors
    /// When the open file cannot be duplicated.
    pub fn hold<'a>(&self, command: &'a mut Command) -> Result<&'a mut Command> {
        let procs = self.procs.try_clone()?;
        // SAFETY: between fork and exec only write(2) is called, which is async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                // "0" means the process that writes.
                if libc::write(procs.as_raw_fd(), c"0".as_ptr().cast(), 1) == 1 {
                    Ok(())
                } else {
                    Err(io::Error::last_os_error())
                }
            });
        }
        Ok(command)
    }

    /// The cgroup's directory.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Kills everything that was held, also what is frozen, and waits until it is gone.
    pub fn kill(&self) {
        kill_cgroup(&self.cgroup);
    }
}

impl Drop for Leash {
    fn drop(&mut self) {
        self.kill();
        remove_cgroup(&self.cgroup);
        if let Some(group) = &self.group {
            for entry in [PINS, STATE].into_iter().filter_map(|at| fs::read_dir(at).ok()).flatten().flatten()
            {
                if is_of(group, &entry.file_name().to_string_lossy()) {
                    let _ = fs::remove_dir_all(entry.path()).or_else(|_| fs::remove_file(entry.path()));
                }
            }
        }
        if let Some(mut pipe) = self.reaper.stdin.take() {
            let _ = pipe.write_all(b"done\n");
        }
        let _ = self.reaper.wait();
    }
}

/// Whether a file or folder has the name of this group, or of one that a configuration named after it.
fn is_of(group: &str, name: &str) -> bool {
    name.split_once(group).is_some_and(|(before, after)| {
        (before.is_empty() || before.ends_with('-')) && (after.is_empty() || after.starts_with(['-', '.']))
    })
}

/// The cgroup of this process, as a directory.
fn own_cgroup() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mount = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let path = words.next()?;
        (words.next()? == "cgroup2").then(|| PathBuf::from(path))
    });
    let mount = mount.context("no cgroup2 is mounted")?;
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let below = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or("");
    let own = mount.join(below);
    // In a container the own cgroup may lie outside of what is mounted.
    Ok(if own.is_dir() { own } else { mount })
}

fn kill_cgroup(cgroup: &Path) {
    let _ = fs::write(cgroup.join("cgroup.kill"), "1");
    let _ = until("a cgroup to be empty", Duration::from_secs(10), || {
        let events = fs::read_to_string(cgroup.join("cgroup.events")).unwrap_or_default();
        (!events.contains("populated 1")).then_some(())
    });
}

fn remove_cgroup(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    let _ = fs::remove_dir(cgroup);
}

/// Kills what tests left whose process is gone.
fn sweep(below: &Path) {
    for entry in fs::read_dir(below).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if left_behind(&name) {
            eprintln!("killing what a test left behind: {}", entry.path().display());
            kill_cgroup(&entry.path());
            remove_cgroup(&entry.path());
        }
    }
}

/// Whether this is the name of a cgroup of ours whose test process is gone.
fn left_behind(name: &str) -> bool {
    let Some(rest) = name.strip_prefix(PREFIX) else { return false };
    let Some((pid, _)) = rest.split_once('-') else { return false };
    pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_belongs_to_a_dead_test_is_swept() {
        assert!(!left_behind(&format!("{PREFIX}{}-0", std::process::id())));
        // Above the highest number that the kernel gives.
        assert!(left_behind(&format!("{PREFIX}4194305-0")));
        for other in ["bfs-test", "bfs-test-x-0", "bfs-group-4194305", "user.slice"] {
            assert!(!left_behind(other), "{other}");
        }
    }

    #[test]
    fn the_files_of_a_group_are_known_by_their_names() {
        let of = |name| is_of("config-17", name);
        for name in [
            "config-17",
            "config-17-one",
            "multiple-config-17",
            "agent-config-17-one.sock.lock",
            "state-config-17.json",
        ] {
            assert!(of(name), "{name}");
        }
        for name in ["config-170", "config-1", "multiple-config-171", "myconfig-17", "state-config-1.json"] {
            assert!(!of(name), "{name}");
        }
    }
}
