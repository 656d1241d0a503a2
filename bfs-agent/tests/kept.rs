//! What a replayer keeps and gives back, with a scripted agent.

use std::path::Path;

use bfs_agent::backup::retention::Retention;
use bfs_agent::backup::{Replayer, ReplayerHandle, ServeOptions};
use bfs_common::past::*;
use bfs_common::record::*;
use bfs_common::wire::*;

#[allow(dead_code, reason = "made for more than is tested here")]
#[path = "replayer/client.rs"]
mod client;

use client::*;

fn keeping(store: &Path, keep: u32) -> ReplayerHandle {
    let retention = Retention::last(keep, 1);
    Replayer::start(ServeOptions { store: store.into(), retention, ..ServeOptions::default() }).unwrap()
}

async fn kept(replayer: &ReplayerHandle) -> Vec<u64> {
    let mut connection = replayer.connect_local();
    connection.writer.send(&Frame::GetGenerations { group: "g".into() }, b"").await.unwrap();
    match next(&mut connection).await {
        Frame::Generations { lines, last: true } => lines.iter().map(|g| g.checkpoint.0).collect(),
        other => panic!("{other:?}"),
    }
}

/// The bytes of file 2 at a checkpoint, over a connection that the caller keeps.
async fn content(connection: &mut bfs_agent::net::Connection, at: u64) -> Result<Vec<u8>, Refusal> {
    let ask = Frame::GetContents { group: "g".into(), at: CheckpointId(at), objects: vec![ObjectId(2)] };
    connection.writer.send(&ask, b"").await.unwrap();
    let (frame, body) = connection.reader.next().await.unwrap().unwrap();
    match frame {
        Frame::Content { object: ObjectId(2), offset: 0, last: true } => Ok(body.to_vec()),
        Frame::Refused(refusal) => Err(refusal),
        other => panic!("{other:?}"),
    }
}

fn files(store: &Path, folder: &str) -> usize {
    std::fs::read_dir(store.join(folder).join("g")).unwrap().count()
}

#[tokio::test]
async fn only_the_last_the_tagged_and_the_held_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let replayer = keeping(&store, 2);
    let mut agent = Agent::new(replayer.connect_local()).await;
    agent.root();
    agent.object(2, FileKind::Regular, 0o600, b"");
    agent.entry(1, "a", 2);
    for n in 1..=3 {
        agent.write(2, 0, format!("{n}{n}").as_bytes());
        agent.checkpoint().await;
    }
    assert_eq!(kept(&replayer).await, [2, 3]);
    assert_eq!(files(&store, "images"), 1);
    // 3 is held by a reader; 4 has a tag; in 5 the file goes for good.
    let mut reader = replayer.connect_local();
    assert_eq!(content(&mut reader, 3).await.unwrap(), b"33");
    let label = CheckpointLabel { tag: "golden".into(), ..CheckpointLabel::default() };
    agent.write(2, 0, b"44");
    agent.put(Record::Checkpoint { checkpoint: CheckpointId(4), label }, b"");
    agent.delete(1, "a");
    agent.put(Record::Forget { object: ObjectId(2) }, b"");
    agent.next_checkpoint = 5;
    for n in 5..=8 {
        agent.object(n, FileKind::Directory, 0o755, b"");
        agent.entry(1, &n.to_string(), n);
        agent.checkpoint().await;
    }
    assert_eq!(kept(&replayer).await, [3, 4, 7, 8]);
    assert_eq!(content(&mut reader, 3).await.unwrap(), b"33");
    assert_eq!(files(&store, "kept"), 1);
    drop(reader);
    drop(agent);
    drop(replayer);

    // A crash may have left something that is not needed; a start removes it.
    std::fs::write(store.join("kept/g/99"), "").unwrap();
    std::fs::write(store.join("images/g/00000000000000000001.img"), "").unwrap();
    let replayer = keeping(&store, 2);
    let mut agent = Agent::new(replayer.connect_local()).await;
    agent.checkpoint().await;
    assert_eq!(kept(&replayer).await, [4, 8, 9]);
    assert_eq!((files(&store, "kept"), files(&store, "images")), (1, 2));
    let mut reader = replayer.connect_local();
    assert_eq!(content(&mut reader, 4).await.unwrap(), b"44");
    assert!(
        matches!(content(&mut reader, 3).await, Err(Refusal::Store(why)) if why.contains("no generation 3"))
    );
}

