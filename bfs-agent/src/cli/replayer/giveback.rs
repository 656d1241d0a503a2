//! `generations`, `restore` and `mount`: what a store gives back.

use std::path::Path;

use bfs_common::record::CheckpointId;
use bfs_common::wire::{Digests, GenerationLine};
use clap::Args;
use tokio::signal::unix::SignalKind;

use super::{Owner, at_signal};
use crate::backup::retention::{self, Retention};
use crate::backup::{Replayer, ReplayerHandle, ServeOptions};
use crate::cli::{say, sayln};
use crate::generation::{self, At, Client, Clones, OpenError, Tree, time_text};
use crate::mount::{self, End, Link};
use crate::net::{self, ConnectError, Destination};

/// Where to read from.
#[derive(Debug, Args)]
pub(super) struct From {
    #[command(flatten)]
    owner: Owner,
    /// Name of the group
    #[arg(long, value_name = "NAME", default_value = "default")]
    group: String,
}

impl From {
    /// The group.
    pub(super) fn group(&self) -> &str {
        &self.group
    }

    /// The store, if its folder was given.
    pub(super) fn store(&self) -> Option<&Path> {
        self.owner.store.as_deref()
    }

    /// How an agent on this host reaches the store; `own`: nobody has it but this process.
    pub(super) fn destination(&self, own: bool) -> String {
        match (&self.owner.store, &self.owner.connect) {
            (Some(store), _) if own => format!("dir:{}", store.display()),
            (Some(store), _) => Destination::Unix(net::store_socket(store)).to_string(),
            (None, connect) => connect.as_ref().map(ToString::to_string).unwrap_or_default(),
        }
    }

    /// Writes a checkpoint, or what stands at a path of it, below a directory.
    pub(super) fn write_out(
        &self,
        client: &mut Client,
        number: CheckpointId,
        only: Option<&Path>,
        to: &Path,
    ) -> anyhow::Result<()> {
        let tree = client.tree(&self.group, number, Digests::None)?;
        let clones = self.clones(client, &tree)?;
        let done = generation::restore(client, &self.group, &tree, only, to, clones.as_ref())?;
        let shared = match done.shared {
            0 => String::new(),
            bytes => format!(", {bytes} more share their blocks with the backup"),
        };
        sayln!(
            "checkpoint {number} ({}): {} files, directories and links, {} bytes{shared}, below {}",
            time_text(tree.label.wall_ns),
            done.names,
            done.bytes,
            to.display()
        )?;
        Ok(())
    }

    /// The tree of the store, where that is on this host.
    pub(super) fn clones(&self, client: &mut Client, tree: &Tree) -> anyhow::Result<Option<Clones>> {
        match self.owner.connect {
            Some(Destination::Tcp(_)) => Ok(None),
            _ => Ok(Clones::find(client, &self.group, tree)?),
        }
    }

    /// Which checkpoint is meant.
    pub(super) fn find(&self, client: &mut Client, at: &At) -> anyhow::Result<CheckpointId> {
        let all = client.generations(&self.group)?;
        at.find(&all).map_err(|why| anyhow::anyhow!("group {:?}: {why}", self.group))
    }

    /// A connection; with a store that nobody owns, to a replayer in this process.
    pub(super) fn open(&self) -> anyhow::Result<(Client, Option<ReplayerHandle>)> {
        self.owner.open(Retention::everything(retention::KEEP_MIN))
    }
}

impl Owner {
    /// A connection; with a store that nobody owns, to a replayer in this process that keeps what it is told.
    fn open(&self, retention: Retention) -> anyhow::Result<(Client, Option<ReplayerHandle>)> {
        let (address, keys) = self.address()?;
        let connected = Client::open(net::connect(&address, &keys));
        match (connected, &self.store) {
            (Ok(client), _) => Ok((client, None)),
            (Err(OpenError::Connect(ConnectError::Unreachable { .. })), Some(store)) => {
                Self::start(store, retention)
            }
            (Err(OpenError::Connect(error)), _) => Err(error.into()),
            (Err(error), _) => Err(error.into()),
        }
    }

    /// As [`Self::open`]; a store that is not there yet is made.
    pub(super) fn open_or_make(
        &self,
        retention: Retention,
    ) -> anyhow::Result<(Client, Option<ReplayerHandle>)> {
        match &self.store {
            Some(store) if !store.join("format").exists() => Self::start(store, retention),
            _ => self.open(retention),
        }
    }

