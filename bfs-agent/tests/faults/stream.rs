//! A directory and the stream that says how it came about.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use bfs_common::codec;
use bfs_common::record::*;
use bfs_common::wire::Position;
use bytes::{Bytes, BytesMut};

/// Where the primary's directory seems to stand.
pub const ROOT: &str = "/data/app";

/// Every record is kept, so that it can be sent again from anywhere.
pub struct Stream {
    /// The directory.
    pub data: PathBuf,
    records: Vec<Bytes>,
    /// After each record.
    positions: Vec<Position>,
    /// Sequence numbers of the markers.
    pub markers: Vec<Sequence>,
    /// Living objects and one of their names.
    objects: BTreeMap<u64, String>,
    epoch: Epoch,
}

impl Stream {
    pub fn new(data: PathBuf, epoch: Epoch) -> Self {
        fs::create_dir(&data).unwrap();
        let mut stream = Self {
            data,
            records: Vec::new(),
            positions: Vec::new(),
            markers: Vec::new(),
            objects: BTreeMap::new(),
            epoch,
        };
        stream.put(Record::EpochBegin { epoch, boot_id: [1; 16], complete: false }, b"");
        stream.put(Record::Gap { scope: GapScope::Everything }, b"");
        stream.put_object(1, "", FileKind::Directory, b"");
        stream.put(Record::Roots { roots: vec![(PathBytes::new(ROOT.as_ref()), ObjectId(1))] }, b"");
        stream
    }

    /// The last record.
    pub fn end(&self) -> Position {
        *self.positions.last().expect("it has begun")
    }

    /// What stands at a record.
    pub fn at(&self, sequence: Sequence) -> Position {
        match sequence.0 {
            0 => Position::START,
            n => self.positions[n as usize - 1],
        }
    }

    /// The records after this one, in pieces as frames have them.
    pub fn after(&self, sequence: Sequence) -> Vec<(Sequence, u32, Bytes)> {
        let mut frames = Vec::new();
        let mut at = sequence.0 as usize;
        while at < self.records.len() {
            let mut body = BytesMut::new();
            let first = at;
            while at < self.records.len() && (body.is_empty() || body.len() < 256 << 10) {
                body.extend_from_slice(&self.records[at]);
                at += 1;
            }
            frames.push((Sequence(first as u64 + 1), (at - first) as u32, body.freeze()));
        }
        frames
    }

    fn put(&mut self, record: Record, payload: &[u8]) {
        let before = self.positions.last().copied().unwrap_or(Position::START);
        let sequence = before.sequence.next();
        let mut bytes = BytesMut::new();
        codec::encode(&mut bytes, sequence, &record, payload);
        let chain = codec::chain(before.chain, &bytes);
        self.records.push(bytes.freeze());
        self.positions.push(Position { epoch: self.epoch, sequence, chain });
    }

    fn path(&self, name: &str) -> PathBuf {
        if name.is_empty() { self.data.clone() } else { self.data.join(name) }
    }

    fn meta(&self, name: &str) -> Meta {
        let found = fs::symlink_metadata(self.path(name)).unwrap();
        Meta {
            permissions: found.mode() & 0o7777,
            uid: found.uid(),
            gid: found.gid(),
            mtime_sec: found.mtime(),
            mtime_nsec: found.mtime_nsec() as u32,
        }
    }

    fn put_object(&mut self, object: u64, name: &str, kind: FileKind, target: &[u8]) {
        let meta = self.meta(name);
        let identity = Identity { ino: object, ..Identity::default() };
        self.put(Record::Object { object: ObjectId(object), identity, kind, device: 0, meta }, target);
        self.objects.insert(object, name.into());
    }

    /// Object number of the directory that a name is in, and the name there.
    fn entry(&self, name: &str) -> (ObjectId, Name) {
        let (above, last) = name.rsplit_once('/').unwrap_or(("", name));
        let (directory, _) = self.objects.iter().find(|(_, n)| *n == above).expect("the directory lives");
        (ObjectId(*directory), Name::new(last.as_bytes()).unwrap())
    }

    fn put_entry(&mut self, name: &str, object: u64) {
        let (directory, name) = self.entry(name);
        self.put(Record::EntrySet { directory, name, object: ObjectId(object) }, b"");
    }

    fn put_delete(&mut self, name: &str) {
        let (directory, name) = self.entry(name);
        self.put(Record::EntryDelete { directory, name }, b"");
    }

