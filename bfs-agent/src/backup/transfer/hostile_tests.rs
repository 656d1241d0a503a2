//! Streams of whoever makes them.

use std::collections::BTreeSet;
use std::fs;

use bfs_common::record::*;
use bfs_common::wire::Digests;
use proptest::prelude::*;

use super::tests::{GROUP, ID, client, four, kept, moment, received, sent, some, start, stream};
use crate::backup::ReplayerHandle;
use crate::backup::check;
use crate::backup::model::TOP;
use crate::generation::Tree;
use crate::transfer::{Head, Item, Reader};

/// The head of a stream that follows checkpoint 4.
fn head(source: &ReplayerHandle) -> Head {
    let mut reader = Reader::default();
    reader.feed(&sent(source, Some(3), 4));
    let Ok(Some(Item::Head(head))) = reader.next_item() else { panic!() };
    Head { group: GROUP.into(), id: ID, from: Some(head.to), to: moment(5) }
}

/// Whoever makes the stream: nothing but objects and entries, sensible together, enters.
#[test]
fn a_hostile_stream_is_refused_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    let source = start(&first);
    let primary = four(&source);
    let target = start(&second);
    assert_eq!(received(&target, &sent(&source, None, 4)), Ok(4));
    let head = head(&source);
    let name = |text: &str| Name::new(text.as_bytes()).unwrap();
    let meta = Meta { permissions: 0o755, ..Meta::default() };
    let new = |object: u64, kind| {
        (
            Record::Object { object: ObjectId(object), identity: Identity::default(), kind, device: 0, meta },
            Vec::new(),
        )
    };
    let entry = |directory: u64, text: &str, object: u64| {
        let (directory, object) = (ObjectId(directory), ObjectId(object));
        (Record::EntrySet { directory, name: name(text), object }, Vec::new())
    };
    let end = || some().pop().unwrap();
    let bare = |record: Record| (record, Vec::new());
    let dir_kind = FileKind::Directory;
    let roots = |path: &str| bare(Record::Roots { roots: vec![(PathBytes::new(path.as_ref()), TOP)] });
    type Records = Vec<(Record, Vec<u8>)>;
    let cases: Vec<(&str, Records)> = vec![
        ("no checkpoint", vec![new(900, dir_kind)]),
        (
            "another checkpoint",
            vec![bare(Record::Checkpoint { checkpoint: CheckpointId(9), label: CheckpointLabel::default() })],
        ),
        ("two checkpoints", vec![end(), end()]),
        (
            "an epoch",
            vec![bare(Record::EpochBegin { epoch: Epoch(9), boot_id: [0; 16], complete: true }), end()],
        ),
        ("a gap", vec![bare(Record::Gap { scope: GapScope::Everything }), end()]),
        ("a rollback", vec![bare(Record::RollbackIntent { to: CheckpointId(1) }), end()]),
        ("a number twice", vec![new(1, dir_kind), end()]),
        ("an entry nowhere", vec![entry(901, "x", 1), end()]),
        (
            "directories in each other",
            vec![new(900, dir_kind), new(901, dir_kind), entry(900, "b", 901), entry(901, "a", 900), end()],
        ),
        ("no root", vec![roots("/"), end()]),
        ("a root above", vec![roots("/a/../b"), end()]),
        ("other roots", vec![roots("/elsewhere"), end()]),
        ("bytes of a directory", vec![(Record::Write { object: TOP, offset: 0 }, b"x".to_vec()), end()]),
        (
            "a range that no file has",
            vec![
                new(900, FileKind::Regular),
                bare(Record::Truncate { object: ObjectId(900), size: u64::MAX }),
                end(),
            ],
        ),
    ];
    for (what, records) in &cases {
        assert!(received(&target, &stream(&head, records)).is_err(), "{what}");
        assert_eq!(kept(&target), [4], "{what}");
        assert!(target.status()[0].trouble.is_none(), "{what}: {:?}", target.status());
    }
    // What the same things are in a stream that is sound.
    let good =
        vec![new(900, dir_kind), new(901, dir_kind), entry(900, "b", 901), entry(1, "fresh", 900), end()];
    assert_eq!(received(&target, &stream(&head, &good)), Ok(5));
    assert!(second.join("tree/g/r/fresh/b").is_dir());
    drop(primary);
    drop((source, target));
    let report = check::check(&second, true, &[]).unwrap();
    assert_eq!(report.problems, []);
    let entries: BTreeSet<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(entries.len(), 2, "nothing beside the stores");
}

