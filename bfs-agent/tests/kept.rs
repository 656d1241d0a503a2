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

/// Files that have changed since the tree stood still have no digests, and nothing has for a position that
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
    assert_eq!(digests(&replayer, applied + 1).await, all[..1]);
    assert_eq!(digests(&replayer, applied - 1).await, []);
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
    agent.put(Record::Forget { object: ObjectId(4) }, b"");
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
