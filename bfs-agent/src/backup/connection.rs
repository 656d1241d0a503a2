//! One connection of a known peer.
//!
//! Frames are answered in order; a second task writes, fed by a bounded queue. Catalogue and
//! manifest are made under the lock of the tree and wait for that queue, so the writing task gives
//! a peer [`WRITE_MAX`] to read a frame; then it ends, the queue with it, and so the connection: a
//! peer that stands still holds up the applier no longer than that. A refusal is the last frame:
//! afterwards what the peer still sends is read and dropped for a while, because closing a socket
//! with unread bytes would tear the refusal away from it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bfs_common::past::{Look, Seen};
use bfs_common::record::{CheckpointId, Epoch};
use bfs_common::wire::{Frame, Refusal, unpack};
use bytes::Bytes;
use tokio::sync::{Notify, mpsc};
use tokio::task::AbortHandle;

mod heart;
mod process;
mod writing;

use super::access::{Entered, Need, need};
use super::error::BackupError;
use super::generations;
use super::group::{Group, Leave, Pulse};
use super::past::{Loaded, Past};
use super::serve::Shared;
use super::transfer::Receiver;
use super::{digests, history, look, newest, places, read, transfer};
use crate::keys::peers::Right;
use crate::net::{Connection, FrameError, FrameReader, FrameWriter};
use heart::Heart;

/// Frames that wait to be written.
const QUEUE: usize = 32;
/// How long a peer may take to read a frame.
const WRITE_MAX: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 30 });
/// Lines in a frame about generations: tags are short, and a path has less than 4 KiB.
const LINES_AT_ONCE: usize = 256;
/// Files that are named as damaged in one frame.
const DAMAGE_AT_ONCE: usize = 65_536;
/// Bytes of text in a refusal: it may quote what the peer sent.
const TEXT_MAX: usize = 4096;
/// How long a refused peer may take to read that.
const LINGER: Duration = Duration::from_secs(5);

struct Writing {
    group: Arc<Group>,
    epoch: Epoch,
    /// Its records may come packed.
    lz4: bool,
    fenced: Arc<Notify>,
    pulse: Arc<Pulse>,
    acks: AbortHandle,
}

/// A generation that is held until this is dropped.
struct Held {
    group: Arc<Group>,
    at: CheckpointId,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.group.release(self.at);
    }
}

struct Session {
    shared: Arc<Shared>,
    number: u64,
    /// What the peer's key may do; on one host it may do everything.
    entered: Option<Arc<Entered>>,
    out: mpsc::Sender<(Frame, Bytes)>,
    /// Set by the acknowledging task when the log takes nothing any more.
    broken: Arc<Notify>,
    writing: Option<Writing>,
    readers: Vec<AbortHandle>,
    /// Generations that the peer reads.
    held: Vec<Held>,
    /// What is known of the one that it looked into last.
    looked: Option<(Arc<Group>, Loaded)>,
    /// A stream of another store that it sends.
    receiver: Option<Receiver>,
    /// Images of processes that it sends.
    putting: Option<process::Putting>,
    heart: Heart,
    /// How the agent left, where its connection does not say it all.
    left: Option<Leave>,
}

/// Serves a connection until it ends.
pub async fn serve(shared: Arc<Shared>, connection: Connection) {
    let Connection { mut reader, mut writer, peer, key } = connection;
    let number = shared.number_connection();
    let entered = match (key, &shared.access) {
        (None, _) => Ok(None),
        (Some(key), Some(access)) => access.enter(number, key).map(Arc::new).map(Some),
        (Some(_), None) => Err(Refusal::Bad("a key where none is looked at".into())),
    };
    let entered = match entered {
        Ok(entered) => entered,
        Err(refusal) => {
            tracing::warn!("{peer}: {refusal}");
            // The peer may be gone already.
            let refusal = Frame::Refused(refusal);
            let _ = tokio::time::timeout(LINGER, writer.send(&refusal, b"")).await;
            let _ = tokio::time::timeout(LINGER, reader.drain()).await;
            return;
        }
    };
    let (out, to_write) = mpsc::channel::<(Frame, Bytes)>(QUEUE);
    let key_changed = changed(entered.as_deref());
    let writing = tokio::spawn(write(writer, to_write, changed(entered.as_deref())));
    let mut session = Session {
        shared,
        number,
        entered,
        out,
        broken: Arc::new(Notify::new()),
        writing: None,
        readers: Vec::new(),
        held: Vec::new(),
        looked: None,
        receiver: None,
        putting: None,
        heart: Heart::new(Instant::now()),
        left: None,
    };
    let end = tokio::select! {
        biased;
        () = key_changed => Err(Refusal::KeyChanged),
        end = session.run(&mut reader) => end,
    };
    let left = session.left.take();
    session.release(match &end {
        Ok(()) => left.unwrap_or_else(|| Leave::Lost("its connection ended".into())),
        Err(refusal) => Leave::Lost(refusal.to_string()),
    });
    let refused = match end {
        Ok(()) => false,
        Err(Refusal::KeyChanged) => {
            // The writing task says so, before anything that waits to be written.
            tracing::warn!("{peer}: {}", Refusal::KeyChanged);
            true
        }
        Err(refusal) => {
            let refusal = short(refusal);
            tracing::warn!("{peer}: {refusal}");
            session.out.send((Frame::Refused(refusal), Bytes::new())).await.is_ok()
        }
    };
    drop(session);
    if refused {
        // Either the peer has closed, or it had its time.
        let _ = tokio::time::timeout(LINGER, reader.drain()).await;
    }
    let _ = tokio::time::timeout(LINGER, writing).await;
}

