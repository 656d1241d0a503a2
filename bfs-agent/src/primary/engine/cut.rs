//! The checkpoint as a cut: choosing the instant, settling, the marker.
//!
//! A cut at t covers the calls that started at or before t. It counts when
//! 1. every covered call has ended and its record was consumed,
//! 2. no covered call that was still running at t shares anything with a call that started after
//!    t and before its end (capture rule 3.1),
//! 3. whatever had to be read from the file system was read before any call outside the cut
//!    touched it: every call that started before the end of the reading has ended, and none
//!    that touches what was read lies outside.
//!
//! Calls outside the cut are held back until the marker stands. If a condition fails, they are
//! taken in and another t is tried; after [`TRIES`] the processes are stopped.

use std::time::Duration;

use bfs_common::abi::Event;
use bfs_common::record::{CheckpointLabel, GapScope, Record};

use super::Engine;
use super::checkpoint::{AtInstant, CheckpointError, Request, Stop, Taken};
use super::crossing::Crossing;
use super::host::{Host, HostError, InFlight, OwnedEvent, Request as HostRequest};
use super::interpret::{Act, span_of};
use super::recent::CLOCK_SLACK_NS;

/// Cuts that are tried before the processes are stopped.
const TRIES: u32 = 32;
/// Of these, how many clean what is mapped.
const TRIES_MAPPED: u32 = 3;
/// Rounds of reading ahead of the cut, while there is much to read.
const ROUNDS_AHEAD: u32 = 6;
/// How long covered calls may take to end before the checkpoint is given up for now.
const COVERED_NS_MAX: u64 = 5_000_000_000;
/// How long asynchronous operations may take to end before the processes are stopped: unlike calls
/// many of them are in flight at any time, and some never tell their end.
const REQUESTS_NS_MAX: u64 = 30_000_000;
/// How long direct I/O may take to come to rest while the processes run, and in a stop.
const REST_NS_MAX: [u64; 2] = [10_000_000, 2_000_000_000];
/// How long calls that began during the reading may take to end before the cut is tried again.
const READING_NS_MAX: u64 = 20_000_000;
/// How often the writes are parted for a cut at most: when there is too much to read then, they go on, and it
/// is read first.
const PARTINGS: u32 = 4;
/// More than this is read before the instant is chosen.
const AHEAD_BYTES: u64 = 1 << 20;
/// See [`AHEAD_BYTES`]; in things.
const AHEAD_THINGS: usize = 64;
/// What reading a thing costs, in bytes that are read in that time; about.
const THING_BYTES: u64 = 16 << 10;
/// For how long cuts are tried while the processes run, where they may be stopped instead.
const TRYING_NS_MAX: u64 = 3_000_000_000;
/// For how long cuts are tried in vain because of others than the selected processes: each try may read much.
const OTHERS_NS_MAX: u64 = 300_000_000;
/// Calls that are held back at most while a cut is tried.
const DEFERRED_MAX: usize = 200_000;
/// Bytes of their records.
const DEFERRED_BYTES_MAX: usize = 64 << 20;

/// Calls that last longer are looked at: some wait for ever and change nothing.
const IDLE_NS_MIN: u64 = 5_000_000;

/// For how long calls are remembered, to tell which ones overlapped.
pub const RECENT_NS: u64 = 2_000_000_000;

/// Between two looks at the calls that are waited for.
const PAUSE: Duration = Duration::from_micros(10);

enum Tried {
    /// Everything that started at or before this is in the stream, exactly.
    Settled(u64),
    Again,
    /// It comes about only with the processes stopped.
    InStop,
}

/// What became of the calls in flight at an instant.
enum Waited {
    /// They have ended: what they touched.
    Ended(Vec<Crossing>),
    /// Too much had to be held back meanwhile.
    TooMuch,
    /// Asynchronous operations go on.
    Requests,
}

/// How a cut came about.
struct How {
    begun: u64,
    tries: u32,
    at_ns: u64,
    stopped_us: u64,
}

/// The cut did not come about; the reason is for the log.
fn again(why: &'static str) -> Tried {
    tracing::debug!(why, "the cut is tried again");
    Tried::Again
}

/// A pause, after which the calls that have ended are taken out of the list; and, when they are
/// waited for a while, those that cannot have changed anything.
fn wait(host: &mut dyn Host, flying: &mut Vec<InFlight>, waited_ns: u64) -> Result<(), HostError> {
    host.pause(PAUSE);
    host.drop_ended(flying)?;
    if waited_ns > IDLE_NS_MIN {
        flying.retain(|call| !host.is_idle(call));
    }
    Ok(())
}

