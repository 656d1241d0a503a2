//! Settling: what is dirty is read from the file system and put into the stream.
//!
//! Nothing here decides whether a read counts; it is noted in [`super::Reads`], and the cut
//! compares it with what happened meanwhile.

use std::ops::Range;
use std::time::Duration;

use bfs_common::record::{FileKind, Name, ObjectId};
use bfs_common::wire::DIGEST_BLOCK;

use super::Engine;
use super::dirty::Dirty;
use super::filter::Verdict;
use super::host::{Host, HostError, Segment, Stat};
use super::model::Model;
use super::outbox::Outbox;
use super::same::{Known, Same};

/// Bytes that are read before what was read is shipped.
const PIECE: u64 = 4 << 20;

/// What could not be settled.
#[derive(Default)]
struct Left {
    /// Nobody can find them any more.
    gone: Vec<(ObjectId, Dirty)>,
    /// Nobody has found them yet.
    unbound: Vec<(ObjectId, Dirty)>,
    /// Direct I/O is in flight.
    restless: Vec<(ObjectId, Dirty)>,
}

/// Objects whose attributes are read before anything else.
const ATTRIBUTES_FIRST: usize = 16;

/// Events that are taken in between two reads.
const EVENTS_AHEAD: usize = 1024;

/// Between two looks whether the destination has said what it has.
const ANSWER_LOOK: Duration = Duration::from_millis(1);

/// How often what turned up while reading ahead is read as well. Events are taken in meanwhile, so a
/// program that makes things dirty as fast as they are read would never let it end.
const PASSES_AHEAD: u32 = 16;

/// A piece of a file, before it is known what of it has to be sent.
#[derive(Default)]
struct Piece {
    start: u64,
    /// Zeros where there is a hole.
    bytes: Vec<u8>,
    /// Where each segment ends, and whether it has data.
    segments: Vec<(u64, bool)>,
}

impl Piece {
    fn add(&mut self, offset: u64, length: u64, data: Option<&[u8]>) {
        let end = offset + length;
        match data {
            Some(data) => self.bytes.extend_from_slice(data),
            None => self.bytes.resize((end - self.start) as usize, 0),
        }
        match self.segments.last_mut() {
            Some(last) if last.1 == data.is_some() => last.0 = end,
            _ => self.segments.push((end, data.is_some())),
        }
    }

    /// Puts what differs from what the stream has into the stream. `again`: it is going to be read again.
    fn send(self, object: ObjectId, again: bool, model: &mut Model, out: &mut Outbox) {
        let block = model.same.as_ref().map_or(DIGEST_BLOCK, Same::block);
        let after = |at: u64, end: u64| (at / block + 1).saturating_mul(block).min(end);
        let (start, end) = (self.start, self.start + self.bytes.len() as u64);
        let slice =
            |range: Range<u64>| &self.bytes[(range.start - start) as usize..(range.end - start) as usize];
        // Neighbours in one.
        let mut differ: Vec<Range<u64>> = Vec::new();
        let mut at = start;
        while at < end {
            let next = after(at, end);
            let bytes = slice(at..next);
            let same = model.same.as_ref().is_some_and(|same| same.is(object, at, bytes));
            if !same && !model.sent.is(object, at, bytes) {
                match differ.last_mut() {
                    Some(last) if last.end == at => last.end = next,
                    _ => differ.push(at..next),
                }
            }
            at = next;
        }
        for range in differ {
            let mut from = start;
            for (to, data) in &self.segments {
                let part = range.start.max(from)..range.end.min(*to);
                from = *to;
                match data {
                    _ if part.is_empty() => {}
                    true => model.write(object, part.start, slice(part), out),
                    false => model.zero(object, part.start, part.end - part.start, out),
                }
            }
        }
        let mut at = start;
        while again && at < end {
            let next = after(at, end);
            model.sent.note(object, at, slice(at..next));
            at = next;
        }
    }
}

impl Engine {
    /// Reads everything that is dirty now, and what turns up while reading. What cannot be found
    /// any more stays dirty, and so do its names.
    ///
    /// `ahead`: before the instant of a cut is chosen, so events are taken in all the time.
    pub(super) fn settle(&mut self, host: &mut dyn Host, ahead: bool) -> Result<(), HostError> {
        let mut left = Left::default();
        let settled = self.settle_all(host, ahead, &mut left);
        // What is below something that is gone is gone, too: nobody looks for it any more.
        for (object, dirty) in left.gone {
            if settled.is_err() || self.model.is_reachable(object) {
                // An inode that is gone while it has a name: the name is what changed.
                if settled.is_ok() {
                    self.suspect_names(object);
                }
                self.dirty.put(object, dirty);
            }
        }
        for (object, dirty) in left.unbound {
            // Whoever was found meanwhile is suspect as a whole.
            if self.model.is_unbound(object) && (settled.is_err() || self.model.is_reachable(object)) {
                // It was moved after its directory was read: its name is read again.
                self.suspect_names(object);
                self.dirty.put(object, dirty);
            }
        }
        for (object, dirty) in left.restless {
            self.dirty.put(object, dirty);
        }
        settled
    }