/// Comes back when something about the peer's key is changed; never on one host.
fn changed(entered: Option<&Entered>) -> impl Future<Output = ()> + Send + 'static {
    let changed = entered.map(Entered::changed);
    async move {
        match changed {
            Some(changed) => changed.await,
            None => std::future::pending().await,
        }
    }
}

/// Writes what is to be written, until nothing more comes, the peer does not read, or its key is changed: then it gets
/// nothing more but that.
async fn write(
    mut writer: FrameWriter,
    mut to_write: mpsc::Receiver<(Frame, Bytes)>,
    changed: impl Future<Output = ()>,
) {
    tokio::pin!(changed);
    loop {
        let next = tokio::select! {
            biased;
            () = &mut changed => {
                // The peer may be gone already.
                let refuse = writer.send(&Frame::Refused(Refusal::KeyChanged), b"");
                let _ = tokio::time::timeout(LINGER, refuse).await;
                break;
            }
            next = to_write.recv() => next,
        };
        let Some((frame, body)) = next else { break };
        // A frame that was begun cannot be taken back: after a timeout the stream is at its end.
        tokio::select! {
            biased;
            sent = tokio::time::timeout(WRITE_MAX, writer.send(&frame, &body)) => if !matches!(sent, Ok(Ok(()))) {
                return;
            },
            () = &mut changed => return,
        }
    }
    // The peer may be gone already.
    let _ = writer.shutdown().await;
}

/// The refusal with a text that fits into any frame.
fn short(mut refusal: Refusal) -> Refusal {
    if let Refusal::Bad(text) | Refusal::Store(text) | Refusal::Full(text) | Refusal::Behind(text) =
        &mut refusal
        && text.len() > TEXT_MAX
    {
        text.truncate(text.floor_char_boundary(TEXT_MAX));
        text.push_str("...");
    }
    refusal
}

/// Does what waits for the disk; what fails is a refusal.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BackupError> + Send + 'static,
) -> Result<T, Refusal> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => Err(Refusal::Store(error.to_string())),
        Err(error) => Err(Refusal::Store(format!("reading failed: {error}"))),
    }
}

/// Waits for ever if there is nothing to wait for.
async fn notified(notify: Option<Arc<Notify>>) {
    match notify {
        Some(notify) => notify.notified().await,
        None => std::future::pending().await,
    }
}

