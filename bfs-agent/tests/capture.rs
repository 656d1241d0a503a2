//! The probes, with real programs: what comes out of the ring for which call. Needs root and BPF; a
//! machine without them fails these tests with a sentence, it does not pass them.
//!
//! Each test has probes, a directory and a program of its own, so they can run at the same time.

use std::{
    fs,
    io::Write,
    os::fd::{AsFd, AsRawFd},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use bfs_agent::primary::capture::{LoadOptions, Probes};
use bfs_common::abi::{
    DirtyEvent, Event, EventHeader, FailedEvent, FileEvent, InodeId, PathEvent, RunEvent, TaskState, counter,
    flag, kind,
};

/// System call numbers, x86-64.
mod nr {
    pub const WRITE: u32 = 1;
    pub const OPEN: u32 = 2;
    pub const CLOSE: u32 = 3;
    pub const PWRITE64: u32 = 18;
    pub const WRITEV: u32 = 20;
    pub const FTRUNCATE: u32 = 77;
    pub const RENAME: u32 = 82;
    pub const MKDIR: u32 = 83;
    pub const RMDIR: u32 = 84;
    pub const LINK: u32 = 86;
    pub const UNLINK: u32 = 87;
    pub const SYMLINK: u32 = 88;
    pub const OPENAT: u32 = 257;
    pub const UNLINKAT: u32 = 263;
}

/// The program, compiled once.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = PROGRAM.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("calls");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/capture/calls.c");
        let status = Command::new("cc")
            .args(["-O1", "-Wall", "-pthread", "-o"])
            .args([&path, &source])
            .status()
            .expect("these tests need a C compiler (cc)");
        assert!(status.success(), "cc: {status}");
        (dir, path)
    });
    path
}

/// A record, kept.
#[derive(Clone, Debug)]
enum Seen {
    File { event: FileEvent, name: String, data: Vec<u8> },
    Data { header: EventHeader, offset: u64, data: Vec<u8> },
    Path { event: PathEvent, path1: String, path2: String },
    Task { header: EventHeader, value: u64 },
    Run { event: RunEvent },
    Dirty { event: DirtyEvent },
    Failed { event: FailedEvent },
}

