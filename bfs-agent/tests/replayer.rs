//! The replayer as agents see it: a scripted client that speaks the real protocol over a socket
//! or inside the process, and looks at the files.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bfs_agent::backup::{Replayer, ReplayerHandle, ServeOptions};
use bfs_agent::keys::Folder;
use bfs_agent::net::{self, Destination};
use bfs_common::codec;
use bfs_common::record::*;
use bfs_common::wire::*;

#[path = "replayer/client.rs"]
mod client;
#[path = "replayer/packed.rs"]
mod packed;
#[path = "replayer/sockets.rs"]
mod sockets;

use client::*;

#[tokio::test]
async fn a_checkpoint_reaches_the_files_and_nothing_pending_does() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let replayer = serve(&store);
    let mut agent = Agent::new(replayer.connect_local()).await;
    agent.root();
    agent.object(2, FileKind::Regular, 0o4750, b"");
    agent.entry(1, "a", 2);
    agent.entry(1, "hard", 2);
    agent.write(2, 0, b"hello");
    agent.write(2, 5, b" world");
    agent.put(Record::Truncate { object: ObjectId(2), size: 20000 }, b"");
    agent.put(Record::XattrSet { object: ObjectId(2), name: "user.x".into() }, b"v");
    agent.object(3, FileKind::Symlink, 0o777, b"no/where");
    agent.entry(1, "link", 3);
    agent.object(4, FileKind::Directory, 0o700, b"");
    agent.entry(1, "d", 4);
    agent.object(5, FileKind::Fifo, 0o600, b"");
    agent.entry(4, "pipe", 5);
    agent.object(6, FileKind::Socket, 0o600, b"");
    agent.entry(4, "sock", 6);
    agent.acked().await;
    assert!(!tree(&store).exists(), "nothing of a pending checkpoint");
    agent.checkpoint().await;

    let t = tree(&store);
    let meta = std::fs::metadata(t.join("a")).unwrap();
    assert_eq!((meta.len(), meta.nlink(), meta.mode() & 0o7777), (20000, 2, 0o4750));
    assert_eq!((meta.mtime(), meta.mtime_nsec()), (1_000_002, 7));
    assert_eq!(&std::fs::read(t.join("hard")).unwrap()[..12], b"hello world\0");
    assert_eq!(std::fs::read_link(t.join("link")).unwrap(), Path::new("no/where"));
    assert_eq!(std::fs::symlink_metadata(t.join("link")).unwrap().mtime(), 1_000_003);
    assert!(std::fs::metadata(t.join("d/pipe")).unwrap().file_type().is_fifo());
    assert!(std::fs::metadata(t.join("d/sock")).unwrap().file_type().is_socket());
    assert_eq!(std::fs::metadata(&t).unwrap().mtime(), 1_000_001);

    // Exchange, directory below its former child, replace and recreate, all in one step.
    agent.object(7, FileKind::Directory, 0o755, b"");
    agent.entry(4, "child", 7);
    agent.checkpoint().await;
    agent.delete(4, "child");
    agent.entry(1, "child", 7);
    agent.delete(1, "d");
    agent.entry(7, "d", 4);
    agent.delete(1, "a");
    agent.object(8, FileKind::Regular, 0o644, b"");
    agent.write(8, 0, b"new");
    agent.entry(1, "a", 8);
    agent.entry(1, "link", 2);
    agent.delete(1, "hard");
    agent.entry(1, "hard", 3);
    agent.checkpoint().await;
    assert_eq!(read(t.join("a")), "new");
    assert!(t.join("child/d/pipe").exists() && !t.join("d").exists());
    assert_eq!(std::fs::read_link(t.join("hard")).unwrap(), Path::new("no/where"));
    assert_eq!(std::fs::metadata(t.join("link")).unwrap().nlink(), 1);
    assert_eq!(std::fs::read_dir(store.join("aside/g")).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(store.join("stage/g")).unwrap().count(), 0);
    drop(replayer);
}

