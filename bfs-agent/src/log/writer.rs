//! The end of a log: opening it after whatever happened, appending, syncing, rotating.
//!
//! Order of writes: records of a batch, its commit, and in the header how far the file was synced
//! *before* the batch; then one `fdatasync`; only then is the batch acknowledged. A new segment is
//! synced, and its folder, before it gets a record. After a failed write or sync nothing since the
//! last good one counts, because a second `fsync` may report success for pages that were thrown
//! away: the segment is cut there, nothing is taken before that has worked, and a new one begins.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bfs_common::codec::CodecError;
use bfs_common::record::{GroupId, Record, Sequence};
use bfs_common::wire::Position;
use bytes::Bytes;

use super::segment::{self, COMMIT, HEADER, Header, Item, SegmentReader, Tail};
use super::{LogError, LogRecord, segment_path, segments, spares, sync_dir, write_again};
use crate::durable;
use crate::mutant::{self, Mutant};

/// A segment is ended when it is longer than this.
pub const SEGMENT_BYTES: u64 = 64 << 20;

/// The end of a group's log.
#[derive(Debug)]
pub struct LogWriter {
    dir: PathBuf,
    group: GroupId,
    segment: Option<Open>,
    /// A segment that failed and is not cut yet where it was last synced.
    stump: Option<Open>,
    /// The last synced record.
    durable: Position,
    segment_bytes: u64,
}

#[derive(Debug)]
struct Open {
    file: File,
    number: u64,
    /// What its commits say that they belong to.
    of_commits: u64,
    /// Bytes that are synced.
    synced: u64,
    /// Bytes of which the file says, durably, that they are.
    noted: u64,
}

/// Encoded records that follow one another.
#[derive(Clone, Debug)]
pub struct Batch {
    /// The records.
    pub bytes: Bytes,
    /// The position that they follow.
    pub before: Position,
    /// The position after the last of them.
    pub after: Position,
}

/// What opening a log found.
#[derive(Debug, Default)]
pub struct Opened {
    /// Bytes of a torn tail that were cut, with where.
    pub cut: Option<(PathBuf, u64)>,
}

