//! Programs of others that are hard on a file system, as scripts (tests/programs/tools/): test suites for file
//! systems, load generators, databases, package managers. A checkpoint is compared as a whole, with the
//! program stopped; what a program can say of its own files is asked of the backup as well.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::scripts::script;
use super::{Place, Program};

/// A script and what it is given besides the two directories.
pub struct Tool {
    name: &'static str,
    text: &'static str,
    arguments: Vec<String>,
    check: fn(&Path) -> Result<Vec<String>>,
}

fn nothing(_: &Path) -> Result<Vec<String>> {
    Ok(Vec::new())
}

impl Tool {
    fn new(name: &'static str, text: &'static str) -> Self {
        Self { name, text, arguments: Vec::new(), check: nothing }
    }

    /// fsx on as many files as there are seeds.
    #[must_use]
    pub fn fsx(seeds: std::ops::Range<u64>) -> Self {
        let mut this = Self::new("fsx", include_str!("../../programs/tools/fsx.sh"));
        this.arguments = vec![installed("fsx")];
        this.arguments.extend(seeds.map(|seed| seed.to_string()));
        this
    }

    /// All of pjdfstest.
    #[must_use]
    pub fn pjdfstest() -> Self {
        let mut this = Self::new("pjdfstest", include_str!("../../programs/tools/pjdfstest.sh"));
        this.arguments = vec![installed("pjdfstest")];
        this
    }

    /// All that stress-ng does to file systems, with so many workers of each kind.
    #[must_use]
    pub fn stress_ng(workers: usize) -> Self {
        let mut this = Self::new("stress-ng", include_str!("../../programs/tools/stress-ng.sh"));
        this.arguments = vec![workers.to_string()];
        this
    }

    /// rsync, in place and by renaming.
    #[must_use]
    pub fn rsync() -> Self {
        Self::new("rsync", include_str!("../../programs/tools/rsync.sh"))
    }

    /// Redis, which rewrites its append-only file.
    #[must_use]
    pub fn redis() -> Self {
        Self { check: redis, ..Self::new("redis", include_str!("../../programs/tools/redis.sh")) }
    }

    /// RocksDB.
    #[must_use]
    pub fn rocksdb() -> Self {
        Self::new("rocksdb", include_str!("../../programs/tools/rocksdb.sh"))
    }

    /// LMDB.
    #[must_use]
    pub fn lmdb() -> Self {
        Self { check: lmdb, ..Self::new("lmdb", include_str!("../../programs/tools/lmdb.sh")) }
    }

    /// dpkg.
    #[must_use]
    pub fn packages() -> Self {
        Self::new("packages", include_str!("../../programs/tools/packages.sh"))
    }

    /// What the tool finds wrong in a copy of a backup, which it may write to.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn ask(&self, tree: &Path) -> Result<Vec<String>> {
        (self.check)(tree)
    }
}

/// Where `cargo xtask setup` put a program, else the name of one on PATH.
fn installed(name: &str) -> String {
    let tools: Option<PathBuf> = crate::world::binary(name)
        .parent()
        .and_then(Path::parent)
        .map(|target| target.join("tools/bin").join(name));
    tools.filter(|path| path.exists()).map_or_else(|| name.to_owned(), |path| path.display().to_string())
}

/// The append-only file holds whole turns, as Redis itself finds.
fn redis(tree: &Path) -> Result<Vec<String>> {
    let folder = tree.join("appendonlydir");
    let mut wrong = Vec::new();
    for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_none_or(|e| e != "manifest") {
            continue;
        }
        let said = Command::new("redis-check-aof").arg(&path).output().context("redis-check-aof")?;
        // The end of a log that is being written to may be torn: it is not `--fix`ed, but named.
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        if !said.status.success() && !text.contains("AOF analyzed") {
            wrong.push(text);
        }
    }
    Ok(wrong)
}

/// The last turn that was committed is whole.
fn lmdb(tree: &Path) -> Result<Vec<String>> {
    let database = tree.join("database");
    if !database.join("data.mdb").exists() {
        return Ok(Vec::new());
    }
    let said = Command::new("mdb_dump").arg("-p").arg(&database).output().context("mdb_dump")?;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    ensure!(said.status.success(), "mdb_dump: {}", String::from_utf8_lossy(&said.stderr));
    let turn =
        |line: &str| line.split_once("of turn ").and_then(|l| l.1.split(' ').next()?.parse::<u64>().ok());
    let turns: std::collections::BTreeSet<u64> = text.lines().filter_map(turn).collect();
    // mdb_load commits all keys of a turn at once.
    let values = text.lines().filter(|line| turn(line).is_some()).count();
    let whole = turns.len() <= 1 && (values == 0 || values == 100);
    Ok(if whole { Vec::new() } else { vec![format!("{values} values, of turns {turns:?}")] })
}

impl Program for Tool {
    fn name(&self) -> &'static str {
        self.name
    }

    fn command(&self, place: &Place) -> Vec<String> {
        let mut line = script(self.name, self.text, place);
        line.extend(self.arguments.iter().cloned());
        line
    }

    fn check(&self, tree: &Path, _: &Place) -> Result<Vec<String>> {
        self.ask(tree)
    }
}
