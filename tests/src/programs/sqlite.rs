//! SQLite with concurrent writers, in rollback-journal mode on one database, or in WAL mode with
//! exclusive locking on a database for each writer (then there is no shared-memory file).
//!
//! After each commit the writer appends a line to a file of its own: a commit that anybody has seen
//! so must be in the database at every checkpoint.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use anyhow::Result;
use rusqlite::Connection;

use super::{Place, Program, fork_writers, read_optional, size_optional, workload};
use crate::ledger::{self, Operation};

/// How many writers.
pub const WRITERS: usize = 4;
const LINE: usize = 64;

/// How the database is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// One database, a rollback journal that is deleted at each commit.
    Journal,
    /// A database for each writer, write-ahead log, exclusive locking.
    Wal,
}

impl Mode {
    fn database(self, writer: usize) -> String {
        match self {
            Self::Journal => "ops.db".to_owned(),
            Self::Wal => format!("ops-{writer}.db"),
        }
    }

    fn open(self, path: &Path) -> Result<Connection> {
        let connection = Connection::open(path)?;
        connection.busy_timeout(std::time::Duration::from_secs(60))?;
        if self == Self::Wal {
            // In this order: with exclusive locking before the first access no -shm file is made.
            connection.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
            connection.pragma_update(None, "journal_mode", "WAL")?;
            connection.pragma_update(None, "wal_autocheckpoint", 50)?;
        }
        connection.pragma_update(None, "synchronous", "FULL")?;
        Ok(connection)
    }
}

/// See the module.
pub struct Sqlite(pub Mode);

impl Program for Sqlite {
    fn name(&self) -> &'static str {
        match self.0 {
            Mode::Journal => "sqlite-journal",
            Mode::Wal => "sqlite-wal",
        }
    }

    fn command(&self, place: &Place) -> Vec<String> {
        workload(self.name(), place)
    }

    fn half_way(&self, place: &Place) -> bool {
        (0..WRITERS).all(|writer| {
            let acks = std::fs::metadata(place.data.join(format!("acks-{writer}")));
            acks.is_ok_and(|meta| meta.len() >= 5 * LINE as u64)
        })
    }

    fn progress(&self, tree: &Path) -> Result<u64> {
        (0..WRITERS).map(|writer| size_optional(&tree.join(format!("acks-{writer}")))).sum()
    }

    fn check(&self, tree: &Path, _: &Place) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        let mut writers = vec![Vec::new(); WRITERS];
        for (writer, operations) in writers.iter_mut().enumerate() {
            let path = tree.join(self.0.database(writer));
            if path.exists() {
                let connection = self.0.open(&path)?;
                match rows(&connection, writer) {
                    Ok(found) => *operations = found,
                    // Before the first commit there is no table.
                    Err(e) if e.to_string().contains("no such table") => {}
                    Err(e) => wrong.push(format!("{}: {e}", path.display())),
                }
                let verdict: String = connection.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
                if verdict != "ok" {
                    wrong.push(format!("{}: integrity_check: {verdict}", path.display()));
                }
            }
        }
        wrong.extend(ledger::check(&writers));
        for (writer, operations) in writers.iter().enumerate() {
            let committed = operations.len() as u64;
            match ledger::parse(&read_optional(&tree.join(format!("acks-{writer}")))?, LINE) {
                Ok(acks) => {
                    let acknowledged = acks.len() as u64;
                    if !(acknowledged == committed || acknowledged + 1 == committed) {
                        wrong.push(format!("writer {writer}: {committed} committed, {acknowledged} told"));
                    }
                }
                Err(e) => wrong.push(format!("acks-{writer}: {e}")),
            }
        }
        Ok(wrong)
    }
}

fn rows(connection: &Connection, writer: usize) -> rusqlite::Result<Vec<Operation>> {
    let mut statement =
        connection.prepare("SELECT number, seen FROM ops WHERE writer = ? ORDER BY number")?;
    let rows = statement.query_map([writer as i64], |row| {
        let (number, seen): (i64, String) = (row.get(0)?, row.get(1)?);
        let seen = seen.split(',').map(|n| n.parse().unwrap_or(u64::MAX)).collect();
        Ok(Operation { number: number.unsigned_abs(), seen })
    })?;
    rows.collect()
}

/// The parent (no `writer`) or one writer.
///
/// # Errors
/// What SQLite or a write met.
pub fn run(place: &Place, mode: Mode, writer: Option<usize>) -> Result<()> {
    let Some(writer) = writer else { return fork_writers(Sqlite(mode).name(), place, WRITERS) };
    let connection = mode.open(&place.data.join(mode.database(writer)))?;
    connection.execute_batch(
        "CREATE TABLE IF NOT EXISTS ops (writer INTEGER, number INTEGER, seen TEXT, load BLOB, PRIMARY KEY \
         (writer, number))",
    )?;
    let mut acks =
        OpenOptions::new().create(true).append(true).open(place.data.join(format!("acks-{writer}")))?;
    let mut number = 0u64;
    while !place.stopping() {
        number += 1;
        let mut seen = Vec::new();
        for other in 0..WRITERS {
            let acks = std::fs::metadata(place.data.join(format!("acks-{other}")));
            seen.push(acks.map_or(0, |meta| meta.len() / LINE as u64));
        }
        let text: Vec<String> = seen.iter().map(u64::to_string).collect();
        connection.execute_batch("BEGIN IMMEDIATE")?;
        connection.execute(
            "INSERT INTO ops VALUES (?, ?, ?, randomblob(300))",
            (writer as i64, number as i64, text.join(",")),
        )?;
        connection.execute_batch("COMMIT")?;
        acks.write_all(ledger::line(&Operation { number, seen }, LINE).as_bytes())?;
    }
    Ok(())
}

/// For measurements: so many inserts, each a transaction of its own, by one writer.
///
/// # Errors
/// What SQLite met.
pub fn inserts(place: &Place, count: u64) -> Result<()> {
    let connection = Mode::Journal.open(&place.data.join("inserts.db"))?;
    connection.execute_batch("CREATE TABLE rows (number INTEGER PRIMARY KEY, load BLOB)")?;
    for number in 0..count {
        connection.execute("INSERT INTO rows VALUES (?, randomblob(200))", [number as i64])?;
    }
    Ok(())
}
