//! Asynchronous operations in the simulated kernel: nobody is in a call while they go on.

use bfs_common::abi::{EventHeader, FileEvent, InodeAttr, TaskEvent, ending, flag, kind};

use super::fs::Call;
use super::world::{Running, World, inode_id, pack};
use crate::primary::engine::host::{InFlight, OwnedEvent, Request, Target};

/// How an operation is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sort {
    /// By a worker, which stands when the processes stand; its end is told.
    Worker,
    /// By a worker; its end is not told, until its memory is used again.
    Silent,
    /// By the device: it goes on in a stop, but its end is told only by the processes.
    Direct,
    /// By the device, handed in by a call; its end is never told.
    Aio,
}

/// An operation in flight.
#[derive(Clone, Debug)]
pub(super) struct Flying {
    pub(super) id: u32,
    sort: Sort,
    running: Running,
}

/// Most operations in flight.
const FLYING_MAX: usize = 3;

impl World {
    pub(super) fn step_request(&mut self) {
        let begin = self.flying.is_empty() || (self.flying.len() < FLYING_MAX && self.random.next(3) == 0);
        if begin {
            if !self.stopped && self.calls_left > 0 {
                self.calls_left -= 1;
                self.begin();
            }
            return;
        }
        let which = self.random.next(self.flying.len() as u64) as usize;
        let mut flying = self.flying.swap_remove(which);
        let device = matches!(flying.sort, Sort::Direct | Sort::Aio);
        if flying.running.effect.is_none() {
            if device || !self.stopped {
                self.effect(&mut flying.running);
            }
            // Of AIO nothing is left then.
            if flying.sort != Sort::Aio || flying.running.effect.is_none() {
                self.flying.push(flying);
            }
            return;
        }
        if self.stopped || (flying.sort == Sort::Silent && self.random.next(8) > 0) {
            self.flying.push(flying);
            return;
        }
        self.ended(&flying);
    }

    fn begin(&mut self) {
        self.fresh += 1;
        let id = 0x8000_0000 | self.fresh as u32;
        let mut call = self.invent();
        if let Call::Write { inline, .. } = &mut call {
            *inline = false;
        }
        let write = matches!(call, Call::Write { .. });
        let sort = match self.random.next(8) {
            0 => Sort::Silent,
            1..=3 if write => Sort::Direct,
            4 | 5 if write => Sort::Aio,
            _ => Sort::Worker,
        };
        // Opens, truncations and attributes by descriptor go by their record at the end, as writes do.
        if matches!(call, Call::Create { .. } | Call::Map { .. }) {
            return;
        }
        let running = Running { start_ns: self.clock, call, effect: None };
        if sort == Sort::Aio {
            let (inode, start, end) = extent(&running.call);
            let event = FileEvent {
                header: EventHeader {
                    nr: libc::SYS_io_submit as u32,
                    flags: flag::OFFSET_UNKNOWN,
                    ..header(kind::FILE_BEGUN, id, running.start_ns, running.start_ns)
                },
                attr: InodeAttr { id: inode_id(inode), ..InodeAttr::default() },
                range_start: start,
                range_end: end,
                ..FileEvent::default()
            };
            self.put(pack(&event, b"", b""));
            self.clock += 1 + self.random.next(2_000);
            self.put_end(id, running.start_ns, libc::SYS_io_submit, true);
        } else if !on_file(&running.call) {
            // Its paths are sent now.
            let mut begun = running.clone();
            begun.effect = Some(super::fs::Effect { ok: true, ..super::fs::Effect::default() });
            self.end(id, &begun, kind::FILE_BEGUN, kind::PATH_BEGUN);
        }
        self.flying.push(Flying { id, sort, running });
    }

    fn ended(&mut self, flying: &Flying) {
        if on_file(&flying.running.call) {
            self.end(flying.id, &flying.running, kind::FILE, kind::PATH);
        } else {
            let ok = flying.running.effect.as_ref().is_some_and(|e| e.ok);
            self.put_end(flying.id, flying.running.start_ns, 0, ok);
        }
    }

    fn put_end(&mut self, id: u32, start_ns: u64, nr: i64, ok: bool) {
        let end = TaskEvent {
            header: EventHeader { nr: nr as u32, ..header(kind::ENDED, id, start_ns, self.clock) },
            value: if ok { ending::DONE } else { ending::NOTHING },
            ..TaskEvent::default()
        };
        self.put(pack(&end, b"", b""));
    }

    /// Puts a record into the ring.
    pub(super) fn put(&mut self, bytes: Vec<u8>) {
        self.ring_position += bytes.len() as u64;
        self.ring.push_back(OwnedEvent { bytes, ring_position: self.ring_position });
    }

    /// Whether no device writes into a file.
    pub(super) fn rests(&self, inode: u64) -> bool {
        !self.flying.iter().any(|f| {
            matches!(f.sort, Sort::Direct | Sort::Aio)
                && f.running.effect.is_none()
                && extent(&f.running.call).0 == inode
        })
    }

    /// The operations that the probes know to be in flight.
    pub(super) fn requests(&self) -> impl Iterator<Item = InFlight> + '_ {
        self.flying.iter().filter(|f| f.sort != Sort::Aio).map(|f| {
            let (inode, start, end) = extent(&f.running.call);
            InFlight {
                tid: 1,
                tgid: 1,
                nr: 0,
                start_ns: f.running.start_ns,
                request: Some(Request {
                    key: u64::from(f.id),
                    id: f.id,
                    target: if on_file(&f.running.call) {
                        Target::File { inode: inode_id(inode), start, end }
                    } else {
                        Target::Paths
                    },
                    silent: f.sort == Sort::Silent,
                }),
            }
        })
    }
}

fn header(kind: u16, id: u32, start_ns: u64, end_ns: u64) -> EventHeader {
    EventHeader { kind, start_ns, end_ns, tid: id, tgid: id, ..EventHeader::default() }
}

fn on_file(call: &Call) -> bool {
    matches!(call, Call::Write { .. } | Call::Truncate { .. } | Call::Fchmod { .. })
}

/// The file of a call on a file, and the range that it may change.
fn extent(call: &Call) -> (u64, u64, u64) {
    match call {
        Call::Write { file, offset: Some(offset), data, .. } => (*file, *offset, offset + data.len() as u64),
        Call::Write { file, .. } | Call::Truncate { file, .. } | Call::Fchmod { file, .. } => {
            (*file, 0, u64::MAX)
        }
        _ => (0, 0, 0),
    }
}
