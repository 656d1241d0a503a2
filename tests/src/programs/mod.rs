//! The programs that are replicated. Each works below one directory until it is told to stop, and
//! has a check of what a tree holds at a checkpoint.
//!
//! Rust programs run as subcommands of `bfs-workload`; scripts stand in tests/programs/. Every
//! program creates `aux/ready` when it works and ends with status 0 soon after `aux/stop` is there.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

pub mod append;
mod churn;
pub mod fio;
pub mod ladder;
pub mod memory;
pub mod names;
pub mod puppet;
pub mod racing;
pub mod requests;
pub mod rewrite;
pub mod scripts;
pub mod sequences;
#[cfg(feature = "sqlite")]
pub mod sqlite;
pub mod steady;
pub mod stores;
pub mod tools;
pub mod unpack;

/// Where a program works.
#[derive(Clone, Debug)]
pub struct Place {
    /// The replicated directory.
    pub data: PathBuf,
    /// A directory outside of it: marks, sockets, what the program reads.
    pub aux: PathBuf,
}

impl Place {
    /// The program ends when this file is there.
    #[must_use]
    pub fn stop(&self) -> PathBuf {
        self.aux.join("stop")
    }

    /// Whether the program is to end.
    #[must_use]
    pub fn stopping(&self) -> bool {
        self.stop().exists()
    }

    /// The program says that it works.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn ready(&self) -> Result<()> {
        std::fs::write(self.aux.join("ready"), "").context("cannot say that the program works")
    }
}

/// A program and its check.
pub trait Program: Sync {
    /// Its name, fit for a file name.
    fn name(&self) -> &'static str;

    /// Makes what the program needs in `aux`, before replication begins.
    ///
    /// # Errors
    /// When it cannot.
    fn prepare(&self, place: &Place) -> Result<()> {
        let _ = place;
        Ok(())
    }

    /// The command line.
    fn command(&self, place: &Place) -> Vec<String>;

    /// Whether the program is in the middle of its work, with files open.
    fn half_way(&self, place: &Place) -> bool {
        std::fs::read_dir(&place.data).is_ok_and(|mut entries| entries.next().is_some())
    }

    /// How far the program had come in a tree, the primary or a backup: a number that only grows.
    ///
    /// # Errors
    /// When it cannot be read.
    fn progress(&self, tree: &Path) -> Result<u64> {
        size_optional(&tree.join("marks"))
    }

    /// What differs from one moment to a later one while the program works.
    ///
    /// # Errors
    /// When it cannot be read.
    fn activity(&self, place: &Place) -> Result<u64> {
        self.progress(&place.data)
    }

    /// What is wrong with a tree that a checkpoint left. The check may write to it: it gets a copy.
    ///
    /// # Errors
    /// When the check cannot be made.
    fn check(&self, tree: &Path, place: &Place) -> Result<Vec<String>>;
}

/// A program with much beside it that it never touches.
pub struct BesideMuch<'a>(pub &'a dyn Program);

impl BesideMuch<'_> {
    /// Bytes that lie there.
    pub const BYTES: u64 = 64 << 20;

    /// Bytes in the program's own files, which stand in the top folder.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn own_bytes(place: &Place) -> Result<u64> {
        let mut sum = 0;
        for entry in std::fs::read_dir(&place.data)? {
            let meta = entry?.metadata();
            sum += meta.map_or(0, |meta| if meta.is_file() { meta.len() } else { 0 });
        }
        Ok(sum)
    }
}

impl Program for BesideMuch<'_> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn prepare(&self, place: &Place) -> Result<()> {
        let folder = place.data.join("untouched");
        std::fs::create_dir(&folder)?;
        for file in 0..64_u64 {
            // Not zeros, so that nobody stores them as holes.
            let bytes = (file + 1).to_le_bytes().repeat((Self::BYTES / 64 / 8) as usize);
            std::fs::write(folder.join(format!("file-{file}")), bytes)?;
        }
        self.0.prepare(place)
    }

    fn command(&self, place: &Place) -> Vec<String> {
        self.0.command(place)
    }

    fn half_way(&self, place: &Place) -> bool {
        self.0.half_way(place)
    }

    fn progress(&self, tree: &Path) -> Result<u64> {
        self.0.progress(tree)
    }

    fn activity(&self, place: &Place) -> Result<u64> {
        self.0.activity(place)
    }

    fn check(&self, tree: &Path, place: &Place) -> Result<Vec<String>> {
        self.0.check(tree, place)
    }
}

