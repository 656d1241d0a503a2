//! Looking at what a step touches, before it builds on it: the right files, in places where nothing else stands, with the
//! bytes that their checksums say.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use bfs_common::record::{CheckpointId, FileKind, GroupId, ObjectId};
use rustix::fs::{AtFlags, OFlags};

use super::super::damage::Damage;
use super::super::error::BackupError;
use super::super::images::{self, Blocks, Line};
use super::super::index::{Node, Phase, Place};
use super::super::pieces::{Piece, Pieces};
use super::super::sums;
use super::Step;
use crate::tree::{self, FileStat};

/// Something that is damaged, and the bytes.
pub(super) type Found = Vec<(ObjectId, Damage)>;

impl Step<'_> {
    /// Looks at everything that the step touches, before it is begun: bytes that are not what they should be are
    /// returned, as far as it is not known yet.
    ///
    /// # Errors
    /// [`BackupError::Foreign`] where an object is missing or another file, and what else goes wrong.
    pub fn look(mut self) -> Result<Found, BackupError> {
        self.vacate()?;
        let mut found = Vec::new();
        let plan = self.plan;
        for (object, touched) in &plan.objects {
            let Some(before) = &touched.before else { continue };
            if touched.after.is_none() {
                // What goes may be gone already, but nothing else may stand there.
                if self.locate(*object)?.is_some() {
                    self.open(*object, OFlags::PATH)?;
                }
                continue;
            }
            if before.kind != FileKind::Regular {
                self.open(*object, OFlags::PATH)?;
                continue;
            }
            let file = File::from(self.open(*object, OFlags::RDONLY)?);
            let now = stat(*object, &file)?;
            let sums = self.base.sums(*object);
            let content = &touched.change.content;
            let mut damage = if is_as_left(&now, before) {
                sums::look(&sums, *object, &file, content, before.size, &mut self.buffer, None)?
            } else {
                by_sums(&sums, &file, before.size, false)?
            };
            let known = self.base.damage(*object)?;
            // A block of which a part is damaged may have no checksum: then nothing vouches for the rest of it.
            for (block, start, end) in sums::blocks_of(&known.iter().collect::<Vec<_>>(), before.size) {
                if sums::own(&sums, block)?.is_none() {
                    damage.add(start, end);
                }
            }
            if damage.iter().any(|(start, end)| !known.without(start, end).is_empty()) {
                found.push((*object, damage));
            }
        }
        Ok(found)
    }

    /// The same for a step that goes on: what it writes over stands in its images, and the rest of these blocks must
    /// still be as it was, for both get one new checksum.
    ///
    /// # Errors
    /// As of [`Self::look`].
    pub fn look_again(
        mut self,
        phase: Phase,
        group: GroupId,
        from: CheckpointId,
    ) -> Result<Found, BackupError> {
        self.detached = phase == Phase::Detached;
        let (plan, base, dir) = (self.plan, self.base, self.area.images());
        let had = match before_of(dir, group, from) {
            Ok(had) => Some(had),
            Err(error) => {
                tracing::warn!("{error}: all that the step writes to counts as damaged");
                None
            }
        };
        let (mut blocks, mut found) = (Blocks::new(dir), Vec::new());
        for (object, touched) in &plan.objects {
            let (Some(before), Some(_)) = (&touched.before, &touched.after) else { continue };
            let content = &touched.change.content;
            if before.kind != FileKind::Regular || content.is_empty() || before.size == 0 {
                continue;
            }
            let file = File::from(self.open(*object, OFlags::RDONLY)?);
            let known = base.damage(*object)?;
            let damage = match &had {
                None => Damage::all(before.size),
                Some(had) => {
                    let mut put_back = |start, bytes: &mut [u8]| {
                        if known.touches(start, start + bytes.len() as u64) {
                            return Ok(false);
                        }
                        // Without its image a block does not fit.
                        had.get(object).map_or(Ok(true), |pieces| put_over(pieces, &mut blocks, start, bytes))
                    };
                    let sums = base.sums(*object);
                    sums::look(
                        &sums,
                        *object,
                        &file,
                        content,
                        before.size,
                        &mut self.buffer,
                        Some(&mut put_back),
                    )?
                }
            };
            if damage.iter().any(|(start, end)| !known.without(start, end).is_empty()) {
                found.push((*object, damage));
            }
        }
        Ok(found)
    }

    /// Empties the places that the step fills and that have no object before it: what stands there must not be taken
    /// for what the step makes. Roots may be folders that were there before the backup was.
    fn vacate(&mut self) -> Result<(), BackupError> {
        let plan = self.plan;
        for place in plan.attach.keys().filter(|place| !plan.detach.contains_key(place)) {
            let Place::Entry(directory, _) = place else { continue };
            if plan.objects.get(directory).is_some_and(|touched| touched.before.is_none()) {
                continue;
            }
            let Some((dir, name)) = self.place(place, false)? else { continue };
            if rustix::fs::statat(&*dir, &name[..], AtFlags::SYMLINK_NOFOLLOW).is_ok() {
                self.displace(&dir, &name)?;
            }
        }
        Ok(())
    }
}

