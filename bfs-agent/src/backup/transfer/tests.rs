//! Streams: their bytes, and between stores against models in memory.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use bfs_common::codec;
use bfs_common::record::*;
use bfs_common::wire::*;
use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

use super::*;
use crate::backup::apply::Area;
use crate::backup::check;
use crate::backup::index::Index;
use crate::backup::model::{May, Model, ROOT, TOP};
use crate::backup::past::{Past, Source};
use crate::backup::retention::Retention;
use crate::backup::store::Store;
use crate::backup::{Replayer, ReplayerHandle, ServeOptions};
use crate::generation::{Client, ReadError};
use crate::transfer::{END, Head, Item, Moment, Reader, StreamError, Writer};

pub(super) const GROUP: &str = "g";
pub(super) const ID: GroupId = GroupId([5; 16]);

pub(super) fn moment(checkpoint: u64) -> Moment {
    let label = CheckpointLabel { wall_ns: 7, ..CheckpointLabel::default() };
    Moment { checkpoint: CheckpointId(checkpoint), label, roots: vec![(PathBytes::new(ROOT.as_ref()), TOP)] }
}

fn head() -> Head {
    Head { group: GROUP.into(), id: ID, from: Some(moment(3)), to: moment(5) }
}

/// A stream with these records.
pub(super) fn stream(head: &Head, records: &[(Record, Vec<u8>)]) -> Vec<u8> {
    let mut all = Vec::new();
    let mut sink = |piece: Bytes| {
        all.extend_from_slice(&piece);
        true
    };
    let mut writer = Writer::begin(head, &mut sink);
    records.iter().for_each(|(record, payload)| writer.record(record, payload));
    writer.end();
    all
}

pub(super) fn some() -> Vec<(Record, Vec<u8>)> {
    let Moment { checkpoint, label, .. } = moment(5);
    vec![
        (Record::Write { object: ObjectId(7), offset: 4096 }, b"some bytes".to_vec()),
        (Record::Checkpoint { checkpoint, label }, Vec::new()),
    ]
}

/// What takes in a stream.
fn begin_receiving(target: &ReplayerHandle) -> Receiver {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(Receiver::begin(target.shared().clone(), None))
}

/// All items of a stream that comes in pieces.
fn read(bytes: &[u8], piece: usize) -> Result<Vec<Item>, StreamError> {
    let mut reader = Reader::default();
    let mut items = Vec::new();
    for some in bytes.chunks(piece) {
        reader.feed(some);
        while let Some(item) = reader.next_item()? {
            items.push(item);
        }
    }
    reader.finish()?;
    Ok(items)
}

#[test]
fn what_is_written_is_read_in_pieces_of_any_length() {
    let bytes = stream(&head(), &some());
    let mut wanted = vec![Item::Head(Box::new(head()))];
    wanted.extend(some().into_iter().map(|(record, payload)| Item::Record(Box::new(record), payload.into())));
    wanted.push(Item::End);
    for piece in [1, 7, 100, bytes.len()] {
        assert_eq!(read(&bytes, piece).as_ref(), Ok(&wanted), "pieces of {piece}");
    }
}

