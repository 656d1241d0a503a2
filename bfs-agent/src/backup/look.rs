//! Single looks into a generation, for a mount: each costs what it asks for.

use bfs_common::past::{LOOK_BYTES_MAX, Look, Seen};
use bfs_common::record::{FileKind, ObjectId};
use bfs_common::wire::CatalogObject;
use bytes::Bytes;

use super::error::BackupError;
use super::history::range;
use super::index::Base;
use super::past::Past;
use super::read;

/// Entries of a directory in one answer.
const ENTRIES_MAX: usize = 8192;

/// Looks, and says what was seen; with the bytes that were asked for.
///
/// # Errors
/// What cannot be read.
pub fn look(past: &mut Past<'_>, look: Look) -> Result<(Seen, Bytes), BackupError> {
    let seen = match look {
        Look::Roots => Seen::Roots(past.row().label.clone(), past.roots().to_vec()),
        Look::Object(object) => Seen::Object(shown(past, object)?),
        Look::Entry(directory, name) => Seen::Object(match past.entry(directory, &name)? {
            Some(object) => shown(past, object)?,
            None => None,
        }),
        Look::Entries(directory, after) => {
            let mut all = past.entries(directory)?;
            if let Some(after) = after {
                all.drain(..all.partition_point(|(name, _)| *name <= after));
            }
            let last = all.len() <= ENTRIES_MAX;
            all.truncate(ENTRIES_MAX);
            let mut entries = Vec::with_capacity(all.len());
            for (name, object) in all {
                let kind = past.node(object)?.map(|node| node.kind).ok_or_else(|| {
                    let why =
                        format!("entry {name:?} of directory {directory} is object {object}, which is gone");
                    BackupError::corrupt("index.redb", why)
                })?;
                entries.push((name, object, kind));
            }
            Seen::Entries(entries, last)
        }
        Look::Xattr(object, name) => {
            let node = past.node(object)?;
            let value = node.and_then(|node| node.xattrs.into_iter().find(|(n, _)| *n == name));
            return Ok((Seen::Bytes(value.is_some()), value.map(|(_, value)| value).unwrap_or_default()));
        }
        Look::Bytes(object, from, len) => {
            let Some(node) = past.node(object)?.filter(|node| node.kind == FileKind::Regular) else {
                let why = format!("object {object} is no file at checkpoint {}", past.checkpoint());
                return Err(BackupError::Stream(why));
            };
            let end = from.saturating_add(len.min(LOOK_BYTES_MAX).into()).min(node.size);
            let bytes = if from < end { range(past, object, from, end)? } else { Vec::new() };
            return Ok((Seen::Bytes(true), bytes.into()));
        }
    };
    Ok((seen, Bytes::new()))
}

/// An object without its entries and the values of its attributes, and how many names it has.
fn shown(past: &Past<'_>, object: ObjectId) -> Result<Option<(CatalogObject, u32)>, BackupError> {
    let Some(node) = past.node(object)? else { return Ok(None) };
    let links = u32::try_from(node.places.len()).unwrap_or(u32::MAX);
    let names = node.xattrs.iter().map(|(name, _)| (name.clone(), Bytes::new())).collect();
    Ok(Some((read::line(object, &node, names, Vec::new()), links)))
}
