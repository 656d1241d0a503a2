//! Before-images on another disk.

use std::path::Path;

use bfs_agent::backup::retention::Retention;
use bfs_agent::backup::{BackupError, Replayer, ReplayerHandle, ServeOptions};
use bfs_common::record::*;
use bfs_common::wire::*;

#[allow(dead_code, reason = "made for more than is tested here")]
#[path = "replayer/client.rs"]
mod client;

use client::*;

fn start(store: &Path, images: Option<&Path>) -> Result<ReplayerHandle, BackupError> {
    let retention = Retention::everything(1);
    let images = images.map(Path::to_owned);
    Replayer::start(ServeOptions { store: store.into(), retention, images, ..ServeOptions::default() })
}

fn why(result: Result<ReplayerHandle, BackupError>) -> String {
    match result {
        Err(BackupError::Images { why, .. }) => why,
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("it starts"),
    }
}

/// The bytes of file 2 at a checkpoint.
async fn content(replayer: &ReplayerHandle, at: u64) -> Vec<u8> {
    let mut connection = replayer.connect_local();
    let ask = Frame::GetContents { group: "g".into(), at: CheckpointId(at), objects: vec![ObjectId(2)] };
    connection.writer.send(&ask, b"").await.unwrap();
    let mut all = Vec::new();
    loop {
        let (frame, body) = connection.reader.next().await.unwrap().unwrap();
        let Frame::Content { last, .. } = frame else { panic!("{frame:?}") };
        all.extend_from_slice(&body);
        if last {
            return all;
        }
    }
}

fn names(folder: &Path) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

async fn file(replayer: &ReplayerHandle) -> Agent {
    let mut agent = Agent::new(replayer.connect_local()).await;
    agent.root();
    agent.object(2, FileKind::Regular, 0o600, b"");
    agent.entry(1, "a", 2);
    agent
}

/// What is written there is read there, by every command that opens the store, without being told again; without
/// the disk nothing begins.
#[tokio::test]
async fn they_are_where_the_store_says() {
    let dir = tempfile::tempdir().unwrap();
    let root = std::fs::canonicalize(dir.path()).unwrap();
    let (store, disk) = (root.join("store"), root.join("disk"));
    assert!(why(start(&store, Some(&store.join("in it")))).contains("overlaps the store"));
    let replayer = start(&store, Some(&disk)).unwrap();
    assert_eq!(replayer.images(), disk);
    let mut agent = file(&replayer).await;
    for n in 1..=6u8 {
        agent.write(2, 0, &[n; 1000]);
        agent.checkpoint().await;
    }
    assert_eq!((names(&disk.join("g")), names(&store.join("images"))), (5, 0));
    let mut connection = replayer.connect_local();
    let merge = Frame::Merge { group: "g".into(), from: CheckpointId(2), to: CheckpointId(4) };
    connection.writer.send(&merge, b"").await.unwrap();
    assert!(matches!(next(&mut connection).await, Frame::Merged { gone } if gone.len() == 2));
    assert_eq!(names(&disk.join("g")), 3);
    drop((agent, replayer));

    let replayer = start(&store, None).unwrap();
    for n in [1, 4, 5, 6] {
        assert_eq!(content(&replayer, n).await, [n as u8; 1000]);
    }
    drop(replayer);
    drop(start(&store, Some(&disk)).unwrap());
    assert_eq!(bfs_agent::backup::check::check(&store, true, &[]).unwrap().problems, []);
    assert!(why(start(&store, Some(&root.join("elsewhere")))).contains("has its before-images in"));
    assert!(why(start(&root.join("other"), Some(&disk))).contains("another store"));
    std::fs::rename(&disk, root.join("away")).unwrap();
    assert!(why(start(&store, None)).contains("is the disk mounted?"));
    assert!(matches!(bfs_agent::backup::check::check(&store, true, &[]), Err(BackupError::Images { .. })));
    std::fs::create_dir(&disk).unwrap();
    assert!(why(start(&store, None)).contains("is the disk mounted?"));
    // Nothing was written to what stood there instead.
    assert_eq!(names(&disk), 0);
    std::fs::remove_dir(&disk).unwrap();
    std::fs::rename(root.join("away"), &disk).unwrap();
    let replayer = start(&store, None).unwrap();
    assert_eq!(content(&replayer, 1).await, [1; 1000]);
    drop(replayer);
    // A store that has before-images of its own keeps them there.
    let own = root.join("own");
    let replayer = start(&own, None).unwrap();
    let mut agent = file(&replayer).await;
    agent.checkpoint().await;
    agent.write(2, 0, b"x");
    agent.checkpoint().await;
    drop((agent, replayer));
    assert!(why(start(&own, Some(&root.join("more")))).contains("before-images of its own"));
    drop(start(&own, None).unwrap());
}

