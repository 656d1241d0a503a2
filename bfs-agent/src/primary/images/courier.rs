//! Brings the images of checkpoints to a destination: on a thread and a connection of its own, beside the program and the
//! stream. It has one set in hand and one that waits: where they come faster than they go, those in between are skipped,
//! and counted.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bfs_common::record::{CheckpointId, Epoch};
use bfs_common::wire::{Frame, PROCESS_BLOCK, PROCESS_PIECE, Refusal, process_file_is_valid};
use bytes::Bytes;

use super::couriers::To;
use super::{PRINTED, whole};
use crate::net::{AskError, ConnectError, Connection};
use crate::primary::ship::{Limit, Sends};

/// How long an answer may take: the first comes when the checkpoint is confirmed, the last after a sync.
const ANSWER: Duration = Duration::from_secs(60);
/// Until it is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// Bytes of a file that are looked at together.
const CHUNK: usize = 4 << 20;

/// What came of it so far.
#[derive(Clone, Debug, Default)]
pub struct Shipped {
    /// The last checkpoint whose images the destination has.
    pub last: Option<CheckpointId>,
    /// How many it has got.
    pub sent: u64,
    /// Checkpoints whose images it has not got.
    pub skipped: u64,
    /// Bytes of the last set that had to be sent.
    pub bytes: u64,
    /// How long that took.
    pub took: Duration,
    /// Why the last try failed; none when it did not.
    pub failure: Option<String>,
}

/// What a destination knows us by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// It gets the stream, of this epoch.
    Epoch(Epoch),
    /// It gets whole checkpoints: they are known by when they were made.
    Moment,
}

#[derive(Debug)]
struct Job {
    checkpoint: CheckpointId,
    folder: PathBuf,
    /// When the checkpoint was made, nanoseconds since 1970.
    made_ns: i64,
}

#[derive(Debug, Default)]
struct State {
    next: Option<Job>,
    /// What is being brought.
    hand: Option<CheckpointId>,
    ended: bool,
    /// Nothing is begun.
    paused: bool,
    shipped: Shipped,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the module.
#[derive(Debug)]
pub struct Courier(Arc<Shared>);

/// Why a set did not arrive.
#[derive(Debug, thiserror::Error)]
enum CourierError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error("the replayer did not answer within {} s", ANSWER.as_secs())]
    Silent,
    #[error("the images cannot be read: {0}")]
    Read(#[from] io::Error),
}

impl CourierError {
    /// Whether the same may go better another time.
    fn may_pass(&self) -> bool {
        !matches!(self, Self::Read(_) | Self::Ask(AskError::Refused(Refusal::Bad(_))))
    }
}

impl Courier {
    /// Starts one to a destination, with a number that no other one has. What else goes there goes first.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn start(to: To, group: &str, number: u32) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let shared = Arc::new(Shared::default());
        let (works, group) = (Arc::clone(&shared), group.to_owned());
        std::thread::Builder::new().name("process images".into()).spawn(move || {
            while let Some(job) = take(&works) {
                let since = Instant::now();
                let whole = whole::name(number);
                let brought = runtime.block_on(bring(&to, &group, &whole, &job));
                if let Err(e) = whole::forget(&job.folder, &whole) {
                    tracing::warn!("cannot remove images in {}: {e}", job.folder.display());
                }
                let mut state = works.state();
                state.hand = None;
                match brought {
                    Ok(bytes) => {
                        let Shipped { sent, skipped, .. } = state.shipped;
                        let last = Some(job.checkpoint);
                        let took = since.elapsed();
                        state.shipped = Shipped { last, sent: sent + 1, skipped, bytes, took, failure: None };
                        continue;
                    }
                    Err(error) => {
                        state.shipped.failure = Some(format!("checkpoint {}: {error}", job.checkpoint));
                        if !error.may_pass() || state.next.is_some() {
                            state.shipped.skipped += 1;
                            continue;
                        }
                        state.next = Some(job);
                    }
                }
                // A newer one takes its place meanwhile.
                if !state.ended {
                    let _ = works.changed.wait_timeout(state, AGAIN);
                }
            }
        })?;
        Ok(Self(shared))
    }

    /// These are to be brought, as soon as their checkpoint is confirmed.
    pub fn bring(&self, checkpoint: CheckpointId, folder: PathBuf, made_ns: i64) {
        let mut state = self.0.state();
        if state.next.replace(Job { checkpoint, folder, made_ns }).is_some() {
            state.shipped.skipped += 1;
        }
        self.0.changed.notify_all();
    }

    /// Nothing more is begun, or it goes on.
    pub fn pause(&self, pause: bool) {
        self.0.state().paused = pause;
        self.0.changed.notify_all();
    }

    /// The set that is being brought: it has to stay where it is.
    #[must_use]
    pub fn hand(&self) -> Option<CheckpointId> {
        self.0.state().hand
    }

    /// What came of it so far.
    #[must_use]
    pub fn shipped(&self) -> Shipped {
        self.0.state().shipped.clone()
    }
}

