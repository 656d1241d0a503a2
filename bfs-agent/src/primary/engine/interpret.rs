//! What an event means: from the record of a system call to an act on the model.
//!
//! An [`Act`] names its places in the model, but changes nothing; [`Act::touches`] says what it
//! shares with others, which the cut needs also of calls that it leaves out.

use std::ops::Range;

use bfs_common::abi::{Event, FileEvent, InodeAttr, PathEvent, flag, kind};
use bfs_common::record::{FileKind, Meta, Name, ObjectId};
use smallvec::SmallVec;

use super::host::Host;
use super::model::Model;
use super::recent::Span;
use super::resolve::{Place, Start, Way, behind_descriptor, resolve};

/// What a call did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// Nothing that concerns the group.
    Nothing,
    /// It cannot be told what: everything is suspect.
    Everything,
    /// An open made a file.
    Create {
        /// Its directory, with attributes after the call.
        parent: ObjectId,
        /// See `parent`.
        parent_attr: InodeAttr,
        /// Its name.
        name: Name,
        /// The file.
        attr: InodeAttr,
    },
    /// Bytes of a file changed.
    Write {
        /// The file.
        object: ObjectId,
        /// Where.
        range: Range<u64>,
        /// Whether the range may hold more than what was written.
        wider: bool,
        /// Whether the event holds the bytes.
        inline: bool,
        /// The file after the call, where the probe could read it.
        attr: Option<InodeAttr>,
        /// The open file, where others use its position too and the range comes from there.
        position: Option<u64>,
    },
    /// The position of an open file that others use too was set.
    Seek {
        /// The file.
        object: ObjectId,
        /// The open file.
        file: u64,
    },
    /// Bytes of a file are being written, and go on being written after the call.
    Linger {
        /// The file.
        object: ObjectId,
        /// Where.
        range: Range<u64>,
    },
    /// A file got a length.
    Truncate {
        /// The file.
        object: ObjectId,
        /// The length.
        size: u64,
        /// The file after the call, where the probe could read it.
        attr: Option<InodeAttr>,
        /// The entry that it was found by, if it was one.
        place: Option<Place>,
    },
    /// Attributes changed.
    Attr {
        /// The object.
        object: ObjectId,
        /// The object after the call, where the probe could read it.
        attr: Option<InodeAttr>,
        /// Whether extended attributes may have changed.
        xattrs: bool,
        /// The entry that it was found by, if it was one.
        place: Option<Place>,
    },
    /// Content and attributes changed in a way that is not known.
    Touch {
        /// The object.
        object: ObjectId,
    },
    /// A file was mapped, shared and writable: it can be stored into from now on.
    Mapped {
        /// The file.
        object: ObjectId,
    },
    /// The kernel writes to the file from now on, whenever it likes.
    Held {
        /// The file.
        object: ObjectId,
    },
    /// Pages of a mapped file became dirty: they can be stored into from now on.
    Dirtied {
        /// The file.
        object: ObjectId,
        /// Where.
        range: Range<u64>,
    },
    /// Somebody who is not selected changed something of it.
    Foreign {
        /// The object.
        object: ObjectId,
    },
    /// A call that may have changed an entry and what it names.
    Suspect {
        /// The entry.
        place: Place,
        /// Another one.
        also: Option<Place>,
    },
    /// An entry was removed.
    Unlink {
        /// The entry.
        place: Place,
        /// Its directory after the call.
        parent_attr: Option<InodeAttr>,
    },
    /// A directory, special file, symlink or socket was made.
    Make {
        /// The entry.
        place: Place,
        /// Its directory after the call.
        parent_attr: Option<InodeAttr>,
    },
    /// A further name was made.
    Link {
        /// The object, where the model knows it.
        object: Option<ObjectId>,
        /// The entry that it was found by, if it was one.
        source: Option<Place>,
        /// The object was found by a look at a name outside, which may be another's since the call.
        looked: bool,
        /// The new entry.
        place: Place,
        /// Its directory after the call.
        parent_attr: Option<InodeAttr>,
    },
    /// An entry was renamed.
    Rename {
        /// From here.
        from: Place,
        /// To here.
        to: Place,
        /// `RENAME_EXCHANGE`.
        exchange: bool,
        /// `RENAME_WHITEOUT`.
        whiteout: bool,
        /// The directories after the call.
        from_attr: Option<InodeAttr>,
        /// See `from_attr`.
        to_attr: Option<InodeAttr>,
    },
}

