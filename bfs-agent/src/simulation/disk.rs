//! Disks that lose what was not synced.
//!
//! Each host of the simulation has a folder on tmpfs. What the code syncs in there (`crate::durable`) is noted:
//! bytes of a file, entries of a directory, or everything. After a set number of syncs and changes the host fails:
//! from then on each sync and change is refused, until the host is started again. When it was only killed, its
//! disk is as it was at that moment. When the power went, the disk gets what a real one may have: of each
//! folder the entries of the last sync or those of now; of each file the synced bytes, those of now, or a torn
//! mixture; the folders that the applier works in, in which objects are moved about, as they were at their last
//! sync, at the end, or at any change in between, with the same inodes.
//!
//! The index counts as durable with each transaction: that is redb's, and cuts of a real disk are tested elsewhere
//! (`bfs-agent/tests/faults.rs`). A batch grows on the disk from its beginning to its end, but for one in a file that was a segment
//! before: that is written over, in any order.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bfs_tests::random::Random;

use crate::log::segment::{HEADER, Header};

thread_local! {
    static DISKS: RefCell<Vec<Disk>> = const { RefCell::new(Vec::new()) };
    /// Whoever works now survives a panic.
    static PANICS: Cell<bool> = const { Cell::new(false) };
    /// The one that the applier works on.
    static APPLIER: Cell<usize> = const { Cell::new(0) };
}

/// Folders that only `syncfs` makes durable, and in which inodes count.
const MOVING: [&str; 4] = ["tree", "stage", "aside", "kept"];
/// Where what comes in of another store stands, until it is moved to its log.
const INCOMING: &str = "receive/g/log";
const LOG: &str = "log/g";
/// Bytes that are written together.
const SECTOR: usize = 64;
/// The first bytes of a segment: written in place, unlike the rest.
const HEAD: usize = HEADER as usize;

/// An inode under a name.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Node {
    ino: u64,
    directory: bool,
    mode: u32,
    mtime: (i64, i64),
}

/// Names below the folder, and the bytes of files by inode.
#[derive(Clone, Debug, Default)]
struct Snapshot {
    names: BTreeMap<PathBuf, Node>,
    bytes: HashMap<u64, Vec<u8>>,
}

/// How a host fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// `kill -9`.
    Kill,
    /// The disk loses what was not synced.
    Power,
    /// One sync fails, or one change of the applier, and nothing else.
    Once,
}

#[derive(Debug)]
struct Disk {
    root: PathBuf,
    synced: Snapshot,
    /// Events until it fails.
    left: Option<(u64, Failure)>,
    /// At a change since the last sync of everything, where a power cut is coming.
    middle: Option<Snapshot>,
    failed: Option<(Failure, Snapshot)>,
    /// Calls that failed once.
    refused: u64,
    random: Random,
}

/// The disk of a host: its folder. Gives its number.
pub fn install(root: &Path, seed: u64) -> usize {
    DISKS.with_borrow_mut(|disks| {
        disks.push(Disk {
            root: root.to_owned(),
            synced: Snapshot::of(root),
            left: None,
            middle: None,
            failed: None,
            refused: 0,
            random: Random::new(seed),
        });
        disks.len() - 1
    })
}

/// While this is done, some of the calls that fail once are faults of the program instead: it panics there.
pub fn panics<T>(work: impl FnOnce() -> T) -> T {
    PANICS.set(true);
    let done = work();
    PANICS.set(false);
    done
}

/// There are no simulated disks any more.
pub fn remove_all() {
    DISKS.with_borrow_mut(Vec::clear);
    APPLIER.set(0);
}

/// From now on the applier works on this disk: at first on the first one.
pub fn works_on(disk: usize) {
    APPLIER.set(disk);
}

/// Its folder was emptied, by whoever has it.
pub fn begin_again(disk: usize) {
    DISKS.with_borrow_mut(|disks| {
        let disk = &mut disks[disk];
        (disk.left, disk.middle, disk.failed) = (None, None, None);
        disk.synced = Snapshot::of(&disk.root);
    });
}

/// The host fails at the event with this number from now, counted from 0.
pub fn fail_at(disk: usize, event: u64, how: Failure) {
    DISKS.with_borrow_mut(|disks| disks[disk].left = Some((event, how)));
}

/// No host fails any more that has not.
pub fn calm() {
    DISKS.with_borrow_mut(|disks| disks.iter_mut().for_each(|disk| disk.left = None));
}

/// It fails now.
pub fn fail_now(disk: usize, how: Failure) {
    DISKS.with_borrow_mut(|disks| disks[disk].fail(how));
}

/// Whether it failed.
pub fn has_failed(disk: usize) -> bool {
    DISKS.with_borrow(|disks| disks[disk].failed.is_some())
}