/// A group may have rules of its own beside those of all.
#[tokio::test]
async fn a_group_is_kept_by_its_own_rules() {
    for (of, wanted) in [("g", vec![4, 5]), ("other", (1..=5).collect())] {
        let dir = tempfile::tempdir().unwrap();
        let options = ServeOptions {
            store: dir.path().join("store"),
            retention: Retention::everything(1),
            retention_of: [(of.to_owned(), Retention::last(2, 1))].into(),
            ..ServeOptions::default()
        };
        let replayer = Replayer::start(options).unwrap();
        let mut agent = Agent::new(replayer.connect_local()).await;
        agent.root();
        agent.object(2, FileKind::Regular, 0o600, b"");
        agent.entry(1, "a", 2);
        for n in 1..=5u8 {
            agent.write(2, 0, &[n; 10]);
            agent.checkpoint().await;
        }
        assert_eq!(kept(&replayer).await, wanted, "rules of {of}");
    }
}

async fn merge(replayer: &ReplayerHandle, from: u64, to: u64) -> Result<Vec<u64>, Refusal> {
    let mut connection = replayer.connect_local();
    let ask = Frame::Merge { group: "g".into(), from: CheckpointId(from), to: CheckpointId(to) };
    connection.writer.send(&ask, b"").await.unwrap();
    match next(&mut connection).await {
        Frame::Merged { gone } => Ok(gone.into_iter().map(|n| n.0).collect()),
        Frame::Refused(refusal) => Err(refusal),
        other => panic!("{other:?}"),
    }
}

/// Beside an agent that goes on: of checkpoints that become one the newer stays, and the others stay as they were;
/// what has a tag, is being read, or belongs to the floor is not merged.
#[tokio::test]
async fn checkpoints_are_merged_when_somebody_asks() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let retention = Retention { merge_floor: 3, ..Retention::everything(3) };
    let options = ServeOptions { store: store.clone(), retention, ..ServeOptions::default() };
    let replayer = Replayer::start(options.clone()).unwrap();
    let mut agent = Agent::new(replayer.connect_local()).await;
    agent.root();
    agent.object(2, FileKind::Regular, 0o600, b"");
    agent.entry(1, "a", 2);
    let text = |n: u64| format!("{n}{n}").repeat(50_000).into_bytes();
    for n in 1..=9 {
        let label = CheckpointLabel {
            tag: if n == 3 { "golden".into() } else { String::new() },
            ..Default::default()
        };
        agent.write(2, 0, &text(n));
        agent.repair();
        agent.put(Record::Checkpoint { checkpoint: CheckpointId(n), label }, b"");
        agent.flush().await;
        agent.wait(|agent, _| agent.applied == CheckpointId(n)).await;
    }
    let mut reader = replayer.connect_local();
    assert_eq!(content(&mut reader, 5).await.unwrap()[..6], *b"555555");
    let refused = |answer: Result<Vec<u64>, Refusal>, why: &str| {
        assert!(matches!(&answer, Err(Refusal::Bad(text)) if text.contains(why)), "{answer:?}");
    };
    refused(merge(&replayer, 2, 4).await, "checkpoint 3 has a tag");
    refused(merge(&replayer, 4, 6).await, "checkpoint 5 is mounted or being read");
    refused(merge(&replayer, 6, 8).await, "checkpoint 7 is one of the last 3");
    refused(merge(&replayer, 6, 10).await, "checkpoint 10 is not kept");
    refused(merge(&replayer, 6, 6).await, "older one first");
    assert_eq!(kept(&replayer).await, (1..=9).collect::<Vec<_>>());
    drop(reader);
    let took = |store: &Path| -> u64 {
        let all = std::fs::read_dir(store.join("images/g")).unwrap();
        all.map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
    };
    let before = took(&store);
    // The one that was being read is given back when its connection is seen to be closed.
    let gone = loop {
        match merge(&replayer, 4, 7).await {
            Err(Refusal::Bad(why)) if why.contains("being read") => tokio::task::yield_now().await,
            other => break other.unwrap(),
        }
    };
    assert_eq!(gone, [4, 5, 6]);
    assert_eq!(kept(&replayer).await, [1, 2, 3, 7, 8, 9]);
    assert!(took(&store) <= before - 3 * 100_000, "{before} to {}", took(&store));
    assert_eq!(merge(&replayer, 1, 2).await, Ok(vec![1]));
    agent.write(2, 0, &text(10));
    agent.next_checkpoint = 10;
    agent.checkpoint().await;
    drop(agent);
    drop(replayer);
    let replayer = Replayer::start(options).unwrap();
    assert_eq!(kept(&replayer).await, [2, 3, 7, 8, 9, 10]);
    for n in [2, 3, 7, 8, 9, 10] {
        assert!(content(&mut replayer.connect_local(), n).await.unwrap() == text(n), "checkpoint {n}");
    }
    drop(replayer);
    assert_eq!(bfs_agent::backup::check::check(&store, true, &[]).unwrap().problems, []);
}