/// What one act touches: mostly few things, so they need no memory of their own.
pub type Things = SmallVec<[Thing; 3]>;

/// What an act shares with others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Thing {
    /// Bytes of a file.
    Data(ObjectId, Range<u64>),
    /// Attributes of an object.
    Meta(ObjectId),
    /// Extended attributes of an object.
    Xattrs(ObjectId),
    /// An entry.
    Entry(ObjectId, Name),
    /// All entries of a directory.
    List(ObjectId),
    /// An entry that a winding path went through: shared with whoever changes the entry.
    Way(ObjectId, Name),
    /// Some object that has a name outside.
    Aside,
    /// Anything.
    Everything,
}

/// The attributes as records carry them.
#[must_use]
pub fn meta_of(attr: &InodeAttr) -> Meta {
    Meta {
        permissions: attr.mode & 0o7777,
        uid: attr.uid,
        gid: attr.gid,
        mtime_sec: attr.mtime_sec,
        mtime_nsec: attr.mtime_nsec,
    }
}

/// When the call of an event ran.
#[must_use]
pub fn span_of(event: &Event<'_>) -> Span {
    let h = event.header();
    let seen_ns = h.end_ns.saturating_add(u64::from(h.read_ns));
    Span { tid: h.tid, start_ns: h.start_ns, end_ns: h.end_ns, seen_ns }
}

/// What an event means, given the model as it stands; and the way that its paths took.
pub fn interpret(model: &Model, host: &mut dyn Host, event: &Event<'_>) -> (Act, Way) {
    let mut way = Way::default();
    let act = match event {
        Event::File { event, name, .. } => file(model, event, name),
        Event::Run { event } => match model.find(event.attr.id) {
            Some(object) => {
                let end = event.file_offset.saturating_add(event.header.ret.cast_unsigned());
                let range = event.file_offset..end;
                let attr = event.known_attr();
                Act::Write { object, range, wider: false, inline: false, attr, position: None }
            }
            None => Act::Nothing,
        },
        Event::Dirty { event } => match model.find(event.id) {
            Some(object) => {
                Act::Dirtied { object, range: event.offset..event.offset.saturating_add(event.len) }
            }
            None => Act::Nothing,
        },
        Event::Path { event, path1, path2 } if event.header.kind != kind::PATH_ENTER => {
            path(model, host, event, path1, path2, &mut way)
        }
        Event::Foreign { event } => {
            model.find(event.id).map_or(Act::Nothing, |object| Act::Foreign { object })
        }
        // An end that comes this far is one of something unknown.
        Event::Task { event } if matches!(event.header.kind, kind::COMPAT | kind::ENDED) => Act::Everything,
        // Nothing was changed by it.
        Event::Failed { .. } | Event::Path { .. } | Event::Data { .. } | Event::Task { .. } => Act::Nothing,
    };
    (act, way)
}

pub(super) fn is_open(nr: i64) -> bool {
    matches!(nr, libc::SYS_open | libc::SYS_creat | libc::SYS_openat | libc::SYS_openat2)
}

/// Whether the call that "mapped" a file made it the backing file of a loop device: no mapping, but the
/// kernel writes to it of its own accord.
pub(super) fn is_held(e: &FileEvent) -> bool {
    i64::from(e.header.nr) == libc::SYS_ioctl
}

