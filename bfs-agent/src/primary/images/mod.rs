//! Process state: what CRIU dumps of the command while it stands for a checkpoint, kept on the primary, and the way
//! back.
//!
//! A checkpoint's images are of the instant of its files: they are made between the stop and the go, after the marker.
//! They stand under the checkpoint's number only when they are complete; what is half there has another name and goes
//! with the next dump.

mod ahead;
mod beside;
mod courier;
mod couriers;
pub mod criu;
mod numbers;
mod outside;
mod promoted;
mod protobuf;
mod room;
mod sizes;
mod whole;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bfs_common::record::CheckpointId;

use super::contained::{Contained, Role};
use super::process::{ProcessError, is_of_cgroup, tasks_of_cgroup};
pub use ahead::Ahead;
use beside::Conflict;
pub use courier::{By, Shipped};
pub use couriers::{Couriers, To};
use criu::{Criu, DUMP_LOG, RESTORE_LOG, reason};
pub use outside::{OpenOutside, Origin};
use outside::{Outside, open_outside};
pub use promoted::{Export, export_folder, origin};

/// Where the images of all groups are, each in a folder of its name.
pub const DIRECTORY: &str = "/var/lib/bfs/process";

/// How long a dump and a restore may take.
pub const LIMIT: Duration = Duration::from_secs(120);

/// How long it may take until the parents of processes that were ended have waited for them.
const WAITED_FOR: Duration = Duration::from_secs(5);

/// How long it may take until it is known that a command has ended.
const REAPED: Duration = Duration::from_millis(30);

/// What is not complete yet.
const UNFINISHED: &str = "unfinished";
/// What is not kept any more and goes before the next dump.
const SPARE: &str = "spare";
/// What comes from outside, beside the images.
const OUTSIDE: &str = "outside.json";
/// What CRIU prints, beside its logs.
const PRINTED: &str = "criu.out";

/// Why there is no process state, or none that comes back.
#[derive(Debug, thiserror::Error)]
pub enum ImagesError {
    /// The processes cannot be dumped.
    #[error("CRIU cannot dump it: {0}")]
    Dump(String),
    /// It lasted too long: they were let go, and what was dumped may not be of that instant.
    #[error("the processes were let go while they were dumped")]
    LetGo,
    /// A process is no descendant of the command any more, and CRIU dumps trees.
    #[error("process {0} ({1}) is no descendant of the command any more: it cannot be dumped with it")]
    Left(u32, String),
    /// The processes cannot be made again.
    #[error("CRIU cannot restore checkpoint {0}: {1}")]
    Restore(CheckpointId, String),
    /// Of that checkpoint there is no process state.
    #[error("there is no process state of checkpoint {0}; there is of {1}")]
    None(CheckpointId, String),
    /// They live among others, who are in the way.
    #[error(transparent)]
    Conflict(#[from] Conflict),
    /// The same when they are to be made again.
    #[error("the processes of checkpoint {0} cannot be made again now: {1}")]
    NotNow(CheckpointId, Conflict),
    /// It would fill the disk.
    #[error("there is no room for process images in {0}: {1} MiB may be needed, {2} MiB are free")]
    Room(String, u64, u64),
    /// The file system, or `/proc`, or the first process of the namespaces.
    #[error("{0}: {1}")]
    Other(String, io::Error),
}

fn other(what: impl Into<String>) -> impl FnOnce(io::Error) -> ImagesError {
    let what = what.into();
    move |e| ImagesError::Other(what, e)
}

/// What came of it so far.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Dumps that are complete.
    pub dumped: u64,
    /// Checkpoints without process state.
    pub failed: u64,
    /// Why the last of them.
    pub failure: Option<String>,
    /// How long the last dump took.
    pub last: Duration,
    /// Its size, bytes, with what was dumped ahead.
    pub bytes: u64,
    /// What was dumped ahead of it.
    pub ahead: Ahead,
    /// How long the processes stood for it, and how long it took of that until all of them did.
    pub stood: (Duration, Duration),
    /// What they had open outside of the replicated directories, when they were last dumped or restored.
    pub outside: Vec<OpenOutside>,
    /// Checkpoints without process state because the dump before had taken longer than the interval.
    pub skipped: u64,
    /// How often the processes were restored.
    pub restored: u64,
}