impl Seen {
    fn header(&self) -> EventHeader {
        match self {
            Self::File { event, .. } => event.header,
            Self::Path { event, .. } => event.header,
            Self::Run { event } => event.header,
            Self::Dirty { event } => event.header,
            Self::Failed { event } => event.header,
            Self::Data { header, .. } | Self::Task { header, .. } => *header,
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Probes, and a directory that they look at.
struct Capture {
    probes: Option<Probes>,
    dir: tempfile::TempDir,
}

impl Capture {
    fn new(test: &str) -> Self {
        Self::with(test, |_| {})
    }

    fn with(test: &str, change: impl FnOnce(&mut LoadOptions)) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let device = fs::metadata(dir.path()).expect("its metadata").dev();
        // The kernel's form of a device number, which differs from the one of stat(2).
        let device = libc::major(device) << 20 | libc::minor(device);
        let mut options = LoadOptions::new(&format!("test-{test}-{}", std::process::id()), vec![device]);
        options.ring_bytes = 1 << 22;
        // Of others on the same file system there are many.
        options.foreign = false;
        change(&mut options);
        let probes = match Probes::load(&options) {
            Ok(probes) => probes,
            Err(error) => panic!("these tests need root and a kernel that takes the probes: {error}"),
        };
        Self { probes: Some(probes), dir }
    }

    fn probes(&mut self) -> &mut Probes {
        self.probes.as_mut().expect("there until the end")
    }

    /// Starts the program, followed, in the directory.
    fn start(&mut self, mode: &str) -> Running {
        let child = Command::new(program())
            .arg(mode)
            .current_dir(self.dir.path())
            .stdin(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut running = Running(child);
        let pid = running.0.id();
        self.probes().select_task(pid, pid).expect("the program is followed");
        running.go();
        running
    }

    /// Runs the program to its end; all records.
    fn run(&mut self, mode: &str) -> Vec<Seen> {
        self.start(mode).end();
        self.drain()
    }

    /// All records that stand in the ring.
    fn drain(&mut self) -> Vec<Seen> {
        let ring = self.probes().ring();
        let mut seen = Vec::new();
        while let Some((record, position)) = ring.next() {
            seen.push(match record.event().expect("records are well formed") {
                Event::File { event, name, data } => {
                    Seen::File { event, name: text(name), data: data.to_vec() }
                }
                Event::Data { event, data } => {
                    Seen::Data { header: event.header, offset: event.offset, data: data.to_vec() }
                }
                Event::Path { event, path1, path2 } => {
                    Seen::Path { event, path1: text(path1), path2: text(path2) }
                }
                Event::Task { event } => Seen::Task { header: event.header, value: event.value },
                Event::Run { event } => Seen::Run { event },
                Event::Dirty { event } => Seen::Dirty { event },
                Event::Failed { event } => Seen::Failed { event },
                Event::Foreign { event } => panic!("it was not asked for: {event:?}"),
            });
            ring.release(position);
        }
        for record in &seen {
            let header = record.header();
            assert!(header.start_ns <= header.end_ns, "{record:?}");
        }
        seen
    }

    fn counter(&mut self, index: u32) -> u64 {
        self.probes().counters().expect("the counters").get(index)
    }

    fn inode(&self, name: &str) -> u64 {
        fs::symlink_metadata(self.dir.path().join(name)).expect(name).ino()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.probes.take().map(Probes::unpin) {
            eprintln!("{error}");
        }
    }
}

/// The program, ended at the latest when this goes.
struct Running(Child);

impl Running {
    /// Sends a byte.
    fn go(&mut self) {
        self.0.stdin.as_mut().expect("a pipe").write_all(b"x").expect("the program reads");
    }

    /// Waits for the end of the program.
    fn end(mut self) {
        drop(self.0.stdin.take());
        let status = self.0.wait().expect("the program ends");
        assert!(status.success(), "calls.c failed: {status}");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Tries until the deadline.
fn until<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::yield_now();
    }
}

fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

fn files<'a>(seen: &'a [Seen], number: u32) -> Vec<(FileEvent, &'a [u8])> {
    let file = |seen: &'a Seen| match seen {
        Seen::File { event, data, .. } if event.header.nr == number => Some((*event, &data[..])),
        _ => None,
    };
    seen.iter().filter_map(file).collect()
}

fn paths<'a>(seen: &'a [Seen], number: u32) -> Vec<(PathEvent, &'a str, &'a str)> {
    let path = |seen: &'a Seen| match seen {
        Seen::Path { event, path1, path2 } if event.header.nr == number => {
            Some((*event, &path1[..], &path2[..]))
        }
        _ => None,
    };
    seen.iter().filter_map(path).collect()
}

fn tasks(seen: &[Seen], kind: u16) -> Vec<(EventHeader, u64)> {
    let task = |seen| match seen {
        &Seen::Task { header, value } if header.kind == kind => Some((header, value)),
        _ => None,
    };
    seen.iter().filter_map(task).collect()
}

/// Of each run its first byte, the bytes, and the calls.
fn runs(seen: &[Seen]) -> Vec<(u64, i64, u32)> {
    let run = |seen: &Seen| match seen {
        Seen::Run { event } => Some((event.file_offset, event.header.ret, event.calls)),
        _ => None,
    };
    seen.iter().filter_map(run).collect()
}

/// The one open that created a file, and its name.
fn created(seen: &[Seen]) -> (FileEvent, &str) {
    let mut found = seen.iter().filter_map(|seen| match seen {
        Seen::File { event, name, .. } if event.header.flags & flag::CREATED != 0 => {
            Some((*event, &name[..]))
        }
        _ => None,
    });
    let first = found.next().expect("a file was created");
    assert!(found.next().is_none(), "only one file was created");
    first
}