fn file(model: &Model, e: &FileEvent, name: &[u8]) -> Act {
    let nr = i64::from(e.header.nr);
    let flags = e.header.flags;
    let known = model.find(e.attr.id);
    if is_open(nr) && flags & flag::CREATED != 0 && flags & flag::FAILED == 0 {
        return match (model.find(e.parent.id), Name::new(name)) {
            (Some(parent), Some(name)) if model.verdict(parent, &name).leaves_out(FileKind::Regular) => {
                Act::Attr { object: parent, attr: Some(e.parent), xattrs: false, place: None }
            }
            (Some(parent), Some(name)) => Act::Create { parent, parent_attr: e.parent, name, attr: e.attr },
            _ => known.map_or(Act::Nothing, |object| Act::Touch { object }),
        };
    }
    let Some(object) = known else { return Act::Nothing };
    if e.header.kind == kind::FILE_BEGUN {
        return Act::Linger { object, range: e.range_start..e.range_end };
    }
    if e.header.kind == kind::TOUCH || flags & flag::FAILED != 0 {
        return Act::Touch { object };
    }
    if e.header.kind == kind::MAPPED {
        return if is_held(e) { Act::Held { object } } else { Act::Mapped { object } };
    }
    let attr = e.attr;
    match nr {
        _ if is_open(nr) => {
            if flags & flag::TRUNCATED == 0 {
                return Act::Nothing;
            }
            Act::Truncate { object, size: 0, attr: Some(attr), place: None }
        }
        libc::SYS_ftruncate => Act::Truncate { object, size: e.file_offset, attr: Some(attr), place: None },
        libc::SYS_write | libc::SYS_pwrite64 | libc::SYS_writev | libc::SYS_pwritev | libc::SYS_pwritev2 => {
            if model.kind(object) != Some(FileKind::Regular) {
                // Of a FIFO a write leaves its time only.
                return Act::Attr { object, attr: Some(attr), xattrs: false, place: None };
            }
            let at_position = flags & flag::SHARED_FILE != 0
                && flags & flag::APPEND == 0
                && !matches!(nr, libc::SYS_pwrite64 | libc::SYS_pwritev);
            let wider = flags & flag::OFFSET_UNKNOWN != 0;
            let range = if !wider {
                e.file_offset..e.file_offset.saturating_add(e.count)
            } else if e.range_end > 0 {
                e.range_start..e.range_end
            } else {
                0..u64::MAX
            };
            let inline = flags & flag::INLINE != 0
                && flags & (flag::DATA_LOST | flag::OFFSET_UNKNOWN | flag::BY_REFERENCE) == 0;
            let position = at_position.then_some(e.file);
            Act::Write { object, range, wider, inline, attr: Some(attr), position }
        }
        libc::SYS_lseek => Act::Seek { object, file: e.file },
        libc::SYS_fchmod | libc::SYS_fchown => {
            Act::Attr { object, attr: Some(attr), xattrs: true, place: None }
        }
        libc::SYS_utimensat | libc::SYS_futimesat => {
            Act::Attr { object, attr: Some(attr), xattrs: false, place: None }
        }
        libc::SYS_fsetxattr | libc::SYS_fremovexattr => {
            Act::Attr { object, attr: Some(attr), xattrs: true, place: None }
        }
        libc::SYS_close => Act::Nothing,
        _ => Act::Touch { object },
    }
}

struct Paths<'a> {
    event: &'a PathEvent,
    path1: &'a [u8],
    path2: &'a [u8],
    way: &'a mut Way,
}

