//! Tests of checksums: rows, changes, comparing.

use super::*;
use crate::log::LogRef;
use proptest::prelude::*;
use std::collections::BTreeMap;

const FILE: ObjectId = ObjectId(7);

#[derive(Default)]
struct Rows(BTreeMap<u64, SumRow>);

impl Sums for Rows {
    fn row(&self, row: u64) -> Result<Option<SumRow>, BackupError> {
        Ok(self.0.get(&row).cloned())
    }
    fn next_row(&self, row: u64) -> Result<Option<u64>, BackupError> {
        Ok(self.0.range(row..).next().map(|(row, _)| *row))
    }
}

#[test]
fn golden_bytes_of_a_row() {
    let mut row = SumRow { whole: true, ..SumRow::default() };
    row.set(ROW_BLOCKS + 9, 0x0403_0201);
    row.set(ROW_BLOCKS, 0x0807_0605);
    let bytes = row.encode();
    assert_eq!(bytes, [1, 1, 2, 0, 0, 0, 0, 0, 0, 5, 6, 7, 8, 1, 2, 3, 4]);
    assert_eq!(SumRow::decode(&bytes), Some(row.clone()));
    assert_eq!((row.get(0), row.get(9), row.get(10)), (Some(0x0807_0605), Some(0x0403_0201), None));
    for cut in 0..bytes.len() {
        assert_eq!(SumRow::decode(&bytes[..cut]), None, "{cut}");
    }
    row.clear(0);
    assert_eq!((row.get(0), row.get(9), row.encode().len()), (None, Some(0x0403_0201), 13));
    // A flipped bit is no row, or another one: the index has checksums of its own.
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert_ne!(SumRow::decode(&flipped), SumRow::decode(&bytes), "bit {bit}");
    }
}

#[derive(Clone, Debug)]
enum Op {
    Write(u64, u64),
    Zero(u64, u64),
    Truncate(u64),
}

/// Offsets near the borders of blocks and of rows.
fn offset() -> impl Strategy<Value = u64> {
    (prop_oneof![0..4u64, 62..67u64], prop_oneof![Just(0), Just(1), Just(100), 0..BLOCK_BYTES])
        .prop_map(|(block, at)| block * BLOCK_BYTES + at)
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (offset(), 1..200_000u64).prop_map(|(o, l)| Op::Write(o, l)),
        (offset(), 1..300_000u64).prop_map(|(o, l)| Op::Zero(o, l)),
        offset().prop_map(Op::Truncate),
    ]
}

/// The content that some operations come to, done to the file as well.
fn done(ops: &[Op], file: &File, seed: &mut u8) -> Content {
    use bfs_common::record::Record;
    let mut target = super::super::target::Target::default();
    let at = LogRef { segment: 1, offset: 0 };
    let mut fold = |record, payload: Vec<u8>| target.fold(record, &payload.into(), at).unwrap();
    for op in ops {
        match op {
            Op::Write(offset, length) => {
                *seed = seed.wrapping_add(1);
                let bytes = vec![*seed | 1; *length as usize];
                file.write_all_at(&bytes, *offset).unwrap();
                fold(Record::Write { object: FILE, offset: *offset }, bytes);
            }
            Op::Zero(offset, length) => {
                let size = file.metadata().unwrap().len();
                let end = (offset + length).min(size);
                if *offset < end {
                    file.write_all_at(&vec![0; (end - offset) as usize], *offset).unwrap();
                }
                fold(Record::Zero { object: FILE, offset: *offset, length: *length }, Vec::new());
            }
            Op::Truncate(size) => {
                file.set_len(*size).unwrap();
                fold(Record::Truncate { object: FILE, size: *size }, Vec::new());
            }
        }
    }
    target.objects.remove(&FILE).map(|c| c.content).unwrap_or_default()
}

/// A step that empties a file of which most is a hole does not read the hole; what is in it must still be as it was.
#[test]
fn holes_cost_nothing_and_are_looked_at() {
    const SIZE: u64 = 1 << 40;
    let file = tempfile::tempfile().unwrap();
    file.set_len(SIZE).unwrap();
    file.write_all_at(b"bytes", SIZE / 2).unwrap();
    let mut rows = Rows::default();
    compare_new(&file, SIZE).apply(&mut rows);
    let mut target = super::super::target::Target::default();
    let empty = bfs_common::record::Record::Truncate { object: FILE, size: 0 };
    target.fold(empty, &bytes::Bytes::new(), LogRef { segment: 1, offset: 0 }).unwrap();
    let content = target.objects.remove(&FILE).unwrap().content;
    let looked = |file: &File| look(&rows, FILE, file, &content, SIZE, &mut Vec::new(), None).unwrap();
    assert!(looked(&file).is_empty());
    let block = |at: u64| (at, at + BLOCK_BYTES);
    // Bytes in a hole, and a hole where bytes were.
    file.write_all_at(b"more", SIZE / 4 + 9).unwrap();
    assert_eq!(looked(&file).iter().collect::<Vec<_>>(), [block(SIZE / 4)]);
    file.set_len(SIZE / 2).unwrap();
    file.set_len(SIZE).unwrap();
    assert_eq!(looked(&file).iter().collect::<Vec<_>>(), [block(SIZE / 4), block(SIZE / 2)]);
}

/// The checksums of a file that had none.
fn compare_new(file: &File, size: u64) -> SumChange {
    compare(&Rows::default(), file, size).unwrap().unknown.unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// However a file comes about, its checksums fit; a byte that is spoiled is found, in its block; and
    /// where a file began without checksums, only what was written since is known.
    #[test]
    fn checksums_follow_the_changes(
        steps in prop::collection::vec(prop::collection::vec(op(), 0..4), 1..5),
        old in any::<bool>(),
        spoil in any::<u64>(),
    ) {
        let file = tempfile::tempfile().unwrap();
        let (mut rows, mut seed, mut before) = (Rows::default(), 0, None);
        if old {
            file.write_all_at(&[9; 70_000], 0).unwrap();
            before = Some(70_000);
        }
        for ops in &steps {
            let content = done(ops, &file, &mut seed);
            let size = file.metadata().unwrap().len();
            prop_assert_eq!(content.size(before.unwrap_or(0)), size);
            let mut change = of_change(FILE, &file, &content, before, size, &Damage::default(), &mut Vec::new()).unwrap();
            if before.is_none() {
                change.fresh = true;
            }
            change.apply(&mut rows);
            before = Some(size);
            let found = compare(&rows, &file, size).unwrap();
            prop_assert_eq!(&found.bad, &[]);
            prop_assert_eq!(&found.unreadable, &[]);
            prop_assert!(old || found.unknown.is_none());
        }
        let size = before.unwrap();
        if let Some(all) = compare(&rows, &file, size).unwrap().unknown {
            all.apply(&mut rows);
        }
        let found = compare(&rows, &file, size).unwrap();
        prop_assert!(found.bad.is_empty() && found.unknown.is_none(), "{:?}", found);
        if size > 0 {
            let at = spoil % size;
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 64], at).unwrap();
            let found = compare(&rows, &file, size).unwrap();
            prop_assert_eq!(found.bad, [range(at / BLOCK_BYTES, size)]);
        }
    }
}

impl SumChange {
    fn apply(&self, rows: &mut Rows) {
        let edit = Edit::of(self);
        edit.gone.iter().for_each(|(first, end)| rows.0.retain(|row, _| !(first..end).contains(&row)));
        for number in edit.rows {
            let row = self.row(number, rows.0.get(&number));
            match row {
                Some(row) => rows.0.insert(number, row),
                None => rows.0.remove(&number),
            };
        }
    }
}
