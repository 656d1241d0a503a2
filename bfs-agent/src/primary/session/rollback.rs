//! Going back to a checkpoint from a session at work: the files of the primary become what the
//! backup kept, and that becomes the next checkpoint.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bfs_common::record::{CheckpointId, DISCARDED, FileKind, GapScope, Record};
use bfs_common::wire::Digests;

use super::begin::Ground;
use super::commands::reached;
use super::state::{Selection, State};
use super::work::Work;
use super::{SessionOptions, cannot};
use crate::generation::{At, Client, OpenError, time_text};
use crate::keys::Folder;
use crate::net::Destination;
use crate::primary::capture::Probes;
use crate::primary::capture::probes::group_dir;
use crate::primary::clock::monotonic_ns;
use crate::primary::control::WaitFor;
use crate::primary::engine::Stop;
use crate::primary::engine::host::HostError;
use crate::primary::failure::{Failure, Kind};
use crate::primary::process::{Inherited, Signals};
use crate::primary::reader::{Reader, Root};
use crate::primary::rollback::journal::{self, Journal};
use crate::primary::rollback::plan::{Origin, plan};
use crate::primary::rollback::stage::{self, Folders, Summary};
use crate::primary::rollback::{RollbackError, apply, busy, scan};

/// Paths of each kind that are shown.
const SHOWN: usize = 20;

/// How long processes have for ending by themselves when they are told to, and for dying.
const TERM_WAIT: Duration = Duration::from_secs(5);
pub(super) const KILL_WAIT: Duration = Duration::from_secs(5);

/// Between two looks at something that is waited for.
const LOOK: Duration = Duration::from_millis(50);

impl From<RollbackError> for Failure {
    fn from(error: RollbackError) -> Self {
        let (kind, hint) = match &error {
            RollbackError::Busy(_) => (Kind::GivenUp, "end these processes, then try again"),
            RollbackError::InTheWay(_) => (Kind::GivenUp, "move these files elsewhere, then try again"),
            RollbackError::Mounted(_) => (Kind::GivenUp, "unmount it, then try again"),
            RollbackError::Read(_) => (Kind::Refused, "look at `bfs-replayer generations`"),
            RollbackError::NoRoot(_) => (Kind::Path, "give the same --path as when it was taken"),
            _ => (Kind::RollbackUnfinished, "when that is repaired, `bfs-agent rollback` goes on with it"),
        };
        Self::new(kind, error.to_string(), hint)
    }
}

/// How long each part takes, for the log.
struct Step(Instant);

impl Step {
    fn begin() -> Self {
        Self(Instant::now())
    }

    fn ended(&mut self, what: &str) {
        tracing::debug!(took_ms = self.0.elapsed().as_millis(), "going back: {what}");
        self.0 = Instant::now();
    }
}

/// Finishes what an agent before began and could not finish. Returns the checkpoint that the files
/// are at then, if there was something to finish.
///
/// # Errors
/// [`Failure`].
pub(super) fn finish_interrupted(
    group: &str,
    reader: &Reader,
    roots: &[Root],
) -> Result<Option<CheckpointId>, Failure> {
    let folders = Folders::of(roots, group)?;
    let Some(found) = Journal::read(folders.first())? else { return Ok(None) };
    let same = found.roots.len() == roots.len()
        && found.roots.iter().zip(roots).all(|(then, now)| then.as_path() == now.path);
    if found.group != group || !same {
        return Err(Failure::new(
            Kind::RollbackUnfinished,
            format!(
                "an unfinished rollback of group {:?} stands in {}",
                found.group,
                folders.first().display()
            ),
            "give the same --group and --path as then, in the same order",
        ));
    }
    apply::finish(&found, reader, roots, &folders)?;
    eprintln!(
        "bfs-agent: an unfinished rollback was finished: the files are as at checkpoint {}",
        found.checkpoint
    );
    Ok(Some(found.checkpoint))
}