#[tokio::test]
async fn what_was_acknowledged_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let replayer = serve(&store);
    let mut agent = Agent::new(replayer.connect_local()).await;
    agent.root();
    agent.object(2, FileKind::Regular, 0o600, b"");
    agent.entry(1, "a", 2);
    agent.write(2, 0, b"one");
    agent.checkpoint().await;
    agent.write(2, 0, b"two");
    agent.object(3, FileKind::Regular, 0o600, b"");
    agent.entry(1, "b", 3);
    agent.put(Record::Gap { scope: GapScope::Object(ObjectId(2)) }, b"");
    agent.acked().await;
    let position = agent.position;
    drop(replayer);

    let replayer = serve(&store);
    assert_eq!(read(tree(&store).join("a")), "one");
    let mut agent = Agent::new(replayer.connect_local()).await;
    let Frame::Welcome { epoch, position: at, applied, highest_object, gaps, roots, .. } =
        agent.welcome.clone()
    else {
        panic!()
    };
    assert_eq!((epoch, at, applied), (Epoch(2), position, CheckpointId(1)));
    assert_eq!((highest_object, gaps.len(), roots.len()), (ObjectId(3), 1, 1));
    agent.connection.writer.send(&Frame::GetCatalog, b"").await.unwrap();
    let Frame::Catalog { objects, last: true } = next(&mut agent.connection).await else { panic!() };
    assert_eq!(objects.iter().map(|o| o.object.0).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(objects[0].entries.len(), 2);
    assert_eq!(objects[1].size, 3);
    agent.checkpoint().await;
    assert_eq!(read(tree(&store).join("a")), "two");
    assert!(tree(&store).join("b").exists());

    let ask = Frame::GetManifest { group: "g".into(), at_least: CheckpointId(2) };
    agent.connection.writer.send(&ask, b"").await.unwrap();
    let Frame::Manifest { checkpoint, lines, last: true, .. } = next(&mut agent.connection).await else {
        panic!()
    };
    assert_eq!(checkpoint, CheckpointId(2));
    let paths: Vec<_> = lines.iter().map(|l| l.path.as_path().to_string_lossy().into_owned()).collect();
    assert_eq!(paths, ["", "a", "b"]);
    assert_eq!(lines[1].content, *blake3::hash(b"two").as_bytes());
    assert_eq!(lines[1].object, ObjectId(2));
}

#[tokio::test]
async fn refusals_are_typed() {
    let dir = tempfile::tempdir().unwrap();
    let replayer = serve(&dir.path().join("store"));
    let mut agent = Agent::new(replayer.connect_local()).await;
    agent.root();
    agent.put(Record::Gap { scope: GapScope::Everything }, b"");
    agent.acked().await;
    // Busy, and fenced by a take-over.
    let mut other = replayer.connect_local();
    assert_eq!(hello(&mut other, None, false).await, Err(Refusal::Busy { name: "g".into() }));
    let mut other = replayer.connect_local();
    let Ok(Frame::Welcome { epoch, .. }) = hello(&mut other, None, true).await else { panic!() };
    assert_eq!(epoch, Epoch(2));
    assert!(matches!(refusal(&mut agent.connection).await, Refusal::Fenced { .. }));
    let mut old = replayer.connect_local();
    assert_eq!(hello(&mut old, Some(Epoch(1)), false).await, Err(Refusal::Fenced { newest: Epoch(2) }));
    // The same agent over a new connection: an open gap, then a gap in the stream, then a fork.
    let mut agent = Agent::resume(replayer.connect_local(), Some(Epoch(2))).await;
    agent.acked().await;
    let good = agent.position;
    agent.put(Record::Checkpoint { checkpoint: CheckpointId(1), label: CheckpointLabel::default() }, b"");
    agent.flush().await;
    let expected = Refusal::OpenGap { checkpoint: CheckpointId(1), open: 1 };
    assert_eq!(refusal(&mut agent.connection).await, expected);

    let mut agent = Agent::resume(replayer.connect_local(), Some(Epoch(2))).await;
    assert_eq!(agent.position, good);
    agent.position.sequence = agent.position.sequence.next();
    agent.write(1, 0, b"x");
    agent.flush().await;
    assert!(matches!(refusal(&mut agent.connection).await, Refusal::Gap { .. }));

    let mut agent = Agent::resume(replayer.connect_local(), Some(Epoch(2))).await;
    agent.position.sequence = Sequence(good.sequence.0 - 1);
    agent.write(1, 0, b"x");
    agent.flush().await;
    assert_eq!(refusal(&mut agent.connection).await, Refusal::Fork { at: good.sequence });

    let mut other = replayer.connect_local();
    let frame = Frame::Hello {
        group: "g".into(),
        group_id: GroupId([9; 16]),
        boot_id: [0; 16],
        epoch: None,
        take_over: false,
        maps: Vec::new(),
        lz4: false,
    };
    other.writer.send(&frame, b"").await.unwrap();
    assert_eq!(refusal(&mut other).await, Refusal::OtherGroup { name: "g".into() });
    let mut other = replayer.connect_local();
    other.writer.send(&Frame::Records { first: Sequence(1), count: 0 }, b"").await.unwrap();
    assert!(matches!(refusal(&mut other).await, Refusal::Bad(_)));
}

