//! Keeping the copy: what a start makes of it, and the whole copies that a thread writes now and then.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bfs_common::record::Name;
use bytes::Bytes;
use redb::{Database, ReadableDatabase, ReadableTable};

use super::super::error::BackupError;
use super::change::Tables;
use super::copy::changes::{self, Changes};
use super::copy::{Kind, Line, Tail, each_line, files, folder, path, scan, whole};
use super::{CHANGED, DAMAGE, ENTRIES, GENERATIONS, GROUPS, Index, KEPT, OBJECTS, PLANS, SUMS, groups, mark};

/// So many bytes of changes, and as many as the last whole copy has, come before the next one: then both are written
/// about as often.
const CHANGES_MIN: u64 = 16 << 20;
/// How often it is looked.
const LOOK: Duration = Duration::from_secs(1);
/// How long is waited after a failure; each time twice as long.
const RETRY_MAX: Duration = Duration::from_secs(64);
/// Rows between two looks whether to go on.
const ROWS: u64 = 4096;

/// How whole copies stand.
#[derive(Debug, Default)]
pub(super) struct State {
    /// Bytes of the last one, if there is one.
    bytes: Option<u64>,
    /// Why there is no newer one.
    trouble: Option<String>,
}

impl State {
    /// As a folder has it.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn of(folder: &Path) -> Result<Self, BackupError> {
        let newest = files(folder, Kind::Whole)?.pop().map(|number| path(folder, Kind::Whole, number));
        let bytes = newest.map(|newest| std::fs::metadata(newest).map_or(0, |meta| meta.len()));
        Ok(Self { bytes, trouble: None })
    }
}

/// Where a database and its copy have the same end, or the copy one change more, which is made good.
///
/// # Errors
/// [`BackupError::IndexUnusable`] if the index is an older one; what the disk says.
pub(super) fn attach(db: &Database, folder: &Path, index: &Path) -> Result<Changes, BackupError> {
    let at = mark(&db.begin_read()?.open_table(CHANGED)?)?;
    let why = match Changes::find(folder)? {
        Ok(mut changes) => {
            let last = changes.mark();
            if last == at || changes.before() == at {
                changes.take_over()?;
                catch_up(db, &changes, folder)?;
                return Ok(changes);
            }
            if last.number >= at.number {
                let group = groups(db)?.first().map_or_else(String::new, |(name, row)| {
                    format!(" (of checkpoint {} of group {name:?})", row.checkpoint)
                });
                let why = format!(
                    "it is an older copy{group}, or that of another store: it ends with change {}, the store's with {}",
                    at.number, last.number
                );
                return Err(BackupError::IndexUnusable { path: index.into(), why });
            }
            Some(format!("it ends with change {}, the index with {}", last.number, at.number))
        }
        Err(None) if at.number > 0 => Some("it is gone".into()),
        Err(why) => why,
    };
    if let Some(why) = why {
        tracing::warn!("the copy of the index in {} is begun anew: {why}", folder.display());
    }
    for kind in [Kind::Changes, Kind::Whole] {
        for number in files(folder, kind)? {
            let place = path(folder, kind, number);
            std::fs::remove_file(&place).map_err(BackupError::io("remove", place))?;
        }
    }
    Ok(Changes::begin(folder, at))
}

/// Makes the last change that the copy has in the database, if that is all that it lacks.
///
/// # Errors
/// If they are further apart, or fail.
pub(super) fn catch_up(db: &Database, changes: &Changes, folder: &Path) -> Result<(), BackupError> {
    let (at, last) = (mark(&db.begin_read()?.open_table(CHANGED)?)?, changes.mark());
    if at == last {
        return Ok(());
    }
    if at != changes.before() || at.number + 1 != last.number {
        let why = format!("ends with change {}, but {} was made", at.number, last.number);
        return Err(BackupError::corrupt("index.redb", why));
    }
    let file = files(folder, Kind::Changes)?.into_iter().rev().find(|first| *first <= last.number);
    let file = path(folder, Kind::Changes, file.unwrap_or(last.number));
    let write = db.begin_write()?;
    {
        let mut tables = Tables::of(&write)?;
        let found = scan(&file, Kind::Changes, |number, body| {
            if number != last.number {
                return Ok(());
            }
            each_line(body, |line| tables.put(&line))
        })?;
        if !found.marks.contains(&last) {
            return Err(BackupError::corrupt(&file, "has not the last change of the index"));
        }
        write.open_table(CHANGED)?.insert(0, &last.encode()[..])?;
    }
    write.commit()?;
    tracing::info!("the last change of the index was made good from its copy");
    Ok(())
}