impl Session {
    /// Until the peer ends the connection (`Ok`) or is refused.
    async fn run(&mut self, reader: &mut FrameReader) -> Result<(), Refusal> {
        let mut stop = self.shared.stop.subscribe();
        loop {
            let fenced = self.writing.as_ref().map(|w| w.fenced.clone());
            let (broken, out) = (self.broken.clone(), self.out.clone());
            tokio::select! {
                () = out.closed() => return Ok(()),
                frame = reader.next() => match frame {
                    Ok(Some((frame, body))) => {
                        if let Some(writing) = &self.writing {
                            writing.pulse.heard();
                        }
                        self.frame(frame, body).await?;
                        self.heart.heard(Instant::now());
                    }
                    Ok(None) | Err(FrameError::Io(_) | FrameError::CutOff) => return Ok(()),
                    Err(FrameError::Wire(error)) => return Err(Refusal::Bad(error.to_string())),
                },
                () = tokio::time::sleep_until(self.heart.beat_at().into()), if self.writing.is_some() => {
                    match self.heart.beat(reader.buffered(), Instant::now()) {
                        // Where so much waits to be written, the peer hears enough.
                        Some(number) => drop(out.try_send((Frame::Ping(number), Bytes::new()))),
                        None => {
                            let why = format!("nothing came from it for {} s", heart::SILENT_MAX.as_secs());
                            tracing::warn!("the agent of connection {}: {why}", self.number);
                            self.left = Some(Leave::Lost(why));
                            return Ok(());
                        }
                    }
                }
                () = notified(fenced) => {
                    let why = self.writing.as_ref().map(|w| w.group.state().fenced(w.epoch));
                    return Err(why.unwrap_or(Refusal::Fenced { newest: Epoch(0) }));
                }
                () = broken.notified() => {
                    let why = self.writing.as_ref().and_then(|w| w.group.progress().borrow().refuses.clone());
                    return Err(Refusal::Store(why.unwrap_or_else(|| "its log failed".into())));
                }
                () = async { let _ = stop.wait_for(|stop| *stop).await; } => return Ok(()),
            }
        }
    }

    async fn answer(&self, frame: Frame) {
        // If the writer ended, so does the connection, and the reader will see it.
        let _ = self.out.send((frame, Bytes::new())).await;
    }

    /// Answers with lines in frames of bounded size: one at least.
    async fn pieces<T>(&self, lines: Vec<T>, frame: impl Fn(Vec<T>, bool) -> Frame) {
        let mut lines = lines.into_iter().peekable();
        loop {
            let some = lines.by_ref().take(LINES_AT_ONCE).collect();
            let last = lines.peek().is_none();
            self.answer(frame(some, last)).await;
            if last {
                return;
            }
        }
    }

    /// Whether the peer may ask for this.
    async fn check(&self, frame: &Frame) -> Result<(), Refusal> {
        let Some(entered) = &self.entered else { return Ok(()) };
        match need(frame) {
            // Before it is repeated in an answer, or even written down as somebody's.
            Need::Group(group, _)
            | Need::WriteAndRead(group)
            | Need::ToWrite(group)
            | Need::ToReceive(group)
                if !places::group_name_is_valid(group) =>
            {
                Err(places::invalid_group_name(group))
            }
            Need::Nothing | Need::Writer => Ok(()),
            Need::SameHost => Err(Refusal::Bad("that can be asked on the same host only".into())),
            Need::Name => Err(Refusal::Bad("over TCP say which group it is to be: --group NAME".into())),
            Need::Group(group, rights) if entered.may(group, rights) => Ok(()),
            Need::Group(group, rights) => {
                Err(entered.denied(group, rights.last().copied().unwrap_or(Right::Read)))
            }
            Need::WriteAndRead(group) => {
                let lacks =
                    [Right::Write, Right::Read].into_iter().find(|right| !entered.may(group, &[*right]));
                lacks.map_or(Ok(()), |right| Err(entered.denied(group, right)))
            }
            // The name counts that came first.
            Need::ToReceive(_) if self.receiver.is_some() => Ok(()),
            Need::ToReceive(group) if entered.may(group, &[Right::Administrate]) => Ok(()),
            Need::ToWrite(group) | Need::ToReceive(group) => {
                let (shared, entered, group) = (self.shared.clone(), entered.clone(), group.to_owned());
                tokio::task::spawn_blocking(move || entered.may_write(&group, shared.has_group(&group)?))
                    .await
                    .map_err(|e| Refusal::Store(e.to_string()))?
            }
        }
    }