#[test]
fn writes_carry_their_place_and_their_bytes() {
    let mut capture = Capture::with("writes", |options| options.inline_max = 1 << 20);
    let seen = capture.run("writes");
    let (open, name) = created(&seen);
    let id = open.attr.id;
    assert!(matches!(open.header.nr, nr::OPEN | nr::OPENAT));
    assert_eq!((id.ino, name), (capture.inode("f"), "f"));
    assert_eq!(open.parent.id.ino, capture.inode("."));
    assert_eq!((open.attr.mode, open.attr.size), (0o100_640, 0));
    let mut place = 0;
    let writes = files(&seen, nr::WRITE);
    assert_eq!(writes.len(), 4);
    for ((event, data), count) in writes.into_iter().zip([5, 1000, 5000, 100_000]) {
        assert_eq!((event.attr.id, event.file_offset, event.count), (id, place, count));
        place += count;
        assert_eq!(event.attr.size, place);
        let way = event.header.flags & (flag::INLINE | flag::BY_REFERENCE);
        if count != 100_000 {
            // It leaves a byte out before the next one.
            place += 1;
        }
        assert_eq!(way, flag::INLINE);
        // A write on a known file needs neither name nor directory.
        assert_eq!((event.name_len, event.parent.id), (0, InodeId::NONE));
        let ahead = seen.iter().filter_map(|record| match record {
            Seen::Data { header, offset, data } if header.start_ns == event.header.start_ns => {
                Some((*offset, &data[..]))
            }
            _ => None,
        });
        let mut bytes = Vec::new();
        for (offset, data) in ahead {
            assert_eq!(offset, bytes.len() as u64);
            bytes.extend_from_slice(data);
        }
        bytes.extend_from_slice(data);
        let expected = if count == 5 { b"hello".to_vec() } else { vec![b'b'; count as usize] };
        assert!(bytes == expected, "{} of {count} bytes", bytes.len());
    }
    // The last one goes on where the one before had ended.
    assert_eq!(runs(&seen), [(place, 2, 1)]);
    place += 2;
    let (pwrite, data) = files(&seen, nr::PWRITE64)[0];
    assert_eq!((pwrite.file_offset, pwrite.count, data), (50, 6, &b"middle"[..]));
    let (writev, _) = files(&seen, nr::WRITEV)[0];
    assert_eq!((writev.file_offset, writev.count), (place, 8));
    let (truncate, _) = files(&seen, nr::FTRUNCATE)[0];
    assert_eq!((truncate.file_offset, truncate.attr.size), (77, 77));
}

#[test]
fn what_is_larger_than_allowed_goes_by_reference() {
    let mut capture = Capture::with("reference", |options| options.inline_max = 999);
    let seen = capture.run("writes");
    let mut flags: Vec<u16> = files(&seen, nr::WRITE)
        .iter()
        .map(|(event, _)| event.header.flags & (flag::INLINE | flag::BY_REFERENCE))
        .collect();
    let larger = flags.split_off(1);
    assert_eq!(flags, [flag::INLINE]);
    assert_eq!(larger, [flag::BY_REFERENCE; 3]);
    assert!(!seen.iter().any(|record| matches!(record, Seen::Data { .. })));
}

#[test]
fn a_close_has_a_record_where_it_is_asked_for() {
    let mut capture = Capture::with("closes", |options| options.closes = true);
    let seen = capture.run("appends");
    let (close, _) = files(&seen, nr::CLOSE)[0];
    assert_eq!((close.attr.id.ino, close.header.ret), (capture.inode("f"), 0));
    let mut capture = Capture::new("no-closes");
    assert!(files(&capture.run("appends"), nr::CLOSE).is_empty());
}

#[test]
fn appends_say_where_they_landed() {
    let mut capture = Capture::new("appends");
    let seen = capture.run("appends");
    let (append, data) = files(&seen, nr::WRITE)[1];
    assert_eq!((append.file_offset, append.count, data), (10, 3, &b"abc"[..]));
    assert_ne!(append.header.flags & flag::APPEND, 0);
    // pwrite on an O_APPEND descriptor appends, whatever its offset says.
    let (pwrite, data) = files(&seen, nr::PWRITE64)[0];
    assert_eq!((pwrite.file_offset, pwrite.count, data), (13, 2, &b"de"[..]));
    assert_eq!(fs::read(capture.dir.path().join("f")).expect("the file"), b"0123456789abcde");
}