/// What does not fit in the copy of a store: files, and why.
///
/// # Errors
/// If its folder cannot be read.
pub fn check(store: &Path) -> Result<Vec<(PathBuf, String)>, BackupError> {
    let (folder, mut found) = (&folder(store), Vec::new());
    for kind in [Kind::Whole, Kind::Changes] {
        let all = files(folder, kind)?;
        for number in &all {
            let place = path(folder, kind, *number);
            let why = match scan(&place, kind, |_, _| Ok(())) {
                Ok(scanned) => match scanned.tail {
                    Tail::Whole => continue,
                    // A crash leaves it so.
                    Tail::Torn if kind == Kind::Changes && Some(number) == all.last() => continue,
                    Tail::Torn => "ends in the middle of a change".to_owned(),
                    Tail::Bad(why) => why,
                },
                Err(BackupError::Corrupt { why, .. }) => why,
                Err(BackupError::Io { what, error, .. }) => format!("cannot {what} it: {error}"),
                Err(error) => return Err(error),
            };
            found.push((place, why));
        }
    }
    Ok(found)
}

/// All rows of a database; `put` gives up with false.
///
/// # Errors
/// If it fails, or what `put` says.
pub(super) fn each_row(
    read: &redb::ReadTransaction,
    put: &mut dyn FnMut(Line) -> Result<bool, BackupError>,
) -> Result<(), BackupError> {
    let packed = |row: &[u8]| Some(Bytes::copy_from_slice(row));
    macro_rules! each {
        ($table:expr, $line:expr) => {
            for row in read.open_table($table)?.iter()? {
                let (key, row) = row?;
                if !put($line(key.value(), row.value())?)? {
                    return Ok(());
                }
            }
        };
    }
    type Made = Result<Line, BackupError>;
    each!(GROUPS, |name: &str, row: &[u8]| -> Made { Ok(Line::Group(name.into(), packed(row))) });
    each!(OBJECTS, |(group, object), row: &[u8]| -> Made { Ok(Line::Object(group, object, packed(row))) });
    each!(ENTRIES, |(group, directory, name): (u32, u64, &[u8]), object| -> Made {
        let name = Name::new(name).ok_or_else(|| BackupError::corrupt("index.redb", "a name is none"))?;
        Ok(Line::Entry(group, directory, name, Some(object)))
    });
    each!(PLANS, |group, row: &[u8]| -> Made { Ok(Line::Plan(group, packed(row))) });
    each!(GENERATIONS, |(group, at), row: &[u8]| -> Made { Ok(Line::Generation(group, at, packed(row))) });
    each!(KEPT, |(group, object), last| -> Made { Ok(Line::Kept(group, object, Some(last))) });
    each!(SUMS, |(group, object, n), row: &[u8]| -> Made { Ok(Line::Sums(group, object, n, packed(row))) });
    each!(DAMAGE, |(group, object), row: &[u8]| -> Made { Ok(Line::Damage(group, object, packed(row))) });
    Ok(())
}

impl Index {
    fn copying(&self) -> MutexGuard<'_, State> {
        self.copying.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changes(&self) -> MutexGuard<'_, Changes> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the database failed: nobody opens it again while somebody reads what it was.
    fn is_closed(&self) -> bool {
        self.db.read().unwrap_or_else(PoisonError::into_inner).db.is_none()
    }

    /// Whether there is a whole copy.
    pub(super) fn has_copy(&self) -> bool {
        self.copying().bytes.is_some()
    }

    /// About how many bytes the next whole copy has, if one is due.
    fn is_copy_due(&self) -> Option<u64> {
        let since = self.changes().since();
        match self.copying().bytes {
            Some(bytes) => (since >= bytes.max(CHANGES_MIN)).then_some(bytes + since),
            None => Some(std::fs::metadata(&self.path).map_or(0, |meta| meta.len())),
        }
    }