    async fn frame(&mut self, frame: Frame, body: Bytes) -> Result<(), Refusal> {
        self.check(&frame).await?;
        match frame {
            Frame::Hello { group, group_id, boot_id: _, epoch, take_over, maps, lz4 } => {
                if self.writing.is_some() {
                    return Err(Refusal::Bad("a second Hello on one connection".into()));
                }
                self.hello(group, group_id, epoch, (take_over, lz4), maps).await
            }
            Frame::Records { first, count } => {
                let Some(writing) = &self.writing else {
                    return Err(Refusal::Bad("records before Hello".into()));
                };
                writing.group.take(self.number, writing.epoch, first, count, body).await
            }
            Frame::Packed { first, count, plain_len } => {
                let Some(writing) = self.writing.as_ref().filter(|writing| writing.lz4) else {
                    return Err(Refusal::Bad("packed records that were not agreed on".into()));
                };
                let body = unpack(&body, plain_len).map_err(|error| Refusal::Bad(error.to_string()))?;
                writing.group.take(self.number, writing.epoch, first, count, body).await
            }
            Frame::GetCatalog => {
                let Some(writing) = &self.writing else {
                    return Err(Refusal::Bad("GetCatalog before Hello".into()));
                };
                let (group, out) = (writing.group.clone(), self.out.clone());
                blocking(move || {
                    read::catalog(&group, &mut |frame| out.blocking_send((frame, Bytes::new())).is_ok())
                })
                .await
            }
            Frame::GetManifest { group, at_least } => {
                let group = self.group(&group)?;
                let out = self.out.clone();
                self.readers.retain(|task| !task.is_finished());
                let task = tokio::spawn(async move {
                    let mut progress = group.progress();
                    if progress.wait_for(|p| p.applied >= at_least).await.is_err() {
                        return;
                    }
                    let to = out.clone();
                    let made = tokio::task::spawn_blocking(move || {
                        read::manifest(&group, &mut |frame| to.blocking_send((frame, Bytes::new())).is_ok())
                    });
                    let failed = match made.await {
                        Ok(Ok(())) => return,
                        Ok(Err(error)) => error.to_string(),
                        Err(error) => error.to_string(),
                    };
                    // If the connection ended there is nobody to tell.
                    let refusal = short(Refusal::Store(failed));
                    let _ = out.send((Frame::Refused(refusal), Bytes::new())).await;
                });
                self.readers.push(task.abort_handle());
                Ok(())
            }
            Frame::GetDigests { group, position } => {
                let group = self.group(&group)?;
                let out = self.out.clone();
                let mut progress = group.progress();
                // The record may be on its way, on another connection.
                let there = progress.wait_for(|p| p.durable.sequence >= position);
                if !matches!(tokio::time::timeout(digests::WAIT, there).await, Ok(Ok(_))) {
                    self.answer(Frame::Digests { lines: Vec::new(), last: true }).await;
                    return Ok(());
                }
                blocking(move || {
                    let send = &mut |frame| out.blocking_send((frame, Bytes::new())).is_ok();
                    digests::digests(&group, position, send)
                })
                .await
            }
            Frame::GetNewest { group, object, at_least } => {
                let group = self.group(&group)?;
                let out = self.out.clone();
                // In a task of its own: the records that are waited for may come over this very connection.
                self.readers.retain(|task| !task.is_finished());
                let task = tokio::spawn(async move {
                    let mut progress = group.progress();
                    if progress.wait_for(|p| p.durable.sequence >= at_least).await.is_err() {
                        return;
                    }
                    let to = out.clone();
                    let made = blocking(move || {
                        newest::newest(&group, object, &mut |frame, body| {
                            to.blocking_send((frame, body)).is_ok()
                        })
                    });
                    if let Err(refusal) = made.await {
                        // If the connection ended there is nobody to tell.
                        let _ = out.send((Frame::Refused(short(refusal)), Bytes::new())).await;
                    }
                });
                self.readers.push(task.abort_handle());
                Ok(())
            }
            Frame::GetDamage { group, heal, suspects } => {
                let group = self.group(&group)?;
                let found = blocking(move || group.damage(heal, &suspects.into_iter().collect())).await?;
                for piece in found.chunks(DAMAGE_AT_ONCE) {
                    self.answer(Frame::Damage { objects: piece.to_vec(), last: false }).await;
                }
                self.answer(Frame::Damage { objects: Vec::new(), last: true }).await;
                Ok(())
            }
            Frame::GetGenerations { group } => {
                let group = self.group(&group)?;
                let all = blocking(move || group.generations()).await?;
                self.pieces(all, |lines, last| Frame::Generations { lines, last }).await;
                Ok(())
            }
            Frame::GetTree { group, at, digests } => {
                self.read_past(group, at, move |past, send| past.send_tree(digests, send)).await
            }
            Frame::GetContents { group, at, objects } => {
                self.read_past(group, at, move |past, send| past.send_contents(&objects, send)).await
            }
            Frame::GetChanges { group, at, objects } => {
                self.read_past(group, at, move |past, send| past.send_changes(&objects, send)).await
            }
            Frame::GetDifferences { group, from, to } => {
                let group = self.group(&group)?;
                self.hold(&group, from).await?;
                self.hold(&group, to).await?;
                if from > to {
                    return Err(Refusal::Bad("the older of two checkpoints comes first".into()));
                }
                let lines = blocking(move || history::differences(group.source(), from, to)).await?;
                self.pieces(lines, |lines, last| Frame::Differences { lines, last }).await;
                Ok(())
            }
            Frame::GetVersions { group, path } => {
                let group = self.group(&group)?;
                let lines = blocking(move || history::versions(group.source(), &path)).await?;
                self.pieces(lines, |lines, last| Frame::Versions { lines, last }).await;
                Ok(())
            }
            Frame::GetTransfer { group, from, to } => {
                let group = self.group(&group)?;
                for at in from.iter().chain([&to]) {
                    self.hold(&group, *at).await?;
                }
                if from.is_some_and(|from| from >= to) {
                    return Err(Refusal::Bad("the older of two checkpoints comes first".into()));
                }
                let out = self.out.clone();
                blocking(move || {
                    let sent = |body, last| out.blocking_send((Frame::Transfer { last }, body)).is_ok();
                    transfer::send(group.source(), from, to, &mut |piece| sent(piece, false))?;
                    sent(Bytes::new(), true);
                    Ok(())
                })
                .await
            }
            Frame::Receive { group, last } => self.receive(group, &body, last).await,
            Frame::Merge { group, from, to } => {
                let gone = self.group(&group)?.merge(from, to).await?;
                self.answer(Frame::Merged { gone }).await;
                Ok(())
            }
            Frame::Promote { group, by, force } => {
                let group = self.group(&group)?;
                // In a task of its own: it has to be finished, whatever becomes of the connection.
                let promoting = tokio::spawn(async move { group.promote(by, force).await });
                let answer = promoting.await.map_err(|error| Refusal::Store(error.to_string()))??;
                self.answer(answer).await;
                Ok(())
            }
            Frame::PromoteStep { group, history, stage } => {
                let group = self.group(&group)?;
                let noted = tokio::task::spawn_blocking(move || group.promote_step(history, stage));
                let answer = noted.await.map_err(|error| Refusal::Store(error.to_string()))??;
                self.answer(answer).await;
                Ok(())
            }
            Frame::GetPlaces { group } => {
                let group = self.group(&group)?;
                let roots = blocking(move || group.places()).await?;
                self.answer(Frame::Places { roots }).await;
                Ok(())
            }
            Frame::Look { group, at, look } => self.look(group, at, look).await,
            Frame::PutProcess { group, epoch, checkpoint, made_ns } => {
                self.put_process(&group, (epoch, made_ns), checkpoint).await
            }
            Frame::ProcessBlocks { file, size } => self.process_blocks(file, size, body).await,
            Frame::ProcessBytes => self.process_bytes(body).await,
            Frame::ProcessEnd => self.process_end().await,
            Frame::GetProcess { group, at } => self.get_process(&group, at).await,
            Frame::ReadKeys => {
                let ended = match &self.shared.access {
                    Some(access) => access.clone().read_keys().await?,
                    None => 0,
                };
                self.answer(Frame::KeysRead { ended }).await;
                Ok(())
            }
            Frame::GetStatus => {
                let mut groups = self.shared.status();
                if let Some(entered) = &self.entered {
                    groups.retain(|status| entered.may(&status.group, &Right::ALL));
                }
                self.answer(Frame::Status { groups }).await;
                Ok(())
            }
            Frame::Ping(number) => {
                self.answer(Frame::Pong(number)).await;
                Ok(())
            }
            Frame::Pong(number) => {
                if let Some(writing) = &self.writing
                    && let Some(after) = self.heart.answered(number, Instant::now())
                {
                    writing.pulse.answered(after);
                }
                Ok(())
            }
            Frame::Bye => {
                self.left = Some(Leave::Bye);
                Ok(())
            }
            _ => Err(Refusal::Bad("a frame that only a replayer sends".into())),
        }
    }

