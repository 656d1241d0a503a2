//! The engine against a simulated kernel: tasks make calls whose start, effect and end lie apart,
//! in an order that a seed decides, also while the engine reads. At every checkpoint the state
//! that the stream says must be the one that the effects of exactly the covered calls make.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bfs_common::abi::{EventHeader, FileEvent, InodeAttr, InodeId, PathEvent, flag, kind};
use bfs_common::codec::take;
use bfs_common::record::{ChainHash, CheckpointId, FileKind, Meta, Name, ObjectId, Record, Sequence};

use super::host::{Host, HostError, InFlight, Losses, OwnedEvent, Segment, Stat};
use super::model::{FileSystems, Model};
use super::outbox::{Batch, Outbox};
use super::{Engine, Request, Stop};

const ROOT: u64 = 1;

/// A small random generator (xorshift64*), so that a seed reproduces.
struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % below
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Inode {
    kind: FileKind,
    mode: u32,
    mtime: u64,
    data: Vec<u8>,
    target: Vec<u8>,
    entries: BTreeMap<Vec<u8>, u64>,
    links: u32,
}

#[derive(Clone, Debug)]
enum Call {
    Create { directory: u64, name: Vec<u8> },
    Write { file: u64, offset: Option<u64>, data: Vec<u8>, inline: bool },
    Truncate { file: u64, size: u64 },
    Fchmod { file: u64, mode: u32 },
    Unlink { at: At },
    Mkdir { at: At },
    Rmdir { at: At },
    Symlink { at: At, target: Vec<u8> },
    Rename { from: At, to: At },
    Link { from: At, to: At },
    Chmod { at: At, mode: u32 },
}

/// A directory by inode, and a path below it.
#[derive(Clone, Debug)]
struct At {
    base: u64,
    path: Vec<u8>,
}

#[derive(Clone, Debug)]
struct Done {
    start_ns: u64,
    call: Call,
    stamp: u64,
    fresh: u64,
}

#[derive(Clone, Debug, Default)]
struct Fs {
    inodes: BTreeMap<u64, Inode>,
}

/// What the effect of a call was.
#[derive(Clone, Debug, Default)]
struct Effect {
    ok: bool,
    inode: u64,
    offset: u64,
}

impl Fs {
    fn new() -> Self {
        let mut fs = Self::default();
        fs.inodes.insert(ROOT, Inode { links: 1, ..Self::inode(FileKind::Directory, 0) });
        fs
    }

    fn inode(kind: FileKind, mtime: u64) -> Inode {
        Inode { kind, mode: 0o644, mtime, data: vec![], target: vec![], entries: BTreeMap::new(), links: 0 }
    }

    fn find(&self, at: &At) -> Option<(u64, Vec<u8>)> {
        let mut dir = at.base;
        let parts: Vec<_> = at.path.split(|b| *b == b'/').collect();
        for part in &parts[..parts.len() - 1] {
            dir = *self.inodes.get(&dir)?.entries.get(*part)?;
        }
        let d = self.inodes.get(&dir)?;
        (d.kind == FileKind::Directory && d.links > 0).then(|| (dir, parts[parts.len() - 1].to_vec()))
    }

    fn drop_entry(&mut self, dir: u64, name: &[u8]) {
        let inode = self.inodes.get_mut(&dir).unwrap().entries.remove(name).unwrap();
        self.inodes.get_mut(&inode).unwrap().links -= 1;
    }

    fn below(&self, dir: u64, inode: u64) -> bool {
        dir == inode || self.inodes[&inode].entries.values().any(|c| self.below(dir, *c))
    }

    /// Does a call. `fresh` is the inode number that a new inode gets.
    fn run(&mut self, call: &Call, stamp: u64, fresh: u64) -> Effect {
        self.try_run(call, stamp, fresh).unwrap_or_default()
    }