#[tokio::test]
async fn ten_thousand_small_files_take_seconds() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let replayer = serve(&store);
    let mut agent = Agent::new(replayer.connect_local()).await;
    agent.root();
    let start = std::time::Instant::now();
    for d in 0..100u64 {
        let dir = 2 + d * 101;
        agent.object(dir, FileKind::Directory, 0o755, b"");
        agent.entry(1, &format!("d{d}"), dir);
        for f in 1..=100u64 {
            agent.object(dir + f, FileKind::Regular, 0o644, b"");
            agent.entry(dir, &format!("f{f}"), dir + f);
            agent.write(dir + f, 0, format!("content {d} {f}").as_bytes());
        }
        agent.flush().await;
    }
    agent.checkpoint().await;
    println!("10,000 files applied after {:?}", start.elapsed());
    assert_eq!(read(tree(&store).join("d7/f9")), "content 7 9");
    assert!(start.elapsed() < Duration::from_secs(60));
    let start = std::time::Instant::now();
    for d in 0..100u64 {
        for f in 1..=100u64 {
            agent.delete(2 + d * 101, &format!("f{f}"));
            agent.put(Record::Forget { object: ObjectId(2 + d * 101 + f) }, b"");
        }
    }
    agent.checkpoint().await;
    println!("and removed after {:?}", start.elapsed());
    assert_eq!(std::fs::read_dir(tree(&store).join("d7")).unwrap().count(), 0);
}

/// A replayer in a process of its own, that can be killed.
struct Process {
    child: std::process::Child,
    address: Destination,
}