impl Work {
    /// Takes a checkpoint and waits until it has come so far; without a limit as long as the
    /// destination takes it.
    ///
    /// # Errors
    /// [`Failure`]: not in time, refused, given up.
    pub(super) fn checkpoint_reaching(
        &mut self,
        tag: &str,
        trigger: &'static str,
        wait: WaitFor,
        limit: Option<Duration>,
    ) -> Result<CheckpointId, Failure> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        let late = |deadline: Option<Instant>| deadline.is_some_and(|d| Instant::now() >= d);
        let taken = loop {
            match self.checkpoint(tag.into(), trigger, Stop::IfNeeded) {
                Ok(taken) => break taken,
                Err(e) if late(deadline) || self.detached.is_some() => {
                    return Err(Failure::new(Kind::GivenUp, format!("no checkpoint: {e}"), ""));
                }
                Err(_) => std::thread::sleep(LOOK),
            }
        };
        loop {
            let progress = self.link.shipper.progress();
            if reached(taken.checkpoint, taken.sequence, &progress) >= Some(wait) {
                return Ok(taken.checkpoint);
            }
            if let Some(refusal) = &progress.refusal {
                return Err(Failure::new(Kind::Refused, format!("the replayer refuses: {refusal}"), ""));
            }
            if late(deadline) {
                let why = progress.last_error.map(|e| format!(" ({e})")).unwrap_or_default();
                return Err(Failure::new(
                    Kind::Timeout,
                    format!("checkpoint {} did not get through to the backup{why}", taken.checkpoint),
                    "look at `bfs-replayer status`",
                ));
            }
            self.take_commands();
            self.answer_waiters();
            let _ = self.link.shipper.wait_change(progress.version, Instant::now() + LOOK);
        }
    }

    /// The state before the command: a checkpoint that is durable on the backup.
    ///
    /// # Errors
    /// [`Failure`]; then the command must not start.
    pub(super) fn before_command(&mut self) -> Result<CheckpointId, Failure> {
        let shown = std::io::stderr().is_terminal();
        if shown {
            eprintln!("bfs-agent: copying what is there, so that it can be brought back");
        }
        self.checkpoint_reaching("before run", "start", WaitFor::Confirmed, None)
    }

    /// Waits until no selected process is left, or ends them if that is wanted.
    pub(super) fn wait_for_descendants(&mut self) -> bool {
        let signals: &[_] = if self.options.going_back.end_processes {
            &[(Some(libc::SIGTERM), TERM_WAIT), (Some(libc::SIGKILL), KILL_WAIT)]
        } else {
            &[(None, self.options.final_wait)]
        };
        for (signal, wait) in signals {
            if let Some(signal) = signal {
                send(&self.link.probes, *signal);
            }
            let deadline = Instant::now() + *wait;
            while Instant::now() < deadline {
                self.turn();
                if self.link.probes.nobody_is_selected().is_ok_and(|nobody| nobody) {
                    return true;
                }
            }
        }
        false
    }

    /// Puts a record about going back into the stream, and waits until it is durable on the backup.
    fn say_durably(&mut self, record: &Record) -> Result<(), Failure> {
        let sequence = self.engine.say(record);
        let deadline = Instant::now() + self.options.final_wait;
        let failed = |e: HostError| Failure::new(Kind::GivenUp, e.to_string(), "");
        self.engine.flush(&mut self.link).map_err(failed)?;
        loop {
            let progress = self.link.shipper.progress();
            if progress.durable.sequence >= sequence {
                return Ok(());
            }
            if let Some(refusal) = &progress.refusal {
                return Err(Failure::new(Kind::Refused, format!("the replayer refuses: {refusal}"), ""));
            }
            if Instant::now() >= deadline {
                return Err(Failure::new(
                    Kind::Timeout,
                    "the backup does not answer",
                    "look at the replayer",
                ));
            }
            let _ = self.link.shipper.wait_change(progress.version, Instant::now() + LOOK);
        }
    }

    pub(super) fn reader_client(&self) -> Result<Client, Failure> {
        let connect = self.link.shipper.remote().connector();
        Client::open(connect()).map_err(|e| match e {
            OpenError::Connect(e) => crate::primary::ship::ShipError::Connect(e).into(),
            OpenError::Read(e) => RollbackError::from(e).into(),
        })
    }

    /// Brings the files back. The present state is kept as a checkpoint `before rollback`.
    ///
    /// # Errors
    /// [`Failure`]; [`Kind::RollbackUnfinished`] when files were changed already.
    pub(super) fn roll_back(&mut self, to: CheckpointId, dry_run: bool) -> Result<Summary, Failure> {
        let limit = Some(self.options.final_wait);
        self.state = crate::primary::control::State::RollingBack;
        let mut step = Step::begin();
        let (tag, trigger) =
            if self.options.going_back.discard { ("", DISCARDED) } else { ("before rollback", "rollback") };
        self.checkpoint_reaching(tag, trigger, WaitFor::Applied, limit)?;
        step.ended("the present state is a checkpoint, applied");
        let mut client = self.reader_client()?;
        let group = self.options.group.clone();
        let tree = client.tree(&group, to, Digests::None).map_err(RollbackError::from)?;
        step.ended("what was there is known");
        let mut reader = Reader::new();
        let mut roots = Vec::new();
        for path in &self.options.roots {
            roots.push(reader.add_root(path)?);
        }
        let folders = Folders::of(&roots, &group)?;
        let local = scan::scan(&reader, &roots, &journal::folder_name(&group))?;
        step.ended("what is there is known");
        let model = self.engine.model();
        let origin = Origin {
            known: &|inode| model.find(inode).is_some(),
            include_foreign: self.options.going_back.include_foreign,
        };
        let device_of = |id: &bfs_common::record::Identity| {
            let here = |r: &&Root| r.file_system == id.file_system && r.subvolume == id.subvolume;
            roots.iter().find(here).map(|r| r.stat.inode.dev)
        };
        let plan = plan(&tree, &local, &device_of, &origin)?;
        let moved = plan
            .detach
            .iter()
            .filter_map(|(directory, name, _)| Some(local.nodes.get(directory)?.path.join(name.as_os_str())));
        let mounts = journal::mounts();
        for path in moved {
            if let Some(mount) = mounts.iter().find(|m| m.starts_with(&path)) {
                return Err(RollbackError::Mounted(mount.clone()).into());
            }
        }
        // What the stream has of a file is what stands there: so it knows what was written.
        let followed = plan.compare.iter().copied().filter(|object| {
            let inode = plan.inodes.get(object);
            let now = inode.and_then(|inode| local.nodes.get(inode)).map(|node| &node.stat);
            let known = model.get(*object).filter(|o| Some(&o.inode) == inode);
            now.zip(known).is_some_and(|(now, known)| now.size == known.size && now.meta == known.meta)
        });
        let work = stage::Work {
            followed: &followed.collect(),
            group: &group,
            tree: &tree,
            plan: &plan,
            reader: &reader,
            folders: &folders,
            dry_run,
        };
        let (journal, summary) = work.prepare(&mut client, &roots)?;
        step.ended("everything is staged");
        drop(client);
        if dry_run
            || (summary.restored.is_empty()
                && summary.made.is_empty()
                && summary.removed.is_empty()
                && journal.detach.is_empty()
                && journal.attach.is_empty())
        {
            if !dry_run {
                clear_away(&folders);
            }
            return Ok(summary);
        }
        // Files that were compared and found equal do not count.
        let written: std::collections::BTreeSet<_> = journal.objects.iter().map(|w| w.key.ino).collect();
        let compared = plan.compare.iter().filter_map(|object| plan.inodes.get(object).copied());
        let changed = plan.changed.iter().copied().chain(compared.filter(|i| written.contains(&i.ino)));
        let users = busy::users(changed, plan.moved.iter().copied(), busy::Use::Writing);
        if !users.is_empty() {
            clear_away(&folders);
            return Err(RollbackError::Busy(users).into());
        }
        step.ended("nobody uses it");
        // Both sides know of the intent before the first file changes, and of what: who dies behind the last change has a
        // successor that reads it.
        self.suspect_changes(&journal, &roots);
        self.flush();
        if let Err(failure) = self.say_durably(&Record::RollbackIntent { to }) {
            clear_away(&folders);
            return Err(failure);
        }
        journal.write(folders.first())?;
        step.ended("the intent is written");
        let unfinished = |e: RollbackError| {
            let hint = format!("this finishes it: {}", self.command_line(None));
            Failure::new(Kind::RollbackUnfinished, e.to_string(), hint)
        };
        apply::finish(&journal, &reader, &roots, &folders).map_err(unfinished)?;
        step.ended("done and compared");
        self.suspect_changes(&journal, &roots);
        self.engine.say(&Record::RollbackDone { to });
        Ok(summary)
    }

    /// What we changed ourselves no probe has seen: it is read before the next checkpoint.
    fn suspect_changes(&mut self, journal: &Journal, roots: &[Root]) {
        let now = monotonic_ns();
        let object = |engine: &crate::primary::engine::Engine, key: &journal::Key| {
            let dev = roots.get(key.root as usize)?.stat.inode.dev;
            engine.model().find(bfs_common::abi::InodeId { dev, ino: key.ino, generation: key.generation })
        };
        let mut scopes = Vec::new();
        let places = journal.detach.iter().map(|(d, n, _)| (d, n));
        for (directory, name) in places.chain(journal.attach.iter().map(|(d, n, _, _)| (d, n))) {
            if let Some(directory) = object(&self.engine, directory) {
                scopes.push(GapScope::Entry(directory, name.clone()));
            }
        }
        for wanted in &journal.objects {
            let Some(found) = object(&self.engine, &wanted.key) else { continue };
            let same_size = self.engine.model().get(found).is_some_and(|o| o.size == wanted.size);
            if wanted.kind == FileKind::Regular && same_size {
                let ranges = wanted.bytes.as_ref().map_or(&[][..], |bytes| &bytes.ranges);
                self.engine.suspect_ranges(found, ranges, now);
            } else {
                scopes.push(GapScope::Object(found));
            }
        }
        for scope in &scopes {
            self.engine.suspect(scope, now);
        }
    }
}

