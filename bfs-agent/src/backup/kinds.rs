//! Which objects live, and of what type: so that the gate refuses records that no applier can
//! ever apply. Pure.
//!
//! One byte an object number, in pages that exist only while an object of theirs lives.

use std::collections::BTreeMap;

use bfs_common::record::{FileKind, Meta, ObjectId, PolicyLine, Record};

use crate::policy::POLICIES_MAX;

/// Object numbers in a page.
const PAGE: u64 = 4096;
/// Longest target of a symlink, without the zero that ends it (`PATH_MAX`).
const TARGET_MAX: usize = 4095;
/// Longest name and value of an extended attribute (linux/limits.h).
const XATTR_NAME_MAX: usize = 255;
const XATTR_VALUE_MAX: usize = 65_536;
/// Longest tag and trigger of a checkpoint, in bytes.
const LABEL_MAX: usize = 1024;
/// Most settings of a policy, and bytes of all of them with the pattern.
const SETTINGS_MAX: usize = 64;
const LINE_MAX: usize = 16 << 10;
/// Forgotten since the last marker: records of its step may still name it.
const FORGOTTEN: u8 = u8::MAX;

#[derive(Clone, Debug)]
struct Page {
    used: u16,
    codes: [u8; PAGE as usize],
}

/// The types of the objects that live.
#[derive(Clone, Debug, Default)]
pub struct Kinds {
    pages: BTreeMap<u64, Box<Page>>,
    forgotten: Vec<ObjectId>,
}

/// What an object number stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Never,
    Forgotten,
    Lives(FileKind),
}

const KINDS: [FileKind; 7] = [
    FileKind::Regular,
    FileKind::Directory,
    FileKind::Symlink,
    FileKind::Fifo,
    FileKind::Socket,
    FileKind::CharDevice,
    FileKind::BlockDevice,
];

impl Kinds {
    /// An object lives.
    pub fn insert(&mut self, object: ObjectId, kind: FileKind) {
        let code = KINDS.iter().position(|k| *k == kind).map_or(0, |at| at as u8 + 1);
        self.set(object, code);
    }

    fn set(&mut self, object: ObjectId, code: u8) {
        let key = object.0 / PAGE;
        let page =
            self.pages.entry(key).or_insert_with(|| Box::new(Page { used: 0, codes: [0; PAGE as usize] }));
        let was = std::mem::replace(&mut page.codes[(object.0 % PAGE) as usize], code);
        match (was, code) {
            (0, 1..) => page.used += 1,
            (1.., 0) => page.used -= 1,
            _ => {}
        }
        if page.used == 0 {
            self.pages.remove(&key);
        }
    }

    fn state(&self, object: ObjectId) -> State {
        match self.pages.get(&(object.0 / PAGE)).map_or(0, |page| page.codes[(object.0 % PAGE) as usize]) {
            0 => State::Never,
            FORGOTTEN => State::Forgotten,
            code => State::Lives(KINDS[usize::from(code) - 1]),
        }
    }

    /// Whether a directory lives under this number.
    #[must_use]
    pub fn is_directory(&self, object: ObjectId) -> bool {
        self.state(object) == State::Lives(FileKind::Directory)
    }

    /// Follows a record that was let in.
    pub fn follow(&mut self, record: &Record) {
        match record {
            Record::Object { object, kind, .. } => self.insert(*object, *kind),
            Record::Forget { object } if matches!(self.state(*object), State::Lives(_)) => {
                self.set(*object, FORGOTTEN);
                self.forgotten.push(*object);
            }
            Record::Checkpoint { .. } => {
                for object in std::mem::take(&mut self.forgotten) {
                    self.set(object, 0);
                }
            }
            _ => {}
        }
    }