/// Calls that failed once, so far.
pub fn refused(disk: usize) -> u64 {
    DISKS.with_borrow(|disks| disks[disk].refused)
}

/// The host starts again, with what its disk has.
pub fn start(disk: usize) -> Option<Failure> {
    DISKS.with_borrow_mut(|disks| disks[disk].start())
}

fn with_disk(path: &Path, work: impl FnOnce(&mut Disk) -> io::Result<()>) -> io::Result<()> {
    DISKS.with_borrow_mut(|disks| match disks.iter_mut().find(|disk| path.starts_with(&disk.root)) {
        Some(disk) => {
            disk.event()?;
            work(disk)
        }
        None => Ok(()),
    })
}

fn path_of(fd: i32) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{fd}"))
}

/// A file is synced.
pub fn sync_file(file: &File) -> io::Result<()> {
    if DISKS.with_borrow(Vec::is_empty) {
        return Ok(());
    }
    with_disk(&path_of(file.as_raw_fd())?, |disk| {
        let meta = file.metadata()?;
        let mut bytes = vec![0; meta.len() as usize];
        // By a descriptor of its own: this one may be for writing only.
        File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?.read_exact_at(&mut bytes, 0)?;
        disk.synced.bytes.insert(meta.ino(), bytes);
        Ok(())
    })
}

/// The entries of a directory are synced.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    if DISKS.with_borrow(Vec::is_empty) {
        return Ok(());
    }
    with_disk(path, |disk| {
        let below = path.strip_prefix(&disk.root).unwrap_or(path).to_owned();
        disk.synced.names.retain(|name, _| name.parent() != Some(&below));
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            let node = Node::of(&entry.metadata()?);
            if node.directory || !below.as_os_str().is_empty() {
                disk.synced.names.insert(below.join(entry.file_name()), node);
            }
        }
        Ok(())
    })
}

/// Everything is synced.
pub fn sync_all(fd: &OwnedFd) -> io::Result<()> {
    if DISKS.with_borrow(Vec::is_empty) {
        return Ok(());
    }
    with_disk(&path_of(fd.as_raw_fd())?, |disk| {
        disk.synced = Snapshot::of(&disk.root);
        disk.middle = None;
        Ok(())
    })
}

/// The applier is going to change something.
pub fn change() -> io::Result<()> {
    DISKS.with_borrow_mut(|disks| {
        let Some(disk) = disks.get_mut(APPLIER.get()) else { return Ok(()) };
        disk.event()?;
        if matches!(disk.left, Some((_, Failure::Power))) && (disk.middle.is_none() || disk.random.chance(20))
        {
            disk.middle = Some(Snapshot::of(&disk.root));
        }
        Ok(())
    })
}

fn is_moving(path: &Path) -> bool {
    MOVING.iter().any(|top| path.starts_with(top))
}

impl Node {
    fn of(meta: &fs::Metadata) -> Self {
        Self {
            ino: meta.ino(),
            directory: meta.is_dir(),
            mode: meta.mode() & 0o7777,
            mtime: (meta.mtime(), meta.mtime_nsec()),
        }
    }

    fn dress(&self, path: &Path) {
        fs::set_permissions(path, fs::Permissions::from_mode(self.mode)).unwrap();
        let time = UNIX_EPOCH + Duration::new(self.mtime.0 as u64, self.mtime.1 as u32);
        File::open(path).unwrap().set_modified(SystemTime::max(time, UNIX_EPOCH)).unwrap();
    }
}

/// The inodes of the files right in a folder.
fn inodes_in(chosen: &BTreeMap<&PathBuf, &Node>, folder: &Path) -> BTreeSet<u64> {
    let inside = chosen.iter().filter(|(path, _)| path.parent() == Some(folder));
    inside.map(|(_, node)| node.ino).collect()
}

impl Snapshot {
    /// What is below a folder, but for files right in it.
    fn of(root: &Path) -> Self {
        let mut found = Self::default();
        let mut folders = vec![PathBuf::new()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(root.join(&folder)).unwrap() {
                let entry = entry.unwrap();
                let (path, meta) = (folder.join(entry.file_name()), entry.metadata().unwrap());
                if meta.is_dir() {
                    folders.push(path.clone());
                } else if folder.as_os_str().is_empty() {
                    continue;
                } else {
                    found.bytes.entry(meta.ino()).or_insert_with(|| fs::read(entry.path()).unwrap());
                }
                found.names.insert(path, Node::of(&meta));
            }
        }
        found
    }
}