/// The process state of one command.
#[derive(Debug)]
pub struct Images {
    criu: Criu,
    folder: PathBuf,
    cgroup: PathBuf,
    contained: Arc<Mutex<Contained>>,
    /// The command's number in its namespace. Without one there is none: whose processes run already are among all
    /// others, and where their tree begins is found at each dump.
    root: Option<i32>,
    /// What it sees elsewhere than it stands.
    binds: Vec<(PathBuf, PathBuf)>,
    keep: usize,
    /// Rounds ahead of a dump, at most.
    rounds: u32,
    kept: Vec<CheckpointId>,
    /// What was dumped and does not count yet.
    new: Option<CheckpointId>,
    /// They bring each set to its destination.
    pub couriers: Couriers,
    /// The replicated directories, as the processes see them.
    inside: Vec<PathBuf>,
    /// Open from the first round ahead of a dump until that has ended.
    tracking: Option<File>,
    /// When the last dump had ended.
    dumped: Option<Instant>,
    /// What came of it.
    pub tally: Tally,
}

/// The folder of a group.
#[must_use]
pub fn folder(directory: &Path, group: &str) -> PathBuf {
    directory.join(group)
}

impl Images {
    /// Whether a checkpoint that is due each `every` goes without process state, as the last dump took longer: then the
    /// processes go on at least for as long as they were dumped. Counted.
    pub fn skips(&mut self, every: Duration) -> bool {
        let Some(ended) = self.dumped else { return false };
        let skips = self.tally.last > every && ended.elapsed() < self.tally.last;
        self.tally.skipped += u64::from(skips);
        skips
    }

