//! What a store takes next that follows another one, decided by what both keep, and the way from one to the other.

use std::io;
use std::sync::mpsc::sync_channel;

use bfs_common::record::CheckpointId;
use bfs_common::wire::GenerationLine;
use bytes::Bytes;

use super::{Client, ReadError};
use crate::transfer::Sink;

/// Pieces of a stream that wait between the two stores.
const PIECES: usize = 4;

/// Why a store can never catch up by differences.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Apart {
    /// What the difference would begin with is gone there.
    #[error(
        "checkpoint {0}, the newest here, is not kept there any more: differences would need it. Begin again with \
         another --store, and let the replayer there keep more (`serve --keep`)"
    )]
    Merged(CheckpointId),
    /// They have another past.
    #[error(
        "checkpoint {0} here and there have only the number in common: something else wrote to one of the stores. Begin \
         again with another --store"
    )]
    Another(CheckpointId),
    /// The one that is followed is older.
    #[error(
        "checkpoint {here} is here, and there is none after {there} there: that is not the store that was followed"
    )]
    Behind {
        /// The newest here.
        here: CheckpointId,
        /// The newest there.
        there: CheckpointId,
    },
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// The other store has nothing yet.
    Wait,
    /// Nothing: the newest is here.
    Done(CheckpointId),
    /// Take this one, as the difference to the other; whole without.
    Take {
        /// What it is the difference to.
        older: Option<CheckpointId>,
        /// It.
        newest: CheckpointId,
    },
}

/// Decides by what both stores keep, each the oldest first.
///
/// # Errors
/// [`Apart`].
pub fn next(here: &[GenerationLine], there: &[GenerationLine]) -> Result<Step, Apart> {
    let (Some(newest), ours) = (there.last(), here.last()) else { return Ok(Step::Wait) };
    let Some(ours) = ours else { return Ok(Step::Take { older: None, newest: newest.checkpoint }) };
    let number = ours.checkpoint;
    if number > newest.checkpoint {
        return Err(Apart::Behind { here: number, there: newest.checkpoint });
    }
    match there.iter().find(|line| line.checkpoint == number) {
        None => Err(Apart::Merged(number)),
        Some(line) if line.label != ours.label => Err(Apart::Another(number)),
        Some(_) if number == newest.checkpoint => Ok(Step::Done(number)),
        Some(_) => Ok(Step::Take { older: Some(number), newest: newest.checkpoint }),
    }
}

/// What a store keeps of a group; nothing if there is no such group.
///
/// # Errors
/// [`ReadError`].
pub fn kept(client: &mut Client, group: &str) -> Result<Vec<GenerationLine>, ReadError> {
    if client.status()?.iter().all(|status| status.group != group) {
        return Ok(Vec::new());
    }
    client.generations(group)
}

/// Brings a checkpoint from one store into another, as the difference to an older one or whole; gives the bytes of
/// the stream. `each` is told of each piece before it goes, and ends it by an error. What takes it has it confirmed then.
///
/// # Errors
/// [`ReadError`]; the store is as it was, and the connections are not to be used any more.
pub fn carry(
    there: &mut Client,
    here: &mut Client,
    group: &str,
    (older, newest): (Option<CheckpointId>, CheckpointId),
    each: &mut dyn FnMut(usize) -> io::Result<()>,
) -> Result<u64, ReadError> {
    let mut bytes = 0;
    let mut count = |piece: usize| {
        bytes += piece as u64;
        each(piece)
    };
    pour(here, group, &mut count, |sink| {
        let sent = there.transfer(group, older, newest, |piece| {
            if sink(Bytes::copy_from_slice(piece)) { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
        });
        // The pipe broke because of what this store says.
        sent.or_else(|error| if matches!(error, ReadError::Sink(_)) { Ok(()) } else { Err(error) })
    })?;
    Ok(bytes)
}

/// Brings a stream into a store while a thread makes it: `make` hands its pieces to a sink, which says when nobody takes any
/// more, as that is no error of its own. `each` is told of each piece before it goes, and ends it by an error.
///
/// # Errors
/// What `make` says, or [`ReadError`]; the store is as it was, and the connection is not to be used any more.
pub fn pour<E: From<ReadError> + Send>(
    here: &mut Client,
    group: &str,
    each: &mut dyn FnMut(usize) -> io::Result<()>,
    make: impl FnOnce(Sink<'_>) -> Result<(), E> + Send,
) -> Result<(), E> {
    let (pieces, came) = sync_channel::<Bytes>(PIECES);
    let (made, taken) = std::thread::scope(|scope| {
        // An empty one would be the end.
        let making = scope.spawn(move || make(&mut |piece| piece.is_empty() || pieces.send(piece).is_ok()));
        let taken = here.receive(Some(group.to_owned()), &mut |piece| {
            piece.clear();
            // What is cut off has no end, so it is refused.
            piece.extend_from_slice(&came.recv().unwrap_or_default());
            each(piece.len())
        });
        // Should it not take all: whoever makes it must not wait for that.
        drop(came);
        (making.join(), taken)
    });
    made.map_err(|_| ReadError::Sink(io::Error::other("what makes the stream failed")))??;
    taken?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use bfs_common::record::CheckpointLabel;

    use super::*;

    fn lines(numbers: &[u64], wall_ns: i64) -> Vec<GenerationLine> {
        let label = CheckpointLabel { wall_ns, tag: String::new(), trigger: "manual".into(), stopped_us: 0 };
        let line = |number: &u64| GenerationLine {
            checkpoint: CheckpointId(*number),
            label: label.clone(),
            changed: 0,
            bytes: 0,
            process: None,
        };
        numbers.iter().map(line).collect()
    }

    #[test]
    fn the_newest_is_taken_as_the_difference_to_the_newest_here() {
        let take = |older: Option<u64>, newest| {
            Ok(Step::Take { older: older.map(CheckpointId), newest: CheckpointId(newest) })
        };
        assert_eq!(next(&[], &[]), Ok(Step::Wait));
        assert_eq!(next(&lines(&[3], 1), &[]), Ok(Step::Wait));
        assert_eq!(next(&[], &lines(&[1, 2, 5], 1)), take(None, 5));
        assert_eq!(next(&lines(&[2], 1), &lines(&[1, 2, 5], 1)), take(Some(2), 5));
        assert_eq!(next(&lines(&[2, 5], 1), &lines(&[1, 5], 1)), Ok(Step::Done(CheckpointId(5))));
    }

    #[test]
    fn stores_that_parted_are_told_so() {
        let n = CheckpointId;
        assert_eq!(next(&lines(&[2], 1), &lines(&[1, 5], 1)), Err(Apart::Merged(n(2))));
        assert_eq!(next(&lines(&[5], 2), &lines(&[1, 5], 1)), Err(Apart::Another(n(5))));
        let behind = Apart::Behind { here: n(6), there: n(5) };
        assert_eq!(next(&lines(&[6], 1), &lines(&[1, 5], 1)), Err(behind));
    }
}