/// While the disk is away no step is done, and status says so; when it is back, it goes on by itself.
#[tokio::test]
async fn a_disk_that_is_away_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let (store, disk) = (dir.path().join("store"), dir.path().join("disk"));
    let replayer = start(&store, Some(&disk)).unwrap();
    let mut agent = file(&replayer).await;
    agent.write(2, 0, &[1; 1000]);
    agent.checkpoint().await;
    std::fs::rename(&disk, dir.path().join("away")).unwrap();
    agent.write(2, 0, &[2; 1000]);
    agent.put(Record::Checkpoint { checkpoint: CheckpointId(2), label: CheckpointLabel::default() }, b"");
    agent.acked().await;
    let state = || replayer.status()[0].clone();
    while state().state != StoreState::Stuck {
        tokio::task::yield_now().await;
    }
    assert_eq!((state().confirmed, state().applied), (CheckpointId(2), CheckpointId(1)));
    assert!(state().trouble.unwrap().contains("disk/g"), "{:?}", state().trouble);
    assert_eq!(std::fs::read(tree(&store).join("a")).unwrap(), [1; 1000]);
    std::fs::rename(dir.path().join("away"), &disk).unwrap();
    agent.wait(|agent, _| agent.applied == CheckpointId(2)).await;
    assert_eq!(content(&replayer, 1).await, [1; 1000]);
    assert_eq!(content(&replayer, 2).await, [2; 1000]);
}

/// A file system that goes with the test.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0).status();
    }
}

/// When it is full, nothing is taken that would need it, nothing is confirmed, and it goes on when there is room.
#[tokio::test]
async fn a_full_disk_is_a_state() {
    let dir = tempfile::tempdir().unwrap();
    let (store, disk) = (dir.path().join("store"), dir.path().join("disk"));
    std::fs::create_dir(&disk).unwrap();
    let mut mount = std::process::Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", "size=32m", "tmpfs"]).arg(&disk);
    assert!(mount.status().unwrap().success(), "needs root");
    let _mounted = Mounted(&disk);
    let replayer = start(&store, Some(&disk)).unwrap();
    let mut agent = file(&replayer).await;
    let text = |n: u8| vec![n; 1 << 20];
    for n in 1..=3 {
        agent.write(2, 0, &text(n));
        agent.checkpoint().await;
    }
    let mut others = std::fs::File::create(disk.join("of others")).unwrap();
    while std::io::Write::write_all(&mut others, &text(1)).is_ok() {}
    agent.write(2, 0, &text(4));
    agent.flush().await;
    let refused = refusal(&mut agent.connection).await;
    assert!(matches!(&refused, Refusal::Full(why) if why.contains("disk is full")), "{refused:?}");
    assert_eq!(replayer.status()[0].state, StoreState::Full);
    assert_eq!(replayer.status()[0].applied, CheckpointId(3));
    drop(others);
    std::fs::remove_file(disk.join("of others")).unwrap();
    let epoch = agent.epoch;
    let mut agent = Agent::resume(replayer.connect_local(), Some(epoch)).await;
    agent.next_checkpoint = 4;
    agent.write(2, 0, &text(4));
    agent.checkpoint().await;
    for n in 1..=4 {
        assert!(content(&replayer, u64::from(n)).await == text(n), "checkpoint {n}");
    }
    drop((agent, replayer));
}