impl Drop for Courier {
    fn drop(&mut self) {
        // What is under way ends by itself: its files go, or the process does.
        let mut state = self.0.state();
        (state.ended, state.next) = (true, None);
        self.0.changed.notify_all();
    }
}

/// The next one, or none at the end.
fn take(shared: &Shared) -> Option<Job> {
    let mut state = shared.state();
    loop {
        if state.ended {
            return None;
        }
        if !state.paused
            && let Some(job) = state.next.take()
        {
            state.hand = Some(job.checkpoint);
            return Some(job);
        }
        state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
}

/// The files of a set, by name, as they stand alone in the folder `whole`; what CRIU tells people is not one of them.
fn files(folder: &Path, whole: &str) -> io::Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if name == PRINTED || name.ends_with(".log") || !entry.file_type()?.is_file() {
            continue;
        }
        if !process_file_is_valid(&name) {
            return Err(io::Error::other(format!("a file is called {name:?}")));
        }
        let path = whole::image(folder, whole, &name);
        found.push((name, path));
    }
    found.sort();
    Ok(found)
}

/// Sends a set; gives the bytes that had to be sent.
async fn bring(to: &To, group: &str, whole: &str, job: &Job) -> Result<u64, CourierError> {
    let (limit, by) = (to.limit.as_deref(), to.by);
    let mut to = (to.connect)().await?;
    let (epoch, made_ns) = match by {
        By::Epoch(epoch) => (epoch, None),
        By::Moment => (Epoch(0), Some(job.made_ns)),
    };
    let begin = Frame::PutProcess { group: group.into(), epoch, checkpoint: job.checkpoint, made_ns };
    match ask(&mut to, &begin, &[]).await?.0 {
        Frame::ProcessBegun => {}
        Frame::ProcessKept => return Ok(0),
        _ => return Err(AskError::Unexpected.into()),
    }
    whole::make(&job.folder, whole)?;
    let mut sent = 0;
    let mut chunk = vec![0; CHUNK];
    for (name, path) in files(&job.folder, whole)? {
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        let mut left = size;
        loop {
            let length = left.min(CHUNK as u64) as usize;
            file.read_exact(&mut chunk[..length])?;
            left -= length as u64;
            sent += bring_chunk(&mut to, limit, &name, size, &chunk[..length]).await?;
            if left == 0 {
                break;
            }
        }
    }
    match ask(&mut to, &Frame::ProcessEnd, &[]).await?.0 {
        Frame::ProcessKept => Ok(sent),
        _ => Err(AskError::Unexpected.into()),
    }
}

async fn bring_chunk(
    to: &mut Connection,
    limit: Option<&Limit>,
    name: &str,
    size: u64,
    chunk: &[u8],
) -> Result<u64, CourierError> {
    let blocks = || chunk.chunks(PROCESS_BLOCK);
    let digests: Vec<u8> = blocks().flat_map(|block| *blake3::hash(block).as_bytes()).collect();
    let (answer, bits) = ask(to, &Frame::ProcessBlocks { file: name.into(), size }, &digests).await?;
    if answer != Frame::ProcessWanted || bits.len() != blocks().len().div_ceil(8) {
        return Err(AskError::Unexpected.into());
    }
    let is_wanted = |index: usize| bits[index / 8] & (1 << (index % 8)) != 0;
    let mut wanted: VecDeque<&[u8]> =
        blocks().enumerate().filter(|(index, _)| is_wanted(*index)).map(|(_, block)| block).collect();
    let mut sent = 0;
    let piece_max = limit.map_or(PROCESS_PIECE, Limit::piece_max).min(PROCESS_PIECE);
    while !wanted.is_empty() {
        if let Some(limit) = limit {
            limit.turn(Sends::Images).await;
        }
        let some = wanted.drain(..wanted.len().min(piece_max / PROCESS_BLOCK));
        let piece = some.collect::<Vec<_>>().concat();
        sent += piece.len() as u64;
        let put = to.writer.send(&Frame::ProcessBytes, &piece);
        tokio::time::timeout(ANSWER, put).await.map_err(|_| CourierError::Silent)?.map_err(AskError::from)?;
        if let Some(limit) = limit {
            limit.sent(Sends::Images, piece.len());
        }
    }
    Ok(sent)
}

async fn ask(to: &mut Connection, frame: &Frame, body: &[u8]) -> Result<(Frame, Bytes), CourierError> {
    let talk = async {
        to.writer.send(frame, body).await.map_err(AskError::from)?;
        to.answer().await
    };
    Ok(tokio::time::timeout(ANSWER, talk).await.map_err(|_| CourierError::Silent)??)
}