/// Takes the asynchronous operations out of the list.
fn take_requests(flying: &mut Vec<InFlight>) -> Vec<HostRequest> {
    let requests = flying.iter().filter_map(|f| f.request).collect();
    flying.retain(|f| f.request.is_none());
    requests
}

impl Engine {
    /// Takes a checkpoint. With [`Stop::Hold`] the processes stand when this returns `Ok`, and
    /// the caller must let them go.
    ///
    /// # Errors
    /// [`CheckpointError`]; no marker stands then, and the processes run.
    pub fn checkpoint(&mut self, host: &mut dyn Host, request: &Request) -> Result<Taken, CheckpointError> {
        self.checkpoint_with(host, request, &mut |_, _| Ok(()))
    }

    /// The same; `instant` is called in the stop, when all is settled and the marker is not there yet: what it says
    /// keeps the checkpoint from coming about.
    ///
    /// # Errors
    /// As [`Self::checkpoint`].
    pub fn checkpoint_with(
        &mut self,
        host: &mut dyn Host,
        request: &Request,
        instant: AtInstant<'_>,
    ) -> Result<Taken, CheckpointError> {
        let begun = host.now();
        let taken = match self.prepare(host) {
            Ok(()) => self.place(host, request, begun, instant),
            Err(e) => Err(e),
        };
        host.join_writes();
        // Whatever came of it: what was held back comes next, before anything newer.
        match (taken, self.replay(host)) {
            (Ok(_), Err(e)) => {
                if request.stop == Stop::Hold {
                    host.go();
                }
                Err(e.into())
            }
            (taken, _) => taken,
        }
    }

    /// What takes long comes before the writes are parted, for from then on each costs a record.
    fn prepare(&mut self, host: &mut dyn Host) -> Result<(), CheckpointError> {
        self.tend_foreign(host)?;
        for left in (0..PARTINGS).rev() {
            let keeps_up = self.read_ahead(host)?;
            self.take_runs(host)?;
            if self.is_little() {
                return Ok(());
            }
            if !keeps_up || left == 0 {
                break;
            }
            host.join_writes();
        }
        self.read_ahead(host)?;
        Ok(())
    }

    fn place(
        &mut self,
        host: &mut dyn Host,
        request: &Request,
        begun: u64,
        instant: AtInstant<'_>,
    ) -> Result<Taken, CheckpointError> {
        self.tend_mapped(host)?;
        let must_stop = request.stop != Stop::Never && self.restless;
        let mut tries = 0;
        let since = host.now();
        if request.stop != Stop::Hold && !must_stop {
            while tries < TRIES {
                tries += 1;
                // Stores into pages that are dirty leave no record: they hold still only in a stop.
                if self.mapped.silent() {
                    if tries > 1 && tries <= TRIES_MAPPED || request.stop == Stop::Never {
                        self.tend_mapped(host)?;
                    }
                    if self.mapped.silent() {
                        if request.stop == Stop::Never {
                            continue;
                        }
                        break;
                    }
                }
                match self.try_cut(host)? {
                    Tried::Settled(at_ns) => {
                        let how = How { begun, tries, at_ns, stopped_us: 0 };
                        return self.mark(host, request, &how);
                    }
                    Tried::Again => {
                        self.stats.retries += 1;
                        self.tried_in_vain();
                        self.replay(host)?;
                        if host.now().saturating_sub(begun) > OTHERS_NS_MAX
                            && let Some(error) = self.others_in_the_way(host, tries)
                        {
                            return Err(error);
                        }
                        if request.stop != Stop::Never && host.now().saturating_sub(since) > TRYING_NS_MAX {
                            break;
                        }
                    }
                    Tried::InStop => {
                        self.replay(host)?;
                        break;
                    }
                }
            }
            // They would not stand.
            if let Some(error) = self.others_in_the_way(host, tries) {
                return Err(error);
            }
            if request.stop == Stop::Never {
                return Err(CheckpointError::Unsettled { suspects: self.dirty.len() });
            }
        }
        let stopping = host.now();
        host.stop()?;
        self.standing = true;
        let taken = self.cut_stopped(host, request, (begun, stopping), tries, instant);
        self.standing = false;
        self.begun.go_on();
        if taken.is_err() || request.stop != Stop::Hold {
            host.go();
        }
        taken
    }