#[test]
fn golden_bytes() {
    let bytes = stream(&head(), &some());
    let hex: String = bytes[..20].iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(&bytes[..8], b"bfsgens\n");
    assert_eq!(hex, GOLDEN);
    let digest = blake3::hash(&bytes[..bytes.len() - END]);
    assert_eq!(bytes[bytes.len() - 32..], digest.as_bytes()[..]);
    assert_eq!(bytes[bytes.len() - END..][..16], [0, 0, 0, 0, 32, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
}

const GOLDEN: &str = "62667367656e730a0100000032000000e985886a";

#[test]
fn every_cut_and_every_flipped_bit_is_noticed() {
    let bytes = stream(&head(), &some());
    for cut in 0..bytes.len() {
        assert!(read(&bytes[..cut], 64).is_err(), "cut at {cut}");
    }
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(read(&flipped, 64).is_err(), "bit {bit}");
    }
    assert_eq!(read(&[&bytes[..], b"x"].concat(), 64), Err(StreamError::Behind));
    let two = [&bytes[..], &bytes[..]].concat();
    assert_eq!(read(&two, two.len()), Err(StreamError::Behind));
}

/// A replayer that keeps everything.
pub(super) fn start(store: &Path) -> ReplayerHandle {
    let retention = Retention::everything(1);
    Replayer::start(ServeOptions { store: store.into(), retention, ..ServeOptions::default() }).unwrap()
}

pub(super) fn client(replayer: &ReplayerHandle) -> Client {
    Client::open(async { Ok(replayer.connect_local()) }).unwrap()
}

/// An agent that says what models do.
pub(super) struct Primary {
    runtime: tokio::runtime::Runtime,
    connection: crate::net::Connection,
    epoch: Epoch,
    position: Position,
    model: Model,
    checkpoint: u64,
    pub(super) models: BTreeMap<u64, Model>,
}

impl Primary {
    fn new(replayer: &ReplayerHandle) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut connection = replayer.connect_local();
        let hello = Frame::Hello {
            group: GROUP.into(),
            group_id: ID,
            boot_id: [1; 16],
            epoch: None,
            take_over: true,
            maps: Vec::new(),
            lz4: false,
        };
        let welcome = runtime.block_on(async {
            connection.writer.send(&hello, b"").await.unwrap();
            connection.answer().await.unwrap().0
        });
        let Frame::Welcome { epoch, position, .. } = welcome else { panic!("{welcome:?}") };
        let mut new = Self {
            runtime,
            connection,
            epoch,
            position,
            model: Model::new(),
            checkpoint: 0,
            models: BTreeMap::new(),
        };
        new.begin();
        new
    }

    fn begin(&mut self) {
        let begin = Record::EpochBegin { epoch: self.epoch, boot_id: [1; 16], complete: true };
        self.model.records.insert(0, (begin, Vec::new()));
    }

    /// It says what the store has, as a new session does, and goes on from there.
    fn going_on(replayer: &ReplayerHandle, model: &Model, at: u64) -> Self {
        let mut new = Self::new(replayer);
        new.model = model.clone();
        new.model.records.clear();
        new.begin();
        new.checkpoint = at;
        new.models.insert(at, model.clone());
        new
    }

    /// Does something, and waits until its checkpoint is applied.
    fn step(&mut self, does: impl FnOnce(&mut Model)) {
        does(&mut self.model);
        self.checkpoint += 1;
        let checkpoint = CheckpointId(self.checkpoint);
        let label = CheckpointLabel { wall_ns: self.checkpoint as i64 * 1_000_000_007, ..Default::default() };
        let mut records = std::mem::take(&mut self.model.records);
        records.push((Record::Checkpoint { checkpoint, label }, Vec::new()));
        self.models.insert(self.checkpoint, self.model.clone());
        self.tell(records, |_, applied| applied >= checkpoint);
    }

    /// The same without a checkpoint, until it is durable.
    fn tail(&mut self, does: impl FnOnce(&mut Model)) {
        does(&mut self.model);
        let records = std::mem::take(&mut self.model.records);
        let end = Sequence(self.position.sequence.0 + records.len() as u64);
        self.tell(records, |durable, _| durable >= end);
    }

    fn tell(&mut self, records: Vec<(Record, Vec<u8>)>, done: impl Fn(Sequence, CheckpointId) -> bool) {
        let first = self.position.sequence.next();
        let (mut body, count) = (BytesMut::new(), records.len() as u32);
        for (record, payload) in records {
            self.position.sequence = self.position.sequence.next();
            codec::encode(&mut body, self.position.sequence, &record, &payload);
        }
        self.runtime.block_on(async {
            self.connection.writer.send(&Frame::Records { first, count }, &body).await.unwrap();
            loop {
                match self.connection.answer().await.unwrap().0 {
                    Frame::Ack { position, applied, .. } if done(position.sequence, applied) => return,
                    Frame::Ack { .. } => {}
                    other => panic!("{other:?}"),
                }
            }
        });
    }
}

