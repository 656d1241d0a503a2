//! The records of the last checkpoints, kept so that further destinations get what lies between two of them.
//!
//! ```text
//!  punched out | begin           records, as the stream has them            end
//!              mark            mark                mark        (not marked yet)
//! ```
//! They stand in a file without a name, which goes with the agent: whoever has an older checkpoint gets the difference
//! from another destination. It begins right behind a marker and is bounded in bytes; past the bound the oldest step goes.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bfs_common::codec::{self, CodecError};
use bfs_common::record::{CheckpointId, GroupId, ObjectId, PathBytes, Record, Sequence};
use bytes::{Bytes, BytesMut};
use rustix::fs::{FallocateFlags, Mode, OFlags};

use crate::mutant::{self, Mutant};
use crate::primary::engine::outbox::Batch;
use crate::transfer::{Head, Moment, Sink, Writer, leads_on};

/// Bytes that are read at once.
const PIECE: u64 = 1 << 20;
/// Most checkpoints that are kept.
const MARKS_MAX: usize = 4096;

/// A checkpoint, and where its marker ends in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// It.
    pub moment: Moment,
    /// Its marker.
    pub sequence: Sequence,
    /// The first byte behind it.
    pub end: u64,
}

/// What couriers see of it.
#[derive(Clone, Debug)]
pub struct View {
    file: Arc<File>,
    /// The oldest first. From each of them to each later one a step can be made.
    pub marks: Vec<Mark>,
}