impl Paths<'_> {
    fn place(&mut self, model: &Model, host: &mut dyn Host, second: bool, follow: bool) -> Place {
        let (base, mut path, by_descriptor) = if second {
            (self.event.base2.id, self.path2, flag::DESCRIPTOR2)
        } else {
            (self.event.base1.id, self.path1, flag::DESCRIPTOR1)
        };
        if self.event.header.flags & by_descriptor != 0 {
            path = behind_descriptor(path);
        }
        if path.is_empty() {
            return model.find(base).map_or(Place::Outside, Place::Object);
        }
        let start = Start {
            base,
            root: self.event.root,
            tgid: self.event.header.tgid,
            mounts: self.event.mounts,
            ended_ns: self.event.header.end_ns,
        };
        resolve(model, host, start, path, follow, self.way)
    }

    fn parent_attr(&self, model: &Model, place: &Place, second: bool) -> Option<InodeAttr> {
        let (attr, bit) = if second {
            (self.event.base2, flag::PARENT2_ATTR)
        } else {
            (self.event.base1, flag::PARENT1_ATTR)
        };
        let (Place::Entry(directory, _) | Place::LeftOut(Some(directory))) = place else { return None };
        let same = model.get(*directory).is_some_and(|o| o.inode == attr.id);
        (self.event.header.flags & bit != 0 && same).then_some(attr)
    }

    /// Whether what the first path led to was found by a look at a name outside, which may be another's since the call.
    /// (A directory is found by the way to it.)
    fn is_looked_at(&self, model: &Model, place: &Place) -> bool {
        let by_descriptor = self.event.header.flags & flag::DESCRIPTOR1 != 0;
        let named = if by_descriptor { behind_descriptor(self.path1) } else { self.path1 };
        let leaf = |object: &ObjectId| model.kind(*object) != Some(FileKind::Directory);
        !named.is_empty() && matches!(place, Place::Object(object) if leaf(object))
    }
}