    fn try_run(&mut self, call: &Call, stamp: u64, fresh: u64) -> Option<Effect> {
        let ok = |inode| Some(Effect { ok: true, inode, ..Effect::default() });
        match call {
            Call::Create { directory, name } => {
                let d = self.inodes.get_mut(directory).filter(|d| d.links > 0)?;
                if let Some(there) = d.entries.get(name).copied() {
                    // Opened, not made: no record is due.
                    return Some(Effect { ok: false, inode: there, ..Effect::default() });
                }
                d.entries.insert(name.clone(), fresh);
                d.mtime = stamp;
                self.inodes.insert(fresh, Inode { links: 1, ..Self::inode(FileKind::Regular, stamp) });
                ok(fresh)
            }
            Call::Write { file, offset, data, .. } => {
                let f = self.inodes.get_mut(file)?;
                let at = offset.unwrap_or(f.data.len() as u64) as usize;
                let end = at + data.len();
                if f.data.len() < end {
                    f.data.resize(end, 0);
                }
                f.data[at..end].copy_from_slice(data);
                f.mtime = stamp;
                Some(Effect { ok: true, inode: *file, offset: at as u64 })
            }
            Call::Truncate { file, size } => {
                let f = self.inodes.get_mut(file)?;
                f.data.resize(*size as usize, 0);
                f.mtime = stamp;
                ok(*file)
            }
            Call::Fchmod { file, mode } => {
                self.inodes.get_mut(file)?.mode = *mode;
                ok(*file)
            }
            Call::Unlink { at } => {
                let (dir, name) = self.find(at)?;
                let inode = *self.inodes[&dir].entries.get(&name)?;
                if self.inodes[&inode].kind == FileKind::Directory {
                    return None;
                }
                self.drop_entry(dir, &name);
                self.inodes.get_mut(&dir)?.mtime = stamp;
                ok(inode)
            }
            Call::Rmdir { at } => {
                let (dir, name) = self.find(at)?;
                let inode = *self.inodes[&dir].entries.get(&name)?;
                let i = &self.inodes[&inode];
                if i.kind != FileKind::Directory || !i.entries.is_empty() {
                    return None;
                }
                self.drop_entry(dir, &name);
                self.inodes.get_mut(&dir)?.mtime = stamp;
                ok(inode)
            }
            Call::Mkdir { at } | Call::Symlink { at, .. } => {
                let (dir, name) = self.find(at)?;
                let d = self.inodes.get_mut(&dir)?;
                if d.entries.contains_key(&name) {
                    return None;
                }
                d.entries.insert(name, fresh);
                d.mtime = stamp;
                let mut new = Self::inode(FileKind::Directory, stamp);
                if let Call::Symlink { target, .. } = call {
                    new.kind = FileKind::Symlink;
                    new.target.clone_from(target);
                }
                self.inodes.insert(fresh, Inode { links: 1, ..new });
                ok(fresh)
            }
            Call::Rename { from, to } => {
                let (d1, n1) = self.find(from)?;
                let (d2, n2) = self.find(to)?;
                let inode = *self.inodes[&d1].entries.get(&n1)?;
                let directory = self.inodes[&inode].kind == FileKind::Directory;
                if directory && self.below(d2, inode) {
                    return None;
                }
                if let Some(old) = self.inodes[&d2].entries.get(&n2).copied() {
                    let o = &self.inodes[&old];
                    if old == inode {
                        return ok(inode);
                    }
                    if (o.kind == FileKind::Directory) != directory || !o.entries.is_empty() {
                        return None;
                    }
                    self.drop_entry(d2, &n2);
                }
                self.inodes.get_mut(&d1)?.entries.remove(&n1);
                self.inodes.get_mut(&d2)?.entries.insert(n2, inode);
                self.inodes.get_mut(&d1)?.mtime = stamp;
                self.inodes.get_mut(&d2)?.mtime = stamp;
                ok(inode)
            }
            Call::Link { from, to } => {
                let (d1, n1) = self.find(from)?;
                let (d2, n2) = self.find(to)?;
                let inode = *self.inodes[&d1].entries.get(&n1)?;
                if self.inodes[&inode].kind == FileKind::Directory
                    || self.inodes[&d2].entries.contains_key(&n2)
                {
                    return None;
                }
                self.inodes.get_mut(&d2)?.entries.insert(n2, inode);
                self.inodes.get_mut(&d2)?.mtime = stamp;
                self.inodes.get_mut(&inode)?.links += 1;
                ok(inode)
            }
            Call::Chmod { at, mode } => {
                let (dir, name) = self.find(at)?;
                let inode = *self.inodes[&dir].entries.get(&name)?;
                if self.inodes[&inode].kind == FileKind::Symlink {
                    return None;
                }
                self.inodes.get_mut(&inode)?.mode = *mode;
                ok(inode)
            }
        }
    }

