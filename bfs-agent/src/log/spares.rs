//! Files of segments that are applied, kept to be written over by the next ones.
//!
//! ```text
//! DIR/NNNNNNNNNNNNNNNNNNNN.spare.new
//! ```
//! A file that grows makes each sync write its size and where its blocks are, too: with these two writes and the wait
//! between them a sync takes about twice as long as one of bytes written over (ext4; PostgreSQL's `wal_recycle` is there for the
//! same reason). Nothing in a spare file counts: a start removes them, like every other name that ends so, and an older
//! release does.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::fs::FsWord;

use super::segment::{self, Header};
use super::{LogError, segment_path};
use crate::keys;

const SUFFIX: &[u8] = b".spare.new";

/// How many are kept: what the records of a checkpoint fill while the one before is applied, up to this.
pub const SPARES: usize = 4;

/// How many are kept in this folder: none where a file system does not write over bytes in place, or it is not known.
#[must_use]
pub fn limit(dir: &Path) -> usize {
    // linux/magic.h; XFS has its own in fs/xfs/libxfs/xfs_format.h.
    const EXT4: FsWord = 0xef53;
    const XFS: FsWord = 0x5846_5342;
    // That of the simulated disks, which tear what is written over.
    const TMPFS: FsWord = 0x0102_1994;
    let fits = |kind| [EXT4, XFS].contains(&kind) || cfg!(test) && kind == TMPFS;
    if rustix::fs::statfs(dir).is_ok_and(|stat| fits(stat.f_type)) { SPARES } else { 0 }
}

/// The spare files in a folder.
///
/// # Errors
/// If it cannot be read.
pub fn list(dir: &Path) -> Result<Vec<PathBuf>, LogError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(LogError::io("read", dir))? {
        let path = entry.map_err(LogError::io("read", dir))?.path();
        if path.as_os_str().as_encoded_bytes().ends_with(SUFFIX) {
            found.push(path);
        }
    }
    Ok(found)
}