    /// Whether a record can be applied, as far as it can be known here.
    ///
    /// # Errors
    /// Why not, in words.
    pub fn check(&self, highest: ObjectId, record: &Record, payload: &[u8]) -> Result<(), String> {
        let given = |object: &ObjectId| {
            let ok = object.0 > 0 && *object <= highest;
            if ok { Ok(()) } else { Err(format!("object {object} was never there")) }
        };
        let bytes = |object: &ObjectId, offset: u64, length: u64| {
            given(object)?;
            if offset.checked_add(length).is_none_or(|end| end > i64::MAX as u64) {
                return Err(format!("object {object}: a range that ends beyond 2^63"));
            }
            match self.state(*object) {
                State::Lives(kind) if kind != FileKind::Regular => {
                    Err(format!("bytes for object {object}, which is a {kind:?}"))
                }
                // Without effect on what is gone.
                _ => Ok(()),
            }
        };
        match record {
            Record::Object { object, kind, meta, .. } => {
                check_meta(meta)?;
                let fits = !payload.is_empty() && payload.len() <= TARGET_MAX && !payload.contains(&0);
                if *kind == FileKind::Symlink && !fits {
                    return Err(format!("object {object}: no symlink has this target"));
                }
                if object.0 == 0 { Err("object number 0".into()) } else { Ok(()) }
            }
            Record::Meta { object, meta } => {
                given(object)?;
                check_meta(meta)
            }
            Record::EntrySet { directory, name, object } => {
                match self.state(*directory) {
                    State::Lives(FileKind::Directory) | State::Forgotten => {}
                    State::Lives(kind) => {
                        return Err(format!("entry {name:?} in object {directory}, which is a {kind:?}"));
                    }
                    State::Never => {
                        return Err(format!("entry {name:?} in object {directory}, which does not exist"));
                    }
                }
                match self.state(*object) {
                    State::Never => Err(format!("entry {name:?} is object {object}, which does not exist")),
                    _ => Ok(()),
                }
            }
            Record::Write { object, offset } => bytes(object, *offset, payload.len() as u64),
            Record::Zero { object, offset, length } => bytes(object, *offset, *length),
            Record::Truncate { object, size } => bytes(object, *size, 0),
            Record::XattrSet { object, name } => {
                given(object)?;
                let parts = name.split_once('.');
                if name.len() > XATTR_NAME_MAX
                    || name.contains('\0')
                    || parts.is_none_or(|(space, rest)| space.is_empty() || rest.is_empty())
                {
                    return Err(format!("object {object}: no extended attribute can be named {name:?}"));
                }
                if payload.len() > XATTR_VALUE_MAX {
                    return Err(format!("object {object}: {name} has {} bytes", payload.len()));
                }
                // Nobody can set these on anything else (xattr_permission in fs/xattr.c), so no agent has seen one there.
                match self.state(*object) {
                    State::Lives(kind)
                        if name.starts_with("user.")
                            && !matches!(kind, FileKind::Regular | FileKind::Directory) =>
                    {
                        Err(format!("object {object}: no {kind:?} can have {name:?}"))
                    }
                    _ => Ok(()),
                }
            }
            Record::Checkpoint { checkpoint, label } => {
                if label.tag.len() > LABEL_MAX || label.trigger.len() > LABEL_MAX {
                    return Err(format!("the label of checkpoint {checkpoint} is beyond {LABEL_MAX} bytes"));
                }
                Ok(())
            }
            Record::Policies { lines } => check_policies(lines),
            Record::Rebind { object, .. }
            | Record::Closed { object }
            | Record::Forget { object }
            | Record::XattrRemove { object, .. } => given(object),
            _ => Ok(()),
        }
    }
}

/// What they mean is asked later, and what is not understood is named then: only their number and size is bounded.
fn check_policies(lines: &[PolicyLine]) -> Result<(), String> {
    let bytes =
        |line: &PolicyLine| line.settings.iter().fold(line.pattern.len(), |n, (k, v)| n + k.len() + v.len());
    if lines.len() > POLICIES_MAX
        || lines.iter().any(|line| line.settings.len() > SETTINGS_MAX || bytes(line) > LINE_MAX)
    {
        return Err("policies that are too many or too long".into());
    }
    Ok(())
}