/// What a step writes over, by its images.
fn before_of(
    dir: &Path,
    group: GroupId,
    from: CheckpointId,
) -> Result<HashMap<ObjectId, Pieces>, BackupError> {
    let mut had: HashMap<ObjectId, Pieces> = HashMap::new();
    images::read(dir, group, from, |line, block| {
        match line {
            Line::Bytes(object, start) => {
                let end = start + u64::from(block.len);
                had.entry(object).or_default().fill(start, end, Piece::Block(block, 0));
            }
            Line::Zero(object, start, end) => had.entry(object).or_default().fill(start, end, Piece::Zero),
            // What is unknown is noted as damaged.
            Line::Unknown(..) | Line::Object(..) | Line::Entry(..) | Line::End(_) => {}
        }
        Ok(())
    })?;
    Ok(had)
}

/// Puts what is known of a range of a file over its bytes.
fn put_over(pieces: &Pieces, blocks: &mut Blocks, start: u64, bytes: &mut [u8]) -> Result<bool, BackupError> {
    let (mut at, end) = (start, start + bytes.len() as u64);
    let mut image = Vec::new();
    while let Some((from, to, piece)) = pieces.next(at, end) {
        let part = &mut bytes[(from - start) as usize..(to - start) as usize];
        match piece {
            Piece::Zero => part.fill(0),
            Piece::Unknown => return Ok(false),
            Piece::Block(block, skip) => match blocks.part(block, skip, to - from, &mut image) {
                Ok(found) => part.copy_from_slice(found),
                Err(BackupError::Corrupt { .. }) => return Ok(true),
                Err(error) => return Err(error),
            },
        }
        at = to;
    }
    Ok(true)
}

pub(super) fn stat(object: ObjectId, file: &File) -> Result<FileStat, BackupError> {
    tree::stat_fd(file.as_fd()).map_err(BackupError::io("stat object", object.to_string()))
}

/// Whether a file has the size and time that the applier gave it.
pub(super) fn is_as_left(now: &FileStat, node: &Node) -> bool {
    let time = |meta: &bfs_common::record::Meta| (meta.mtime_sec, meta.mtime_nsec);
    now.size == node.size && time(&now.meta) == time(&node.meta)
}

/// Which bytes of a file that somebody may have changed are not what they should be: all, if it has no checksums and is not
/// as the applier left it.
pub(super) fn by_sums(
    sums: &impl sums::Sums,
    file: &File,
    size: u64,
    as_left: bool,
) -> Result<Damage, BackupError> {
    let found = sums::compare(sums, file, size)?;
    if found.unknown.is_some() && !as_left {
        return Ok(Damage::all(size));
    }
    let mut damage = Damage::default();
    found.bad.iter().for_each(|(start, end)| damage.add(*start, *end));
    found.unreadable.iter().for_each(|(start, end, _)| damage.add(*start, *end));
    Ok(damage)
}
