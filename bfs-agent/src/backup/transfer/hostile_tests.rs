//! Streams of whoever makes them.

use std::collections::BTreeSet;
use std::fs;

use bfs_common::record::*;

use super::tests::{GROUP, ID, four, kept, moment, received, sent, some, start, stream};
use super::{Head, Item, Reader};
use crate::backup::ReplayerHandle;
use crate::backup::check;
use crate::backup::model::TOP;

/// The head of a stream that follows checkpoint 4.
fn head(source: &ReplayerHandle) -> Head {
    let mut reader = Reader::new();
    reader.feed(&sent(source, Some(3), 4));
    let Ok(Some(Item::Head(head))) = reader.next() else { panic!() };
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