fn path(model: &Model, host: &mut dyn Host, e: &PathEvent, path1: &[u8], path2: &[u8], way: &mut Way) -> Act {
    let mut p = Paths { event: e, path1, path2, way };
    if e.header.flags & flag::PATH_UNREADABLE != 0 {
        return Act::Everything;
    }
    let nr = i64::from(e.header.nr);
    let at_flags = |i: usize| e.args[i] as i32;
    if e.header.flags & flag::FAILED != 0 {
        let also = (!path2.is_empty()).then(|| p.place(model, host, true, false));
        return Act::Suspect { place: p.place(model, host, false, also.is_none()), also };
    }
    match nr {
        _ if is_open(nr) => Act::Suspect { place: p.place(model, host, false, true), also: None },
        libc::SYS_unlink | libc::SYS_rmdir | libc::SYS_unlinkat => {
            let place = p.place(model, host, false, false);
            Act::Unlink { parent_attr: p.parent_attr(model, &place, false), place }
        }
        libc::SYS_mkdir | libc::SYS_mkdirat | libc::SYS_mknod | libc::SYS_mknodat | libc::SYS_bind => {
            let place = p.place(model, host, false, false);
            Act::Make { parent_attr: p.parent_attr(model, &place, false), place }
        }
        libc::SYS_symlink | libc::SYS_symlinkat => {
            let place = p.place(model, host, true, false);
            Act::Make { parent_attr: p.parent_attr(model, &place, true), place }
        }
        libc::SYS_link | libc::SYS_linkat => {
            let follow = nr == libc::SYS_linkat && at_flags(4) & libc::AT_SYMLINK_FOLLOW != 0;
            // What the new name names is read, whatever way led to it.
            let mut aside = Way::default();
            let source = Paths { event: e, path1, path2, way: &mut aside }.place(model, host, false, follow);
            p.way.also(aside);
            let place = p.place(model, host, true, false);
            Act::Link {
                object: object_at(model, &source),
                looked: p.is_looked_at(model, &source),
                source: Some(source),
                parent_attr: p.parent_attr(model, &place, true),
                place,
            }
        }
        libc::SYS_rename | libc::SYS_renameat | libc::SYS_renameat2 => {
            let bits = if nr == libc::SYS_renameat2 { e.args[4] as u32 } else { 0 };
            let from = p.place(model, host, false, false);
            let to = p.place(model, host, true, false);
            Act::Rename {
                from_attr: p.parent_attr(model, &from, false),
                to_attr: p.parent_attr(model, &to, true),
                from,
                to,
                exchange: bits & libc::RENAME_EXCHANGE != 0,
                whiteout: bits & libc::RENAME_WHITEOUT != 0,
            }
        }
        // Where the paths of earlier calls led cannot be seen any more. (Changes of propagation and of
        // options move nothing.)
        libc::SYS_mount if e.args[3] & MOUNT_IN_PLACE != 0 => Act::Nothing,
        libc::SYS_mount | libc::SYS_umount2 | libc::SYS_pivot_root | libc::SYS_move_mount => Act::Everything,
        // The kernel writes to the file from now on, whenever it likes.
        libc::SYS_acct | libc::SYS_swapon => match object_at(model, &p.place(model, host, false, true)) {
            Some(object) => Act::Held { object },
            None => Act::Nothing,
        },
        libc::SYS_truncate => {
            let place = p.place(model, host, false, true);
            let file = |o: &ObjectId| model.kind(*o) == Some(FileKind::Regular);
            match object_at(model, &place).filter(file) {
                Some(object) if !p.is_looked_at(model, &place) => {
                    Act::Truncate { object, size: e.args[1], attr: None, place: Some(place) }
                }
                _ => Act::Suspect { place, also: None },
            }
        }
        _ => {
            // What is left changes attributes by path.
            let (follow, xattrs) = match nr {
                libc::SYS_lchown | SYS_LSETXATTR | SYS_LREMOVEXATTR => (false, true),
                libc::SYS_fchmodat => (true, true),
                SYS_FCHMODAT2 => (at_flags(3) & libc::AT_SYMLINK_NOFOLLOW == 0, true),
                libc::SYS_fchownat => (at_flags(4) & libc::AT_SYMLINK_NOFOLLOW == 0, true),
                libc::SYS_utimensat => (at_flags(3) & libc::AT_SYMLINK_NOFOLLOW == 0, false),
                SYS_SETXATTRAT | SYS_REMOVEXATTRAT => (at_flags(2) & libc::AT_SYMLINK_NOFOLLOW == 0, true),
                libc::SYS_utime | libc::SYS_utimes | libc::SYS_futimesat => (true, false),
                _ => (true, true),
            };
            let place = p.place(model, host, false, follow);
            match object_at(model, &place) {
                Some(object) if !p.is_looked_at(model, &place) => {
                    Act::Attr { object, attr: None, xattrs, place: Some(place) }
                }
                _ => Act::Suspect { place, also: None },
            }
        }
    }
}

const MOUNT_IN_PLACE: u64 =
    libc::MS_REMOUNT | libc::MS_PRIVATE | libc::MS_SLAVE | libc::MS_SHARED | libc::MS_UNBINDABLE;

// Numbers of arch/x86/entry/syscalls/syscall_64.tbl that the libc crate names otherwise or not yet.
const SYS_LSETXATTR: i64 = 189;
const SYS_LREMOVEXATTR: i64 = 198;
const SYS_FCHMODAT2: i64 = 452;
const SYS_SETXATTRAT: i64 = 463;
const SYS_REMOVEXATTRAT: i64 = 466;

/// The object at a place, if the model knows it.
#[must_use]
pub fn object_at(model: &Model, place: &Place) -> Option<ObjectId> {
    match place {
        Place::Entry(directory, name) => model.entry(*directory, name),
        Place::Object(object) => Some(*object),
        Place::Outside | Place::LeftOut(_) | Place::Missing(..) | Place::Unknown => None,
    }
}

/// Everything that an act shares with others, and what its paths went through.
#[must_use]
pub fn touches(act: &Act, way: &Way, model: &Model) -> Things {
    let mut things = act.touches(model);
    if way.winding && *act != Act::Nothing {
        things.extend(way.entries.iter().map(|(d, n)| Thing::Way(*d, n.clone())));
    }
    things
}

