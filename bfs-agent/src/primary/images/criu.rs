//! CRIU, the program that dumps and restores processes: finding it, asking what it can do, its command lines.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::outside::Outside;
use crate::primary::failure::{Failure, Kind};

/// The oldest version that is used: it knows the cgroup v2 freezer, and descriptors that come from outside.
const VERSION_MIN: (u32, u32) = (3, 16);

/// Bytes of a file without a name that go into the images, at most.
const GHOST_LIMIT: &str = "256M";

/// A CRIU that works on this kernel.
#[derive(Clone, Debug)]
pub struct Criu {
    program: PathBuf,
    version: (u32, u32),
    tracks: bool,
}

fn cannot(why: String) -> Failure {
    Failure::new(
        Kind::Usage,
        format!("--with-process: {why}"),
        "install criu (https://criu.org) or give one by --criu PATH; where this tree is built, \
         `cargo xtask setup --criu` provides one; or leave --with-process out: the files are safe without it",
    )
}

/// The version in what `criu --version` prints.
fn version_in(text: &str) -> Option<(u32, u32)> {
    let version = text.lines().find_map(|line| line.strip_prefix("Version:"))?.trim();
    let mut parts = version.split(['.', '-', ' ']);
    let major = parts.next()?.parse().ok()?;
    Some((major, parts.next().and_then(|minor| minor.parse().ok()).unwrap_or(0)))
}

impl Criu {
    /// Looks for it, and whether it works here (`criu check`).
    ///
    /// # Errors
    /// [`Kind::Usage`], with what it said itself.
    pub fn find(program: &Path) -> Result<Self, Failure> {
        let shown = program.display();
        let run = |words: &[&str]| {
            Command::new(program)
                .args(words)
                .output()
                .map_err(|e| cannot(format!("{shown} cannot be executed: {e}")))
        };
        let said = run(&["--version"])?;
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        let version = version_in(&text).ok_or_else(|| {
            cannot(format!("{shown} --version does not tell a version of CRIU: {:?}", last_line(&said)))
        })?;
        if version < VERSION_MIN {
            return Err(cannot(format!(
                "{shown} is version {}.{}, and {}.{} is the oldest that does",
                version.0, version.1, VERSION_MIN.0, VERSION_MIN.1
            )));
        }
        let checked = run(&["check"])?;
        if !checked.status.success() {
            return Err(cannot(format!("`{shown} check` fails on this kernel: {}", last_line(&checked))));
        }
        let tracks = run(&["check", "--feature", "mem_dirty_track"])?.status.success();
        // It is executed by a process whose working directory is another one.
        let program = if program.components().count() > 1 {
            std::path::absolute(program).map_err(|e| cannot(e.to_string()))?
        } else {
            program.to_owned()
        };
        Ok(Self { program, version, tracks })
    }

    /// Its version, for status.
    #[must_use]
    pub fn version(&self) -> String {
        format!("{}.{}", self.version.0, self.version.1)
    }

    /// Whether this kernel tells which pages of a process have changed (soft-dirty, `Documentation/admin-guide/mm/soft-dirty.rst`): only
    /// then memory can be dumped ahead.
    #[must_use]
    pub fn tracks_memory(&self) -> bool {
        self.tracks
    }

    fn command(&self, what: &str, images: &Path, log: &str) -> Vec<OsString> {
        let mut line: Vec<OsString> = vec![self.program.clone().into(), what.into()];
        line.extend(["--images-dir".into(), images.into(), "--log-file".into(), log.into(), "-v2".into()]);
        // They are in the group's cgroup because whoever starts them is.
        line.extend(["--manage-cgroups=ignore".into(), "--file-locks".into()]);
        line
    }

