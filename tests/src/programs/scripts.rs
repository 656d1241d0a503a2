//! The programs that are shell scripts (tests/programs/): file juggling, git, PostgreSQL.
//!
//! A script appends a mark, one word and a number, to `data/marks` when something is *done*: the
//! check of a checkpoint reads the last mark and knows what must be there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};

use super::{Place, Program, read_optional, size_optional};

/// Writes the script to `aux` and gives the line that runs it.
pub(super) fn script(name: &str, text: &str, place: &Place) -> Vec<String> {
    let path = place.aux.join(format!("{name}.sh"));
    fs::write(&path, text).expect("the folder beside the data is writable");
    ["/bin/sh", path.to_str().expect("text")]
        .map(str::to_owned)
        .into_iter()
        .chain([place.data.display().to_string(), place.aux.display().to_string()])
        .collect()
}

/// The last mark of a script.
pub(super) fn last_mark(tree: &Path) -> Result<Option<(String, u64)>> {
    let text = String::from_utf8(read_optional(&tree.join("marks"))?).context("marks are not text")?;
    ensure!(text.is_empty() || text.ends_with('\n'), "the last mark is torn: {text:?}");
    let Some(line) = text.lines().last() else { return Ok(None) };
    let (mark, number) = line.split_once(' ').with_context(|| format!("no mark: {line:?}"))?;
    Ok(Some((mark.to_owned(), number.parse().with_context(|| format!("no mark: {line:?}"))?)))
}

/// Whether a line that begins so is among the marks.
pub(super) fn marks_hold(place: &Place, line: &str) -> bool {
    let marks = fs::read_to_string(place.data.join("marks")).unwrap_or_default();
    marks.lines().any(|mark| mark.starts_with(line))
}

/// Renames, appends, temporaries, links, attributes.
pub struct FsScript;

impl Program for FsScript {
    fn name(&self) -> &'static str {
        "fs-script"
    }

    fn command(&self, place: &Place) -> Vec<String> {
        script("fs-script", include_str!("../../programs/fs-script.sh"), place)
    }

    fn half_way(&self, place: &Place) -> bool {
        marks_hold(place, "round 20")
    }

    fn check(&self, tree: &Path, _: &Place) -> Result<Vec<String>> {
        let marks = String::from_utf8(read_optional(&tree.join("marks"))?)?;
        let mut wrong = Vec::new();
        let mut rounds = 0;
        for line in marks.lines() {
            rounds += 1;
            if line != format!("round {rounds}") {
                wrong.push(format!("mark {rounds} is {line:?}"));
            }
        }
        let state = String::from_utf8(read_optional(&tree.join("state"))?)?;
        if !(state == format!("{rounds}\n") || state == format!("{}\n", rounds + 1) || state.is_empty()) {
            wrong.push(format!("state is {state:?} after {rounds} rounds"));
        }
        if state.is_empty() && rounds > 0 {
            wrong.push("state is missing".to_owned());
        }
        wrong.truncate(20);
        Ok(wrong)
    }
}

/// `git clone` of a local repository with commits, branches and `git gc`.
pub struct GitWork;

impl Program for GitWork {
    fn name(&self) -> &'static str {
        "git-work"
    }

    fn command(&self, place: &Place) -> Vec<String> {
        script("git-work", include_str!("../../programs/git-work.sh"), place)
    }

    fn half_way(&self, place: &Place) -> bool {
        marks_hold(place, "committed")
    }

    fn check(&self, tree: &Path, _: &Place) -> Result<Vec<String>> {
        // Between these marks the repository is whole.
        let commits = match last_mark(tree)? {
            Some((mark, number)) if mark == "committed" => number,
            _ => return Ok(Vec::new()),
        };
        let work = tree.join("work");
        let git = |args: &[&str]| -> Result<Output> {
            Command::new("git").arg("-C").arg(&work).args(args).output().context("git does not start")
        };
        let mut wrong = Vec::new();
        let fsck = git(&["fsck", "--full", "--no-dangling"])?;
        if !fsck.status.success() {
            wrong.push(format!("git fsck: {}", String::from_utf8_lossy(&fsck.stderr)));
        }
        let log = git(&["log", "--all", "--format=%s"])?;
        let log = String::from_utf8_lossy(&log.stdout).into_owned();
        let last = log.lines().filter_map(|l| l.strip_prefix("op ")?.parse::<u64>().ok()).max().unwrap_or(0);
        if !(last == commits || last == commits + 1) {
            wrong.push(format!("{commits} commits were told, the log ends at {last}"));
        }
        Ok(wrong)
    }
}

