//! `send` and `receive`: a checkpoint from one store into another; `export`: one as an archive.

use std::fs::File;
use std::io::{BufWriter, IsTerminal, Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use bfs_common::record::CheckpointId;
use bfs_common::wire::{Digests, StoreState};

use super::Owner;
use super::giveback::From;
use crate::backup::retention::{KEEP_MIN, Retention};
use crate::cli::sayln;
use crate::generation::{self, At, Client, time_text};

/// Between two looks at how far the applier is.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How often it is shown how much was sent.
const SHOW_EVERY: Duration = Duration::from_millis(500);
/// Bytes of a stream that are read at once.
const PIECE: usize = 1 << 20;

/// Shows on a terminal how much went by.
struct Progress {
    what: &'static str,
    bytes: u64,
    shown: Option<Instant>,
    shows: bool,
}

impl Progress {
    fn new(what: &'static str) -> Self {
        Self { what, bytes: 0, shown: None, shows: std::io::stderr().is_terminal() }
    }

    fn add(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        if self.shows && self.shown.is_none_or(|then| then.elapsed() >= SHOW_EVERY) {
            self.shown = Some(Instant::now());
            eprint!("\r{} {} MiB", self.what, self.bytes >> 20);
        }
    }

    fn end(&self) {
        if self.shown.is_some() {
            eprintln!("\r{} {} bytes", self.what, self.bytes);
        }
    }
}

/// Standard output, for bytes that are no text.
fn output() -> anyhow::Result<File> {
    let out = std::io::stdout();
    anyhow::ensure!(
        !out.is_terminal(),
        "standard output is a terminal: write to a file (> FILE) or a pipe (| CMD)"
    );
    Ok(File::from(rustix::io::dup(out)?))
}

/// A file that was written is on the disk.
fn synced(out: &File) -> anyhow::Result<()> {
    let failed = |error| anyhow::anyhow!("cannot write to standard output: {error}");
    if out.metadata().map_err(failed)?.is_file() {
        out.sync_all().map_err(failed)?;
    }
    Ok(())
}

/// Writes the stream of a checkpoint to standard output.
pub(super) fn send(from: &From, older: Option<&At>, to: &At) -> anyhow::Result<()> {
    let mut out = output()?;
    let (mut client, _owner) = from.open()?;
    let to = from.find(&mut client, to)?;
    let older = older.map(|at| from.find(&mut client, at)).transpose()?;
    let mut progress = Progress::new("sent");
    client.transfer(from.group(), older, to, |piece| {
        progress.add(piece.len());
        out.write_all(piece)
    })?;
    synced(&out)?;
    progress.end();
    Ok(())
}

/// Takes a stream into a store.
pub(super) fn receive(owner: &Owner, group: Option<String>, file: Option<&Path>) -> anyhow::Result<()> {
    let mut input: Box<dyn Read> = match file {
        Some(path) => Box::new(
            File::open(path).map_err(|error| anyhow::anyhow!("cannot open {}: {error}", path.display()))?,
        ),
        None => {
            let input = std::io::stdin();
            anyhow::ensure!(
                !input.is_terminal(),
                "standard input is a terminal: give a FILE, or a pipe (CMD |)"
            );
            Box::new(input)
        }
    };
    let (mut client, _handle) = owner.open_or_make(Retention::everything(KEEP_MIN))?;
    let mut progress = Progress::new("taken in");
    let (group, checkpoint) = client.receive(group, &mut |piece: &mut Vec<u8>| {
        piece.resize(PIECE, 0);
        let mut len = 0;
        while len < PIECE {
            match input.read(&mut piece[len..]) {
                Ok(0) => break,
                Ok(some) => len += some,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        piece.truncate(len);
        progress.add(len);
        Ok(())
    })?;
    progress.end();
    applied(&mut client, &group, checkpoint)?;
    sayln!("group {group}: checkpoint {checkpoint}")?;
    Ok(())
}

/// Waits until a checkpoint that is in the log stands in the tree.
pub(super) fn applied(client: &mut Client, group: &str, checkpoint: CheckpointId) -> anyhow::Result<()> {
    loop {
        let all = client.status()?;
        let Some(status) = all.iter().find(|one| one.group == group) else {
            anyhow::bail!("group {group:?} is not in the store any more");
        };
        if status.applied >= checkpoint {
            return Ok(());
        }
        if status.state != StoreState::Ready
            && status.state != StoreState::Damaged
            && let Some(trouble) = &status.trouble
        {
            anyhow::bail!("checkpoint {checkpoint} is in the store, and cannot be applied yet: {trouble}");
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Writes a checkpoint, or what stands at a path of it, as a tar archive to standard output.
pub(super) fn export(from: &From, at: &At, only: Option<&Path>) -> anyhow::Result<()> {
    let out = output()?;
    let (mut client, _owner) = from.open()?;
    let number = from.find(&mut client, at)?;
    let tree = client.tree(from.group(), number, Digests::None)?;
    let mut writer = BufWriter::with_capacity(PIECE, &out);
    let done = generation::export(&mut client, from.group(), &tree, only, &mut writer)?;
    drop(writer);
    synced(&out)?;
    for path in &done.left_out {
        eprintln!("bfs-replayer: left out, an archive cannot have sockets: {}", path.display());
    }
    eprintln!(
        "checkpoint {number} ({}): {} files, directories and links, {} bytes",
        time_text(tree.label.wall_ns),
        done.names,
        done.bytes
    );
    Ok(())
}
