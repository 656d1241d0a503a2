//! Records that come packed.

use bfs_common::record::*;
use bfs_common::wire::*;

use super::client::*;

/// Packed records are the same records, where that was agreed on; what a peer says about their length takes no memory.
#[tokio::test]
async fn packed_records_are_taken_where_that_was_agreed_on() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let replayer = serve(&store);
    let hello = |lz4| Frame::Hello {
        group: "g".into(),
        group_id: GROUP_ID,
        boot_id: [1; 16],
        epoch: None,
        take_over: true,
        maps: Vec::new(),
        lz4,
    };
    let text = "one line like another\n".repeat(1000);
    let packed = |agent: &mut Agent| {
        let plain = agent.batch.split();
        let body = pack(&plain).expect("text gets smaller");
        let (first, count) = (agent.first.take().unwrap(), std::mem::take(&mut agent.count));
        (Frame::Packed { first, count, plain_len: plain.len() as u32 }, body)
    };
    let mut connection = replayer.connect_local();
    connection.writer.send(&hello(true), b"").await.unwrap();
    let welcome = next(&mut connection).await;
    assert!(matches!(welcome, Frame::Welcome { lz4: true, .. }), "{welcome:?}");
    let mut agent = Agent::welcomed(connection, welcome);
    agent.root();
    agent.object(2, FileKind::Regular, 0o600, b"");
    agent.entry(1, "a", 2);
    agent.write(2, 0, text.as_bytes());
    let (frame, body) = packed(&mut agent);
    agent.connection.writer.send(&frame, &body).await.unwrap();
    agent.checkpoint().await;
    assert_eq!(read(tree(&store).join("a")), text);

    // Lengths that are not those of the bytes, bytes that are none, and a body that was changed on its way.
    agent.write(2, 0, text.replace("one", "two").as_bytes());
    let (frame, body) = packed(&mut agent);
    let Frame::Packed { first, count, plain_len } = frame else { unreachable!() };
    drop(agent);
    let mut flipped = body.clone();
    flipped[100] ^= 0x10;
    for (plain_len, body) in [
        (u32::MAX, body.clone()),
        (PACK_MAX as u32, body.clone()),
        (plain_len + 1, body.clone()),
        (plain_len, body[1..].to_vec()),
        (plain_len, flipped),
        (0, Vec::new()),
    ] {
        let mut connection = replayer.connect_local();
        connection.writer.send(&hello(true), b"").await.unwrap();
        next(&mut connection).await;
        connection.writer.send(&Frame::Packed { first, count, plain_len }, &body).await.unwrap();
        assert!(matches!(refusal(&mut connection).await, Refusal::Bad(_)), "{plain_len}");
    }
    // Who did not ask may not.
    let mut connection = replayer.connect_local();
    connection.writer.send(&hello(false), b"").await.unwrap();
    let welcome = next(&mut connection).await;
    assert!(matches!(welcome, Frame::Welcome { lz4: false, .. }), "{welcome:?}");
    connection.writer.send(&Frame::Packed { first, count, plain_len }, &body).await.unwrap();
    assert!(matches!(refusal(&mut connection).await, Refusal::Bad(_)));
    assert_eq!(read(tree(&store).join("a")), text);
}