    pub fn file(&mut self, object: u64, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), "").unwrap();
        self.put_object(object, name, FileKind::Regular, b"");
        self.put_entry(name, object);
        self.write(object, 0, bytes);
    }

    pub fn directory(&mut self, object: u64, name: &str) {
        fs::create_dir(self.path(name)).unwrap();
        self.put_object(object, name, FileKind::Directory, b"");
        self.put_entry(name, object);
    }

    pub fn symlink(&mut self, object: u64, name: &str, target: &str) {
        symlink(target, self.path(name)).unwrap();
        self.put_object(object, name, FileKind::Symlink, target.as_bytes());
        self.put_entry(name, object);
    }

    pub fn write(&mut self, object: u64, offset: u64, bytes: &[u8]) {
        let file = File::options().write(true).open(self.path(&self.objects[&object])).unwrap();
        file.write_all_at(bytes, offset).unwrap();
        for (n, piece) in bytes.chunks(64 << 10).enumerate() {
            let offset = offset + ((n as u64) << 16);
            self.put(Record::Write { object: ObjectId(object), offset }, piece);
        }
    }

    pub fn zero(&mut self, object: u64, offset: u64, length: u64) {
        let file = File::options().write(true).open(self.path(&self.objects[&object])).unwrap();
        file.write_all_at(&vec![0; length as usize], offset).unwrap();
        self.put(Record::Zero { object: ObjectId(object), offset, length }, b"");
    }

    pub fn truncate(&mut self, object: u64, size: u64) {
        File::options().write(true).open(self.path(&self.objects[&object])).unwrap().set_len(size).unwrap();
        self.put(Record::Truncate { object: ObjectId(object), size }, b"");
    }

    pub fn link(&mut self, object: u64, name: &str) {
        fs::hard_link(self.path(&self.objects[&object]), self.path(name)).unwrap();
        self.put_entry(name, object);
    }

    /// Moves an object from its noted name, over nothing.
    pub fn rename(&mut self, object: u64, to: &str) {
        let from = self.objects[&object].clone();
        fs::rename(self.path(&from), self.path(to)).unwrap();
        self.put_delete(&from);
        self.put_entry(to, object);
        for name in self.objects.values_mut() {
            if *name == from {
                *name = to.into();
            } else if let Some(rest) = name.strip_prefix(&format!("{from}/")) {
                *name = format!("{to}/{rest}");
            }
        }
    }

    /// Removes the last name of an object.
    pub fn remove(&mut self, object: u64) {
        let name = self.objects[&object].clone();
        let path = self.path(&name);
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            fs::remove_dir(path).unwrap();
        } else {
            fs::remove_file(path).unwrap();
        }
        self.put_delete(&name);
        self.objects.remove(&object);
        self.put(Record::Forget { object: ObjectId(object) }, b"");
    }

    pub fn xattr(&mut self, object: u64, name: &str, value: Option<&[u8]>) {
        let path = self.path(&self.objects[&object]);
        match value {
            Some(value) => {
                rustix::fs::setxattr(&path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
                self.put(Record::XattrSet { object: ObjectId(object), name: name.into() }, value);
            }
            None => {
                rustix::fs::removexattr(&path, name).unwrap();
                self.put(Record::XattrRemove { object: ObjectId(object), name: name.into() }, b"");
            }
        }
    }

    pub fn mode(&mut self, object: u64, mode: u32) {
        let path = self.path(&self.objects[&object]);
        rustix::fs::chmod(&path, rustix::fs::Mode::from_raw_mode(mode)).unwrap();
    }

    /// Attributes of all, as they are; then the marker. Its number.
    pub fn checkpoint(&mut self) -> CheckpointId {
        for (object, name) in self.objects.clone() {
            let meta = self.meta(&name);
            self.put(Record::Meta { object: ObjectId(object), meta }, b"");
        }
        if self.markers.is_empty() {
            self.put(Record::Repaired { scope: GapScope::Everything }, b"");
        }
        let checkpoint = CheckpointId(self.markers.len() as u64 + 1);
        self.put(Record::Checkpoint { checkpoint, label: CheckpointLabel::default() }, b"");
        self.markers.push(self.end().sequence);
        checkpoint
    }

    /// Where the backup of it stands.
    pub fn backup(store: &Path) -> PathBuf {
        store.join("tree/g").join(&ROOT[1..])
    }
}