impl Drop for Process {
    fn drop(&mut self) {
        // Left alone it would hold what the test prints to.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Process {
    fn start(store: &Path) -> Self {
        let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_bfs-replayer"))
            .args(["serve", "--store"])
            .arg(store)
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut errors = std::io::BufReader::new(child.stderr.take().unwrap());
        std::io::BufRead::read_line(&mut errors, &mut line).unwrap();
        let address = line.trim().strip_prefix("listening on ").and_then(|address| address.parse().ok());
        let Some(address) = address else {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{line}");
        };
        Self { address, child }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[tokio::test]
async fn nothing_acknowledged_is_lost_by_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let mut process = Process::start(&store);
    let mut agent = Agent::new(net::connect(&process.address, &Folder::default()).await.unwrap()).await;
    let epoch = agent.epoch;
    agent.root();
    for file in 0..4 {
        agent.object(10 + file, FileKind::Regular, 0o600, b"");
        agent.entry(1, &format!("f{file}"), 10 + file);
    }
    agent.repair();
    // The whole history, record by record, so that it can be sent again from anywhere.
    for n in 0..3000u64 {
        agent.write(10 + n % 4, n / 4 * 6, format!("{n:05} ").as_bytes());
        if n % 7 == 0 {
            agent.delete(1, &format!("g{}", (n + 7) % 21));
            agent.entry(1, &format!("g{}", n % 21), 10 + n % 4);
        }
        if n % 100 == 99 {
            let checkpoint = CheckpointId(n / 100 + 1);
            agent.put(Record::Checkpoint { checkpoint, label: CheckpointLabel::default() }, b"");
        }
    }
    let mut history = Vec::new();
    let mut all = std::mem::take(&mut agent.batch).freeze();
    while let Some(record) = codec::take(&mut all).unwrap() {
        history.push(record.bytes);
    }
    let end = agent.position;
    let mut connection = agent.connection;
    let (mut sent, mut acked) = (0, 0);
    let mut seed = 12345u64;
    for kill in 0..=12 {
        // Send and read acknowledgements until this many more are acknowledged, then kill.
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let enough = if kill == 12 { history.len() as u64 } else { acked + (seed >> 33) % 300 };
        loop {
            if sent < history.len() && sent < acked as usize + 200 {
                let some = (history.len() - sent).min(17);
                let body = history[sent..sent + some].concat();
                let frame = Frame::Records { first: Sequence(sent as u64 + 1), count: some as u32 };
                connection.writer.send(&frame, &body).await.unwrap();
                sent += some;
                continue;
            }
            let Frame::Ack { position, .. } = next(&mut connection).await else { panic!() };
            acked = position.sequence.0;
            if acked >= enough.min(history.len() as u64) {
                break;
            }
        }
        if kill == 12 {
            break;
        }
        process.kill();
        process = Process::start(&store);
        connection = net::connect(&process.address, &Folder::default()).await.unwrap();
        // Epoch 1 was granted, durably, before anything else.
        let Ok(Frame::Welcome { position, .. }) = hello(&mut connection, Some(epoch), false).await else {
            panic!()
        };
        assert!(position.sequence.0 >= acked, "{} acknowledged, {} there", acked, position.sequence);
        (sent, acked) = (position.sequence.0 as usize, position.sequence.0);
    }
    assert_eq!(acked, end.sequence.0);
    let ask = Frame::GetManifest { group: "g".into(), at_least: CheckpointId(30) };
    connection.writer.send(&ask, b"").await.unwrap();
    while !matches!(next(&mut connection).await, Frame::Manifest { last: true, .. }) {}
    for file in 0..4u64 {
        let expected: String = (0..3000).filter(|n| n % 4 == file).map(|n| format!("{n:05} ")).collect();
        assert_eq!(read(tree(&store).join(format!("f{file}"))), expected);
    }
    process.kill();
}

#[tokio::test]
async fn maps_lead_only_where_the_replayer_allows() {
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    let options = ServeOptions {
        store: dir.path().join("store"),
        allow_roots: vec![outside.clone()],
        ..ServeOptions::default()
    };
    let replayer = Replayer::start(options).unwrap();
    let map = |group: &str, to: &Path| Frame::Hello {
        group: group.into(),
        group_id: GROUP_ID,
        boot_id: [1; 16],
        epoch: None,
        take_over: false,
        maps: vec![(PathBytes::new("/data".as_ref()), PathBytes::new(to))],
        lz4: false,
    };
    for bad in [Path::new("/etc/x"), Path::new("../x"), &outside] {
        let mut connection = replayer.connect_local();
        connection.writer.send(&map("bad", bad), b"").await.unwrap();
        assert!(matches!(refusal(&mut connection).await, Refusal::Bad(_)), "{bad:?}");
    }
    for (group, to) in [("near", PathBuf::from("x/y")), ("far", outside.join("z"))] {
        let mut connection = replayer.connect_local();
        connection.writer.send(&map(group, &to), b"").await.unwrap();
        let welcome = next(&mut connection).await;
        let mut agent = Agent::welcomed(connection, welcome);
        agent.root();
        agent.object(2, FileKind::Regular, 0o600, b"");
        agent.entry(1, "file", 2);
        agent.checkpoint().await;
    }
    assert!(dir.path().join("store/tree/near/x/y/app/file").exists());
    assert!(outside.join("z/app/file").exists());
}

#[tokio::test]
async fn a_deep_tree_has_a_manifest() {
    let dir = tempfile::tempdir().unwrap();
    let replayer = serve(&dir.path().join("store"));
    let mut agent = Agent::new(replayer.connect_local()).await;
    agent.root();
    let mut expected = vec![String::new()];
    let mut path = String::new();
    for depth in 0..200u64 {
        let (above, below) = (1 + depth * 2, 3 + depth * 2);
        agent.object(below - 1, FileKind::Regular, 0o600, b"");
        agent.entry(above, "z", below - 1);
        agent.object(below, FileKind::Directory, 0o700, b"");
        agent.entry(above, "d", below);
        expected.push(format!("{path}z"));
        expected.push(format!("{path}d"));
        path += "d/";
    }
    agent.checkpoint().await;
    let ask = Frame::GetManifest { group: "g".into(), at_least: CheckpointId(1) };
    agent.connection.writer.send(&ask, b"").await.unwrap();
    let Frame::Manifest { lines, last: true, .. } = next(&mut agent.connection).await else { panic!() };
    let mut paths: Vec<_> = lines.iter().map(|l| l.path.as_path().to_string_lossy().into_owned()).collect();
    assert_eq!((paths[1].as_str(), paths[400].as_str()), ("d", "z"), "in the order of a walk");
    paths.sort();
    expected.sort();
    assert_eq!(paths, expected);
    assert!(lines.iter().all(|l| l.object != ObjectId(0)));
}

#[tokio::test]
async fn records_that_can_never_be_applied_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let replayer = serve(&dir.path().join("store"));
    let mut agent = Agent::new(replayer.connect_local()).await;
    agent.root();
    agent.object(2, FileKind::Regular, 0o600, b"");
    agent.entry(1, "file", 2);
    agent.checkpoint().await;
    let (epoch, name) = (agent.epoch, Name::new(b"x").unwrap());
    let object = |n| ObjectId(n);
    for bad in [
        Record::EntrySet { directory: object(1), name: name.clone(), object: object(9) },
        Record::EntrySet { directory: object(2), name, object: object(1) },
        Record::Write { object: object(1), offset: 0 },
        Record::XattrSet { object: object(2), name: "nameless".into() },
    ] {
        let mut agent = Agent::resume(replayer.connect_local(), Some(epoch)).await;
        agent.put(bad.clone(), b"x");
        agent.flush().await;
        assert!(matches!(refusal(&mut agent.connection).await, Refusal::Bad(_)), "{bad:?}");
    }
    let mut agent = Agent::resume(replayer.connect_local(), Some(epoch)).await;
    agent.write(2, 0, b"good");
    agent.checkpoint().await;
}

/// A small file system of its own.
struct Small {
    mount: PathBuf,
}

impl Small {
    fn make(dir: &Path, mib: u64) -> Self {
        let (image, mount) = (dir.join("image"), dir.join("mount"));
        std::fs::File::create(&image).unwrap().set_len(mib << 20).unwrap();
        std::fs::create_dir(&mount).unwrap();
        for (command, args) in [("mkfs.ext4", vec!["-q", "-m0"]), ("mount", vec!["-o", "loop", "-t", "ext4"])]
        {
            let mut command = std::process::Command::new(command);
            command.args(args).arg(&image);
            if command.get_program() == "mount" {
                command.arg(&mount);
            }
            assert!(command.status().unwrap().success(), "{command:?} needs root and a loop device");
        }
        Self { mount }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.mount).status();
    }
}