    fn cut_stopped(
        &mut self,
        host: &mut dyn Host,
        request: &Request,
        (begun, stopping): (u64, u64),
        tries: u32,
        instant: AtInstant<'_>,
    ) -> Result<Taken, CheckpointError> {
        self.suspect_open(host)?;
        // Calls of processes that are not stopped can still cross the reads.
        for _ in 0..TRIES {
            let tried = self.try_cut(host)?;
            // Whoever runs again changes what is read: the guard is why, not somebody who is not stopped.
            if !host.standing() {
                let why = "they were let go before everything was read".into();
                return Err(HostError::Stop(why).into());
            }
            match tried {
                Tried::Settled(at_ns) => {
                    self.restless = false;
                    let done = instant(host, self.last_checkpoint.next());
                    done.map_err(CheckpointError::Processes)?;
                    let stopped_us = (host.now().saturating_sub(stopping) / 1000).max(1);
                    return self.mark(host, request, &How { begun, tries, at_ns, stopped_us });
                }
                Tried::Again => {
                    self.tried_in_vain();
                    self.replay(host)?;
                }
                Tried::InStop => break,
            }
        }
        if let Some(error) = self.others_in_the_way(host, TRIES) {
            return Err(error);
        }
        Err(CheckpointError::Unsettled { suspects: self.dirty.len() })
    }