    /// Dumps the memory of a tree of processes that run: they stand for a moment only. `before` is the round before this
    /// one, seen from `images`: what did not change since then is not dumped.
    #[must_use]
    pub fn dump_ahead(&self, root: i32, images: &Path, before: Option<&str>) -> Vec<OsString> {
        let mut line = self.command("pre-dump", images, DUMP_LOG);
        line.extend(["--tree".into(), root.to_string().into()]);
        line.extend(tracked(before));
        line
    }

    /// Dumps a tree of processes whose cgroup is frozen; it stays so. `ahead` is the last round of [`Self::dump_ahead`].
    #[must_use]
    pub fn dump(
        &self,
        root: i32,
        images: &Path,
        cgroup: &Path,
        outside: &Outside,
        ahead: Option<&str>,
    ) -> Vec<OsString> {
        let mut line = self.command("dump", images, DUMP_LOG);
        line.extend(["--tree".into(), root.to_string().into(), "--leave-running".into()]);
        if ahead.is_some() {
            line.extend(tracked(ahead));
        }
        line.extend(["--freeze-cgroup".into(), cgroup.into(), "--ghost-limit".into(), GHOST_LIMIT.into()]);
        for key in outside.external() {
            line.extend(["--external".into(), key.into()]);
        }
        line
    }

    /// Makes the processes again; ends when they run.
    #[must_use]
    pub fn restore(&self, images: &Path, outside: &Outside) -> Vec<OsString> {
        let mut line = self.command("restore", images, RESTORE_LOG);
        line.push("--restore-detached".into());
        for (key, fd) in outside.inherited() {
            line.extend(["--inherit-fd".into(), format!("fd[{fd}]:{key}").into()]);
        }
        line
    }

    /// The program, for messages.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }
}

/// The changes of memory are followed from now on, and what did not change since `before` is not dumped.
fn tracked(before: Option<&str>) -> impl Iterator<Item = OsString> {
    let before = before.into_iter().flat_map(|before| ["--prev-images-dir".into(), before.into()]);
    ["--track-mem".into()].into_iter().chain(before)
}

/// What the logs are called, beside the images.
pub const DUMP_LOG: &str = "dump.log";
/// See [`DUMP_LOG`].
pub const RESTORE_LOG: &str = "restore.log";

fn last_line(output: &std::process::Output) -> String {
    let text = [&output.stderr[..], &output.stdout[..]].concat();
    let text = String::from_utf8_lossy(&text);
    text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it says nothing").to_owned()
}

/// The reason in one of its logs: the first error, which is what the others follow from.
#[must_use]
pub fn reason(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let errors =
        || text.lines().filter(|line| line.contains("Error (")).filter(|line| !line.contains("rlimit:"));
    errors()
        .next()
        .and_then(|line| line.split_once("): "))
        .map_or_else(|| format!("look into {}", log.display()), |(_, why)| why.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_understood() {
        assert_eq!(version_in("Version: 4.1.1\n"), Some((4, 1)));
        assert_eq!(version_in("Warn\nVersion: 3.17\nGitID: v3.17"), Some((3, 17)));
        assert_eq!(version_in("criu: not found"), None);
    }

    #[test]
    fn the_first_error_of_a_log_is_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let lines = "(00.0) Error (criu/util.c:1533): rlimit: Can't setup RLIMIT_NOFILE for self\n\
                     (00.1) Error (criu/sk-inet.c:191): inet: Connected TCP socket, consider using\n\
                     (00.2) Error (criu/cr-dump.c:2111): Dumping FAILED.\n";
        std::fs::write(&log, lines).unwrap();
        assert_eq!(reason(&log), "inet: Connected TCP socket, consider using");
        assert!(reason(&dir.path().join("none")).contains("none"));
    }

    #[test]
    fn what_is_missing_or_no_criu_is_said() {
        let missing = Criu::find(Path::new("/does/not/exist")).unwrap_err();
        assert!(missing.message.contains("/does/not/exist"), "{}", missing.message);
        let other = Criu::find(Path::new("/bin/echo")).unwrap_err();
        assert!(other.message.contains("does not tell a version"), "{}", other.message);
    }
}
