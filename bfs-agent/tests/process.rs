//! Images of processes: sent by an agent, kept with their checkpoint, given out.

use std::path::Path;

use bfs_agent::backup::retention::Retention;
use bfs_agent::backup::{Replayer, ServeOptions};
use bfs_agent::generation::Client;
use bfs_agent::net::Connection;
use bfs_common::record::*;
use bfs_common::wire::*;

#[allow(dead_code, reason = "made for more than is tested here")]
#[path = "replayer/client.rs"]
mod client;

use client::*;

async fn ask(to: &mut Connection, frame: Frame, body: &[u8]) -> (Frame, Vec<u8>) {
    to.writer.send(&frame, body).await.unwrap();
    let (frame, body) = to.reader.next().await.unwrap().unwrap();
    (frame, body.to_vec())
}

fn put(epoch: Epoch, at: u64) -> Frame {
    Frame::PutProcess { group: "g".into(), epoch, checkpoint: CheckpointId(at), made_ns: None }
}

/// Sends a set of one file of whole blocks; gives how many of these were wanted.
async fn send(to: &mut Connection, epoch: Epoch, at: u64, blocks: &[u8]) -> usize {
    assert_eq!(ask(to, put(epoch, at), b"").await.0, Frame::ProcessBegun);
    let digest = |byte: &u8| *blake3::hash(&[*byte; PROCESS_BLOCK]).as_bytes();
    let digests: Vec<u8> = blocks.iter().flat_map(digest).collect();
    let size = (blocks.len() * PROCESS_BLOCK) as u64;
    let (frame, bits) = ask(to, Frame::ProcessBlocks { file: "pages-1.img".into(), size }, &digests).await;
    assert_eq!(frame, Frame::ProcessWanted);
    let wanted: Vec<u8> = (0..blocks.len())
        .filter(|index| bits[index / 8] & (1 << (index % 8)) != 0)
        .map(|index| blocks[index])
        .collect();
    for byte in &wanted {
        to.writer.send(&Frame::ProcessBytes, &[*byte; PROCESS_BLOCK]).await.unwrap();
    }
    assert_eq!(ask(to, Frame::ProcessEnd, b"").await.0, Frame::ProcessKept);
    wanted.len()
}

async fn generations(to: &mut Connection) -> Vec<(u64, Option<u64>)> {
    to.writer.send(&Frame::GetGenerations { group: "g".into() }, b"").await.unwrap();
    let Frame::Generations { lines, last: true } = next(to).await else { panic!() };
    lines.into_iter().map(|line| (line.checkpoint.0, line.process)).collect()
}

fn images(store: &Path) -> usize {
    std::fs::read_dir(store.join("process/g")).unwrap().count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_has_its_images_for_as_long_as_it_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let keep = |last| ServeOptions {
        store: store.clone(),
        retention: Retention::last(last, 1),
        ..ServeOptions::default()
    };
    let replayer = Replayer::start(keep(3)).unwrap();
    let mut agent = Agent::new(replayer.connect_local()).await;
    agent.root();
    agent.checkpoint().await;
    let mut images_way = replayer.connect_local();
    assert_eq!(send(&mut images_way, agent.epoch, 1, &[1, 2, 3]).await, 3);
    agent.object(2, FileKind::Regular, 0o600, b"");
    agent.entry(1, "a", 2);
    agent.checkpoint().await;
    // Without any.
    agent.write(2, 0, b"x");
    agent.checkpoint().await;
    assert_eq!(send(&mut images_way, agent.epoch, 3, &[1, 9, 3]).await, 1);
    let all = 3 * PROCESS_BLOCK as u64;
    assert_eq!(generations(&mut images_way).await, [(1, Some(all)), (2, None), (3, Some(all))]);

    let read = |replayer: &bfs_agent::backup::ReplayerHandle, at: u64| {
        let connection = replayer.connect_local();
        std::thread::spawn(move || {
            let mut client = Client::open(async { Ok(connection) }).unwrap();
            let mut bytes = Vec::new();
            let done = client.process("g", CheckpointId(at), |file, piece| {
                assert_eq!(file, "pages-1.img");
                bytes.extend_from_slice(piece);
                Ok(())
            });
            done.map(|()| bytes.chunks(PROCESS_BLOCK).map(|block| block[0]).collect::<Vec<_>>())
        })
        .join()
        .unwrap()
    };
    assert_eq!(read(&replayer, 1).unwrap(), [1, 2, 3]);
    assert_eq!(read(&replayer, 3).unwrap(), [1, 9, 3]);
    assert!(read(&replayer, 2).is_err());

    // The first goes, and with it what only it needed; its pages stay for 3.
    agent.write(2, 0, b"y");
    agent.checkpoint().await;
    agent.write(2, 0, b"z");
    agent.checkpoint().await;
    bfs_wait(|| images(&store) == 3).await;
    assert_eq!(read(&replayer, 3).unwrap(), [1, 9, 3]);
    drop((agent, images_way, replayer));
    // And after a start.
    let replayer = Replayer::start(keep(3)).unwrap();
    assert_eq!(read(&replayer, 3).unwrap(), [1, 9, 3]);
    drop(replayer);
    assert_eq!(bfs_agent::backup::check::check(&store, true, &[]).unwrap().problems, []);
    let pages = store.join("process/g/00000000000000000003.pages");
    let mut bytes = std::fs::read(&pages).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&pages, bytes).unwrap();
    let problems = bfs_agent::backup::check::check(&store, true, &[]).unwrap().problems;
    assert!(
        problems[0].why.contains("slot 0") && problems[0].generations == [CheckpointId(3)],
        "{problems:?}"
    );
}

