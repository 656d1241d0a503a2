//! Sets of images as they come in, are read, and go.

use proptest::prelude::*;

use super::put::{Begun, Put, PutError};
use super::*;

const GROUP: GroupId = GroupId([4; 16]);

type Images = Vec<(String, Vec<u8>)>;

fn open(dir: &Path) -> Arc<Sets> {
    Arc::new(Sets::open(dir.into(), GROUP).unwrap())
}

fn begin(sets: &Arc<Sets>, at: u64) -> Box<Put> {
    match sets.begin(CheckpointId(at), at as i64) {
        Ok(Begun::Put(put)) => put,
        other => panic!("{other:?}"),
    }
}

/// As an agent does it; gives how many blocks were wanted.
fn send(put: &mut Put, images: &Images) -> Result<usize, PutError> {
    let mut sent = 0;
    for (name, bytes) in images {
        let blocks: Vec<&[u8]> = bytes.chunks(PROCESS_BLOCK).collect();
        // One frame at least, also of an empty file.
        for some in blocks.chunks(3).chain(blocks.is_empty().then_some(&[][..])) {
            let digests: Vec<u8> = some.iter().flat_map(|block| *blake3::hash(block).as_bytes()).collect();
            let (wanted, total) = put.blocks(name, bytes.len() as u64, &digests)?;
            let is_wanted = |index: &usize| wanted[index / 8] & (1 << (index % 8)) != 0;
            let wanted: Vec<&[u8]> = (0..some.len()).filter(is_wanted).map(|index| some[index]).collect();
            assert_eq!(total, wanted.concat().len() as u64);
            sent += wanted.len();
            for pair in wanted.chunks(2) {
                put.bytes(&pair.concat())?;
            }
        }
    }
    Ok(sent)
}

fn store(sets: &Arc<Sets>, at: u64, images: &Images) -> usize {
    let mut put = begin(sets, at);
    let sent = send(&mut put, images).unwrap();
    put.end().unwrap();
    sent
}

fn read(sets: &Sets, at: u64) -> Result<Images, BackupError> {
    let mut found: Images = Vec::new();
    sets.read(CheckpointId(at), |file, bytes| {
        if found.last().is_none_or(|(name, _)| name != file) {
            found.push((file.into(), Vec::new()));
        }
        found.last_mut().unwrap().1.extend_from_slice(bytes);
        true
    })?;
    Ok(found)
}

/// A file whose blocks have these bytes, and a short last one.
fn pages(bytes: &[u8]) -> Vec<u8> {
    let mut out: Vec<u8> = bytes.iter().flat_map(|byte| [*byte; PROCESS_BLOCK]).collect();
    out.extend_from_slice(b"tail");
    out
}

fn images(bytes: &[u8]) -> Images {
    vec![
        ("pages-1.img".into(), pages(bytes)),
        ("empty".into(), Vec::new()),
        ("core-2.img".into(), vec![7; 10]),
    ]
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_the_one_before_has_is_not_sent_again_and_stays_for_as_long_as_it_is_needed() {
    let dir = tempfile::tempdir().unwrap();
    let sets = open(dir.path());
    // Of equal blocks one: three different pages, the tail, the core.
    assert_eq!(store(&sets, 1, &images(&[1, 2, 3, 1])), 5);
    assert_eq!(store(&sets, 2, &images(&[1, 9, 3, 1])), 1);
    drop(sets);
    // Also by one who has to read them first.
    let sets = open(dir.path());
    assert_eq!(store(&sets, 3, &images(&[1, 9, 3, 8])), 1);
    for (at, bytes) in [(1, [1, 2, 3, 1]), (2, [1, 9, 3, 1]), (3, [1, 9, 3, 8])] {
        assert_eq!(read(&sets, at).unwrap(), images(&bytes));
        assert_eq!(sets.bytes(CheckpointId(at), at as i64), Some(4 * 4096 + 4 + 10));
    }
    assert_eq!(sets.bytes(CheckpointId(3), 99), None, "of another checkpoint with this number");
    sets.retain(|at| at == CheckpointId(3)).unwrap();
    assert_eq!(names(dir.path()).iter().filter(|name| name.ends_with(".set")).count(), 1);
    assert_eq!(names(dir.path()).iter().filter(|name| name.ends_with(".pages")).count(), 3);
    assert_eq!(read(&sets, 3).unwrap(), images(&[1, 9, 3, 8]));
    assert_eq!(store(&sets, 4, &images(&[5, 5, 5, 5])), 1);
    sets.retain(|at| at == CheckpointId(4)).unwrap();
    // Of 1 the tail and the core are needed still.
    let left = names(dir.path());
    assert_eq!(left.len(), 3, "{left:?}");
    assert!(check(dir.path(), GROUP, true).unwrap().is_empty());
    let mode =
        |name: &String| std::os::unix::fs::MetadataExt::mode(&fs::metadata(dir.path().join(name)).unwrap());
    assert!(left.iter().all(|name| mode(name) & 0o777 == 0o600));
}

#[test]
fn a_set_is_there_as_a_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let sets = open(dir.path());
    store(&sets, 1, &images(&[1]));
    let mut put = begin(&sets, 2);
    send(&mut put, &images(&[2])).unwrap();
    assert!(matches!(sets.begin(CheckpointId(3), 3), Err(PutError::Busy)));
    drop(put);
    assert_eq!(sets.bytes(CheckpointId(2), 2), None);
    assert_eq!(names(dir.path()).len(), 2);
    // A kill leaves files, which the next start removes: also pages whose description was not named.
    fs::write(dir.path().join("00000000000000000002.pages.new"), "x").unwrap();
    fs::write(dir.path().join("00000000000000000002.set.new"), "x").unwrap();
    fs::write(dir.path().join("00000000000000000002.pages"), "x").unwrap();
    let sets = open(dir.path());
    sets.retain(|_| true).unwrap();
    assert_eq!(names(dir.path()).len(), 2);
    store(&sets, 2, &images(&[2]));
    // Once more is no harm, an earlier one is not taken.
    assert!(matches!(sets.begin(CheckpointId(2), 2), Ok(Begun::There)));
    assert!(matches!(sets.begin(CheckpointId(1), 7), Err(PutError::Bad(_))));
}