impl Disk {
    fn event(&mut self) -> io::Result<()> {
        if self.failed.is_none()
            && let Some((left, how)) = self.left
        {
            match left.checked_sub(1) {
                Some(left) => self.left = Some((left, how)),
                None if how == Failure::Once => {
                    self.left = None;
                    self.refused += 1;
                    if PANICS.get() && self.random.chance(40) {
                        panics_in_the_middle();
                    }
                    return Err(io::Error::other("a call fails"));
                }
                None => self.fail(how),
            }
        }
        match self.failed {
            Some(_) => Err(io::Error::other("the host has failed")),
            None => Ok(()),
        }
    }

    fn fail(&mut self, how: Failure) {
        self.left = None;
        if self.failed.is_none() {
            self.failed = Some((how, Snapshot::of(&self.root)));
        }
    }

    fn start(&mut self) -> Option<Failure> {
        let (how, now) = self.failed.take()?;
        self.left = None;
        if how == Failure::Power {
            self.lose(&now);
        } else {
            self.untidy(&now);
        }
        self.middle = None;
        if how == Failure::Power {
            self.synced = Snapshot::of(&self.root);
        }
        Some(how)
    }

    /// Whoever failed may have tidied up what came in before it was gone: that is there again.
    fn untidy(&mut self, now: &Snapshot) {
        for (path, node) in now.names.iter().filter(|(path, _)| path.starts_with("receive")) {
            let whole = self.root.join(path);
            if whole.exists() {
                continue;
            }
            if node.directory {
                fs::create_dir(&whole).unwrap();
                continue;
            }
            fs::write(&whole, now.bytes.get(&node.ino).map_or(&[][..], Vec::as_slice)).unwrap();
            // Another inode, of which the same is synced.
            let ino = fs::metadata(&whole).unwrap().ino();
            if let Some(bytes) = self.synced.bytes.get(&node.ino).cloned() {
                self.synced.bytes.insert(ino, bytes);
            }
            if let Some(known) = self.synced.names.get_mut(path).filter(|known| known.ino == node.ino) {
                known.ino = ino;
            }
        }
    }

    /// Gives the folder what a disk without power has of it.
    fn lose(&mut self, now: &Snapshot) {
        let synced = std::mem::take(&mut self.synced);
        // What became of each file that something is known of.
        let inodes: BTreeSet<u64> = now.bytes.keys().chain(synced.bytes.keys()).copied().collect();
        let place: HashMap<u64, &PathBuf> = now.names.iter().map(|(path, node)| (node.ino, path)).collect();
        let nothing = Vec::new();
        let mut bytes = HashMap::new();
        for ino in inodes {
            let (old, new) = (synced.bytes.get(&ino), now.bytes.get(&ino));
            let grows = place.get(&ino).is_none_or(|path| !is_moving(path));
            let old = old.unwrap_or(&nothing);
            bytes.insert(ino, mixed(&mut self.random, old, new.unwrap_or(old), grows));
        }
        let middle = self.middle.take();
        let base = match self.random.below(4) {
            0 => &synced,
            1 => now,
            _ => middle.as_ref().unwrap_or(&synced),
        };
        self.put_moving(&base.names, &bytes);
        self.put_plain(&synced.names, &now.names, &bytes);
    }

    /// Folders of files that are only made, written and removed.
    fn put_plain(
        &mut self,
        synced: &BTreeMap<PathBuf, Node>,
        now: &BTreeMap<PathBuf, Node>,
        bytes: &HashMap<u64, Vec<u8>>,
    ) {
        let mut folders: BTreeMap<&Path, bool> = BTreeMap::new();
        let mut chosen = BTreeMap::new();
        for path in synced.keys().chain(now.keys()).collect::<BTreeSet<_>>() {
            let Some(folder) = path.parent().filter(|_| !is_moving(path)) else { continue };
            let random = &mut self.random;
            // A file that is moved between these two is in one of them.
            let joined = if folder == Path::new(INCOMING) { Path::new(LOG) } else { folder };
            let old = *folders.entry(joined).or_insert_with(|| random.chance(50));
            if let Some(node) = if old { synced.get(path) } else { now.get(path) } {
                chosen.insert(path, node);
            }
        }
        let in_log: BTreeSet<u64> = inodes_in(&chosen, Path::new(LOG));
        chosen.retain(|path, node: &mut &Node| {
            path.parent() != Some(Path::new(INCOMING)) || !in_log.contains(&node.ino)
        });
        for path in now.keys().rev().filter(|path| !is_moving(path)) {
            let whole = self.root.join(path);
            if now[path].directory {
                if !chosen.contains_key(path) {
                    let _ = fs::remove_dir_all(whole);
                }
            } else {
                // Whoever failed may have tidied up before it was gone.
                let _ = fs::remove_file(whole);
            }
        }
        for (path, node) in chosen {
            let whole = self.root.join(path);
            if node.directory {
                if whole.parent().is_some_and(Path::exists) && !whole.exists() {
                    fs::create_dir(&whole).unwrap();
                }
            } else if whole.parent().is_some_and(Path::exists) {
                fs::write(&whole, bytes.get(&node.ino).map_or(&[][..], Vec::as_slice)).unwrap();
                fs::set_permissions(&whole, fs::Permissions::from_mode(node.mode)).unwrap();
            }
        }
    }