/// `bfs-agent rollback`: a session that follows nobody.
///
/// # Errors
/// [`Failure`].
pub fn rollback(
    options: SessionOptions,
    to: Option<At>,
    dry_run: bool,
    inherited: &Inherited,
) -> Result<u8, Failure> {
    // What is begun is ended: signals wait.
    let _signals = Signals::start(inherited, |_| {}).map_err(|e| cannot("read signals", &e))?;
    let ground = Ground::open(options, false)?;
    if ground.options.going_back.end_processes {
        end_left_over(&ground.options.group)?;
    }
    let interrupted = ground.rolled_back;
    let probes = ground.load_probes(None)?;
    let state = State::new(&ground.options, "rollback", Selection::Processes(Vec::new()));
    let mut work = ground.build(probes, None, &state, false)?;
    let done = work.find_and_roll_back(to, dry_run, interrupted);
    let ending = if done.is_ok() && !dry_run { Some(work.finish()) } else { None };
    work.close();
    let said = done?;
    print(&said);
    if let Some(ending) = ending
        && ending.reached < Some(WaitFor::Confirmed)
    {
        let why = ending.why.unwrap_or_default();
        return Err(Failure::new(
            Kind::NotConfirmed,
            format!("the files are brought back, but the checkpoint of that is not confirmed: {why}"),
            "the next agent of this group takes another",
        ));
    }
    Ok(0)
}

