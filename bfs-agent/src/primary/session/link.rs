//! The engine's outside world, for real: probes, file systems, shipper, stopper.

use std::cell::Cell;
use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::primary::clock::monotonic_ns;
use bfs_common::abi::{FailedEvent, InodeId, RunEvent, TASKS_MAX, counter};
use bfs_common::record::{CheckpointId, Name, ObjectId, Sequence};

use super::known::Answers;
use super::multiple::Multiple;
use super::state;
use crate::primary::capture::Probes;
use crate::primary::capture::probes::Counters;
use crate::primary::control::Standing;
use crate::primary::engine::host::{Host, HostError, InFlight, Losses, OwnedEvent, Seen, Segment, Stat};
use crate::primary::engine::outbox::Batch;
use crate::primary::engine::resolve::Start;
use crate::primary::engine::same::Known;
use crate::primary::further::{At, Confirm, Further, Leg, Place};
use crate::primary::reader::Reader;
use crate::primary::ship::{Full, Progress, Shipper};
use crate::primary::stop::{Limits, Stopper};
use crate::service::Service;
use crate::tree::Xattrs;

/// How long the engine waits for room at the shipper before it counts as detached: without a
/// connection, and with one that makes no progress.
const ROOM_WAIT: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(60)];

/// How many stops are remembered for the status.
const STOPS_MAX: usize = 4096;

/// How long processes may take to stand, and how long they stand for a checkpoint that needs it.
pub const STOP_LIMITS: Limits = Limits { reach: Duration::from_secs(2), stand: Duration::from_secs(20) };

/// Everything that the engine works with.
pub struct Link {
    /// The probes.
    pub probes: Probes,
    /// The file systems.
    pub reader: Reader,
    /// The way to the (first) destination.
    pub shipper: Shipper,
    /// The ways to further ones, where there are any.
    pub further: Option<Further>,
    /// Whose confirmation counts.
    pub confirm: Confirm,
    /// How to stop the selected processes; `None` where that is not possible.
    pub stopper: Option<Box<dyn Stopper>>,
    /// For the next stop.
    pub limits: Limits,
    /// How long each stop lasted, microseconds.
    pub stops_us: Vec<u64>,
    /// How long the last stop took until all stood.
    pub reached: Duration,
    /// Why the last stop ended too early, if it did.
    pub let_go: Option<String>,
    /// What the destination has, if it was asked.
    answers: Option<Answers>,
    /// Who wants to know that the work goes on.
    pub service: Service,
    /// Errors of the disk that selected processes saw, and nobody has looked at yet.
    pub failed: Vec<FailedEvent>,
    /// Only what is touched is handed over.
    pub noting: bool,
    /// The first destination.
    pub(super) first: Place,
    /// What was confirmed and applied so far; it stays so, whoever comes or goes.
    so_far: Cell<[CheckpointId; 2]>,
    group: String,
    /// A successor needs what the spool has.
    relies_on_spool: bool,
    seen: Counters,
    seen_misses: u64,
    released: u64,
    /// Files that nobody maps any more, each with the record that has to be durable before the probes let go of it.
    unmapped: VecDeque<(Sequence, InodeId)>,
    /// Which objects have several names.
    multiple: Multiple,
}

impl Link {
    /// Ties them together. What the probes lost before counts as lost now.
    pub fn new(
        (group, first): (&str, Place),
        probes: Probes,
        reader: Reader,
        shipper: Shipper,
        stopper: Option<Box<dyn Stopper>>,
        multiple: Multiple,
    ) -> Self {
        Self {
            failed: Vec::new(),
            noting: false,
            further: None,
            confirm: Confirm::default(),
            first,
            so_far: Cell::default(),
            group: group.into(),
            relies_on_spool: state::relies_on_spool(group),
            probes,
            reader,
            shipper,
            stopper,
            limits: STOP_LIMITS,
            stops_us: Vec::new(),
            reached: Duration::ZERO,
            let_go: None,
            answers: None,
            service: Service::default(),
            seen: Counters::default(),
            seen_misses: 0,
            released: 0,
            unmapped: VecDeque::new(),
            multiple,
        }
    }