    /// Reads attributes that are dirty, of a few objects. Those of a directory change with every name in it:
    /// they are read right behind the instant of a cut, so that little can come in between, and before
    /// anything that takes longer.
    pub(super) fn settle_attributes(&mut self, host: &mut dyn Host) -> Result<(), HostError> {
        for object in self.dirty.attributes(ATTRIBUTES_FIRST) {
            let Some(inode) = self.model.get(object).map(|o| o.inode) else { continue };
            if let Some(stat) = host.stat(inode)? {
                let now = host.now();
                self.reads.meta(object, now);
                self.saw_stat(object, &stat, now);
            }
        }
        Ok(())
    }

    fn settle_all(&mut self, host: &mut dyn Host, ahead: bool, left: &mut Left) -> Result<(), HostError> {
        let mut passes = 0;
        while !(self.dirty.is_empty() || ahead && passes == PASSES_AHEAD) {
            passes += 1;
            for object in self.dirty.ids() {
                let Some(dirty) = self.dirty.take(object) else { continue };
                let Some((inode, kind)) = self.model.get(object).map(|o| (o.inode, o.kind)) else { continue };
                if self.model.is_unbound(object) {
                    // Whoever reads its directory finds it, or that it is gone.
                    left.unbound.push((object, dirty));
                    continue;
                }
                let look = kind == FileKind::Regular && (dirty.restless || self.restless);
                // The look comes before the reading: what begins in between brings its own record.
                let settled = match if look { host.is_at_rest(inode) } else { Ok(true) } {
                    Ok(true) => self.settle_object(object, &dirty, host, ahead),
                    Ok(false) => {
                        left.restless.push((object, dirty));
                        continue;
                    }
                    Err(e) => Err(e),
                };
                match settled {
                    Ok(true) => {}
                    Ok(false) => {
                        if self.model.is_linked(object) {
                            left.gone.push((object, dirty));
                        }
                    }
                    Err(e) => {
                        self.dirty.put(object, dirty);
                        return Err(e);
                    }
                }
                self.rescan_moved(host.now());
                self.breathe(host, ahead)?;
            }
        }
        Ok(())
    }

    fn breathe(&mut self, host: &mut dyn Host, ahead: bool) -> Result<(), HostError> {
        // Not all that is there: what comes faster than it is taken in must not stop the reading.
        if ahead { self.take_some(host, EVENTS_AHEAD).map(drop) } else { self.ship_full(host) }
    }

    /// `false` when the inode is gone.
    pub(super) fn settle_object(
        &mut self,
        object: ObjectId,
        dirty: &Dirty,
        host: &mut dyn Host,
        ahead: bool,
    ) -> Result<bool, HostError> {
        let Some(known) = self.model.get(object) else { return Ok(true) };
        tracing::trace!(?object, ino = known.inode.ino, ?dirty, now = host.now(), "is settled");
        let (inode, kind) = (known.inode, known.kind);
        let directory = kind == FileKind::Directory;
        if dirty.foreign && !host.await_others(inode)? {
            return Ok(false);
        }
        let mut names: Vec<(Name, bool)> = Vec::new();
        if directory {
            names.extend(dirty.entries.iter().map(|(n, d)| (n.clone(), *d)));
        }
        if let Some(deep) = dirty.rescan
            && directory
        {
            let Some(mut list) = host.list(inode)? else { return Ok(false) };
            self.reads.list(object, host.now());
            list.extend(self.model.get(object).into_iter().flat_map(|o| o.entries.keys().cloned()));
            list.sort_unstable();
            list.dedup();
            names.retain(|(n, _)| list.binary_search(n).is_err());
            names.extend(list.into_iter().map(|name| {
                let deep = deep || dirty.entries.get(&name).copied().unwrap_or(false);
                (name, deep)
            }));
        }
        for (name, deep) in names {
            if self.model.verdict(object, &name) == Verdict::LeftOut {
                self.model.unlink(object, &name, &mut self.out);
                continue;
            }
            let found = host.child(inode, &name)?;
            let now = host.now();
            self.reads.entry(object, &name, now);
            self.settle_again((object, name), found, deep, now);
        }
        if dirty.whole || dirty.meta_since.is_some() {
            let Some(stat) = host.stat(inode)? else { return Ok(false) };
            let now = host.now();
            self.reads.meta(object, now);
            self.saw_stat(object, &stat, now);
            if dirty.whole && kind == FileKind::Regular {
                // What is appended meanwhile becomes dirty by its own record.
                self.model.truncate(object, stat.size, &mut self.out);
                if !self.read_range(object, 0..u64::MAX, stat.size, dirty, host, ahead)? {
                    return Ok(false);
                }
            }
        }
        if !dirty.whole {
            for range in dirty.ranges.iter() {
                // No end given: to the end of the file.
                let end = match range.end {
                    u64::MAX => match host.stat(inode)? {
                        Some(stat) => stat.size.max(range.start),
                        None => return Ok(false),
                    },
                    end => end,
                };
                if !self.read_range(object, range, end, dirty, host, ahead)? {
                    return Ok(false);
                }
            }
        }
        if dirty.xattrs {
            let Some(xattrs) = host.xattrs(inode)? else { return Ok(false) };
            self.reads.xattrs(object, host.now());
            self.model.set_xattrs(object, xattrs, &mut self.out);
        }
        Ok(true)
    }