    /// The tree below the root as text, for the comparison.
    fn dump(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut todo = vec![(String::new(), ROOT)];
        while let Some((path, inode)) = todo.pop() {
            let i = &self.inodes[&inode];
            lines.push(format!(
                "{path} {:?} {:o} {} {:?} {:?}",
                i.kind,
                i.mode,
                i.mtime,
                i.data,
                String::from_utf8_lossy(&i.target)
            ));
            for (name, child) in &i.entries {
                todo.push((format!("{path}/{}", String::from_utf8_lossy(name)), *child));
            }
        }
        lines.sort();
        lines
    }
}

#[derive(Clone, Debug)]
struct Running {
    start_ns: u64,
    call: Call,
    effect: Option<Effect>,
}

struct World {
    random: Random,
    clock: u64,
    fs: Fs,
    tasks: Vec<Option<Running>>,
    ring: VecDeque<OwnedEvent>,
    ring_position: u64,
    done: Vec<Done>,
    fresh: u64,
    shipped: Vec<Batch>,
    stopped: bool,
    calls_left: u64,
    stops: u32,
}

fn inode_id(ino: u64) -> InodeId {
    InodeId { ino, dev: 8, generation: ino as u32 }
}

impl World {
    fn new(seed: u64, tasks: usize, calls: u64) -> Self {
        Self {
            random: Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1),
            clock: 1_000_000_000,
            fs: Fs::new(),
            tasks: vec![None; tasks],
            ring: VecDeque::new(),
            ring_position: 0,
            done: Vec::new(),
            fresh: ROOT,
            shipped: Vec::new(),
            stopped: false,
            calls_left: calls,
            stops: 0,
        }
    }

    fn attr(&self, ino: u64) -> InodeAttr {
        let Some(i) = self.fs.inodes.get(&ino) else { return InodeAttr::default() };
        InodeAttr {
            id: inode_id(ino),
            size: i.data.len() as u64,
            mtime_sec: i.mtime.cast_signed(),
            mode: i.kind.mode_bits() | i.mode,
            nlink: i.links,
            ..InodeAttr::default()
        }
    }

    fn stat_of(&self, ino: u64) -> Option<Stat> {
        let i = self.fs.inodes.get(&ino).filter(|i| i.links > 0)?;
        Some(Stat {
            inode: inode_id(ino),
            kind: i.kind,
            meta: Meta { permissions: i.mode, mtime_sec: i.mtime.cast_signed(), ..Meta::default() },
            size: i.data.len() as u64,
            device: 0,
            target: i.target.clone(),
            links: i.links,
        })
    }

    fn pick(&mut self, kind: FileKind) -> Option<u64> {
        let all: Vec<u64> =
            self.fs.inodes.iter().filter(|(_, i)| i.kind == kind && i.links > 0).map(|(n, _)| *n).collect();
        (!all.is_empty()).then(|| all[self.random.next(all.len() as u64) as usize])
    }

    fn name(&mut self) -> Vec<u8> {
        vec![b'a' + self.random.next(4) as u8]
    }

    fn at(&mut self) -> At {
        let base = self.pick(FileKind::Directory).unwrap_or(ROOT);
        let mut path = self.name();
        if self.random.next(3) == 0 {
            path.push(b'/');
            path.extend(self.name());
        }
        At { base, path }
    }

    fn invent(&mut self) -> Call {
        let directory = self.pick(FileKind::Directory).unwrap_or(ROOT);
        let file = self.pick(FileKind::Regular);
        match (self.random.next(16), file) {
            (0..=5, Some(file)) => {
                let length = 1 + self.random.next(6) as usize;
                let byte = self.random.next(200) as u8 + 1;
                let offset = (self.random.next(3) > 0).then(|| self.random.next(8));
                let inline = self.random.next(3) > 0;
                Call::Write { file, offset, data: vec![byte; length], inline }
            }
            (6, Some(file)) => Call::Truncate { file, size: self.random.next(10) },
            (7, Some(file)) => Call::Fchmod { file, mode: self.random.next(0o777) as u32 },
            (8, _) => Call::Unlink { at: self.at() },
            (9, _) => Call::Mkdir { at: self.at() },
            (10, _) => Call::Rmdir { at: self.at() },
            (11, _) => Call::Symlink { at: self.at(), target: b"a".to_vec() },
            (12, _) => Call::Rename { from: self.at(), to: self.at() },
            (13, _) => Call::Link { from: self.at(), to: self.at() },
            (14, _) => Call::Chmod { at: self.at(), mode: self.random.next(0o777) as u32 },
            _ => Call::Create { directory, name: self.name() },
        }
    }

    /// Time passes, and one task gets a step further.
    fn step(&mut self) {
        self.clock += 1 + self.random.next(40_000);
        let who = self.random.next(self.tasks.len() as u64) as usize;
        match self.tasks[who].take() {
            None => {
                if !self.stopped && self.calls_left > 0 && self.random.next(3) > 0 {
                    self.calls_left -= 1;
                    let call = self.invent();
                    self.tasks[who] = Some(Running { start_ns: self.clock, call, effect: None });
                }
            }
            Some(mut running) if running.effect.is_none() => {
                self.fresh += 1;
                let effect = self.fs.run(&running.call, self.clock, self.fresh);
                self.done.push(Done {
                    start_ns: running.start_ns,
                    call: running.call.clone(),
                    stamp: self.clock,
                    fresh: self.fresh,
                });
                running.effect = Some(effect);
                self.tasks[who] = Some(running);
            }
            Some(running) => self.end(who, &running),
        }
    }

    fn end(&mut self, who: usize, running: &Running) {
        let Some(effect) = running.effect.clone().filter(|e| e.ok) else { return };
        let header = EventHeader {
            kind: kind::FILE,
            start_ns: running.start_ns,
            end_ns: self.clock,
            tid: who as u32 + 1,
            tgid: who as u32 + 1,
            ..EventHeader::default()
        };
        let file = |nr: i64, flags: u16| FileEvent {
            header: EventHeader { nr: nr as u32, flags, ..header },
            attr: self.attr(effect.inode),
            ..FileEvent::default()
        };
        let bytes = match &running.call {
            Call::Create { directory, name } => {
                let event = FileEvent {
                    parent: self.attr(*directory),
                    name_len: name.len() as u32,
                    ..file(libc::SYS_openat, flag::CREATED)
                };
                pack(&event, name, b"")
            }
            Call::Write { data, inline, .. } => {
                let flags = if *inline { flag::INLINE } else { flag::BY_REFERENCE };
                let event = FileEvent {
                    file_offset: effect.offset,
                    count: data.len() as u64,
                    data_len: if *inline { data.len() as u32 } else { 0 },
                    ..file(libc::SYS_pwrite64, flags)
                };
                pack(&event, b"", if *inline { data } else { b"" })
            }
            Call::Truncate { size, .. } => {
                pack(&FileEvent { file_offset: *size, ..file(libc::SYS_ftruncate, 0) }, b"", b"")
            }
            Call::Fchmod { .. } => pack(&file(libc::SYS_fchmod, 0), b"", b""),
            Call::Unlink { at } => self.path(header, libc::SYS_unlinkat, at, None),
            Call::Mkdir { at } => self.path(header, libc::SYS_mkdirat, at, None),
            Call::Rmdir { at } => self.path(header, libc::SYS_rmdir, at, None),
            Call::Chmod { at, .. } => self.path(header, libc::SYS_fchmodat, at, None),
            Call::Symlink { at, target } => {
                let target = At { base: ROOT, path: target.clone() };
                self.path(header, libc::SYS_symlinkat, &target, Some(at))
            }
            Call::Rename { from, to } => self.path(header, libc::SYS_renameat, from, Some(to)),
            Call::Link { from, to } => self.path(header, libc::SYS_linkat, from, Some(to)),
        };
        self.ring_position += bytes.len() as u64;
        let event = OwnedEvent { bytes: bytes.into(), ring_position: self.ring_position };
        // Another CPU's record may come to stand before one that ended just earlier.
        if self.random.next(8) == 0
            && self.ring.back().is_some_and(|b| {
                let h = bfs_common::abi::Event::parse(&b.bytes).map(|e| *e.header()).unwrap_or_default();
                h.end_ns + 19_000 > self.clock && h.tid != who as u32 + 1
            })
            && let Some(other) = self.ring.pop_back()
        {
            self.ring.push_back(OwnedEvent { bytes: event.bytes, ring_position: other.ring_position });
            self.ring.push_back(OwnedEvent { bytes: other.bytes, ring_position: event.ring_position });
            return;
        }
        self.ring.push_back(event);
    }

    fn path(&self, header: EventHeader, nr: i64, one: &At, two: Option<&At>) -> Vec<u8> {
        let single = |at: &At| !at.path.contains(&b'/');
        let mut flags = if single(one) { flag::PARENT1_ATTR } else { 0 };
        if two.is_some_and(single) {
            flags |= flag::PARENT2_ATTR;
        }
        let empty = Vec::new();
        let path2 = two.map_or(&empty, |t| &t.path);
        let event = PathEvent {
            header: EventHeader { kind: kind::PATH, nr: nr as u32, flags, ..header },
            base1: self.attr(one.base),
            base2: two.map(|t| self.attr(t.base)).unwrap_or_default(),
            root: inode_id(999),
            args: [0; 6],
            path1_len: one.path.len() as u32,
            path2_len: path2.len() as u32,
        };
        pack(&event, &one.path, path2)
    }
}