/// A directory goes only when it is empty: whoever emptied it came before.
fn emptied(place: &Place, model: &Model) -> Option<Thing> {
    let object = object_at(model, place)?;
    (model.kind(object) == Some(FileKind::Directory)).then_some(Thing::List(object))
}

impl Act {
    /// Everything that the act reads or changes and that others may share.
    #[must_use]
    pub fn touches(&self, model: &Model) -> Things {
        let mut things = Things::new();
        let mut place = |place: &Place| match place {
            Place::Entry(directory, name) => {
                things.push(Thing::Entry(*directory, name.clone()));
                things.push(Thing::Meta(*directory));
            }
            Place::Missing(directory, name) => things.push(Thing::Entry(*directory, name.clone())),
            Place::Object(object) | Place::LeftOut(Some(object)) => things.push(Thing::Meta(*object)),
            Place::Outside | Place::LeftOut(None) => {}
            Place::Unknown => things.push(Thing::Everything),
        };
        match self {
            Self::Nothing => {}
            Self::Everything => things.push(Thing::Everything),
            Self::Create { parent, name, attr, .. } => {
                place(&Place::Entry(*parent, name.clone()));
                if let Some(object) = model.find(attr.id) {
                    things.extend([
                        Thing::Data(object, 0..u64::MAX),
                        Thing::Meta(object),
                        Thing::Xattrs(object),
                    ]);
                }
            }
            Self::Write { object, range, .. } => {
                things.extend([Thing::Data(*object, range.clone()), Thing::Meta(*object)]);
                // The first write to a file with a capability drops it.
                if has_capability(model, *object) {
                    things.push(Thing::Xattrs(*object));
                }
            }
            // Whatever is written there at that time may have gone elsewhere.
            Self::Seek { object, .. } => things.push(Thing::Data(*object, 0..u64::MAX)),
            Self::Linger { object, range } => {
                things.extend([Thing::Data(*object, range.clone()), Thing::Meta(*object)]);
                things.push(Thing::Xattrs(*object));
            }
            Self::Truncate { object, size, place: at, .. } => {
                if let Some(Place::Entry(directory, name)) = at {
                    things.push(Thing::Entry(*directory, name.clone()));
                }
                things.extend([Thing::Data(*object, *size..u64::MAX), Thing::Meta(*object)]);
                if has_capability(model, *object) {
                    things.push(Thing::Xattrs(*object));
                }
            }
            Self::Attr { object, xattrs, place: at, .. } => {
                if let Some(Place::Entry(directory, name)) = at {
                    things.push(Thing::Entry(*directory, name.clone()));
                }
                things.push(Thing::Meta(*object));
                if *xattrs {
                    things.push(Thing::Xattrs(*object));
                }
            }
            Self::Mapped { object } => {
                things.extend([Thing::Data(*object, 0..u64::MAX), Thing::Meta(*object)]);
            }
            Self::Dirtied { object, range } => {
                things.extend([Thing::Data(*object, range.clone()), Thing::Meta(*object)]);
            }
            Self::Foreign { object } => {
                things.extend(super::foreign::touches(*object, model.kind(*object)));
            }
            Self::Touch { object } | Self::Held { object } => {
                things.extend([
                    Thing::Data(*object, 0..u64::MAX),
                    Thing::Meta(*object),
                    Thing::Xattrs(*object),
                ]);
            }
            Self::Suspect { place: at, also } => {
                place(at);
                also.iter().for_each(&mut place);
                for object in
                    [Some(at), also.as_ref()].into_iter().flatten().filter_map(|p| object_at(model, p))
                {
                    things.extend([
                        Thing::Data(object, 0..u64::MAX),
                        Thing::Meta(object),
                        Thing::Xattrs(object),
                    ]);
                }
            }
            Self::Unlink { place: at, .. } => {
                place(at);
                things.extend(emptied(at, model));
            }
            Self::Make { place: at, .. } => place(at),
            Self::Link { place: at, source, .. } => {
                place(at);
                if let Some(Place::Entry(directory, name)) = source {
                    things.push(Thing::Entry(*directory, name.clone()));
                }
            }
            Self::Rename { from, to, exchange, .. } => {
                place(from);
                place(to);
                if !exchange {
                    things.extend(emptied(to, model));
                }
            }
        }
        things
    }
}