#[test]
fn what_makes_no_sense_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let sets = open(dir.path());
    let digest = |bytes: &[u8]| *blake3::hash(bytes).as_bytes();
    let bad = |why: &str, work: &mut dyn FnMut(&mut Put) -> Result<(), PutError>| {
        let mut put = begin(&sets, 1);
        match work(&mut put) {
            Err(PutError::Bad(text)) => assert!(text.contains(why), "{text}"),
            other => panic!("{why}: {other:?}"),
        }
    };
    bad("called", &mut |put| put.blocks("../x", 0, &[]).map(drop));
    bad("called", &mut |put| put.blocks("x", 0, &[]).and(put.blocks("x", 0, &[])).map(drop));
    bad("cut off", &mut |put| put.blocks("x", 10, &[0; 31]).map(drop));
    bad("more or fewer", &mut |put| put.blocks("x", 10, &[0; 64]).map(drop));
    bad("more or fewer", &mut |put| put.blocks("x", 10, &[]).map(drop));
    bad("did not come", &mut |put| {
        put.blocks("x", 10, &digest(b"0123456789")).and(put.blocks("y", 0, &[])).map(drop)
    });
    bad("before the file", &mut |put| {
        put.blocks("x", 8192, &digest(&[1; 4096]))?;
        put.bytes(&[1; 4096])?;
        put.blocks("y", 0, &[]).map(drop)
    });
    bad("nobody wants", &mut |put| put.bytes(b"x"));
    bad("does not fit", &mut |put| {
        put.blocks("x", 3, &digest(b"abc"))?;
        put.bytes(b"abd")
    });
    bad("block is cut off", &mut |put| {
        put.blocks("x", 3, &digest(b"abc"))?;
        put.bytes(b"ab")
    });
    let mut put = begin(&sets, 1);
    put.blocks("x", 3, &digest(b"abc")).unwrap();
    assert!(matches!(put.end(), Err(PutError::Bad(_))));
    assert!(matches!(begin(&sets, 1).end(), Err(PutError::Bad(_))));
    assert!(names(dir.path()).is_empty());
}

#[test]
fn damage_is_named_and_never_given_out() {
    let dir = tempfile::tempdir().unwrap();
    let sets = open(dir.path());
    store(&sets, 1, &images(&[1, 2]));
    store(&sets, 2, &images(&[1, 3]));
    let path = dir.path().join("00000000000000000001.pages");
    let mut bytes = fs::read(&path).unwrap();
    bytes[set::slot_at(0) as usize + 17] ^= 4;
    fs::write(&path, bytes).unwrap();
    for at in [1, 2] {
        assert!(matches!(read(&sets, at), Err(BackupError::Corrupt { .. })), "{at}");
    }
    let found = check(dir.path(), GROUP, true).unwrap();
    assert_eq!(found.iter().map(|(at, ..)| at.0).collect::<Vec<_>>(), [1, 2]);
    assert!(found[0].2.contains("slot 0"), "{found:?}");
    assert!(check(dir.path(), GROUP, false).unwrap().is_empty());
    // The next one does not build on it.
    let sets = open(dir.path());
    assert_eq!(store(&sets, 3, &images(&[1, 3])), 4);
    assert_eq!(read(&sets, 3).unwrap(), images(&[1, 3]));
    fs::remove_file(&path).unwrap();
    assert_eq!(check(dir.path(), GROUP, false).unwrap().len(), 2);
}

#[test]
fn the_oldest_go_where_all_are_too_much() {
    let dir = tempfile::tempdir().unwrap();
    let sets = open(dir.path());
    for at in 1..=4 {
        store(&sets, at, &images(&[at as u8; 1]));
    }
    assert!(sets.beyond(1 << 30).is_empty());
    let gone = sets.beyond(0);
    assert_eq!(gone, (1..=3).map(CheckpointId).collect());
}

proptest! {
    #[test]
    fn sets_are_read_as_they_were_sent(
        all in prop::collection::vec((prop::collection::vec(0u8..6, 0..9), any::<bool>(), any::<bool>()), 1..8)) {
        let dir = tempfile::tempdir().unwrap();
        let mut sets = open(dir.path());
        let mut kept = BTreeMap::new();
        for (at, (bytes, reopen, drop_oldest)) in all.into_iter().enumerate() {
            let at = at as u64 + 1;
            store(&sets, at, &images(&bytes));
            kept.insert(CheckpointId(at), images(&bytes));
            if drop_oldest && kept.len() > 1 {
                kept.pop_first();
            }
            sets.retain(|at| kept.contains_key(&at)).unwrap();
            if reopen {
                sets = open(dir.path());
            }
            for (at, images) in &kept {
                prop_assert_eq!(&read(&sets, at.0).unwrap(), images);
            }
        }
    }
}