/// A store on a small disk, with generations that hold before-images of 2 MiB each; and what is free there.
async fn on_a_small_disk(small: &Small) -> (ReplayerHandle, Agent) {
    let retention = bfs_agent::backup::retention::Retention::last(64, 2);
    let store = small.mount.join("store");
    let replayer = Replayer::start(ServeOptions { store, retention, ..ServeOptions::default() }).unwrap();
    let mut agent = Agent::new(replayer.connect_local()).await;
    agent.root();
    agent.object(2, FileKind::Regular, 0o600, b"");
    agent.entry(1, "a", 2);
    for n in 1..=6 {
        agent.write(2, 0, &vec![n; 1 << 20]);
        agent.write(2, 1 << 20, &vec![n; 1 << 20]);
        agent.checkpoint().await;
    }
    (replayer, agent)
}

impl Small {
    fn free(&self) -> usize {
        let now = rustix::fs::statvfs(&self.mount).unwrap();
        (now.f_bavail * now.f_frsize) as usize
    }

    /// Somebody else uses all but so many bytes. What the replayer would give back first, it has given back.
    fn leave(&self, bytes: usize) {
        for spare in bfs_agent::log::spares::list(&self.mount.join("store/log/g")).unwrap() {
            std::fs::remove_file(spare).unwrap();
        }
        std::fs::write(self.mount.join("ballast"), vec![1; self.free() - bytes]).unwrap();
        rustix::fs::sync();
    }

