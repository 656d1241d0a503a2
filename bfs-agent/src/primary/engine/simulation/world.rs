//! The simulated kernel: tasks in calls, the ring, and what the engine reads.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bfs_common::abi::{EventHeader, FileEvent, InodeAttr, InodeId, PathEvent, RunEvent, flag, kind};
use bfs_common::record::{FileKind, Meta, Name, ObjectId, Sequence};

use super::backup::Backup;
use super::fs::{At, Call, Done, Effect, Fs, ROOT};
use super::memory::Memory;
use super::requests::Flying;
use super::runs::Run;
use crate::primary::engine::host::{Host, HostError, InFlight, Losses, OwnedEvent, Seen, Segment, Stat};
use crate::primary::engine::outbox::Batch;
use crate::primary::engine::resolve::Start;
use crate::primary::engine::same::Known;
use crate::tree::{Xattrs, block_digest};

/// A small random generator (xorshift64*), so that a seed reproduces.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % below
    }
}

#[derive(Clone, Debug)]
pub(super) struct Running {
    pub(super) start_ns: u64,
    pub(super) call: Call,
    pub(super) effect: Option<Effect>,
}

pub(super) struct World {
    pub(super) seed: u64,
    pub(super) random: Random,
    pub(super) clock: u64,
    pub(super) fs: Fs,
    pub(super) tasks: Vec<Option<Running>>,
    pub(super) runs: Vec<Option<Run>>,
    /// Each write has a record of its own.
    pub(super) parted: bool,
    pub(super) ring: VecDeque<OwnedEvent>,
    pub(super) ring_position: u64,
    /// Records that an agent has read, and that are not given back yet.
    pub(super) unreleased: VecDeque<OwnedEvent>,
    /// Up to where they are.
    pub(super) released: u64,
    /// What an agent keeps for the next one, and from where in the stream on it does not any more.
    pub(super) multiple: BTreeMap<ObjectId, Sequence>,
    pub(super) done: Vec<Done>,
    pub(super) fresh: u64,
    /// Each with how many calls had had their effect when it was shipped.
    pub(super) shipped: Vec<(Batch, usize)>,
    pub(super) stopped: bool,
    pub(super) calls_left: u64,
    pub(super) stops: u32,
    /// Asynchronous operations are begun as well.
    pub(super) asynchronous: bool,
    /// Symlinks lead to what is there.
    pub(super) symlinks_lead: bool,
    pub(super) flying: Vec<Flying>,
    pub(super) memory: Memory,
    /// What the destination had when the agent began.
    pub(super) known: BTreeMap<ObjectId, Vec<u8>>,
    /// The backup before what is in `shipped`.
    pub(super) base: Backup,
}

/// Bytes of a block that has a digest of its own.
pub(super) const BLOCK: u64 = 4;

/// From nowhere in the stream on.
pub(super) const STAYS: Sequence = Sequence(u64::MAX);

pub(super) fn inode_id(ino: u64) -> InodeId {
    InodeId { ino, dev: 8, generation: ino as u32 }
}