#[tokio::test]
async fn damaged_images_are_named_and_not_given_out() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let replayer = keeping(&store, 9);
    let mut agent = Agent::new(replayer.connect_local()).await;
    agent.root();
    agent.object(2, FileKind::Regular, 0o600, b"");
    agent.entry(1, "a", 2);
    for _ in 1..=3 {
        agent.write(2, 0, &[7; 3000]);
        agent.checkpoint().await;
    }
    let path = store.join("images/g/00000000000000000001.img");
    let good = std::fs::read(&path).unwrap();
    for at in [20, 60, good.len() - 1500] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        std::fs::write(&path, &bad).unwrap();
        let mut reader = replayer.connect_local();
        let refused = content(&mut reader, 1).await;
        assert!(matches!(refused, Err(Refusal::Store(why)) if why.contains("damaged")), "byte {at}");
        assert_eq!(content(&mut replayer.connect_local(), 2).await.unwrap(), [7; 3000]);
    }
}

/// What file 2 had at a checkpoint where something was written since: (offset, bytes, zeros).
async fn changes(replayer: &ReplayerHandle, at: u64) -> Vec<(u64, Vec<u8>, u64)> {
    let mut connection = replayer.connect_local();
    let ask = Frame::GetChanges { group: "g".into(), at: CheckpointId(at), objects: vec![ObjectId(2)] };
    connection.writer.send(&ask, b"").await.unwrap();
    let mut all = Vec::new();
    loop {
        let (frame, body) = connection.reader.next().await.unwrap().unwrap();
        let Frame::Change { object: ObjectId(2), offset, zeros, last } = frame else { panic!("{frame:?}") };
        if zeros > 0 || !body.is_empty() {
            all.push((offset, body.to_vec(), zeros));
        }
        if last {
            return all;
        }
    }
}

/// Only what was overwritten or cut off since is given out, below the size at the time.
#[tokio::test]
async fn only_what_was_written_since_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let replayer = keeping(&dir.path().join("store"), 9);
    let mut agent = Agent::new(replayer.connect_local()).await;
    agent.root();
    agent.object(2, FileKind::Regular, 0o600, b"");
    agent.entry(1, "a", 2);
    agent.write(2, 0, b"0123456789");
    agent.put(Record::Truncate { object: ObjectId(2), size: 40_000 }, b"");
    agent.checkpoint().await;
    agent.write(2, 3, b"xy");
    agent.write(2, 20_000, b"z");
    agent.checkpoint().await;
    agent.put(Record::Truncate { object: ObjectId(2), size: 8 }, b"");
    agent.checkpoint().await;
    agent.write(2, 50_000, b"beyond");
    agent.checkpoint().await;
    let bytes = |at: u64, text: &[u8]| (at, text.to_vec(), 0);
    assert_eq!(changes(&replayer, 4).await, []);
    assert_eq!(changes(&replayer, 3).await, []);
    agent.write(2, 4, &[9; 60_000]);
    agent.checkpoint().await;
    // Of what was written beyond the end at that time nothing is said.
    assert_eq!(changes(&replayer, 3).await, [bytes(4, b"y567")]);
    let mut had = vec![0; 40_000];
    had[..10].copy_from_slice(b"0123456789");
    for at in [1, 2] {
        let all = changes(&replayer, at).await;
        let mut now = vec![0; 40_000];
        now[..4].copy_from_slice(b"012x");
        for (offset, text, zeros) in &all {
            let end = *offset as usize + text.len().max(*zeros as usize);
            now[*offset as usize..end].fill(0);
            now[*offset as usize..][..text.len()].copy_from_slice(text);
        }
        let mut then = had.clone();
        if at == 2 {
            then[3..5].copy_from_slice(b"xy");
            then[20_000] = b'z';
        }
        assert!(now == then, "checkpoint {at}");
    }
}

