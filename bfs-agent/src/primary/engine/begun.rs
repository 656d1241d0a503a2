//! Operations that go on by themselves: io_uring, AIO.
//!
//! Their records come in two parts. What stands in a `*_BEGUN` record is going to happen; it counts as
//! an event of the whole time between both ends when `ENDED` comes. So the rest of the engine sees one
//! event with a start and an end, as of a call.
//!
//! In a stop an operation may rest unfinished: it is not waited for, but what it changes is read, for
//! the stop has come in the middle of it or not, and it goes on being in flight.

use std::collections::{HashMap, HashSet, VecDeque};

use bfs_common::abi::{Event, EventHeader, InodeId, Plain, TaskEvent, ending, kind};
use bfs_common::record::ObjectId;

use super::Engine;
use super::host::{Host, HostError, OwnedEvent, Request, Target};
use super::interpret::{span_of, touches};

/// Records of operations in flight that are kept. Of others everything is suspect when they end.
const BEGUN_MAX: usize = 65_536;

/// What began and has not ended, by `tid`.
#[derive(Debug, Default)]
pub(super) struct Begun {
    by_id: HashMap<u32, Vec<Vec<u8>>>,
    records: usize,
    /// Events that were made of an end, not given yet.
    ready: VecDeque<OwnedEvent>,
    /// Files that operations were about to change that rested in a stop, since the last checkpoint.
    resting: HashSet<InodeId>,
}

/// Whether a record is the first of two parts.
fn is_begun(header: &EventHeader) -> bool {
    matches!(header.kind, kind::FILE_BEGUN | kind::PATH_BEGUN)
}

impl Begun {
    /// No operation rests any more.
    pub(super) fn go_on(&mut self) {
        self.resting.clear();
    }

    fn keep(&mut self, header: &EventHeader, bytes: Vec<u8>) {
        let kept = self.by_id.entry(header.tid).or_default();
        // What is left of an operation whose end was lost: that was named as lost.
        let before = kept.len();
        kept.retain(|bytes| starts_at(bytes, header.start_ns));
        self.records -= before - kept.len();
        if self.records < BEGUN_MAX {
            kept.push(bytes);
            self.records += 1;
        }
    }

    /// The events of an operation that ended; `None` if it is not known what it was.
    fn ended(&mut self, end: &TaskEvent) -> Option<Vec<Vec<u8>>> {
        let kept = self.by_id.remove(&end.header.tid).unwrap_or_default();
        self.records -= kept.len();
        match end.value {
            ending::NOTHING => Some(Vec::new()),
            ending::DONE => {
                let mut events: Vec<_> =
                    kept.into_iter().filter(|bytes| starts_at(bytes, end.header.start_ns)).collect();
                for bytes in &mut events {
                    put_end(bytes, end.header.end_ns);
                }
                Some(events)
            }
            _ => None,
        }
    }
}

fn starts_at(bytes: &[u8], start_ns: u64) -> bool {
    Event::parse(bytes).is_some_and(|event| event.header().start_ns == start_ns)
}

/// Sets [`EventHeader::end_ns`] in the bytes of a record.
fn put_end(bytes: &mut [u8], end_ns: u64) {
    const AT: usize = std::mem::offset_of!(EventHeader, end_ns);
    if let Some(field) = bytes.get_mut(AT..AT + 8) {
        field.copy_from_slice(&end_ns.to_ne_bytes());
    }
}

impl Engine {
    /// The next event, first parts and ends put together; whether there is one.
    pub(super) fn next_event(
        &mut self,
        host: &mut dyn Host,
        event: &mut OwnedEvent,
    ) -> Result<bool, HostError> {
        loop {
            if let Some(ready) = self.begun.ready.pop_front() {
                *event = ready;
                return Ok(true);
            }
            if !host.next_event(event)? {
                return Ok(false);
            }
            let Some(header) = EventHeader::read_from(&event.bytes) else { return Ok(true) };
            if is_begun(&header) {
                self.lingering |= header.kind == kind::FILE_BEGUN;
                self.begun.keep(&header, std::mem::take(&mut event.bytes));
                continue;
            }
            if header.kind != kind::ENDED {
                return Ok(true);
            }
            let Some(end) = TaskEvent::read_from(&event.bytes) else { return Ok(true) };
            let aio = i64::from(header.nr) == libc::SYS_io_submit;
            match self.begun.ended(&end) {
                // An operation with paths has a record, else an agent before had it. (All that a
                // call of AIO handed in may have been reads.)
                Some(events) if !events.is_empty() || aio || end.value == ending::NOTHING => {
                    let ring_position = event.ring_position;
                    self.begun
                        .ready
                        .extend(events.into_iter().map(|bytes| OwnedEvent { bytes, ring_position }));
                }
                // What it did is not known: the event itself says so.
                _ => return Ok(true),
            }
        }
    }

    /// A file that is new to the model is read whole.
    pub(super) fn suspect_new_file(&mut self, object: ObjectId) {
        self.dirty.whole(object);
        let rests = |o: &super::model::Object| self.begun.resting.contains(&o.inode);
        if self.lingering || self.model.get(object).is_some_and(rests) {
            self.dirty.restless(object);
        }
    }

    /// What an operation that is in flight in a stop may have changed so far is read.
    pub(super) fn suspect_request(&mut self, request: &Request, host: &mut dyn Host) {
        let now = host.now();
        match request.target {
            Target::File { inode, start, end } => {
                // It may be brought in by what is read in this very stop.
                self.begun.resting.insert(inode);
                if let Some(object) = self.model.find(inode) {
                    self.stain_range(object, start..end);
                    self.dirty.meta(object, now);
                    self.dirty.xattrs(object);
                    self.dirty.restless(object);
                }
            }
            Target::Paths => {
                let records = self.begun.by_id.get(&request.id).cloned().unwrap_or_default();
                if records.is_empty() {
                    self.suspect_everything(now);
                }
                for mut bytes in records {
                    // As if it ended here: what it overlapped with is suspect as well.
                    put_end(&mut bytes, now);
                    let Some(event) = Event::parse(&bytes) else { continue };
                    let span = span_of(&event);
                    let (act, way) = self.interpret_surely(&event, host, span);
                    let touches = touches(&act, &way, &self.model);
                    self.note(&touches, &act, span);
                    // It may fail yet.
                    if self.note_names(&act, &way, &event, span, true) {
                        self.suspect_everything(now);
                    }
                    self.suspect_multiple(now);
                    for thing in &touches {
                        self.stain(thing, now, true);
                    }
                }
            }
            Target::Unknown => {
                self.suspect_everything(now);
                for object in self.model.ids().collect::<Vec<_>>() {
                    self.dirty.restless(object);
                }
            }
        }
    }
}