    /// How far the group is: the first destination, and what counts as confirmed and applied with the further ones.
    pub fn progress(&self) -> Progress {
        let mut progress = self.shipper.progress();
        let Some(further) = &self.further else { return progress };
        let legs = further.legs();
        let so_far = self.so_far.get();
        let first = At {
            address: &self.first.address,
            attached: progress.connected && progress.refusal.is_none(),
            number: CheckpointId(0),
        };
        let counts = |number: CheckpointId, of: fn(&Leg) -> CheckpointId| {
            let legs = legs.iter().map(|leg| At {
                address: &leg.address,
                attached: leg.standing == Standing::Attached,
                number: of(leg),
            });
            let all: Vec<_> = [At { number, ..first }].into_iter().chain(legs).collect();
            self.confirm.of(&all)
        };
        progress.confirmed = counts(progress.confirmed, |leg| leg.confirmed).max(so_far[0]);
        progress.applied = counts(progress.applied, |leg| leg.applied).max(so_far[1]);
        self.so_far.set([progress.confirmed, progress.applied]);
        progress
    }

    /// Gives back the ring space of what is durable.
    pub fn release_ring(&mut self) {
        let progress = self.shipper.progress();
        if let Some(further) = &self.further {
            further.first_has(progress.sealed, progress.applied);
        }
        while let Some((_, file)) = self.unmapped.pop_front_if(|(sealed, _)| *sealed <= progress.sealed) {
            // A file too many is looked at once more by whoever finds it.
            if let Err(e) = self.probes.mapped().forget(file) {
                tracing::warn!("{e}");
            }
        }
        self.multiple.sealed(progress.sealed);
        let spooled = progress.spool.records > 0;
        if spooled != self.relies_on_spool {
            match state::rely_on_spool(&self.group, spooled) {
                // The ring keeps it then.
                Err(e) if spooled => {
                    return tracing::warn!("cannot note in /run/bfs that there is a spool: {e}");
                }
                _ => self.relies_on_spool = spooled,
            }
        }
        if let Some(position) = progress.released_ring_position.filter(|p| *p > self.released) {
            self.probes.ring().release(position);
            self.released = position;
        }
    }

    /// How many writes went on where the one before had ended, since the probes were loaded.
    pub fn went_on(&self) -> u64 {
        self.probes.counters().unwrap_or(self.seen).get(counter::WENT_ON)
    }

    /// Nothing that is in the ring is wanted any more.
    pub fn discard_ring(&mut self) {
        while self.probes.ring().next().is_some() {}
        let position = self.probes.ring().position();
        if position > self.released {
            self.probes.ring().release(position);
            self.released = position;
        }
    }
}

pub(super) fn probes_failed(error: impl std::fmt::Display) -> HostError {
    HostError::Probes(error.to_string())
}

impl Host for Link {
    fn now(&self) -> u64 {
        monotonic_ns()
    }

    fn child(&mut self, directory: InodeId, name: &Name) -> Result<Option<Stat>, HostError> {
        self.reader.child(directory, name)
    }

    fn list(&mut self, directory: InodeId) -> Result<Option<Vec<Name>>, HostError> {
        self.service.alive();
        self.reader.list(directory)
    }

    fn stat(&mut self, inode: InodeId) -> Result<Option<Stat>, HostError> {
        self.reader.stat(inode)
    }

    fn xattrs(&mut self, inode: InodeId) -> Result<Option<Xattrs>, HostError> {
        self.reader.xattrs(inode)
    }

    fn ask(&mut self, position: Sequence, highest: ObjectId) {
        let connect = self.shipper.remote().connector();
        self.answers = Some(Answers::ask(connect, &self.group, position, highest));
    }

    fn known(&mut self, object: ObjectId) -> Known {
        self.answers.as_ref().map_or(Known::Nothing, |answers| answers.known(object))
    }