/// The bytes of a record, its length put into the header.
fn pack<T: Copy>(event: &T, first: &[u8], second: &[u8]) -> Vec<u8> {
    // SAFETY: the ABI structs are repr(C) without padding.
    let head = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(event).cast::<u8>(), size_of::<T>()) };
    let mut bytes = [head, first, second].concat();
    let length = bytes.len() as u32;
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    bytes
}

impl Host for World {
    fn now(&self) -> u64 {
        self.clock
    }

    fn child(&mut self, directory: InodeId, name: &Name) -> Result<Option<Stat>, HostError> {
        self.step();
        let found = self.fs.inodes.get(&directory.ino).and_then(|d| d.entries.get(name.as_bytes()).copied());
        let stat = found.and_then(|ino| self.stat_of(ino));
        self.step();
        Ok(stat)
    }

    fn list(&mut self, directory: InodeId) -> Result<Option<Vec<Name>>, HostError> {
        self.step();
        let dir = self.fs.inodes.get(&directory.ino).filter(|d| d.links > 0);
        Ok(dir.map(|d| d.entries.keys().filter_map(|n| Name::new(n)).collect()))
    }

    fn stat(&mut self, inode: InodeId) -> Result<Option<Stat>, HostError> {
        self.step();
        Ok(self.stat_of(inode.ino))
    }

