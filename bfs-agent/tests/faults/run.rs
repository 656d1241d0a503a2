//! One run: a replayer with a fault, the scripted agent, and what must hold at every moment.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use bfs_agent::keys::Folder;
use bfs_agent::log::segment::SegmentReader;
use bfs_agent::log::segments;
use bfs_agent::net::{self, Connection, Destination};
use bfs_common::record::*;
use bfs_common::wire::*;
use bfs_tests::faults::{Effect, Fault, Faults};
use bfs_tests::{copy, oracle};

use super::disk::Disk;
use super::stream::Stream;

/// For what should come soon, on a busy machine.
const SOON: Duration = Duration::from_secs(60);
/// Generations that are kept: the steps are more, so some are dropped.
const KEEP: u64 = 2;
const GROUP_ID: GroupId = GroupId([5; 16]);
/// Each step also writes to this object as much as a segment of the log holds on a disk of this size. So segments are
/// ended, and those that are applied written over.
const FILLER: u64 = 9;
const SEGMENT_BYTES: usize = 1 << 20;

pub struct Run {
    faults: Faults,
    fault: Option<Fault>,
    /// The disk of the store, with a seed, if it has one of its own.
    disk: Option<(Disk, u64)>,
    /// Killed once, it is killed again at this call.
    again: Option<u64>,
    /// Calls that hit, before the faults of now.
    hit: usize,
    process: Option<Child>,
    connection: Option<Connection>,
    stream: Option<Stream>,
    /// The last that was acknowledged, confirmed, applied.
    acknowledged: (Sequence, CheckpointId, CheckpointId),
    /// How the replayer told of the fault.
    told: BTreeSet<String>,
    /// Length of the log when it was started.
    said: usize,
    /// Checkpoints at which a segment of the log stood in a file that was one before.
    written_over: usize,
    dir: tempfile::TempDir,
}

/// What a run was.
pub struct Done {
    /// Calls of the replayer that could have failed.
    pub calls: u64,
    /// Those that did.
    pub failed: usize,
    /// Checkpoints at which a segment of the log stood in a file that was one before.
    pub written_over: usize,
}

impl Run {
    pub fn new(fault: Option<Fault>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let faults = Faults::new(&dir.path().join("store"));
        if let Some(fault) = fault {
            faults.set(fault);
        }
        Self {
            dir,
            faults,
            fault,
            disk: None,
            again: None,
            hit: 0,
            process: None,
            connection: None,
            stream: None,
            acknowledged: (Sequence(0), CheckpointId(0), CheckpointId(0)),
            told: BTreeSet::new(),
            said: 0,
            written_over: 0,
        }
    }

    /// The store has a disk of its own, which can lose its power.
    pub fn on_disk(mut self, seed: u64) -> Self {
        let disk = Disk::new(self.dir.path());
        self.faults = Faults::new(&disk.path().join("store"));
        if let Some(fault) = self.fault {
            self.faults.set(fault);
        }
        disk.cut_with(&self.faults, seed);
        self.disk = Some((disk, seed));
        self
    }

    /// When it was killed it is killed once more, at this call.
    pub fn again(mut self, at: u64) -> Self {
        self.again = Some(at);
        self
    }

    fn store(&self) -> PathBuf {
        self.disk.as_ref().map_or(self.dir.path(), |(disk, _)| disk.path()).join("store")
    }

    fn copy(&self, checkpoint: CheckpointId) -> PathBuf {
        self.dir.path().join(format!("copy-{checkpoint}"))
    }