#[test]
fn paths_come_with_their_base() {
    let mut capture = Capture::new("paths");
    let seen = capture.run("paths");
    let base = capture.inode(".");
    for (number, path1, path2) in [
        (nr::MKDIR, "d", ""),
        (nr::RENAME, "a", "d/b"),
        (nr::SYMLINK, "d/b", "s"),
        (nr::LINK, "d/b", "h"),
        (nr::UNLINK, "h", ""),
        (nr::UNLINKAT, "d/b", ""),
        (nr::RMDIR, "d", ""),
    ] {
        let found = paths(&seen, number);
        assert_eq!(found.len(), 1, "call {number}");
        let (event, one, two) = found[0];
        assert_eq!((one, two), (path1, path2), "call {number}");
        // The target of a symbolic link is text, not a path.
        let base1 = if number == nr::SYMLINK { 0 } else { base };
        let base2 = if path2.is_empty() { 0 } else { base };
        assert_eq!((event.base1.id.ino, event.base2.id.ino), (base1, base2), "call {number}");
        let single = |path: &str, ino, bit| if ino != 0 && !path.contains('/') { bit } else { 0 };
        let expected = single(path1, base1, flag::PARENT1_ATTR) | single(path2, base2, flag::PARENT2_ATTR);
        assert_eq!(event.header.flags, expected, "call {number}");
    }
}

#[test]
fn failed_calls_leave_no_record() {
    let mut capture = Capture::new("failed");
    let seen = capture.run("failed");
    assert!(seen.iter().all(|record| matches!(record, Seen::Task { .. })), "{seen:?}");
}

#[test]
fn children_are_followed_through_fork_and_exec() {
    let mut capture = Capture::new("fork");
    let seen = capture.run("fork_exec");
    let forks = tasks(&seen, kind::FORK);
    assert_eq!(forks.len(), 1);
    let child = forks[0].0.tid;
    assert_ne!(u64::from(child), forks[0].1);
    // The program's own exec may still show: starting it waits only for the memory to be its own.
    assert!(tasks(&seen, kind::EXEC).iter().any(|(header, _)| header.tid == child));
    let (event, data) = files(&seen, nr::WRITE)[0];
    assert_eq!((event.header.tid, data), (child, &b"one"[..]));
    assert_eq!(tasks(&seen, kind::EXIT).len(), 2);
    assert!(capture.probes().selected_tasks().expect("the tasks").is_empty());
}

#[test]
fn the_bytes_of_a_program_with_threads_go_by_reference() {
    let mut capture = Capture::new("thread");
    let seen = capture.run("thread");
    let (event, data) = files(&seen, nr::WRITE)[0];
    assert_eq!(event.header.flags & (flag::INLINE | flag::BY_REFERENCE), flag::BY_REFERENCE);
    assert!(data.is_empty());
    assert_ne!(event.header.tid, event.header.tgid);
}

#[test]
fn a_thread_that_executes_a_program_stays_followed() {
    let mut capture = Capture::new("exec-thread");
    let seen = capture.run("exec_in_thread");
    let execs = tasks(&seen, kind::EXEC);
    let of_thread = execs.iter().find(|(exec, old)| u64::from(exec.tid) != *old);
    let (exec, _) = of_thread.expect("the thread's tid before is told");
    assert_eq!(exec.tid, exec.tgid);
    let (event, data) = files(&seen, nr::WRITE)[0];
    assert_eq!((event.header.tid, data), (exec.tgid, &b"one"[..]));
    assert!(capture.probes().selected_tasks().expect("the tasks").is_empty());
}

#[test]
fn what_a_filter_answered_did_not_happen() {
    let mut capture = Capture::new("seccomp");
    let seen = capture.run("seccomp");
    assert!(paths(&seen, nr::MKDIR).is_empty());
    assert!(capture.counter(counter::NO_ENTER) >= 1);
}

/// Of calls that are not followed else: a file is told once, until the agent wants to hear of it again.
#[test]
fn errors_of_the_disk_are_told_with_their_file() {
    let mut capture = Capture::new("disk-errors");
    for _ in 0..2 {
        let seen = capture.run("disk_errors");
        let failed: Vec<_> = seen
            .iter()
            .filter_map(|seen| match seen {
                Seen::Failed { event } => Some((event.id.ino, event.header.nr, event.header.ret)),
                _ => None,
            })
            .collect();
        let expected: Vec<_> = [("a", 17), ("b", 74), ("c", 26), ("d", 40)]
            .map(|(name, number)| (capture.inode(name), number, -5))
            .into();
        assert_eq!(failed, expected);
        for seen in &seen {
            if let Seen::Failed { event } = seen {
                capture.probes().tell_again(event.id).unwrap();
            }
        }
    }
    let mut told = || capture.run("disk_errors").iter().filter(|s| matches!(s, Seen::Failed { .. })).count();
    assert_eq!((told(), told()), (4, 0), "once, and not again where nobody asked for it");
}

