//! One connection at a time, and what happens between two: the shipper's thread.
//!
//! Reading and writing are two futures that run side by side, so that a writer that waits for a
//! slow peer never keeps acknowledgements from being read. Neither is cancelled in the middle of
//! a frame: both end only with the connection.

use std::sync::Arc;
use std::time::Duration;

use bfs_common::record::Sequence;
use bfs_common::wire::{Frame, Position, Refusal, pack};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{Batch, Next, Sends, Shared, ShipError, ShipOptions, Welcome};
use crate::net::{ConnectError, Connection, FrameError, FrameReader, FrameWriter};
use crate::primary::spool::Reader;

/// Between two pings.
const PING_EVERY: Duration = Duration::from_secs(1);
/// A peer that was silent for so long is dead. Pings make a living one speak.
const DEAD_AFTER: Duration = Duration::from_millis(4500);
/// For the answer to Hello.
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// About how much is read from the spool at once.
const SPOOLED_BYTES: usize = 1 << 20;
const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// How the user wants the stream to travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sending {
    /// Most bytes a second.
    #[serde(default)]
    pub rate_limit: Option<u64>,
    /// Packed, where the replayer understands that.
    #[serde(default)]
    pub compress: bool,
}

/// Runs until the shipper is dropped or refused for good.
pub(super) async fn run(shared: Arc<Shared>, options: ShipOptions) {
    let mut backoff = BACKOFF_MIN;
    let mut offers = options.sending.compress;
    loop {
        let served = tokio::select! {
            connected = connect(&shared, &options, offers) => connected,
            () = shared.until_ended() => return,
        };
        let served = match served {
            Ok((connection, welcome)) => {
                backoff = BACKOFF_MIN;
                // The next connection may be to a newer replayer.
                offers = options.sending.compress;
                match shared.welcomed(&welcome) {
                    Ok(()) => serve(&shared, connection, welcome.lz4).await,
                    Err(refusal) => Err(ShipError::Refused(refusal)),
                }
            }
            Err(ShipError::Refused(Refusal::Bad(why))) if offers => {
                // An older replayer does not know the offer; if that was not the reason, it will say so again.
                tracing::info!("without compression: {why}");
                offers = false;
                continue;
            }
            Err(error) => Err(error),
        };
        match served {
            Ok(()) => return,
            Err(error) => {
                let fatal = is_fatal(&error, shared.was_welcome());
                shared.disconnected(error, fatal);
                if fatal {
                    return;
                }
            }
        }
        let pause = jittered(backoff);
        backoff = (backoff * 2).min(BACKOFF_MAX);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shared.until_ended() => return,
        }
    }
}

/// Whether trying again is of no use. Before the first welcome the user is waiting and is told
/// everything at once.
fn is_fatal(error: &ShipError, was_welcome: bool) -> bool {
    let refusal = match error {
        ShipError::Refused(refusal) | ShipError::Connect(ConnectError::Refused { refusal, .. }) => refusal,
        _ => return !was_welcome,
    };
    // The replayer may still hold our own broken connection for a moment; a full disk may get
    // room again; who takes a right away can give it back.
    !was_welcome
        || !matches!(
            refusal,
            Refusal::Busy { .. }
                | Refusal::Store(_)
                | Refusal::Full(_)
                | Refusal::Behind(_)
                | Refusal::NotAllowed { .. }
                | Refusal::KeyChanged
        )
}

/// Half to all of it, so that several agents do not come back in step. The clock's nanoseconds
/// are random enough for that.
fn jittered(pause: Duration) -> Duration {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let share = now.subsec_nanos() % 1000;
    pause / 2 + pause / 2 * share / 1000
}

async fn connect(
    shared: &Shared,
    options: &ShipOptions,
    offers: bool,
) -> Result<(Connection, Welcome), ShipError> {
    let mut connection = (options.connect)().await?;
    let held = shared.held_epoch();
    let hello = Frame::Hello {
        group: options.group.clone(),
        group_id: options.group_id,
        boot_id: options.boot_id,
        epoch: held.or(options.epoch),
        take_over: held.is_none() && options.take_over,
        maps: options.maps.clone(),
        lz4: offers,
    };
    connection.writer.send(&hello, b"").await?;
    let deadline = Instant::now() + HELLO_LIMIT;
    loop {
        let next = tokio::time::timeout_at(deadline, connection.reader.next());
        let frame = next.await.map_err(|_| ShipError::Silent(HELLO_LIMIT.as_secs()))??;
        match frame.ok_or(ShipError::Closed)?.0 {
            Frame::Welcome {
                epoch,
                position,
                confirmed,
                applied,
                highest_object,
                gaps,
                roots,
                boot_id,
                adopt,
                lz4,
            } => {
                let welcome = Welcome {
                    epoch,
                    position,
                    confirmed,
                    applied,
                    highest_object,
                    gaps,
                    roots,
                    boot_id,
                    adopt,
                    lz4: lz4 && offers,
                };
                return Ok((connection, welcome));
            }
            Frame::Refused(refusal) => return Err(ShipError::Refused(refusal)),
            Frame::Ping(number) => connection.writer.send(&Frame::Pong(number), b"").await?,
            _ => return Err(ShipError::Unexpected),
        }
    }
}