/// Why a step cannot be made out of the file.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The disk.
    #[error("the kept records cannot be read: {0}")]
    Io(#[from] io::Error),
    /// They were given up meanwhile.
    #[error("the kept records are not there any more")]
    Gone,
    /// What stands there is no record.
    #[error("the kept records are damaged: {0}")]
    Record(#[from] CodecError),
}

/// See the module.
#[derive(Debug)]
pub struct Steps {
    folder: PathBuf,
    file: Arc<File>,
    bytes_max: u64,
    /// What the next batch begins with; any, before the first.
    next: Option<Sequence>,
    roots: Vec<(PathBytes, ObjectId)>,
    marks: VecDeque<Mark>,
    end: u64,
}

impl Steps {
    /// An empty one, for a stream whose roots are these at first. `bytes_max` bounds what the file takes.
    ///
    /// # Errors
    /// If no file can be made in the folder.
    pub fn new(folder: &Path, bytes_max: u64, roots: Vec<(PathBytes, ObjectId)>) -> io::Result<Self> {
        let file = unnamed(folder)?;
        Ok(Self {
            folder: folder.to_owned(),
            file,
            bytes_max,
            next: None,
            roots,
            marks: VecDeque::new(),
            end: 0,
        })
    }

    /// Takes the next batch; true when a checkpoint ends in it. A batch that does not follow the one before, or that
    /// cannot be written, ends what was kept: it begins again behind the next marker.
    ///
    /// # Errors
    /// What is wrong with the disk, or with the batch.
    pub fn take(&mut self, batch: &Batch) -> Result<bool, StepError> {
        let follows = self.next.is_none_or(|next| next == batch.first);
        self.next = Some(batch.last().next());
        if !follows {
            self.begin_again()?;
        }
        let taken = self.append(&batch.bytes);
        if taken.is_err() {
            self.begin_again()?;
        }
        taken
    }

    fn append(&mut self, bytes: &Bytes) -> Result<bool, StepError> {
        let (mut rest, mut marks, mut marked) = (bytes.clone(), Vec::new(), self.marks.back().is_some());
        // Where the records begin that are kept.
        let mut from = if marked { 0 } else { bytes.len() };
        while let Some(encoded) = codec::take(&mut rest)? {
            let behind = bytes.len() - rest.len();
            match encoded.decode()?.0 {
                Record::Roots { roots } => self.roots = roots,
                Record::Checkpoint { checkpoint, label } => {
                    if !marked {
                        (from, marked) = (behind, true);
                    }
                    let moment = Moment { checkpoint, label, roots: self.roots.clone() };
                    marks.push(Mark { moment, sequence: encoded.sequence, end: behind as u64 });
                }
                _ => {}
            }
        }
        self.file.write_all_at(&bytes[from..], self.end)?;
        let any = !marks.is_empty();
        let at = self.end;
        self.marks.extend(marks.into_iter().map(|mark| Mark { end: at + mark.end - from as u64, ..mark }));
        self.end += (bytes.len() - from) as u64;
        while self.bytes() > self.bytes_max || self.marks.len() > MARKS_MAX {
            if self.marks.len() < 2 {
                self.begin_again()?;
                break;
            }
            self.drop_oldest();
        }
        Ok(any)
    }

    /// Bytes that are kept.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.end - self.marks.front().map_or(self.end, |mark| mark.end)
    }

    /// Whoever needs something needs what lies behind this checkpoint, or nothing.
    pub fn trim(&mut self, needed: CheckpointId) {
        while self.marks.len() > 1 && self.marks[1].moment.checkpoint <= needed {
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        let (Some(oldest), Some(next)) = (self.marks.pop_front(), self.marks.front()) else { return };
        let gone = next.end - oldest.end;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if gone > 0
            && let Err(error) = rustix::fs::fallocate(&*self.file, flags, oldest.end, gone)
        {
            tracing::debug!("room of kept records is not given back: {error}");
        }
    }

    fn begin_again(&mut self) -> io::Result<()> {
        self.marks.clear();
        self.end = 0;
        // Who reads the old one finds what it had.
        self.file = unnamed(&self.folder)?;
        Ok(())
    }

    /// What couriers may see.
    #[must_use]
    pub fn view(&self) -> View {
        View { file: Arc::clone(&self.file), marks: self.marks.iter().cloned().collect() }
    }
}

impl View {
    /// What of it may go out, where so much of the stream is sealed.
    #[must_use]
    pub fn sealed(mut self, sealed: Sequence) -> Self {
        if !mutant::is(Mutant::SendsUnsealed) {
            self.marks.retain(|mark| mark.sequence <= sealed);
        }
        self
    }

    /// Hands on what lies between two marks as a stream of a group: all that changes a file, and at its end the later
    /// marker.
    ///
    /// # Errors
    /// [`StepError`]; what was handed on then is no whole stream.
    pub fn stream(
        &self,
        (group, id): (&str, GroupId),
        (from, to): (usize, usize),
        sink: Sink<'_>,
    ) -> Result<(), StepError> {
        let (from, to) = (&self.marks[from], &self.marks[to]);
        let head =
            Head { group: group.to_owned(), id, from: Some(from.moment.clone()), to: to.moment.clone() };
        let mut writer = Writer::begin(&head, sink);
        self.write(from, to, &mut writer)?;
        writer.end();
        Ok(())
    }

    fn write(&self, from: &Mark, to: &Mark, writer: &mut Writer<'_>) -> Result<(), StepError> {
        let (mut at, mut buffer) = (from.end, BytesMut::new());
        while at < to.end || !buffer.is_empty() {
            if writer.is_ended() {
                return Ok(());
            }
            let len = PIECE.min(to.end - at);
            let old = buffer.len();
            buffer.resize(old + usize::try_from(len).unwrap_or(0), 0);
            self.file.read_exact_at(&mut buffer[old..], at)?;
            at += len;
            let all = buffer.split().freeze();
            let whole = whole_records(&all, at == to.end)?;
            let mut records = all.slice(..whole);
            while let Some(encoded) = codec::take(&mut records)? {
                let (record, payload) = encoded.decode()?;
                // Those between are not told of.
                let marks = matches!(&record, Record::Checkpoint { checkpoint, .. } if *checkpoint == to.moment.checkpoint);
                if marks || leads_on(&record) {
                    writer.record(&record, &payload);
                }
            }
            buffer.extend_from_slice(&all[whole..]);
        }
        Ok(())
    }
}

/// How many bytes of these are whole records.
fn whole_records(bytes: &Bytes, last: bool) -> Result<usize, StepError> {
    let mut at = 0;
    while bytes.len() - at >= codec::PREFIX {
        let word = |from: usize| {
            let word = bytes[at + from..at + from + 4].try_into().unwrap_or([0; 4]);
            u32::from_le_bytes(word) as usize
        };
        let (head, payload) = (word(0), word(4));
        if head == 0 || head > codec::HEAD_MAX || payload > codec::PAYLOAD_MAX {
            // Punched out while it was read.
            return Err(StepError::Gone);
        }
        let next = at + codec::PREFIX + head + payload;
        if next > bytes.len() {
            break;
        }
        at = next;
    }
    if last && at != bytes.len() { Err(StepError::Gone) } else { Ok(at) }
}

fn unnamed(folder: &Path) -> io::Result<Arc<File>> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    Ok(Arc::new(File::from(rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR)?)))
}

#[cfg(test)]
mod tests {
    use bfs_common::record::{ChainHash, CheckpointLabel};

    use super::*;
    use crate::transfer::{Item, Reader};

    fn checkpoint(number: u64) -> (Record, Vec<u8>) {
        let label = CheckpointLabel { wall_ns: number as i64, ..CheckpointLabel::default() };
        (Record::Checkpoint { checkpoint: CheckpointId(number), label }, Vec::new())
    }

    fn write(offset: u64, bytes: &[u8]) -> (Record, Vec<u8>) {
        (Record::Write { object: ObjectId(7), offset }, bytes.to_vec())
    }

    fn batch(first: u64, records: &[(Record, Vec<u8>)]) -> Batch {
        let mut bytes = BytesMut::new();
        for (at, (record, payload)) in records.iter().enumerate() {
            codec::encode(&mut bytes, Sequence(first + at as u64), record, payload);
        }
        Batch {
            first: Sequence(first),
            count: records.len() as u32,
            bytes: bytes.freeze(),
            ring_position: None,
            chain_after: ChainHash([0; 32]),
        }
    }

