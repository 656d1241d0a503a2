//! Real bytes, made by the code that writes them.

use std::fs;

use bfs_agent::backup::images::{self, ImageWriter, Line};
use bfs_agent::backup::index::{Node, Place};
use bfs_agent::log::segment::{Header, encode_commit};
use bfs_agent::log::writer::{Batch, LogWriter};
use bfs_agent::log::{LogError, segment_path};
use bfs_common::codec;
use bfs_common::record::*;
use bfs_common::wire::*;
use bytes::{Bytes, BytesMut};

pub const GROUP: GroupId = GroupId([7; 16]);
pub const FROM: CheckpointId = CheckpointId(3);

const FILE: ObjectId = ObjectId(2);

fn name(text: &str) -> Name {
    Name::new(text.as_bytes()).unwrap()
}

/// One of each record.
fn records() -> Vec<(Record, &'static [u8])> {
    let meta = Meta { permissions: 0o644, uid: 1, gid: 2, mtime_sec: -5, mtime_nsec: 999_999_999 };
    let identity = Identity { ino: 77, ..Identity::default() };
    let object = |n, kind| Record::Object { object: ObjectId(n), identity, kind, device: 0, meta };
    vec![
        (Record::EpochBegin { epoch: Epoch(1), boot_id: [3; 16], complete: false }, b""),
        (Record::Gap { scope: GapScope::Everything }, b""),
        (object(1, FileKind::Directory), b""),
        (Record::Roots { roots: vec![(PathBytes::new("/data".as_ref()), ObjectId(1))] }, b""),
        (object(2, FileKind::Regular), b""),
        (object(3, FileKind::Symlink), b"target"),
        (Record::EntrySet { directory: ObjectId(1), name: name("file"), object: FILE }, b""),
        (Record::EntrySet { directory: ObjectId(1), name: name("link"), object: ObjectId(3) }, b""),
        (Record::Write { object: FILE, offset: 4096 }, b"some bytes of a file"),
        (Record::Zero { object: FILE, offset: 10, length: 20 }, b""),
        (Record::Truncate { object: FILE, size: 5000 }, b""),
        (Record::Meta { object: FILE, meta }, b""),
        (Record::XattrSet { object: FILE, name: "user.x".into() }, b"value"),
        (Record::XattrRemove { object: FILE, name: "user.x".into() }, b""),
        (Record::Rebind { object: FILE, identity }, b""),
        (Record::Gap { scope: GapScope::Range(FILE, 3, 9) }, b""),
        (Record::Repaired { scope: GapScope::Everything }, b""),
        (Record::Checkpoint { checkpoint: CheckpointId(1), label: CheckpointLabel::default() }, b""),
        (Record::EntryDelete { directory: ObjectId(1), name: name("file") }, b""),
        (Record::Forget { object: FILE }, b""),
        (Record::RollbackIntent { to: CheckpointId(1) }, b""),
        (Record::RollbackDone { to: CheckpointId(1) }, b""),
    ]
}

/// They, encoded one behind the other.
fn stream() -> (Vec<Bytes>, Vec<Position>) {
    let (mut all, mut positions) = (Vec::new(), Vec::new());
    let mut position = Position { epoch: Epoch(1), ..Position::START };
    for (record, payload) in records() {
        let mut out = BytesMut::new();
        position.sequence = position.sequence.next();
        codec::encode(&mut out, position.sequence, &record, payload);
        position.chain = codec::chain(position.chain, &out);
        all.push(out.freeze());
        positions.push(position);
    }
    (all, positions)
}