pub(super) fn sent(replayer: &ReplayerHandle, from: Option<u64>, to: u64) -> Vec<u8> {
    let mut all = Vec::new();
    client(replayer)
        .transfer(GROUP, from.map(CheckpointId), CheckpointId(to), |piece| {
            all.extend_from_slice(piece);
            Ok(())
        })
        .unwrap();
    all
}

/// Takes a stream in, and waits until it is applied; why not, if it is refused.
pub(super) fn received(replayer: &ReplayerHandle, stream: &[u8]) -> Result<u64, String> {
    let mut client = client(replayer);
    let mut pieces = stream.chunks(70_000);
    let taken = client.receive(None, &mut |piece| {
        piece.clear();
        piece.extend_from_slice(pieces.next().unwrap_or_default());
        Ok(())
    });
    let (group, checkpoint) = match taken {
        Ok(taken) => taken,
        Err(ReadError::Ask(crate::net::AskError::Refused(refusal))) => return Err(refusal.to_string()),
        Err(error) => panic!("{error}"),
    };
    assert_eq!(group, GROUP);
    while let Some(status) = replayer.status().first().filter(|status| status.applied < checkpoint) {
        assert!(status.trouble.is_none(), "checkpoint {checkpoint}: {:?}", status.trouble);
        std::thread::yield_now();
    }
    Ok(checkpoint.0)
}

pub(super) fn kept(replayer: &ReplayerHandle) -> Vec<u64> {
    match client(replayer).generations(GROUP) {
        Ok(all) => all.iter().map(|line| line.checkpoint.0).collect(),
        Err(_) => Vec::new(),
    }
}

/// All checkpoints of a store that nobody owns are those of the models, and the store is sound.
fn compare(store: &Path, models: &BTreeMap<u64, Model>, wanted: &[u64]) {
    let report = check::check(store, true, &[]).unwrap();
    assert_eq!(report.problems, []);
    let opened = Store::open(store).unwrap();
    let index = Index::open(opened.path()).unwrap();
    let row = index.group(GROUP).unwrap();
    let area = Area::open(&opened, GROUP, &[], &[]).unwrap();
    let source = Source::at_rest(&area, &index, GROUP, &row);
    let all: Vec<_> =
        index.generations(row.number).unwrap().into_iter().map(|(number, _)| number.0).collect();
    assert_eq!(all, wanted);
    for number in wanted {
        models[number].compare_past(&mut Past::open(source, CheckpointId(*number)).unwrap(), May::Nothing);
    }
    if let Some(newest) = wanted.last() {
        models[newest].compare(TOP, &store.join("tree/g/r"));
    }
    assert_eq!(
        fs::read_dir(store.join("receive")).unwrap().count(),
        0,
        "nothing is left of what was taken in"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]

    /// Whatever was done: some checkpoints of one store come into another, the first whole and the others as differences,
    /// with merges in both between, and are there what they were.
    #[test]
    fn what_is_sent_is_what_is_received(
        steps in prop::collection::vec(prop::collection::vec(any::<(u8, u8, u8, u8)>(), 1..25), 2..9),
        chosen in any::<u16>(),
        merges in prop::collection::vec((any::<bool>(), 0..9u64, 1..5u64), 0..4),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("first"), dir.path().join("second"));
        let source = start(&first);
        let mut primary = Primary::new(&source);
        for ops in &steps {
            primary.step(|model| ops.iter().for_each(|op| model.do_op_or_write(*op)));
        }
        let target = start(&second);
        let mut merges = merges.into_iter();
        let mut last = None;
        for to in 1..=primary.checkpoint {
            if chosen & 1 << to == 0 && to != primary.checkpoint {
                continue;
            }
            let stream = sent(&source, last, to);
            prop_assert_eq!(received(&target, &stream), Ok(to));
            last = Some(to);
            if let Some((here, from, many)) = merges.next() {
                let replayer = if here { &source } else { &target };
                // What is sent next stays; what is not there, or too new, is refused.
                let until = if here { to } else { from + many };
                let merged = client(replayer).merge(GROUP, CheckpointId(from), CheckpointId(until));
                if let Ok(gone) = merged {
                    prop_assert!(gone.iter().all(|n| n.0 >= from && n.0 < until));
                }
            }
        }
        let (here, there) = (kept(&source), kept(&target));
        let models = primary.models.clone();
        drop(primary);
        drop((source, target));
        compare(&first, &models, &here);
        compare(&second, &models, &there);
    }
}