    fn make_room(&self) {
        std::fs::remove_file(self.mount.join("ballast")).unwrap();
    }
}

/// Sends `mib` MiB of a new file, and a checkpoint, as often as it is refused for want of room; whether it was
/// applied in the end.
async fn try_to_checkpoint(replayer: &ReplayerHandle, agent: Agent, mib: u64, tries: u32) -> (Agent, bool) {
    let (epoch, checkpoint) = (agent.epoch, CheckpointId(agent.next_checkpoint));
    let mut agent = agent;
    let end = agent.position.sequence.0 + mib + 3;
    for _ in 0..tries {
        // Whatever it has of these, the rest follows.
        while agent.position.sequence.0 < end {
            let n = end - agent.position.sequence.0;
            match n {
                1 => {
                    agent.put(Record::Checkpoint { checkpoint, label: CheckpointLabel::default() }, b"");
                }
                2 => agent.entry(1, "new", 3),
                n if n == mib + 3 => agent.object(3, FileKind::Regular, 0o600, b""),
                n => agent.write(3, (mib + 2 - n) << 20, &vec![7; 1 << 20]),
            }
            agent.flush().await;
        }
        loop {
            match next(&mut agent.connection).await {
                Frame::Ack { applied, .. } if applied >= checkpoint => {
                    agent.next_checkpoint += 1;
                    return (agent, true);
                }
                Frame::Ack { state: StoreState::Stuck, .. } => {
                    panic!("what is confirmed finds no room: {:?}", replayer.status()[0])
                }
                Frame::Ack { confirmed, .. } => agent.confirmed = confirmed,
                Frame::Refused(Refusal::Full(why)) => {
                    assert!(why.contains("disk is full"), "{why}");
                    break;
                }
                other => panic!("{other:?}"),
            }
        }
        let next_checkpoint = agent.next_checkpoint;
        agent = Agent::resume(replayer.connect_local(), Some(epoch)).await;
        agent.next_checkpoint = next_checkpoint;
    }
    (agent, false)
}

#[tokio::test]
async fn generations_make_room_before_anything_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let small = Small::make(dir.path(), 64);
    let (replayer, agent) = on_a_small_disk(&small).await;
    let all = files(&small.mount.join("store/images/g"));
    assert_eq!(all, 5);
    // Log and tree need 12 MiB, the margin 3, the generations above the floor hold 6 to 8.
    small.leave(12 << 20);
    let (agent, applied) = try_to_checkpoint(&replayer, agent, 6, 10).await;
    assert!(applied, "{:?}", replayer.status()[0]);
    assert!(files(&small.mount.join("store/images/g")) <= 2, "the floor is 2");
    assert_eq!(replayer.status()[0].state, StoreState::Ready);
    let new = std::fs::read(tree(&small.mount.join("store")).join("new")).unwrap();
    assert!(new == vec![7; 6 << 20]);
    drop((agent, replayer));
}

#[tokio::test]
async fn segments_to_be_written_over_are_given_back_when_room_is_short() {
    let dir = tempfile::tempdir().unwrap();
    let small = Small::make(dir.path(), 64);
    let (replayer, agent) = on_a_small_disk(&small).await;
    let kept = || bfs_agent::log::spares::list(&small.mount.join("store/log/g")).unwrap().len();
    assert!(kept() > 0);
    // Log and tree need 4 MiB, the margin 3; with less than another one beside that, room is short.
    let ballast = small.free() - (9 << 20);
    std::fs::write(small.mount.join("ballast"), vec![1; ballast]).unwrap();
    rustix::fs::sync();
    let (agent, applied) = try_to_checkpoint(&replayer, agent, 2, 10).await;
    assert!(applied, "{:?}", replayer.status()[0]);
    assert_eq!(kept(), 0);
    drop((agent, replayer));
}