    /// Makes the folder ready; with the replicated directories, what of them the command sees elsewhere, and how many sets are kept and
    /// rounds are dumped ahead. What an earlier run left can be restored by nobody: its namespaces are gone.
    ///
    /// # Errors
    /// What the file system said.
    pub fn new(
        criu: Criu,
        folder: PathBuf,
        cgroup: PathBuf,
        contained: Arc<Mutex<Contained>>,
        root: Option<i32>,
        (roots, binds): (&[PathBuf], Vec<(PathBuf, PathBuf)>),
        (keep, rounds): (usize, u32),
    ) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        remove_images(&folder)?;
        let seen = |root: &PathBuf| {
            binds.iter().find(|(from, _)| from == root).map_or_else(|| root.clone(), |(_, to)| to.clone())
        };
        let inside = roots.iter().map(seen).collect();
        let (kept, new, tally) = (Vec::new(), None, Tally::default());
        Ok(Self {
            criu,
            folder,
            cgroup,
            contained,
            root,
            binds,
            keep: keep.max(1),
            rounds,
            kept,
            new,
            couriers: Couriers::default(),
            inside,
            tracking: None,
            dumped: None,
            tally,
        })
    }

    fn contained(&self) -> MutexGuard<'_, Contained> {
        self.contained.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the command lives, or anybody who was not begun as one.
    pub fn lives(&self) -> bool {
        match self.root {
            Some(_) => self.contained().ended().is_none(),
            None => !tasks_of_cgroup(&self.cgroup).is_empty(),
        }
    }

    /// Looks whether the processes of a checkpoint could be made again if those that run now had ended.
    ///
    /// # Errors
    /// [`ImagesError::NotNow`].
    pub fn may_restore(&self, checkpoint: CheckpointId) -> Result<(), ImagesError> {
        if self.root.is_some() {
            return Ok(());
        }
        let numbers = numbers::numbers(&self.of(checkpoint)).map_err(other("pstree.img"))?;
        let ours = |process| is_of_cgroup(process, &self.cgroup) == Some(true);
        let may = beside::takes(&self.cgroup).and_then(|()| numbers::are_free(&numbers, ours));
        may.map_err(|conflict| ImagesError::NotNow(checkpoint, conflict))
    }

    /// The same when they have ended: waits until whoever started them knows that.
    ///
    /// # Errors
    /// [`ImagesError::NotNow`].
    pub fn wait_until_free(&self, checkpoint: CheckpointId) -> Result<(), ImagesError> {
        if self.root.is_some() {
            return Ok(());
        }
        let numbers = numbers::numbers(&self.of(checkpoint)).map_err(other("pstree.img"))?;
        let since = Instant::now();
        loop {
            match numbers::are_free(&numbers, |_| false) {
                Err(_) if since.elapsed() < WAITED_FOR => std::thread::sleep(Duration::from_millis(5)),
                free => return free.map_err(|conflict| ImagesError::NotNow(checkpoint, conflict)),
            }
        }
    }

    /// The checkpoints that can be gone back to, the newest last.
    #[must_use]
    pub fn kept(&self) -> &[CheckpointId] {
        &self.kept
    }

    /// What the processes had open outside of the replicated directories at one of them.
    #[must_use]
    pub fn outside_of(&self, checkpoint: CheckpointId) -> Vec<OpenOutside> {
        Outside::read(&self.of(checkpoint).join(OUTSIDE)).map(|outside| outside.open).unwrap_or_default()
    }

    /// That checkpoint, if it is one of them; without a wish the newest of them.
    ///
    /// # Errors
    /// [`ImagesError::None`].
    pub fn choose(&self, wanted: Option<CheckpointId>) -> Result<CheckpointId, ImagesError> {
        let there = self.kept.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let none = || if there.is_empty() { "none".to_owned() } else { there.clone() };
        match wanted {
            None => self.kept.last().copied().ok_or_else(|| ImagesError::None(CheckpointId(0), none())),
            Some(wanted) if self.kept.contains(&wanted) => Ok(wanted),
            Some(wanted) => Err(ImagesError::None(wanted, none())),
        }
    }

    fn of(&self, checkpoint: CheckpointId) -> PathBuf {
        self.folder.join(checkpoint.to_string())
    }

    /// What is not kept any more goes: just before a dump, whose pages come in its place. Memory that nobody has used
    /// for a while is dear where the host of a virtual machine has to give it anew, and a dump writes much.
    pub fn make_room(&mut self) {
        self.let_go();
        self.remove_spare();
    }

    fn remove_spare(&self) {
        let spare = self.folder.join(SPARE);
        match fs::remove_dir_all(&spare) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("cannot remove {}: {e}", spare.display());
            }
            _ => {}
        }
    }

    /// Dumps the processes, which stand, as `standing` says after it: else they were let go meanwhile. They count from
    /// [`Self::tidy`] on.
    ///
    /// # Errors
    /// [`ImagesError`]: there is no process state of this checkpoint.
    pub fn dump(
        &mut self,
        checkpoint: CheckpointId,
        standing: impl FnOnce() -> bool,
    ) -> Result<(), ImagesError> {
        let since = Instant::now();
        let dumped = self.dump_to(checkpoint);
        self.tracking = None;
        let (bytes, outside) = dumped?;
        (self.tally.last, self.dumped) = (since.elapsed(), Some(Instant::now()));
        self.new = Some(checkpoint);
        if !standing() {
            self.discard();
            return Err(ImagesError::LetGo);
        }
        (self.tally.bytes, self.tally.outside) = (bytes, outside);
        self.tally.dumped += 1;
        Ok(())
    }

    /// Of the checkpoint that was dumped last there is none: its number is another one's yet.
    pub fn discard(&mut self) {
        if let Some(checkpoint) = self.new.take() {
            let images = self.of(checkpoint);
            if let Err(e) = fs::remove_dir_all(&images) {
                tracing::warn!("cannot remove {}: {e}", images.display());
            }
        }
    }

    /// The checkpoint has files only, and the processes run. Whether that is because the command has ended by itself
    /// meanwhile, which is no failure.
    pub fn failed(&mut self, checkpoint: CheckpointId, why: &ImagesError) -> bool {
        let since = Instant::now();
        while since.elapsed() < REAPED {
            if !self.lives() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.tally.failed += 1;
        self.tally.failure = Some(format!("checkpoint {checkpoint}: {why}"));
        false
    }

    fn dump_to(&self, checkpoint: CheckpointId) -> Result<(u64, Vec<OpenOutside>), ImagesError> {
        let dumped = self.try_dump_to(checkpoint);
        if dumped.is_err() {
            // Its logs say why; the pages are of no use, and the disk may be full.
            for entry in fs::read_dir(self.folder.join(UNFINISHED)).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    let _ = fs::remove_dir_all(path);
                } else if path.extension().is_some_and(|e| e == "img") {
                    let _ = fs::remove_file(path);
                }
            }
        }
        dumped
    }

    /// An empty folder for what comes.
    fn begin(&self) -> Result<PathBuf, ImagesError> {
        let unfinished = self.folder.join(UNFINISHED);
        match fs::remove_dir_all(&unfinished) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(other(format!("remove {}", unfinished.display()))(e));
            }
            _ => {}
        }
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&unfinished)
            .map_err(other(format!("mkdir {}", unfinished.display())))?;
        Ok(unfinished)
    }

    fn try_dump_to(&self, checkpoint: CheckpointId) -> Result<(u64, Vec<OpenOutside>), ImagesError> {
        let ahead = Some(self.tally.ahead.rounds).filter(|rounds| *rounds > 0).map(ahead::name);
        let unfinished = if ahead.is_some() { self.folder.join(UNFINISHED) } else { self.begin()? };
        let (root, processes) = self.tree()?;
        room::check(&self.folder, room::memory_of(&processes))?;
        let mut contained = self.contained();
        let given = self.root.map(|_| contained.first());
        let outside = given.map_or_else(|| Ok(Outside::default()), |first| Outside::of(first, &processes));
        let mut outside = outside.map_err(other("read what is open in /proc"))?;
        outside.open =
            open_outside(&outside, &processes, &self.inside).map_err(other("read what is open in /proc"))?;
        outside.of = Origin { checkpoint, root, binds: self.binds.clone() };
        outside.write(&unfinished.join(OUTSIDE)).map_err(other("write what comes from outside"))?;
        let line = self.criu.dump(root, &unfinished, &self.cgroup, &outside, ahead.as_deref());
        let failed = ImagesError::Dump;
        let printed = unfinished.join(PRINTED);
        let ended = work(&mut contained, &line, None, &printed, |_| Ok(())).map_err(failed)?;
        if !ended.success() {
            return Err(failed(reason(&unfinished.join(DUMP_LOG))));
        }
        sizes::forget_sizes(&unfinished.join("files.img")).map_err(other("files.img"))?;
        let bytes = size(&unfinished).map_err(other("measure the images"))?;
        fs::rename(&unfinished, self.of(checkpoint)).map_err(other("name the images"))?;
        Ok((bytes, outside.open))
    }

    /// The root of the tree of processes, and all of them.
    fn tree(&self) -> Result<(i32, Vec<u32>), ImagesError> {
        match self.root {
            Some(root) => Ok((root, self.processes(root)?)),
            None => Ok(beside::tree(&self.cgroup)?),
        }
    }

    /// The processes of the cgroup; all have to be descendants of the command.
    fn processes(&self, root: i32) -> Result<Vec<u32>, ImagesError> {
        let mut processes: Vec<u32> = tasks_of_cgroup(&self.cgroup).into_iter().map(|t| t.1).collect();
        processes.sort_unstable();
        processes.dedup();
        for process in &processes {
            let mut at = *process;
            loop {
                let status = fs::read_to_string(format!("/proc/{at}/status")).map_err(other("read /proc"))?;
                let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
                let inner =
                    field("NSpid:").and_then(|l| l.split_whitespace().next_back()?.parse::<i32>().ok());
                if inner == Some(root) {
                    break;
                }
                // The first process of the namespace is where orphans go.
                let parent = field("PPid:").and_then(|l| l.parse::<u32>().ok()).unwrap_or(0);
                if inner.is_none_or(|inner| inner <= 1) || parent == 0 {
                    let name = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
                    return Err(ImagesError::Left(*process, name.trim().to_owned()));
                }
                at = parent;
            }
        }
        Ok(processes)
    }

    /// There is this checkpoint, made then, and the processes run again: what was dumped for it counts, and is brought to the
    /// destinations; what is beyond the number that is kept does not count any more.
    pub fn tidy(&mut self, checkpoint: CheckpointId, made_ns: i64) {
        if self.new.take() != Some(checkpoint) {
            return;
        }
        self.kept.push(checkpoint);
        self.couriers.bring(checkpoint, &self.of(checkpoint), made_ns);
        // Those that wait there have given way to this one.
        self.let_go();
    }

    /// What is beyond the number that is kept does not count any more, but for what is being brought: that stays until
    /// it is there.
    fn let_go(&mut self) {
        let mut hands = self.couriers.hands();
        hands.retain(|hand| self.kept.contains(hand));
        while self.kept.len() > self.keep + hands.len()
            && let Some(at) = self.kept.iter().position(|kept| !hands.contains(kept))
        {
            let oldest = self.kept.remove(at);
            let oldest = self.of(oldest);
            self.remove_spare();
            if let Err(e) = fs::rename(&oldest, self.folder.join(SPARE)) {
                tracing::warn!("cannot rename {}: {e}", oldest.display());
            }
        }
    }

    /// Makes the processes again; `select` is called while the first of them, which makes the others, stands in the
    /// cgroup and has done nothing yet. They have ended before, and the files are as they were.
    ///
    /// # Errors
    /// [`ImagesError`].
    pub fn restore(
        &mut self,
        checkpoint: CheckpointId,
        select: impl FnOnce() -> Result<(), String>,
    ) -> Result<(), ImagesError> {
        let images = self.of(checkpoint);
        let outside = Outside::read(&images.join(OUTSIDE)).map_err(other("read what comes from outside"))?;
        let line = self.criu.restore(&images, &outside);
        let failed = |why: String| ImagesError::Restore(checkpoint, why);
        let needed = match self.root {
            Some(_) => None,
            None => Some(numbers::numbers(&images).map_err(other("pstree.img"))?),
        };
        let mut in_the_way = None;
        let among_others = |tool| {
            let Some(numbers) = &needed else { return Ok(()) };
            beside::is_empty_but(&self.cgroup, tool)?;
            numbers::are_free(numbers, |_| false)
        };
        if let Some(numbers) = &needed {
            beside::takes(&self.cgroup).map_err(|e| ImagesError::NotNow(checkpoint, e))?;
            numbers::pass_by(numbers);
        }
        let mut contained = self.contained();
        let printed = images.join(PRINTED);
        // Before it does, for it may end again at once.
        let before = contained.lives_again();
        let ended = work(&mut contained, &line, Some(&self.cgroup), &printed, |tool| {
            if let Err(conflict) = among_others(tool) {
                let why = conflict.to_string();
                in_the_way = Some(conflict);
                return Err(why);
            }
            select()
        });
        if !ended.as_ref().is_ok_and(ExitStatus::success) {
            contained.is_as_before(before);
        }
        drop(contained);
        if let Some(conflict) = in_the_way {
            return Err(ImagesError::NotNow(checkpoint, conflict));
        }
        if !ended.map_err(failed)?.success() {
            return Err(failed(reason(&images.join(RESTORE_LOG))));
        }
        self.tally.outside = outside.open;
        self.tally.restored += 1;
        // What came after is another future.
        while let Some(later) = self.kept.pop_if(|kept| *kept > checkpoint) {
            let _ = fs::remove_dir_all(self.of(later));
        }
        Ok(())
    }

    /// Removes all of them: nobody can restore them any more.
    pub fn clear(&mut self) {
        self.couriers = Couriers::default();
        self.kept.clear();
        if let Err(e) = remove_images(&self.folder).and_then(|()| fs::remove_dir(&self.folder)) {
            tracing::warn!("cannot remove {}: {e}", self.folder.display());
        }
    }

    /// Whether memory can be dumped ahead here.
    #[must_use]
    pub fn tracks_memory(&self) -> bool {
        self.criu.tracks_memory()
    }

    /// The version of CRIU.
    #[must_use]
    pub fn version(&self) -> String {
        self.criu.version()
    }
}