/// Four checkpoints with something of everything.
pub(super) fn four(replayer: &ReplayerHandle) -> Primary {
    let mut primary = Primary::new(replayer);
    let mut seed = 1u32;
    for _ in 0..4 {
        primary.step(|model| {
            for _ in 0..20 {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let [a, b, c, d] = seed.to_be_bytes();
                model.do_op_or_write((a, b, c, d));
            }
        });
    }
    primary
}

#[test]
fn a_stream_that_does_not_fit_is_refused_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    let source = start(&first);
    let primary = four(&source);
    let target = start(&second);
    let refused = |stream: &[u8], why: &str| {
        let found = received(&target, stream).unwrap_err();
        assert!(found.contains(why), "{found}");
    };
    refused(&sent(&source, Some(1), 2), "there is no group \"g\" here: send all of it first");
    assert!(target.status().is_empty(), "no group is made for it");
    let all = sent(&source, None, 2);
    refused(&all[..all.len() - 1], "cut off");
    refused(&all[..all.len() / 2], "cut off");
    assert!(target.status().is_empty());
    assert_eq!(received(&target, &all), Ok(2));
    refused(&all, "has checkpoint 2 already");
    refused(&sent(&source, Some(3), 4), "the newest of group \"g\" is 2");
    let third = sent(&source, Some(2), 3);
    for wrong in [&third[..third.len() - 40], &third[..60], &[&third[..], b"x"].concat()] {
        assert!(received(&target, wrong).is_err());
        assert_eq!(kept(&target), [2]);
    }
    assert_eq!(received(&target, &third), Ok(3));
    // Another one of the same number.
    let other = Head { from: Some(moment(3)), to: moment(5), ..head() };
    refused(&stream(&other, &some()), "they have only the number in common");
    refused(&stream(&Head { id: GroupId([9; 16]), ..head() }, &some()), "another group named");
    refused(&stream(&Head { group: "../x".into(), ..head() }, &some()), "cannot name a group");
    assert_eq!(received(&target, &sent(&source, Some(3), 4)), Ok(4));
    let models = primary.models.clone();
    drop(primary);
    drop((source, target));
    compare(&second, &models, &[2, 3, 4]);
}

/// An agent goes on where a stream ended, and then no stream of the old history fits; and who wrote last fences the others.
#[test]
fn an_agent_may_go_on_in_what_was_received() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    let source = start(&first);
    let primary = four(&source);
    let target = start(&second);
    assert_eq!(received(&target, &sent(&source, None, 3)), Ok(3));
    let mut agent = Primary::going_on(&target, &primary.models[&3], 3);
    let refusal = received(&target, &sent(&source, Some(3), 4)).unwrap_err();
    assert!(refusal.contains("another agent is connected"), "{refusal}");
    agent.step(|model| {
        // Numbers go on behind all that the store has seen.
        let new = model.create(false);
        model.link(TOP, Name::new(b"of the agent").unwrap(), new);
        model.write(new, 0, vec![7; 100_000]);
    });
    let models = agent.models.clone();
    drop(agent);
    let fourth = sent(&source, Some(3), 4);
    let refusal = loop {
        // Its connection is seen to be closed a moment later.
        let refusal = received(&target, &fourth).unwrap_err();
        if !refusal.contains("another agent") {
            break refusal;
        }
    };
    assert!(refusal.contains("the newest of group \"g\" is 4"), "{refusal}");
    let of_fork = sent(&target, Some(3), 4);
    assert_ne!(of_fork, fourth);
    drop(primary);
    drop((source, target));
    compare(&second, &models, &[3, 4]);
}

/// A stream that is there as a whole belongs to the log, whenever the replayer is killed: it stands in `receive`, or a part of
/// it in the log already.
#[test]
fn what_is_whole_is_finished_by_the_next_start() {
    whole_is_finished(false);
}