    /// Why there is no newer whole copy, although one is due.
    #[must_use]
    pub fn copy_trouble(&self) -> Option<String> {
        self.copying().trouble.clone()
    }

    /// Writes a whole copy, and removes what is not needed any more of those before. Nobody waits for it. False if
    /// `go_on` said so.
    ///
    /// # Errors
    /// If index or disk fail; then what there was is still there.
    pub fn copy(&self, go_on: &dyn Fn() -> bool) -> Result<bool, BackupError> {
        let began = Instant::now();
        // One transaction that reads: all tables are as at one change.
        let read = self.with(|db| Ok(db.begin_read()?))?;
        let mark = mark(&read.open_table(CHANGED)?)?;
        changes::make_folder(&self.folder)?;
        // A file of changes always goes on behind a whole copy: where it is gone, that is noticed.
        self.changes().ready()?;
        let mut writer = whole::Writer::begin(&self.folder, mark)?;
        let (mut rows, mut stopped) = (0, false);
        let mut put = |line: Line| -> Result<bool, BackupError> {
            writer.line(&line)?;
            rows += 1;
            stopped = rows % ROWS == 0 && (!go_on() || self.is_closed());
            Ok(!stopped)
        };
        each_row(&read, &mut put)?;
        if stopped {
            whole::remove_begun(&self.folder)?;
            return Ok(false);
        }
        let bytes = writer.seal()?;
        tracing::info!("the index was copied whole: {rows} rows, {bytes} bytes, in {:?}", began.elapsed());
        self.copying().bytes = Some(bytes);
        self.changes().copied();
        if let Some(older) = whole::keep_two(&self.folder)? {
            changes::remove_before(&self.folder, older)?;
        }
        Ok(true)
    }
}

/// The thread that writes whole copies when they are due, until it is dropped.
#[derive(Debug)]
pub struct Keeper {
    shared: Arc<(AtomicBool, Mutex<()>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Starts it. `has_room` says why there is none for so many bytes.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn start(
        index: Arc<Index>,
        has_room: impl Fn(u64) -> Result<(), String> + Send + 'static,
    ) -> Result<Self, BackupError> {
        let shared = Arc::new((AtomicBool::new(false), Mutex::new(()), Condvar::new()));
        let of_thread = shared.clone();
        let work = move || {
            let (stop, lock, wake) = &*of_thread;
            let mut pause = LOOK;
            loop {
                let guard = lock.lock().unwrap_or_else(PoisonError::into_inner);
                let waited = wake.wait_timeout_while(guard, pause, |()| !stop.load(Ordering::SeqCst));
                drop(waited.unwrap_or_else(PoisonError::into_inner));
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let failed = keep(&index, &has_room, &|| !stop.load(Ordering::SeqCst));
                pause = if failed { (pause * 2).min(RETRY_MAX) } else { LOOK };
            }
        };
        let thread = std::thread::Builder::new().name("index copy".into()).spawn(work);
        let thread = thread.map_err(BackupError::io("start", "the thread that copies the index"))?;
        Ok(Self { shared, thread: Some(thread) })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let (stop, lock, wake) = &*self.shared;
        let guard = lock.lock().unwrap_or_else(PoisonError::into_inner);
        stop.store(true, Ordering::SeqCst);
        drop(guard);
        wake.notify_all();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that copies the index had ended by a panic");
        }
    }
}

/// Writes a whole copy if it is due. Whether that failed.
fn keep(index: &Index, has_room: &dyn Fn(u64) -> Result<(), String>, go_on: &dyn Fn() -> bool) -> bool {
    let result = match index.is_copy_due() {
        Some(bytes) => has_room(bytes).and_then(|()| index.copy(go_on).map_err(|error| error.to_string())),
        None => Ok(false),
    };
    let trouble = result.err().map(|why| {
        format!(
            "the index is not copied whole: {why}; it is tried again, and until then its copy grows with each checkpoint"
        )
    });
    let failed = trouble.is_some();
    let mut state = index.copying();
    if let Some(trouble) = trouble.as_ref().filter(|_| trouble != state.trouble) {
        tracing::error!("{trouble}");
    }
    state.trouble = trouble;
    failed
}
