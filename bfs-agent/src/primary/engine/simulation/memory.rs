//! Mappings of the simulated kernel: pages that become dirty on the first store, silent stores, cleaning.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use bfs_common::abi::{DirtyEvent, EventHeader, InodeId, kind};
use bfs_common::record::Sequence;

use super::fs::{Call, Done};
use super::world::{World, inode_id, pack};
use crate::primary::engine::host::OwnedEvent;

/// Bytes of a page.
const PAGE: u64 = 4;

#[derive(Debug, Default)]
pub(super) struct Memory {
    /// Whether files are mapped at all.
    pub(super) used: bool,
    /// How many mappings each file has.
    pub(super) maps: BTreeMap<u64, u32>,
    /// Dirty pages.
    pub(super) dirty: BTreeSet<(u64, u64)>,
    /// Files that are known to be mapped; of those with true the pages that become dirty are recorded.
    pub(super) followed: BTreeMap<u64, bool>,
    /// Files that are none of these any more once so much of the stream is durable.
    pub(super) forgetting: Vec<(Sequence, u64)>,
    /// Whether the file system tells of stores.
    pub(super) tells: bool,
    /// Whether the kernel tells what is clean.
    pub(super) cachestat: bool,
}

fn pages(range: &Range<u64>) -> Range<u64> {
    range.start / PAGE..range.end.div_ceil(PAGE)
}

impl World {
    /// Programs store, unmap, and the kernel writes back.
    pub(super) fn touch_memory(&mut self) {
        let mapped: Vec<u64> = self.memory.maps.keys().copied().collect();
        if mapped.is_empty() {
            return;
        }
        let file = mapped[self.random.next(mapped.len() as u64) as usize];
        match self.random.next(10) {
            0 => self.unmap(file),
            1 => {
                let dirty: Vec<_> = self.memory.dirty.iter().copied().collect();
                for page in dirty {
                    if self.random.next(2) == 0 {
                        self.memory.dirty.remove(&page);
                    }
                }
            }
            _ => self.store(file),
        }
    }

    fn unmap(&mut self, file: u64) {
        if let Some(count) = self.memory.maps.get_mut(&file) {
            *count -= 1;
            if *count == 0 {
                self.memory.maps.remove(&file);
            }
        }
    }

    fn store(&mut self, file: u64) {
        let Some(length) = self.fs.inodes.get(&file).map(|i| i.data.len() as u64).filter(|l| *l > 0) else {
            return;
        };
        let offset = self.random.next(length);
        let faults = self.make_dirty(file, offset..offset + 1);
        let byte = self.random.next(200) as u8 + 1;
        let call = Call::Store { file, offset: offset as usize, byte, faults };
        self.fresh += 1;
        self.fs.run(&call, self.clock, self.fresh);
        self.done.push(Done { start_ns: self.clock, call, stamp: self.clock, fresh: self.fresh, ok: true });
    }

    /// Pages become dirty; whether one was clean. Who follows the file is told first.
    pub(super) fn make_dirty(&mut self, file: u64, range: Range<u64>) -> bool {
        let mut any = false;
        for page in pages(&range) {
            if !self.memory.dirty.insert((file, page)) {
                continue;
            }
            any = true;
            if self.memory.followed.get(&file) != Some(&true) {
                continue;
            }
            let header = EventHeader {
                kind: kind::DIRTIED,
                start_ns: self.clock,
                end_ns: self.clock,
                tid: 1000,
                tgid: 1000,
                nr: u32::MAX,
                ..EventHeader::default()
            };
            let event = DirtyEvent { header, id: inode_id(file), offset: page * PAGE, len: PAGE };
            let bytes = pack(&event, b"", b"");
            self.ring_position += bytes.len() as u64;
            self.ring.push_back(OwnedEvent { bytes, ring_position: self.ring_position });
        }
        any
    }

    pub(super) fn follow(&mut self, inode: InodeId, pages: bool) -> bool {
        self.memory.forgetting.retain(|(_, file)| *file != inode.ino);
        let pages = pages && self.memory.tells;
        self.memory.followed.insert(inode.ino, pages);
        pages
    }

    /// So much of the stream is durable.
    pub(super) fn forget_up_to(&mut self, durable: Sequence) {
        self.multiple.retain(|_, until| *until > durable);
        let (gone, stay) = self.memory.forgetting.drain(..).partition(|(sealed, _)| *sealed <= durable);
        self.memory.forgetting = stay;
        let gone: Vec<(Sequence, u64)> = gone;
        for (_, file) in gone {
            self.memory.followed.remove(&file);
        }
    }

    /// Cleans page after page, and time passes between.
    pub(super) fn clean_pages(&mut self, file: u64, ranges: &[Range<u64>]) -> Vec<Range<u64>> {
        let here =
            |p: &(u64, u64), r: &Range<u64>| p.0 == file && p.1 * PAGE < r.end && r.start < (p.1 + 1) * PAGE;
        for range in ranges {
            let dirty: Vec<_> = self.memory.dirty.iter().filter(|p| here(p, range)).copied().collect();
            for page in dirty {
                self.step();
                self.memory.dirty.remove(&page);
            }
        }
        self.step();
        let clean = |r: &&Range<u64>| !self.memory.cachestat || !self.memory.dirty.iter().any(|p| here(p, r));
        ranges.iter().filter(clean).cloned().collect()
    }
}