    fn xattrs(&mut self, inode: InodeId) -> Result<Option<Vec<(String, Vec<u8>)>>, HostError> {
        self.step();
        Ok(self.stat_of(inode.ino).map(|_| Vec::new()))
    }

    fn read(
        &mut self,
        inode: InodeId,
        range: Range<u64>,
        each: &mut dyn FnMut(Segment<'_>),
    ) -> Result<Option<()>, HostError> {
        // Bytes are read one after the other, and time passes between.
        let mut at = range.start;
        loop {
            self.step();
            let Some(i) = self.fs.inodes.get(&inode.ino).filter(|i| i.links > 0) else { return Ok(None) };
            let end = (i.data.len() as u64).min(range.end).min(at + 3);
            if at >= end {
                return Ok(Some(()));
            }
            each(Segment::Data(at, &i.data[at as usize..end as usize]));
            at = end;
        }
    }

    fn outside_path(&mut self, directory: InodeId, _tgid: u32) -> Option<PathBuf> {
        // A directory that the model does not know: by the tree, as /proc would tell.
        let mut todo = vec![(PathBuf::from("/r"), ROOT)];
        while let Some((path, inode)) = todo.pop() {
            if inode == directory.ino {
                return Some(path);
            }
            for (name, child) in &self.fs.inodes[&inode].entries {
                todo.push((path.join(String::from_utf8_lossy(name).as_ref()), *child));
            }
        }
        None
    }

    fn canonical(&mut self, path: &Path) -> PathBuf {
        path.to_path_buf()
    }

    fn is_host_root(&mut self, directory: InodeId) -> bool {
        directory.ino == 999
    }

    fn in_flight(&mut self, t: u64) -> Result<Vec<InFlight>, HostError> {
        self.step();
        let flying = self.tasks.iter().enumerate().filter_map(|(i, t)| Some((i, t.as_ref()?)));
        Ok(flying
            .filter(|(_, r)| r.start_ns <= t)
            .map(|(i, r)| InFlight { tid: i as u32 + 1, tgid: i as u32 + 1, nr: 0, start_ns: r.start_ns })
            .collect())
    }

    fn drop_ended(&mut self, flying: &mut Vec<InFlight>) -> Result<(), HostError> {
        self.step();
        flying.retain(|f| self.tasks[f.tid as usize - 1].as_ref().is_some_and(|t| t.start_ns == f.start_ns));
        Ok(())
    }

    fn next_event(&mut self) -> Result<Option<OwnedEvent>, HostError> {
        Ok(self.ring.pop_front())
    }

    fn losses(&mut self) -> Result<Losses, HostError> {
        Ok(Losses::default())
    }

    fn pause(&mut self, _time: Duration) {
        self.step();
    }

    fn ship(&mut self, batches: Vec<Batch>) -> Result<(), HostError> {
        self.shipped.extend(batches);
        Ok(())
    }

    fn stop(&mut self) -> Result<(), HostError> {
        self.stops += 1;
        self.stopped = true;
        while self.tasks.iter().any(Option::is_some) {
            self.step();
        }
        Ok(())
    }

    fn standing(&mut self) -> bool {
        self.stopped
    }

    fn go(&mut self) {
        self.stopped = false;
    }
}

/// The state that records say.
#[derive(Default)]
struct Backup {
    objects: BTreeMap<ObjectId, Inode>,
    entries: BTreeMap<(ObjectId, Vec<u8>), ObjectId>,
    root: ObjectId,
    next: u64,
    gaps: usize,
}

impl Backup {
    fn apply(&mut self, batch: &Batch) -> Option<CheckpointId> {
        let mut bytes = batch.bytes.clone();
        let mut checkpoint = None;
        while let Some(encoded) = take(&mut bytes).expect("sound records") {
            assert_eq!(encoded.sequence.0, self.next + 1, "no gap in the stream");
            self.next += 1;
            let (record, payload) = encoded.decode().expect("records");
            checkpoint = None;
            match record {
                Record::Roots { roots } => self.root = roots[0].1,
                Record::Object { object, kind, meta, .. } => {
                    let mut inode = Fs::inode(kind, meta.mtime_sec.cast_unsigned());
                    inode.mode = meta.permissions;
                    inode.target = payload.to_vec();
                    assert!(self.objects.insert(object, inode).is_none(), "numbers are never used again");
                }
                Record::Forget { object } => {
                    self.objects.remove(&object).expect("it was there");
                    assert!(!self.entries.values().any(|o| *o == object), "a forgotten object has no name");
                }
                Record::EntrySet { directory, name, object } => {
                    assert!(self.objects.contains_key(&object));
                    self.entries.insert((directory, name.as_bytes().to_vec()), object);
                }
                Record::EntryDelete { directory, name } => {
                    self.entries.remove(&(directory, name.as_bytes().to_vec())).expect("it was there");
                }
                Record::Write { object, offset } => {
                    let data = &mut self.objects.get_mut(&object).expect("known").data;
                    let end = offset as usize + payload.len();
                    if data.len() < end {
                        data.resize(end, 0);
                    }
                    data[offset as usize..end].copy_from_slice(&payload);
                }
                Record::Zero { object, offset, length } => {
                    let data = &mut self.objects.get_mut(&object).expect("known").data;
                    data[offset as usize..(offset + length) as usize].fill(0);
                }
                Record::Truncate { object, size } => {
                    self.objects.get_mut(&object).expect("known").data.resize(size as usize, 0);
                }
                Record::Meta { object, meta } => {
                    let inode = self.objects.get_mut(&object).expect("known");
                    inode.mode = meta.permissions;
                    inode.mtime = meta.mtime_sec.cast_unsigned();
                }
                Record::Gap { .. } => self.gaps += 1,
                Record::Repaired { .. } => self.gaps = 0,
                Record::Checkpoint { checkpoint: number, .. } => {
                    assert_eq!(self.gaps, 0, "no marker over an open gap");
                    checkpoint = Some(number);
                }
                _ => {}
            }
        }
        checkpoint
    }