fn check_meta(meta: &Meta) -> Result<(), String> {
    // An owner of -1 means "leave it" to chown, and some values of nanoseconds have a meaning of
    // their own (utimensat(2)).
    if meta.permissions & !0o7777 != 0
        || meta.uid == u32::MAX
        || meta.gid == u32::MAX
        || meta.mtime_nsec >= 1_000_000_000
    {
        return Err(format!("attributes that no file has: {meta:?}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bfs_common::record::{CheckpointId, CheckpointLabel, Identity, Name};

    const FILE: ObjectId = ObjectId(1);
    const DIR: ObjectId = ObjectId(5000);

    fn kinds() -> Kinds {
        let mut kinds = Kinds::default();
        kinds.insert(FILE, FileKind::Regular);
        kinds.insert(DIR, FileKind::Directory);
        kinds
    }

    fn entry(directory: ObjectId, object: ObjectId) -> Record {
        Record::EntrySet { directory, name: Name::new(b"x").unwrap(), object }
    }

    fn xattr(name: &str) -> Record {
        Record::XattrSet { object: FILE, name: name.into() }
    }

    #[test]
    fn what_no_file_system_can_do_is_refused() {
        let kinds = kinds();
        let check = |record: &Record, payload: &[u8]| kinds.check(DIR, record, payload);
        let object = |kind, meta| {
            let identity = Identity::default();
            Record::Object { object: ObjectId(6000), identity, kind, device: 0, meta }
        };
        let meta = Meta::default();
        let strange = Meta { mtime_nsec: 1_000_000_000, ..meta };
        let long = "user.".to_owned() + &"x".repeat(251);
        for (record, payload) in [
            (entry(DIR, ObjectId(2)), &b""[..]),
            (entry(ObjectId(2), FILE), b""),
            (entry(FILE, DIR), b""),
            (Record::Write { object: DIR, offset: 0 }, b"x"),
            (Record::Write { object: ObjectId(9999), offset: 0 }, b"x"),
            (Record::Write { object: FILE, offset: i64::MAX as u64 }, b"x"),
            (Record::Truncate { object: DIR, size: 0 }, b""),
            (object(FileKind::Symlink, meta), b""),
            (object(FileKind::Symlink, meta), b"a\0b"),
            (object(FileKind::Symlink, meta), &[b'x'; 4096]),
            (object(FileKind::Regular, strange), b""),
            (Record::Meta { object: FILE, meta: Meta { uid: u32::MAX, ..meta } }, b""),
            (xattr("name"), b""),
            (xattr(".name"), b""),
            (xattr(&long), b""),
            (xattr("user.x"), &[0; XATTR_VALUE_MAX + 1]),
        ] {
            assert!(check(&record, payload).is_err(), "{record:?}");
        }
        for (record, payload) in [
            (entry(DIR, FILE), &b""[..]),
            (Record::Write { object: FILE, offset: 0 }, b"x"),
            (object(FileKind::Symlink, meta), b"a"),
            (xattr("user.x"), &[0; XATTR_VALUE_MAX]),
        ] {
            assert_eq!(check(&record, payload), Ok(()), "{record:?}");
        }
    }

    #[test]
    fn user_attributes_are_for_files_and_directories() {
        let mut kinds = kinds();
        for (kind, named, may) in [
            (FileKind::Regular, "user.x", true),
            (FileKind::Directory, "user.x", true),
            (FileKind::Fifo, "user.x", false),
            (FileKind::Symlink, "user.x", false),
            (FileKind::CharDevice, "user.x", false),
            (FileKind::Fifo, "trusted.x", true),
        ] {
            kinds.insert(FILE, kind);
            assert_eq!(kinds.check(DIR, &xattr(named), b"v").is_ok(), may, "{kind:?} {named}");
        }
    }

    #[test]
    fn what_is_forgotten_may_be_named_up_to_the_marker() {
        let mut kinds = kinds();
        kinds.follow(&Record::Forget { object: FILE });
        assert_eq!(kinds.check(DIR, &entry(DIR, FILE), b""), Ok(()));
        kinds.follow(&Record::Checkpoint { checkpoint: CheckpointId(1), label: CheckpointLabel::default() });
        assert!(kinds.check(DIR, &entry(DIR, FILE), b"").is_err());
        assert_eq!(kinds.check(DIR, &Record::Write { object: FILE, offset: 0 }, b"x"), Ok(()));
        assert_eq!(kinds.pages.len(), 1);
    }
}
