//! The thread that moves what waits in memory into the spool, and removes from there what was sent.
//!
//! It takes everything while the destination is away or stands still, and what is beyond a window while that
//! is slow, or kept slow by the user's limit. While much of the spool is to be sent, new records go there too, so that they are durable soon.
//! When it fails (its bounds, a full disk) that is said in the status and tried again: until then memory is
//! all there is, with its own bound.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use bfs_common::record::Sequence;
use bfs_common::wire::Position;

use super::{Batch, Shared, State};
use crate::log::writer;
use crate::primary::spool::{Spool, SpoolError};

/// Bytes that wait in memory for a destination that is there but slow.
const WINDOW: usize = 64 << 20;
/// Bytes that are written and synced at once.
const AT_ONCE: usize = 16 << 20;
/// As long as so much of the spool is to be sent, new records go there too.
const MUCH_LEFT: u64 = 16 << 20;
/// A destination from which nothing was heard for so long, though records wait, stands still.
const STANDS_STILL: Duration = Duration::from_secs(2);
/// Between two looks at the clock.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Between two tries after a failure.
const AGAIN_AFTER: Duration = Duration::from_secs(1);

/// How the spool stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpoolProgress {
    /// Records that only the spool has.
    pub records: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What its segments need on the disk.
    pub disk_bytes: u64,
    /// Age of the oldest segment.
    pub oldest: Option<Duration>,
    /// Why it takes nothing now.
    pub trouble: Option<String>,
    /// It has come to one of its bounds.
    pub is_full: bool,
    /// How long sending what is in it will take, while it is being sent.
    pub left: Option<Duration>,
}

/// A spool that takes nothing is short of room when so much waits in memory; less for a small one.
const SHORT: usize = 32 << 20;
/// The same without a spool.
const SHORT_ALONE: usize = 192 << 20;

/// Why nothing but notes of what was touched should be handed over, as long as the destination is away, or the user's limit
/// makes it as good as that.
pub(super) fn shortage(state: &State, spool_bytes_max: Option<u64>) -> Option<String> {
    let progress = &state.progress;
    let waits = state.queue.bytes();
    if progress.connected && !progress.held_back {
        return None;
    }
    match (spool_bytes_max, &progress.spool.trouble) {
        (Some(bytes_max), Some(trouble)) => {
            let short = usize::try_from(bytes_max / 16).unwrap_or(SHORT).min(SHORT);
            (waits > short || progress.spool.is_full).then(|| trouble.clone())
        }
        (Some(_), None) => None,
        (None, _) => (waits > SHORT_ALONE).then(|| format!("{} MiB wait in memory", waits >> 20)),
    }
}

enum Job {
    Clear,
    Remove(Sequence),
    Append(Position, Vec<Batch>, bool),
    End,
}

/// How fast the spool gets shorter.
#[derive(Debug)]
struct Pace {
    since: Instant,
    bytes: u64,
}

/// Runs until the shipper ends; gives the spool back.
pub(super) fn run(shared: &Arc<Shared>, mut spool: Spool) -> Spool {
    let mut again_at = Instant::now();
    let mut noted = false;
    let mut pace = Pace { since: Instant::now(), bytes: 0 };
    loop {
        let job = next(shared, &spool, again_at, noted, &mut pace);
        noted = matches!(job, Job::Append(.., true));
        let appends = matches!(job, Job::Append(..));
        let done = match job {
            Job::End => return spool,
            Job::Clear => spool.clear(),
            Job::Remove(up_to) => spool.acknowledged(up_to),
            Job::Append(before, batches, notes) => append(shared, &mut spool, before, &batches, notes),
        };
        if done.is_err() {
            again_at = Instant::now() + AGAIN_AFTER;
        }
        let disk_bytes = spool.bytes();
        shared.change(|state| {
            // Room that was made helps only those who append next.
            let heals = appends || state.progress.connected;
            let told = &mut state.progress.spool;
            told.disk_bytes = disk_bytes;
            if done.is_ok() && !heals {
                return;
            }
            told.is_full = matches!(done, Err(SpoolError::Full(_) | SpoolError::Old(_)));
            told.trouble = done.err().map(|error| error.to_string());
        });
    }
}

fn append(
    shared: &Shared,
    spool: &mut Spool,
    mut before: Position,
    batches: &[Batch],
    notes: bool,
) -> Result<(), SpoolError> {
    let position = |batch: &Batch| shared.lock().queue.position(batch.last(), batch.chain_after);
    let mut lines = Vec::with_capacity(batches.len());
    for batch in batches {
        let after = position(batch);
        lines.push(writer::Batch { bytes: batch.bytes.clone(), before, after });
        before = after;
    }
    spool.append(lines.first().map_or(before, |line| line.before), &lines, notes)?;
    shared.change(|state| state.queue.spooled(batches));
    shared.wake.notify_one();
    Ok(())
}

/// Waits for something to do.
fn next(shared: &Shared, spool: &Spool, again_at: Instant, noted: bool, pace: &mut Pace) -> Job {
    let mut state = shared.lock();
    loop {
        let now = Instant::now();
        look(&mut state, spool, pace, now);
        // What is only noted has room that was not there before.
        let may = now >= again_at || state.notes != noted;
        if may && state.queue.in_spool().0 == 0 && !spool.is_empty() {
            return Job::Clear;
        }
        let durable = state.queue.durable().sequence;
        if may && spool.has_done(durable) {
            return Job::Remove(durable);
        }
        if *shared.ended.borrow() {
            return Job::End;
        }
        if may
            && wants(shared, &state, now)
            && let Some((before, batches)) = state.queue.to_spool(AT_ONCE)
        {
            return Job::Append(before, batches, state.notes);
        }
        let wait = shared.keeper.wait_timeout(state, LOOK_EVERY);
        state = wait.unwrap_or_else(PoisonError::into_inner).0;
    }
}

/// Whether memory goes into the spool.
fn wants(shared: &Shared, state: &State, now: Instant) -> bool {
    let progress = &state.progress;
    state.queue.bytes() > 0
        && (!progress.connected
            || state.seal
            || state.queue.bytes() > WINDOW
            || state.queue.in_spool().1 > MUCH_LEFT
            || shared.holds_back(&state.queue)
            || now.duration_since(state.moved) > STANDS_STILL)
}

/// Age and pace, for the status.
fn look(state: &mut State, spool: &Spool, pace: &mut Pace, now: Instant) {
    let (records, bytes) = state.queue.in_spool();
    let connected = state.progress.connected;
    let told = &mut state.progress.spool;
    told.oldest = spool.oldest().filter(|_| records > 0).and_then(|at| at.elapsed().ok());
    let passed = now.duration_since(pace.since);
    if passed >= Duration::from_secs(1) {
        let sent = pace.bytes.saturating_sub(bytes);
        told.left = (connected && sent > 0)
            .then(|| Duration::from_secs_f64(passed.as_secs_f64() * bytes as f64 / sent as f64));
        *pace = Pace { since: now, bytes };
    }
    if records == 0 {
        told.left = None;
    }
}