/// The digests of all files after a record.
async fn digests(replayer: &ReplayerHandle, position: u64) -> Vec<(u64, Vec<u8>)> {
    let mut connection = replayer.connect_local();
    let ask = Frame::GetDigests { group: "g".into(), position: Sequence(position) };
    connection.writer.send(&ask, b"").await.unwrap();
    match next(&mut connection).await {
        Frame::Digests { lines, last: true } => {
            lines.into_iter().map(|line| (line.object.0, line.digests.to_vec())).collect()
        }
        other => panic!("{other:?}"),
    }
}

/// Blocks that have changed since the tree stood still have no digests, and nothing has for a position that
/// is behind the tree.
#[tokio::test]
async fn digests_are_of_the_position_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let replayer = keeping(&dir.path().join("store"), 9);
    let mut agent = Agent::new(replayer.connect_local()).await;
    agent.root();
    for object in [2, 3, 4] {
        agent.object(object, FileKind::Regular, 0o600, b"");
        agent.entry(1, &object.to_string(), object);
    }
    agent.write(2, 0, &[7; 5000]);
    agent.write(3, 0, b"three");
    agent.checkpoint().await;
    let applied = agent.position.sequence.0;
    let of = |bytes: &[u8]| -> Vec<u8> {
        bytes.chunks(4096).flat_map(|block| blake3::hash(block).as_bytes()[..16].to_vec()).collect()
    };
    let all = vec![(2, of(&[7; 5000])), (3, of(b"three"))];
    assert_eq!(digests(&replayer, applied).await, all);
    agent.write(3, 1, b"H");
    agent.acked().await;
    assert_eq!(digests(&replayer, applied).await, all, "what comes behind the position does not count");
    let unknown = vec![0; 16];
    assert_eq!(digests(&replayer, applied + 1).await, [all[0].clone(), (3, unknown.clone())]);
    agent.write(2, 4100, b"second block");
    agent.acked().await;
    let first = [of(&[7; 4096]), unknown.clone()].concat();
    assert_eq!(digests(&replayer, applied + 2).await, [(2, first), (3, unknown.clone())]);
    agent.put(Record::Truncate { object: ObjectId(2), size: 100 }, b"");
    agent.acked().await;
    assert_eq!(digests(&replayer, applied + 3).await, [(2, unknown.repeat(2)), (3, unknown)]);
    assert_eq!(digests(&replayer, applied - 1).await, []);
}

/// An object may be without a name at a checkpoint, and get one again: it stays what it was.
#[tokio::test]
async fn what_had_no_name_at_a_checkpoint_comes_back_with_all_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let replayer = keeping(&store, 9);
    let mut agent = Agent::new(replayer.connect_local()).await;
    agent.root();
    agent.object(2, FileKind::Regular, 0o600, b"");
    agent.write(2, 0, b"first");
    agent.object(3, FileKind::Directory, 0o700, b"");
    agent.entry(1, "d", 3);
    agent.entry(3, "a", 2);
    agent.object(4, FileKind::Regular, 0o600, b"");
    agent.entry(1, "f", 4);
    agent.write(4, 0, b"other");
    agent.checkpoint().await;
    let name = |name: &str| Name::new(name.as_bytes()).unwrap();
    for (directory, entry) in [(1, "d"), (1, "f")] {
        agent.put(Record::EntryDelete { directory: ObjectId(directory), name: name(entry) }, b"");
    }
    agent.write(2, 0, b"SECOND");
    agent.checkpoint().await;
    // A file of two names, and a directory below one that is new.
    agent.object(5, FileKind::Directory, 0o700, b"");
    agent.entry(1, "new", 5);
    agent.entry(5, "back", 3);
    agent.entry(5, "f", 4);
    agent.entry(1, "g", 4);
    agent.write(2, 0, b"t");
    agent.checkpoint().await;
    let mut connection = replayer.connect_local();
    for (at, expected) in [(1, "first"), (2, "SECOND"), (3, "tECOND")] {
        assert_eq!(content(&mut connection, at).await.unwrap(), expected.as_bytes(), "checkpoint {at}");
    }
    drop((agent, connection, replayer));
    let report = bfs_agent::backup::check::check(&store, true, &[]).unwrap();
    assert!(report.problems.is_empty(), "{:?}", report.problems);
}