    fn dump(&self) -> Vec<String> {
        let mut fs = Fs::default();
        for (object, inode) in &self.objects {
            let number = if *object == self.root { ROOT } else { object.0 + 1000 };
            fs.inodes.insert(number, inode.clone());
        }
        for ((directory, name), object) in &self.entries {
            let number = if *directory == self.root { ROOT } else { directory.0 + 1000 };
            if let Some(d) = fs.inodes.get_mut(&number) {
                d.entries.insert(name.clone(), object.0 + 1000);
            }
        }
        fs.dump()
    }
}

fn run(seed: u64) -> (u32, u32) {
    let mut world = World::new(seed, 1 + (seed % 4) as usize, 250);
    // Some of the tree is there before, and the program runs while it is copied first.
    for _ in 0..200 {
        world.step();
    }
    world.ring.clear();
    world.stop().unwrap();
    world.ring.clear();
    world.go();
    world.stops = 0;
    let base = world.fs.clone();
    world.done.clear();
    let model = Model::new(ObjectId(0), FileSystems::default());
    let mut engine = Engine::new(model, Outbox::new(Sequence(0), ChainHash::START), CheckpointId(0));
    let root = world.stat_of(ROOT).unwrap();
    engine.set_roots(vec![(PathBuf::from("/r"), root)]);
    engine.suspect_everything(world.now());
    engine.suspect_events_before(world.now());
    let mut backup = Backup::default();
    let mut checkpoints = 0;
    while world.calls_left > 0 || checkpoints < 2 {
        for _ in 0..world.random.next(60) {
            world.step();
        }
        if world.random.next(2) == 0 {
            engine.drain(&mut world).unwrap();
            engine.flush(&mut world).unwrap();
        }
        let stop = if world.random.next(6) == 0 { Stop::Hold } else { Stop::IfNeeded };
        let request = Request { tag: String::new(), trigger: "manual", wall_ns: 0, stop };
        let taken = engine.checkpoint(&mut world, &request).unwrap();
        if stop == Stop::Hold {
            world.go();
        }
        checkpoints += 1;
        let mut at_marker = None;
        for batch in std::mem::take(&mut world.shipped) {
            if let Some(number) = backup.apply(&batch) {
                assert_eq!(number, taken.checkpoint);
                at_marker = Some(backup.dump());
            }
        }
        let mut expected = base.clone();
        for done in world.done.iter().filter(|d| d.start_ns <= taken.at_ns) {
            expected.run(&done.call, done.stamp, done.fresh);
        }
        let (got, want) = (at_marker.expect("the marker was shipped"), expected.dump());
        let differ = |a: &[String], b: &[String]| -> Vec<String> {
            a.iter().filter(|l| !b.contains(l)).cloned().collect()
        };
        assert!(
            got == want,
            "seed {seed}, checkpoint {} at {}, stop {}\nonly on the backup: {:#?}\nonly on the primary: {:#?}\nlast calls: {}",
            taken.checkpoint,
            taken.at_ns,
            taken.stopped,
            differ(&got, &want),
            differ(&want, &got),
            world.done.iter().rev().take(24).map(|d| format!("\n  {d:?}")).collect::<String>()
        );
    }
    (checkpoints, world.stops)
}

#[test]
fn every_checkpoint_is_the_state_that_its_calls_made() {
    let first = std::env::var("BFS_SEED").ok().and_then(|s| s.parse().ok());
    let seeds = first.map_or(1..200, |seed: u64| seed..seed + 1);
    let (mut checkpoints, mut stops) = (0, 0);
    for seed in seeds {
        let (c, s) = run(seed);
        checkpoints += c;
        stops += s;
    }
    println!("{checkpoints} checkpoints, {stops} with a stop");
}