/// PostgreSQL: initdb, then pgbench and a client that is told of each commit.
pub struct Postgres;

impl Program for Postgres {
    fn name(&self) -> &'static str {
        "postgres"
    }

    fn prepare(&self, place: &Place) -> Result<()> {
        // The server refuses to run as root.
        let line = format!("postgres {} {}", place.data.display(), place.aux.display());
        let words: Vec<&str> = line.split(' ').collect();
        let done = Command::new("chown").args(words).output()?;
        ensure!(done.status.success(), "chown postgres: {}", String::from_utf8_lossy(&done.stderr));
        Ok(())
    }

    fn command(&self, place: &Place) -> Vec<String> {
        script("postgres", include_str!("../../programs/postgres.sh"), place)
    }

    fn half_way(&self, place: &Place) -> bool {
        marks_hold(place, "committed 3")
    }

    fn check(&self, tree: &Path, place: &Place) -> Result<Vec<String>> {
        let Some((_, told)) = last_mark(tree)?.filter(|(mark, _)| mark == "committed") else {
            return Ok(Vec::new());
        };
        let path = script("postgres-check", include_str!("../../programs/postgres-check.sh"), place);
        let done = Command::new(&path[0]).arg(&path[1]).arg(tree.join("pg")).output()?;
        let out = String::from_utf8_lossy(&done.stdout).into_owned();
        if !done.status.success() {
            let log = fs::read_to_string(PathBuf::from(tree).join("pg/check.log")).unwrap_or_default();
            return Ok(vec![format!("{out}{}{log}", String::from_utf8_lossy(&done.stderr))]);
        }
        let committed: u64 = out.trim().parse().with_context(|| format!("no number: {out:?}"))?;
        if committed == told || committed == told + 1 {
            return Ok(Vec::new());
        }
        Ok(vec![format!("{told} commits were told, the database has {committed}")])
    }
}

/// Calls that fail: EEXIST and its kind, EACCES as another user, and ENOSPC when `small` is set (the
/// replicated directory is then a small file system of its own).
pub struct Failing {
    /// Fill the file system up.
    pub small: bool,
}

impl Program for Failing {
    fn name(&self) -> &'static str {
        if self.small { "failing-full" } else { "failing" }
    }

    fn prepare(&self, place: &Place) -> Result<()> {
        if self.small {
            fs::write(place.aux.join("small"), "")?;
        }
        Ok(())
    }

    fn command(&self, place: &Place) -> Vec<String> {
        script("failing", include_str!("../../programs/failing.sh"), place)
    }

    fn half_way(&self, place: &Place) -> bool {
        marks_hold(place, "round 1")
    }

    // A round is long; what each failing call says comes more often.
    fn progress(&self, tree: &Path) -> Result<u64> {
        Ok(size_optional(&tree.join("errors.log"))? + size_optional(&tree.join("marks"))?)
    }

    fn check(&self, tree: &Path, _: &Place) -> Result<Vec<String>> {
        let marks = String::from_utf8(read_optional(&tree.join("marks"))?)?;
        let wrong = marks.lines().enumerate().filter(|(i, line)| *line != format!("round {}", i + 1));
        Ok(wrong.map(|(i, line)| format!("mark {} is {line:?}", i + 1)).take(20).collect())
    }
}