    fn start(store: &Path, retention: Retention) -> anyhow::Result<(Client, Option<ReplayerHandle>)> {
        let options = ServeOptions { store: store.into(), retention, ..ServeOptions::default() };
        let handle = Replayer::start(options)?;
        let client = Client::open(async { Ok(handle.connect_local()) })?;
        Ok((client, Some(handle)))
    }
}

/// Serves a checkpoint as a file system until it is unmounted or a signal comes.
pub(super) fn mount(from: &From, at: &At, everybody: bool, to: &Path) -> anyhow::Result<()> {
    let (mut client, owner) = from.open()?;
    let number = from.find(&mut client, at)?;
    let connect: mount::Connect = match &owner {
        Some(handle) => {
            let local = handle.local();
            Box::new(move || Client::open(async { Ok(local.connect()) }))
        }
        None => {
            let (address, keys) = from.owner.address()?;
            Box::new(move || Client::open(net::connect(&address, &keys)))
        }
    };
    let mounted = mount::mount(Link::new(&from.group, number, client, connect), to, everybody)?;
    let ender = mounted.ender();
    at_signal(&[SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()], move || {
        // It may have ended meanwhile.
        let _ = ender.send(End::Asked);
    })?;
    sayln!("checkpoint {number} is mounted on {0}, read-only, until `umount {0}` or a signal", to.display())?;
    mounted.wait().map_err(|error| anyhow::anyhow!("the mount on {} failed: {error}", to.display()))?;
    drop(owner);
    Ok(())
}

pub(super) fn generations(from: &From, json: bool) -> anyhow::Result<()> {
    let (mut client, _owner) = from.open()?;
    let all = client.generations(&from.group)?;
    if json {
        sayln!("{}", serde_json::to_string_pretty(&all)?)?;
    } else {
        say(format_args!("{}", table(&all)))?;
    }
    Ok(())
}

fn table(all: &[GenerationLine]) -> String {
    use std::fmt::Write;
    let has_processes = all.iter().any(|g| g.process.is_some());
    // Only who keeps process state has a column for it.
    let column = |text: String| if has_processes { format!("{text:>11}  ") } else { String::new() };
    let mut out = format!(
        "checkpoint  time                   changed        bytes  {}tag\n",
        column("processes".into())
    );
    for g in all {
        let time = time_text(g.label.wall_ns);
        // Writing to a string does not fail.
        let _ = writeln!(
            out,
            "{:>10}  {time:20}  {:>8}  {:>11}  {}{}",
            g.checkpoint.0,
            g.changed,
            g.bytes,
            column(g.process.map_or_else(|| "-".into(), |bytes| bytes.to_string())),
            g.label.tag
        );
    }
    out
}

/// Makes checkpoints one: the newer of two and all between them.
pub(super) fn merge(from: &From, [a, b]: [&At; 2], keep_min: u32) -> anyhow::Result<()> {
    let (mut client, _owner) = from.owner.open(Retention::everything(keep_min))?;
    let all = client.generations(&from.group)?;
    let find = |at: &At| at.find(&all).map_err(|why| anyhow::anyhow!("group {:?}: {why}", from.group));
    let (a, b) = (find(a)?, find(b)?);
    let gone = client.merge(&from.group, a, b)?;
    let went = match gone.len() {
        1 => "1 went into it".to_owned(),
        n => format!("{n} went into it"),
    };
    sayln!("checkpoints {a} to {b} are one now, checkpoint {b}: {went}")?;
    Ok(())
}

pub(super) fn restore(from: &From, at: &At, only: Option<&Path>, to: &Path) -> anyhow::Result<()> {
    let (mut client, _owner) = from.open()?;
    let number = from.find(&mut client, at)?;
    from.write_out(&mut client, number, only, to)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bfs_common::record::CheckpointLabel;

    #[test]
    fn a_line_each() {
        let label = CheckpointLabel {
            wall_ns: 1_795_267_445_000_000_000,
            tag: "before".into(),
            ..Default::default()
        };
        let mut line =
            GenerationLine { checkpoint: CheckpointId(7), label, changed: 3, bytes: 4096, process: None };
        let text = table(std::slice::from_ref(&line));
        assert!(text.contains("         7  2026-11-21T13:24:05Z         3         4096  before\n"), "{text}");
        let without = line.clone();
        line.process = Some(70_000);
        let text = table(&[without, line]);
        assert!(text.contains("  processes  tag\n"), "{text}");
        assert!(text.contains("     4096            -  before\n"), "{text}");
        assert!(text.contains("     4096        70000  before\n"), "{text}");
    }
}