    fn steps(bytes_max: u64) -> (tempfile::TempDir, Steps) {
        let folder = tempfile::tempdir().unwrap();
        let steps = Steps::new(folder.path(), bytes_max, Vec::new()).unwrap();
        (folder, steps)
    }

    fn numbers(steps: &Steps) -> Vec<u64> {
        steps.marks.iter().map(|mark| mark.moment.checkpoint.0).collect()
    }

    /// The records of a step, as who takes it in reads them.
    fn step(view: &View, from: usize, to: usize) -> Vec<(Record, Vec<u8>)> {
        let mut all = Vec::new();
        let mut sink = |piece: Bytes| {
            all.extend_from_slice(&piece);
            true
        };
        view.stream(("g", GroupId([1; 16])), (from, to), &mut sink).unwrap();
        let (from, to) = (&view.marks[from].moment, &view.marks[to].moment);
        let mut reader = Reader::default();
        reader.feed(&all);
        let mut found = Vec::new();
        while let Some(item) = reader.next_item().unwrap() {
            match item {
                Item::Head(read) => assert_eq!((read.from.as_ref(), &read.to), (Some(from), to)),
                Item::Record(record, payload) => found.push((*record, payload.to_vec())),
                Item::End => {}
            }
        }
        reader.finish().unwrap();
        found
    }

    #[test]
    fn a_step_has_what_changes_files_and_its_own_marker() {
        let (_folder, mut steps) = steps(16 << 20);
        let gap = (Record::Gap { scope: bfs_common::record::GapScope::Everything }, Vec::new());
        let before = [write(0, b"before"), checkpoint(1), write(0, b"one"), gap];
        let long = vec![1; 900 << 10];
        steps.take(&batch(5, &before)).unwrap();
        steps.take(&batch(9, &[write(3, &long), write(1 << 20, &long), checkpoint(2)])).unwrap();
        steps.take(&batch(12, &[write(9, b"two"), checkpoint(3), write(9, b"later")])).unwrap();
        assert_eq!(numbers(&steps), [1, 2, 3]);
        let view = steps.view();
        let one = [write(0, b"one"), write(3, &long), write(1 << 20, &long)];
        let two = write(9, b"two");
        assert_eq!(step(&view, 0, 1), [&one[..], &[checkpoint(2)]].concat());
        assert_eq!(step(&view, 1, 2), [two.clone(), checkpoint(3)]);
        assert_eq!(step(&view, 0, 2), [&one[..], &[two, checkpoint(3)]].concat());
        assert_eq!(step(&view, 2, 2), []);
    }

    #[test]
    fn what_does_not_follow_ends_what_was_kept() {
        let (_folder, mut steps) = steps(1 << 20);
        steps.take(&batch(1, &[checkpoint(1), write(0, b"one"), checkpoint(2)])).unwrap();
        let view = steps.view();
        assert!(!steps.take(&batch(5, &[write(0, b"after a hole")])).unwrap());
        assert_eq!((numbers(&steps), steps.bytes()), (vec![], 0));
        // Who began to read goes on.
        assert_eq!(step(&view, 0, 1), [write(0, b"one"), checkpoint(2)]);
        assert!(steps.take(&batch(6, &[write(0, b"lost"), checkpoint(3), write(0, b"kept")])).unwrap());
        assert!(steps.take(&batch(9, &[checkpoint(4)])).unwrap());
        assert_eq!(step(&steps.view(), 0, 1), [write(0, b"kept"), checkpoint(4)]);
    }

    #[test]
    fn past_the_bound_the_oldest_go() {
        let (_folder, mut steps) = steps(10_000);
        let mut next = 1;
        for number in 1..=20 {
            let records = [write(0, &[number as u8; 3_000]), checkpoint(number)];
            steps.take(&batch(next, &records)).unwrap();
            next += 2;
            assert!(steps.bytes() <= 10_000);
        }
        assert_eq!(numbers(&steps), [17, 18, 19, 20]);
        assert_eq!(step(&steps.view(), 0, 1), [write(0, &[18; 3_000]), checkpoint(18)]);
        // One that is longer than all that may be kept.
        steps.take(&batch(next, &[write(0, &[1; 20_000])])).unwrap();
        assert!(steps.marks.is_empty());
    }

    #[test]
    fn what_nobody_needs_goes() {
        let (_folder, mut steps) = steps(1 << 20);
        let records: Vec<_> = (1..=5).flat_map(|n| [write(0, &[n as u8; 8192]), checkpoint(n)]).collect();
        steps.take(&batch(1, &records)).unwrap();
        let view = steps.view();
        steps.trim(CheckpointId(0));
        assert_eq!(numbers(&steps), [1, 2, 3, 4, 5]);
        steps.trim(CheckpointId(3));
        assert_eq!(numbers(&steps), [3, 4, 5]);
        assert_eq!(step(&steps.view(), 0, 2).len(), 3);
        // Who still reads what went is told.
        view.stream(("g", GroupId([1; 16])), (0, 1), &mut |_| true).unwrap_err();
        steps.trim(CheckpointId(99));
        assert_eq!((numbers(&steps), steps.bytes()), (vec![5], 0));
    }
}