impl LogWriter {
    /// Opens a log. `applied` is the index's position: every record after it must be there, and
    /// is given to `each` in order.
    ///
    /// # Errors
    /// Damage, or what `each` says.
    pub fn open<E: From<LogError>>(
        dir: &Path,
        group: GroupId,
        applied: Position,
        mut each: impl FnMut(LogRecord) -> Result<(), E>,
    ) -> Result<(Self, Opened), E> {
        remove_unborn(dir)?;
        let all = segments(dir)?;
        let mut opened = Opened::default();
        let mut writer = Self {
            dir: dir.into(),
            group,
            segment: None,
            stump: None,
            durable: applied,
            segment_bytes: SEGMENT_BYTES,
        };
        let mut expected: Option<Position> = None;
        for (index, number) in all.iter().enumerate() {
            let path = segment_path(dir, *number);
            let mut reader = SegmentReader::open(dir, *number, group)?;
            let mut here = expected.unwrap_or(reader.header.before);
            if here != reader.header.before {
                return Err(LogError::corrupt(&path, "does not go on where the segment before ended").into());
            }
            if index == 0 && here.sequence > applied.sequence {
                let why = format!("records after {} are missing before it", applied.sequence);
                return Err(LogError::corrupt(&path, why).into());
            }
            let (mut end, mut committed) = (HEADER, HEADER);
            let tail = loop {
                match reader.next_or_tail()? {
                    Err(tail) => break tail,
                    Ok(Item::Commit { sequence, chain, end: after }) => {
                        if (sequence, chain) != (here.sequence, here.chain) {
                            let why = format!("at byte {end}: the commit is of record {sequence}");
                            return Err(LogError::corrupt(&path, why).into());
                        }
                        (end, committed) = (after, after);
                    }
                    Ok(Item::Record(found)) => {
                        if found.encoded.sequence != here.sequence.next() {
                            let why = format!(
                                "at byte {end}: record {} after {}",
                                found.encoded.sequence, here.sequence
                            );
                            return Err(LogError::corrupt(&path, why).into());
                        }
                        if let Record::EpochBegin { epoch, .. } = &found.record {
                            here.epoch = *epoch;
                        }
                        here.sequence = found.encoded.sequence;
                        here.chain = found.encoded.chain(here.chain);
                        end = found.end;
                        if here.sequence == applied.sequence && here.chain != applied.chain {
                            let why = format!("record {} is not the one that was applied", here.sequence);
                            return Err(LogError::corrupt(&path, why).into());
                        }
                        if here.sequence > applied.sequence {
                            each(found)?;
                        }
                    }
                }
            };
            let last = index + 1 == all.len();
            if let Tail::Torn { at, why } = &tail
                && (!last
                    || reader.synced.is_some_and(|synced| *at < synced)
                    || matches!(why, CodecError::Head { .. })
                    || reader.commit_behind(*at)?)
            {
                return Err(LogError::corrupt(&path, format!("at byte {at}: {why}")).into());
            }
            if let Some(synced) = reader.synced.filter(|synced| *synced > end) {
                let why = format!("ends at byte {end}, but {synced} bytes were synced");
                return Err(LogError::corrupt(&path, why).into());
            }
            if last {
                let file = OpenOptions::new().read(true).write(true).open(&path);
                let file = file.map_err(LogError::io("open", &path))?;
                let length = file.metadata().map_err(LogError::io("stat", &path))?.len();
                if length > end {
                    file.set_len(end).map_err(LogError::io("cut", &path))?;
                    // Behind its last commit one that was used before has always something.
                    let torn = reader.header.mark.is_none();
                    opened.cut = torn.then(|| (path.clone(), length - end));
                }
                if end > committed {
                    let commit = segment::encode_commit(reader.header.of_commits(), end, &here);
                    file.write_all_at(&commit, end).map_err(LogError::io("write", &path))?;
                    end += COMMIT as u64;
                }
                // What was found may only be in memory, left by a sync that failed: it counts once
                // it was written and synced again.
                let unsure = reader.synced.unwrap_or(HEADER);
                write_again(&file, unsure, end).map_err(LogError::io("write", &path))?;
                durable::file(&file).map_err(LogError::io("sync", &path))?;
                // A crash may have come between its name and the sync of that.
                sync_dir(dir)?;
                let of_commits = reader.header.of_commits();
                writer.segment =
                    Some(Open { file, number: *number, of_commits, synced: end, noted: unsure.min(end) });
            }
            expected = Some(here);
        }
        if let Some(end) = expected {
            if end.sequence < applied.sequence {
                let why = format!("ends at record {}, but {} was applied", end.sequence, applied.sequence);
                return Err(LogError::corrupt(dir, why).into());
            }
            writer.durable = end;
        }
        Ok((writer, opened))
    }

    /// The last durable record.
    #[must_use]
    pub fn durable(&self) -> Position {
        self.durable
    }

    /// Appends batches and syncs them as one. When this returns `Ok`, all of them are durable;
    /// otherwise none of them counts.
    ///
    /// # Errors
    /// [`LogError::OutOfOrder`], [`LogError::Io`]; the log then stands where it stood before.
    pub fn append(&mut self, batches: &[Batch]) -> Result<(), LogError> {
        let Some(Batch { after, .. }) = batches.last() else { return Ok(()) };
        let mut stands = self.durable;
        for batch in batches {
            let number = batch.bytes.get(8..16).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
            if batch.before != stands || number != Some(stands.sequence.next().0) {
                return Err(LogError::OutOfOrder {
                    dir: self.dir.clone(),
                    stands: stands.sequence,
                    follows: batch.before.sequence,
                });
            }
            stands = batch.after;
        }
        let result = self.try_append(batches);
        match result {
            Ok(end) => {
                if let Some(open) = &mut self.segment {
                    open.synced = end;
                }
                self.durable = *after;
                Ok(())
            }
            Err(error) => {
                self.abandon();
                Err(error)
            }
        }
    }

    fn try_append(&mut self, batches: &[Batch]) -> Result<u64, LogError> {
        if self.segment.as_ref().is_none_or(|open| open.synced >= self.segment_bytes) {
            self.rotate()?;
        }
        let open = self.segment.as_ref().expect("a segment was made if there was none");
        let path = segment_path(&self.dir, open.number);
        let write = || -> std::io::Result<u64> {
            segment::note_synced(&open.file, open.synced)?;
            let mut at = open.synced;
            for Batch { bytes, .. } in batches {
                open.file.write_all_at(bytes, at)?;
                at += bytes.len() as u64;
            }
            if let Some(last) = batches.last() {
                open.file.write_all_at(&segment::encode_commit(open.of_commits, at, &last.after), at)?;
                at += COMMIT as u64;
            }
            Ok(at)
        };
        let end = write().map_err(LogError::io("write", &path))?;
        if !mutant::is(Mutant::AcknowledgesBeforeSync) {
            durable::data(&open.file).map_err(LogError::io("sync", &path))?;
        }
        Ok(end)
    }