/// Removes all but so many.
///
/// # Errors
/// What the system says.
pub fn limit_to(dir: &Path, count: usize) -> Result<(), LogError> {
    for path in list(dir)?.into_iter().skip(count) {
        // Whoever writes the log may just have taken it.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(LogError::io("remove", &path)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// A segment that is applied becomes one.
///
/// # Errors
/// What the system says.
pub(super) fn keep(dir: &Path, number: u64) -> Result<(), LogError> {
    let path = segment_path(dir, number);
    fs::rename(&path, path.with_extension("spare.new")).map_err(LogError::io("rename", &path))
}

/// Makes a segment of one, if there is one that nobody reads any more, and gives the mark of its commits. Without, a new
/// file does as well.
pub(super) fn take(dir: &Path, header: &Header) -> Option<(File, u64)> {
    let old = list(dir).ok()?.pop()?;
    let renew = || {
        let mut mark = [0; 8];
        mark.copy_from_slice(&keys::random()?[..8]);
        let mark = u64::from_le_bytes(mark);
        let file = segment::renew(dir, &old, &Header { mark: Some(mark), ..*header })?;
        Ok::<_, std::io::Error>((file, mark))
    };
    renew()
        .inspect_err(|error| {
            tracing::debug!("{}: is not written over: {error}", old.display());
            let _ = fs::remove_file(&old);
        })
        .ok()
}

#[cfg(test)]
mod tests {
    use bfs_common::record::Sequence;

    use super::super::segment::{HEADER, SegmentReader};
    use super::super::writer::tests::{GROUP, append, only_segment, open};
    use super::super::writer::{LogWriter, Opened};
    use super::super::{LogRecord, LogRef, Payloads, read_range, segments};
    use super::*;

    /// A log whose newest segment is a renewed file: its folder's writer, and where its last batch begins and ends there.
    fn renewed(dir: &Path) -> (LogWriter, usize, usize) {
        let (mut writer, ..) = open(dir).unwrap();
        writer.limit_segments(1000);
        while segments(dir).unwrap().len() < 2 {
            append(&mut writer, 3);
        }
        LogWriter::remove_applied(dir, writer.durable().sequence, 1).unwrap();
        assert_eq!((segments(dir).unwrap().len(), list(dir).unwrap().len()), (1, 1));
        while segments(dir).unwrap().len() < 2 {
            append(&mut writer, 3);
        }
        assert!(list(dir).unwrap().is_empty());
        append(&mut writer, 2);
        let from = writer.segment().unwrap().1 as usize;
        append(&mut writer, 4);
        let to = writer.segment().unwrap().1 as usize;
        (writer, from, to)
    }

    /// Opens a log of which some was applied.
    fn open_on(dir: &Path) -> Result<(LogWriter, Vec<u64>, Opened), LogError> {
        let mut seen = Vec::new();
        let begin = SegmentReader::open(dir, segments(dir)?[0], GROUP)?.header.before;
        let each = |r: LogRecord| {
            seen.push(r.encoded.sequence.0);
            Ok(())
        };
        let (writer, opened) = LogWriter::open(dir, GROUP, begin, each)?;
        Ok((writer, seen, opened))
    }

    #[test]
    fn a_file_that_was_a_segment_is_written_over_and_ends_behind_its_last_commit() {
        let dir = tempfile::tempdir().unwrap();
        let (writer, from, to) = renewed(dir.path());
        let (path, end) = (only_segment(dir.path()), writer.durable());
        drop(writer);
        let whole = fs::read(&path).unwrap();
        assert!(whole.len() > to && whole[8] == 2, "{} bytes of {to}", whole.len());
        let (before, seen, opened) = open_on(dir.path()).unwrap();
        assert!(opened.cut.is_none() && seen.last() == Some(&end.sequence.0));
        assert_eq!(before.durable(), end);
        assert_eq!(fs::metadata(&path).unwrap().len(), to as u64, "what is old is cut");
        drop(before);
        // Any byte of the last batch is that of before: none of it counts. Of what was noted each is damage.
        for at in HEADER as usize..to {
            let mut torn = whole.clone();
            torn[at] ^= 0x10;
            fs::write(&path, &torn).unwrap();
            match open_on(dir.path()) {
                Ok((mut writer, seen, _)) if at >= from => {
                    assert_eq!(seen.last(), Some(&(end.sequence.0 - 4)), "byte {at}");
                    append(&mut writer, 1);
                    drop(writer);
                    assert_eq!(open_on(dir.path()).unwrap().1.last(), Some(&(end.sequence.0 - 3)));
                }
                Err(LogError::Corrupt { .. }) if at < from => {}
                other => panic!("byte {at} of {from} to {to}: {other:?}"),
            }
        }
    }

    #[test]
    fn of_a_sealed_segment_all_damage_is_found_and_what_follows_another_need_not_be_cut() {
        let dir = tempfile::tempdir().unwrap();
        let (mut writer, _, to) = renewed(dir.path());
        let path = only_segment(dir.path());
        let unsealed = fs::read(&path).unwrap();
        assert!(!writer.is_sealed());
        writer.seal().unwrap();
        assert!(writer.is_sealed());
        let sealed = fs::read(&path).unwrap();
        for at in (HEADER as usize..to).step_by(7) {
            let mut bad = sealed.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            assert!(matches!(open_on(dir.path()), Err(LogError::Corrupt { .. })), "byte {at}");
        }
        // A crash may leave it as it was, with the next one behind it.
        fs::write(&path, &sealed).unwrap();
        writer.limit_segments(1);
        append(&mut writer, 3);
        let end = writer.durable();
        fs::write(&path, &unsealed).unwrap();
        drop(writer);
        let (writer, seen, _) = open_on(dir.path()).unwrap();
        assert_eq!((writer.durable(), seen.last()), (end, Some(&end.sequence.0)));
        assert_eq!(fs::read(&path).unwrap(), unsealed);
        let (mut read, first) = (Vec::new(), Sequence(seen[0] - 1));
        read_range(dir.path(), GROUP, first, end.sequence, |r| {
            read.push(r.encoded.sequence.0);
            Ok::<_, LogError>(())
        })
        .unwrap();
        assert_eq!(read, seen);
    }

    #[test]
    fn a_segment_that_somebody_reads_is_not_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let (mut writer, ..) = open(dir.path()).unwrap();
        writer.limit_segments(200);
        append(&mut writer, 9);
        let mut reader = SegmentReader::open(dir.path(), 1, GROUP).unwrap();
        append(&mut writer, 9);
        LogWriter::remove_applied(dir.path(), Sequence(9), 1).unwrap();
        append(&mut writer, 9);
        assert!(list(dir.path()).unwrap().is_empty());
        let mut seen = Vec::new();
        while let Some(found) = reader.read().unwrap() {
            seen.push(found.encoded.sequence.0);
        }
        assert_eq!(seen, (1..=9).collect::<Vec<_>>());
        assert_eq!(fs::read(only_segment(dir.path())).unwrap()[8], 1, "a new file");
        // What was a segment in another life is no longer found by its old number.
        LogWriter::remove_applied(dir.path(), Sequence(18), 1).unwrap();
        drop(reader);
        append(&mut writer, 9);
        assert_eq!(fs::read(only_segment(dir.path())).unwrap()[8], 2);
        let mut payloads = Payloads::new(dir.path());
        assert!(payloads.read(LogRef { segment: 10, offset: 200 }, 4).is_err());
    }
}