/// Sends a signal to all selected processes.
pub(super) fn send(probes: &Probes, signal: i32) {
    for process in probes.selected_processes().unwrap_or_default() {
        // SAFETY: a system call without pointers. One that ended meanwhile is an error that says nothing.
        unsafe { libc::kill(process as i32, signal) };
    }
}

/// Ends what an agent of the group followed that is dead itself.
fn end_left_over(group: &str) -> Result<(), Failure> {
    let Ok(probes) = Probes::adopt(&group_dir(group)) else { return Ok(()) };
    for (signal, wait) in [(libc::SIGTERM, TERM_WAIT), (libc::SIGKILL, KILL_WAIT)] {
        send(&probes, signal);
        let deadline = Instant::now() + wait;
        while Instant::now() < deadline {
            if probes.nobody_is_selected()? {
                return Ok(());
            }
            std::thread::sleep(LOOK);
        }
    }
    let left = probes.selected_processes()?;
    Err(Failure::new(Kind::GivenUp, format!("processes do not end: {left:?}"), "end them, then try again"))
}

impl Work {
    /// The command that brings the files back, for a shell. Without a checkpoint: that finishes what was begun.
    fn command_line(&self, to: Option<CheckpointId>) -> String {
        use std::fmt::Write;
        let options = &self.options;
        let mut line = format!("bfs-agent rollback --group {}", options.group);
        let mut add = |name: &str, value: &str| {
            // Writing to a string does not fail.
            let _ = write!(line, " {name} {}", quoted(value));
        };
        for root in &options.roots {
            add("--path", &root.display().to_string());
        }
        let backup = match &options.backup {
            Destination::Dir(store) => {
                format!("dir:{}", std::path::absolute(store).unwrap_or_else(|_| store.clone()).display())
            }
            other => other.to_string(),
        };
        add("--backup", &backup);
        if options.keys != Folder::default() {
            add("--keys", &options.absolute_keys().path().display().to_string());
        }
        if let Some(to) = to {
            add("--to", &to.to_string());
        }
        line
    }