/// Has a tool begin in the namespaces; `before` is called with its number while it is held.
fn begin(
    contained: &mut Contained,
    line: &[OsString],
    cgroup: Option<&Path>,
    printed: &Path,
    before: impl FnOnce(i32) -> Result<(), String>,
) -> Result<(), String> {
    let text = |e: ProcessError| e.to_string();
    let tool = contained.hold(Role::Tool, line, cgroup, Some(printed)).map_err(text)?;
    if let Err(why) = before(tool) {
        contained.cancel().map_err(text)?;
        return Err(why);
    }
    contained.go(&line[0]).map_err(text)
}

/// Has a tool work in the namespaces, until it has ended; `before` as in [`begin`].
fn work(
    contained: &mut Contained,
    line: &[OsString],
    cgroup: Option<&Path>,
    printed: &Path,
    before: impl FnOnce(i32) -> Result<(), String>,
) -> Result<ExitStatus, String> {
    begin(contained, line, cgroup, printed, before)?;
    let ended = contained.tool_within(LIMIT).map_err(|e| e.to_string())?;
    ended.ok_or_else(|| format!("it does not end within {} s", LIMIT.as_secs()))
}

/// Removes what has the name of images; a folder that is somebody else's keeps what it has.
fn remove_images(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().is_some_and(|name| name.parse::<u64>().is_ok());
        if (number || name == UNFINISHED || name == SPARE) && entry.path().join(OUTSIDE).exists() {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// Bytes of the files in a folder and those in it.
fn size(folder: &Path) -> io::Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let stat = entry.metadata()?;
        sum += if stat.is_dir() { size(&entry.path())? } else { stat.len() };
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_images_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["7", "8", "unfinished", "data"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        for images in ["7", "unfinished", "data"] {
            fs::write(dir.path().join(images).join(OUTSIDE), "{}").unwrap();
        }
        remove_images(dir.path()).unwrap();
        let left = ["7", "8", "unfinished", "data"].map(|name| dir.path().join(name).exists());
        assert_eq!(left, [false, true, false, true]);
    }
}
