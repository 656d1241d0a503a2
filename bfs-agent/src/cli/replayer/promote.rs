//! `promote`: a backup becomes the primary.

use std::path::{Path, PathBuf};

use anyhow::Context;
use bfs_common::record::{CheckpointId, PathBytes};
use bfs_common::wire::{Digests, PromoteStage, Promoter, Refusal};
use clap::Args;

use super::giveback::From;
use super::processes::{Processes, Wanted};
use super::transfer::applied;
use crate::cli::sayln;
use crate::generation::{At, Client, Places, Promotion, ReadError, Tree, time_text};
use crate::net::AskError;
use crate::primary::session::group_id;

#[derive(Debug, Args)]
pub(super) struct Promote {
    #[command(flatten)]
    from: From,
    /// Below this directory of this host each file is going to stand, at the absolute path that it had: / for just that
    /// path. What stands there now must be an empty directory, or nothing
    #[arg(long, value_name = "DIR", required_unless_present = "test")]
    to: Option<PathBuf>,
    /// Although the primary's agent answers: it is fenced
    #[arg(long)]
    force: bool,
    /// Only to try: a writable copy in an empty or missing directory. Nobody is fenced, replication goes on
    #[arg(long, value_name = "DIR", conflicts_with_all = ["to", "force"])]
    test: Option<PathBuf>,
    /// With --test: another checkpoint than the newest, as for `restore`
    #[arg(long, value_name = "N|TIME|tag:NAME", requires = "test")]
    at: Option<At>,
    #[command(flatten)]
    process: Wanted,
}

/// The name of this host, for people.
fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

pub(super) fn promote(promote: &Promote) -> anyhow::Result<()> {
    match (&promote.test, &promote.to) {
        (Some(to), _) => test(promote, to),
        (None, Some(to)) => go(promote, to),
        (None, None) => anyhow::bail!("give --to DIR"),
    }
}

/// A copy that nobody depends on.
fn test(promote: &Promote, to: &Path) -> anyhow::Result<()> {
    let (mut client, _owner) = promote.from.open()?;
    let number = match &promote.at {
        Some(at) => promote.from.find(&mut client, at)?,
        None => newest(&mut client, promote.from.group())?,
    };
    promote.from.write_out(&mut client, number, None, to)?;
    sayln!("it is yours: nobody was fenced, and what becomes of it changes nothing")?;
    Ok(())
}

fn newest(client: &mut Client, group: &str) -> anyhow::Result<CheckpointId> {
    let all = client.generations(group)?;
    let last = all.last().map(|line| line.checkpoint);
    last.with_context(|| format!("group {group:?} has no checkpoint yet"))
}

fn go(promote: &Promote, to: &Path) -> anyhow::Result<()> {
    let group = promote.from.group();
    let to = std::path::absolute(to)?;
    let plain = to.components().all(|part| !matches!(part, std::path::Component::ParentDir));
    anyhow::ensure!(plain, "--to {}: write it without `..`", to.display());
    let process = promote.process.look(group)?;
    let (mut client, owner) = promote.from.open()?;
    let by = Promoter { writer: group_id(group), host: host_name(), to: PathBytes::new(&to) };
    let begun = client.status()?.into_iter().find(|status| status.group == group);
    let begun = begun.with_context(|| format!("there is no group {group:?} in this store"))?;
    let gone_on = begun.applied;
    let begun = begun.history.filter(|history| history.by == by && history.stage != PromoteStage::Fenced);
    if begun.is_none() {
        // First what costs nothing to refuse.
        look(promote, &mut client, group, &to)?;
        process.as_ref().map(|process| process.newest(&mut client)).transpose()?;
    }
    let promotion = client.promote(group, by, promote.force).map_err(|error| refused(error, promote, &to))?;
    let history = &promotion.history;
    // Processes that were promoted and have not begun, on files with which nobody has gone on.
    let waits = |process: &Processes<'_>| gone_on <= history.at && process.origin().is_ok();
    if history.stage == PromoteStage::Done && !process.as_ref().is_some_and(waits) {
        sayln!(
            "checkpoint {} was promoted before, below {}: there is nothing to do",
            history.at,
            to.display()
        )?;
        return Ok(());
    }
    applied(&mut client, group, history.at)?;
    // The newest that has processes: those behind it have no more than files.
    let at = match (&process, history.stage) {
        (None, _) => history.at,
        (Some(process), PromoteStage::Fenced) => process.newest(&mut client)?,
        (Some(process), _) => process.origin()?.checkpoint,
    };
    let tree = client.tree(group, at, Digests::None)?;
    let places = Places::of(group, &tree, &to);
    if history.stage == PromoteStage::Fenced {
        write(&promote.from, &mut client, &tree, &places)?;
        process.as_ref().map(|process| process.export(&mut client, at)).transpose()?;
        client.promote_step(group, history.history, PromoteStage::Placing)?;
    }
    if history.stage != PromoteStage::Done {
        places.put(&tree)?;
        client.promote_step(group, history.history, PromoteStage::Done)?;
    }
    tell(group, &promotion, &tree, &places, process.as_ref())?;
    let Some(process) = process else { return Ok(()) };
    let backup = promote.from.destination(owner.is_some());
    // A store that nobody owned is the agent's from now on.
    drop((client, owner));
    Err(process.begin(&tree, &places, backup).into())
}