#[test]
fn calls_of_the_32_bit_table_are_told_apart() {
    let mut capture = Capture::new("compat");
    let seen = capture.run("compat");
    // Its write is 4 there, which is stat here.
    assert!(tasks(&seen, kind::COMPAT).is_empty());
    assert_eq!(files(&seen, nr::WRITE).len(), 1);
    assert_eq!(capture.counter(counter::COMPAT), 1);
}

#[test]
fn a_full_ring_names_what_it_lost() {
    let mut capture = Capture::with("full", |options| {
        options.ring_bytes = 1 << 16;
        options.inline_max = 4096;
    });
    let seen = capture.run("fill");
    let kept = files(&seen, nr::WRITE).len() as u64;
    assert!(kept > 0 && kept < 100, "{kept}");
    let lost = capture.counter(counter::RESERVE_FAILED);
    assert!(lost >= 100 - kept, "{lost}");
    let suspects = capture.probes().drain_suspects().expect("the suspects");
    let file = capture.inode("f");
    let (_, suspect) = suspects.iter().find(|(id, _)| id.ino == file).expect("the file is named");
    assert!(suspect.lost >= 100 - kept, "{suspect:?}");
    assert!(capture.probes().drain_suspects().expect("the suspects").is_empty());
}

#[test]
fn a_call_that_blocks_is_in_flight_until_its_end() {
    let mut capture = Capture::new("flight");
    let running = capture.start("fifo");
    let pid = running.0.id();
    let in_open = |state: &TaskState| matches!(state.nr, nr::OPEN | nr::OPENAT);
    let fifo = capture.dir.path().join("p");
    until("the open is in flight", || {
        let tasks = capture.probes().in_flight(now()).expect("the calls in flight");
        tasks.into_iter().find(|(tid, state)| *tid == pid && in_open(state))
    });
    drop(fs::File::open(fifo).expect("the other end"));
    running.end();
    assert!(capture.probes().in_flight(now()).expect("the calls in flight").is_empty());
}

#[test]
fn a_successor_reads_on() {
    let mut capture = Capture::new("successor");
    let mut running = capture.start("steps");
    running.go();
    // Until the first write was read, so that the successor must begin behind it.
    let mut before = Vec::new();
    until("the first write", || {
        before.append(&mut capture.drain());
        (files(&before, nr::WRITE).len() == 1).then_some(())
    });
    let pin_dir = capture.probes().pin_dir().to_owned();
    drop(capture.probes.take());
    running.go();
    running.go();
    running.end();
    capture.probes = Some(Probes::adopt(&pin_dir).expect("the probes are still there"));
    let after = capture.drain();
    assert_eq!(runs(&after), [(1, 2, 2)]);
    assert_eq!(tasks(&after, kind::EXIT).len(), 1);
}

/// One write for each step, until the file is that long; the call may still be in the probe at its end.
fn step(capture: &mut Capture, running: &mut Running, length: u64) {
    running.go();
    let file = capture.dir.path().join("f");
    until("the write", || (fs::metadata(&file).map_or(0, |f| f.len()) == length).then_some(()));
    until("its end", || capture.probes().in_flight(now()).expect("the calls").is_empty().then_some(()));
}

#[test]
fn writes_that_go_on_have_one_record_and_each_its_own_during_a_cut() {
    let mut capture = Capture::new("runs");
    // The first byte starts the program.
    let mut running = capture.start("steps");
    for length in 1..=4 {
        step(&mut capture, &mut running, length);
    }
    let seen = capture.drain();
    assert_eq!((files(&seen, nr::WRITE).len(), runs(&seen)), (1, vec![]), "three are a run without a record");
    let run = capture.probes().runs().expect("the runs")[0];
    assert_eq!((run.file_offset, run.header.ret, run.calls), (1, 3, 3));
    assert_eq!((run.attr.id.ino, run.known_attr()), (capture.inode("f"), None));
    capture.probes().part_writes(true).expect("the probes are told");
    step(&mut capture, &mut running, 5);
    let seen = capture.drain();
    assert_eq!(runs(&seen), [(1, 3, 3)], "what was there has its record first");
    let (fifth, _) = files(&seen, nr::WRITE)[0];
    assert_eq!((fifth.file_offset, fifth.count), (4, 1));
    assert!(capture.probes().runs().expect("the runs").is_empty());
    capture.probes().part_writes(false).expect("the probes are told");
    step(&mut capture, &mut running, 6);
    assert!(capture.drain().is_empty());
    running.end();
    let seen = capture.drain();
    assert_eq!(runs(&seen), [(5, 1, 1)], "the end of a task is the end of its run");
    let attr = seen.iter().find_map(|s| if let Seen::Run { event } = s { event.known_attr() } else { None });
    assert_eq!(attr.expect("its attributes").size, 6);
}