/// The same where an agent wrote behind the last checkpoint: that is void.
#[test]
fn what_no_checkpoint_covers_is_void_when_another_store_has_what_follows() {
    whole_is_finished(true);
}

fn whole_is_finished(with_tail: bool) {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    let source = start(&first);
    let mut primary = four(&source);
    primary.step(|model| {
        // More than one segment of a small limit.
        let new = model.create(false);
        model.link(TOP, Name::new(b"large").unwrap(), new);
        (0..40u64).for_each(|n| model.write(new, n * 100_000, vec![n as u8 | 1; 100_000]));
    });
    let models = primary.models.clone();
    let target = start(&second);
    assert_eq!(received(&target, &sent(&source, None, 2)), Ok(2));
    if with_tail {
        // Of the same numbers as what comes, and not settled.
        let mut agent = Primary::going_on(&target, &primary.models[&2], 2);
        agent.tail(|model| {
            for name in ["x", "y", "z"] {
                let new = model.create(false);
                model.link(TOP, Name::new(name.as_bytes()).unwrap(), new);
                model.write(new, 0, vec![9; 5000]);
            }
            model.records.push((Record::Gap { scope: GapScope::Everything }, Vec::new()));
        });
    }
    drop(target);
    let before = dir.path().join("before");
    copy(&second, &before);
    // As it would be taken in, by a receiver that is stopped at its end.
    for moved in 0..4 {
        fs::remove_dir_all(&second).unwrap();
        copy(&before, &second);
        let stream = sent(&source, Some(2), 5);
        let options =
            ServeOptions { store: second.clone(), retention: Retention::everything(1), ..Default::default() };
        let target = Replayer::start(options).unwrap();
        let mut receiver = begin_receiving(&target);
        stream.chunks(50_000).for_each(|piece| receiver.feed(piece).unwrap());
        let whole = receiver.finish().unwrap();
        if moved > 0 {
            whole.incoming.mark().unwrap();
        }
        let kill = dir.path().join("killed");
        copy(&second, &kill);
        drop((whole, target));
        if moved == 3 {
            // The first segment had been moved.
            let all: Vec<_> = crate::log::segments(&kill.join("receive/g/log")).unwrap();
            let number = all[0];
            fs::rename(
                crate::log::segment_path(&kill.join("receive/g/log"), number),
                crate::log::segment_path(&kill.join("log/g"), number),
            )
            .unwrap();
        }
        let target = start(&kill);
        let wanted: &[u64] = if moved > 0 { &[2, 5] } else { &[2] };
        while kept(&target).len() < wanted.len() {
            std::thread::yield_now();
        }
        if moved == 0 {
            assert_eq!(received(&target, &stream), Ok(5), "it is taken in at the next try");
        }
        drop(target);
        compare(&kill, &models, &[2, 5]);
        fs::remove_dir_all(&kill).unwrap();
    }
}

/// A mark that comes back after a power cut, when an agent has written meanwhile: what the log has counts.
#[test]
fn what_the_log_went_on_without_is_thrown_away() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    let source = start(&first);
    let primary = four(&source);
    let target = start(&second);
    assert_eq!(received(&target, &sent(&source, None, 2)), Ok(2));
    let mut receiver = begin_receiving(&target);
    receiver.feed(&sent(&source, Some(2), 4)).unwrap();
    let whole = receiver.finish().unwrap();
    whole.incoming.mark().unwrap();
    let away = dir.path().join("away");
    copy(&second.join("receive/g"), &away);
    fs::remove_dir_all(second.join("receive/g")).unwrap();
    drop((whole, target));
    let target = start(&second);
    let mut agent = Primary::going_on(&target, &primary.models[&2], 2);
    agent.step(|model| model.touch(TOP));
    let models = agent.models.clone();
    drop(agent);
    drop(target);
    copy(&away, &second.join("receive/g"));
    drop(start(&second));
    compare(&second, &models, &[2, 3]);
    drop((primary, source));
}

/// A folder as it stands.
fn copy(from: &Path, to: &Path) {
    let done = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(done.success());
}