#[tokio::test]
async fn a_full_store_confirms_nothing_and_goes_on_when_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let small = Small::make(dir.path(), 64);
    let (replayer, agent) = on_a_small_disk(&small).await;
    let before = agent.next_checkpoint - 1;
    small.leave(10 << 20);
    let (agent, applied) = try_to_checkpoint(&replayer, agent, 14, 2).await;
    assert!(!applied);
    let status = replayer.status()[0].clone();
    assert_eq!((status.state, status.confirmed.0, status.applied.0), (StoreState::Full, before, before));
    println!("{}", status.trouble.unwrap());
    let path = tree(&small.mount.join("store"));
    assert!(!path.join("new").exists(), "nothing of it is seen");
    assert_eq!(std::fs::read(path.join("a")).unwrap(), vec![6; 2 << 20]);
    assert!(small.free() > 2 << 20, "the margin is left");
    // It stays so over a restart, and goes on by itself when there is room.
    let store = small.mount.join("store");
    let epoch = agent.epoch;
    drop((agent, replayer));
    let replayer = serve(&store);
    let mut agent = Agent::resume(replayer.connect_local(), Some(epoch)).await;
    agent.next_checkpoint = before + 1;
    let status = replayer.status()[0].clone();
    assert_eq!((status.state, status.durable), (StoreState::Full, agent.position.sequence));
    small.make_room();
    assert_eq!(replayer.status()[0].trouble, None);
    // The records that it has are not sent again: it goes on behind them.
    for mib in status.pending_records - 1..14 {
        agent.write(3, mib << 20, &vec![7; 1 << 20]);
    }
    agent.entry(1, "new", 3);
    agent.checkpoint().await;
    assert!(std::fs::read(path.join("new")).unwrap() == vec![7; 14 << 20]);
    drop((agent, replayer));
}

#[tokio::test]
async fn bytes_that_are_written_again_and_again_need_room_once() {
    let dir = tempfile::tempdir().unwrap();
    let small = Small::make(dir.path(), 64);
    let (replayer, mut agent) = on_a_small_disk(&small).await;
    small.leave(30 << 20);
    let epoch = agent.epoch;
    let next_checkpoint = agent.next_checkpoint;
    // 16 MiB in the log, 1 in the tree and 1 of images: by their numbers they would need 48.
    let mut written = 0;
    while written < 16 {
        let durable = agent.position;
        agent.write(2, 0, &vec![written; 1 << 20]);
        agent.flush().await;
        match next(&mut agent.connection).await {
            Frame::Ack { position, .. } => {
                assert_eq!(position, agent.position);
                written += 1;
            }
            Frame::Refused(Refusal::Full(_)) => {
                agent = Agent::resume(replayer.connect_local(), Some(epoch)).await;
                assert_eq!(agent.position, durable);
            }
            other => panic!("{other:?}"),
        }
    }
    agent.next_checkpoint = next_checkpoint;
    agent.checkpoint().await;
    assert_eq!(std::fs::read(tree(&small.mount.join("store")).join("a")).unwrap()[0], 15);
    drop((agent, replayer));
}

#[tokio::test]
async fn what_waits_for_a_checkpoint_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let options =
        ServeOptions { store: store.clone(), pending_max: Some(4 << 20), ..ServeOptions::default() };
    let replayer = Replayer::start(options).unwrap();
    let mut agent = Agent::new(replayer.connect_local()).await;
    agent.root();
    agent.object(2, FileKind::Regular, 0o600, b"");
    agent.entry(1, "a", 2);
    agent.checkpoint().await;
    let epoch = agent.epoch;
    for mib in 0..6 {
        agent.write(2, mib << 20, &vec![mib as u8; 1 << 20]);
        agent.flush().await;
    }
    let refused = refusal(&mut agent.connection).await;
    assert!(
        matches!(&refused, Refusal::Behind(why) if why.contains("no checkpoint has come")),
        "{refused:?}"
    );
    let status = replayer.status()[0].clone();
    assert_eq!((status.state, status.pending_records), (StoreState::Behind, 4));
    // With a higher bound it goes on.
    drop((agent, replayer));
    let replayer = serve(&store);
    let mut agent = Agent::resume(replayer.connect_local(), Some(epoch)).await;
    assert_eq!(replayer.status()[0].state, StoreState::Ready);
    agent.checkpoint().await;
    assert_eq!(std::fs::metadata(tree(&store).join("a")).unwrap().len(), 4 << 20);
    drop((agent, replayer));
}

fn files(folder: &Path) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}