/// All of a checkpoint.
fn state(replayer: &ReplayerHandle, at: u64) -> Tree {
    let mut client = client(replayer);
    let mut tree = client.tree(GROUP, CheckpointId(at), Digests::All).unwrap();
    tree.objects.values_mut().for_each(|object| object.changed = false);
    tree
}

/// Anything about objects that are there and others.
fn record((op, a, b, c): (u8, u8, u8, u8)) -> (Record, Vec<u8>) {
    let pick = |n: u8| ObjectId(if n.is_multiple_of(3) { 900 + u64::from(n % 5) } else { u64::from(n % 16) });
    let name = |n: u8| Name::new(format!("n{}", n % 4).as_bytes()).unwrap();
    let kinds =
        [FileKind::Regular, FileKind::Directory, FileKind::Directory, FileKind::Fifo, FileKind::Symlink];
    let kind = kinds[usize::from(b) % kinds.len()];
    let meta = Meta { permissions: 0o755, mtime_sec: i64::from(c), ..Meta::default() };
    let (object, offset, size) = (pick(a), u64::from(b) * 500, u64::from(c) * 700);
    let record = match op % 13 {
        0 | 1 => Record::Object {
            object: ObjectId(900 + u64::from(a % 5)),
            identity: Identity::default(),
            kind,
            device: 0,
            meta,
        },
        2..=5 => Record::EntrySet { directory: object, name: name(c), object: pick(b) },
        6 => Record::EntryDelete { directory: object, name: name(c) },
        7 => Record::Forget { object },
        8 => Record::Write { object, offset },
        9 => Record::Truncate { object, size },
        10 => Record::Zero { object, offset, length: size },
        11 => Record::Meta { object, meta },
        _ => Record::XattrSet { object, name: "user.x".into() },
    };
    let payload = match &record {
        Record::Object { kind: FileKind::Symlink, .. } | Record::XattrSet { .. } => b"somewhere".to_vec(),
        Record::Write { .. } => vec![c | 1; 1 + usize::from(b) * 9],
        _ => Vec::new(),
    };
    (record, payload)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 400, ..ProptestConfig::default() })]

    /// Any records in any order are refused, or are a checkpoint like any other: nothing gets stuck, and those before it
    /// are what they were.
    #[test]
    fn any_records_are_refused_or_applied(ops in prop::collection::vec(any::<(u8, u8, u8, u8)>(), 1..24)) {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("first"), dir.path().join("second"));
        let source = start(&first);
        let primary = four(&source);
        let target = start(&second);
        prop_assert_eq!(received(&target, &sent(&source, None, 4)), Ok(4));
        let before = state(&target, 4);
        let whole = sent(&target, None, 4);
        // Numbers of objects go up, so that more than the first gets through.
        let mut records: Vec<_> = ops.into_iter().map(record).collect();
        records.sort_by_key(|(record, _)| match record {
            Record::Object { object, .. } => object.0,
            _ => u64::MAX,
        });
        records.dedup_by(|a, b| matches!((&a.0, &b.0), (Record::Object { object, .. }, Record::Object { object: other, .. }) if object == other));
        records.push(some().pop().unwrap());
        let taken = received(&target, &stream(&head(&source), &records));
        match &taken {
            Ok(number) => prop_assert_eq!(*number, 5),
            Err(_) => prop_assert_eq!(kept(&target), [4]),
        }
        prop_assert_eq!(&state(&target, 4), &before);
        if taken.is_ok() {
            // What it is can be sent on.
            let third = start(&dir.path().join("third"));
            prop_assert_eq!(received(&third, &whole), Ok(4));
            prop_assert_eq!(received(&third, &sent(&target, Some(4), 5)), Ok(5));
            prop_assert_eq!(state(&third, 5), state(&target, 5));
        }
        drop(primary);
        drop((source, target));
        prop_assert_eq!(check::check(&second, true, &[]).unwrap().problems, []);
    }
}