    /// The folders in which objects are moved about: the same inodes, at these names. What was removed for good
    /// since stays so.
    fn put_moving(&self, names: &BTreeMap<PathBuf, Node>, bytes: &HashMap<u64, Vec<u8>>) {
        let vault = self.root.join(".vault");
        fs::create_dir(&vault).unwrap();
        let now = Snapshot::of(&self.root).names;
        // The folders of the group stay where they are.
        let moves = |path: &Path| is_moving(path) && path.components().count() > 2;
        for (path, node) in now.iter().rev().filter(|(path, _)| moves(path)) {
            let (from, to) = (self.root.join(path), vault.join(node.ino.to_string()));
            if to.exists() {
                fs::remove_file(from).unwrap();
            } else {
                fs::rename(from, to).unwrap();
            }
        }
        let mut first: HashMap<u64, PathBuf> = HashMap::new();
        for (path, node) in names.iter().filter(|(path, _)| moves(path)) {
            let (from, to) = (vault.join(node.ino.to_string()), self.root.join(path));
            if !to.parent().is_some_and(Path::exists) {
                continue;
            }
            if let Some(other) = first.get(&node.ino) {
                fs::hard_link(other, &to).unwrap();
            } else if from.exists() {
                fs::rename(from, &to).unwrap();
                first.insert(node.ino, to);
            }
        }
        for (ino, path) in &first {
            if let Some(bytes) = bytes.get(ino).filter(|_| path.is_file()) {
                // In place: it is the same inode.
                fs::write(path, bytes).unwrap();
            }
        }
        for (path, node) in names.iter().rev().filter(|(path, _)| moves(path)) {
            debug_assert!(!path.components().any(|part| part == Component::ParentDir));
            let whole = self.root.join(path);
            if whole.exists() {
                node.dress(&whole);
            }
        }
        fs::remove_dir_all(vault).unwrap();
    }
}

/// Whether these are a segment in a file that was one before.
fn is_renewed(bytes: &[u8]) -> bool {
    let header = bytes.first_chunk().and_then(|head| Header::decode(head).ok());
    header.is_some_and(|(header, _)| header.mark.is_some())
}

fn panics_in_the_middle() -> ! {
    panic!("the program is wrong, as it is to be here");
}

/// What a disk may have of a file that had `old` when it was synced and has `new` in memory. One that `grows` is
/// written from its beginning to its end, but for its head; another in any order.
fn mixed(random: &mut Random, old: &[u8], new: &[u8], grows: bool) -> Vec<u8> {
    let renewed = grows && is_renewed(new) && old.len() >= HEAD;
    let grows = grows && !renewed;
    match random.below(4) {
        _ if old == new => new.to_vec(),
        0 => old.to_vec(),
        1 => new.to_vec(),
        _ if grows => {
            let same = HEAD.min(old.len().min(new.len()));
            let from = same + old[same..].iter().zip(&new[same..]).take_while(|(a, b)| a == b).count();
            if new.len() <= from {
                return if random.chance(50) { old.to_vec() } else { new.to_vec() };
            }
            let to = from + random.below(new.len() - from + 1);
            let mut mixed = new[..to].to_vec();
            mixed.extend_from_slice(old.get(to..).unwrap_or(&[]));
            if random.chance(50) && old.len() >= HEAD {
                mixed[..same].copy_from_slice(&old[..same]);
            }
            if mixed.len() < new.len() && random.chance(30) {
                // The size was there before the bytes.
                let len = mixed.len() + random.below(new.len() - mixed.len() + 1);
                mixed.resize(len, 0);
            }
            mixed
        }
        _ => {
            let len = if random.chance(50) { old.len() } else { new.len() };
            let mut mixed = vec![0; len];
            for (index, sector) in mixed.chunks_mut(SECTOR).enumerate() {
                let from = if random.chance(50) { old } else { new };
                let have = from.get(index * SECTOR..).unwrap_or(&[]);
                let count = have.len().min(sector.len());
                sector[..count].copy_from_slice(&have[..count]);
            }
            if renewed {
                let head = if random.chance(50) { old } else { new };
                mixed[..HEAD].copy_from_slice(&head[..HEAD]);
            }
            mixed
        }
    }
}