    /// Reads a range of a file up to `end`, which is or was the end of the file where the range
    /// goes further.
    fn read_range(
        &mut self,
        object: ObjectId,
        range: Range<u64>,
        end: u64,
        dirty: &Dirty,
        host: &mut dyn Host,
        ahead: bool,
    ) -> Result<bool, HostError> {
        let Some(inode) = self.model.get(object).map(|o| o.inode) else { return Ok(true) };
        // Others change it, so it will be read again.
        let again = dirty.foreign;
        self.ask_for_digests(object, host, ahead)?;
        // Events that are taken in between the pieces must see that the read is going on.
        self.reads.data_begins(object, range.clone());
        let mut at = range.start;
        while at < end {
            // Blocks that are compared lie in one piece.
            let next = (at / PIECE + 1).saturating_mul(PIECE).min(end);
            let holes = dirty.whole || dirty.holes.intersects(&(at..next));
            let (model, out) = (&mut self.model, &mut self.out);
            let compared = again || model.same.as_ref().is_some_and(|same| same.has(object));
            let mut piece = Piece { start: at, ..Piece::default() };
            let there = host.read(inode, at..next, holes, &mut |segment| match segment {
                Segment::Data(offset, bytes) if compared => {
                    piece.add(offset, bytes.len() as u64, Some(bytes));
                }
                Segment::Data(offset, bytes) => model.write(object, offset, bytes, out),
                Segment::Hole(offset, length) if compared => piece.add(offset, length, None),
                Segment::Hole(offset, length) => model.zero(object, offset, length, out),
            })?;
            if there.is_none() {
                return Ok(false);
            }
            if compared {
                piece.send(object, again, model, out);
            }
            self.breathe(host, ahead)?;
            at = next;
        }
        self.reads.data_ends(object, host.now());
        Ok(true)
    }

    /// What the destination has of a file is asked for once. While processes stand, or calls wait for it,
    /// nobody waits for the answer.
    fn ask_for_digests(
        &mut self,
        object: ObjectId,
        host: &mut dyn Host,
        ahead: bool,
    ) -> Result<(), HostError> {
        if let Some((position, highest)) = self.ask.take() {
            // It has to have the record before it can say how it stood then.
            self.out.close(None);
            self.ship_full(host)?;
            host.ask(position, highest);
        }
        while self.model.same.as_ref().is_some_and(|same| !same.has(object)) {
            let digests = match host.known(object) {
                Known::NotYet if ahead => {
                    self.breathe(host, ahead)?;
                    host.pause(ANSWER_LOOK);
                    continue;
                }
                Known::NotYet => return Ok(()),
                Known::Nothing => Vec::new(),
                Known::Digests(digests) => digests,
            };
            if let Some(same) = &mut self.model.same {
                same.put(object, digests);
            }
        }
        Ok(())
    }

    pub(super) fn settle_entry(&mut self, directory: ObjectId, name: &Name, found: Option<Stat>, deep: bool) {
        let Some(stat) = found else {
            self.model.unlink(directory, name, &mut self.out);
            return;
        };
        if self.model.verdict(directory, name).leaves_out(stat.kind) {
            return self.model.unlink(directory, name, &mut self.out);
        }
        let now = self.reads.entries.get(&(directory, name.clone())).copied().unwrap_or(0);
        let known = self.model.find(stat.inode).or_else(|| self.adopt(directory, name, &stat));
        let object = known.unwrap_or_else(|| self.create(&stat, now));
        if self.model.is_root(object) {
            return;
        }
        // Another object than the model says: calls that named this entry went to the wrong one.
        let deep = deep || self.model.entry(directory, name) != Some(object);
        self.model.link(directory, name, object, &mut self.out);
        self.reads.meta(object, now);
        self.saw_stat(object, &stat, now);
        // Nothing is known of what was not in the group before, and little of what came from
        // outside: its content, attributes and all below are taken.
        if deep {
            match stat.kind {
                FileKind::Regular => self.suspect_new_file(object),
                FileKind::Directory => self.dirty.rescan(object, true),
                _ => {}
            }
            self.dirty.xattrs(object);
        }
    }
}