/// Until the shipper ends (`Ok`) or the connection does.
async fn serve(shared: &Shared, connection: Connection, lz4: bool) -> Result<(), ShipError> {
    let Connection { mut reader, mut writer, .. } = connection;
    tokio::select! {
        error = read(shared, &mut reader) => Err(error),
        error = write(shared, &mut writer, lz4) => Err(error),
        () = shared.until_ended() => Ok(()),
    }
}

async fn read(shared: &Shared, reader: &mut FrameReader) -> ShipError {
    loop {
        let frame = match tokio::time::timeout(DEAD_AFTER, reader.next()).await {
            Err(_) => return ShipError::Silent(DEAD_AFTER.as_secs()),
            Ok(Err(error)) => return error.into(),
            Ok(Ok(None)) => return ShipError::Closed,
            Ok(Ok(Some((frame, _)))) => frame,
        };
        match frame {
            Frame::Ack { position, confirmed, applied, state } => {
                shared.store_is(state);
                if let Err(refusal) = shared.acknowledged(position, confirmed, applied) {
                    return ShipError::Refused(refusal);
                }
            }
            Frame::Pong(number) => shared.ponged(number),
            Frame::Ping(number) => shared.answer(Frame::Pong(number)),
            Frame::Catalog { objects, last } => shared.catalog_part(objects, last),
            Frame::Refused(refusal) => return ShipError::Refused(refusal),
            _ => return ShipError::Unexpected,
        }
    }
}

/// Heartbeats and answers.
async fn speak(shared: &Shared, writer: &mut FrameWriter, ping_at: &mut Instant) -> Result<(), FrameError> {
    if Instant::now() >= *ping_at {
        *ping_at = Instant::now() + PING_EVERY;
        writer.send(&Frame::Ping(shared.pinging()), b"").await?;
    }
    while let Some(frame) = shared.next_answer() {
        writer.send(&frame, b"").await?;
        shared.answered(&frame);
    }
    Ok(())
}

async fn write(shared: &Shared, writer: &mut FrameWriter, lz4: bool) -> ShipError {
    let mut ping_at = Instant::now();
    let mut spool = None;
    loop {
        if let Err(error) = speak(shared, writer, &mut ping_at).await {
            return error.into();
        }
        if let Some(limit) = &shared.limit
            && shared.has_to_send()
            && let Err(at) = limit.may(Sends::Records)
        {
            // Heartbeats and answers go on.
            let _ = tokio::time::timeout_at(ping_at.min(at.into()), shared.wake.notified()).await;
            continue;
        }
        let batch = match shared.next_to_send() {
            Next::Batch(batch) => batch,
            Next::Spooled { after, claimed, to } => {
                let reading = from_spool(shared, &mut spool, after, claimed, to);
                tokio::pin!(reading);
                let read = loop {
                    // Where it was is far behind, or the disk slow: that takes time, and the peer must hear of us.
                    tokio::select! {
                        read = &mut reading => break read,
                        _ = tokio::time::timeout_at(ping_at, shared.wake.notified()) => {
                            if let Err(error) = speak(shared, writer, &mut ping_at).await {
                                return error.into();
                            }
                        }
                    }
                };
                match read {
                    Ok(batch) => batch,
                    Err(error) => return error,
                }
            }
            Next::Nothing => {
                // A notification that came since is kept, so nothing is missed.
                let _ = tokio::time::timeout_at(ping_at, shared.wake.notified()).await;
                continue;
            }
        };
        let (first, count) = (batch.first, batch.count);
        let packed = if lz4 { pack(&batch.bytes) } else { None };
        let plain_len = u32::try_from(batch.bytes.len()).unwrap_or(u32::MAX);
        let (frame, body) = match &packed {
            Some(body) => (Frame::Packed { first, count, plain_len }, &body[..]),
            None => (Frame::Records { first, count }, &batch.bytes[..]),
        };
        if let Err(error) = writer.send(&frame, body).await {
            return error.into();
        }
        shared.sent(&batch, body.len());
        if let Some(limit) = &shared.limit {
            limit.sent(Sends::Records, body.len());
        }
    }
}

/// The next batch out of the spool; it counts as sent. Reading may wait for the disk, so another thread does
/// it.
async fn from_spool(
    shared: &Shared,
    spool: &mut Option<Reader>,
    after: Sequence,
    claimed: Option<Position>,
    to: Sequence,
) -> Result<Batch, ShipError> {
    let Some((dir, group)) = shared.spool.clone() else { return Err(ShipError::Unexpected) };
    let (durable, bytes_max) = (shared.durable(), shared.piece_max().min(SPOOLED_BYTES));
    let reader = spool.take().filter(|reader| reader.at().0 == after && claimed.is_none());
    let read = tokio::task::spawn_blocking(move || -> Result<_, ShipError> {
        let mut reader = match reader {
            Some(reader) => reader,
            None => Reader::open(&dir, group, after, durable)?,
        };
        if claimed.is_some_and(|claimed| (claimed.sequence, claimed.chain) != reader.at()) {
            return Err(Refusal::Fork { at: after }.into());
        }
        let batch = reader.read(to, bytes_max)?;
        Ok((reader, batch))
    });
    let (reader, batch) = read.await.map_err(|e| ShipError::Start(std::io::Error::other(e)))??;
    shared.sent_spooled(&batch, claimed.map(|_| reader.passed()));
    *spool = Some(reader);
    Ok(batch)
}