/// The command line of a subcommand of `bfs-workload`.
fn workload(name: &str, place: &Place) -> Vec<String> {
    vec![
        crate::world::binary("bfs-workload").display().to_string(),
        name.to_owned(),
        place.data.display().to_string(),
        place.aux.display().to_string(),
    ]
}

/// The numbers of one writer after another, from a file of lines that [`crate::ledger`] wrote; a
/// file that is not there yet has none.
fn read_optional(path: &Path) -> Result<Vec<u8>> {
    match std::fs::read(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other.with_context(|| path.display().to_string()),
    }
}

/// The size of a file; one that is not there yet has none.
fn size_optional(path: &Path) -> Result<u64> {
    match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(0),
        other => Ok(other.with_context(|| path.display().to_string())?.len()),
    }
}

/// For measurements: ns that one getppid takes.
fn getppid_ns(count: u64) -> f64 {
    let started = std::time::Instant::now();
    for _ in 0..count {
        // SAFETY: a system call without arguments.
        unsafe { libc::getppid() };
    }
    started.elapsed().as_nanos() as f64 / count as f64
}

/// Runs a subcommand of `bfs-workload`: NAME DATA AUX [WRITER, COUNT or RATE].
///
/// # Errors
/// What the program met, or a command line that is none.
pub fn main(args: &[String]) -> Result<()> {
    let [name, data, aux, rest @ ..] = args else {
        anyhow::bail!("usage: bfs-workload NAME DATA AUX [WRITER, COUNT or RATE]");
    };
    let place = Place { data: data.into(), aux: aux.into() };
    if name == "rows" {
        let [beside, filter] = rest else { anyhow::bail!("usage: bfs-workload rows DATA AUX BESIDE FILTER") };
        return crate::rows::driver::run(&place, Path::new(beside), filter);
    }
    let writer = rest.first().map(|w| w.parse::<usize>()).transpose()?;
    match name.as_str() {
        "append-writers" => append::run(&place, append::Pace::Steady, writer),
        "append-bursts" => append::run(&place, append::Pace::Bursts, writer),
        "ladder" => ladder::run(&place, writer),
        "memory" => memory::run(&place, writer.context("MIB is missing")?),
        "racing-buffer" => racing::run(&place),
        "stores" => stores::run(&place),
        "steady" => steady::run(&place, writer.context("RATE is missing")?, false),
        "steady-mapped" => steady::run(&place, writer.context("RATE is missing")?, true),
        name if name.starts_with("requests-") => requests::run(&place, name),
        "random-names" => names::run(&place, writer),
        "sequences" => sequences::run(&place),
        "puppet" => puppet::run(&place),
        #[cfg(feature = "sqlite")]
        "sqlite-journal" => sqlite::run(&place, sqlite::Mode::Journal, writer),
        #[cfg(feature = "sqlite")]
        "sqlite-wal" => sqlite::run(&place, sqlite::Mode::Wal, writer),
        #[cfg(feature = "sqlite")]
        "sqlite-inserts" => sqlite::inserts(&place, writer.context("COUNT is missing")? as u64),
        // For the test of the leash: holds a process, says its number, and waits to be killed.
        "leashed" => {
            let leash = crate::leash::Leash::new(&place.data, None)?;
            let mut command = std::process::Command::new("setsid");
            let mut child = leash.hold(command.args(["sleep", "1000"]))?.spawn()?;
            std::fs::write(place.aux.join("held"), format!("{}\n", child.id()))?;
            child.wait()?;
            Ok(())
        }
        "churn" => churn::run(&place.data, writer.context("COUNT is missing")?),
        "rewrite-pages" => rewrite::pages(&place.data, writer.context("COUNT is missing")?),
        "rewrite-files" => rewrite::files(&place.data, writer.context("COUNT is missing")?),
        "getppid" => {
            println!("{:.1}", getppid_ns(writer.context("COUNT is missing")? as u64));
            Ok(())
        }
        other => anyhow::bail!("no workload is named {other}"),
    }
}

/// Starts `count` writers as processes of their own and waits for them.
fn fork_writers(name: &str, place: &Place, count: usize) -> Result<()> {
    let line = workload(name, place);
    let start = |writer: usize| {
        std::process::Command::new(std::env::current_exe()?)
            .args(&line[1..])
            .arg(writer.to_string())
            .spawn()
            .context("a writer does not start")
    };
    let mut children = (0..count).map(start).collect::<Result<Vec<_>>>()?;
    place.ready()?;
    for child in &mut children {
        let status = child.wait()?;
        anyhow::ensure!(status.success(), "a writer ended with {status}");
    }
    Ok(())
}