/// Asks about what changed; the lines in short.
async fn differences(replayer: &ReplayerHandle, from: u64, to: u64) -> Vec<String> {
    let mut connection = replayer.connect_local();
    let (from, to) = (CheckpointId(from), CheckpointId(to));
    connection.writer.send(&Frame::GetDifferences { group: "g".into(), from, to }, b"").await.unwrap();
    let Frame::Differences { lines, last: true } = next(&mut connection).await else { panic!() };
    let paths = |side: &Option<Side>| match side {
        Some(side) => {
            side.paths.iter().map(|p| p.as_path().display().to_string()).collect::<Vec<_>>().join("=")
        }
        None => "-".into(),
    };
    lines
        .iter()
        .map(|d| format!("{} {} {:?} {}", paths(&d.before), paths(&d.after), d.changed, d.bytes))
        .collect()
}

async fn versions(replayer: &ReplayerHandle, path: &str) -> Vec<String> {
    let mut connection = replayer.connect_local();
    let path = PathBytes::new(path.as_ref());
    connection.writer.send(&Frame::GetVersions { group: "g".into(), path }, b"").await.unwrap();
    let Frame::Versions { lines, last: true } = next(&mut connection).await else { panic!() };
    let path =
        |v: &VersionLine| v.after.as_ref().map_or("-".into(), |s| s.paths[0].as_path().display().to_string());
    lines.iter().map(|v| format!("{} {:?} {} {:?}", v.checkpoint, v.event, path(v), v.changed)).collect()
}

/// A file is followed through renames and over what it replaced; a difference names each object once.
#[tokio::test]
async fn what_changed_is_told_by_path() {
    let dir = tempfile::tempdir().unwrap();
    let replayer = keeping(&dir.path().join("store"), 99);
    let mut agent = Agent::new(replayer.connect_local()).await;
    agent.root();
    agent.object(2, FileKind::Regular, 0o600, b"");
    agent.entry(1, "a", 2);
    agent.write(2, 0, b"0123456789");
    agent.object(3, FileKind::Directory, 0o755, b"");
    agent.entry(1, "d", 3);
    agent.checkpoint().await;
    // 2: bytes, of which some are as before; 3: another name; 4: nothing.
    agent.write(2, 0, b"01x3456");
    agent.checkpoint().await;
    agent.delete(1, "a");
    agent.entry(3, "b", 2);
    agent.checkpoint().await;
    agent.write(2, 0, b"0");
    agent.checkpoint().await;
    // 5: another file takes its place; 6: its directory is moved; 7: it is gone.
    agent.object(4, FileKind::Regular, 0o644, b"");
    agent.write(4, 0, b"01x34567");
    agent.entry(3, "b", 4);
    agent.put(Record::Forget { object: ObjectId(2) }, b"");
    agent.checkpoint().await;
    agent.delete(1, "d");
    agent.entry(1, "e", 3);
    agent.checkpoint().await;
    agent.delete(3, "b");
    agent.checkpoint().await;

    assert_eq!(differences(&replayer, 1, 2).await, ["/data/app/a /data/app/a [Content] 1"]);
    assert_eq!(differences(&replayer, 2, 3).await, ["/data/app/a /data/app/d/b [Names] 0"]);
    assert_eq!(differences(&replayer, 3, 4).await, [""; 0], "the same bytes again");
    assert_eq!(differences(&replayer, 4, 5).await, ["/data/app/d/b /data/app/d/b [Content, Mode, Time] 2"]);
    assert_eq!(differences(&replayer, 5, 6).await, ["/data/app/d /data/app/e [Names] 0"]);
    assert_eq!(differences(&replayer, 6, 7).await, ["/data/app/e/b - [] 8"]);
    let all = ["/data/app/a - [] 10", "/data/app/d /data/app/e [Names] 0"];
    assert_eq!(differences(&replayer, 1, 7).await, all);
    assert_eq!(differences(&replayer, 7, 7).await, [""; 0]);

    let all = [
        "1 Oldest /data/app/a []",
        "2 Changed /data/app/a [Content]",
        "3 Changed /data/app/d/b [Names]",
        "4 Changed /data/app/d/b [Content]",
        "5 Replaced /data/app/d/b [Content, Mode, Time]",
        "6 Changed /data/app/e/b [Names]",
        "7 Removed - []",
    ];
    assert_eq!(versions(&replayer, "/data/app/e/b").await, all);
    // Under this name it was the first file, which ended in 5.
    let mut first = all[..4].to_vec();
    first.push("5 Removed - []");
    assert_eq!(versions(&replayer, "/data/app/a").await, first);
    assert_eq!(versions(&replayer, "/data/app/none").await, [""; 0]);
    assert_eq!(versions(&replayer, "/elsewhere").await, [""; 0]);
}