    /// Ends the segment and begins the next one.
    fn rotate(&mut self) -> Result<(), LogError> {
        self.seal()?;
        self.settle()?;
        let first = self.durable.sequence.next();
        let fresh = Header { group: self.group, first, before: self.durable, mark: None };
        let (file, of_commits) = match spares::take(&self.dir, &fresh) {
            Some(renewed) => renewed,
            None => (segment::create(&self.dir, &fresh)?, fresh.of_commits()),
        };
        sync_dir(&self.dir)?;
        self.segment = Some(Open { file, number: first.0, of_commits, synced: HEADER, noted: HEADER });
        Ok(())
    }

    /// Notes durably that the whole segment is synced: from then on all damage in it is found.
    ///
    /// # Errors
    /// What the system says.
    pub fn seal(&mut self) -> Result<(), LogError> {
        if let Some(open) = self.segment.as_mut().filter(|open| open.noted < open.synced) {
            let path = segment_path(&self.dir, open.number);
            segment::note_synced(&open.file, open.synced)
                .and_then(|()| durable::data(&open.file))
                .map_err(LogError::io("sync", path))?;
            open.noted = open.synced;
        }
        Ok(())
    }

    /// Whether all damage in it would be found.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.segment.as_ref().is_none_or(|open| open.noted == open.synced)
    }

    /// After a failure: the segment is at its end, at the length that we know to be synced ([`Self::settle`]).
    pub fn abandon(&mut self) {
        if let Some(open) = self.segment.take() {
            self.stump = Some(open);
        }
    }

    /// Cuts a segment that failed where it was last synced. Until that has worked nothing may be
    /// read back or appended: what stands behind that may exist in memory only.
    ///
    /// # Errors
    /// What the system says; then it can be tried again.
    pub fn settle(&mut self) -> Result<(), LogError> {
        if let Some(stump) = &self.stump {
            let path = segment_path(&self.dir, stump.number);
            let cut = stump.file.set_len(stump.synced).and_then(|()| durable::file(&stump.file));
            cut.map_err(LogError::io("cut", path))?;
            self.stump = None;
        }
        Ok(())
    }

    /// Segments that others wrote belong to this log, and end here: it is to be opened again.
    pub fn expect(&mut self, end: Position) {
        self.segment = None;
        self.durable = end;
    }

    /// The next append begins a new segment.
    pub fn begin_new(&mut self) {
        self.segment = None;
    }

    /// Removes segments of which every record is applied; never the last one. So many stay as spare files, to be
    /// written over.
    ///
    /// # Errors
    /// What the system says.
    pub fn remove_applied(dir: &Path, applied: Sequence, spares_max: usize) -> Result<(), LogError> {
        let all = segments(dir)?;
        let mut spare = spares::list(dir)?.len();
        for pair in all.windows(2) {
            if pair[1] > applied.0 + 1 {
                break;
            }
            if spare < spares_max {
                spares::keep(dir, pair[0])?;
                spare += 1;
            } else {
                let path = segment_path(dir, pair[0]);
                fs::remove_file(&path).map_err(LogError::io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// The segment that is written, and how many bytes of it are synced.
    #[must_use]
    pub fn segment(&self) -> Option<(u64, u64)> {
        self.segment.as_ref().map(|open| (open.number, open.synced))
    }

    /// Segments end at this length.
    pub fn limit_segments(&mut self, bytes: u64) {
        self.segment_bytes = bytes;
    }
}

/// Removes what a crash left of segments that never got their name, and so no record.
fn remove_unborn(dir: &Path) -> Result<(), LogError> {
    for entry in fs::read_dir(dir).map_err(LogError::io("read", dir))? {
        let path = entry.map_err(LogError::io("read", dir))?.path();
        if path.extension().is_some_and(|e| e == "new") {
            fs::remove_file(&path).map_err(LogError::io("remove", &path))?;
        }
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use bfs_common::codec;
    use bfs_common::record::{ObjectId, Record};
    use bytes::BytesMut;

    pub const GROUP: GroupId = GroupId([7; 16]);

    pub fn append(writer: &mut LogWriter, count: u64) {
        let before = writer.durable();
        let mut position = before;
        let mut out = BytesMut::new();
        for _ in 0..count {
            let mut one = BytesMut::new();
            let sequence = position.sequence.next();
            let record = Record::Write { object: ObjectId(1), offset: sequence.0 };
            codec::encode(&mut one, sequence, &record, b"some payload");
            position.chain = codec::chain(position.chain, &one);
            position.sequence = sequence;
            out.extend_from_slice(&one);
        }
        writer.append(&[Batch { bytes: out.freeze(), before, after: position }]).unwrap();
    }

    pub fn open(dir: &Path) -> Result<(LogWriter, Vec<u64>, Opened), LogError> {
        let mut seen = Vec::new();
        let each = |r: LogRecord| {
            seen.push(r.encoded.sequence.0);
            Ok(())
        };
        let (writer, opened) = LogWriter::open(dir, GROUP, Position::START, each)?;
        Ok((writer, seen, opened))
    }

    pub fn only_segment(dir: &Path) -> PathBuf {
        segment_path(dir, *segments(dir).unwrap().last().unwrap())
    }

    #[test]
    fn what_was_appended_is_there_again_over_segments() {
        let dir = tempfile::tempdir().unwrap();
        let (mut writer, ..) = open(dir.path()).unwrap();
        writer.limit_segments(200);
        for _ in 0..10 {
            append(&mut writer, 3);
        }
        let end = writer.durable();
        drop(writer);
        assert!(segments(dir.path()).unwrap().len() > 3);
        let (writer, seen, opened) = open(dir.path()).unwrap();
        assert_eq!(seen, (1..=30).collect::<Vec<_>>());
        assert_eq!(writer.durable(), end);
        assert!(opened.cut.is_none());
        let mut some = Vec::new();
        super::super::read_range(dir.path(), GROUP, Sequence(7), Sequence(22), |r| {
            some.push(r.encoded.sequence.0);
            Ok::<_, LogError>(())
        })
        .unwrap();
        assert_eq!(some, (8..=22).collect::<Vec<_>>());
        LogWriter::remove_applied(dir.path(), Sequence(22), 0).unwrap();
        assert!(segments(dir.path()).unwrap()[0] <= 23);
    }

    #[test]
    fn a_batch_that_does_not_follow_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (mut writer, ..) = open(dir.path()).unwrap();
        append(&mut writer, 3);
        let before = writer.durable();
        let mut out = BytesMut::new();
        codec::encode(&mut out, Sequence(5), &Record::Closed { object: ObjectId(1) }, b"");
        let bytes = out.freeze();
        for before in [Position { sequence: Sequence(4), ..before }, before, Position::START] {
            let error = writer.append(&[Batch { bytes: bytes.clone(), before, after: before }]).unwrap_err();
            assert!(matches!(error, LogError::OutOfOrder { .. }), "{error}");
        }
        append(&mut writer, 1);
        drop(writer);
        assert_eq!(open(dir.path()).unwrap().1, [1, 2, 3, 4]);
    }

    /// A log of two batches, of three records and of one; its file, and where the first ends.
    fn two_batches(dir: &Path) -> (PathBuf, Vec<u8>, usize) {
        let (mut writer, ..) = open(dir).unwrap();
        append(&mut writer, 3);
        let path = only_segment(dir);
        let first = fs::metadata(&path).unwrap().len() as usize;
        append(&mut writer, 1);
        drop(writer);
        let whole = fs::read(&path).unwrap();
        (path, whole, first)
    }

    #[test]
    fn a_torn_tail_is_cut_and_the_log_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let (path, whole, first) = two_batches(dir.path());
        let record = whole.len() - COMMIT;
        for cut in first + 1..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let (mut writer, seen, opened) = open(dir.path()).unwrap();
            // A whole record is kept: only its commit is missing.
            let (kept, end) = if cut < record { (3, first) } else { (4, record) };
            assert_eq!(seen, (1..=kept).collect::<Vec<_>>());
            assert_eq!(opened.cut.map_or(0, |cut| cut.1), (cut - end) as u64);
            append(&mut writer, 2);
            drop(writer);
            assert_eq!(open(dir.path()).unwrap().1, (1..=kept + 2).collect::<Vec<_>>());
        }
    }

    #[test]
    fn damage_of_what_was_committed_is_named_and_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (path, whole, first) = two_batches(dir.path());
        for cut in HEADER as usize..first {
            fs::write(&path, &whole[..cut]).unwrap();
            let error = open(dir.path()).unwrap_err();
            assert!(matches!(error, LogError::Corrupt { .. }), "cut at {cut}: {error}");
        }
        // Bytes 104..116 are the synced length (a torn one only loses the lower bound), the rest
        // up to 128 is zeros without meaning.
        for at in (0..104).chain(HEADER as usize..whole.len() - COMMIT) {
            for bit in [0, 5] {
                let mut flipped = whole.clone();
                flipped[at] ^= 1 << bit;
                fs::write(&path, &flipped).unwrap();
                let error = open(dir.path()).unwrap_err();
                assert!(matches!(error, LogError::Corrupt { .. }), "byte {at}: {error}");
                assert!(fs::read(&path).unwrap() == flipped, "byte {at}: the file was changed");
            }
        }
        // The last commit: its records are whole, and kept.
        for at in whole.len() - COMMIT..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            fs::write(&path, &flipped).unwrap();
            match open(dir.path()) {
                Ok((_, seen, _)) => assert_eq!(seen, [1, 2, 3, 4]),
                Err(error) => assert!(matches!(error, LogError::Corrupt { .. }), "byte {at}: {error}"),
            }
        }
        // A segment that lost even its header had records: it has its name.
        fs::write(&path, &whole[..50]).unwrap();
        assert!(matches!(open(dir.path()), Err(LogError::Corrupt { .. })));
    }

    #[test]
    fn a_record_of_a_newer_format_is_refused_and_not_cut() {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut whole, first) = two_batches(dir.path());
        whole.truncate(first);
        // A sound record with a head that no release knows.
        let mut newer = vec![0; codec::PREFIX + 1];
        newer[..4].copy_from_slice(&1u32.to_le_bytes());
        newer[8..16].copy_from_slice(&4u64.to_le_bytes());
        newer[codec::PREFIX] = 0xc1;
        let crc = crc32c::crc32c_append(crc32c::crc32c(&newer[..16]), &newer[codec::PREFIX..]);
        newer[16..20].copy_from_slice(&crc.to_le_bytes());
        whole.extend_from_slice(&newer);
        fs::write(&path, &whole).unwrap();
        let error = open(dir.path()).unwrap_err();
        assert!(matches!(error, LogError::Corrupt { .. }), "{error}");
        assert!(fs::read(&path).unwrap() == whole);
    }

    #[test]
    fn after_a_failure_nothing_unsynced_counts_and_a_new_segment_begins() {
        let dir = tempfile::tempdir().unwrap();
        for failed_first in [true, false] {
            let dir = dir.path().join(failed_first.to_string());
            fs::create_dir(&dir).unwrap();
            let (mut writer, ..) = open(&dir).unwrap();
            if !failed_first {
                append(&mut writer, 3);
            }
            let (stands, known) = (writer.durable(), writer.segment.as_ref().map_or(HEADER, |o| o.synced));
            append(&mut writer, 2);
            // As if its sync had failed: whole and readable, but it does not count.
            writer.durable = stands;
            writer.segment.as_mut().unwrap().synced = known;
            writer.abandon();
            append(&mut writer, 1);
            drop(writer);
            let expected: Vec<_> = (1..=stands.sequence.0 + 1).collect();
            assert_eq!(open(&dir).unwrap().1, expected);
            assert_eq!(segments(&dir).unwrap().len(), if failed_first { 1 } else { 2 });
        }
    }

    #[test]
    fn a_missing_segment_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (mut writer, ..) = open(dir.path()).unwrap();
        writer.limit_segments(200);
        for _ in 0..6 {
            append(&mut writer, 3);
        }
        drop(writer);
        let all = segments(dir.path()).unwrap();
        for gone in [all[0], all[1]] {
            let path = segment_path(dir.path(), gone);
            let kept = fs::read(&path).unwrap();
            fs::remove_file(&path).unwrap();
            assert!(matches!(open(dir.path()), Err(LogError::Corrupt { .. })));
            fs::write(&path, kept).unwrap();
        }
    }
}