    fn group(&self, name: &str) -> Result<Arc<Group>, Refusal> {
        let found = self.shared.group(name);
        found.ok_or_else(|| Refusal::Bad(format!("there is no group {name:?} in this store")))
    }

    /// Reads a generation. It is held until the connection ends.
    async fn read_past(
        &mut self,
        group: String,
        at: CheckpointId,
        read: impl FnOnce(&mut Past<'_>, generations::Send<'_>) -> Result<(), BackupError> + Send + 'static,
    ) -> Result<(), Refusal> {
        let group = self.group(&group)?;
        self.hold(&group, at).await?;
        let out = self.out.clone();
        blocking(move || {
            let mut past = Past::open(group.source(), at)?;
            read(&mut past, &mut |frame, body| out.blocking_send((frame, body)).is_ok())
        })
        .await
    }

    /// Takes in more of a stream; with its last bytes it becomes a checkpoint.
    async fn receive(&mut self, group: Option<String>, body: &Bytes, last: bool) -> Result<(), Refusal> {
        let mut receiver = match self.receiver.take() {
            Some(receiver) => receiver,
            None => Receiver::begin(self.shared.clone(), group).await,
        };
        let body = body.clone();
        let fed = tokio::task::spawn_blocking(move || {
            receiver.feed(&body)?;
            Ok(if last { Err(receiver.finish()?) } else { Ok(receiver) })
        });
        let taken = match fed.await.map_err(|error| Refusal::Store(error.to_string()))?? {
            Ok(receiver) => {
                self.receiver = Some(receiver);
                None
            }
            Err(whole) => {
                let (shared, name, id) = (self.shared.clone(), whole.group.clone(), whole.head.id);
                let group = tokio::task::spawn_blocking(move || shared.group_for(&name, id, &[]))
                    .await
                    .map_err(|error| Refusal::Store(error.to_string()))??;
                // In a task of its own: it has to be finished, whatever becomes of the connection.
                let (number, name) = (self.number, whole.group.clone());
                let adopting = tokio::spawn(async move { group.adopt(number, &whole).await });
                let checkpoint = adopting.await.map_err(|error| Refusal::Store(error.to_string()))??;
                Some((name, checkpoint))
            }
        };
        self.answer(Frame::Received { taken }).await;
        Ok(())
    }

