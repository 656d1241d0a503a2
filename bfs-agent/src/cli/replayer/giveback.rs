//! `generations` and `restore`: what a store gives back.

use std::path::Path;

use bfs_common::wire::{Digests, GenerationLine};
use clap::Args;

use super::Owner;
use crate::backup::retention::Retention;
use crate::backup::{Replayer, ReplayerHandle, ServeOptions};
use crate::generation::{self, At, Client, OpenError, time_text};
use crate::net::{self, ConnectError};

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
    /// A connection; with a store that nobody owns, to a replayer in this process.
    fn open(&self) -> anyhow::Result<(Client, Option<ReplayerHandle>)> {
        let (address, secret) = self.owner.address()?;
        let connected = Client::open(async { Ok(net::connect(&address, secret.as_ref()).await?) });
        match (connected, &self.owner.store) {
            (Ok(client), _) => Ok((client, None)),
            (Err(OpenError::Connect(ConnectError::Unreachable { .. })), Some(store)) => {
                let everything = Retention { keep: u32::MAX, floor: u32::MAX };
                let options =
                    ServeOptions { store: store.clone(), retention: everything, ..ServeOptions::default() };
                let handle = Replayer::start(options)?;
                let client = Client::open(async { Ok(handle.connect_local()) })?;
                Ok((client, Some(handle)))
            }
            (Err(OpenError::Connect(error)), _) => Err(error.into()),
            (Err(error), _) => Err(error.into()),
        }
    }
}

pub(super) fn generations(from: &From, json: bool) -> anyhow::Result<()> {
    let (mut client, _owner) = from.open()?;
    let all = client.generations(&from.group)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&all)?);
    } else {
        print!("{}", table(&all));
    }
    Ok(())
}

fn table(all: &[GenerationLine]) -> String {
    use std::fmt::Write;
    let mut out = String::from("checkpoint  time                   changed        bytes  tag\n");
    for g in all {
        let time = time_text(g.label.wall_ns);
        // Writing to a string does not fail.
        let _ = writeln!(
            out,
            "{:>10}  {time:20}  {:>8}  {:>11}  {}",
            g.checkpoint.0, g.changed, g.bytes, g.label.tag
        );
    }
    out
}

pub(super) fn restore(from: &From, at: &At, only: Option<&Path>, to: &Path) -> anyhow::Result<()> {
    let (mut client, _owner) = from.open()?;
    let all = client.generations(&from.group)?;
    let number = at.find(&all).map_err(|why| anyhow::anyhow!("group {:?}: {why}", from.group))?;
    let tree = client.tree(&from.group, number, Digests::None)?;
    let done = generation::restore(&mut client, &from.group, &tree, only, to)?;
    println!(
        "checkpoint {number} ({}): {} files, directories and links, {} bytes, below {}",
        time_text(tree.label.wall_ns),
        done.names,
        done.bytes,
        to.display()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bfs_common::record::{CheckpointId, CheckpointLabel};

    #[test]
    fn a_line_each() {
        let label = CheckpointLabel {
            wall_ns: 1_795_267_445_000_000_000,
            tag: "before".into(),
            ..Default::default()
        };
        let text = table(&[GenerationLine { checkpoint: CheckpointId(7), label, changed: 3, bytes: 4096 }]);
        assert!(text.contains("         7  2026-11-21T13:24:05Z         3         4096  before\n"), "{text}");
    }
}