    /// All of it.
    pub fn all(mut self) -> Done {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            self.connect().await;
            for (number, step) in STEPS.iter().enumerate() {
                let stream = self.stream.as_mut().unwrap();
                step(stream);
                if number > 0 {
                    stream.write(FILLER, 4096 * number as u64, &[number as u8; SEGMENT_BYTES]);
                }
                let checkpoint = self.stream.as_mut().unwrap().checkpoint();
                copy::exact(&self.stream.as_ref().unwrap().data, &self.copy(checkpoint)).unwrap();
                self.applied(checkpoint).await;
                if number == 2 {
                    self.end();
                }
            }
        });
        drop(runtime);
        self.end();
        let failed = self.hit + self.faults.failed().len();
        let done = Done { calls: self.faults.count(), failed, written_over: self.written_over };
        self.look_back();
        done
    }

    fn fail(&self, what: &str) -> ! {
        let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        panic!(
            "{:?}: {what}\nfailed: {:#?}\ntold: {:#?}\nlog:\n{log}",
            self.fault,
            self.faults.failed(),
            self.told
        );
    }

    /// The fault, if it lasts, is mended as soon as it was told.
    fn tell(&mut self, what: String) {
        if self.faults.failed().is_empty() {
            self.fail(&format!("trouble without a fault: {what}"));
        }
        self.told.insert(what);
        self.faults.lift();
    }

    /// Starts the replayer; false if it ended at once, and said why.
    fn start(&mut self) -> bool {
        let log = File::options().create(true).append(true).open(self.dir.path().join("log")).unwrap();
        self.said = log.metadata().unwrap().len() as usize;
        let mut command = Command::new(env!("CARGO_BIN_EXE_bfs-replayer"));
        command.arg("serve").arg("--store").arg(self.store());
        command.args(["--keep", &KEEP.to_string(), "--keep-min", "1"]).stdin(Stdio::null());
        command.stderr(log.try_clone().unwrap());
        let mut child = self.faults.hold(&mut command).unwrap().spawn().unwrap();
        let began = Instant::now();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                self.ended(status);
                return false;
            }
            if std::os::unix::net::UnixStream::connect(net::store_socket(&self.store())).is_ok() {
                self.process = Some(child);
                return true;
            }
            if began.elapsed() > SOON {
                self.process = Some(child);
                self.fail("it neither starts nor ends");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// It did so by itself: then it said why.
    fn ended(&mut self, status: ExitStatus) {
        if status.signal() == Some(libc::SIGKILL) && !self.faults.failed().is_empty() {
            self.killed();
            return;
        }
        let said = fs::read_to_string(self.dir.path().join("log")).unwrap();
        let said = said[self.said..].trim().to_owned();
        if status.success() || said.is_empty() {
            self.fail(&format!("it ended with {status} and said {said:?}"));
        }
        self.tell(said);
    }

    /// As the fault says. Its disk gets its power again, and the next fault comes.
    fn killed(&mut self) {
        if self.fault.is_some_and(|fault| fault.effect == Effect::Halts)
            && let Some((disk, seed)) = &self.disk
        {
            if !disk.power_returns() {
                self.fail("the disk was not cut");
            }
            // The device may be another one.
            disk.cut_with(&self.faults, *seed);
        }
        self.hit += self.faults.failed().len();
        match (self.again.take(), self.fault) {
            (Some(at), Some(fault)) => self.faults.set(Fault { at, ..fault }),
            _ => self.faults.lift(),
        }
    }

    /// Ends the replayer as a service manager does.
    fn end(&mut self) {
        self.connection = None;
        let Some(mut child) = self.process.take() else { return };
        // SAFETY: a system call without pointers; the child was not waited for, so the number is its own.
        unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
        let began = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if began.elapsed() > SOON {
                self.process = Some(child);
                self.fail("it does not end");
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        if status.signal() == Some(libc::SIGKILL) {
            self.ended(status);
        }
    }

    /// A connection that was welcomed, on which all was sent that is not durable.
    async fn connect(&mut self) {
        let began = Instant::now();
        while self.connection.is_none() {
            if began.elapsed() > SOON {
                self.fail("no connection");
            }
            let ended = self.process.as_mut().is_none_or(|child| child.try_wait().unwrap().is_some());
            if ended {
                if let Some(mut child) = self.process.take() {
                    self.ended(child.wait().unwrap());
                }
                if !self.start() {
                    continue;
                }
            }
            let address = Destination::Unix(net::store_socket(&self.store()));
            let Ok(mut connection) = net::connect(&address, &Folder::default()).await else { continue };
            let epoch = self.stream.as_ref().map(|stream| stream.end().epoch);
            let hello = Frame::Hello {
                group: "g".into(),
                group_id: GROUP_ID,
                boot_id: [1; 16],
                epoch,
                take_over: false,
                maps: Vec::new(),
                lz4: false,
            };
            let killed = self.fault.is_some_and(|fault| !matches!(fault.effect, Effect::Fails(_)));
            if let Err(error) = connection.writer.send(&hello, b"").await
                && !killed
            {
                self.fail(&format!("Hello: {error}"));
            }
            match tokio::time::timeout(SOON, connection.reader.next()).await {
                Ok(Ok(Some((Frame::Refused(Refusal::Store(why) | Refusal::Full(why)), _)))) => {
                    self.tell(why);
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Ok(Ok(Some((Frame::Refused(Refusal::Busy { .. }), _)))) => {}
                Ok(Ok(Some((Frame::Welcome { epoch, position, confirmed, applied, .. }, _)))) => {
                    if self.stream.is_none() {
                        self.stream = Some(Stream::new(self.dir.path().join("primary"), epoch));
                    }
                    self.progress(position, confirmed, applied);
                    for (first, count, body) in self.stream.as_ref().unwrap().after(position.sequence) {
                        // If it broke, reading says so.
                        let _ = connection.writer.send(&Frame::Records { first, count }, &body).await;
                    }
                    self.connection = Some(connection);
                }
                Ok(Ok(None) | Err(_)) if killed => {}
                other => self.fail(&format!("after Hello: {other:?}")),
            }
        }
    }

    /// What the replayer says of itself never goes back, and is of our stream.
    fn progress(&mut self, position: Position, confirmed: CheckpointId, applied: CheckpointId) {
        let stream = self.stream.as_ref().unwrap();
        if position.sequence > stream.end().sequence || stream.at(position.sequence).chain != position.chain {
            self.fail(&format!("{position:?} is not of this stream"));
        }
        let marker = |checkpoint: CheckpointId| match checkpoint.0 {
            0 => Sequence(0),
            n => stream.markers.get(n as usize - 1).copied().unwrap_or(Sequence(u64::MAX)),
        };
        if marker(confirmed) > position.sequence || applied > confirmed {
            self.fail(&format!("applied {applied}, confirmed {confirmed}, durable {}", position.sequence));
        }
        let now = (position.sequence, confirmed, applied);
        let before = self.acknowledged;
        if now.0 < before.0 || now.1 < before.1 || now.2 < before.2 {
            self.fail(&format!("{before:?} was acknowledged, now it is {now:?}"));
        }
        self.acknowledged = now;
    }

    /// Until the checkpoint is applied; then the tree is looked at.
    async fn applied(&mut self, checkpoint: CheckpointId) {
        let began = Instant::now();
        let mut sent = false;
        while self.acknowledged.2 < checkpoint {
            if self.connection.is_none() {
                self.connect().await;
                sent = true;
                continue;
            }
            let connection = self.connection.as_mut().unwrap();
            if !std::mem::replace(&mut sent, true) {
                for (first, count, body) in self.stream.as_ref().unwrap().after(self.acknowledged.0) {
                    let _ = connection.writer.send(&Frame::Records { first, count }, &body).await;
                }
            }
            let next = tokio::time::timeout(Duration::from_millis(100), connection.reader.next()).await;
            match next {
                Ok(Ok(Some((Frame::Ack { position, confirmed, applied, .. }, _)))) => {
                    self.progress(position, confirmed, applied);
                }
                Ok(Ok(Some((Frame::Refused(Refusal::Store(why) | Refusal::Full(why)), _)))) => {
                    self.tell(why);
                    self.connection = None;
                }
                // If it broke, reading says so.
                Ok(Ok(Some((Frame::Ping(number), _)))) => {
                    drop(connection.writer.send(&Frame::Pong(number), b"").await);
                }
                Ok(Ok(Some(other))) => self.fail(&format!("{other:?}")),
                Ok(_) => self.connection = None,
                Err(_) => {
                    if let Some(trouble) = self.trouble() {
                        self.tell(trouble);
                    }
                }
            }
            if began.elapsed() > SOON {
                self.fail(&format!("checkpoint {checkpoint} is not applied, and status says nothing new"));
            }
        }
        let stream = self.stream.as_ref().unwrap();
        let log = self.store().join("log/g");
        let renewed = |number| {
            SegmentReader::open(&log, number, GROUP_ID).is_ok_and(|reader| reader.header.mark.is_some())
        };
        self.written_over += usize::from(segments(&log).unwrap().into_iter().any(renewed));
        let differences = oracle::compare(&stream.data, &Stream::backup(&self.store())).unwrap();
        if !differences.is_empty() {
            self.fail(&format!("at checkpoint {checkpoint}: {differences:#?}"));
        }
    }

    fn command(&self, words: &[&str], more: &[&Path]) -> std::process::Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bfs-replayer"));
        command.args(words).arg("--store").arg(self.store()).args(more).output().unwrap()
    }

    /// What `status` says is wrong.
    fn trouble(&self) -> Option<String> {
        let done = self.command(&["status", "--json"], &[]);
        let groups: serde_json::Value = serde_json::from_slice(&done.stdout).ok()?;
        groups[0]["trouble"].as_str().map(str::to_owned)
    }

    /// At the end: nothing is damaged, nothing is left over, and what is kept is what it was.
    fn look_back(&self) {
        let checked = self.command(&["check", "--read-data"], &[]);
        if !checked.status.success() {
            self.fail(&format!("check: {}", String::from_utf8_lossy(&checked.stdout)));
        }
        let last = self.acknowledged.2;
        for at in [last.0 - KEEP + 1, last.0] {
            let then = self.dir.path().join(format!("then-{at}"));
            let done = self.command(&["restore", "--group", "g", "--at", &at.to_string()], &[&then]);
            if !done.status.success() {
                self.fail(&format!("restore {at}: {}", String::from_utf8_lossy(&done.stderr)));
            }
            let then = then.join(&super::stream::ROOT[1..]);
            let differences = oracle::compare(&self.copy(CheckpointId(at)), &then).unwrap();
            if !differences.is_empty() {
                self.fail(&format!("generation {at}: {differences:#?}"));
            }
        }
        for folder in ["stage", "aside", "kept"] {
            let left = fs::read_dir(self.store().join(folder).join("g")).unwrap().count();
            // The file that the last but one step removed is kept for the generation before.
            let expected = usize::from(folder == "kept");
            if left != expected {
                self.fail(&format!("{left} files in {folder}"));
            }
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if let Some(mut child) = self.process.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What is done between checkpoints.
const STEPS: [fn(&mut Stream); 6] = [
    |s| {
        s.file(2, "a", b"first");
        s.file(3, "b", &[3; 200_000]);
        s.directory(4, "dir");
        s.file(5, "dir/inner", b"inner");
        s.symlink(6, "dir/link", "no/where");
        s.link(2, "dir/hard");
        s.xattr(3, "user.x", Some(b"value"));
        s.directory(7, "other");
        s.file(8, "gone", &[8; 70_000]);
        s.file(FILLER, "filler", &[1; SEGMENT_BYTES]);
    },
    |s| {
        // Bytes over others, a hole, a cut; names that go round; a directory in another.
        s.write(3, 1000, &[33; 70_000]);
        s.zero(3, 150_000, 4096);
        s.truncate(3, 190_000);
        s.rename(5, "other/moved");
        s.rename(4, "other/dir");
        s.xattr(3, "user.x", None);
        s.xattr(7, "user.y", Some(b"of a directory"));
        s.mode(4, 0o700);
        s.remove(8);
        s.file(10, "gone", b"its successor");
    },
    |s| {
        s.write(2, 0, b"again");
        s.file(11, "big", &[10; 600_000]);
    },
    |s| {
        s.rename(3, "c");
        s.rename(10, "b");
        s.remove(11);
        s.mode(2, 0o640);
        s.truncate(5, 0);
    },
    |s| {
        s.remove(5);
        s.write(3, 0, b"of the last step but one");
    },
    |s| {
        s.remove(6);
        s.remove(10);
        s.directory(12, "new");
        s.write(2, 3, b"end");
    },
];
