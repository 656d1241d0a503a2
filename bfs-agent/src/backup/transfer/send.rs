//! Making a stream: the records that lead from one generation to a newer one, or from nothing.
//!
//! What the steps between the two touched is known from their before-images, so a difference costs what changed. Of
//! everything that was touched the state at the newer one is told, where it is another than at the older.

use bfs_common::record::{CheckpointId, FileKind, ObjectId, Record};

use super::super::error::BackupError;
use super::super::history::{Changes, changes};
use super::super::index::{Base, Node};
use super::super::past::{Past, Source};
use super::super::pieces::joined;
use super::moment_of;
use crate::transfer::{Head, PIECE, Sink, Writer};
use crate::tree;

/// Hands on the stream of a generation, as the difference to another one or whole. Both are held.
///
/// # Errors
/// If something cannot be read, or is lost.
pub(in crate::backup) fn send(
    source: Source<'_>,
    from: Option<CheckpointId>,
    to: CheckpointId,
    sink: Sink<'_>,
) -> Result<(), BackupError> {
    let mut newer = Past::open(source, to)?;
    let mut older = from.map(|from| Past::open(source, from)).transpose()?;
    let moment = |past: &Past<'_>| moment_of(past.checkpoint(), past.row());
    let head = Head {
        group: source.group.to_owned(),
        id: source.id,
        from: older.as_ref().map(moment),
        to: moment(&newer),
    };
    let mut writer = Writer::begin(&head, sink);
    let changed = match from {
        Some(from) => changes(&source, from, to)?,
        None => everything(&newer)?,
    };
    objects(&mut older, &mut newer, &changed, &mut writer)?;
    entries(older.as_ref(), &newer, &changed, &mut writer)?;
    if head.from.as_ref().is_none_or(|from| from.roots != head.to.roots) {
        writer.record(&Record::Roots { roots: head.to.roots.clone() }, b"");
    }
    for object in changed.objects.keys() {
        if older.as_ref().map(|older| older.node(*object)).transpose()?.flatten().is_some()
            && newer.node(*object)?.is_none()
        {
            writer.record(&Record::Forget { object: *object }, b"");
        }
    }
    writer.record(&Record::Checkpoint { checkpoint: to, label: head.to.label }, b"");
    writer.end();
    Ok(())
}

/// All objects of a generation.
fn everything(past: &Past<'_>) -> Result<Changes, BackupError> {
    let mut all = Changes::default();
    past.each(&mut |object, _| {
        all.objects.insert(object, Vec::new());
        Ok(true)
    })?;
    Ok(all)
}

/// New objects before anything that speaks of them, in the order of their numbers; then what others have now.
fn objects(
    older: &mut Option<Past<'_>>,
    newer: &mut Past<'_>,
    changed: &Changes,
    writer: &mut Writer<'_>,
) -> Result<(), BackupError> {
    for known in [false, true] {
        for (object, ranges) in &changed.objects {
            if writer.is_ended() {
                return Ok(());
            }
            let Some(after) = newer.node(*object)? else { continue };
            let before = older.as_ref().map(|older| older.node(*object)).transpose()?.flatten();
            match (known, before) {
                (false, None) => new(newer, *object, &after, writer)?,
                (true, Some(before)) => again(newer, *object, [&before, &after], ranges, writer)?,
                _ => {}
            }
        }
    }
    Ok(())
}

fn new(
    past: &mut Past<'_>,
    object: ObjectId,
    node: &Node,
    writer: &mut Writer<'_>,
) -> Result<(), BackupError> {
    let Node { identity, kind, device, meta, .. } = *node;
    writer.record(&Record::Object { object, identity, kind, device, meta }, &node.target);
    for (name, value) in &node.xattrs {
        writer.record(&Record::XattrSet { object, name: name.clone() }, value);
    }
    if kind == FileKind::Regular && node.size > 0 {
        writer.record(&Record::Truncate { object, size: node.size }, b"");
        bytes(past, object, (0, node.size), false, writer)?;
    }
    Ok(())
}

