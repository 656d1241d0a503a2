//! `promote --with-process`: the processes of the promoted checkpoint go on, under an agent that replicates them.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use bfs_common::record::CheckpointId;
use clap::Args;

use crate::cli::sayln;
use crate::generation::{Client, Places, Tree};
use crate::primary::images::criu::Criu;
use crate::primary::images::{DIRECTORY, Export, Origin, export_folder, origin};

#[derive(Debug, Args)]
pub(super) struct Wanted {
    /// Restore the processes as well, from the newest checkpoint that has them, and go on replicating: ends as
    /// `bfs-agent run --restore` does, which it becomes
    #[arg(long, requires = "to", conflicts_with_all = ["test", "at"])]
    with_process: bool,
    /// Where process images are kept on this host
    #[arg(long, value_name = "DIR", default_value = DIRECTORY, requires = "with_process")]
    process_dir: PathBuf,
    /// With --with-process: more options of `bfs-agent run`, --criu, --checkpoint and --keys among them; without a
    /// --backup the store itself is the first one
    #[arg(last = true, value_name = "OPTION", requires = "with_process")]
    run: Vec<OsString>,
}

/// Processes that are to go on.
pub(super) struct Processes<'a> {
    group: &'a str,
    directory: PathBuf,
    folder: PathBuf,
    run: &'a [OsString],
}

/// The value of an option in a list of words.
fn value<'a>(words: &'a [OsString], option: &str) -> Option<&'a str> {
    let at = words.iter().position(|word| {
        word.to_str()
            .is_some_and(|word| word.strip_prefix(option).is_some_and(|w| w.is_empty() || w.starts_with('=')))
    })?;
    match words[at].to_str()?.split_once('=') {
        Some((_, value)) => Some(value),
        None => words.get(at + 1)?.to_str(),
    }
}

impl Wanted {
    /// Whether CRIU works here, if processes are wanted: before anybody is fenced.
    pub(super) fn look<'a>(&'a self, group: &'a str) -> anyhow::Result<Option<Processes<'a>>> {
        if !self.with_process {
            return Ok(None);
        }
        let criu = value(&self.run, "--criu").unwrap_or("criu");
        Criu::find(Path::new(criu))
            .map_err(|e| anyhow::anyhow!("{}\n  what to do: {}", e.message, e.hint))?;
        let directory = std::path::absolute(&self.process_dir)?;
        let folder = export_folder(&directory, group);
        Ok(Some(Processes { group, directory, folder, run: &self.run }))
    }
}

impl Processes<'_> {
    /// The newest checkpoint that has processes.
    pub(super) fn newest(&self, client: &mut Client) -> anyhow::Result<CheckpointId> {
        let all = client.generations(self.group)?;
        let newest = all.iter().rev().find(|line| line.process.is_some()).map(|line| line.checkpoint);
        newest.with_context(|| {
            format!(
                "no checkpoint of group {:?} that is kept has processes: promote it without them",
                self.group
            )
        })
    }

    /// Writes the images of a checkpoint where the agent takes them.
    pub(super) fn export(&self, client: &mut Client, at: CheckpointId) -> anyhow::Result<()> {
        let shown = || format!("the process images of checkpoint {at} in {}", self.folder.display());
        let mut export = Export::begin(&self.folder).with_context(shown)?;
        client.process(self.group, at, |name, bytes| export.put(name, bytes)).with_context(shown)?;
        let of = export.end().with_context(shown)?;
        anyhow::ensure!(of.checkpoint == at, "{} are those of checkpoint {}", shown(), of.checkpoint);
        Ok(())
    }

    /// Whose state was written and has not begun.
    pub(super) fn origin(&self) -> anyhow::Result<Origin> {
        origin(&self.folder).with_context(|| {
            format!(
                "the processes in {} have begun already, or the promotion was begun without them",
                self.folder.display()
            )
        })
    }

    /// Becomes the agent; comes back only with what went wrong.
    pub(super) fn begin(&self, tree: &Tree, places: &Places, backup: String) -> io::Error {
        let agent = std::env::current_exe().map(|own| own.with_file_name("bfs-agent")).ok();
        let agent = agent.filter(|agent| agent.exists()).unwrap_or_else(|| "bfs-agent".into());
        let binds = match origin(&self.folder) {
            Ok(of) => of.binds,
            Err(error) => return error,
        };
        let mut words: Vec<OsString> =
            ["run", "--group", self.group, "--with-process"].map(Into::into).into();
        words.extend(["--process-dir".into(), self.directory.clone().into()]);
        words.extend(["--restore".into(), self.folder.clone().into()]);
        for (root, at) in places.pairs() {
            words.extend(["--path".into(), at.into()]);
            // Where the processes saw it.
            let seen = binds.iter().find(|(from, _)| from == root).map_or(root, |(_, to)| to.as_path());
            if seen != at {
                words.push("--bind".into());
                words.push([at.as_os_str(), "=".as_ref(), seen.as_os_str()].into_iter().collect());
            }
        }
        if value(self.run, "--backup").is_none() {
            words.extend(["--backup".into(), backup.into()]);
        }
        words.extend(self.run.iter().cloned());
        let shown = words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
        // Who cannot read it is told by the agent.
        let _ = sayln!("the processes of checkpoint {} go on: bfs-agent {shown}", tree.checkpoint);
        Command::new(agent).args(words).exec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_among_words() {
        let words: Vec<OsString> =
            ["--criu", "/c", "--backup=tcp://a:1", "--critical"].map(Into::into).into();
        assert_eq!(value(&words, "--criu"), Some("/c"));
        assert_eq!(value(&words, "--backup"), Some("tcp://a:1"));
        assert_eq!(value(&words, "--crit"), None);
    }
}