#[test]
fn two_groups_see_each_their_own() {
    let (mut one, mut two) = (Capture::new("group-1"), Capture::new("group-2"));
    let first = one.start("writes");
    let second = two.start("paths");
    first.end();
    second.end();
    let (one, two) = (one.drain(), two.drain());
    assert_eq!(files(&one, nr::WRITE).len(), 4);
    assert!(paths(&one, nr::MKDIR).is_empty());
    assert_eq!(files(&two, nr::WRITE).len(), 1);
    assert_eq!(paths(&two, nr::MKDIR).len(), 1);
}

#[test]
fn pages_of_a_followed_file_tell_when_they_become_dirty() {
    let mut capture = Capture::new("pages");
    assert!(capture.probes().mapped().records_pages(), "this kernel has no writeback_dirty_folio");
    let path = capture.dir.path().join("f");
    fs::write(&path, vec![1; 64 << 10]).expect("a file");
    let file = fs::File::options().read(true).write(true).open(&path).expect("the file");
    file.sync_all().expect("fsync");
    let metadata = file.metadata().expect("its metadata");
    let mut generation = 0u32;
    // SAFETY: FS_IOC_GETVERSION writes an int, whatever its number says (ioctl_iflags(2)).
    assert_eq!(unsafe { libc::ioctl(file.as_raw_fd(), 0x8008_7601, &raw mut generation) }, 0);
    let device = libc::major(metadata.dev()) << 20 | libc::minor(metadata.dev());
    let id = InodeId { ino: metadata.ino(), dev: device, generation };
    assert_eq!(capture.probes().writable_mappings(file.as_fd()).expect("an answer"), Some(0));
    // SAFETY: a new mapping of an open file, wherever the kernel likes.
    let map = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            64 << 10,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    assert_ne!(map, libc::MAP_FAILED);
    let store = |at: usize| {
        // SAFETY: within the mapping.
        unsafe { map.cast::<u8>().add(at).write_volatile(2) };
    };
    assert_eq!(capture.probes().writable_mappings(file.as_fd()).expect("an answer"), Some(1));
    store(0);
    assert!(dirty(&capture.drain()).is_empty(), "it is not followed yet");
    file.sync_all().expect("fsync");
    assert!(capture.probes().mapped().follow(id, true).expect("there is room"));
    store(20_000);
    let first = dirty(&capture.drain());
    assert_eq!(first.len(), 1, "{first:?}");
    assert!(first[0].id == id && (first[0].offset..first[0].offset + first[0].len).contains(&20_000));
    store(20_001);
    assert!(dirty(&capture.drain()).is_empty(), "it is dirty already");
    file.sync_all().expect("fsync");
    store(20_002);
    assert_eq!(dirty(&capture.drain()).len(), 1);
    // SAFETY: the mapping from above, which nobody uses after this.
    assert_eq!(unsafe { libc::munmap(map, 64 << 10) }, 0);
    assert_eq!(capture.probes().writable_mappings(file.as_fd()).expect("an answer"), Some(0));
    assert_eq!(capture.probes().mapped().all().expect("the files"), [id]);
    capture.probes().mapped().forget(id).expect("it is let go");
    file.sync_all().expect("fsync");
    std::os::unix::fs::FileExt::write_all_at(&file, b"x", 0).expect("a write");
    assert!(dirty(&capture.drain()).is_empty());
}

fn dirty(seen: &[Seen]) -> Vec<DirtyEvent> {
    seen.iter().filter_map(|s| if let Seen::Dirty { event } = s { Some(*event) } else { None }).collect()
}