/// Bytes that a store takes on its disk, but for its log.
fn takes(store: &Path) -> u64 {
    fn below(path: &Path) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let meta = std::fs::symlink_metadata(path).unwrap();
        let inside = if meta.is_dir() {
            std::fs::read_dir(path).unwrap().map(|entry| below(&entry.unwrap().path())).sum()
        } else {
            0
        };
        meta.blocks() * 512 + inside
    }
    let folders = ["tree", "images", "kept", "stage", "aside", "receive"];
    folders.iter().map(|folder| below(&store.join(folder))).sum()
}

/// What dropped and merged checkpoints had taken is free again: the store takes what one takes that never had them,
/// within 1 %.
#[test]
fn what_goes_frees_its_room() {
    const MIB: usize = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let (store, other) = (dir.path().join("store"), dir.path().join("other"));
    let start = |store: &Path| {
        let options = ServeOptions {
            store: store.into(),
            retention: Retention::everything(1),
            ..ServeOptions::default()
        };
        Replayer::start(options).unwrap()
    };
    let replayer = start(&store);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let bytes = |seed: u64| -> Vec<u8> {
        (0..MIB as u64 / 8)
            .flat_map(|n| (n.wrapping_mul(seed * 2 + 1) ^ seed << 32 | 1).to_le_bytes())
            .collect()
    };
    runtime.block_on(async {
        let mut agent = Agent::new(replayer.connect_local()).await;
        agent.root();
        agent.object(2, FileKind::Regular, 0o600, b"");
        agent.entry(1, "large", 2);
        for n in 0..32 {
            agent.write(2, n * MIB as u64, &bytes(n));
            agent.flush().await;
        }
        for n in 1..=20u64 {
            // A part is written over, a file comes, and the one before it goes.
            agent.write(2, (n % 32) * MIB as u64, &bytes(100 + n));
            agent.object(10 + n, FileKind::Regular, 0o600, b"");
            agent.entry(1, &format!("f{n}"), 10 + n);
            agent.write(10 + n, 0, &bytes(200 + n));
            if n > 1 {
                agent.delete(1, &format!("f{}", n - 1));
                agent.put(Record::Forget { object: ObjectId(9 + n) }, b"");
            }
            agent.checkpoint().await;
        }
        assert_eq!(merge(&replayer, 2, 9).await.map(|gone| gone.len()), Ok(7));
        assert_eq!(merge(&replayer, 10, 18).await.map(|gone| gone.len()), Ok(8));
        assert_eq!(merge(&replayer, 1, 9).await, Ok(vec![1]));
        assert_eq!(kept(&replayer).await, [9, 18, 19, 20]);
    });
    let client = |replayer: &ReplayerHandle| {
        bfs_agent::generation::Client::open(async { Ok(replayer.connect_local()) }).unwrap()
    };
    let target = start(&other);
    let mut before = None;
    for to in [9, 18, 19, 20].map(CheckpointId) {
        let mut stream = Vec::new();
        let sent = client(&replayer).transfer("g", before, to, |piece| {
            stream.extend_from_slice(piece);
            Ok(())
        });
        sent.unwrap();
        let mut rest = &stream[..];
        let taken = client(&target).receive(None, &mut |piece| {
            let (some, behind) = rest.split_at(rest.len().min(MIB));
            (*piece, rest) = (some.to_vec(), behind);
            Ok(())
        });
        assert_eq!(taken.unwrap().1, to);
        while target.status()[0].applied < to {
            std::thread::yield_now();
        }
        before = Some(to);
    }
    drop((replayer, target));
    let (merged, fresh) = (takes(&store), takes(&other));
    assert!(merged.abs_diff(fresh) * 100 <= fresh, "{merged} bytes, and {fresh} without what was dropped");
    assert_eq!(bfs_agent::backup::check::check(&other, true, &[]).unwrap().problems, []);
}