impl World {
    pub(super) fn new(seed: u64, tasks: usize, calls: u64) -> Self {
        Self {
            seed,
            random: Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1),
            clock: 1_000_000_000,
            fs: Fs::new(),
            tasks: vec![None; tasks],
            runs: vec![None; tasks],
            parted: false,
            ring: VecDeque::new(),
            ring_position: 0,
            unreleased: VecDeque::new(),
            released: 0,
            multiple: BTreeMap::new(),
            done: Vec::new(),
            fresh: ROOT,
            shipped: Vec::new(),
            stopped: false,
            calls_left: calls,
            stops: 0,
            asynchronous: false,
            symlinks_lead: false,
            flying: Vec::new(),
            known: BTreeMap::new(),
            base: Backup::default(),
            memory: Memory {
                used: seed.is_multiple_of(2),
                tells: !seed.is_multiple_of(5),
                cachestat: !seed.is_multiple_of(7),
                ..Memory::default()
            },
        }
    }

    pub(super) fn attr(&self, ino: u64) -> InodeAttr {
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

    pub(super) fn stat_of(&self, ino: u64) -> Option<Stat> {
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

    pub(super) fn pick(&mut self, kind: FileKind) -> Option<u64> {
        let all: Vec<u64> =
            self.fs.inodes.iter().filter(|(_, i)| i.kind == kind && i.links > 0).map(|(n, _)| *n).collect();
        (!all.is_empty()).then(|| all[self.random.next(all.len() as u64) as usize])
    }

    pub(super) fn name(&mut self) -> Vec<u8> {
        vec![b'a' + self.random.next(4) as u8]
    }

    pub(super) fn at(&mut self) -> At {
        let base = self.pick(FileKind::Directory).unwrap_or(ROOT);
        let mut path = self.name();
        match self.random.next(12) {
            0..=3 => {
                path.push(b'/');
                path.extend(self.name());
            }
            4 => {
                path.extend(b"/../");
                path.extend(self.name());
            }
            _ => {}
        }
        At { base, path }
    }

    /// Where a symlink leads: from where it stands, or from the root; to anything, or nothing. Of names that are left out, or
    /// outside, nobody tells what stood there when a call went through them: there symlinks lead nowhere.
    fn target(&mut self) -> Vec<u8> {
        if !self.symlinks_lead {
            return b"/x".to_vec();
        }
        let mut target = if self.random.next(2) == 0 { b"/r/".to_vec() } else { Vec::new() };
        target.extend(self.name());
        if self.random.next(3) == 0 {
            target.push(b'/');
            target.extend(self.name());
        }
        target
    }

    pub(super) fn invent(&mut self) -> Call {
        let directory = self.pick(FileKind::Directory).unwrap_or(ROOT);
        let file = self.pick(FileKind::Regular);
        match (self.random.next(19), file) {
            (0..=5, Some(file)) => {
                let length = 1 + self.random.next(6) as usize;
                let byte = self.random.next(200) as u8 + 1;
                let offset = (self.random.next(3) > 0).then(|| self.random.next(8));
                let inline = self.random.next(3) > 0;
                Call::Write { file, offset, data: vec![byte; length], inline }
            }
            (6, Some(file)) => Call::Truncate { file, size: self.random.next(10) },
            (17, Some(file)) if self.memory.used => Call::Map { file },
            (7, Some(file)) => Call::Fchmod { file, mode: self.random.next(0o777) as u32 },
            (8, _) => Call::Unlink { at: self.at() },
            (9, _) => Call::Mkdir { at: self.at() },
            (10, _) => Call::Rmdir { at: self.at() },
            (11, _) => Call::Symlink { at: self.at(), target: self.target() },
            (12, _) => Call::Rename { from: self.at(), to: self.at() },
            (13, _) => Call::Link { from: self.at(), to: self.at() },
            (14, _) => Call::Chmod { at: self.at(), mode: self.random.next(0o777) as u32 },
            (15, _) => Call::Exchange { from: self.at(), to: self.at() },
            (16, _) => Call::TruncateAt { at: self.at(), size: self.random.next(10) },
            _ => Call::Create { directory, name: self.name() },
        }
    }

    /// Time passes, and one task gets a step further.
    pub(super) fn step(&mut self) {
        self.clock += 1 + self.random.next(40_000);
        if self.memory.used && !self.stopped && self.random.next(4) == 0 {
            return self.touch_memory();
        }
        if self.asynchronous && self.random.next(4) == 0 {
            return self.step_request();
        }
        let who = self.random.next(self.tasks.len() as u64) as usize;
        match self.tasks[who].take() {
            None => {
                if !self.stopped && self.calls_left > 0 && self.random.next(3) > 0 {
                    self.calls_left -= 1;
                    let goes_on = if self.random.next(3) == 0 { self.go_on(who) } else { None };
                    let call = goes_on.unwrap_or_else(|| self.invent());
                    let start_ns = self.starts(who, &call);
                    self.tasks[who] = Some(Running { start_ns, call, effect: None });
                }
            }
            Some(mut running) if running.effect.is_none() => {
                self.effect(&mut running);
                self.tasks[who] = Some(running);
            }
            Some(running) => self.end(who as u32 + 1, &running, kind::FILE, kind::PATH),
        }
    }

    /// A call has its effect.
    pub(super) fn effect(&mut self, running: &mut Running) {
        self.fresh += 1;
        let effect = self.fs.run(&running.call, self.clock, self.fresh);
        match &running.call {
            Call::Map { file } => *self.memory.maps.entry(*file).or_default() += 1,
            Call::Write { file, data, .. } if effect.ok => {
                let end = effect.offset + data.len() as u64;
                self.make_dirty(*file, effect.offset..end);
            }
            Call::Truncate { size, .. } | Call::TruncateAt { size, .. } if effect.ok => {
                self.make_dirty(effect.inode, *size..*size + 1);
            }
            _ => {}
        }
        self.done.push(Done {
            start_ns: running.start_ns,
            call: running.call.clone(),
            stamp: self.clock,
            fresh: self.fresh,
            ok: effect.ok,
        });
        running.effect = Some(effect);
    }

    /// The record of a call at its end (or, of an operation that goes on, at its beginning).
    pub(super) fn end(&mut self, tid: u32, running: &Running, on_file: u16, on_path: u16) {
        let Some(effect) = running.effect.clone().filter(|e| e.ok) else { return };
        if let Call::Write { file, data, inline: false, .. } = &running.call
            && tid as usize <= self.tasks.len()
            && self.join(tid as usize - 1, running, *file, effect.offset, data.len() as u64)
        {
            return;
        }
        let header = EventHeader {
            kind: on_file,
            start_ns: running.start_ns,
            end_ns: self.clock,
            tid,
            tgid: tid,
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
            Call::Map { .. } => {
                let event = file(libc::SYS_mmap, 0);
                let header = EventHeader { kind: kind::MAPPED, ..event.header };
                pack(&FileEvent { header, ..event }, b"", b"")
            }
            Call::Store { .. } => return,
            Call::Fchmod { .. } => pack(&file(libc::SYS_fchmod, 0), b"", b""),
            Call::Unlink { at } => self.path(header, on_path, libc::SYS_unlinkat, at, None),
            Call::Mkdir { at } => self.path(header, on_path, libc::SYS_mkdirat, at, None),
            Call::Rmdir { at } => self.path(header, on_path, libc::SYS_rmdir, at, None),
            Call::Chmod { at, .. } => self.path(header, on_path, libc::SYS_fchmodat, at, None),
            Call::Symlink { at, target } => {
                let target = At { base: ROOT, path: target.clone() };
                self.path(header, on_path, libc::SYS_symlinkat, &target, Some(at))
            }
            Call::Rename { from, to } => self.path(header, on_path, libc::SYS_renameat, from, Some(to)),
            Call::Exchange { from, to } => {
                let mut bytes = self.path(header, on_path, libc::SYS_renameat2, from, Some(to));
                set_argument(&mut bytes, 4, u64::from(libc::RENAME_EXCHANGE));
                bytes
            }
            Call::TruncateAt { at, size } => {
                let mut bytes = self.path(header, on_path, libc::SYS_truncate, at, None);
                set_argument(&mut bytes, 1, *size);
                bytes
            }
            Call::Link { from, to } => self.path(header, on_path, libc::SYS_linkat, from, Some(to)),
        };
        self.put_record(bytes, tid);
    }

    /// Puts the record of a task's call into the ring.
    pub(super) fn put_record(&mut self, bytes: Vec<u8>, tid: u32) {
        self.put(bytes);
        let place = self.ring.len().checked_sub(2);
        // Another CPU's record may come to stand before one that ended just earlier.
        if self.random.next(8) == 0
            && let Some((place, before)) = place.and_then(|place| Some((place, self.ring.get(place)?)))
            && let Some(header) = bfs_common::abi::Event::parse(&before.bytes).map(|e| *e.header())
            && header.end_ns + 19_000 > self.clock
            && header.tid != tid
        {
            let (first, second) = (self.ring[place].ring_position, self.ring[place + 1].ring_position);
            self.ring.swap(place, place + 1);
            self.ring[place].ring_position = first;
            self.ring[place + 1].ring_position = second;
        }
    }

    pub(super) fn path(
        &self,
        header: EventHeader,
        as_kind: u16,
        nr: i64,
        one: &At,
        two: Option<&At>,
    ) -> Vec<u8> {
        let single = |at: &At| !at.path.contains(&b'/');
        // At the beginning of an operation nobody knows what its directories are going to be like.
        let ended = as_kind == kind::PATH;
        let mut flags = if ended && single(one) { flag::PARENT1_ATTR } else { 0 };
        if ended && two.is_some_and(single) {
            flags |= flag::PARENT2_ATTR;
        }
        let empty = Vec::new();
        let path2 = two.map_or(&empty, |t| &t.path);
        let event = PathEvent {
            header: EventHeader { kind: as_kind, nr: nr as u32, flags, ..header },
            base1: self.attr(one.base),
            base2: two.map(|t| self.attr(t.base)).unwrap_or_default(),
            root: inode_id(999),
            args: [0; 6],
            path1_len: one.path.len() as u32,
            path2_len: path2.len() as u32,
            mounts: 0,
            reserved: 0,
        };
        pack(&event, &one.path, path2)
    }
}

/// Puts an argument of the call into the bytes of a path record.
fn set_argument(bytes: &mut [u8], index: usize, value: u64) {
    let at = std::mem::offset_of!(PathEvent, args) + 8 * index;
    bytes[at..at + 8].copy_from_slice(&value.to_ne_bytes());
}

/// The bytes of a record, its length put into the header.
pub(super) fn pack<T: Copy>(event: &T, first: &[u8], second: &[u8]) -> Vec<u8> {
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

    fn xattrs(&mut self, inode: InodeId) -> Result<Option<Xattrs>, HostError> {
        self.step();
        Ok(self.stat_of(inode.ino).map(|_| Vec::new()))
    }

    fn ask(&mut self, position: Sequence, highest: ObjectId) {
        let mut backup = self.base.clone();
        for (batch, _) in &self.shipped {
            backup.apply_until(batch, position);
        }
        assert_eq!(backup.next, position.0, "what it is asked for was shipped");
        let known = backup.objects.into_iter().filter(|(object, _)| *object <= highest);
        self.known = known.map(|(object, inode)| (object, inode.data)).collect();
    }

    fn known(&mut self, object: ObjectId) -> Known {
        self.step();
        if self.random.next(3) == 0 {
            return Known::NotYet;
        }
        let data = self.known.get(&object);
        data.map_or(Known::Nothing, |data| {
            Known::Digests(data.chunks(BLOCK as usize).map(block_digest).collect())
        })
    }

    fn read(
        &mut self,
        inode: InodeId,
        range: Range<u64>,
        _holes: bool,
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

    fn outside_path(&mut self, directory: InodeId, _start: &Start) -> Option<PathBuf> {
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

    fn real_path(&mut self, _directory: InodeId) -> Option<PathBuf> {
        None
    }

    fn look(&mut self, _start: &Start, path: &Path) -> Seen {
        // Nothing outside is a directory of the set, and no symlink leads there.
        assert!(path.is_absolute());
        Seen::Nothing
    }

    fn same_mounts(&mut self, _start: &Start) -> bool {
        true
    }

    fn is_bound(&mut self, _directory: InodeId) -> bool {
        false
    }

    fn cores_are_files(&mut self) -> bool {
        false
    }

    fn is_host_root(&mut self, directory: InodeId) -> bool {
        directory.ino == 999
    }

    fn in_flight(&mut self, t: u64) -> Result<Vec<InFlight>, HostError> {
        self.step();
        let requests: Vec<InFlight> = self.requests().filter(|r| r.start_ns <= t).collect();
        let flying = self.tasks.iter().enumerate().filter_map(|(i, t)| Some((i, t.as_ref()?)));
        Ok(flying
            .filter(|(_, r)| r.start_ns <= t)
            .map(|(i, r)| InFlight {
                tid: i as u32 + 1,
                tgid: i as u32 + 1,
                nr: 0,
                start_ns: r.start_ns,
                request: None,
            })
            .chain(requests)
            .collect())
    }

    fn drop_ended(&mut self, flying: &mut Vec<InFlight>) -> Result<(), HostError> {
        self.step();
        flying.retain(|f| match f.request {
            Some(request) => self.flying.iter().any(|other| other.id == request.id),
            None => self.tasks[f.tid as usize - 1].as_ref().is_some_and(|t| t.start_ns == f.start_ns),
        });
        Ok(())
    }

    fn mapped_by(&mut self, _tgid: u32) -> Result<Option<Vec<InodeId>>, HostError> {
        Ok(Some(Vec::new()))
    }

    fn is_at_rest(&mut self, inode: InodeId) -> Result<bool, HostError> {
        self.step();
        Ok(self.rests(inode.ino))
    }

    fn is_idle(&mut self, _call: &InFlight) -> bool {
        false
    }

    fn next_event(&mut self, event: &mut OwnedEvent) -> Result<bool, HostError> {
        let next = self.ring.pop_front();
        let there = next.is_some();
        self.unreleased.extend(next.clone());
        *event = next.unwrap_or_default();
        Ok(there)
    }

    fn part_writes(&mut self) -> Result<Vec<RunEvent>, HostError> {
        self.step();
        self.parted = true;
        self.step();
        let runs = self.runs_in_slots();
        self.step();
        Ok(runs)
    }

    fn join_writes(&mut self) {
        self.parted = false;
    }

    fn losses(&mut self) -> Result<Losses, HostError> {
        Ok(Losses::default())
    }

    fn follow_mapped(&mut self, inode: InodeId, pages: bool) -> Result<bool, HostError> {
        self.step();
        Ok(self.follow(inode, pages))
    }

    fn keep_multiple(&mut self, objects: &[ObjectId]) {
        self.multiple.extend(objects.iter().map(|object| (*object, STAYS)));
    }

    fn forget_multiple(&mut self, objects: Vec<ObjectId>, sealed: Sequence) {
        for object in objects {
            if let Some(until) = self.multiple.get_mut(&object) {
                *until = sealed;
            }
        }
    }

    fn forget_mapped(&mut self, files: Vec<InodeId>, sealed: Sequence) {
        self.memory.forgetting.extend(files.into_iter().map(|file| (sealed, file.ino)));
    }

    fn writable_mappings(&mut self, inode: InodeId) -> Result<Option<u32>, HostError> {
        self.step();
        Ok(Some(self.memory.maps.get(&inode.ino).copied().unwrap_or(0)))
    }

    fn await_others(&mut self, _inode: InodeId) -> Result<bool, HostError> {
        Ok(true)
    }

    fn open_for_writing(&mut self, _inode: InodeId) -> Result<Option<u32>, HostError> {
        Ok(Some(0))
    }

    fn foreign_writers(&mut self) -> Result<Vec<(InodeId, u32)>, HostError> {
        Ok(Vec::new())
    }

    fn command_of(&mut self, _tgid: u32) -> Option<String> {
        None
    }

    fn clean(&mut self, inode: InodeId, ranges: &[Range<u64>]) -> Result<Vec<Range<u64>>, HostError> {
        Ok(self.clean_pages(inode.ino, ranges))
    }

    fn pause(&mut self, _time: Duration) {
        self.step();
    }

    fn ship(&mut self, batches: Vec<Batch>) -> Result<(), HostError> {
        let done = self.done.len();
        self.shipped.extend(batches.into_iter().map(|batch| (batch, done)));
        Ok(())
    }

    fn ship_position(&mut self, position: u64) {
        match self.shipped.last_mut() {
            Some((last, _)) => last.ring_position = last.ring_position.max(Some(position)),
            None => self.released = position,
        }
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