    /// Takes in all events that are there, at most about as many as the ring can hold.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn drain(&mut self, host: &mut dyn Host) -> Result<(), HostError> {
        self.take_some(host, DEFERRED_MAX)?;
        self.take_losses(host).map(drop)
    }

    /// Takes in the writes that have no record yet. From now on each has one, until they are
    /// [joined](Host::join_writes) again: so none is on both sides of an instant.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn take_runs(&mut self, host: &mut dyn Host) -> Result<(), HostError> {
        let runs = host.part_writes()?;
        // What came before them stands in the ring: first of all, the creation of their files.
        self.drain(host)?;
        for event in runs {
            self.take_in(&Event::Run { event }, host);
        }
        Ok(())
    }

    /// Takes in up to `max` events; gives how many there were.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn take_some(&mut self, host: &mut dyn Host, max: usize) -> Result<usize, HostError> {
        assert!(self.deferred.is_empty(), "events are taken in in their order");
        let mut event = std::mem::take(&mut self.spare);
        let mut taken = 0;
        while taken < max && self.next_event(host, &mut event)? {
            self.consume(&event, host)?;
            taken += 1;
        }
        self.spare = event;
        Ok(taken)
    }

    /// Makes dirty what the probes say they lost; says whether there was anything.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn take_losses(&mut self, host: &mut dyn Host) -> Result<bool, HostError> {
        let losses = host.losses()?;
        let mut everything = losses.everything;
        let any = everything || !losses.inodes.is_empty();
        for inode in losses.inodes {
            match self.model.find(inode) {
                Some(object) => {
                    self.mapped.lost(object);
                    self.suspect_object(object, host.now());
                    self.dirty.restless(object);
                }
                // An object that the model does not know: its creation may be what was lost.
                None => everything = true,
            }
        }
        if everything {
            self.lost_everything(host.now());
        }
        Ok(any)
    }

    /// While there is much to read, it is read before an instant is chosen, and events go on
    /// being taken in: so little is held back later. `false` if it does not get less: as much is made dirty meanwhile.
    pub(super) fn read_ahead(&mut self, host: &mut dyn Host) -> Result<bool, HostError> {
        let mut before = u64::MAX;
        for _ in 0..ROUNDS_AHEAD {
            self.drain(host)?;
            if self.is_little() {
                return Ok(true);
            }
            let (bytes, things) = self.weight();
            let cost = bytes.saturating_add((things as u64).saturating_mul(THING_BYTES));
            if cost > before / 4 * 3 {
                break;
            }
            before = cost;
            self.settle(host, true)?;
        }
        Ok(false)
    }

    /// How much is dirty: bytes, and things.
    fn weight(&self) -> (u64, usize) {
        let model = &self.model;
        self.dirty.weight(|o| model.get(o).map_or(0, |o| o.size.max(1 << 16)))
    }

    /// Whether what is dirty is read in no time.
    fn is_little(&self) -> bool {
        let (bytes, things) = self.weight();
        bytes < AHEAD_BYTES && things < AHEAD_THINGS
    }

    fn try_cut(&mut self, host: &mut dyn Host) -> Result<Tried, CheckpointError> {
        self.drain(host)?;
        self.is_refused(host)?;
        let t = host.now();
        self.settle_attributes(host)?;
        let crossing = match self.wait_covered(host, t)? {
            Waited::Ended(crossing) => crossing,
            Waited::TooMuch => return Ok(again("much is held back")),
            Waited::Requests => {
                tracing::debug!("asynchronous operations go on: the processes are stopped");
                return Ok(Tried::InStop);
            }
        };
        // A call that started before a covered one ended may still run: its part in the covered
        // one's record is known only when it has ended.
        let last = crossing.iter().map(|c| c.until_ns).max();
        if let Some(last) = last
            && !self.wait_reading(host, last)?
        {
            return Ok(again("a call that a covered one may share with does not end"));
        }
        // What was lost may lie on either side of t, and what it did is found by reading: then
        // calls that are held back are in there too.
        if self.take_losses(host)? {
            return Ok(again("something was lost"));
        }
        if self.others_crossed(t) {
            return Ok(again("others changed something before and after"));
        }
        if self.crosses(host, &crossing) {
            return Ok(again("a covered call shares something with a later one"));
        }
        if !self.wait_rest(host)? {
            tracing::debug!(stopped = self.standing, "direct I/O does not come to rest");
            return Ok(Tried::InStop);
        }
        // Also taking in a covered call can read (the inode of a new directory).
        if !self.dirty.is_empty() || self.reads.any_since(t) {
            self.settle_attributes(host)?;
            self.settle(host, false)?;
            let read_until = host.now();
            if !self.wait_reading(host, read_until)? {
                return Ok(again("a call that began during the reading does not end"));
            }
            self.take_losses(host)?;
            if self.others_crossed(t) {
                return Ok(again("others changed something before and after"));
            }
            self.stain_reads(host);
        }
        Ok(if !self.standing && self.mapped.silent() {
            again("pages of a mapped file became dirty")
        } else if self.dirty.is_empty() {
            Tried::Settled(t)
        } else {
            again("what was read was touched meanwhile")
        })
    }

    /// Waits until the calls that started at or before `t` have ended, takes them in and holds
    /// the others back. Gives what the calls that were running at `t` touched, each with its
    /// end. Asynchronous operations are waited for only while the processes run.
    fn wait_covered(&mut self, host: &mut dyn Host, t: u64) -> Result<Waited, CheckpointError> {
        let mut crossing = Vec::new();
        let mut event = OwnedEvent::default();
        let mut flying = host.in_flight(t)?;
        let resting = if self.standing { take_requests(&mut flying) } else { Vec::new() };
        loop {
            // The ring is drained after the look: a call that is not in flight any more has its
            // record there.
            while self.next_event(host, &mut event)? {
                self.cover(host, &mut event, t, &mut crossing)?;
            }
            let Some(oldest) = flying.iter().min_by_key(|f| f.start_ns) else {
                self.resting |= !resting.is_empty();
                for request in &resting {
                    self.suspect_request(request, host);
                }
                return Ok(Waited::Ended(crossing));
            };
            if self.too_much_deferred() {
                return Ok(Waited::TooMuch);
            }
            let waited = host.now().saturating_sub(t);
            if flying.iter().any(|f| f.request.is_some_and(|r| r.silent || waited > REQUESTS_NS_MAX)) {
                return Ok(Waited::Requests);
            }
            if waited > COVERED_NS_MAX {
                let for_ms = host.now().saturating_sub(oldest.start_ns) / 1_000_000;
                let (tgid, tid, nr) = (oldest.tgid, oldest.tid, oldest.nr);
                self.replay(host)?;
                return Err(CheckpointError::CallInFlight { tgid, tid, nr, for_ms });
            }
            wait(host, &mut flying, waited)?;
        }
    }

    fn cover(
        &mut self,
        host: &mut dyn Host,
        event: &mut OwnedEvent,
        t: u64,
        crossing: &mut Vec<Crossing>,
    ) -> Result<(), HostError> {
        let Some(parsed) = Event::parse(&event.bytes) else { return self.consume(event, host) };
        let span = span_of(&parsed);
        if span.start_ns > t {
            self.defer(std::mem::take(event));
            return Ok(());
        }
        // It can stand for changes on both sides.
        self.crosses_foreign(&parsed);
        let until_ns = span.seen_ns + CLOCK_SLACK_NS;
        if until_ns > t {
            let (act, way) = self.interpret_surely(&parsed, host, span);
            let mut touches = self.cut_touches(&act, &way);
            self.consume(event, host)?;
            // What it says of the file that it made, which is known only now, was seen at its end: a later call may have
            // been there by then.
            if matches!(act, Act::Create { .. }) {
                touches = self.cut_touches(&act, &way);
            }
            let tid = (!matches!(parsed, Event::Run { .. })).then_some(span.tid);
            crossing.push(Crossing { tid, touches, until_ns });
            return Ok(());
        }
        self.consume(event, host)
    }

    /// Waits until direct I/O that goes on in files that are to be read comes to rest.
    fn wait_rest(&mut self, host: &mut dyn Host) -> Result<bool, HostError> {
        let since = host.now();
        for object in self.dirty.all_restless() {
            let Some(inode) = self.model.get(object).map(|o| o.inode) else { continue };
            while !host.is_at_rest(inode)? {
                if host.now().saturating_sub(since) > REST_NS_MAX[usize::from(self.standing)] {
                    return Ok(false);
                }
                host.pause(PAUSE);
            }
        }
        Ok(true)
    }

    /// Waits until the calls that started while we read have ended, and holds them back.
    fn wait_reading(&mut self, host: &mut dyn Host, read_until: u64) -> Result<bool, HostError> {
        let mut flying = host.in_flight(read_until)?;
        if self.standing {
            take_requests(&mut flying);
        }
        loop {
            let mut event = OwnedEvent::default();
            while self.next_event(host, &mut event)? {
                self.defer(std::mem::take(&mut event));
            }
            if flying.is_empty() {
                return Ok(true);
            }
            let waited = host.now().saturating_sub(read_until);
            if waited > READING_NS_MAX || self.too_much_deferred() {
                return Ok(false);
            }
            wait(host, &mut flying, waited)?;
        }
    }

    fn defer(&mut self, event: OwnedEvent) {
        self.deferred_bytes += event.bytes.len();
        self.deferred.push_back(event);
    }

    fn too_much_deferred(&self) -> bool {
        self.deferred.len() > DEFERRED_MAX || self.deferred_bytes > DEFERRED_BYTES_MAX
    }

    /// Takes in what was held back.
    fn replay(&mut self, host: &mut dyn Host) -> Result<(), HostError> {
        self.deferred_bytes = 0;
        let mut deferred = std::mem::take(&mut self.deferred);
        while let Some(event) = deferred.pop_front() {
            if let Err(e) = self.consume(&event, host) {
                self.deferred = deferred;
                return Err(e);
            }
        }
        Ok(())
    }

    /// The marker. Everything covered is in the stream, nothing else is.
    fn mark(&mut self, host: &mut dyn Host, request: &Request, how: &How) -> Result<Taken, CheckpointError> {
        self.reconcile();
        self.forget_orphans();
        self.send_snapshots();
        self.snapshots.clear();
        self.reads.clear();
        self.named.clear();
        self.prune(how.begun.saturating_sub(RECENT_NS));
        self.dirty.settled();
        if self.dirty.close_gap() {
            self.out.push(&Record::Repaired { scope: GapScope::Everything }, b"");
        }
        let checkpoint = self.last_checkpoint.next();
        let label = CheckpointLabel {
            wall_ns: request.wall_ns,
            tag: request.tag.clone(),
            trigger: request.trigger.into(),
            stopped_us: how.stopped_us,
        };
        let sequence = self.out.push(&Record::Checkpoint { checkpoint, label }, b"");
        self.last_checkpoint = checkpoint;
        (self.model.same, self.ask) = (None, None);
        self.owed.clear();
        self.model.bound();
        if std::mem::take(&mut self.resting) {
            // They were read half way: when they end, what they touch is read again.
            self.suspect_events_before(host.now());
        }
        self.out.close(self.position);
        match self.hand_over(host) {
            // The marker was taken; what comes next hears of it again.
            Ok(()) | Err(HostError::NoRoom(_)) => {}
            Err(e) => return Err(e.into()),
        }
        self.let_go_of_unmapped(sequence, host);
        self.forget_multiple(sequence, host);
        self.suspect_unfollowed(host.now());
        Ok(Taken {
            checkpoint,
            sequence,
            at_ns: how.at_ns,
            stopped: how.stopped_us > 0,
            tries: how.tries,
            took: Duration::from_nanos(host.now().saturating_sub(how.begun)),
            ops: self.stats.ops,
            written_bytes: self.stats.written_bytes,
        })
    }

    /// Lengths as last seen: appends and truncations of others show here.
    fn reconcile(&mut self) {
        let mut sizes: Vec<_> = self.snapshots.iter().map(|(o, s)| (*o, s.size)).collect();
        sizes.sort_unstable();
        for (object, size) in sizes {
            let regular = |o: &super::model::Object| o.kind == bfs_common::record::FileKind::Regular;
            if self.model.get(object).is_some_and(|o| regular(o) && o.size != size) {
                self.model.truncate(object, size, &mut self.out);
            }
        }
    }
}
