//! The test's side: a session over one file system, and a comparison at every pause.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;

use anyhow::{Context, Result, bail, ensure};

use super::{all, driver};
use crate::world::{FileSystem, Transport, World, number_named};
use crate::{copy, exercise, oracle};

/// What a session showed.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Rows that were done and compared.
    pub done: Vec<String>,
    /// Rows that the file system or the kernel refused.
    pub unsupported: Vec<String>,
    /// What was wrong: the row, and how.
    pub wrong: Vec<String>,
}

/// Runs all rows on a file system. `BFS_ROW` chooses those whose names hold it.
///
/// # Errors
/// When the session itself fails.
pub fn run(file_system: FileSystem) -> Result<Outcome> {
    let filter = std::env::var("BFS_ROW").unwrap_or_default();
    let mut world = World::new(&format!("rows-{}", file_system.name()), Transport::Unix)?;
    // The roots are a directory of the mount, so that there is room on it that is not in scope.
    world.mount(file_system)?;
    let beside = world.beside()?;
    let listener = UnixListener::bind(world.place.aux.join(driver::SOCKET))?;
    world.start_replayer()?;
    let mut line = vec![crate::world::binary("bfs-workload").display().to_string(), "rows".to_owned()];
    line.extend([&world.place.data, &world.place.aux, &beside].map(|p| p.display().to_string()));
    line.push(filter);
    world.run(&line)?;
    let (socket, _) = listener.accept().context("the driver does not come")?;
    let mut outcome = Outcome::default();
    let mut before = (0, 0);
    for line in BufReader::new(socket.try_clone()?).lines() {
        let line = line?;
        let (word, rest) = line.split_once(' ').unwrap_or((&line, ""));
        match word {
            "prepared" => {
                world.checkpoint()?;
                exercise::equal(&world).context("before the first row")?;
                before = counted(&world)?;
            }
            "paused" => {
                match compare(&world, rest) {
                    Ok(wrong) => outcome.wrong.extend(wrong),
                    Err(error) => outcome.wrong.push(format!("{rest}: {error:#}")),
                }
                let now = counted(&world)?;
                let row = all().into_iter().find(|row| row.name == rest).context("no such row")?;
                if now.0 > before.0 && !row.everything {
                    outcome.wrong.push(format!("{rest}: it made everything suspect"));
                }
                if now.1 - before.1 > row.records_max {
                    outcome.wrong.push(format!("{rest}: it cost {} records", now.1 - before.1));
                }
                before = now;
                outcome.done.push(rest.to_owned());
            }
            "unsupported" => {
                let name = rest.split(' ').next().unwrap_or_default();
                let row = all().into_iter().find(|row| row.name == name).context("no such row")?;
                let enosys = rest.ends_with(&format!(" {}", libc::ENOSYS));
                if !enosys && !row.may_be_refused_by(file_system.name()) {
                    outcome.wrong.push(format!("{rest}: refused by {}", file_system.name()));
                }
                outcome.unsupported.push(rest.to_owned());
                continue;
            }
            "failed" => {
                outcome.wrong.push(format!("{rest} (the row itself failed)"));
                continue;
            }
            "done" => {
                if outcome.wrong.is_empty() {
                    last(&world)?;
                }
            }
            other => bail!("the driver said {other:?}"),
        }
        (&socket).write_all(b"on\n")?;
        if word == "done" {
            break;
        }
    }
    ensure!(!outcome.done.is_empty(), "no row was done");
    let status = world.finish()?;
    ensure!(status.success(), "the driver ended with {status}");
    if outcome.wrong.is_empty() {
        exercise::equal(&world).context("after the end of the program")?;
    }
    outcome.done.dedup();
    Ok(outcome)
}

/// How often everything became suspect, and how many records there were.
fn counted(world: &World) -> Result<(u64, u64)> {
    let counters = &world.status()?["counters"];
    let number = |name| number_named(counters, &[name]).with_context(|| format!("the status has no {name}"));
    Ok((number("everything_suspect")?, number("records")?))
}

fn compare(world: &World, row: &str) -> Result<Vec<String>> {
    world.checkpoint()?;
    let folder = row.replace('/', "-");
    let wrong = oracle::compare(&world.place.data.join(&folder), &world.backup().join(&folder))?;
    Ok(wrong.into_iter().map(|what| format!("{row}: {what}")).collect())
}

/// Everything once more, with the program stopped.
fn last(world: &World) -> Result<()> {
    let at = world.scratch.join("stopped");
    world.checkpoint_stopped(&copy::command(&world.place.data, &at))?;
    let wrong = oracle::compare(&at, &world.backup())?;
    ensure!(wrong.is_empty(), "with the program stopped:\n{}", wrong.join("\n"));
    Ok(())
}
