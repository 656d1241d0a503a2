//! Subtrees that are added and removed while a session works.
//!
//! On a file system that the probes look at already every call was recorded all along, so a new subtree is simply
//! suspect as a whole, and the next checkpoint has it. On another one the probes look first; then the processes
//! stand for a moment, so that what they were in has ended; then it is the same. Whoever finds a subtree in the
//! state file that the stream has not reads it whole, and lets one go that is not there any more.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::commands::Awaited;
use super::left;
use super::link::probes_failed;
use super::work::Work;
use crate::primary::capture::CaptureError;
use crate::primary::control::{FailureKind, Replies, Reply, WaitFor};
use crate::primary::engine::host::{Host, HostError};
use crate::primary::preflight;
use crate::primary::reader::Root;

/// How a change is refused: what is wrong, and what to do.
type Refused = (String, &'static str);

/// Which change.
#[derive(Clone, Debug)]
pub(super) enum Change {
    /// A further subtree.
    Add(PathBuf),
    /// One less.
    Remove(PathBuf),
}

impl Work {
    /// Changes the subtrees, and answers when a checkpoint with the change is confirmed.
    pub(super) fn change_paths(&mut self, change: &Change, limit: Duration, replies: Replies) {
        let deadline = Instant::now() + limit;
        if let Some(busy) = self.cannot_take() {
            return replies.send(busy);
        }
        let changed = match change {
            Change::Add(path) => self.add_path(path),
            Change::Remove(path) => self.remove_path(path),
        };
        if let Err((why, hint)) = changed {
            return replies.send(Reply::failed(FailureKind::Failed, why, hint));
        }
        let wait = Awaited::Checkpoint(WaitFor::Confirmed);
        self.ask_for(String::new(), "paths", wait, deadline, replies);
    }

    fn add_path(&mut self, path: &Path) -> Result<(), Refused> {
        let shown = path.display();
        let found = preflight::check_roots(&[path.to_owned()], &self.options.destinations());
        let path = match found.map(|mut found| found.pop()) {
            Ok(Some(path)) => path,
            Ok(None) => return Err((format!("{shown} is no path"), "give a directory that exists")),
            Err(failure) => return Err((failure.message, "give another directory")),
        };
        if let Some(other) = preflight::overlapping(&path, &self.options.roots) {
            return Err((
                format!("{shown} and the replicated {} overlap", other.display()),
                "what lies below a replicated directory is replicated with it",
            ));
        }
        let had_btrfs = self.link.reader.has_btrfs();
        let root = self
            .link
            .reader
            .add_root(&path)
            .map_err(|e| (e.to_string(), "choose a directory on ext4, xfs, btrfs or tmpfs"))?;
        if !had_btrfs && self.link.reader.has_btrfs() && !self.link.probes.knows_btrfs() {
            // Else the next try would find one there.
            self.link.reader.keep(|dev| self.engine.model().is_device_of_roots(dev));
            return Err((
                CaptureError::NoBtrfs.to_string(),
                "end the agent and begin with that directory as well",
            ));
        }
        let spool = &self.options.spool;
        preflight::check_spool(spool, &self.options.group, std::slice::from_ref(&path))
            .and_then(|()| {
                left::check_place(spool, &self.options.group, &self.link.reader, std::slice::from_ref(&root))
            })
            .map_err(|failure| (failure.message, "give another directory"))?;
        if !self.engine.model().is_device_of_roots(root.stat.inode.dev) {
            self.look_at(&root).map_err(|why| {
                (
                    format!("{shown} lies on another file system: {why}"),
                    "try again, or give it a --group of its own",
                )
            })?;
        }
        if !self.engine.add_root(root.path, &root.stat) {
            return Err((
                format!("{shown} is a part of what is replicated, by another path"),
                "look at `bfs-agent path list`",
            ));
        }
        self.options.roots.push(path);
        self.tell_roots()?;
        self.write_roots()
    }

    /// Has the probes look at another file system.
    fn look_at(&mut self, root: &Root) -> Result<(), HostError> {
        self.link.probes.add_device(root.stat.inode.dev).map_err(probes_failed)?;
        self.link.stop()?;
        self.link.go();
        self.engine.add_file_system(root.stat.inode.dev, root.file_system, root.subvolume);
        self.find_mapped()?;
        self.expect_asynchronous();
        Ok(())
    }

    fn remove_path(&mut self, path: &Path) -> Result<(), Refused> {
        // It may be gone, so it counts as it was written, too.
        let real = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let Some(index) = self.options.roots.iter().position(|root| *root == real || root == path) else {
            let why = format!("{} is not among the replicated directories", path.display());
            return Err((why, "look at `bfs-agent path list`"));
        };
        if self.options.roots.len() == 1 {
            return Err((
                "it is the last replicated directory".into(),
                "end the agent with `bfs-agent stop`",
            ));
        }
        let removed = self.options.roots.remove(index);
        if let Err(refused) = self.write_roots() {
            self.options.roots.insert(index, removed);
            return Err(refused);
        }
        self.engine.remove_root(&removed);
        self.tell_roots()
    }

    /// What others change counts below these.
    fn tell_roots(&mut self) -> Result<(), Refused> {
        let model = self.engine.model();
        let roots: Vec<_> = model.roots().iter().filter_map(|r| Some(model.get(r.1)?.inode)).collect();
        self.link
            .probes
            .foreign()
            .set_roots(&roots)
            .map_err(|e| (e.to_string(), "try again, or end this agent and start anew"))
    }

    /// A successor needs to know them.
    fn write_roots(&mut self) -> Result<(), Refused> {
        self.kept.set_roots(&self.options.roots);
        self.kept.write(&self.options.group).map_err(|e| {
            (format!("cannot write the state file in /run/bfs: {e}"), "make room there, then try again")
        })
    }
}