/// Whether the places are free and have room, before anybody is fenced.
fn look(promote: &Promote, client: &mut Client, group: &str, to: &Path) -> anyhow::Result<()> {
    let at = newest(client, group)?;
    let tree = client.tree(group, at, Digests::None)?;
    let places = Places::of(group, &tree, to);
    if let Some(store) = promote.from.store() {
        let store = std::fs::canonicalize(store)?;
        for at in places.paths() {
            let above =
                at.ancestors().find_map(|above| std::fs::canonicalize(above).ok()).unwrap_or_default();
            anyhow::ensure!(
                !above.starts_with(&store) && !store.starts_with(at),
                "{} and the store {} overlap: the program gets files of its own, elsewhere",
                at.display(),
                store.display()
            );
        }
    }
    places.begin()?;
    let clones = promote.from.clones(client, &tree)?;
    let cost = places.cost(&tree, clones.as_ref());
    places.give_up();
    let (cost, free) = cost?;
    let (mib, free_mib) = (cost.bytes >> 20, free >> 20);
    if cost.shares {
        eprintln!(
            "bfs-replayer: {mib} MiB of files are going to share their blocks with the backup (reflink)"
        );
    } else if clones.is_some() {
        eprintln!("bfs-replayer: {mib} MiB of files are copied; {free_mib} MiB are free there");
        anyhow::ensure!(
            cost.bytes < free,
            "the files take {mib} MiB, and below {} only {free_mib} MiB are free: nobody was fenced",
            to.display()
        );
    }
    Ok(())
}

fn write(from: &From, client: &mut Client, tree: &Tree, places: &Places) -> anyhow::Result<()> {
    places.begin()?;
    let clones = from.clones(client, tree)?;
    places.write(client, from.group(), tree, clones.as_ref())?;
    Ok(())
}

fn refused(error: ReadError, promote: &Promote, to: &Path) -> anyhow::Error {
    let attached = matches!(&error, ReadError::Ask(AskError::Refused(Refusal::Attached { .. })));
    let error = anyhow::Error::from(error);
    if !attached {
        return error;
    }
    error.context(format!(
        "the primary is alive: for a planned change `bfs-agent switchover --group {0} --to DEST` there first; \
         `bfs-replayer promote --group {0} --to {1} --force` fences it, and what it has not sent yet stays behind",
        promote.from.group(),
        to.display()
    ))
}

fn tell(
    group: &str,
    promotion: &Promotion,
    tree: &Tree,
    places: &Places,
    process: Option<&Processes<'_>>,
) -> anyhow::Result<()> {
    let history = &promotion.history;
    sayln!(
        "checkpoint {} ({}) is the primary now, on {}",
        tree.checkpoint,
        time_text(tree.label.wall_ns),
        history.by.host
    )?;
    if tree.checkpoint < history.at {
        sayln!("checkpoints behind it up to {} have no processes; they are kept", history.at)?;
    }
    if promotion.pending_records > 0 {
        sayln!(
            "left out: {} records, {} bytes behind it, which no checkpoint covers",
            promotion.pending_records,
            promotion.pending_bytes
        )?;
    }
    if process.is_some() {
        return Ok(());
    }
    let paths: Vec<String> = places.paths().map(|at| format!("--path {}", at.display())).collect();
    sayln!("go on with: bfs-agent run --group {group} {} --backup ... -- CMD", paths.join(" "))?;
    Ok(())
}