async fn bfs_wait(mut done: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !done() {
        assert!(std::time::Instant::now() < deadline, "it does not come");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn images_that_do_not_arrive_whole_or_in_time_are_none() {
    let dir = tempfile::tempdir().unwrap();
    let replayer = serve(&dir.path().join("store"));
    let mut agent = Agent::new(replayer.connect_local()).await;
    agent.root();
    agent.checkpoint().await;
    let refused = |frame: Frame, body: &'static [u8]| {
        let mut connection = replayer.connect_local();
        async move {
            connection.writer.send(&frame, body).await.unwrap();
            refusal(&mut connection).await
        }
    };
    // Out of turn, of nobody, of an epoch that is not.
    assert!(matches!(refused(Frame::ProcessEnd, b"").await, Refusal::Bad(_)));
    assert!(matches!(refused(Frame::ProcessBytes, b"x").await, Refusal::Bad(_)));
    assert!(matches!(refused(put(agent.epoch.next(), 1), b"").await, Refusal::Bad(_)));
    // The connection breaks in the midst.
    let mut broken = replayer.connect_local();
    assert_eq!(ask(&mut broken, put(agent.epoch, 1), b"").await.0, Frame::ProcessBegun);
    let digest = *blake3::hash(&[1; PROCESS_BLOCK]).as_bytes();
    let blocks = Frame::ProcessBlocks { file: "a".into(), size: PROCESS_BLOCK as u64 };
    assert_eq!(ask(&mut broken, blocks, &digest).await.1, [1]);
    assert!(matches!(refused(put(agent.epoch, 1), b"").await, Refusal::Busy { .. }));
    drop(broken);
    bfs_wait(|| images(&dir.path().join("store")) == 0).await;
    // It waits for its checkpoint.
    let mut early = replayer.connect_local();
    early.writer.send(&put(agent.epoch, 2), b"").await.unwrap();
    agent.object(2, FileKind::Regular, 0o600, b"");
    agent.entry(1, "a", 2);
    agent.checkpoint().await;
    assert_eq!(next(&mut early).await, Frame::ProcessBegun);
    // Whoever lost the group cannot end what it began.
    let old = agent.epoch;
    drop(agent);
    let agent = Agent::new(replayer.connect_local()).await;
    assert!(agent.epoch > old);
    early.writer.send(&Frame::ProcessEnd, b"").await.unwrap();
    assert!(matches!(refusal(&mut early).await, Refusal::Fenced { .. }));
    drop(early);
    let mut look = replayer.connect_local();
    assert!(generations(&mut look).await.iter().all(|(_, process)| process.is_none()));
}