    /// Looks into a generation; what is known of it stays for the next look.
    async fn look(&mut self, group: String, at: CheckpointId, look: Look) -> Result<(), Refusal> {
        let group = self.group(&group)?;
        self.hold(&group, at).await?;
        let known =
            self.looked.take().filter(|(of, known)| Arc::ptr_eq(of, &group) && known.checkpoint == at);
        let (looked, seen, body) = blocking(move || {
            let past = match known {
                Some((_, known)) => Past::again(group.source(), known),
                None => Past::open(group.source(), at),
            };
            // One file that cannot be read is no reason to end a mount.
            let failed = |error: BackupError| (Seen::Failed(error.to_string()), Bytes::new());
            Ok(match past {
                Ok(mut past) => {
                    let (seen, body) = look::look(&mut past, look).unwrap_or_else(failed);
                    let known = past.rest();
                    (Some((group, known)), seen, body)
                }
                Err(error) => {
                    let (seen, body) = failed(error);
                    (None, seen, body)
                }
            })
        })
        .await?;
        self.looked = looked;
        // If the writer ended, so does the connection, and the reader will see it.
        let _ = self.out.send((Frame::Seen(seen), body)).await;
        Ok(())
    }

    /// Holds a generation until the connection ends.
    async fn hold(&mut self, group: &Arc<Group>, at: CheckpointId) -> Result<(), Refusal> {
        if !self.held.iter().any(|held| Arc::ptr_eq(&held.group, group) && held.at == at) {
            let group = group.clone();
            // Made there, so that it is let go too when the connection ends meanwhile.
            let held = blocking(move || {
                group.hold(at)?;
                Ok(Held { group, at })
            });
            self.held.push(held.await?);
        }
        Ok(())
    }

    /// Gives back what the connection held.
    fn release(&mut self, leave: Leave) {
        for reader in self.readers.drain(..) {
            reader.abort();
        }
        self.held.clear();
        let Some(writing) = self.writing.take() else { return };
        writing.acks.abort();
        if writing.group.state().leave(self.number, leave) {
            writing.group.slot_free.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backup::{Replayer, ServeOptions};

    #[tokio::test]
    async fn a_peer_that_does_not_read_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let options = ServeOptions { store: dir.path().join("store"), ..ServeOptions::default() };
        let replayer = Replayer::start(options).unwrap();
        let mut connection = replayer.connect_local();
        // Each is answered, and no answer is read.
        let ask = async { while connection.writer.send(&Frame::Ping(1), b"").await.is_ok() {} };
        tokio::time::timeout(Duration::from_secs(20), ask).await.expect("it is dropped");
    }

    #[test]
    fn a_refusal_that_quotes_much_is_cut() {
        let long = "\u{e4}".repeat(TEXT_MAX);
        let Refusal::Bad(text) = short(Refusal::Bad(long)) else { panic!() };
        assert!(text.len() <= TEXT_MAX + 3 && text.ends_with("..."));
    }
}