impl Act {
    /// Whether the act changes something by a name outside, brings in what had none inside, or gives what is inside
    /// a name outside: of what others do by such a name nobody knows to what.
    #[must_use]
    pub fn reaches_outside(&self, model: &Model) -> bool {
        let outside = |place: &Place| place.is_outside(model);
        match self {
            // Also where a place inside is told: a directory that the model does not have yet stands there now, and may have
            // stood outside when the call went through it.
            Self::Suspect { .. } => true,
            Self::Rename { from, to, exchange, .. } => {
                outside(from) != outside(to) && (*exchange || outside(from))
            }
            Self::Link { object, place, .. } => object.is_none() != outside(place),
            _ => false,
        }
    }

    /// The place through which the act reached an object by its path, to change the object.
    #[must_use]
    pub fn reaches_by(&self) -> Option<&Place> {
        match self {
            Self::Truncate { place, .. } | Self::Attr { place, .. } => place.as_ref(),
            Self::Suspect { place, .. } => Some(place),
            _ => None,
        }
    }

    /// The entries that the act changes, each with the type of what it names before, where the
    /// model knows it.
    #[must_use]
    pub fn changes(&self, model: &Model) -> Vec<(Place, Option<FileKind>)> {
        let kind = |place: &Place| object_at(model, place).and_then(|o| model.kind(o));
        match self {
            Self::Create { parent, name, .. } => {
                vec![(Place::Entry(*parent, name.clone()), Some(FileKind::Regular))]
            }
            Self::Unlink { place, .. } | Self::Make { place, .. } => vec![(place.clone(), kind(place))],
            Self::Link { place, source, .. } => {
                vec![(place.clone(), source.as_ref().and_then(kind))]
            }
            Self::Rename { from, to, .. } => vec![(from.clone(), kind(from)), (to.clone(), kind(from))],
            _ => Vec::new(),
        }
    }
}

/// Whether the object has a file capability, which the next change of its bytes drops.
#[must_use]
pub fn has_capability(model: &Model, object: ObjectId) -> bool {
    model.get(object).is_some_and(|o| o.xattrs.contains_key(CAPABILITY))
}

/// The xattr of file capabilities.
pub const CAPABILITY: &str = "security.capability";

impl Thing {
    /// Whether two acts that touch these share something.
    #[must_use]
    pub fn shares(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Everything, _) | (_, Self::Everything) => true,
            (Self::Data(a, r), Self::Data(b, s)) => a == b && r.start < s.end && s.start < r.end,
            (Self::Aside, Self::Aside) => true,
            (Self::List(a), Self::List(b) | Self::Entry(b, _) | Self::Way(b, _))
            | (Self::Entry(b, _) | Self::Way(b, _), Self::List(a)) => a == b,
            (Self::Meta(a), Self::Meta(b)) | (Self::Xattrs(a), Self::Xattrs(b)) => a == b,
            (Self::Entry(a, n), Self::Entry(b, m) | Self::Way(b, m))
            | (Self::Way(b, m), Self::Entry(a, n)) => a == b && n == m,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_goes_on_behind_a_descriptor() {
        assert_eq!(behind_descriptor(b"/proc/self/fd/12/a/b"), b"a/b");
        assert_eq!(behind_descriptor(b"/dev/fd/3"), b"");
        assert_eq!(behind_descriptor(b"/proc/thread-self/fd/3//fd/4"), b"fd/4");
    }
}