/// Streams of frames, as either side sends them.
pub fn frames() -> Vec<Vec<u8>> {
    let (records, positions) = stream();
    let position = *positions.last().unwrap();
    let object = CatalogObject {
        object: FILE,
        identity: Identity::default(),
        kind: FileKind::Directory,
        device: 0,
        meta: Meta::default(),
        size: 0,
        xattrs: vec![("user.x".into(), Bytes::from_static(b"value"))],
        target: Bytes::new(),
        entries: vec![(name("a"), ObjectId(4)), (name("b"), ObjectId(5))],
    };
    let roots = vec![(PathBytes::new("/data".as_ref()), ObjectId(1))];
    let manifest = ManifestLine {
        root: 0,
        path: PathBytes::new("x/y".as_ref()),
        object: FILE,
        kind: FileKind::Regular,
        meta: Meta::default(),
        size: 9,
        device: 0,
        content: [1; 32],
        xattrs: [2; 32],
    };
    let xattrs = vec![("user.x".into(), Bytes::from_static(b"value"))];
    let newest = NewestFile { size: 9, meta: Meta::default(), xattrs };
    let (group, checkpoint, at) = ("g".to_owned(), CheckpointId(1), CheckpointId(1));
    let all = vec![
        Frame::ReadKeys,
        Frame::KeysRead { ended: 1 },
        Frame::Hello {
            group: group.clone(),
            group_id: GROUP,
            boot_id: [4; 16],
            epoch: Some(Epoch(1)),
            take_over: true,
            maps: vec![(PathBytes::new("/a".as_ref()), PathBytes::new("b".as_ref()))],
            lz4: true,
        },
        Frame::Welcome {
            epoch: Epoch(1),
            position,
            confirmed: checkpoint,
            applied: checkpoint,
            highest_object: FILE,
            gaps: vec![GapScope::Everything, GapScope::Entry(FILE, name("n"))],
            roots: roots.clone(),
            boot_id: [5; 16],
            adopt: Some(PathBytes::new("/".as_ref())),
            lz4: true,
        },
        Frame::Ack { position, confirmed: checkpoint, applied: checkpoint, state: StoreState::Stuck },
        Frame::Refused(Refusal::Full("why".into())),
        Frame::GetCatalog,
        Frame::Catalog { objects: vec![object.clone(); 3], last: true },
        Frame::GetManifest { group: group.clone(), at_least: at },
        Frame::Manifest {
            checkpoint,
            roots: vec![PathBytes::new("/data".as_ref())],
            lines: vec![manifest; 3],
            last: true,
        },
        Frame::GetTree { group: group.clone(), at, digests: Digests::Changed },
        Frame::Tree {
            checkpoint,
            label: CheckpointLabel::default(),
            roots,
            objects: vec![TreeObject { object, changed: true, content: Some([6; 32]) }],
            last: true,
        },
        Frame::GetContents { group: group.clone(), at, objects: vec![FILE, ObjectId(9)] },
        Frame::GetDigests { group: group.clone(), position: Sequence(7) },
        Frame::Digests {
            lines: vec![DigestLine { object: FILE, digests: Bytes::from_static(&[7; 32]) }],
            last: true,
        },
        Frame::GetNewest { group: group.clone(), object: FILE, at_least: Sequence(7) },
        Frame::Newest { position: Sequence(9), file: Some(newest) },
        Frame::GetDamage { group, heal: true, suspects: vec![FILE, ObjectId(9)] },
        Frame::Damage { objects: vec![FILE; 3], last: true },
        Frame::Status { groups: vec![GroupStatus::default(); 2] },
        Frame::Ping(u64::MAX),
    ];
    let mut streams: Vec<Vec<u8>> = all.iter().map(|frame| encode_frame(frame, b"").to_vec()).collect();
    let whole = Frame::Records { first: Sequence(1), count: records.len() as u32 };
    streams.push(encode_frame(&whole, &records.concat()).to_vec());
    let plain = records.concat();
    let body = pack(&plain).expect("records have much in common");
    let (count, plain_len) = (records.len() as u32, plain.len() as u32);
    streams.push(encode_frame(&Frame::Packed { first: Sequence(1), count, plain_len }, &body).to_vec());
    let one_by_one = records
        .iter()
        .zip(1..)
        .map(|(record, n)| encode_frame(&Frame::Records { first: Sequence(n), count: 1 }, record).to_vec());
    streams.push(one_by_one.collect::<Vec<_>>().concat());
    streams
}

/// Segments of one batch and of several; the last one in a file that was a segment before.
pub fn segments() -> Vec<Vec<u8>> {
    let (records, positions) = stream();
    let mut all: Vec<Vec<u8>> = [records.len(), 5, 1]
        .map(|at_once| {
            let dir = super::folder();
            let (mut log, _) =
                LogWriter::open(dir.path(), GROUP, Position::START, |_| Ok::<_, LogError>(())).unwrap();
            for (n, some) in records.chunks(at_once).enumerate() {
                let before = log.durable();
                let after = positions[n * at_once + some.len() - 1];
                log.append(&[Batch { bytes: some.concat().into(), before, after }]).unwrap();
            }
            fs::read(segment_path(dir.path(), 1)).unwrap()
        })
        .into();
    let mark = 9;
    let header = Header { group: GROUP, first: Sequence(1), before: Position::START, mark: Some(mark) };
    let mut renewed = header.encode().to_vec();
    for (record, position) in records.iter().zip(&positions).take(records.len() / 2) {
        renewed.extend_from_slice(record);
        let commit = encode_commit(mark, renewed.len() as u64, position);
        renewed.extend_from_slice(&commit);
    }
    let before = &all[2][renewed.len()..];
    renewed.extend_from_slice(before);
    all.push(renewed);
    all
}

/// Files with lines of each kind.
pub fn images() -> Vec<Vec<u8>> {
    let node = Node {
        identity: Identity::default(),
        kind: FileKind::Regular,
        device: 0,
        meta: Meta::default(),
        size: 100_000,
        xattrs: vec![("user.x".into(), Bytes::from_static(b"value"))],
        target: Bytes::new(),
        places: vec![Place::Entry(ObjectId(1), name("file")), Place::Root(PathBytes::new("/r".as_ref()))],
        ino: 12,
    };
    let lines: Vec<(Line, Vec<u8>)> = vec![
        (Line::Object(FILE, Some(node)), vec![]),
        (Line::Object(ObjectId(3), None), vec![]),
        (Line::Bytes(FILE, 4096), b"some bytes".to_vec()),
        (Line::Zero(FILE, 8192, 20_000), vec![]),
        (Line::Entry(ObjectId(1), name("file"), Some(FILE)), vec![]),
        (Line::Bytes(FILE, 65_536), vec![9; 3000]),
    ];
    [0, 1, lines.len()]
        .map(|count| {
            let dir = super::folder();
            let mut writer = ImageWriter::begin(dir.path(), GROUP, FROM, CheckpointId(4)).unwrap();
            lines[..count].iter().for_each(|(line, data)| writer.line(line, data).unwrap());
            writer.seal().unwrap();
            fs::read(images::path(dir.path(), FROM)).unwrap()
        })
        .into()
}