    fn find_and_roll_back(
        &mut self,
        to: Option<At>,
        dry_run: bool,
        interrupted: Option<CheckpointId>,
    ) -> Result<String, Failure> {
        if let (Some(checkpoint), None) = (interrupted, &to) {
            return Ok(format!("the files are as at checkpoint {checkpoint}"));
        }
        let mut client = self.reader_client()?;
        let all = client.generations(&self.options.group).map_err(RollbackError::from)?;
        let none = |why| Failure::new(Kind::Refused, why, "look at `bfs-replayer generations`");
        let to = match to {
            Some(at) => at.find(&all).map_err(none)?,
            None => all.last().map(|g| g.checkpoint).ok_or_else(|| none("no checkpoint is kept".into()))?,
        };
        // Held until the end: the checkpoints that are taken now do not push it out.
        client.tree(&self.options.group, to, Digests::None).map_err(RollbackError::from)?;
        let wall_ns = all.iter().find(|g| g.checkpoint == to).map_or(0, |g| g.label.wall_ns);
        let summary = self.roll_back(to, dry_run)?;
        Ok(report(&summary, to, Some(wall_ns), dry_run))
    }
}

/// Nothing was changed: what was staged goes.
fn clear_away(folders: &Folders) {
    for folder in folders.paths() {
        if let Err(e) = journal::remove_folder(folder) {
            tracing::warn!("{e}");
        }
    }
}

/// At the end of `run`: the command failed, so everything is brought back. Returns the status of
/// the whole.
pub(super) fn after_failure(work: &mut Work, to: CheckpointId, status: u8) -> u8 {
    let done = if work.wait_for_descendants() {
        work.roll_back(to, false)
    } else {
        Err(Failure::new(
            Kind::GivenUp,
            "processes that the command started still run",
            "end them, then bring the files back",
        ))
    };
    let why = match done {
        Ok(summary) => {
            eprintln!("bfs-agent: the command ended with {status}\n{}", report(&summary, to, None, false));
            return status;
        }
        Err(failure) => failure,
    };
    eprintln!(
        "bfs-agent: the command ended with {status}, and the files could NOT be brought back: {why}\n  \
         {}\n  what to do: {}",
        why.hint,
        work.command_line(Some(to)),
    );
    Kind::RollbackUnfinished.exit_status()
}

/// For a shell.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-:=,@%+".contains(c);
    if text.chars().all(plain) { text.into() } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

/// What was, or would be, done.
fn report(summary: &Summary, to: CheckpointId, wall_ns: Option<i64>, dry_run: bool) -> String {
    use std::fmt::Write;
    let mut out = String::new();
    let mut list = |sign: &str, paths: &[PathBuf]| {
        for path in paths.iter().take(SHOWN) {
            // Writing to a string does not fail.
            let _ = writeln!(out, "  {sign} {}", path.display());
        }
        if paths.len() > SHOWN {
            let _ = writeln!(out, "  {sign} and {} more", paths.len() - SHOWN);
        }
    };
    list("restored  ", &summary.restored);
    list("made again", &summary.made);
    list("removed   ", &summary.removed);
    list("left alone (changed by others)", &summary.foreign);
    list("brought back too (changed by others)", &summary.theirs);
    let when = wall_ns.map(|ns| format!(" ({})", time_text(ns))).unwrap_or_default();
    let how = if dry_run { "would be" } else { "were" };
    let _ = write!(
        out,
        "{} restored, {} made again, {} removed, {} bytes written: the files {how} brought back to checkpoint {to}{when}",
        summary.restored.len(),
        summary.made.len(),
        summary.removed.len(),
        summary.bytes,
    );
    out
}

fn print(text: &str) {
    // A reader that went away is not an error of ours.
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_quoted_for_a_shell() {
        assert_eq!(quoted("/srv/data-1"), "/srv/data-1");
        assert_eq!(quoted("/srv/it's"), r"'/srv/it'\''s'");
    }

    #[test]
    fn long_lists_are_cut() {
        let many = (0..30).map(|n| PathBuf::from(format!("/p/{n}"))).collect();
        let summary = Summary { removed: many, ..Summary::default() };
        let text = report(&summary, CheckpointId(4), None, true);
        assert!(text.contains("removed    and 10 more\n"), "{text}");
        assert!(
            text.ends_with("30 removed, 0 bytes written: the files would be brought back to checkpoint 4")
        );
    }
}