    fn read(
        &mut self,
        inode: InodeId,
        range: Range<u64>,
        holes: bool,
        each: &mut dyn FnMut(Segment<'_>),
    ) -> Result<Option<()>, HostError> {
        let service = &mut self.service;
        self.reader.read(inode, range, holes, &mut |segment| {
            service.alive();
            each(segment);
        })
    }

    fn outside_path(&mut self, directory: InodeId, start: &Start) -> Option<PathBuf> {
        self.reader.outside_path(directory, start)
    }

    fn real_path(&mut self, directory: InodeId) -> Option<PathBuf> {
        self.reader.real_path(directory)
    }

    fn look(&mut self, start: &Start, path: &Path) -> Seen {
        self.reader.look(start, path)
    }

    fn same_mounts(&mut self, start: &Start) -> bool {
        self.reader.same_mounts(start)
    }

    fn is_bound(&mut self, directory: InodeId) -> bool {
        self.reader.is_bound(directory)
    }

    fn cores_are_files(&mut self) -> bool {
        // A pattern that begins with | or @ names a program or a socket that gets them (core(5)).
        let pattern = std::fs::read("/proc/sys/kernel/core_pattern").unwrap_or_default();
        !matches!(pattern.first(), Some(b'|' | b'@'))
    }

    fn is_host_root(&mut self, directory: InodeId) -> bool {
        self.reader.is_host_root(directory)
    }

    fn in_flight(&mut self, t: u64) -> Result<Vec<InFlight>, HostError> {
        let tasks = self.probes.in_flight(t).map_err(probes_failed)?;
        let mut flying: Vec<_> = tasks
            .into_iter()
            .map(|(tid, s)| InFlight { tid, tgid: s.tgid, nr: s.nr, start_ns: s.start_ns, request: None })
            .collect();
        flying.extend(self.requests_in_flight(t)?);
        Ok(flying)
    }

    fn drop_ended(&mut self, flying: &mut Vec<InFlight>) -> Result<(), HostError> {
        for call in std::mem::take(flying) {
            let flies = match &call.request {
                Some(request) => self.is_in_flight(request, call.start_ns)?,
                None => self.probes.is_in_call(call.tid, call.start_ns).map_err(probes_failed)?,
            };
            if flies {
                flying.push(call);
            }
        }
        Ok(())
    }

    fn mapped_by(&mut self, tgid: u32) -> Result<Option<Vec<InodeId>>, HostError> {
        super::mapped::mapped_by(self, tgid)
    }

    fn is_at_rest(&mut self, inode: InodeId) -> Result<bool, HostError> {
        let Some(file) = self.reader.descriptor(inode)? else { return Ok(true) };
        self.probes.is_at_rest(file.as_fd()).map_err(probes_failed)
    }

    fn is_idle(&mut self, call: &InFlight) -> bool {
        if call.request.is_some() {
            return false;
        }
        // fifo_open() in fs/pipe.c: the FIFO was there, or it would not be one.
        let wchan = format!("/proc/{}/task/{}/wchan", call.tgid, call.tid);
        std::fs::read(wchan).is_ok_and(|function| function == b"wait_for_partner")
    }

    fn next_event(&mut self, event: &mut OwnedEvent) -> Result<bool, HostError> {
        let Some((record, ring_position)) = self.probes.ring().next() else { return Ok(false) };
        let bytes = record.bytes();
        let length = bytes.first_chunk::<4>().map_or(0, |l| u32::from_ne_bytes(*l) as usize);
        event.bytes.clear();
        event.bytes.extend_from_slice(bytes.get(..length).unwrap_or(bytes));
        event.ring_position = ring_position;
        super::foreign::taken(&self.probes, &mut event.bytes)?;
        // It is taken in like any other, as one that changed nothing.
        self.failed.extend(super::mending::told(&event.bytes));
        Ok(true)
    }

    fn part_writes(&mut self) -> Result<Vec<RunEvent>, HostError> {
        self.probes.part_writes(true).and_then(|()| self.probes.runs()).map_err(probes_failed)
    }

    fn join_writes(&mut self) {
        // Where that fails, all go on having records of their own.
        if let Err(e) = self.probes.part_writes(false) {
            tracing::debug!("writes are not joined: {e}");
        }
    }

    fn losses(&mut self) -> Result<Losses, HostError> {
        let now = self.probes.counters().map_err(probes_failed)?;
        let rose = |index| now.get(index) > self.seen.get(index);
        // A task that is not followed can do anything at any time, and so can its children.
        let unfollowed = now.get(counter::TASKS_FULL);
        if unfollowed > 0 {
            return Err(HostError::Probes(format!(
                "{unfollowed} tasks beyond the {TASKS_MAX} that can be followed: nothing is confirmed any more; \
                 end this agent and start again when there are fewer"
            )));
        }
        let mut losses = Losses { everything: rose(counter::RESCAN), ..Losses::default() };
        if rose(counter::RESERVE_FAILED) {
            let suspects = self.probes.drain_suspects().map_err(probes_failed)?;
            losses.inodes = suspects.into_iter().map(|(inode, _)| inode).collect();
        }
        self.seen = now;
        let (abandoned, unnamed) = self.abandoned_requests()?;
        losses.inodes.extend(abandoned);
        losses.everything |= unnamed;
        let misses = self.probes.recursion_misses().map_err(probes_failed)?.iter().map(|m| m.1).sum();
        losses.everything |= misses > self.seen_misses;
        self.seen_misses = misses;
        Ok(losses)
    }

    fn follow_mapped(&mut self, inode: InodeId, pages: bool) -> Result<bool, HostError> {
        self.unmapped.retain(|(_, unmapped)| *unmapped != inode);
        let pages = pages && self.probes.mapped().records_pages() && self.reader.tells_stores(inode)?;
        Ok(self.probes.mapped().follow(inode, pages).map_err(probes_failed)? && pages)
    }

    fn keep_multiple(&mut self, objects: &[ObjectId]) {
        self.multiple.keep(objects);
    }

    fn forget_multiple(&mut self, objects: Vec<ObjectId>, sealed: Sequence) {
        self.multiple.forget(objects, sealed);
    }

    fn forget_mapped(&mut self, files: Vec<InodeId>, sealed: Sequence) {
        self.unmapped.extend(files.into_iter().map(|file| (sealed, file)));
    }

    fn writable_mappings(&mut self, inode: InodeId) -> Result<Option<u32>, HostError> {
        Ok(match self.reader.descriptor(inode)? {
            Some(file) => self.probes.writable_mappings(file.as_fd()).map_err(probes_failed)?,
            None if self.reader.finds_by_number(inode) => Some(0),
            None => None,
        })
    }

    fn await_others(&mut self, inode: InodeId) -> Result<bool, HostError> {
        self.reader.await_others(inode)
    }

    fn open_for_writing(&mut self, inode: InodeId) -> Result<Option<u32>, HostError> {
        Ok(match self.reader.descriptor(inode)? {
            Some(file) => self.probes.foreign().writers(file.as_fd()).map_err(probes_failed)?,
            None if self.reader.finds_by_number(inode) => Some(0),
            None => None,
        })
    }

    fn foreign_writers(&mut self) -> Result<Vec<(InodeId, u32)>, HostError> {
        super::foreign::writers(self)
    }

    fn command_of(&mut self, tgid: u32) -> Option<String> {
        super::foreign::command_of(&self.probes, tgid)
    }

    fn clean(&mut self, inode: InodeId, ranges: &[Range<u64>]) -> Result<Vec<Range<u64>>, HostError> {
        self.reader.clean(inode, ranges)
    }

    fn pause(&mut self, time: Duration) {
        self.service.alive();
        std::thread::sleep(time);
    }

    fn ship(&mut self, batches: Vec<Batch>) -> Result<(), HostError> {
        for mut batch in batches {
            let mut since = (Instant::now(), self.shipper.progress().sealed);
            loop {
                self.service.alive();
                let short = !self.noting && self.shipper.shortage().is_some();
                let kept = self.further.as_ref().map(|_| batch.clone());
                match self.shipper.try_push(batch, short) {
                    Ok(()) => {
                        if let (Some(further), Some(batch)) = (&self.further, &kept) {
                            further.take(batch);
                        }
                        break;
                    }
                    Err(Full(back)) => batch = back,
                }
                let progress = self.shipper.progress();
                if progress.sealed > since.1 {
                    since = (Instant::now(), progress.sealed);
                }
                let may_move =
                    progress.connected || (self.shipper.has_spool() && progress.spool.trouble.is_none());
                if since.0.elapsed() >= ROOM_WAIT[usize::from(may_move)] {
                    return Err(HostError::Detached(progress.retained_bytes as u64));
                }
                let _ =
                    self.shipper.wait_change(progress.version, Instant::now() + Duration::from_millis(100));
            }
        }
        self.release_ring();
        match self.shipper.shortage().filter(|_| !self.noting) {
            Some(why) => Err(HostError::NoRoom(why)),
            None => Ok(()),
        }
    }

    fn ship_position(&mut self, position: u64) {
        self.shipper.note_position(position);
    }

    fn stop(&mut self) -> Result<(), HostError> {
        let Some(stopper) = &mut self.stopper else {
            return Err(HostError::Stop("there is nobody who could be stopped (--everyone)".into()));
        };
        let stopped = stopper.stop(self.limits).map_err(|e| HostError::Stop(e.to_string()))?;
        self.reached = stopped.reached_in;
        self.let_go = None;
        Ok(())
    }

    fn standing(&mut self) -> bool {
        self.stopper.as_mut().is_some_and(|s| s.standing())
    }

    fn go(&mut self) {
        let Some(stopper) = &mut self.stopper else { return };
        match stopper.go() {
            Ok(stood) if stood > Duration::ZERO => {
                if self.stops_us.len() >= STOPS_MAX {
                    self.stops_us.remove(0);
                }
                self.stops_us.push(stood.as_micros() as u64);
            }
            Ok(_) => {}
            Err(e) => self.let_go = Some(e.to_string()),
        }
        self.limits = STOP_LIMITS;
    }
}
