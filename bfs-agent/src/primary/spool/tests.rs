//! The folder of a spool: its owner, its bounds, what is left of it, reading while it is written.

use bfs_common::codec;
use bfs_common::record::{ChainHash, ObjectId, Record};
use bytes::BytesMut;

use super::*;

const GROUP: GroupId = GroupId([3; 16]);

fn open(dir: &Path, bytes_max: u64) -> Result<Spool, SpoolError> {
    let options = SpoolOptions { directory: dir.into(), bytes_max, ..SpoolOptions::default() };
    Spool::open(options, Address::new("g", GROUP, [1; 16]))
}

fn batch(before: Position, count: u64, length: usize) -> Batch {
    let (mut bytes, mut after) = (BytesMut::new(), before);
    for _ in 0..count {
        let start = bytes.len();
        after.sequence = after.sequence.next();
        let record = Record::Write { object: ObjectId(1), offset: after.sequence.0 };
        codec::encode(&mut bytes, after.sequence, &record, &vec![9; length]);
        after.chain = codec::chain(after.chain, &bytes[start..]);
    }
    Batch { bytes: bytes.freeze(), before, after }
}

#[test]
fn a_spool_has_one_owner_and_leaves_nothing_when_it_is_empty() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = open(dir.path(), 1 << 20).unwrap();
    assert!(matches!(open(dir.path(), 1 << 20), Err(SpoolError::InUse(_))));
    let first = batch(Position::START, 2, 10);
    spool.append(Position::START, std::slice::from_ref(&first), false).unwrap();
    drop(spool);
    let mut spool = open(dir.path(), 1 << 20).unwrap();
    assert_eq!(spool.left().unwrap().unwrap().end, first.after);
    spool.clear().unwrap();
    assert!(spool.left().unwrap().is_none());
    drop(spool);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn records_are_read_back_from_anywhere_while_it_grows_and_shrinks() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = open(dir.path(), 64 << 10).unwrap();
    let mut at = Position::START;
    let mut chains = vec![ChainHash::START];
    let grow = |spool: &mut Spool, at: &mut Position, chains: &mut Vec<ChainHash>| {
        let next = batch(*at, 3, 1000);
        let mut bytes = next.bytes.clone();
        while let Some(record) = codec::take(&mut bytes).unwrap() {
            chains.push(record.chain(*chains.last().unwrap()));
        }
        spool.append(*at, std::slice::from_ref(&next), false).unwrap();
        *at = next.after;
    };
    grow(&mut spool, &mut at, &mut chains);
    let mut reader = Reader::open(spool.log(), GROUP, Sequence(0), Sequence(0)).unwrap();
    let mut read = 0;
    for _ in 0..12 {
        grow(&mut spool, &mut at, &mut chains);
        while read < at.sequence.0 {
            let got = reader.read(at.sequence, 1500).unwrap();
            assert_eq!(got.first.0, read + 1);
            read = got.last().0;
            assert_eq!(got.chain_after, chains[read as usize]);
        }
    }
    assert!(spool.segments.len() > 3, "of many segments");
    for after in 0..at.sequence.0 {
        let mut reader = Reader::open(spool.log(), GROUP, Sequence(after), Sequence(0)).unwrap();
        assert_eq!(reader.at(), (Sequence(after), chains[after as usize]));
        assert_eq!(reader.read(at.sequence, 1).unwrap().first.0, after + 1);
    }
    let before = spool.bytes();
    assert!(spool.has_done(Sequence(20)));
    spool.acknowledged(Sequence(20)).unwrap();
    assert!(spool.bytes() < before && !spool.has_done(Sequence(20)));
    Reader::open(spool.log(), GROUP, Sequence(20), Sequence(20)).unwrap();
    assert!(Reader::open(spool.log(), GROUP, Sequence(1), Sequence(1)).is_err());
}

#[test]
fn bounds_hold_and_what_was_there_stays() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = open(dir.path(), 5000).unwrap();
    let first = batch(Position::START, 1, 3000);
    let second = batch(first.after, 1, 3000);
    spool.append(Position::START, std::slice::from_ref(&first), false).unwrap();
    let full = spool.append(first.after, std::slice::from_ref(&second), false);
    assert!(matches!(full, Err(SpoolError::Full(_))));
    // Notes have room of their own.
    let third = batch(first.after, 1, 1500);
    assert!(matches!(
        spool.append(first.after, std::slice::from_ref(&third), false),
        Err(SpoolError::Full(_))
    ));
    spool.append(first.after, std::slice::from_ref(&third), true).unwrap();
    let second = batch(third.after, 1, 3000);
    let first = third;
    spool.options.bytes_max = 1 << 20;
    spool.options.time_max = Duration::ZERO;
    let old = spool.append(first.after, std::slice::from_ref(&second), false);
    assert!(matches!(old, Err(SpoolError::Old(_))));
    spool.options.time_max = Duration::from_secs(60);
    spool.append(first.after, std::slice::from_ref(&second), false).unwrap();
    assert_eq!(spool.left().unwrap().unwrap().end, second.after);
}

#[test]
fn an_address_of_the_format_before_is_taken_and_of_another_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = open(dir.path(), 1 << 20).unwrap();
    let first = batch(Position::START, 1, 10);
    spool.append(Position::START, &[first], false).unwrap();
    let path = spool.dir().join("address");
    let text = fs::read_to_string(&path).unwrap();
    // Before there were keys it had the file of a secret.
    let before = text.replace("\"format\": 2", "\"format\": 1").replace("\"keys\":", "\"secret_file\":");
    assert_ne!(before, text);
    fs::write(&path, before).unwrap();
    assert!(spool.left().unwrap().is_some());
    fs::write(&path, text.replace("\"format\": 2", "\"format\": 3")).unwrap();
    assert!(matches!(spool.left(), Err(SpoolError::Address { .. })));
}
