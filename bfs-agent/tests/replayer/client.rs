//! The scripted client: it writes a group as an agent does, record by record.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bfs_agent::backup::{Replayer, ReplayerHandle, ServeOptions};
use bfs_agent::net::Connection;
use bfs_common::codec;
use bfs_common::record::*;
use bfs_common::wire::*;
use bytes::BytesMut;

pub const GROUP_ID: GroupId = GroupId([5; 16]);
pub const ROOT: &str = "/data/app";

pub fn serve(store: &Path) -> ReplayerHandle {
    Replayer::start(ServeOptions { store: store.into(), ..ServeOptions::default() }).unwrap()
}

/// An agent as a script.
pub struct Agent {
    pub connection: Connection,
    pub epoch: Epoch,
    pub position: Position,
    pub welcome: Frame,
    pub confirmed: CheckpointId,
    pub applied: CheckpointId,
    pub batch: BytesMut,
    pub first: Option<Sequence>,
    pub count: u32,
    pub next_checkpoint: u64,
    pub suspect: bool,
}

pub async fn hello(
    connection: &mut Connection,
    epoch: Option<Epoch>,
    take_over: bool,
) -> Result<Frame, Refusal> {
    let hello = Frame::Hello {
        group: "g".into(),
        group_id: GROUP_ID,
        boot_id: [1; 16],
        epoch,
        take_over,
        maps: Vec::new(),
        lz4: false,
    };
    connection.writer.send(&hello, b"").await.unwrap();
    match next(connection).await {
        Frame::Refused(refusal) => Err(refusal),
        frame => Ok(frame),
    }
}

/// The next frame; heartbeats are answered.
pub async fn next(connection: &mut Connection) -> Frame {
    loop {
        let frame = tokio::time::timeout(Duration::from_secs(20), connection.reader.next()).await;
        match frame.expect("an answer in time").expect("a sound frame").expect("not closed").0 {
            // What is wrong with the connection is seen by whoever reads it.
            Frame::Ping(number) => drop(connection.writer.send(&Frame::Pong(number), b"").await),
            frame => return frame,
        }
    }
}

pub async fn refusal(connection: &mut Connection) -> Refusal {
    loop {
        if let Frame::Refused(refusal) = next(connection).await {
            return refusal;
        }
    }
}

impl Agent {
    pub async fn new(connection: Connection) -> Self {
        Self::resume(connection, None).await
    }

    pub async fn resume(mut connection: Connection, epoch: Option<Epoch>) -> Self {
        let welcome = hello(&mut connection, epoch, false).await.unwrap();
        Self::welcomed(connection, welcome)
    }

    /// Goes on from what the replayer said to a hello; a new epoch begins at once.
    pub fn welcomed(connection: Connection, welcome: Frame) -> Self {
        let Frame::Welcome { epoch: granted, position, confirmed, applied, .. } = welcome.clone() else {
            panic!("{welcome:?}")
        };
        let mut agent = Self {
            connection,
            epoch: granted,
            position,
            welcome,
            confirmed,
            applied,
            batch: BytesMut::new(),
            first: None,
            count: 0,
            next_checkpoint: confirmed.0 + 1,
            suspect: false,
        };
        if position.epoch < granted {
            agent.begin();
        }
        agent
    }

    /// The beginning of an epoch that knows nothing of the one before.
    pub fn begin(&mut self) {
        self.put(Record::EpochBegin { epoch: self.epoch, boot_id: [1; 16], complete: false }, b"");
        self.put(Record::Gap { scope: GapScope::Everything }, b"");
        self.suspect = true;
    }

    /// Everything is as it should be.
    pub fn repair(&mut self) {
        if std::mem::take(&mut self.suspect) {
            self.put(Record::Repaired { scope: GapScope::Everything }, b"");
        }
    }

    pub fn put(&mut self, record: Record, payload: &[u8]) {
        let sequence = self.position.sequence.next();
        let start = self.batch.len();
        codec::encode(&mut self.batch, sequence, &record, payload);
        self.position.chain = codec::chain(self.position.chain, &self.batch[start..]);
        self.position.sequence = sequence;
        self.position.epoch = self.epoch;
        self.first.get_or_insert(sequence);
        self.count += 1;
    }

    pub async fn flush(&mut self) {
        let Some(first) = self.first.take() else { return };
        let body = self.batch.split();
        let frame = Frame::Records { first, count: std::mem::take(&mut self.count) };
        self.connection.writer.send(&frame, &body).await.unwrap();
    }

    /// Waits until what was sent is acknowledged.
    pub async fn acked(&mut self) {
        self.flush().await;
        let wanted = self.position;
        self.wait(|_, position| position == wanted).await;
    }

    pub async fn wait(&mut self, done: impl Fn(&Self, Position) -> bool) {
        loop {
            match next(&mut self.connection).await {
                Frame::Ack { position, confirmed, applied, .. } => {
                    (self.confirmed, self.applied) = (confirmed, applied);
                    if done(self, position) {
                        return;
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }

    pub async fn checkpoint(&mut self) {
        self.repair();
        let checkpoint = CheckpointId(self.next_checkpoint);
        self.next_checkpoint += 1;
        self.put(Record::Checkpoint { checkpoint, label: CheckpointLabel::default() }, b"");
        self.flush().await;
        self.wait(|agent, _| agent.applied >= checkpoint).await;
    }

    pub fn object(&mut self, object: u64, kind: FileKind, permissions: u32, target: &[u8]) {
        let meta = Meta { permissions, uid: 0, gid: 0, mtime_sec: 1_000_000 + object as i64, mtime_nsec: 7 };
        let identity = Identity { ino: object, ..Identity::default() };
        self.put(Record::Object { object: ObjectId(object), identity, kind, device: 0, meta }, target);
    }

    pub fn entry(&mut self, directory: u64, name: &str, object: u64) {
        let name = Name::new(name.as_bytes()).unwrap();
        self.put(Record::EntrySet { directory: ObjectId(directory), name, object: ObjectId(object) }, b"");
    }

    pub fn delete(&mut self, directory: u64, name: &str) {
        let name = Name::new(name.as_bytes()).unwrap();
        self.put(Record::EntryDelete { directory: ObjectId(directory), name }, b"");
    }

    pub fn write(&mut self, object: u64, offset: u64, data: &[u8]) {
        self.put(Record::Write { object: ObjectId(object), offset }, data);
    }

    pub fn root(&mut self) {
        self.object(1, FileKind::Directory, 0o755, b"");
        self.put(Record::Roots { roots: vec![(PathBytes::new(ROOT.as_ref()), ObjectId(1))] }, b"");
    }
}

pub fn tree(store: &Path) -> PathBuf {
    store.join("tree/g").join(&ROOT[1..])
}

pub fn read(path: PathBuf) -> String {
    String::from_utf8(std::fs::read(path).unwrap()).unwrap()
}
