//! Images of processes on a connection: sent by the agent that writes the group, or given out.

use std::sync::Arc;

use bfs_common::record::{CheckpointId, Epoch};
use bfs_common::wire::{Frame, PROCESS_PIECE, Refusal};
use bytes::{Bytes, BytesMut};

use super::super::group::{Group, Puts};
use super::super::process::put::{Put, PutError};
use super::{Session, blocking};

/// A set that comes in.
pub(super) struct Putting {
    group: Arc<Group>,
    by: Puts,
    put: Box<Put>,
}

impl Session {
    pub(super) async fn put_process(
        &mut self,
        group: &str,
        (epoch, made_ns): (Epoch, Option<i64>),
        at: CheckpointId,
    ) -> Result<(), Refusal> {
        let (group, by) = (self.group(group)?, Puts::of(epoch, made_ns));
        // One that did not come to its end is given up.
        self.putting = None;
        match group.put_process(by, at).await? {
            None => self.answer(Frame::ProcessKept).await,
            Some(put) => {
                self.putting = Some(Putting { group, by, put });
                self.answer(Frame::ProcessBegun).await;
            }
        }
        Ok(())
    }

    fn putting(&mut self) -> Result<Putting, Refusal> {
        self.putting.take().ok_or_else(|| Refusal::Bad("images of processes before PutProcess".into()))
    }

    /// Does something with what comes in, where that may wait for the disk. After a failure there is nothing of it.
    async fn put<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Put) -> Result<T, PutError> + Send + 'static,
    ) -> Result<T, Refusal> {
        let Putting { group, by, mut put } = self.putting()?;
        let (put, done) = blocking(move || {
            let done = work(&mut put);
            Ok((put, done))
        })
        .await?;
        let done = group.more_of_process(done)?;
        self.putting = Some(Putting { group, by, put });
        Ok(done)
    }

    pub(super) async fn process_blocks(
        &mut self,
        file: String,
        size: u64,
        digests: Bytes,
    ) -> Result<(), Refusal> {
        let (wanted, bytes) = self.put(move |put| put.blocks(&file, size, &digests)).await?;
        if let Some(putting) = &self.putting {
            putting.group.process_room(bytes)?;
        }
        // If the writer ended, so does the connection, and the reader will see it.
        let _ = self.out.send((Frame::ProcessWanted, wanted.into())).await;
        Ok(())
    }

    pub(super) async fn process_bytes(&mut self, body: Bytes) -> Result<(), Refusal> {
        self.put(move |put| put.bytes(&body)).await
    }

    pub(super) async fn process_end(&mut self) -> Result<(), Refusal> {
        let Putting { group, by, put } = self.putting()?;
        group.admit_process(by)?;
        let done = blocking(move || Ok(put.end())).await?;
        group.more_of_process(done)?;
        self.answer(Frame::ProcessKept).await;
        Ok(())
    }

    pub(super) async fn get_process(&mut self, group: &str, at: CheckpointId) -> Result<(), Refusal> {
        let group = self.group(group)?;
        self.hold(&group, at).await?;
        let out = self.out.clone();
        blocking(move || {
            let mut current = String::new();
            let mut piece = BytesMut::new();
            let send = |file: &str, piece: &mut BytesMut| {
                let frame = Frame::ProcessPiece { file: file.into() };
                out.blocking_send((frame, piece.split().freeze())).is_ok()
            };
            let mut heard = true;
            group.process().read(at, |file, bytes| {
                if current != file || piece.len() + bytes.len() > PROCESS_PIECE {
                    heard = current.is_empty() || send(&current, &mut piece);
                    file.clone_into(&mut current);
                }
                piece.extend_from_slice(bytes);
                heard
            })?;
            if heard && send(&current, &mut piece) {
                send("", &mut piece);
            }
            Ok(())
        })
        .await
    }
}