fn again(
    past: &mut Past<'_>,
    object: ObjectId,
    [before, after]: [&Node; 2],
    ranges: &[(u64, u64)],
    writer: &mut Writer<'_>,
) -> Result<(), BackupError> {
    if before.identity != after.identity {
        writer.record(&Record::Rebind { object, identity: after.identity }, b"");
    }
    if before.meta != after.meta {
        writer.record(&Record::Meta { object, meta: after.meta }, b"");
    }
    for (name, value) in after.xattrs.iter().filter(|xattr| !before.xattrs.contains(xattr)) {
        writer.record(&Record::XattrSet { object, name: name.clone() }, value);
    }
    for (name, _) in before.xattrs.iter().filter(|(name, _)| !after.xattrs.iter().any(|(n, _)| n == name)) {
        writer.record(&Record::XattrRemove { object, name: name.clone() }, b"");
    }
    if after.kind != FileKind::Regular {
        return Ok(());
    }
    if before.size != after.size {
        writer.record(&Record::Truncate { object, size: after.size }, b"");
    }
    // Of what was written beyond the old end there is no before-image.
    let grown = (before.size < after.size).then_some((before.size, after.size));
    for (start, end) in joined(ranges.iter().copied().chain(grown).collect()) {
        let end = end.min(after.size);
        if start < end {
            bytes(past, object, (start, end), start < before.size, writer)?;
        }
    }
    Ok(())
}

/// The bytes of a range; where they are zeros that is told only if something else may have been there.
fn bytes(
    past: &mut Past<'_>,
    object: ObjectId,
    (start, end): (u64, u64),
    tell_zeros: bool,
    writer: &mut Writer<'_>,
) -> Result<(), BackupError> {
    let mut waiting: (u64, Vec<u8>) = (start, Vec::new());
    let mut told = start;
    past.content(object, start, end, &mut |at, some| {
        for (from, run) in tree::without_holes(at, some) {
            let follows = waiting.0 + waiting.1.len() as u64 == from;
            if !waiting.1.is_empty() && (!follows || waiting.1.len() + run.len() > PIECE) {
                writer.record(&Record::Write { object, offset: waiting.0 }, &waiting.1);
                waiting.1.clear();
            }
            if tell_zeros && from > told {
                writer.record(&Record::Zero { object, offset: told, length: from - told }, b"");
            }
            if waiting.1.is_empty() {
                waiting.0 = from;
            }
            waiting.1.extend_from_slice(run);
            told = from + run.len() as u64;
        }
        !writer.is_ended()
    })?;
    if !waiting.1.is_empty() {
        writer.record(&Record::Write { object, offset: waiting.0 }, &waiting.1);
    }
    if tell_zeros && end > told {
        writer.record(&Record::Zero { object, offset: told, length: end - told }, b"");
    }
    Ok(())
}

/// First every entry that is not there any more, then those that are others now.
fn entries(
    older: Option<&Past<'_>>,
    newer: &Past<'_>,
    changed: &Changes,
    writer: &mut Writer<'_>,
) -> Result<(), BackupError> {
    let mut set = Vec::new();
    for (directory, name) in &changed.entries {
        let Some(older) = older else { continue };
        let (before, after) = (older.entry(*directory, name)?, newer.entry(*directory, name)?);
        // Of a directory that is new all entries are told below.
        if older.node(*directory)?.is_none() || before == after {
            continue;
        }
        match after {
            Some(object) => set.push((*directory, name.clone(), object)),
            None => writer.record(&Record::EntryDelete { directory: *directory, name: name.clone() }, b""),
        }
    }
    for object in changed.objects.keys() {
        let Some(node) = newer.node(*object)? else { continue };
        let new = older.map(|older| older.node(*object)).transpose()?.flatten().is_none();
        if new && node.kind == FileKind::Directory {
            let all = newer.entries(*object)?;
            set.extend(all.into_iter().map(|(name, child)| (*object, name, child)));
        }
    }
    for (directory, name, object) in set {
        writer.record(&Record::EntrySet { directory, name, object }, b"");
    }
    Ok(())
}
